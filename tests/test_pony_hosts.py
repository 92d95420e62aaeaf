"""Pony Express between two hosts: two real engines, real sockets on loopback, in one process."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from snap.dataplane.errors import DeadlineError
from snap.modules.pony import (
    INDIRECTION,
    BusyError,
    ClosedByPeerError,
    Connection,
    NoMatchError,
    NoPeerError,
    Pony,
    PonyError,
    RegionError,
    Right,
    RightError,
    Status,
    TooLongError,
)
from snap.modules.pony.wires import Wire
from tests.pony_hosts import Host, join
from tests.waiting import until

ALL = Right.READ | Right.WRITE | Right.ATOMIC
SOON = 20.0


class Two:
    """Two hosts, an application on each, connected: `near` asked for it."""

    def __init__(self, frames: int = 0, **how: Any) -> None:
        self.how = how
        self.wire = Wire.make(how.get("mtu", 1472), frames) if frames else None
        self.a, self.b = Host("a"), Host("b")
        self.near, self.far = self.a.open(), self.b.open()
        self.far.bind("far")
        join(self.a, self.b, wire=self.wire, **how)
        self.out: Connection = self.near.connect("b/far")
        self.back: Connection = self.far.accept(SOON)

    def close(self) -> None:
        self.a.close()
        self.b.close()
        if self.wire is not None:
            self.wire.close()

    def ports(self) -> tuple[str, str]:
        return self.a.flow("b")["port"], self.b.flow("a")["port"]


HOWS: dict[str, dict[str, Any]] = {
    "ethernet": {},
    "version-1": {"version": 1},
    "jumbo": {"mtu": 8972},
    "smallest": {"mtu": 508},
    "sealed": {"sealed": True},
    "timely": {"algorithm": "timely"},
    "wire": {"frames": 512},
    "sealed-wire": {"frames": 512, "sealed": True, "mtu": 8972},
    "narrow-wire": {"frames": 1, "mtu": 8972},
}


@pytest.fixture(params=HOWS)
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    made = Two(**HOWS[request.param])
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def plain() -> Iterator[Two]:
    made = Two()
    try:
        yield made
    finally:
        made.close()


def flood(connection: Connection, size: int = 4000) -> int:
    """Send until the engine takes no more; how many."""
    sent = 0
    with pytest.raises(BusyError):
        while True:
            connection.send(b"%d" % sent + b"." * size, timeout=0)
            sent += 1
    return sent


def drain(connection: Connection, count: int) -> list[bytes]:
    return [connection.recv(SOON).data.rstrip(b".") for _ in range(count)]


# -- messages ---------------------------------------------------------------------------------------------------


def test_messages_of_any_small_size_arrive_in_order(two: Two) -> None:
    rng = np.random.default_rng(7)
    sizes = [0, 1, 1400, 1500, 4096, *rng.integers(0, 4097, 200).tolist()]
    bodies = [rng.bytes(size) for size in sizes]
    for start in range(0, len(bodies), 40):
        batch = bodies[start : start + 40]
        for number, body in enumerate(batch):
            two.out.send(body, stream=number % 3)
        got = [two.back.recv(SOON) for _ in batch]
        for stream in range(3):
            wanted = [body for number, body in enumerate(batch) if number % 3 == stream]
            assert [message.data for message in got if message.stream == stream] == wanted
    two.back.send(b"back")
    assert two.out.recv(SOON).data == b"back"


def test_a_name_that_nobody_has_and_a_host_that_is_not_there(plain: Two) -> None:
    with pytest.raises(NoPeerError):
        plain.near.connect("b/nobody")
    with pytest.raises(PonyError) as raised:
        plain.near.connect("/far")
    assert raised.value.status == Status.BAD
    with pytest.raises(DeadlineError):
        plain.near.connect("c/far", timeout=0.3)
    said = [data for kind, _, data in plain.a.worker.take_news() if kind == "said"]
    assert b'{"want":"c"}' in said
    waiting = plain.near._begin(2, 0, b"c/far", "connect")
    until(lambda: plain.a.flow("c")["connections"] == 2, "both wait")
    plain.a.ask("refuse", host="c", why="no such host")
    with pytest.raises(NoPeerError) as unreachable:
        waiting.result(SOON)
    assert plain.a.flow("c")["refused"] == "no such host"
    assert unreachable.value.status == Status.UNREACHABLE


def test_a_slow_receiver_holds_up_only_who_sends_to_it(plain: Two) -> None:
    other = plain.b.open()
    other.bind("other")
    to_other = plain.near.connect("b/other")
    from_near = other.accept(SOON)
    sent = flood(plain.out)
    to_other.send(b"past")
    assert from_near.recv(SOON).data == b"past"
    assert drain(plain.back, sent) == [b"%d" % number for number in range(sent)]
    plain.out.send(b"again")
    assert plain.back.recv(SOON).data == b"again"


def test_large_messages_meet_the_places_posted_for_them_in_order(two: Two) -> None:
    rng = np.random.default_rng(1)
    sources = [two.near.place(size) for size in (1, 1_000_000, 64, 300_000)]
    for source in sources:
        source.array()[:] = rng.integers(0, 256, source.size)
    sends = [two.out.begin_send_from(source) for source in sources]
    places = [two.far.place(1_000_000) for _ in sources[:3]]
    receives = [two.back.begin_receive_into(place) for place in places]
    last = None
    for number, (source, send) in enumerate(zip(sources, sends, strict=True)):
        if number == 3:
            last = two.back.begin_receive_into(places[0])
        receive, place = (receives[number], places[number]) if last is None else (last, places[0])
        assert receive.result(SOON) == source.size == send.result(SOON)
        assert bytes(place.view[: source.size]) == bytes(source.view)


def test_a_message_longer_than_its_place_is_its_senders_error(plain: Two) -> None:
    receive = plain.back.begin_receive_into(plain.far.place(64))
    send = plain.out.begin_send_from(plain.near.place(65))
    with pytest.raises(TooLongError) as raised:
        send.result(SOON)
    assert raised.value.done == 64
    assert plain.out.begin_send_from(plain.near.place(64)).result(SOON) == 64
    assert receive.result(SOON) == 64


def test_who_leaves_is_missed_but_what_it_sent_arrives(plain: Two) -> None:
    waiting = plain.back.begin_receive_into(plain.far.place(64))
    for number in range(20):
        plain.out.send(b"%d" % number)
    plain.out.close()
    assert drain(plain.back, 20) == [b"%d" % number for number in range(20)]
    with pytest.raises(ClosedByPeerError):
        plain.back.recv(SOON)
    with pytest.raises(ClosedByPeerError):
        waiting.result(SOON)
    with pytest.raises(ClosedByPeerError):
        plain.back.send(b"x")


def test_datagrams_arrive_when_nothing_is_lost(plain: Two) -> None:
    for number in range(10):
        plain.out.send_datagram(b"%d" % number)
    assert sorted(plain.back.recv_datagram(SOON) for _ in range(10)) == [b"%d" % n for n in range(10)]
    with pytest.raises(TooLongError):
        plain.out.send_datagram(bytes(1472))


def test_the_engine_itself_echoes(plain: Two) -> None:
    echo = plain.near.connect("b/.echo")
    for size in (0, 64, 4096):
        echo.send(b"e" * size)
        assert echo.recv(SOON).data == b"e" * size
    assert echo.read(0, 0, 64) == bytes(64)
    assert echo.begin_send_from(plain.near.place(1_000_000)).result(SOON) == 1_000_000


# -- one-sided --------------------------------------------------------------------------------------------------


def test_reads_writes_and_atomics_reach_memory_without_its_application(two: Two) -> None:
    place = two.far.place(64 * 1024)
    words = place.array("<u8")
    words[:] = np.arange(words.size)
    region = two.far.register(place, ALL)
    assert two.out.read(region.handle, 80, 16) == struct.pack("<QQ", 10, 11)
    two.out.write(region.handle, 8, struct.pack("<Q", 99))
    assert words[1] == 99
    assert two.out.fetch_add(region.handle, 8, 2**64 - 9) == 99
    assert words[1] == 90
    assert two.out.compare_swap(region.handle, 8, 1, 5) == 90
    assert two.out.compare_swap(region.handle, 8, 90, 5) == 90
    assert words[1] == 5
    two.out.write(region.handle, 100, b"long" * 1024)
    assert bytes(place.view[100:4196]) == b"long" * 1024
    own = two.near.place(place.size)
    assert two.out.begin_read_into(region.handle, 0, own).result(SOON) == place.size
    assert bytes(own.view) == bytes(place.view)
    own.array()[:] = 7
    assert two.out.begin_write_from(region.handle, 0, own).result(SOON) == place.size
    assert (place.array() == 7).all()


def test_indirect_reads_and_scans_follow_the_owners_pointers(two: Two) -> None:
    data, table = two.far.place(8192), two.far.place(INDIRECTION.size * 4)
    data.array("<u2")[:] = np.arange(4096)
    target = two.far.register(data, Right.READ)
    handle = two.far.register(table, Right.READ).handle
    for index, (offset, size) in enumerate([(0, 8), (100, 900), (8190, 8), (0, 8192)]):
        INDIRECTION.pack_into(table.view, index * INDIRECTION.size, target.handle, offset, size)
    whole = bytes(data.view)
    assert two.out.read_indirect(handle, 0, 64) == whole[:8]
    assert two.out.read_indirect(handle, 1, 500) == whole[100:600]
    for wrong in (2, 4):
        with pytest.raises(RegionError):
            two.out.read_indirect(handle, wrong, 64)
    bucket = two.far.place(32 * 8)
    scanned = two.far.register(bucket, Right.READ).handle
    for entry in range(8):
        struct.pack_into("<QQQQ", bucket.view, entry * 32, 1000 + entry, target.handle, entry * 10, 10)
    scan = {"entries": 8, "stride": 32}
    assert two.out.scan_and_read(scanned, 1003, 64, **scan) == whole[30:40]
    with pytest.raises(NoMatchError):
        two.out.scan_and_read(scanned, 5, 64, **scan)
    with pytest.raises(RegionError):
        two.out.scan_and_read(scanned, 1003, 64, entries=9, stride=32)


@pytest.mark.parametrize("size", [8, 64, 1000, 5000])
def test_bursts_do_what_single_operations_do(two: Two, size: int) -> None:
    rng = np.random.default_rng(size)
    count = 200
    place = two.far.place(size * 100)
    place.array()[:] = rng.integers(0, 256, place.size)
    handle = two.far.register(place, ALL).handle
    own = two.near.place(size * count)
    picks = rng.integers(0, 100, count)
    assert two.out.begin_reads(handle, picks * size, size, own).result(SOON) == count
    rows = place.array().reshape(-1, size)
    assert (own.array().reshape(-1, size) == rows[picks]).all()
    table = two.far.place(INDIRECTION.size * 100)
    for index in range(100):
        INDIRECTION.pack_into(table.view, index * INDIRECTION.size, handle, index * size, size)
    of_table = two.far.register(table, Right.READ).handle
    own.array()[:] = 0
    assert two.out.begin_reads_indirect(of_table, picks, size, own).result(SOON) == count
    assert (own.array().reshape(-1, size) == rows[picks]).all()
    own.array()[:] = rng.integers(0, 256, own.size)
    order = rng.permutation(100)
    assert two.out.begin_writes(handle, order * size, size, own).result(SOON) == 100
    assert (rows[order] == own.array().reshape(-1, size)[:100]).all()
    wrong = np.append(np.arange(50) * size, [place.size, 0])
    with pytest.raises(RegionError) as raised:
        two.out.begin_reads(handle, wrong, size, own).result(SOON)
    assert raised.value.done == 50


@pytest.mark.parametrize("rights", [Right.READ, Right.WRITE, Right.ATOMIC])
def test_a_region_allows_what_its_owner_said(plain: Two, rights: Right) -> None:
    handle = plain.far.register(plain.far.place(64), rights).handle
    works: list[tuple[Right, Callable[[], object]]] = [
        (Right.READ, lambda: plain.out.read(handle, 0, 8)),
        (Right.WRITE, lambda: plain.out.write(handle, 0, b"x")),
        (Right.ATOMIC, lambda: plain.out.fetch_add(handle, 0, 1)),
    ]
    for right, work in works:
        if right == rights:
            work()
        else:
            with pytest.raises(RightError):
                work()


def test_regions_are_for_their_peers_and_until_they_are_released(plain: Two) -> None:
    place = plain.far.place(64)
    stranger = plain.a.open()
    theirs = stranger.connect("b/far")
    plain.far.accept(SOON)
    ours = plain.far.register(place, ALL, only=plain.back)
    assert plain.out.read(ours.handle, 0, 8) == bytes(8)
    with pytest.raises(RightError):
        theirs.read(ours.handle, 0, 8)
    mine = plain.near.register(plain.near.place(64), ALL)
    with pytest.raises(RegionError):
        plain.out.read(mine.handle, 0, 8)
    plain.far.release(ours)
    with pytest.raises(RegionError):
        plain.out.read(ours.handle, 0, 8)
    again = plain.far.register(place, ALL)
    for offset, size in ((57, 8), (64, 1), (2**64 - 1, 2), (0, 65)):
        with pytest.raises(RegionError):
            plain.out.read(again.handle, offset, size)
    with pytest.raises(PonyError, match="multiple of 8"):
        plain.out.fetch_add(again.handle, 4, 1)


# -- engines that die -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["a", "b", "both"])
def test_an_engine_that_dies_loses_doubles_and_reorders_nothing(two: Two, who: str) -> None:
    """Restarts in the middle of everything: small and large messages, reads, writes and atomics."""
    words = two.far.place(4096)
    handle = two.far.register(words, ALL).handle
    rng = np.random.default_rng(3)
    source, target, own = two.near.place(400_000), two.far.place(400_000), two.near.place(64 * 1000)
    picks = rng.integers(0, 64, 1000) * 64
    seen = 0
    for turn in range(6):
        for number in range(30):
            two.out.send(b"%d" % (turn * 30 + number))
        source.array()[:] = rng.integers(0, 256, source.size)
        send, receive = two.out.begin_send_from(source), two.back.begin_receive_into(target)
        adds = [
            two.out._pony._begin(12, two.out.number, struct.pack("<QQQ", handle, 0, 1), "add")
            for _ in range(20)
        ]
        burst = two.out.begin_reads(handle, picks, 64, own)
        for host in (two.a, two.b):
            if who in (host.name, "both"):
                host.restart()
        assert drain(two.back, 30) == [b"%d" % (turn * 30 + number) for number in range(30)]
        assert receive.result(SOON) == source.size == send.result(SOON)
        assert bytes(target.view) == bytes(source.view)
        values = sorted(add.result(SOON) for add in adds)
        assert values == list(range(seen, seen + 20))
        seen += 20
        assert burst.result(SOON) == 1000
    assert words.array("<u8")[0] == seen


def test_what_waits_at_a_receiver_outlives_both_engines(plain: Two) -> None:
    sent = flood(plain.out)
    plain.a.restart()
    plain.b.restart()
    assert drain(plain.back, sent) == [b"%d" % number for number in range(sent)]
    sent = flood(plain.out)
    assert drain(plain.back, sent) == [b"%d" % number for number in range(sent)]


def test_a_new_set_up_replaces_the_flows_and_loses_nothing(plain: Two) -> None:
    sent = 0
    for turn in range(5):
        for _ in range(20):
            plain.out.send(b"%d" % sent)
            sent += 1
        wire = Wire.make(1472) if turn % 3 else None
        join(plain.a, plain.b, sealed=turn % 2 == 0, version=1 + turn % 2, wire=wire)
        if wire is not None:
            wire.close()
    assert drain(plain.back, sent) == [b"%d" % number for number in range(sent)]


def test_a_host_that_is_not_heard_of_any_more_is_unreachable(plain: Two) -> None:
    plain.b.worker.stop(5.0)
    read = plain.out._pony._begin(9, plain.out.number, struct.pack("<QQQI", 1, 0, 2**64 - 1, 8), "read")
    with pytest.raises(NoPeerError) as raised:
        read.result(40)
    assert raised.value.status == Status.UNREACHABLE
    with pytest.raises(ClosedByPeerError):
        plain.out.send(b"x")


def test_an_application_that_died_is_missed_on_the_other_host(plain: Two) -> None:
    other: Pony = plain.b.open()
    other.bind("mortal")
    out = plain.near.connect("b/mortal")
    other.accept(SOON)
    other.close()
    plain.b.worker.detach(other.channel.id)
    with pytest.raises(ClosedByPeerError):
        out.recv(SOON)


@pytest.mark.parametrize("host", ["", "b/"])
def test_thousands_of_connections_come_and_go_at_once(plain: Two, host: str) -> None:
    other = plain.b.open() if host else plain.a.open()
    other.bind("hub")
    tags = [plain.near._begin(2, 0, f"{host}hub".encode(), "connect") for _ in range(200)]
    numbers = [tag.result(SOON) for tag in tags]
    for _ in range(14):
        tags = [plain.near._begin(2, 0, f"{host}hub".encode(), "connect") for _ in range(200)]
        while not all(tag.done for tag in tags):
            plain.near.wait(SOON)
        numbers += [tag.result(0) for tag in tags]
    assert len(set(numbers)) == 3000
    last = [other.accept(SOON) for _ in range(3000)][-1]
    plain.near.close()
    plain.a.worker.detach(plain.near.channel.id)
    with pytest.raises(ClosedByPeerError):
        last.recv(SOON)
    again = plain.a.open().connect(f"{host}hub")
    again.send(b"still there")
    assert other.accept(SOON).recv(SOON).data == b"still there"
