"""Engines of both languages behind one interface, and what only Python engines have."""

from __future__ import annotations

import contextlib
import os
import random
import select
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from snap.dataplane import _native
from snap.dataplane.errors import BusyError, ChannelError, PeerGoneError
from snap.modules import Engine, Schema, ServerChannel
from snap.modules.echo.engine import PyEcho
from snap.modules.testing import ChannelPair, channel_pair
from snap.modules.worker import PythonWorker, Runner
from tests.waiting import LIMIT, until

Make = Callable[[int], Runner]


# -- one conformance suite for engines of both languages ----------------------------------------------------


def blank(schema: Schema | None = None, name: str = "test") -> _native.State:
    """A state that nobody else has; the mapping outlives the descriptor."""
    schema = schema or Schema()
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _native.State.MIN_BYTES + (1 << 20))
        _native.State.format(fd, name, name, schema.version, schema.oldest, schema.specs())
        return _native.State(fd)
    finally:
        os.close(fd)


def rust_echo(wait: int, **more: Any) -> Runner:
    return _native.Worker("echo", "echo", blank(), -1, 1, wait=wait, **more)


def python_echo(wait: int) -> Runner:
    return PythonWorker("echo", PyEcho(), blank(), wait=wait)


def dropped_by(runner: Runner) -> list[tuple[int, str]]:
    """Channels that were dropped since the last look, with the reason."""
    return [(number, data) for kind, number, data in runner.take_news() if kind == "fault"]


@pytest.fixture(params=[rust_echo, python_echo], ids=["rust", "python"])
def make(request: pytest.FixtureRequest) -> Make:
    chosen: Make = request.param
    return chosen


@contextlib.contextmanager
def started(make: Make, wait: int = _native.ADAPTIVE) -> Iterator[Runner]:
    worker = make(wait)
    try:
        yield worker
    finally:
        worker.stop(LIMIT)
    assert not getattr(worker, "crash", "")


@contextlib.contextmanager
def clients(runner: Runner, count: int, **geometry: Any) -> Iterator[list[ChannelPair]]:
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(ChannelPair(id=number + 1, **geometry)) for number in range(count)]
        for pair in pairs:
            runner.attach(pair.server.id, pair.server, pair.server.id)
        yield pairs


def receive(pair: ChannelPair, count: int) -> list[bytes]:
    answers: list[bytes] = []
    while len(answers) < count and (burst := pair.client.recv_many(count - len(answers), timeout=LIMIT)):
        answers += burst
    return answers


@pytest.mark.parametrize(
    "wait", [_native.ADAPTIVE, _native.BLOCK, _native.SPIN], ids=["adaptive", "block", "spin"]
)
def test_echo_answers_messages_of_every_size_in_order(make: Make, wait: int) -> None:
    with started(make, wait) as worker, clients(worker, 1) as (pair,):
        messages = [os.urandom(size) for size in (0, 1, 8, 40, 41, 64, 500, 4096, 100_000)]
        for message in messages:
            pair.client.send(message, timeout=LIMIT)
        assert receive(pair, len(messages)) == messages


def test_a_client_that_does_not_read_loses_nothing_and_holds_up_nobody(make: Make) -> None:
    with started(make) as runner, clients(runner, 2, slots=64) as (slow, quick):
        sent = [b"%d" % number for number in range(1000)]
        taken = 0
        while burst := slow.client.send_many(sent[taken:], timeout=0.1):
            taken += burst
        assert taken >= 64
        for number in range(200):
            quick.client.send(b"%d" % number, timeout=LIMIT)
            assert quick.client.recv(timeout=LIMIT) == b"%d" % number
        assert receive(slow, taken) == sent[:taken]


def test_a_slow_client_with_large_messages_loses_nothing(make: Make) -> None:
    with started(make) as runner, clients(runner, 1, slots=64, down_bytes=1 << 16) as (pair,):
        sent = [os.urandom(10_000) for _ in range(40)]
        for message in sent:
            pair.client.send(message, timeout=LIMIT)
        assert receive(pair, len(sent)) == sent


def test_a_client_whose_pool_cannot_hold_an_answer_is_dropped_and_others_served(make: Make) -> None:
    with started(make) as runner, clients(runner, 1, down_bytes=1 << 16) as (small,), channel_pair() as other:
        other.server.id = 99
        runner.attach(99, other.server, 99)
        small.client.send(bytes(500_000), timeout=LIMIT)
        faults = until(lambda: dropped_by(runner))
        assert [channel for channel, _ in faults] == [small.server.id]
        other.client.send(b"served", timeout=LIMIT)
        assert other.client.recv(timeout=LIMIT) == b"served"


def test_a_client_that_may_not_receive_is_dropped_when_it_is_answered(make: Make) -> None:
    with started(make) as runner, clients(runner, 1, rights=["send"]) as (pair,):
        pair.client.send(b"?", timeout=LIMIT)
        assert [channel for channel, _ in until(lambda: dropped_by(runner))] == [pair.server.id]


def test_a_client_that_sends_without_the_right_is_dropped(make: Make) -> None:
    with started(make) as runner, clients(runner, 1, rights=["recv"]) as (pair,):
        ring, up, down, *bells = pair.descriptors
        geometry = (ring, up, down, 256, 1 << 20, 1 << 20)
        forger = _native.Endpoint(_native.CLIENT, *geometry, (bells[0], bells[1]), 1, rights=3)
        forger.send(b"!", timeout=LIMIT)
        assert [channel for channel, _ in until(lambda: dropped_by(runner))] == [pair.server.id]
        forger.close()


def test_a_hostile_client_is_dropped_with_a_reason_and_others_served(make: Make) -> None:
    with started(make) as runner, clients(runner, 2) as (hostile, good):
        hostile.scribble(seed=4)
        assert select.select([runner], [], [], LIMIT)[0]
        ((channel, reason),) = until(lambda: dropped_by(runner))
        assert channel == hostile.server.id and reason
        good.client.send(b"served", timeout=LIMIT)
        assert good.client.recv(timeout=LIMIT) == b"served"


def test_random_bytes_anywhere_in_a_channel_hurt_that_channel_alone(make: Make) -> None:
    with started(make) as runner, channel_pair() as good:
        good.server.id = 1000
        runner.attach(1000, good.server, 1000)
        for seed in range(60):
            chance = random.Random(seed)
            with ChannelPair(id=seed + 1, slots=64, up_bytes=1 << 16, down_bytes=1 << 16) as hostile:
                runner.attach(hostile.server.id, hostile.server, hostile.server.id)
                for _ in range(20):
                    with contextlib.suppress(ChannelError):
                        hostile.client.send_many(
                            [chance.randbytes(chance.choice([8, 200, 5000]))] * 3, timeout=0
                        )
                        hostile.client.recv_many(chance.randint(1, 4), timeout=0)
                    segment = chance.choice(hostile.descriptors[:3])
                    place = chance.randrange(os.fstat(segment).st_size - 64) & ~7
                    os.pwrite(segment, chance.randbytes(chance.choice([1, 4, 8, 64])), place)
                good.client.send(b"%d" % seed, timeout=LIMIT)
                assert good.client.recv(timeout=LIMIT) == b"%d" % seed, f"seed {seed}"
                runner.detach(hostile.server.id)
        assert runner.alive
        assert 1000 not in [channel for channel, _ in dropped_by(runner)]


def test_a_revoked_channel_is_dropped_without_another_message(make: Make) -> None:
    with started(make) as runner, clients(runner, 1) as (pair,):
        pair.client.send(b"before", timeout=LIMIT)
        assert pair.client.recv(timeout=LIMIT) == b"before"
        pair.revoke()
        assert [channel for channel, _ in until(lambda: dropped_by(runner))] == [pair.server.id]


def test_a_detached_channel_is_served_no_more_and_its_end_is_for_the_kernel_to_tell(make: Make) -> None:
    with started(make) as runner, clients(runner, 2) as (leaving, staying):
        runner.detach(leaving.server.id)
        staying.client.send(b"1", timeout=LIMIT)
        assert staying.client.recv(timeout=LIMIT) == b"1"
        leaving.client.send(b"2", timeout=0)
        staying.client.send(b"3", timeout=LIMIT)
        assert staying.client.recv(timeout=LIMIT) == b"3"
        assert leaving.client.try_recv() is None
        assert dropped_by(runner) == []


@pytest.mark.parametrize("language", ["rust", "python"])
def test_the_statistics_page_tells_the_work_and_the_heartbeat(language: str) -> None:
    fd = os.memfd_create("stats", os.MFD_CLOEXEC)
    os.ftruncate(fd, _native.StatsPage.BYTES)
    page = _native.StatsPage(fd, True)
    worker: Runner = (
        _native.Worker("echo", "echo", blank(), -1, 1, fd, 3)
        if language == "rust"
        else PythonWorker("echo", PyEcho(), blank(), -1, 1, _native.StatsPage(fd, True), 3)
    )
    try:
        with clients(worker, 1) as (pair,):
            pair.client.send_many([b"x"] * 50, timeout=LIMIT)
            assert len(receive(pair, 50)) == 50
            until(lambda: page.read(3)["work"] == 50)
            record = page.read(3)
            assert record["polls"] >= 1 and record["channels"] == 1
            until(lambda: page.read(3)["heartbeat_ns"] > record["heartbeat_ns"])
    finally:
        worker.stop(LIMIT)
        page.close()
        os.close(fd)


def test_a_stopped_engine_is_not_alive(make: Make) -> None:
    with started(make) as runner:
        assert runner.alive
    assert not runner.alive


# -- what only Python engines have ---------------------------------------------------------------------------


class Recorder(Engine):
    """Notes what is called, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def poll(self, budget: int) -> int:
        return sum(len(channel.take(budget)) for channel in self.channels)

    def on_attach(self, channel: ServerChannel) -> None:
        self.seen.append(f"attach {channel.badge} {sorted(channel.rights)} {channel.service}")

    def on_detach(self, channel: ServerChannel) -> None:
        self.seen.append(f"detach {channel.badge} {channel.closed}")


@contextlib.contextmanager
def working(engine: Engine) -> Iterator[PythonWorker]:
    worker = PythonWorker("test", engine, blank(engine.schema))
    try:
        yield worker
    finally:
        worker.stop(LIMIT)


def test_a_client_without_room_for_large_answers_holds_up_nobody_and_gets_them_all() -> None:
    class Large(PyEcho):
        def poll(self, budget: int) -> int:
            done = 0
            for channel in self.channels:
                messages = channel.take(budget)
                channel.answer([message + bytes(20_000) for message in messages])
                done += len(messages)
            return done

    small = {"down_bytes": 1 << 17}
    with working(Large()) as worker, ChannelPair(id=1, **small) as slow, ChannelPair(id=2, **small) as quick:
        for pair in (slow, quick):
            worker.attach(pair.server.id, pair.server, pair.server.id)
        sent = [b"%03d" % number for number in range(100)]
        slow.client.send_many(sent, timeout=LIMIT)
        for number in range(300):
            quick.client.send(b"%03d" % number, timeout=LIMIT)
            assert quick.client.recv(timeout=LIMIT)[:3] == b"%03d" % number
        assert [answer[:3] for answer in receive(slow, 100)] == sent


def test_an_engine_sees_who_attaches_and_who_leaves() -> None:
    engine = Recorder()
    with ChannelPair(badge="uid:7/pid:8", rights=["send"], service="s") as pair, working(engine) as worker:
        worker.attach(1, pair.server, 1)
        until(lambda: len(engine.seen) == 1)
        worker.detach(1)
        until(lambda: len(engine.seen) == 2)
    assert engine.seen == ["attach uid:7/pid:8 ['send'] s", "detach uid:7/pid:8 False"]


def test_mail_runs_on_the_engines_thread_and_the_slot_holds_one_piece() -> None:
    engine = Recorder()
    names: list[str] = []
    engine.mail(lambda: names.append("early"), timeout=0)
    with pytest.raises(BusyError):
        engine.mail(lambda: names.append("refused"), timeout=0.01)
    with working(engine):
        engine.mail(lambda: names.append(__import__("threading").current_thread().name), timeout=LIMIT)
        until(lambda: len(names) == 2)
    assert names == ["early", "engine test"]


def test_an_engine_that_raises_leaves_its_traceback_and_is_not_alive() -> None:
    class Broken(Engine):
        def poll(self, budget: int) -> int:
            raise ZeroDivisionError("of my own")

    with working(Broken()) as worker:
        select.select([worker], [], [], LIMIT)
        assert not worker.alive
        assert "ZeroDivisionError: of my own" in worker.crash


def test_an_error_of_a_channel_that_has_not_failed_is_the_engines_own() -> None:
    class Confused(Engine):
        def poll(self, budget: int) -> int:
            if self.channels:
                raise PeerGoneError("says who?")
            return 0

    with channel_pair() as pair, working(Confused()) as worker:
        worker.attach(1, pair.server, 1)
        until(lambda: not worker.alive)
        assert "says who?" in worker.crash


def test_a_poll_that_returns_nothing_is_named() -> None:
    class Forgetful(Engine):
        def poll(self, budget: int) -> int:
            return None  # type: ignore[return-value]

    with working(Forgetful()) as worker:
        until(lambda: not worker.alive)
        assert "Forgetful.poll returned None" in worker.crash


def test_a_timer_polls_the_engine_though_no_message_came() -> None:
    class Timed(Engine):
        polls = 0

        def poll(self, budget: int) -> int:
            self.polls += 1
            return 0

        def wake_after(self) -> float | None:
            return 0.001

    engine = Timed()
    with working(engine):
        until(lambda: engine.polls > 20)


def test_an_engine_is_polled_for_a_channel_of_which_it_is_the_client() -> None:
    class Client(Engine):
        heard: list[bytes]

        def __init__(self, peer: _native.Endpoint) -> None:
            self.heard, self.peer = [], peer
            self.watch(peer)

        def poll(self, budget: int) -> int:
            burst = self.peer.recv_many(budget, timeout=0)
            self.heard += burst
            return len(burst)

    with channel_pair() as pair:
        engine = Client(pair.client)
        with working(engine):
            pair.server.send(b"pushed", timeout=LIMIT)
            assert until(lambda: engine.heard) == [b"pushed"]
