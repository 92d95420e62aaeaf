"""The Python face of the crate: every method, its errors, and the lifetime of memory. No kernel is needed."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snap.dataplane import _native
from snap.dataplane.errors import (
    BusyError,
    ClosedError,
    DeadlineError,
    DeniedError,
    FaultedError,
    FullError,
    MessageSizeError,
    NotFoundError,
    PeerGoneError,
    ReleasedError,
    RevokedError,
    UsageError,
)

LIMIT = 20.0
"""Longer than anything here takes; only a wrong program meets it."""

OFF_STATE = 64
TAIL_UP = 4096
SLOTS_AREA = 8192
MODES = (_native.SPIN, _native.ADAPTIVE, _native.BLOCK)
Pairs = Callable[..., Any]


def until(ready: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + LIMIT
    while not (answer := ready()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.002)
    return answer


def poke(pair: Any, offset: int, value: int) -> None:
    """Write a word of the ring segment, as anyone with the descriptor can."""
    with mmap.mmap(pair.ring.fd, pair.ring.size) as memory:
        struct.pack_into("<Q", memory, offset, value)


def ends(pair: Any) -> str:
    """Python source that makes the arguments of an endpoint in a child that inherited the descriptors."""
    bells = (pair.server.fileno(), pair.client.fileno())
    sizes = (pair.up.size, pair.down.size)
    return repr((pair.ring.fd, pair.up.fd, pair.down.fd, 64, *sizes, bells, 1))


@contextlib.contextmanager
def child(pair: Any, role: int, body: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `end`, an endpoint of the pair's channel, and runs `body`."""
    prelude = (
        "import os, signal, sys, time\n"
        "from snap.dataplane import _native\n"
        f"end = _native.Endpoint({role}, *{ends(pair)})\n"
        "print('ready', flush=True)\n"
    )
    fds = (pair.ring.fd, pair.up.fd, pair.down.fd, pair.server.fileno(), pair.client.fileno())
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + body],
        pass_fds=fds,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


class Background:
    """A call in another thread, with its result or exception."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except BaseException as error:
            self.error = error

    def finish(self) -> Any:
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the call never returned"
        if self.error is not None:
            raise self.error.with_traceback(None)
        return self.result


# -- messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 47, 48, 49, 112, 113, 1007, 1008, 1009, 4096, 1 << 20])
def test_a_message_of_any_size_arrives_as_it_was_sent(channel_pair: Pairs, size: int) -> None:
    client, server = channel_pair()
    body = random.Random(size).randbytes(size)
    for sender, receiver in ((client, server), (server, client)):
        sender.send(body, tag=size)
        assert receiver.recv_tagged(timeout=LIMIT) == (size, body)
        sender.send(bytearray(body))
        assert receiver.recv(timeout=LIMIT) == body
        assert sender.stats["loans_out"] == 0


@pytest.mark.parametrize("wait", MODES)
def test_every_way_of_waiting_gets_the_message_that_comes_later(channel_pair: Pairs, wait: int) -> None:
    client, server = channel_pair()
    answer = Background(lambda: server.recv(timeout=LIMIT, wait=wait))
    time.sleep(0.05)
    client.send(b"later")
    assert answer.finish() == b"later"


@pytest.mark.parametrize("wait", MODES)
def test_every_way_of_waiting_gets_the_room_that_comes_later(channel_pair: Pairs, wait: int) -> None:
    client, server = channel_pair()
    sent = Background(lambda: client.send_many([b"%d" % number for number in range(1000)], wait=wait))
    got: list[bytes] = []
    while len(got) < 1000:
        got += server.recv_many(7, timeout=LIMIT)
    assert sent.finish() == 1000
    assert got == [b"%d" % number for number in range(1000)]


def test_bursts_keep_order_and_say_how_much_went(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    assert client.send_many([b"x"] * 100, timeout=0) == 64
    assert client.send_many([b"y"], timeout=0) == 0
    assert client.send_many([b"y"], timeout=0.01) == 0
    assert server.recv_many(10) == [b"x"] * 10
    assert server.recv_many(100) == [b"x"] * 54
    assert server.recv_many(5, timeout=0) == []
    assert server.recv_many(0) == []
    assert client.send_many(iter([b"a", bytearray(b"b")])) == 2
    assert server.recv_many(5) == [b"a", b"b"]
    assert server.try_recv() is None


def test_packed_bursts_are_records_of_one_buffer(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    records = np.zeros(40, dtype=[("a", "<u4"), ("b", "<u8")])
    records["a"] = np.arange(40)
    assert client.send_packed(records, records.itemsize) == 40
    out = np.zeros(64, dtype=records.dtype)
    assert server.recv_packed(out, out.itemsize) == 40
    assert (out[:40] == records).all()
    assert server.recv_packed(out, out.itemsize, timeout=0) == 0
    client.send(b"four")
    with pytest.raises(MessageSizeError, match="has 4 bytes"):
        server.recv_packed(bytearray(16), 8)
    assert server.recv() == b"four"


@pytest.mark.parametrize(
    "call",
    [
        lambda end: end.send("text"),
        lambda end: end.send(5),
        lambda end: end.send_many(5),
        lambda end: end.send_many(["text"]),
        lambda end: end.recv_packed(b"read-only", 1, timeout=0),
        lambda end: end.send_loan(b"no loan"),
        lambda end: end.send(b"", tag="x"),
    ],
)
def test_an_argument_of_the_wrong_type_is_a_type_or_buffer_error(
    channel_pair: Pairs, call: Callable[[Any], Any]
) -> None:
    client, _ = channel_pair()
    with pytest.raises((TypeError, BufferError)):
        call(client)
    client.send(b"usable")


@pytest.mark.parametrize(
    "call",
    [
        lambda end: end.send(b"", tag=-1),
        lambda end: end.send(b"", tag=1 << 64),
        lambda end: end.recv_many(-1, timeout=0),
        lambda end: end.recv(timeout=float("inf")),
        lambda end: end.recv(timeout=0.01, wait=9),
        lambda end: end.send_packed(b"12345", 2),
        lambda end: end.send_packed(b"12345", 0),
        lambda end: end.recv_packed(bytearray(4), 0),
        lambda end: end.loan(-1),
    ],
)
def test_an_argument_out_of_range_is_a_value_error(channel_pair: Pairs, call: Callable[[Any], Any]) -> None:
    client, _ = channel_pair()
    with pytest.raises((ValueError, OverflowError)):
        call(client)
    client.send(b"usable")


def test_wrong_arguments_make_no_endpoint(channel_pair: Pairs) -> None:
    pair = channel_pair()
    good: Any = (pair.ring.fd, -1, -1, 64, 0, 0, (pair.server.fileno(), pair.client.fileno()), 1)
    with pytest.raises(ValueError, match="role"):
        _native.Endpoint(2, *good)
    with pytest.raises(ValueError, match="negative"):
        _native.Endpoint(0, -1, *good[1:])
    for slots in (0, 63, 100, 128, 1 << 17):
        with pytest.raises(FaultedError, match="geometry"):
            _native.Endpoint(0, *good[:3], slots, *good[4:])
    with pytest.raises(FaultedError, match="generation"):
        _native.Endpoint(0, *good[:7], 2)
    with pytest.raises(FaultedError, match="geometry"):
        _native.Endpoint(0, pair.ring.fd, pair.up.fd, -1, 64, pair.up.size + 1, 0, *good[6:])
    with pytest.raises(ValueError, match="slots"):
        _native.ring_bytes(65)


def test_errors_of_room_and_size_are_specific(channel_pair: Pairs) -> None:
    client, server = channel_pair(up_bytes=4096)
    with pytest.raises(MessageSizeError, match="4097"):
        client.send(b"x" * 4097)
    with pytest.raises(MessageSizeError):
        client.loan(4097)
    with pytest.raises(DeadlineError):
        server.recv(timeout=0)
    with pytest.raises(DeadlineError):
        server.receive(timeout=0.01)
    loan = client.loan(4096)
    with pytest.raises(FullError):
        client.loan(1, timeout=0)
    with pytest.raises(DeadlineError):
        client.loan(1, timeout=0.01)
    loan.release()
    client.send_many([b"x"] * 64)
    with pytest.raises(FullError):
        client.send(b"x", timeout=0)
    with pytest.raises(DeadlineError):
        client.send(b"x", timeout=0.01)
    assert client.room() == 0
    assert server.room() == 4


def test_a_burst_keeps_no_error_to_itself_that_the_next_call_would_not_meet(channel_pair: Pairs) -> None:
    client, server = channel_pair(up_bytes=4096)
    with pytest.raises(TypeError):
        client.send_many([b"1", "text"])
    assert client.send_many([b"2", b"x" * 5000]) == 1
    with pytest.raises(MessageSizeError):
        client.send_many([b"x" * 5000])
    assert server.recv_many(10) == [b"1", b"2"]


def test_what_a_signal_handler_raises_ends_a_burst(channel_pair: Pairs) -> None:
    client, _ = channel_pair()

    def alarm(*_: object) -> None:
        raise TimeoutError("by the handler")

    previous = signal.signal(signal.SIGUSR1, alarm)
    try:
        timer = threading.Timer(0.05, lambda: signal.raise_signal(signal.SIGUSR1))
        timer.start()
        with pytest.raises(TimeoutError, match="handler"):
            client.send_many([b"x"] * 100, wait=_native.BLOCK)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_two_threads_in_one_half_are_told_and_the_first_one_goes_on(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    first = Background(lambda: server.recv(timeout=LIMIT, wait=_native.BLOCK))

    def refused() -> bool:
        try:
            server.recv(timeout=0)
        except BusyError:
            return True
        except DeadlineError:
            return False
        raise AssertionError("nothing was sent")

    until(refused, "the second receiver is told")
    server.send(b"the other half is free")
    assert client.recv(timeout=LIMIT) == b"the other half is free"
    client.send(b"to the first")
    assert first.finish() == b"to the first"


def test_statistics_count_what_went_each_way(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    client.send_many([b"abc"] * 5)
    server.recv_many(4)
    assert (client.stats["sent"], client.stats["sent_bytes"]) == (5, 15)
    assert (server.stats["received"], server.stats["received_bytes"]) == (4, 12)
    assert client.stats["received"] == server.stats["sent"] == 0
    assert {"bells", "loans_out"} <= client.stats.keys()


# -- rights, states, revocation ---------------------------------------------------------------------------------


def with_rights(pair: Any, rights: int) -> tuple[Any, Any]:
    bells = (pair.server.fileno(), pair.client.fileno())
    geometry = (pair.ring.fd, pair.up.fd, pair.down.fd, 64, pair.up.size, pair.down.size, bells, 1, -1, -1)
    return tuple(_native.Endpoint(role, *geometry, rights) for role in (_native.CLIENT, _native.SERVER))  # type: ignore[return-value]


def test_a_client_that_may_not_send_is_denied_and_not_believed(channel_pair: Pairs) -> None:
    pair = channel_pair()
    client, server = with_rights(pair, _native.RIGHT_RECV)
    with pytest.raises(DeniedError, match="send"):
        client.send(b"x")
    server.send(b"down")
    assert client.recv(timeout=LIMIT) == b"down"
    pair.client.send(b"by a client that ignores its rights")
    with pytest.raises(FaultedError, match="without the right"):
        server.recv(timeout=LIMIT)


def test_nothing_is_sent_to_a_client_that_may_not_receive(channel_pair: Pairs) -> None:
    client, server = with_rights(channel_pair(), _native.RIGHT_SEND)
    client.send(b"up")
    assert server.recv(timeout=LIMIT) == b"up"
    with pytest.raises(DeniedError, match="recv"):
        server.send(b"x")


@pytest.mark.parametrize(
    ("state", "error"),
    [("revoked", RevokedError), ("gone", PeerGoneError), ("moved", PeerGoneError), ("faulted", FaultedError)],
)
def test_a_state_ends_the_next_burst_and_every_wait(
    channel_pair: Pairs, state: str, error: type[Exception]
) -> None:
    pair = channel_pair()
    waits = [
        Background(lambda end=end, wait=wait: end.recv(timeout=LIMIT, wait=wait))  # type: ignore[misc]
        for end, wait in ((pair.client, _native.BLOCK), (pair.server, _native.ADAPTIVE))
    ]
    time.sleep(0.02)
    pair.control.set_state(state, "by the test")
    for wait in waits:
        with pytest.raises(error):
            wait.finish()
    for end in pair:
        for call in (end.check, lambda end=end: end.send(b"x"), end.try_recv, lambda end=end: end.loan(1)):
            with pytest.raises(error):
                call()
        assert end.state == ("gone" if state == "moved" and end.state == "gone" else state)
    assert pair.control.state == state


def test_a_shut_gate_stops_the_server_whatever_a_hostile_client_writes(channel_pair: Pairs) -> None:
    pair = channel_pair()
    pair.client.send_many([b"x"] * 10)
    pair.gate.shut(0)
    for word in (1, 2, 3, 4, 5, 6, 0, 255, 1 << 31):
        poke(pair, OFF_STATE, word)
        with pytest.raises((RevokedError, PeerGoneError)) as caught:
            pair.server.recv(timeout=0)
        assert caught.type is RevokedError or word == 6
        with pytest.raises((RevokedError, PeerGoneError)):
            pair.server.send(b"x")
    assert pair.server.stats["received"] == 0


def test_a_pause_holds_messages_until_it_ends_and_ctrl_c_still_works(channel_pair: Pairs) -> None:
    pair = channel_pair()
    pair.client.send(b"before")
    pair.control.set_state("paused")
    assert pair.server.state == "paused"
    assert pair.server.try_recv() is None
    with pytest.raises(FullError):
        pair.client.send(b"x", timeout=0)
    answer = Background(lambda: pair.server.recv(timeout=LIMIT))
    sent = Background(lambda: pair.client.send(b"after", timeout=LIMIT))
    time.sleep(0.02)
    pair.control.set_state("open")
    assert answer.finish() == b"before"
    sent.finish()
    assert pair.server.recv(timeout=LIMIT) == b"after"


def test_a_fault_names_its_reason_and_is_for_good(channel_pair: Pairs) -> None:
    pair = channel_pair()
    pair.client.send(b"x")
    poke(pair, SLOTS_AREA, 99)
    for _ in range(2):
        with pytest.raises(FaultedError, match="opcode"):
            pair.server.recv(timeout=LIMIT)
    assert pair.server.fault == "unknown opcode in a descriptor"
    with pytest.raises(FaultedError, match="opcode"):
        pair.client.send(b"the other end is told the reason")
    pair.control.set_state("open")
    assert pair.server.state == "faulted"


def test_what_was_sent_before_the_end_is_still_received(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    client.send_many([b"1", b"2"])
    client.close()
    client.close()
    assert client.closed
    assert server.recv_many(10) == [b"1", b"2"]
    with pytest.raises(PeerGoneError):
        server.recv(timeout=LIMIT)
    for call in (client.check, client.try_recv, lambda: client.send(b"x")):
        with pytest.raises(ClosedError):
            call()


@pytest.mark.parametrize("wait", MODES)
def test_a_wait_ends_when_either_end_closes(channel_pair: Pairs, wait: int) -> None:
    client, server = channel_pair()
    other = Background(lambda: server.recv(timeout=LIMIT, wait=wait))
    own = Background(lambda: client.recv(timeout=LIMIT, wait=wait))
    time.sleep(0.02)
    client.close()
    with pytest.raises(PeerGoneError):
        other.finish()
    with pytest.raises(ClosedError):
        own.finish()


def test_the_kernels_hold_tells_depths_and_refuses_nonsense(channel_pair: Pairs) -> None:
    pair = channel_pair()
    pair.client.send_many([b"x"] * 3)
    pair.server.send(b"y" * 100)
    assert pair.control.depth() == (3, 2)
    poke(pair, TAIL_UP, 1 << 50)
    assert pair.control.depth() == (-1, 2)
    with pytest.raises(UsageError):
        pair.control.set_state("asleep")
    with pytest.raises(ValueError, match="gate line"):
        pair.gate.open(_native.GATE_LINES, 1)
    pair.control.close()
    with pytest.raises(ClosedError):
        pair.control.depth()


# -- memory -----------------------------------------------------------------------------------------------------


def test_a_loan_is_filled_sent_and_read_in_place(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    with client.loan(10_000) as loan:
        assert len(loan) == 10_000
        array = np.frombuffer(loan.view, dtype=np.uint8)
        array[:] = 7
        with pytest.raises(BufferError, match="views"):
            client.send_loan(loan)
        del array
        client.send_loan(loan, tag=3)
    with pytest.raises(ReleasedError):
        _ = loan.view
    with pytest.raises(ReleasedError):
        client.send_loan(loan)
    with server.receive(timeout=LIMIT) as payload:
        assert (payload.tag, len(payload), bytes(payload)) == (3, 10_000, b"\7" * 10_000)
        assert client.stats["loans_out"] == 1
    assert client.stats["loans_out"] == 0


def test_a_view_used_after_release_raises(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    for size in (10, 10_000):
        client.send(b"a" * size)
        payload = server.receive(timeout=LIMIT)
        view = payload.view
        assert bytes(view[:3]) == b"aaa"
        payload.release()
        payload.release()
        with pytest.raises(ValueError, match="released"):
            view[0]
        for use in (lambda p=payload: p.view, lambda p=payload: bytes(p), lambda p=payload: memoryview(p)):
            with pytest.raises(ReleasedError):
                use()


def test_an_array_outlives_release_and_delays_only_the_giving_back(channel_pair: Pairs) -> None:
    client, server = channel_pair(up_bytes=8192)
    client.send(b"k" * 8192)
    payload = server.receive(timeout=LIMIT)
    array = np.frombuffer(payload, dtype=np.uint8)
    part = array[100:200]
    payload.release()
    assert client.stats["loans_out"] == 1
    with pytest.raises(FullError):
        client.loan(64, timeout=0)
    del array
    assert part.tobytes() == b"k" * 100
    assert client.stats["loans_out"] == 1
    del part
    assert client.stats["loans_out"] == 0
    client.loan(8192, timeout=0).release()


def test_a_received_array_cannot_be_written(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    for size in (10, 10_000):
        client.send(b"a" * size)
        with server.receive(timeout=LIMIT) as payload:
            array = np.frombuffer(payload.view, dtype=np.uint8)
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
            with pytest.raises(TypeError):
                payload.view[0] = 1
            with pytest.raises(BufferError):
                server.recv_packed(payload, 1, timeout=0)
            del array


def test_memory_stays_mapped_as_long_as_something_shows_it(channel_pair: Pairs) -> None:
    pair = channel_pair()
    end = with_rights(pair, 3)[1]
    pair.client.send(b"z" * 5000)
    array = np.frombuffer(end.receive(timeout=LIMIT), dtype=np.uint8)
    end.close()
    del end
    gc.collect()
    assert array.tobytes() == b"z" * 5000


def test_a_loan_left_unsent_goes_back(channel_pair: Pairs) -> None:
    client, _ = channel_pair()
    with client.loan(5000):
        assert client.stats["loans_out"] == 1
    assert client.stats["loans_out"] == 0
    loan = client.loan(5000)
    del loan
    assert client.stats["loans_out"] == 0
    loan = client.loan(5000)
    view = np.frombuffer(loan.view, dtype=np.uint8)
    with pytest.raises(BufferError):
        loan.release()
    del view
    loan.release()
    loan.release()
    assert client.stats["loans_out"] == 0


def test_a_loan_belongs_to_its_channel(channel_pair: Pairs) -> None:
    one, other = channel_pair().client, channel_pair().client
    with one.loan(100) as loan, pytest.raises(UsageError, match="another channel"):
        other.send_loan(loan)


def test_a_loan_on_its_way_cannot_be_written_or_taken_back(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    loan = client.loan(100)
    loan.view[:] = b"s" * 100
    client.send_many([b"x"] * 64)
    sending = Background(lambda: client.send_loan(loan, timeout=LIMIT, wait=_native.BLOCK))

    def held() -> bool:
        try:
            memoryview(loan).release()
        except ReleasedError:
            return True
        return False

    until(held, "send_loan waits for room")
    loan.release()
    assert server.recv_many(64) == [b"x"] * 64
    assert server.recv(timeout=LIMIT) == b"s" * 100
    sending.finish()
    assert client.stats["loans_out"] == 0
    client.check()


def test_a_loan_that_found_no_room_is_lent_as_before(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    loan = client.loan(100)
    client.send_many([b"x"] * 64)
    with pytest.raises(FullError):
        client.send_loan(loan, timeout=0)
    loan.view[:] = b"t" * 100
    server.recv_many(64)
    client.send_loan(loan, timeout=LIMIT)
    assert server.recv(timeout=LIMIT) == b"t" * 100


# -- descriptors and processes ----------------------------------------------------------------------------------


def test_a_thousand_channels_leave_no_descriptor_behind(channel_pair: Pairs) -> None:
    pair = channel_pair()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(1000):
        client, server = with_rights(pair, 3)
        client.stats, server.stats  # noqa: B018
        del client, server
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("wait", MODES)
@pytest.mark.parametrize("paused", [False, True])
def test_ctrl_c_ends_a_wait(channel_pair: Pairs, wait: int, paused: bool) -> None:
    pair = channel_pair()
    if paused:
        pair.client.send(b"held back by the pause")
        pair.control.set_state("paused")
    body = f"""
try:
    print('waiting', flush=True)
    end.recv(wait={wait})
except KeyboardInterrupt:
    print('interrupted', flush=True)
"""
    with child(pair, _native.SERVER, body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIMIT)[0] == "interrupted\n"


def test_a_killed_peer_ends_the_wait_when_the_kernel_says_so(channel_pair: Pairs) -> None:
    pair = channel_pair()
    with child(pair, _native.SERVER, "end.recv()\nend.send(b'up')\ntime.sleep(60)") as process:
        pair.client.send(b"hello")
        assert pair.client.recv(timeout=LIMIT) == b"up"
        answer = Background(lambda: pair.client.recv(timeout=LIMIT, wait=_native.BLOCK))
        process.kill()
        process.wait()
        pair.control.set_state("gone")
        with pytest.raises(PeerGoneError):
            answer.finish()


def test_a_shrunk_segment_is_a_fault_not_a_death(channel_pair: Pairs) -> None:
    pair = channel_pair(backend="posix")
    body = """
payload = end.receive()
end.send(b'taken')
end.recv()  # rings when the pool is gone
sum(payload.view)
try:
    end.send(b'x')
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""
    with child(pair, _native.SERVER, body) as process:
        pair.client.send(b"p" * 20_000)
        assert pair.client.recv(timeout=LIMIT) == b"taken"
        os.ftruncate(pair.up.fd, 0)
        pair.client.send(b"go")
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, err
        assert "FaultedError" in out
        assert "shrunk" in out


# -- waiting for many -------------------------------------------------------------------------------------------


def test_an_eventfd_is_rung_only_for_who_asked(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    bell = server.fileno()
    client.send(b"unasked")
    assert select.select([bell], [], [], 0)[0] == []
    assert not server.arm_recv()
    server.recv()
    assert server.arm_recv()
    client.send(b"asked")
    assert select.select([bell], [], [], LIMIT)[0] == [bell]
    server.drain_bell()
    assert select.select([bell], [], [], 0)[0] == []
    assert server.recv() == b"asked"
    assert server.try_recv() is None
    client.send_many([b"x"] * 64)
    with pytest.raises(FullError):
        client.send(b"x", timeout=0)
    assert client.arm_send()
    server.recv_many(64)
    server.try_recv()
    assert select.select([client.fileno()], [], [], LIMIT)[0] == [client.fileno()]


def test_a_poller_waits_for_messages_states_room_and_wake(channel_pair: Pairs) -> None:
    pair, other = channel_pair(), channel_pair()
    poller = _native.Poller()
    poller.add(pair.server)
    poller.add(other.server)
    assert not poller.wait(timeout=0)
    assert not poller.wait(timeout=0.02, wait=_native.BLOCK)
    waiting = Background(lambda: poller.wait(timeout=LIMIT, wait=_native.BLOCK))
    time.sleep(0.02)
    other.client.send(b"x")
    assert waiting.finish()
    assert other.server.recv(timeout=0) == b"x"
    waiting = Background(lambda: poller.wait(timeout=LIMIT, wait=_native.BLOCK))
    time.sleep(0.02)
    poller.wake()
    assert waiting.finish()
    pair.control.set_state("revoked")
    assert poller.wait(timeout=LIMIT)
    poller.remove(pair.server)
    assert not poller.wait(timeout=0)
    poller.close()


def test_a_poller_for_room_ignores_messages_until_room_comes(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    server.send_many([b"x"] * 64)
    with pytest.raises(FullError):
        server.send(b"x", timeout=0)
    client.send(b"a message meanwhile")
    poller = _native.Poller()
    poller.add(server, room=True)
    assert not poller.wait(timeout=0.02, wait=_native.BLOCK)
    poller.add(server)
    assert poller.wait(timeout=0.02, wait=_native.BLOCK)
    poller.add(server, room=True)
    waiting = Background(lambda: poller.wait(timeout=LIMIT, wait=_native.BLOCK))
    time.sleep(0.02)
    client.recv_many(64)
    client.try_recv()
    assert waiting.finish()
    server.send(b"x", timeout=0)
    poller.close()


# -- workers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stats() -> Iterator[tuple[int, _native.StatsPage]]:
    fd = os.memfd_create("stats", os.MFD_CLOEXEC)
    os.ftruncate(fd, _native.STATS_BYTES)
    page = _native.StatsPage(fd, False)
    yield fd, page
    page.close()
    os.close(fd)


@pytest.fixture
def state() -> _native.State:
    return blank_state()


def blank_state() -> _native.State:
    """The state of an echo engine: nothing."""
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _native.State.MIN_BYTES)
        name, version, oldest, objects = _native.engine_schema("echo")
        _native.State.format(fd, "echo", name, version, oldest, objects)
        return _native.State(fd)
    finally:
        os.close(fd)


def faults(worker: _native.Worker) -> list[int]:
    return [number for kind, number, _ in worker.take_news() if kind == "fault"]


@pytest.mark.parametrize("wait", [_native.ADAPTIVE, _native.BLOCK])
def test_an_echo_worker_serves_many_channels_and_any_size(
    channel_pair: Pairs, stats: tuple[int, _native.StatsPage], state: _native.State, wait: int
) -> None:
    fd, page = stats
    worker = _native.Worker("test", "echo", state, -1, 1, fd, 2, wait=wait)
    pairs = [channel_pair() for _ in range(4)]
    try:
        for number, pair in enumerate(pairs):
            worker.attach(number, pair.server, number)
            with pytest.raises(ClosedError):
                pair.server.send(b"the worker's now")
        for size in (0, 10, 1008, 1009, 100_000, 1 << 20):
            for pair in pairs:
                pair.client.send(b"e" * size, tag=size)
            for pair in pairs:
                assert pair.client.recv_tagged(timeout=LIMIT) == (size, b"e" * size)
        until(lambda: page.read(2)["work"] == 24, "the statistics show 24 messages")
        record = page.read(2)
        assert record["channels"] == 4
        assert record["heartbeat_ns"] <= time.monotonic_ns()
        assert page.read(1)["polls"] == 0
        worker.detach(0)
        pairs[0].client.send(b"for whoever serves next")
        pairs[1].client.send(b"still served")
        assert pairs[1].client.recv(timeout=LIMIT) == b"still served"
        assert faults(worker) == []
    finally:
        worker.stop()
    assert not worker.alive
    for pair in pairs[:2]:
        # The channel outlives the process that serves it: its client waits, until the kernel says otherwise.
        assert pair.client.state == "open"
        with pytest.raises(DeadlineError):
            pair.client.recv(timeout=0.01)


def test_a_client_that_does_not_read_makes_the_worker_sleep_not_spin(
    channel_pair: Pairs, stats: tuple[int, _native.StatsPage], state: _native.State
) -> None:
    fd, page = stats
    worker = _native.Worker("test", "echo", state, -1, 1, fd, 0, wait=_native.ADAPTIVE)
    client, server = channel_pair()
    try:
        worker.attach(1, server, 0)
        sent = 0
        while client.send_many([b"x"] * 64, timeout=0.2):
            sent = client.stats["sent"]
        assert sent == 128
        before = until(lambda: page.read(0)["polls"], "the worker publishes")
        time.sleep(0.5)
        # A spinning worker polls hundreds of thousands of times in this while; a sleeping one looks around twice.
        assert page.read(0)["polls"] - before < 20_000
        assert sum(len(client.recv_many(64, timeout=LIMIT)) for _ in range(2)) == 128
        assert client.recv_many(1, timeout=0.05) == []
    finally:
        worker.stop()


def test_a_worker_drops_a_hostile_channel_and_says_why(channel_pair: Pairs, state: _native.State) -> None:
    worker = _native.Worker("test", "echo", state, -1, 1, wait=_native.BLOCK)
    bad, good = channel_pair(), channel_pair()
    try:
        worker.attach(7, bad.server, 1)
        worker.attach(8, good.server, 2)
        poke(bad, TAIL_UP, 1 << 40)
        os.eventfd_write(bad.server.fileno(), 1)
        assert select.select([worker.fileno()], [], [], LIMIT)[0]
        assert until(lambda: faults(worker), "the fault") == [7]
        good.client.send(b"fine")
        assert good.client.recv(timeout=LIMIT) == b"fine"
        with pytest.raises(FaultedError):
            bad.client.recv(timeout=LIMIT)
    finally:
        worker.stop()


def test_wrong_arguments_make_no_worker(state: _native.State) -> None:
    with pytest.raises(NotFoundError, match="nosuch"):
        _native.Worker("test", "nosuch", state, -1, 1)
    with pytest.raises(ValueError, match="out of range"):
        _native.Worker("test", "echo", state, -1, 1, -1, _native.STATS_LINES)
    with pytest.raises(ValueError, match="out of range"):
        _native.Worker("test", "echo", state, -1, 1, budget=0)
    with pytest.raises(UsageError, match="own source"):
        _native.Worker("test", "echo", state, -1, 1, source=state)
    assert "echo" in _native.engines()


def test_a_statistics_page_is_written_by_its_owner_alone(stats: tuple[int, _native.StatsPage]) -> None:
    fd, page = stats
    with pytest.raises(DeniedError):
        page.write(0, polls=1, work=1, busy_ns=1, channels=1)
    writer = _native.StatsPage(fd, True)
    writer.write(3, polls=1, work=2, busy_ns=3, channels=4)
    record = page.read(3)
    assert [record[name] for name in ("polls", "work", "busy_ns", "channels")] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="no such"):
        page.read(_native.STATS_LINES)
    writer.close()
    with pytest.raises(ClosedError):
        writer.read(0)
