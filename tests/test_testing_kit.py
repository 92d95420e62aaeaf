"""The kit that module authors test with, tested."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snap.dataplane.errors import FaultedError, FullError, PeerGoneError, RevokedError
from snap.modules import Engine, ServerChannel
from snap.modules.echo.engine import PyEcho
from snap.modules.testing import EngineHarness, FaultInjector, VirtualClock, channel_pair

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
