"""The machine that decides a module's life, on virtual time: no process, no clock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snap.kernel.supervision import (
    BACKOFF,
    BACKOFF_TIMER,
    FAILED,
    GRACE_TIMER,
    READY,
    START_TIMER,
    STARTING,
    STOPPED,
    STOPPING,
    CancelTimer,
    Emit,
    FailChannels,
    Kill,
    Limits,
    SetTimer,
    Spawn,
    Supervision,
    Terminate,
    stop_order,
)

LIMITS = Limits(
    start_timeout=10, grace=2, backoff_first=1, backoff_most=8, jitter=0, crashes=3, window=30, settled=60
)


class World:
    """Carries out actions on paper: one process at most, timers on a virtual clock."""

    def __init__(
        self, policy: str = "always", limits: Limits = LIMITS, rng: random.Random | None = None
    ) -> None:
        self.machine = Supervision("m", policy, limits, rng or random.Random(0))
        self.now = 0.0
        self.timers: dict[str, float] = {}
        self.process = False
        self.obeys = True
        self.asked_to_stop = False
        self.killed = False
        self.failed_channels: list[str] = []
        self.kinds: list[str] = []

    def do(self, fact: str, *args: object) -> None:
        for action in getattr(self.machine, f"handle_{fact}")(self.now, *args):
            match action:
                case Spawn():
                    assert not self.process, "two live processes"
                    self.process, self.killed, self.asked_to_stop = True, False, False
                case Terminate():
                    assert self.process
                    self.asked_to_stop = True
                case Kill():
                    self.killed = True
                case SetTimer(name, delay):
                    assert delay > 0
                    self.timers[name] = self.now + delay
                case CancelTimer(name):
                    self.timers.pop(name, None)
                case FailChannels(reason):
                    self.failed_channels.append(reason)
                case Emit(kind):
                    self.kinds.append(kind)

    def exit(self, how: str = "exit status 1", clean: bool = False) -> None:
        assert self.process
        self.process = False
        self.do("exited", how, clean)

    def pass_time(self, seconds: float) -> None:
        """Let time go on; what was killed exits at once, what was asked to stop exits if it obeys."""
        end = self.now + seconds
        while True:
            if self.process and self.killed:
                self.exit("killed by SIGKILL")
            elif self.process and self.asked_to_stop and self.obeys:
                self.exit("exit status 0", clean=True)
            elif due := [(when, name) for name, when in self.timers.items() if when <= end]:
                self.now, name = min(due)
                del self.timers[name]
                self.do("timer", name)
            else:
                break
        self.now = end

    def up(self) -> None:
        self.do("start")
        self.do("spawned", 1)
        self.do("serving")
        assert self.machine.state == READY


def test_a_module_is_ready_only_when_it_says_so() -> None:
    world = World()
    world.do("start")
    world.do("spawned", 42)
    assert (world.machine.state, world.machine.pid) == (STARTING, 42)
    world.do("serving")
    assert world.machine.state == READY
    assert START_TIMER not in world.timers


def test_a_hang_in_import_is_killed_and_the_cause_says_so() -> None:
    world = World()
    world.do("start")
    world.pass_time(10)
    assert world.machine.state == BACKOFF
    assert "hung in import" in world.machine.cause
    assert "module.start_timeout" in world.kinds


def test_a_module_starts_when_all_that_it_requires_is_ready() -> None:
    world = World()
    world.machine.missing = frozenset({"a", "b"})
    world.do("start")
    assert (world.machine.state, world.process) == (STARTING, False)
    world.do("requirements", frozenset({"b"}))
    assert (world.machine.cause, world.process) == ("waiting for b", False)
    world.do("requirements", frozenset())
    assert world.process


def test_losing_what_it_requires_stops_nobody() -> None:
    world = World()
    world.up()
    world.do("requirements", frozenset({"a"}))
    assert world.machine.state == READY


def test_a_crashed_module_waits_for_what_it_requires_before_it_is_back() -> None:
    world = World()
    world.up()
    world.do("requirements", frozenset({"a"}))
    world.exit()
    world.pass_time(5)
    assert (world.machine.state, world.machine.cause, world.process) == (STARTING, "waiting for a", False)


def test_a_crash_keeps_the_channels_and_is_restarted_after_a_pause() -> None:
    world = World()
    world.up()
    world.exit("killed by SIGKILL")
    assert world.failed_channels == []
    assert (world.machine.state, world.machine.cause) == (BACKOFF, "killed by SIGKILL")
    world.pass_time(0.9)
    assert not world.process
    world.pass_time(0.1)
    assert world.process


def test_faults_restarts_and_generations_are_counted_apart() -> None:
    world = World()
    world.up()
    world.do("restart")
    world.pass_time(0)
    world.do("serving")
    assert (world.machine.faults, world.machine.restarts, world.machine.generation) == (0, 1, 2)
    world.exit()
    assert (world.machine.faults, world.machine.restarts, world.machine.generation) == (1, 1, 2)
    world.pass_time(1)
    assert (world.machine.faults, world.machine.restarts, world.machine.generation) == (1, 2, 3)


def test_pauses_double_up_to_a_bound() -> None:
    world = World(limits=Limits(backoff_first=1, backoff_most=8, jitter=0, crashes=100))
    pauses = []
    world.do("start")
    for _ in range(6):
        world.exit()
        pauses.append(world.timers[BACKOFF_TIMER] - world.now)
        world.pass_time(pauses[-1])
    assert pauses == [1, 2, 4, 8, 8, 8]


def test_pauses_are_jittered_by_the_given_randomness() -> None:
    pauses = set()
    for seed in range(5):
        world = World(limits=Limits(backoff_first=1, jitter=0.2), rng=random.Random(seed))
        world.up()
        world.exit()
        pauses.add(world.timers[BACKOFF_TIMER])
    assert len(pauses) == 5
    assert all(0.8 <= pause <= 1.2 for pause in pauses)


def test_who_was_ready_for_long_starts_again_at_once_and_pauses_only_the_next_time() -> None:
    world = World()
    world.up()
    world.exit()
    world.pass_time(1)
    world.do("serving")
    world.pass_time(60)
    world.exit("killed by SIGKILL")
    assert (world.machine.state, world.process) == (STARTING, True)
    assert "killed by SIGKILL" in world.machine.cause
    world.exit()
    assert world.timers[BACKOFF_TIMER] - world.now == 2


def test_channels_end_when_nobody_will_serve_them_any_more() -> None:
    for policy, end in (("always", "stop"), ("never", "exit")):
        world = World(policy=policy)
        world.up()
        if end == "stop":
            world.do("stop")
        world.exit("killed by SIGKILL")
        assert len(world.failed_channels) == 1
        assert not world.process


def test_a_standby_that_takes_over_is_the_process_to_supervise() -> None:
    world = World()
    world.up()
    number = world.machine.next_generation()
    world.do("failed_over", "killed by SIGKILL")
    world.do("replaced", number, 4711, True)
    machine = world.machine
    assert (machine.state, machine.generation, machine.pid, machine.faults) == (READY, number, 4711, 1)
    assert machine.next_generation() == number + 1


def test_a_successor_that_has_not_taken_everything_is_waited_for_with_a_deadline() -> None:
    world = World()
    world.up()
    world.do("replaced", world.machine.next_generation(), 4711, False)
    assert world.machine.state == STARTING
    world.pass_time(10)
    assert "first poll" in world.machine.cause


def test_failing_over_again_and_again_is_a_crash_loop_too() -> None:
    world = World(limits=Limits(crashes=3, window=30))
    world.up()
    for _ in range(2):
        assert not world.machine.loops(world.now)
        world.do("failed_over", "killed by SIGKILL")
    assert world.machine.loops(world.now)
    world.exit()
    assert (world.machine.state, "crash loop" in world.machine.cause) == ("failed", True)


def test_a_crash_loop_ends_in_failed_with_the_last_error() -> None:
    world = World()
    world.do("start")
    for _ in range(3):
        world.do("broken", "import", "ImportError: no module named x")
        world.exit()
        world.pass_time(5)
    assert world.machine.state == FAILED
    assert "crash loop" in world.machine.cause
    assert "no module named x" in world.machine.cause
    assert (world.process, world.timers) == (False, {})
    world.pass_time(1000)
    assert world.machine.state == FAILED


def test_exits_far_apart_are_no_crash_loop() -> None:
    world = World()
    world.up()
    for _ in range(5):
        world.exit()
        world.pass_time(9)
        world.do("serving")
        world.pass_time(20)
    assert world.machine.state == READY


def test_an_operator_starts_a_failed_module_again_with_a_clean_slate() -> None:
    world = World()
    world.do("start")
    for _ in range(3):
        world.exit()
        world.pass_time(5)
    assert world.machine.state == FAILED
    world.do("start")
    assert world.process
    world.exit()
    assert world.machine.state == BACKOFF


def test_an_operator_need_not_wait_for_a_back_off() -> None:
    world = World()
    world.up()
    world.exit()
    world.do("start")
    assert world.process
    assert BACKOFF_TIMER not in world.timers


@pytest.mark.parametrize(
    ("policy", "clean", "state"),
    [
        ("always", True, BACKOFF),
        ("always", False, BACKOFF),
        ("on-failure", True, STOPPED),
        ("on-failure", False, BACKOFF),
        ("never", True, STOPPED),
        ("never", False, FAILED),
    ],
)
def test_the_restart_policy_decides_what_follows_an_exit(policy: str, clean: bool, state: str) -> None:
    world = World(policy)
    world.up()
    world.exit("exit status 0" if clean else "exit status 1", clean)
    assert world.machine.state == state


def test_a_stop_is_asked_for_and_then_enforced() -> None:
    world = World()
    world.obeys = False
    world.up()
    world.do("stop")
    assert (world.machine.state, world.asked_to_stop, world.killed) == (STOPPING, True, False)
    world.pass_time(2)
    assert (world.machine.state, world.process) == (STOPPED, False)
    assert world.machine.faults == 0


def test_a_stop_interrupts_a_start_that_hangs() -> None:
    world = World()
    world.do("start")
    world.do("stop")
    world.pass_time(2)
    assert world.machine.state == STOPPED


def test_a_stop_ends_a_back_off() -> None:
    world = World()
    world.up()
    world.exit()
    world.do("stop")
    assert (world.machine.state, world.timers) == (STOPPED, {})


def test_a_start_during_a_stop_follows_it() -> None:
    world = World()
    world.up()
    world.do("stop")
    world.do("start")
    assert world.machine.state == STOPPING
    world.pass_time(0)
    assert (world.machine.state, world.machine.generation) == (STARTING, 2)


def test_a_hung_engine_is_a_crash() -> None:
    world = World()
    world.up()
    world.do("misbehaved", "engine e hung")
    world.pass_time(0)
    assert (world.machine.state, world.machine.faults) == (BACKOFF, 1)
    assert world.machine.cause == "engine e hung (killed by SIGKILL)"


@pytest.mark.parametrize("fact", [("broken", "run", "x"), ("link_lost", "gone")])
def test_a_process_that_said_its_last_word_but_stays_is_killed(fact: tuple[str, ...]) -> None:
    world = World()
    world.up()
    world.do(*fact)
    assert not world.killed
    world.pass_time(2)
    assert world.machine.state == BACKOFF


def test_a_failed_spawn_is_a_crash_like_any_other() -> None:
    world = World()
    world.do("start")
    world.process = False
    world.do("spawn_failed", "out of processes")
    assert world.machine.state == BACKOFF
    assert "out of processes" in world.machine.cause


def test_dependents_stop_before_what_they_require() -> None:
    requires = {"app": {"net", "log"}, "net": {"log"}, "log": set(), "alone": set()}
    assert stop_order(requires, ["alone", "app", "log", "net"]) == [["alone", "app"], ["net"], ["log"]]


FACTS = st.sampled_from(
    [
        ("start",),
        ("stop",),
        ("restart",),
        ("serving",),
        ("broken", "run", "x"),
        ("link_lost", "gone"),
        ("misbehaved", "garbage"),
        ("requirements", frozenset()),
        ("requirements", frozenset({"a"})),
        ("exit",),
        ("late exit",),
        ("time", 0.5),
        ("time", 5.0),
        ("time", 100.0),
        ("timer", START_TIMER),
        ("timer", GRACE_TIMER),
        ("timer", BACKOFF_TIMER),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(FACTS, max_size=60), st.sampled_from(["always", "on-failure", "never"]), st.booleans())
def test_no_order_of_events_makes_two_processes_or_a_stuck_state(
    facts: list[tuple[object, ...]], policy: str, obeys: bool
) -> None:
    world = World(policy)
    world.obeys = obeys
    for name, *args in facts:
        if name == "exit":
            if world.process:
                world.exit()
        elif name == "late exit":
            if not world.process:
                world.do("exited", "exit status 0", True)
        elif name == "time":
            world.pass_time(*args)  # type: ignore[arg-type]
        else:
            world.do(str(name), *args)
        machine = world.machine
        assert machine.live == world.process
        if machine.state in (STOPPED, FAILED, BACKOFF):
            assert not world.process
        if machine.state in (READY, STOPPING):
            assert world.process
        waits = machine.state == STARTING and not world.process
        assert not waits or machine.missing
        if machine.state in (STARTING, STOPPING, BACKOFF) and not waits:
            assert world.timers or world.killed, f"nothing leads out of {machine.state}"
    world.do("stop")
    world.pass_time(100)
    assert world.machine.state in (STOPPED, FAILED)
    assert (world.process, world.timers) == (False, {})
