"""Pony Express over a bad network: packets are lost, doubled, damaged, late and held up, engines die, and nothing else is."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from snap.modules.pony import BusyError, ClosedByPeerError, Connection, Message, Pony, Right
from tests.pony_hosts import Host, join
from tests.waiting import until

ALL = Right.READ | Right.WRITE | Right.ATOMIC
LONG = 60.0
"""Longer than anything here takes; only a wrong program meets it."""
STREAMS = 3

BAD: dict[str, dict[str, Any]] = {
    "loss-1": {"loss": 0.01},
    "loss-10": {"loss": 0.1},
    "reorder": {"reorder": 0.3, "lateness_us": 2000},
    "duplicate": {"duplicate": 0.2},
    "corrupt": {"corrupt": 0.05},
    "stalls": {"stall_every_ms": 20, "stall_ms": 8},
    "all": {
        "loss": 0.03,
        "duplicate": 0.05,
        "corrupt": 0.02,
        "reorder": 0.1,
        "lateness_us": 1000,
        "stall_every_ms": 40,
        "stall_ms": 5,
    },
}


class Pair:
    """Two hosts with a bad network between them: what goes either way has faults."""

    def __init__(self, faults: dict[str, Any], **how: Any) -> None:
        self.seed = int(os.environ.get("SNAP_SEED", 0)) or int.from_bytes(os.urandom(4), "little")
        print(f"SNAP_SEED={self.seed}")
        self.rng = np.random.default_rng(self.seed)
        self.faults = faults
        self.a, self.b = Host("a"), Host("b")
        self.near, self.far = self.a.open(), self.b.open()
        self.far.bind("far")
        join(self.a, self.b, **how)
        self.spoil()
        self.out: Connection = self.near.connect("b/far", LONG)
        self.back: Connection = self.far.accept(LONG)

    def spoil(self) -> None:
        for number, host in enumerate((self.a, self.b)):
            host.ask("faults", seed=self.seed + number, **self.faults)

    def restart(self, *hosts: Host) -> None:
        """A new engine begins with a good network."""
        for host in hosts:
            host.restart()
        self.spoil()

    def close(self) -> None:
        self.a.close()
        self.b.close()


@pytest.fixture(params=BAD)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(BAD[request.param])
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def good() -> Iterator[Pair]:
    """The network becomes a bad one during the test."""
    made = Pair({})
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=["version-1", "sealed", "jumbo"])
def worst(request: pytest.FixtureRequest) -> Iterator[Pair]:
    hows = {"version-1": {"version": 1}, "sealed": {"sealed": True}, "jumbo": {"mtu": 8972}}
    made = Pair(BAD["all"], **hows[request.param])
    try:
        yield made
    finally:
        made.close()


class Talk:
    """Messages of one direction: what was sent, by stream, and what has come of it."""

    def __init__(self, rng: np.random.Generator, source: Connection, target: Connection) -> None:
        self.rng, self.source, self.target = rng, source, target
        self.sent: dict[int, list[bytes]] = {stream: [] for stream in range(STREAMS)}
        self.came: dict[int, list[bytes]] = {stream: [] for stream in range(STREAMS)}

    def send(self, count: int) -> None:
        for _ in range(count):
            size = int(self.rng.choice([0, 1, 64, 1400, 1500, 4096, self.rng.integers(0, 4097)]))
            body, stream = self.rng.bytes(size), int(self.rng.integers(0, STREAMS))
            while True:
                try:
                    self.source.send(body, stream=stream)
                    break
                except BusyError:
                    self.take(1)
            self.sent[stream].append(body)

    def take(self, count: int) -> None:
        for _ in range(count):
            message: Message = self.target.recv(LONG)
            self.came[message.stream].append(message.data)
            place = len(self.came[message.stream]) - 1
            assert message.data == self.sent[message.stream][place], (message.stream, place)

    def finish(self) -> None:
        self.take(sum(map(len, self.sent.values())) - sum(map(len, self.came.values())))
        assert self.came == self.sent


def large(pair: Pair, source: Pony, target: Pony, out: Connection, back: Connection, size: int) -> Any:
    """Begin a large message; what it returns waits for it and compares."""
    mine, theirs = source.place(size), target.place(size)
    mine.array()[:] = pair.rng.integers(0, 256, size)
    send, receive = out.begin_send_from(mine), back.begin_receive_into(theirs)

    def finish() -> None:
        assert receive.result(LONG) == size == send.result(LONG)
        assert bytes(theirs.view) == bytes(mine.view)

    return finish


def begin_adds(connection: Connection, handle: int, count: int) -> list[Any]:
    body = struct.pack("<QQQ", handle, 0, 1)
    return [connection._pony._begin(12, connection.number, body, "add") for _ in range(count)]


def everything(pair: Pair, turns: int, restarts: bool) -> None:
    words = pair.far.place(64 * 1024)
    handle = pair.far.register(words, ALL).handle
    rows = words.array().reshape(-1, 64)
    rows[1:] = pair.rng.integers(0, 256, (rows.shape[0] - 1, 64))
    own, written = pair.near.place(64 * 500), pair.far.place(64 * 100)
    own_writes = pair.near.place(64 * 100)
    write_handle = pair.far.register(written, ALL).handle
    talks = [Talk(pair.rng, pair.out, pair.back), Talk(pair.rng, pair.back, pair.out)]
    values: list[int] = []
    for turn in range(turns):
        for talk in talks:
            talk.send(40)
        bulk = [
            large(pair, pair.near, pair.far, pair.out, pair.back, 150_000),
            large(pair, pair.far, pair.near, pair.back, pair.out, 70_001),
        ]
        adds = begin_adds(pair.out, handle, 30)
        picks = pair.rng.integers(1, rows.shape[0], 500)
        reads = pair.out.begin_reads(handle, picks * 64, 64, own)
        own_writes.array()[:] = pair.rng.integers(0, 256, own_writes.size)
        order = pair.rng.permutation(100)
        writes = pair.out.begin_writes(write_handle, order * 64, 64, own_writes)
        if restarts:
            pair.restart(*[[pair.a], [pair.b], [pair.a, pair.b]][turn % 3])
        for finish in bulk:
            finish()
        values += [add.result(LONG) for add in adds]
        assert reads.result(LONG) == 500
        assert (own.array().reshape(-1, 64) == rows[picks]).all()
        assert writes.result(LONG) == 100
        assert (written.array().reshape(-1, 64)[order] == own_writes.array().reshape(-1, 64)).all()
    for talk in talks:
        talk.finish()
    assert sorted(values) == list(range(30 * turns))
    assert words.array("<u8")[0] == 30 * turns


def test_a_bad_network_loses_doubles_reorders_and_alters_nothing(pair: Pair) -> None:
    everything(pair, turns=3, restarts=False)
    flow = pair.a.flow("b")
    assert flow["attached"]
    if "corrupt" in pair.faults:
        until(lambda: pair.a.flow("b")["bad"] + pair.b.flow("a")["bad"], "damage is noticed")


def test_engines_that_die_on_a_bad_network_lose_nothing(pair: Pair) -> None:
    everything(pair, turns=3, restarts=True)


def test_every_kind_of_flow_stands_the_worst_network(worst: Pair) -> None:
    everything(worst, turns=3, restarts=True)


def test_a_network_that_is_good_again_is_quiet() -> None:
    pair = Pair({"loss": 0.3, "reorder": 0.5, "lateness_us": 5000})
    try:
        talk = Talk(pair.rng, pair.out, pair.back)
        talk.send(20)
        pair.faults = {}
        pair.spoil()
        talk.send(100)
        talk.finish()
        until(lambda: pair.a.flow("b")["flying"] == 0, "everything is acknowledged")
    finally:
        pair.close()


def test_operations_that_end_with_their_connection_leave_room_for_others(good: Pair) -> None:
    handle = good.far.register(good.far.place(64), ALL).handle
    for turn in range(6):
        other = good.near.connect("b/far", LONG)
        # Answers to them do not come; a few such connections have as many parts as are asked for at a time.
        good.b.ask("faults", loss=1.0)
        adds = begin_adds(other, handle, 600)
        until(lambda: good.a.flow("b")["flying"] > 0, "they are asked for")
        other.close()
        for add in adds:
            with pytest.raises(ClosedByPeerError):
                add.result(LONG)
        good.spoil()
        assert good.out.compare_swap(handle, 8, turn, turn + 1, LONG) == turn


def test_a_write_that_goes_on_in_packets_of_other_sizes_is_whole(good: Pair) -> None:
    size = 400_000
    mine, theirs = good.near.place(size), good.far.place(size)
    handle = good.far.register(theirs, ALL).handle
    for turn in range(8):
        theirs.array()[:] = 0
        mine.array()[:] = good.rng.integers(1, 256, size)
        good.a.ask("faults", seed=good.seed + turn, loss=0.5)
        write = good.out.begin_write_from(handle, 0, mine)
        until(lambda: bool(theirs.array().any()), "some of it is there")
        join(good.a, good.b, mtu=(1300, 1472)[turn % 2])
        good.spoil()
        assert write.result(LONG) == size
        assert bytes(theirs.view) == bytes(mine.view)


def test_a_late_word_about_a_connection_does_not_end_a_later_one(good: Pair) -> None:
    """Not even when the engine has been another meanwhile, and counts its connections anew."""
    for _ in range(5):
        good.restart(good.a)
        near = good.near.connect("b/far", LONG)
        far = good.far.accept(LONG)
        good.restart(good.a)
        good.b.ask("faults", seed=good.seed, reorder=1.0, lateness_us=200_000)
        far.close()
        near.close()
        good.spoil()
        near = good.near.connect("b/far", LONG)
        far = good.far.accept(LONG)
        until(lambda: good.b.flow("a")["flying"] == 0, "everything that was late is there")
        near.send(b"still here")
        assert far.recv(LONG).data == b"still here"
        near.close()
        with pytest.raises(ClosedByPeerError):
            far.recv(LONG)
