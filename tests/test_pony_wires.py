"""Wires of shared memory between two engines: what becomes of a link whose wire breaks, and how a wire is handed over."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from snap.modules.pony.wires import Wire
from tests.pony_hosts import Host, join
from tests.test_pony_hosts import SOON, Two, drain
from tests.waiting import until

BOTH = ("shared memory", "shared memory")
UDP = ("udp", "udp")
PAGE = 4096


@pytest.fixture(params=[{}, {"sealed": True}], ids=["clear", "sealed"])
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    made = Two(frames=64, **request.param)
    try:
        yield made
    finally:
        made.close()


def exchange(two: Two, turn: int) -> None:
    for number in range(30):
        two.out.send(b"%d/%d" % (turn, number))
        two.back.send(b"%d/%d" % (turn, number))
    for end in (two.back, two.out):
        assert drain(end, 30) == [b"%d/%d" % (turn, number) for number in range(30)]


# -- engines ----------------------------------------------------------------------------------------------------


def test_packets_go_by_the_wire_and_by_nothing_else(two: Two) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", 0))
        two.a.address = two.b.address = "{}:{}".format(*deaf.getsockname())
        wire = Wire.make(1472)
        join(two.a, two.b, wire=wire)
        wire.close()
        exchange(two, 0)
        with pytest.raises(BlockingIOError):
            deaf.recv(1, socket.MSG_DONTWAIT)
    assert two.ports() == BOTH


@pytest.mark.parametrize("who", ["a", "b"])
def test_the_successor_of_an_engine_goes_on_by_udp_and_wants_another_wire(two: Two, who: str) -> None:
    host, peer = (two.a, two.b) if who == "a" else (two.b, two.a)
    host.restart()
    exchange(two, 0)
    until(lambda: two.ports() == UDP)
    said: list[bytes] = []

    def wants() -> bool:
        said.extend(data for kind, _, data in host.worker.take_news() if kind == "said")
        return b'{"want":"%s"}' % peer.name.encode() in said

    until(wants)
    again = Wire.make(1472)
    join(two.a, two.b, wire=again)
    again.close()
    exchange(two, 1)
    assert two.ports() == BOTH


def test_who_does_not_answer_by_the_wire_is_sought_by_udp(two: Two) -> None:
    two.b.worker.stop(5.0)
    two.out.send(b"anybody?")
    until(lambda: two.a.flow("b")["port"] == "udp")
    two.b.restart()
    assert two.back.recv(SOON).data == b"anybody?"


def test_a_peer_that_writes_garbage_loses_the_wire_and_nothing_else(two: Two) -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    with Host("c") as other:
        app = other.open()
        app.bind("app")
        join(two.a, other)
        aside = two.near.connect("c/app")
        back = app.accept(SOON)
        for turn in range(8):
            wire = Wire.make(1472, 64)
            join(two.a, two.b, wire=wire)
            with mmap.mmap(wire.fds[0], 0) as memory:
                for _ in range(int(rng.integers(1, 64))):
                    # The words of both directions in page 1, or frames, which a checksum or a seal protects.
                    at = (
                        PAGE + 64 * int(rng.integers(0, 16))
                        if turn % 2
                        else int(rng.integers(PAGE, len(memory)))
                    )
                    size = min(8, len(memory) - at)
                    memory[at : at + size] = rng.bytes(size)
                    two.out.send(b"%d" % turn)
                    assert two.back.recv(SOON).data == b"%d" % turn
                exchange(two, turn)
                memory[PAGE : 2 * PAGE] = b"\xff" * PAGE
            exchange(two, turn)
            until(lambda: two.ports() == UDP)
            wire.close()
            aside.send(b"still here")
            assert back.recv(SOON).data == b"still here"


@pytest.mark.parametrize(
    "wrong",
    [
        {"side": 2},
        {"frames": 3},
        {"frames": 32},
        {"mtu": 1000},
        {"fds": [-1, 0, 0]},
        {"fds": [1 << 20, 0, 0]},
    ],
)
def test_what_is_no_wire_is_refused_and_changes_nothing(two: Two, wrong: dict[str, Any]) -> None:
    wire = Wire.make(1472, 64)
    request = {**wire.request(), **wrong}
    two.a.ask("reserve", host="b")
    with pytest.raises(Exception, match="wire|segment"):
        two.a.ask("attach", host="b", remote=1, address=two.b.address, version=2, mtu=1472, algorithm="swift",
                  wire=request)  # fmt: skip
    wire.close()
    assert two.ports() == BOTH
    exchange(two, 0)
