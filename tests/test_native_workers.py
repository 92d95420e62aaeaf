"""Pollers, native workers and their statistics."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import pytest

from snap.dataplane import _native
from snap.dataplane.errors import (
    ClosedError,
    DeadlineError,
    DeniedError,
    FaultedError,
    FullError,
    NotFoundError,
    UsageError,
)
from tests.native_rig import TAIL_UP, Pairs, poke
from tests.waiting import LIMIT, Background, until

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
