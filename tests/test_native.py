"""Messages through a channel: every call, its errors, its ways of waiting. No kernel is needed."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from snap.dataplane import _native
from snap.dataplane.errors import (
    BusyError,
    DeadlineError,
    FaultedError,
    FullError,
    MessageSizeError,
)
from tests.native_rig import MODES, Pairs
from tests.waiting import LIMIT, Background, until


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
