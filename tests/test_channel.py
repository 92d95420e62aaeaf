"""`Channel`: asyncio forms over real rings and eventfds, NumPy records, states, and who is told when it closes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from snap.dataplane import _native
from snap.ipc import (
    Channel,
    ClosedError,
    DeadlineError,
    DeniedError,
    FullError,
    MessageSizeError,
    NotRunningError,
    PeerGoneError,
    RevokedError,
    UsageError,
)
from tests.waiting import LIMIT, run

RECORD = np.dtype([("key", "<u4"), ("price", "<f8"), ("name", "S4")])
Make = Callable[..., Any]


# -- asyncio ------------------------------------------------------------------------------------------------


def test_a_message_that_is_there_is_received_without_waiting(channel_pair: Make) -> None:
    client, server = channel_pair()
    server.send(b"ready")
    assert run(client.arecv()) == b"ready"


def test_a_coroutine_that_waits_is_woken_by_a_message_from_another_thread(channel_pair: Make) -> None:
    client, server = channel_pair()

    async def main() -> list[bytes]:
        received = []
        for number in range(200):
            waiting = asyncio.ensure_future(client.arecv())
            await asyncio.sleep(0)
            await asyncio.to_thread(server.send, b"%d" % number)
            received.append(await waiting)
        return received

    assert run(main()) == [b"%d" % number for number in range(200)]


def test_no_ring_is_lost_between_a_thread_that_answers_at_once_and_a_loop(channel_pair: Make) -> None:
    client, server = channel_pair()
    rounds = 3000

    def echo() -> None:
        for _ in range(rounds):
            server.send(server.recv(timeout=LIMIT), timeout=LIMIT)

    async def main() -> None:
        thread = threading.Thread(target=echo)
        thread.start()
        for number in range(rounds):
            await client.asend(b"%d" % number)
            assert await client.arecv() == b"%d" % number
        thread.join()

    run(main())


def test_a_sender_without_room_waits_until_the_peer_takes_something(channel_pair: Make) -> None:
    client, server = channel_pair(slots=64)
    messages = [b"%d" % number for number in range(5000)]
    received: list[bytes] = []

    def take() -> None:
        while len(received) < len(messages):
            received.extend(server.recv_many(7, timeout=LIMIT))

    async def main() -> int:
        thread = threading.Thread(target=take)
        thread.start()
        sent: int = await client.asend_many(messages)
        thread.join()
        return sent

    assert run(main()) == len(messages)
    assert received == messages


def test_one_coroutine_sends_while_another_receives_on_the_same_channel(channel_pair: Make) -> None:
    client, server = channel_pair(slots=64)
    count = 3000

    def echo() -> None:
        done = 0
        while done < count:
            burst = server.recv_many(64, timeout=LIMIT)
            done += server.send_many(burst, timeout=LIMIT)

    async def main() -> list[bytes]:
        thread = threading.Thread(target=echo)
        thread.start()

        async def produce() -> None:
            for number in range(count):
                await client.asend(b"%d" % number)

        producing = asyncio.ensure_future(produce())
        received: list[bytes] = []
        while len(received) < count:
            received += await client.arecv_many(64)
        await producing
        thread.join()
        return received

    assert run(main()) == [b"%d" % number for number in range(count)]


def test_payloads_and_loans_go_in_place_through_a_loop(channel_pair: Make) -> None:
    client, server = channel_pair(up_bytes=1 << 16, down_bytes=1 << 16)

    async def main() -> None:
        for number in range(20):
            loan = await client.aloan(40_000)
            loan.view[:4] = b"%04d" % number
            await client.asend_loan(loan, tag=number)
            with server.receive(timeout=0) as payload:
                assert (bytes(payload.view[:4]), payload.tag) == (b"%04d" % number, number)
                server.send(bytes(payload.view))
            with await client.areceive() as answer:
                assert len(answer) == 40_000

    run(main())


def test_a_loan_waits_for_pool_memory_that_the_peer_gives_back(channel_pair: Make) -> None:
    client, server = channel_pair(up_bytes=1 << 16)

    async def main() -> None:
        await client.asend_loan(await client.aloan(60_000))
        waiting = asyncio.ensure_future(client.aloan(60_000))
        await asyncio.sleep(0)
        assert not waiting.done()
        await asyncio.to_thread(server.recv, LIMIT)
        (await waiting).release()

    run(main())


@pytest.mark.parametrize(
    "wait",
    [
        lambda channel: channel.arecv(timeout=0.01),
        lambda channel: channel.areceive(timeout=0.01),
        lambda channel: channel.asend(b"x", timeout=0.01),
        lambda channel: channel.aloan(60_000, timeout=0.01),
    ],
    ids=["arecv", "areceive", "asend", "aloan"],
)
def test_a_deadline_that_passes_raises_and_leaves_the_channel_usable(channel_pair: Make, wait: Any) -> None:
    client, server = channel_pair(slots=64, up_bytes=1 << 16)
    held = client.loan(60_000)
    with pytest.raises(FullError):
        while True:
            client.send(b"x", timeout=0)
    with pytest.raises(DeadlineError, match=r"within 0\.01 s"):
        run(wait(client))
    held.release()
    server.recv(timeout=0)
    server.send(b"still there")
    assert run(client.arecv()) == b"still there"


def test_bursts_report_by_their_length_what_the_deadline_left(channel_pair: Make) -> None:
    client, server = channel_pair(slots=64)
    assert run(client.arecv_many(8, timeout=0.01)) == []
    sent = run(client.asend_many([b"x"] * 1000, timeout=0.01))
    assert 64 <= sent < 1000
    assert len(server.recv_many(1000, timeout=0)) == sent


def test_a_cancelled_wait_loses_no_message(channel_pair: Make) -> None:
    client, server = channel_pair()

    async def main() -> list[bytes]:
        received = []
        for number in range(100):
            waiting = asyncio.ensure_future(client.arecv())
            await asyncio.sleep(0)
            server.send(b"%d" % number)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            received.append(await client.arecv())
        return received

    assert run(main()) == [b"%d" % number for number in range(100)]


@pytest.mark.parametrize(
    ("state", "error"), [("revoked", RevokedError), ("gone", PeerGoneError)], ids=["revoked", "gone"]
)
def test_waiting_coroutines_learn_at_once_what_became_of_the_channel(
    channel_pair: Make, state: str, error: type[Exception]
) -> None:
    pair = channel_pair(slots=64)
    client = pair.client
    while client.send_many([b"x"] * 64, timeout=0):
        pass

    async def main() -> list[Any]:
        waiting = [asyncio.ensure_future(client.arecv()), asyncio.ensure_future(client.asend(b"y"))]
        await asyncio.sleep(0.01)
        pair.control.set_state(state, "by the test")
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(answer) for answer in run(main())] == [error, error]


def test_a_paused_channel_keeps_its_readers_waiting_and_gives_all_when_it_goes_on(channel_pair: Make) -> None:
    pair = channel_pair()

    async def main() -> bytes:
        pair.server.send(b"kept")
        pair.control.set_state("paused")
        waiting = asyncio.ensure_future(pair.client.arecv())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        pair.control.set_state("open")
        return await waiting

    assert run(main()) == b"kept"


def test_closing_ends_the_waits_of_the_own_program(channel_pair: Make) -> None:
    client, _ = channel_pair()

    async def main() -> None:
        waiting = asyncio.ensure_future(client.arecv())
        await asyncio.sleep(0)
        client.close()
        with pytest.raises(ClosedError):
            await waiting

    run(main())


def test_iteration_gives_every_message_and_ends_when_the_channel_is_closed(channel_pair: Make) -> None:
    client, server = channel_pair()

    async def main() -> list[bytes]:
        server.send_many([b"a", b"b", b"c"])
        received = []
        async for message in client:
            received.append(message)
            if len(received) == 3:
                client.close()
        return received

    assert run(main()) == [b"a", b"b", b"c"]


def test_iteration_raises_when_the_peer_is_gone(channel_pair: Make) -> None:
    pair = channel_pair()

    async def main() -> None:
        pair.control.set_state("gone")
        async for _ in pair.client:
            pass

    with pytest.raises(PeerGoneError):
        run(main())


def test_nothing_stays_in_the_loop_when_nobody_waits(channel_pair: Make) -> None:
    client, server = channel_pair()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        waiting = [asyncio.ensure_future(client.arecv()) for _ in range(3)]
        await asyncio.sleep(0)
        server.send_many([b"1", b"2", b"3"])
        assert sorted(await asyncio.gather(*waiting)) == [b"1", b"2", b"3"]
        assert not loop.remove_reader(client.fileno())

    run(main())


def test_two_loops_may_send_and_receive_on_the_same_channel(channel_pair: Make) -> None:
    client, server = channel_pair(slots=64)
    count = 2000
    received: list[bytes] = []

    def receiving() -> None:
        async def receive() -> None:
            while len(received) < count:
                received.extend(await client.arecv_many(16))

        run(receive())

    def echo() -> None:
        done = 0
        while done < count:
            done += server.send_many(server.recv_many(64, timeout=LIMIT), timeout=LIMIT)

    threads = [threading.Thread(target=receiving), threading.Thread(target=echo)]
    for thread in threads:
        thread.start()
    messages = [b"%d" % number for number in range(count)]
    assert run(client.asend_many(messages)) == count
    for thread in threads:
        thread.join(LIMIT)
    assert received == messages


# -- records ------------------------------------------------------------------------------------------------


def records(count: int) -> Any:
    array = np.zeros(count, RECORD)
    array["key"] = range(count)
    array["price"] = np.linspace(0, 1, count)
    array["name"] = b"snap"
    return array


def test_records_arrive_as_they_were_sent(channel_pair: Make) -> None:
    client, server = channel_pair()
    assert client.send_array(records(40), tag=3) == 40
    out = np.empty(40, RECORD)
    assert server.recv_packed(out.view(np.uint8), RECORD.itemsize) == 40
    server.send_packed(out.view(np.uint8), RECORD.itemsize)
    answer = client.recv_array(RECORD, 100, timeout=LIMIT)
    assert answer.dtype == RECORD
    assert (answer == records(40)).all()


def test_records_that_do_not_lie_together_are_sent_in_their_order(channel_pair: Make) -> None:
    client, server = channel_pair()
    assert client.send_array(records(20)[::2]) == 10
    keys = [int.from_bytes(message[:4], "little") for message in server.recv_many(20)]
    assert keys == list(range(0, 20, 2))


def test_no_records_are_neither_sent_nor_waited_for(channel_pair: Make) -> None:
    client, _ = channel_pair()
    assert client.send_array(records(0)) == 0
    assert len(client.recv_array(RECORD, 0)) == 0
    assert len(client.recv_array(RECORD, 5, timeout=0)) == 0


def test_more_records_than_the_ring_holds_pass_by_asyncio_both_ways(channel_pair: Make) -> None:
    client, server = channel_pair(slots=64)
    count = 2000

    def echo() -> None:
        done = 0
        while done < count:
            messages = server.recv_many(16, timeout=LIMIT)
            done += server.send_many(messages, timeout=LIMIT)

    async def main() -> Any:
        thread = threading.Thread(target=echo)
        thread.start()
        sending = asyncio.ensure_future(client.asend_array(records(count)))
        received: list[Any] = []
        while sum(map(len, received)) < count:
            received.append(await client.arecv_array(RECORD, 300))
        thread.join()
        assert await sending == count
        return np.concatenate(received)

    assert (run(main()) == records(count)).all()


def test_no_records_within_the_timeout_are_an_empty_array(channel_pair: Make) -> None:
    client, _ = channel_pair()
    assert len(run(client.arecv_array(RECORD, 5, timeout=0.01))) == 0


def test_a_message_of_another_size_is_named_and_stays_to_be_received(channel_pair: Make) -> None:
    client, server = channel_pair()
    server.send(b"odd")
    with pytest.raises(MessageSizeError, match="3 bytes"):
        client.recv_array(RECORD, 5, timeout=0)
    assert client.recv(timeout=0) == b"odd"


@pytest.mark.parametrize("dtype", ["O", [("key", "u4"), ("thing", "O")], "V0"])
def test_records_with_python_objects_are_refused_both_ways(channel_pair: Make, dtype: Any) -> None:
    client, server = channel_pair()
    server.send(bytes(np.dtype(dtype).itemsize))
    with pytest.raises(UsageError, match="cannot be sent"):
        client.recv_array(dtype, 1, timeout=0)
    with pytest.raises(UsageError, match="cannot be sent"):
        client.send_array(np.empty(1, dtype))


# -- ownership ----------------------------------------------------------------------------------------------


def test_leaving_with_closes_once_and_tells_the_owner_once(channel_pair: Make) -> None:
    client = channel_pair().client
    told: list[str] = []
    with client.owned_by(lambda: told.append(client.state)):
        client.check()
    client.close()
    assert client.closed
    assert told == ["open"], "the owner hears of it first, while the channel is still whole"
    with pytest.raises(ClosedError):
        client.send(b"x")


def test_reopening_closes_the_old_channel_and_asks_the_owner_for_another(channel_pair: Make) -> None:
    old, new = channel_pair().client, channel_pair().client
    asked: list[float] = []

    def reopen(seconds: float) -> Channel:
        asked.append(seconds)
        return new

    assert old.owned_by(lambda: None, reopen).reopen(timeout=3.0) is new
    assert old.closed
    assert asked == [3.0]


def test_a_channel_that_nobody_can_open_again_says_so_and_stays_open(channel_pair: Make) -> None:
    client = channel_pair().client
    with pytest.raises(NotRunningError):
        client.reopen()
    with pytest.raises(NotRunningError):
        run(client.areopen())
    assert not client.closed


def test_a_client_without_the_right_to_send_or_receive_is_held_to_it_by_its_own_end(
    channel_pair: Make,
) -> None:
    pair = channel_pair()
    bells = (os.eventfd(0), os.eventfd(0))
    ends = (pair.ring.fd, pair.up.fd, pair.down.fd, 64, pair.up.size, pair.down.size, bells, 1)
    try:
        mute = Channel.make(_native.CLIENT, *ends, rights=frozenset({"recv"}))
        with pytest.raises(DeniedError):
            mute.send(b"x")
        mute.close()
    finally:
        for bell in bells:
            os.close(bell)
