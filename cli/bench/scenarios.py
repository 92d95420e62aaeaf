"""What is measured, as two halves that run at the same time: one in the measuring process, one in its peer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .contenders import MIB, Way

MESSAGE: Final = bytes(range(64))
LARGE: Final = bytes(range(256)) * (MIB // 256)
BURST: Final = 64
PACKED: Final = 256
DONE: Final = b"d" * 64

Drive = Callable[[Way, int], Any]
Serve = Callable[[Way, int], None]


@dataclass(frozen=True)
class Scenario:
    """`drive` returns samples in ns (round trips) or the seconds that `count` messages took."""

    name: str
    drive: Drive
    serve: Serve
    able: Callable[[Way], bool] = lambda way: True


def _trip_drive(way: Way, count: int) -> list[int]:
    send, recv, clock, message = way.send, way.recv, time.perf_counter_ns, MESSAGE
    for _ in range(count // 10):
        send(message)
        recv()
    samples = []
    for _ in range(count):
        begin = clock()
        send(message)
        recv()
        samples.append(clock() - begin)
    send(message)
    if bytes(recv()) != message:
        raise ValueError("another message came back than was sent")
    return samples


def _trip_serve(way: Way, count: int) -> None:
    send, recv = way.send, way.recv
    for _ in range(count + count // 10 + 1):
        send(bytes(recv()))


def _finish(way: Way, begin: float) -> float:
    way.recv()
    return time.perf_counter() - begin


def _single_drive(way: Way, count: int) -> float:
    send, message = way.send, MESSAGE
    begin = time.perf_counter()
    for _ in range(count):
        send(message)
    return _finish(way, begin)


def _single_serve(way: Way, count: int) -> None:
    recv = way.recv
    for _ in range(count):
        recv()
    way.send(DONE)


def _burst_drive(way: Way, count: int) -> float:
    send_many, messages = way.send_many, [MESSAGE] * BURST
    assert send_many is not None
    begin = time.perf_counter()
    for _ in range(count // BURST):
        send_many(messages)
    return _finish(way, begin)


def _burst_serve(way: Way, count: int) -> None:
    recv_many = way.recv_many
    assert recv_many is not None
    left = count // BURST * BURST
    while left:
        left -= len(recv_many(BURST))
    way.send(DONE)


def _packed_drive(way: Way, count: int) -> float:
    send_packed, records = way.send_packed, memoryview(np.tile(np.frombuffer(MESSAGE, np.uint8), PACKED).data)
    assert send_packed is not None
    begin = time.perf_counter()
    for _ in range(count // PACKED):
        send_packed(records)
    return _finish(way, begin)


def _packed_serve(way: Way, count: int) -> None:
    recv_packed, out = way.recv_packed, memoryview(np.zeros(PACKED * 64, np.uint8).data)
    assert recv_packed is not None
    left = count // PACKED * PACKED
    while left:
        left -= recv_packed(out[: min(PACKED, left) * 64])
    way.send(DONE)


def _large_drive(way: Way, count: int) -> float:
    send = way.send_large
    assert send is not None
    begin = time.perf_counter()
    for _ in range(count):
        send(LARGE)
    return _finish(way, begin)


def _large_serve(way: Way, count: int) -> None:
    recv = way.recv_large
    assert recv is not None
    for _ in range(count):
        data = recv()
    if len(data) != MIB or data[-256:] != LARGE[-256:]:
        raise ValueError("another payload came than was sent")
    way.send(DONE)


def _fill_drive(way: Way, count: int) -> float:
    fill = way.fill
    assert fill is not None
    begin = time.perf_counter()
    for _ in range(count):
        fill(LARGE)
    return _finish(way, begin)


def _loan_drive(way: Way, count: int) -> float:
    loan = way.loan
    assert loan is not None
    begin = time.perf_counter()
    for _ in range(count):
        loan(MIB)
    return _finish(way, begin)


def _borrow_serve(way: Way, count: int) -> None:
    borrow = way.borrow
    assert borrow is not None
    for _ in range(count):
        borrow()
    way.send(DONE)


def _idle_drive(way: Way, milliseconds: int) -> float:
    time.sleep(milliseconds / 1000)
    way.send(MESSAGE)
    way.recv()
    return milliseconds / 1000


def _idle_serve(way: Way, milliseconds: int) -> None:
    way.recv()
    way.send(DONE)


SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario("round trip", _trip_drive, _trip_serve),
        Scenario("single", _single_drive, _single_serve),
        Scenario("burst", _burst_drive, _burst_serve, lambda way: way.send_many is not None),
        Scenario("packed", _packed_drive, _packed_serve, lambda way: way.send_packed is not None),
        Scenario("copied", _large_drive, _large_serve, lambda way: way.send_large is not None),
        Scenario("filled", _fill_drive, _borrow_serve, lambda way: way.fill is not None),
        Scenario("loaned", _loan_drive, _borrow_serve, lambda way: way.loan is not None),
        Scenario("idle", _idle_drive, _idle_serve),
    )
}
