"""Wires of shared memory between two engines: what becomes of a link whose wire breaks, and how a wire is handed over."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import DecodeError

from snap.modules.pony import setup, wires
from snap.modules.pony.wires import Offer, Wire
from tests.pony_hosts import Host, join
from tests.pony_rig import Side
from tests.test_pony_control import Both, agreed, hosts, speak
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
        join(two.a, two.b, wire=wire, **two.how)
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
    join(two.a, two.b, wire=again, **two.how)
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
        join(two.a, other, **two.how)
        aside = two.near.connect("c/app")
        back = app.accept(SOON)
        for turn in range(8):
            wire = Wire.make(1472, 64)
            join(two.a, two.b, wire=wire, **two.how)
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


# -- set-ups ----------------------------------------------------------------------------------------------------

__all__ = ["hosts"]


def wires_of(alpha: Side, beta: Side) -> tuple[Any, Any]:
    """What the engines were told of a wire, with all else that they were told checked."""
    at_alpha, at_beta = agreed(alpha, beta)
    return at_alpha["wire"], at_beta["wire"]


def test_hosts_of_one_machine_get_the_two_ends_of_one_wire(hosts: Both) -> None:
    alpha, beta = hosts.pair()
    beta.start()
    alpha.start().want("beta")
    at_alpha, at_beta = wires_of(alpha, beta)
    assert (at_alpha["side"], at_beta["side"]) == (1, 0)
    assert (at_alpha["frames"], at_alpha["mtu"]) == (at_beta["frames"], at_beta["mtu"])
    assert alpha.engine.segments == [(1, beta.engine.segments[0][1])]
    sockets = Path("/proc/net/unix").read_text()
    assert "@snap-pony-" not in sockets


@pytest.mark.parametrize("off", [0, 1])
def test_either_host_may_want_no_wire(hosts: Both, off: int) -> None:
    how: list[dict[str, Any]] = [{}, {}]
    how[off] = {"shared_memory": False}
    alpha, beta = hosts.pair(*how)
    beta.start()
    alpha.start().want("beta")
    assert wires_of(alpha, beta) == (None, None)


@pytest.mark.parametrize("what", ["_take", "Offer"])
def test_without_a_way_to_hand_it_over_there_is_udp(
    hosts: Both, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fail(_: object) -> None:
        if what == "Offer":
            raise OSError("none left")

    monkeypatch.setattr(wires, what, fail)
    alpha, beta = hosts.pair()
    beta.start()
    alpha.start().want("beta")
    assert wires_of(alpha, beta) == (None, None)


def test_hosts_of_two_machines_offer_nothing(hosts: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    alpha, beta = hosts.pair()
    said = setup.encode(
        setup.Hello(
            "alpha", "beta", [2], 1472, 5, 4747, True, "0" * 64, features=[*setup.FEATURES, "machine-x"]
        )
    )
    beta.start(deadline=1.0)
    answer = setup.Reader().feed(speak(beta, said, alpha).partition(b"\n")[0] + b"\n")
    assert isinstance(answer, setup.Hello) and answer.wire == ""


class Knocks:
    """What `Offer.serve` waits on: connections, until there are none."""

    def __init__(self, count: int) -> None:
        self.count = count

    def waits_for(self, other: socket.socket) -> bool:
        self.count -= 1
        return self.count >= 0


def knock(offer: Offer, token: bytes) -> socket.socket:
    sock = wires._socket()
    sock.settimeout(SOON)
    sock.connect(wires._parts(offer.told)[0])
    sock.sendall(token)
    return sock


def test_only_who_was_told_gets_a_wire_and_only_one() -> None:
    with contextlib.closing(Offer(1472)) as offer:
        token = wires._parts(offer.told)[1]
        with (
            knock(offer, b"0" * len(token)) as stranger,
            knock(offer, b"0") as other,
            knock(offer, token) as told,
        ):
            offer.serve(Knocks(3))  # type: ignore[arg-type]
            assert offer.taken
            wire = Wire.receive(told)
            assert os.fstat(wire.fds[0]).st_ino == os.fstat(offer.wire.fds[0]).st_ino
            wire.close()
            for each in (stranger, other):
                with pytest.raises((OSError, DecodeError)):
                    Wire.receive(each)
        with knock(offer, token) as late:
            offer.serve(Knocks(1))  # type: ignore[arg-type]
            late.settimeout(0.1)
            with pytest.raises(TimeoutError):
                Wire.receive(late)


def test_another_user_gets_no_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    with wires.offered(1472) as offer:
        assert offer is not None
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert wires._take(offer.told) is None
        with knock(offer, wires._parts(offer.told)[1]):
            offer.serve(Knocks(1))  # type: ignore[arg-type]
        assert not offer.taken


@pytest.mark.netns
@pytest.mark.root
def test_from_another_network_namespace_a_wire_cannot_be_reached() -> None:
    with wires.offered(1472) as offer:
        assert offer is not None
        code = f"from snap.modules.pony import wires; assert wires._take({offer.told!r}) is None"
        subprocess.run(["unshare", "--net", sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("data", [b"", b"{}", b"x", b'{"frames":1,"mtu":1}', b'{"frames":-1,"mtu":1}'])
def test_what_is_no_wire_is_not_received_and_leaves_no_descriptor(data: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, two:
        if data:
            socket.send_fds(one, [data], [0, 1] if b"1" in data else [0, 1, 2])
        one.shutdown(socket.SHUT_WR)
        with pytest.raises((OSError, DecodeError)):
            Wire.receive(two)
    assert len(os.listdir("/proc/self/fd")) == before
