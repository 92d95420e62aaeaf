"""The kit that module authors test with, tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snap.dataplane.errors import FaultedError, FullError, PeerGoneError, RevokedError, SchemaError
from snap.modules import Array, Engine, Schema, ServerChannel, Slab, Table, migrate
from snap.modules.echo.engine import PyEcho
from snap.modules.testing import EngineHarness, FaultInjector, VirtualClock, channel_pair, crash, upgrade

FDS = Path("/proc/self/fd")


class Keeper(Engine):
    """Takes a message in place and forgets to give it back."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def poll(self, budget: int) -> int:
        for channel in self.channels:
            if channel.stats["received"] == 0:
                self.kept.append(channel.receive(timeout=0))
        return 0


class Metronome(Engine):
    """Tells its clients the time, once a second."""

    due = 0

    def wake_after(self) -> float | None:
        return max(0, self.due - self.clock()) / 1e9

    def poll(self, budget: int) -> int:
        if self.clock() < self.due:
            return 0
        self.due = self.clock() + 1_000_000_000
        for channel in self.channels:
            channel.answer([b"%d" % self.clock()])
        return 0


def test_a_pair_carries_messages_both_ways() -> None:
    with channel_pair() as pair:
        pair.client.send(b"up")
        pair.server.send(b"down")
        assert (pair.server.try_recv(), pair.client.try_recv()) == (b"up", b"down")


def test_a_revoked_pair_raises_at_both_ends() -> None:
    with channel_pair() as pair:
        pair.revoke()
        for end in (pair.client, pair.server):
            with pytest.raises(RevokedError):
                end.send(b"x")


def test_a_client_that_left_is_seen_by_the_server() -> None:
    with channel_pair() as pair:
        pair.leave()
        with pytest.raises(PeerGoneError):
            pair.server.send(b"x")


def test_scribbling_faults_the_channel_and_nothing_else() -> None:
    with channel_pair() as pair, channel_pair() as other:
        pair.scribble(seed=3)
        with pytest.raises(FaultedError):
            pair.server.recv(timeout=0)
        other.client.send(b"fine")
        assert other.server.try_recv() == b"fine"


def test_a_closed_pair_leaves_no_descriptor_behind() -> None:
    before = len(list(FDS.iterdir()))
    with channel_pair() as pair:
        pair.client.send(b"x")
    pair.close()
    del pair
    assert len(list(FDS.iterdir())) == before


def test_virtual_time_passes_only_when_told_and_never_back() -> None:
    clock = VirtualClock(5)
    assert (clock(), clock()) == (5_000_000_000, 5_000_000_000)
    clock.advance(0.5)
    assert clock() == 5_500_000_000
    with pytest.raises(ValueError, match="monotonic"):
        clock.advance(-1)


def test_the_harness_runs_an_engine_to_rest() -> None:
    with EngineHarness(PyEcho(), budget=4) as harness:
        pair = harness.attach()
        pair.client.send_many([b"%d" % number for number in range(10)])
        assert harness.run() == 10
        assert pair.client.recv_many(64, timeout=0) == [b"%d" % number for number in range(10)]


def test_the_harness_runs_timers_at_their_time() -> None:
    with EngineHarness(Metronome()) as harness:
        pair = harness.attach()
        start = harness.clock()
        harness.advance(3.5)
        assert pair.client.recv_many(64, timeout=0) == [
            b"%d" % (start + second * 10**9) for second in range(4)
        ]
        assert harness.clock() == start + 3_500_000_000


def test_the_harness_names_an_engine_that_never_rests() -> None:
    class Restless(Engine):
        def poll(self, budget: int) -> int:
            return 1

    with (
        pytest.raises(AssertionError, match="Restless still finds work after 10 turns"),
        EngineHarness(Restless()) as harness,
    ):
        harness.run(limit=10)


def test_the_harness_finds_a_payload_that_was_kept() -> None:
    harness = EngineHarness(Keeper())
    harness.attach().client.send(bytes(5000))
    harness.run()
    with pytest.raises(AssertionError, match="Keeper, at rest, keeps 1 payloads and 0 loans of channel 1"):
        harness.close()


def test_the_harness_shows_a_tests_own_error_and_not_what_follows_from_it() -> None:
    with pytest.raises(KeyError, match="mine"), EngineHarness(Keeper()) as harness:
        harness.attach().client.send(bytes(5000))
        harness.run()
        raise KeyError("mine")


def test_the_harness_delivers_what_an_engine_raises() -> None:
    class Broken(Engine):
        def on_attach(self, channel: ServerChannel) -> None:
            raise LookupError(channel.badge)

    with pytest.raises(LookupError, match="uid:1/pid:2"), EngineHarness(Broken()) as harness:
        harness.attach(badge="uid:1/pid:2")
        harness.turn()


def test_the_harness_is_content_with_an_engine_that_gives_everything_back() -> None:
    with EngineHarness(PyEcho()) as harness:
        pair = harness.attach()
        pair.client.send_many([bytes(5000)] * 20)
        harness.run()


def test_a_detached_client_is_closed_and_others_are_served() -> None:
    with EngineHarness(PyEcho()) as harness:
        leaving, staying = harness.attach(), harness.attach()
        harness.run()
        harness.detach(leaving)
        staying.client.send(b"x")
        harness.run()
        assert staying.client.try_recv() == b"x"
        assert leaving.server.closed and harness.dropped == {}


def test_an_engine_can_drop_a_client_that_breaks_its_protocol() -> None:
    class Strict(PyEcho):
        def poll(self, budget: int) -> int:
            for channel in self.channels:
                if any(message == b"bad" for message in channel.take(budget)):
                    channel.drop("said bad")
            return 1 if any(channel.drop_reason for channel in self.channels) else 0

    with EngineHarness(Strict()) as harness:
        good, bad = harness.attach(), harness.attach()
        good.client.send(b"good")
        bad.client.send(b"bad")
        harness.run()
        assert harness.dropped == {bad.server.id: "said bad"}
        assert not good.server.closed


def test_a_full_client_gets_every_answer_once_it_reads() -> None:
    with EngineHarness(PyEcho()) as harness:
        pair = harness.attach(slots=64)
        sent: list[bytes] = []
        with pytest.raises(FullError):
            while True:
                pair.client.send(b"%d" % len(sent), timeout=0)
                sent.append(b"%d" % len(sent))
                harness.run()
        got: list[bytes] = []
        while burst := pair.client.recv_many(16, timeout=0):
            got += burst
            harness.run()
        assert got == sent and len(sent) > 64


class Large(PyEcho):
    """Answers each message with three of 20,000 bytes: room for descriptors says nothing about room for these."""

    def poll(self, budget: int) -> int:
        done = 0
        for channel in self.channels:
            messages = channel.take(budget)
            channel.answer([message + bytes(20_000) for message in messages for _ in range(3)])
            done += len(messages)
        return done


def test_a_client_without_room_for_large_answers_holds_up_nobody_and_loses_nothing() -> None:
    with EngineHarness(Large()) as harness:
        slow, quick = harness.attach(down_bytes=1 << 17), harness.attach(down_bytes=1 << 17)
        sent = [b"%03d" % number for number in range(40)]
        slow.client.send_many(sent)
        harness.run()
        for number in range(10):
            quick.client.send(b"%03d" % number)
            harness.run()
            assert [quick.client.recv(timeout=0)[:3] for _ in range(3)] == [b"%03d" % number] * 3
        got: list[bytes] = []
        while burst := slow.client.recv_many(2, timeout=0):
            got += [answer[:3] for answer in burst]
            harness.run()
        assert got == [message for message in sent for _ in range(3)] and harness.dropped == {}


def test_an_engine_that_answers_somebody_else_waits_for_room_there_and_loses_nothing() -> None:
    class Crossing(Engine):
        def poll(self, budget: int) -> int:
            if len(self.channels) < 2:
                return 0
            done = 0
            for source, sink in (self.channels, reversed(self.channels)):
                messages = source.take(budget)
                sink.answer(messages)
                done += len(messages)
            return done

    with EngineHarness(Crossing()) as harness:
        left, right = harness.attach(slots=64), harness.attach(slots=64)
        sent = [b"%d" % number for number in range(400)]
        waiting, there, back = list(sent), [], []
        while len(there) < len(sent):
            del waiting[: left.client.send_many(waiting, timeout=0)]
            harness.run()
            there += right.client.recv_many(5, timeout=0)
            right.client.send_many([b"back"], timeout=0)
            back += left.client.recv_many(99, timeout=0)
        assert there == sent and set(back) == {b"back"}


def test_a_greeting_waits_for_room_and_then_comes_once() -> None:
    class Greeting(Large):
        def on_attach(self, channel: ServerChannel) -> None:
            channel.answer([b"hello" + bytes(3000)])

    with EngineHarness(Greeting()) as harness:
        pair = harness.attach(down_bytes=4096)
        harness.turn()
        upgrade(harness, Greeting)
        harness.turn()
        assert harness.engine.channels == []
        assert pair.client.recv(timeout=0)[:5] == b"hello"
        harness.turn()
        assert pair.client.recv(timeout=0)[:5] == b"hello"
        harness.run()
        assert pair.client.try_recv() is None and len(harness.engine.channels) == 1


class First(Engine):
    """Counts messages by content, remembers the last ones, and greets who attaches."""

    schema = Schema(
        version=1,
        seen=Table(key="S8", row={"count": "u4"}, capacity=100),
        last=Array("S8", 4),
        clients=Slab({"badge": "S8"}, 10),
    )

    def on_attach(self, channel: ServerChannel) -> None:
        badge = channel.badge.encode()
        if badge not in [self.state.clients[number]["badge"] for number in self.state.clients]:
            self.state.clients.allocate((badge,))

    def poll(self, budget: int) -> int:
        done = 0
        for channel in self.channels:
            for message in channel.take(budget):
                count = int(self.state.seen.get(message, (0,))[0]) + 1
                self.note(message, count)
                self.state.last[count % 4] = message
                channel.answer([b"%s %d" % (message, count)])
                done += 1
        return done

    def note(self, message: bytes, count: int) -> None:
        self.state.seen[message] = (count,)


class Second(First):
    schema = Schema(
        version=2,
        oldest=1,
        seen=Table(key="S8", row={"count": "u4", "half": "f8"}, capacity=100),
        clients=Slab({"badge": "S8"}, 10),
        last=Array("S8", 4),
    )

    @migrate("seen", 1, 2)
    def halves(self, old: Any, new: Any) -> None:
        new["half"] = old["count"] / 2

    def note(self, message: bytes, count: int) -> None:
        self.state.seen[message] = (count, count / 2)


def test_an_upgrade_to_itself_changes_nothing_and_carries_what_waits() -> None:
    with EngineHarness(First()) as harness:
        pair = harness.attach(badge="ann")
        pair.client.send_many([b"a", b"b", b"a"])
        harness.run()
        pair.client.send(b"c")
        before = harness.contents()
        upgrade(harness, First)
        assert harness.contents() == before
        harness.run()
        assert pair.client.recv_many(9, timeout=0) == [b"a 1", b"b 1", b"a 2", b"c 1"]
        assert [channel.badge for channel in harness.engine.channels] == ["ann"]


def test_an_upgrade_migrates_and_a_rollback_takes_back() -> None:
    with EngineHarness(First()) as harness:
        pair = harness.attach(badge="ann")
        pair.client.send_many([b"a"] * 3)
        harness.run()
        upgrade(harness, Second)
        assert harness.engine.state.seen[b"a"].tolist() == (3, 1.5)
        pair.client.send(b"a")
        harness.run()
        upgrade(harness, First())
        pair.client.send(b"a")
        harness.run()
        assert pair.client.recv_many(9, timeout=0) == [b"a %d" % number for number in range(1, 6)]
        assert [row["badge"] for row in (harness.engine.state.clients[0],)] == [b"ann"]
        assert harness.generation == 3


def test_a_crash_takes_back_the_poll_it_was_in_and_that_alone() -> None:
    with EngineHarness(First(), budget=2) as harness:
        pair = harness.attach()
        pair.client.send_many([b"%d" % number for number in range(6)])
        harness.turn()
        before = harness.contents()
        assert crash(harness) > 0
        assert harness.contents() == before
        assert crash(harness, Second.__mro__[1]) > 0
        harness.run()
        assert pair.client.recv_many(9, timeout=0) == [b"%d 1" % number for number in range(6)]


def test_an_engine_that_dies_in_its_poll_leaves_the_state_of_the_last_one() -> None:
    class Dying(First):
        def note(self, message: bytes, count: int) -> None:
            super().note(message, count)
            if message == b"bad" and type(self) is Dying:
                raise ZeroDivisionError

    with EngineHarness(Dying()) as harness:
        pair = harness.attach()
        pair.client.send(b"good")
        harness.run()
        before = harness.contents()
        pair.client.send_many([b"good", b"bad"])
        with pytest.raises(ZeroDivisionError):
            harness.turn()
        harness.succeed(First)
        assert harness.contents() == before
        harness.run()
        assert pair.client.recv_many(9, timeout=0) == [b"good 1", b"good 2", b"bad 1"]


def test_a_schema_changed_without_a_version_is_refused_and_the_engine_goes_on() -> None:
    class Liar(First):
        schema = Schema(version=1, seen=Table(key="S8", row={"count": "u8"}, capacity=100))

    class Far(First):
        schema = Schema(version=3, oldest=2)

    with EngineHarness(First()) as harness:
        pair = harness.attach()
        for engine in (Liar, Far):
            with pytest.raises(SchemaError):
                upgrade(harness, engine)
        pair.client.send(b"a")
        harness.run()
        assert pair.client.try_recv() == b"a 1"


def test_attributes_are_private_and_restore_builds_them_anew() -> None:
    class Caching(First):
        known: set[bytes]

        def snapshot(self) -> bytes:
            return b"said at the hand-over"

        def restore(self, version: int, state: bytes) -> None:
            self.known, self.told = set(self.state.seen), (version, state)

    with EngineHarness(Caching()) as harness:
        assert harness.engine.told == (1, b"")
        pair = harness.attach()
        pair.client.send_many([b"a", b"b"])
        harness.run()
        upgrade(harness, Caching)
        assert harness.engine.told == (1, b"said at the hand-over")
        assert harness.engine.known == {b"a", b"b"}
        pair.client.recv_many(9, timeout=0)


def test_a_client_that_left_before_a_take_over_is_not_attached_again() -> None:
    with EngineHarness(First()) as harness:
        leaving, staying = harness.attach(badge="ann"), harness.attach(badge="bob")
        harness.turn()
        harness.detach(leaving)
        upgrade(harness, First)
        harness.run()
        assert [channel.badge for channel in harness.engine.channels] == ["bob"]
        staying.client.send(b"a")
        harness.run()
        assert staying.client.try_recv() == b"a 1"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["send", "turn", "read", "crash", "upgrade", "back", "attach"]), max_size=60))
def test_whatever_generations_come_and_go_each_message_counts_once(steps: list[str]) -> None:
    with EngineHarness(First(), budget=3) as harness:
        pairs = [harness.attach(badge="0")]
        sent: dict[int, list[bytes]] = {0: []}
        got: dict[int, list[bytes]] = {0: []}
        for number, step in enumerate(steps):
            which = number % len(pairs)
            if step == "send":
                message = b"%d.%d" % (which, len(sent[which]))
                pairs[which].client.send_many([message], timeout=0)
                sent[which].append(message)
            elif step == "turn":
                harness.turn()
            elif step == "read":
                got[which] += pairs[which].client.recv_many(9, timeout=0)
            elif step == "crash":
                crash(harness)
            elif step == "attach":
                if len(pairs) < 4:
                    sent[len(pairs)], got[len(pairs)] = [], []
                    pairs.append(harness.attach(badge=str(len(pairs))))
            elif len(sent) < 60:
                upgrade(harness, Second if step == "upgrade" else First)
        harness.run()
        for which, pair in enumerate(pairs):
            got[which] += pair.client.recv_many(99, timeout=0)
            assert got[which] == [message + b" 1" for message in sent[which]]
        assert len(harness.engine.state.seen) == sum(map(len, sent.values()))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 20_000)),
        st.tuples(st.just("read"), st.integers(1, 40)),
        st.tuples(st.just("turn"), st.integers(1, 3)),
    ),
    max_size=200,
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from([64, 128]), st.sampled_from([1 << 15, 1 << 17]), st.integers(1, 64))
def test_whatever_a_client_sends_and_reads_when_it_gets_all_of_it_in_order(
    steps: list[tuple[str, int]], slots: int, pool: int, budget: int
) -> None:
    with EngineHarness(PyEcho(), budget) as harness:
        pair = harness.attach(slots=slots, up_bytes=pool, down_bytes=pool)
        sent: list[bytes] = []
        got: list[bytes] = []
        for what, amount in steps:
            if what == "send":
                message = len(sent).to_bytes(4, "little") + bytes(amount)
                if pair.client.send_many([message], timeout=0):
                    sent.append(message)
            elif what == "read":
                got += pair.client.recv_many(amount, timeout=0)
            else:
                for _ in range(amount):
                    harness.turn()
        harness.run()
        while burst := pair.client.recv_many(64, timeout=0):
            got += burst
            harness.run()
        assert got == sent and harness.dropped == {}


def answers(seed: int, **chances: float) -> tuple[list[bytes], list[str]]:
    with EngineHarness(PyEcho()) as harness:
        client = FaultInjector(harness.attach(), harness.clock, seed, **chances)
        got: list[bytes] = []
        for number in range(200):
            client.send(b"%03d" % number)
            harness.advance(0.01)
            got += client.receive()
        client.rest()
        harness.run()
        return got + client.receive(), client.log


def test_faults_repeat_with_their_seed() -> None:
    chances = {"drop": 0.1, "duplicate": 0.1, "corrupt": 0.1, "delay": 0.2, "stall": 0.1}
    assert answers(11, **chances) == answers(11, **chances) != answers(12, **chances)


def test_the_seed_of_a_random_injector_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with channel_pair() as pair:
        injector = FaultInjector(pair, VirtualClock())
        assert f"seed={injector.seed}" in capsys.readouterr().out


SENT = [b"%03d" % number for number in range(200)]


def test_a_dropped_message_is_missing() -> None:
    got, log = answers(1, drop=0.2)
    assert got == [message for message, action in zip(SENT, log, strict=True) if action == "send"] != SENT


def test_a_duplicated_message_comes_twice() -> None:
    got, log = answers(1, duplicate=0.2)
    twice = [2 if action == "duplicate" else 1 for action in log]
    assert got == [message for message, count in zip(SENT, twice, strict=True) for _ in range(count)] != SENT


def test_a_corrupted_message_differs_in_one_bit() -> None:
    got, log = answers(1, corrupt=0.2)
    wrong = [
        sum((a ^ b).bit_count() for a, b in zip(sent, came, strict=True))
        for sent, came in zip(SENT, got, strict=True)
    ]
    assert wrong == [1 if action == "corrupt" else 0 for action in log] and 1 in wrong


def test_a_delayed_message_is_overtaken_but_not_lost() -> None:
    got, _ = answers(1, delay=0.2)
    assert got != SENT and sorted(got) == SENT


def test_a_stall_delays_answers_but_loses_none() -> None:
    got, log = answers(1, stall=0.2)
    assert got == SENT and "stall" in log


def test_a_client_that_closes_is_dropped_by_the_engine() -> None:
    with EngineHarness(PyEcho()) as harness:
        pair = harness.attach()
        client = FaultInjector(pair, harness.clock, seed=2, close=1.0)
        harness.run()
        assert client.send(b"x") == "close"
        harness.run()
        assert list(harness.dropped) == [pair.server.id] and client.receive() == []
