"""Pony Express between applications of one host: real kernel, real engine, real shared memory."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from snap.dataplane.errors import UsageError
from snap.ipc import connect
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
from snap.modules.pony.commands import ANSWER
from tests import pony_commands
from tests.conftest import OWNER_MAY_ALL, KernelProcess
from tests.waiting import until

ARENA = 1 << 20
ALL = Right.READ | Right.WRITE | Right.ATOMIC


class Pair:
    """Two applications, connected: `near` asked for it."""

    def __init__(self, kernel: KernelProcess) -> None:
        self.kernel = kernel
        self.clients = [connect(runtime_dir=kernel.directory) for _ in range(2)]
        self.near, self.far = (Pony.open(client, ARENA) for client in self.clients)
        self.far.bind("far")
        self.out: Connection = self.near.connect("far")
        self.back: Connection = self.far.accept(10)

    def close(self) -> None:
        for each in (self.near, self.far, *self.clients):
            each.close()


@pytest.fixture
def pair(kernel: Callable[..., KernelProcess]) -> Iterator[Pair]:
    made = Pair(kernel(policy=OWNER_MAY_ALL + "[modules.pony]\nautostart = true\n"))
    try:
        yield made
    finally:
        made.close()


# -- names and messages ---------------------------------------------------------------------------------------


def test_messages_go_both_ways_in_order_by_stream(pair: Pair) -> None:
    for number in range(50):
        pair.out.send(b"%d" % number, stream=number % 3)
    got = [pair.back.recv(5) for _ in range(50)]
    assert [(message.data, message.stream) for message in got] == [
        (b"%d" % number, number % 3) for number in range(50)
    ]
    pair.back.send(b"")
    assert pair.out.recv(5).data == b""


def test_a_name_is_bound_once_and_unknown_ones_are_said(pair: Pair) -> None:
    with pytest.raises(PonyError, match="somebody is bound") as taken:
        pair.near.bind("far")
    assert taken.value.status == Status.TAKEN
    with pytest.raises(PonyError):
        pair.near.bind(".echo")
    with pytest.raises(NoPeerError):
        pair.near.connect("nowhere")
    for wrong in ("", "a/b", "x" * 65):
        with pytest.raises(PonyError):
            pair.near.bind(wrong)


def test_a_slow_receiver_holds_up_only_who_sends_to_it(pair: Pair) -> None:
    with connect(runtime_dir=pair.kernel.directory) as client, Pony.open(client) as other:
        other.bind("other")
        to_other = pair.near.connect("other")
        from_near = other.accept(10)
        sent = 0
        with pytest.raises(BusyError):
            while True:
                pair.out.send(b"x" * 4096, timeout=0)
                sent += 1
        to_other.send(b"past")
        assert from_near.recv(5).data == b"past"
    assert [len(pair.back.recv(5).data) for _ in range(sent)] == [4096] * sent
    pair.out.send(b"again")
    assert pair.back.recv(5).data == b"again"


def test_a_message_longer_than_small_is_refused(pair: Pair) -> None:
    with pytest.raises(TooLongError):
        pair.out.send(bytes(4097))
    pair.out.send(bytes(4096))
    assert pair.back.recv(5).data == bytes(4096)


def test_large_messages_meet_the_places_posted_for_them_in_order(pair: Pair) -> None:
    rng = np.random.default_rng(1)
    sources = [pair.near.place(size) for size in (1, 300_000, 64)]
    for source in sources:
        source.array()[:] = rng.integers(0, 256, source.size)
    sends = [pair.out.begin_send_from(source) for source in sources]
    places = [pair.far.place(300_000) for _ in sources]
    receives = [pair.back.begin_receive_into(place) for place in places]
    for source, place, send, receive in zip(sources, places, sends, receives, strict=True):
        assert receive.result(5) == source.size == send.result(5)
        assert bytes(place.view[: source.size]) == bytes(source.view)


def test_a_message_longer_than_its_place_is_its_senders_error(pair: Pair) -> None:
    small = pair.far.place(64)
    receive = pair.back.begin_receive_into(small)
    send = pair.out.begin_send_from(pair.near.place(65))
    with pytest.raises(TooLongError) as raised:
        send.result(5)
    assert raised.value.done == 64
    assert pair.out.begin_send_from(pair.near.place(64)).result(5) == 64
    assert receive.result(5) == 64


def test_who_leaves_is_missed_and_its_operations_end(pair: Pair) -> None:
    waiting = pair.back.begin_receive_into(pair.far.place(64))
    pair.near.close()
    with pytest.raises(ClosedByPeerError):
        pair.back.recv(5)
    with pytest.raises(ClosedByPeerError):
        waiting.result(5)
    with pytest.raises(ClosedByPeerError):
        pair.back.send(b"x")


# -- one-sided ------------------------------------------------------------------------------------------------


def test_reads_writes_and_atomics_reach_memory_without_its_application(pair: Pair) -> None:
    place = pair.far.place(4096)
    words = place.array("<u8")
    words[:] = np.arange(512)
    region = pair.far.register(place, ALL)
    assert pair.out.read(region.handle, 80, 16) == struct.pack("<QQ", 10, 11)
    pair.out.write(region.handle, 8, struct.pack("<Q", 99))
    assert words[1] == 99
    assert pair.out.fetch_add(region.handle, 8, 2**64 - 9) == 99
    assert words[1] == 90
    assert pair.out.compare_swap(region.handle, 8, 1, 5) == 90
    assert pair.out.compare_swap(region.handle, 8, 90, 5) == 90
    assert words[1] == 5
    own = pair.near.place(4096)
    assert pair.out.begin_read_into(region.handle, 0, own).result(5) == 4096
    assert bytes(own.view) == bytes(place.view)
    own.array()[:] = 7
    assert pair.out.begin_write_from(region.handle, 0, own).result(5) == 4096
    assert (place.array() == 7).all()


def test_an_indirect_read_follows_the_owners_table(pair: Pair) -> None:
    data, table = pair.far.place(1024), pair.far.place(INDIRECTION.size * 4)
    data.array()[:] = np.arange(1024) % 256
    target = pair.far.register(data, Right.READ)
    handle = pair.far.register(table, Right.READ).handle
    for index, (offset, size) in enumerate([(0, 8), (100, 20), (1020, 8), (0, 0)]):
        INDIRECTION.pack_into(table.view, index * INDIRECTION.size, target.handle, offset, size)
    assert pair.out.read_indirect(handle, 0, 64) == bytes(range(8))
    assert pair.out.read_indirect(handle, 1, 10) == bytes(range(100, 110))
    assert pair.out.read_indirect(handle, 3, 10) == b""
    with pytest.raises(RegionError):
        pair.out.read_indirect(handle, 2, 64)
    with pytest.raises(RegionError):
        pair.out.read_indirect(handle, 4, 64)


def test_scan_and_read_finds_the_entry(pair: Pair) -> None:
    data, bucket = pair.far.place(256), pair.far.place(32 * 8)
    data.array()[:] = np.arange(256)
    target = pair.far.register(data, Right.READ).handle
    handle = pair.far.register(bucket, Right.READ).handle
    for entry in range(8):
        struct.pack_into("<QQQQ", bucket.view, entry * 32, 1000 + entry, target, entry * 10, 10)
    scan = {"entries": 8, "stride": 32}
    assert pair.out.scan_and_read(handle, 1003, 64, **scan) == bytes(range(30, 40))
    with pytest.raises(NoMatchError):
        pair.out.scan_and_read(handle, 5, 64, **scan)
    with pytest.raises(RegionError):
        pair.out.scan_and_read(handle, 1003, 64, entries=9, stride=32)
    with pytest.raises(PonyError):
        pair.out.scan_and_read(handle, 1003, 64, entries=8, stride=16)


def test_bursts_do_what_single_operations_do(pair: Pair) -> None:
    rng = np.random.default_rng(2)
    place = pair.far.place(64 * 1024)
    rows = place.array("<u8").reshape(-1, 8)
    rows[:] = rng.integers(0, 1 << 60, rows.shape)
    handle = pair.far.register(place, ALL).handle
    own = pair.near.place(64 * 500)
    picks = rng.integers(0, 1024, 500)
    assert pair.out.begin_reads(handle, picks * 64, 64, own).result(5) == 500
    assert (own.array("<u8").reshape(-1, 8) == rows[picks]).all()
    own.array()[:] = 3
    assert pair.out.begin_writes(handle, np.arange(500) * 64, 64, own).result(5) == 500
    assert (place.array()[: 500 * 64] == 3).all() and not (place.array()[500 * 64 :] == 3).all()
    wrong = np.array([0, 64, place.size - 63, 128])
    with pytest.raises(RegionError) as raised:
        pair.out.begin_reads(handle, wrong, 64, own).result(5)
    assert raised.value.done == 2
    table = pair.far.place(INDIRECTION.size * 100)
    for index in range(100):
        INDIRECTION.pack_into(table.view, index * INDIRECTION.size, handle, index * 64, 64)
    of_table = pair.far.register(table, Right.READ).handle
    rows[:] = rng.integers(0, 1 << 60, rows.shape)
    indices = rng.integers(0, 100, 500)
    assert pair.out.begin_reads_indirect(of_table, indices, 64, own).result(5) == 500
    assert (own.array("<u8").reshape(-1, 8) == rows[indices]).all()


@pytest.mark.parametrize("rights", [Right.READ, Right.WRITE, Right.ATOMIC])
def test_a_region_allows_what_its_owner_said(pair: Pair, rights: Right) -> None:
    handle = pair.far.register(pair.far.place(64), rights).handle
    for right, work in (
        (Right.READ, lambda: pair.out.read(handle, 0, 8)),
        (Right.WRITE, lambda: pair.out.write(handle, 0, b"x")),
        (Right.ATOMIC, lambda: pair.out.fetch_add(handle, 0, 1)),
    ):
        if right == rights:
            work()
        else:
            with pytest.raises(RightError):
                work()


def test_regions_are_for_their_peers_and_until_they_are_released(pair: Pair) -> None:
    place = pair.far.place(64)
    with connect(runtime_dir=pair.kernel.directory) as client, Pony.open(client) as stranger:
        theirs = stranger.connect("far")
        pair.far.accept(10)
        ours = pair.far.register(place, ALL, only=pair.back)
        assert pair.out.read(ours.handle, 0, 8) == bytes(8)
        with pytest.raises(RightError):
            theirs.read(ours.handle, 0, 8)
    # Of one's own connection, not of the peer's.
    mine = pair.near.register(pair.near.place(64), ALL)
    with pytest.raises(RegionError):
        pair.out.read(mine.handle, 0, 8)
    pair.far.release(ours)
    with pytest.raises(RegionError):
        pair.out.read(ours.handle, 0, 8)
    again = pair.far.register(place, ALL)
    assert again.handle != ours.handle
    with pytest.raises(RegionError):
        pair.out.read(ours.handle, 0, 8)
    with pytest.raises(RegionError):
        pair.far.release(ours)
    for offset, size in ((57, 8), (64, 1), (2**64 - 1, 2), (0, 65)):
        with pytest.raises(RegionError):
            pair.out.read(again.handle, offset, size)
    with pytest.raises(PonyError, match="multiple of 8"):
        pair.out.fetch_add(again.handle, 4, 1)


# -- upgrades and crashes -------------------------------------------------------------------------------------


def test_connections_regions_and_what_waits_outlive_the_engines_process(pair: Pair) -> None:
    region = pair.far.register(pair.far.place(64), ALL)
    sent = 0
    with pytest.raises(BusyError):
        while True:
            pair.out.send(b"%d" % sent + b"." * 4000, timeout=0)
            sent += 1
    large = pair.out.begin_send_from(pair.near.place(100_000))
    with pair.kernel.control() as operator:
        os.kill(operator.call("module.show", name="pony")["pid"], signal.SIGKILL)
    assert pair.out.fetch_add(region.handle, 0, 5, timeout=30) == 0
    assert pair.out.fetch_add(region.handle, 0, 5) == 5
    assert [pair.back.recv(5).data.rstrip(b".") for _ in range(sent)] == [b"%d" % n for n in range(sent)]
    assert pair.back.begin_receive_into(pair.far.place(100_000)).result(5) == 100_000
    assert large.result(5) == 100_000
    pair.near.connect("far").send(b"hello")
    assert pair.far.accept(5).recv(5).data == b"hello"


def test_atomic_operations_happen_once_whenever_the_engine_dies(pair: Pair) -> None:
    words = pair.far.place(16)
    words.array()[:] = 0
    handle = pair.far.register(words, ALL).handle
    added: list[int] = []
    swapped: list[int] = []
    number, channel = pair.out.number, pair.near.channel
    add = pony_commands.fetch_add(number, handle, 0, 1)
    with ThreadPoolExecutor(1) as pool:
        deaths = pool.submit(kill_again_and_again, pair.kernel, 4)
        # Whole rings of commands, so that the engine is seldom between two polls.
        while not deaths.done():
            first = len(swapped)
            swaps = [
                pony_commands.compare_swap(number, handle, 8, first + n, first + n + 1) for n in range(500)
            ]
            for commands, values in (([add] * 500, added), (swaps, swapped)):
                assert channel.send_many(commands, 1) == 500
                answers: list[bytes] = []
                while len(answers) < 500:
                    answers += channel.recv_many(500, 30)
                values += [ANSWER.unpack(answer)[4] for answer in answers]
        deaths.result()
    assert added == list(range(len(added)))
    assert swapped == list(range(len(swapped)))
    assert words.array("<u8").tolist() == [len(added), len(swapped)]


def kill_again_and_again(kernel: KernelProcess, times: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(times):
        with kernel.control() as operator:
            view = until(
                lambda: (found := operator.call("module.show", name="pony"))["state"] == "ready" and found
            )
        time.sleep(chance.uniform(0.02, 0.05))
        os.kill(view["pid"], signal.SIGKILL)
        time.sleep(0.02)


def test_an_upgrade_to_itself_is_not_noticed(pair: Pair) -> None:
    region = pair.far.register(pair.far.place(64), ALL)
    with pair.kernel.control() as operator:
        for turn in range(2):
            for number in range(20):
                pair.out.send(b"%d" % number)
            view = operator.call("module.upgrade", timeout=60, name="pony", source=None, bake=0.0)
            assert view["outcome"] == "committed", view
            assert [pair.back.recv(5).data for _ in range(20)] == [b"%d" % number for number in range(20)]
            assert pair.out.fetch_add(region.handle, 0, 1) == turn


def test_the_engine_itself_echoes(pair: Pair) -> None:
    echo = pair.near.connect(".echo")
    for size in (0, 64, 4096):
        echo.send(b"e" * size)
        assert echo.recv(5).data == b"e" * size
    assert echo.read(0, 0, 64) == bytes(64)
    assert echo.begin_send_from(pair.near.place(1000)).result(5) == 1000
    own = pair.near.place(6400)
    own.array()[:] = 1
    assert echo.begin_read_into(0, 0, own).result(5) == own.size
    assert not own.array().any()
    own.array()[:] = 1
    assert echo.begin_reads(0, np.arange(100) * 64, 64, own).result(5) == 100
    assert not own.array().any()
    assert echo.begin_writes(0, np.arange(100) * 64, 64, own).result(5) == 100
    echo.close()
    pair.out.send_datagram(b"may be lost")
    assert pair.back.recv_datagram(5) == b"may be lost"


# -- what the client keeps apart --------------------------------------------------------------------------------


def test_messages_that_come_before_a_connection_is_asked_for_are_kept(pair: Pair) -> None:
    opening = pair.near.begin_connect("far")
    pair.far.accept(10).send(b"early")
    pair.near.register(pair.near.place(8), ALL)
    until_done = opening.result(10)
    out = pair.near.connection_of(opening, "far")
    assert (out.number, out.peer) == (until_done, "far")
    assert out.recv(10).data == b"early"


def test_a_closed_connection_does_not_act_on_the_next_of_its_number(pair: Pair) -> None:
    number = pair.out.number
    pair.out.close()
    other = pair.near.connect("far")
    assert other.number == number
    with pytest.raises(PonyError) as raised:
        pair.out.send(b"stray")
    assert raised.value.status == Status.NO_CONNECTION
    with pytest.raises(UsageError):
        pair.near.register(pair.near.place(8), ALL, only=pair.out)
    other.send(b"right")
    assert pair.far.accept(10).recv(10).data == b"right"


def test_more_than_both_queues_hold_is_begun_without_taking_any_result(pair: Pair) -> None:
    handle = pair.far.register(pair.far.place(64), ALL).handle
    adds = [pair.out.begin_fetch_add(handle, 0, 1) for _ in range(20_000)]
    assert [add.result(10) for add in adds] == list(range(20_000))


def test_a_region_whose_registration_was_given_up_is_released(pair: Pair) -> None:
    place = pair.near.place(64)
    # As after a `register` that waited no longer: nobody waits for this answer.
    pair.near.channel.send(pony_commands.register(0, place.offset, place.size, ALL), 1 << 40)
    wanted = pair.near.register(place, ALL)
    with pair.clients[0].open("pony-control") as control:

        def regions() -> list[dict[str, int]]:
            pair.near.poll()
            control.send(b'{"list": "regions"}')
            items: list[dict[str, int]] = json.loads(control.recv(10))["items"]
            return items

        until(lambda: len(regions()) == 1, "the other one is gone")
        assert regions()[0]["id"] == wanted.handle & 0xFFFF_FFFF
