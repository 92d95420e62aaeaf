"""The machine that decides an upgrade, on paper: processes that take what is free, die, hang and refuse."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snap.kernel import upgrade
from snap.kernel.upgrade import (
    ABORTED,
    BACK,
    BAKE,
    BAKE_TIMER,
    CHECK_TIMER,
    COMMITTED,
    DONE,
    FLIP_TIMER,
    NEW,
    OLD,
    PROGRESS_TIMER,
    ROLLED_BACK,
    Upgrade,
)

ENGINES = ["a", "b", "c"]


class World:
    """Processes and semaphores. Who is alive, prepared, not hung and wants an engine takes it when it is free."""

    def __init__(self, migrates: bool = False, rollback: bool = True, bake: float = 5.0) -> None:
        self.machine = Upgrade(ENGINES, bake, rollback)
        self.migrates = migrates
        self.alive = {OLD}
        self.prepared = {OLD}
        self.hung: set[str] = set()
        self.holder: dict[str, str | None] = dict.fromkeys(ENGINES, OLD)
        self.retired: set[tuple[str, str]] = set()
        self.timers: dict[str, float] = {}
        self.serving = OLD
        self.fallen = False
        self.outcome = ""
        self.reason = ""
        self.asked = False
        self.do(self.machine.begin())

    def do(self, actions: list[upgrade.Action]) -> None:
        for action in actions:
            assert not self.outcome, f"{action} after the end"
            match action:
                case upgrade.Spawn(who):
                    assert who not in self.alive
                    self.alive.add(who)
                case upgrade.Kill(who):
                    self._die(who)
                case upgrade.Stop(who):
                    assert who not in self.holder.values(), f"{who} is told to stop and runs engines"
                    self._die(who)
                case upgrade.Yield(who, engine, retire):
                    assert who in self.alive
                    if who not in self.hung and self.holder[engine] == who:
                        self.holder[engine] = None
                        if retire:
                            self.retired.add((who, engine))
                case upgrade.AskHealth():
                    self.asked = True
                case upgrade.Serve(who):
                    assert all(holder == who for holder in self.holder.values())
                    self.serving = who
                case upgrade.Fall():
                    self.fallen = True
                case upgrade.SetTimer(name, delay):
                    self.timers[name] = delay
                case upgrade.CancelTimer(name):
                    self.timers.pop(name, None)
                case upgrade.Finish(outcome, reason):
                    self.outcome, self.reason = outcome, reason

    def _die(self, who: str) -> None:
        self.alive.discard(who)
        self.prepared.discard(who)
        self.hung.discard(who)
        for engine, holder in self.holder.items():
            if holder == who:
                self.holder[engine] = None

    # -- what happens -----------------------------------------------------------------------------------------

    def get_ready(self, who: str) -> None:
        if who in self.alive and who not in self.prepared and who not in self.hung:
            self.prepared.add(who)
            self.do(self.machine.handle_prepared(who, self.migrates))

    def take(self, rng: random.Random) -> bool:
        """Somebody who waits gets an engine that is free, and says so."""
        free = [
            (engine, who)
            for engine, holder in self.holder.items()
            if holder is None
            for who in sorted(self.alive & self.prepared - self.hung)
            if (who, engine) not in self.retired
        ]
        if not free:
            return False
        engine, who = rng.choice(free)
        self.holder[engine] = who
        self.do(self.machine.handle_took(who, engine))
        return True

    def die(self, who: str) -> None:
        if who in self.alive:
            self._die(who)
            self.do(self.machine.handle_ended(who, "killed"))

    def answer(self, reason: str = "") -> None:
        if self.asked and NEW in self.alive and NEW not in self.hung:
            self.asked = False
            self.do(self.machine.handle_health(reason))

    def fire(self, name: str) -> None:
        if self.timers.pop(name, None) is not None:
            self.do(self.machine.handle_timer(name))

    def lose_kernel(self, dead: str = "") -> None:
        """The next one goes on with what was recorded, and with what the processes say; `dead` died meanwhile."""
        record = msgspec.msgpack.decode(msgspec.msgpack.encode(self.machine.record()))
        if dead in self.alive:
            self._die(dead)
        self.machine = Upgrade.restored(record)
        self.timers.clear()
        self.asked = False
        holder = {engine: who for engine, who in self.holder.items() if who is not None}
        self.do(self.machine.handle_resumed(holder, set(self.alive), self.alive & self.prepared))

    def settle(self) -> None:
        """Everybody does well from here on."""
        rng = random.Random(0)
        for _ in range(100):
            if self.outcome:
                return
            for who in (NEW, BACK):
                self.get_ready(who)
            while self.take(rng):
                pass
            self.answer()
            timers = [name for name in (FLIP_TIMER, PROGRESS_TIMER, BAKE_TIMER) if name in self.timers]
            if timers:
                self.fire(timers[0])
        pytest.fail(f"it does not end: {self.machine.phase}, {self.timers}, {self.holder}")

    def to_bake(self) -> None:
        rng = random.Random(0)
        self.get_ready(NEW)
        self.answer()
        # One at a time, and NEW is quicker than an old one that leaves its engines to it.
        while self.machine.phase == upgrade.BLACKOUT:
            for engine, holder in self.holder.items():
                if holder is None:
                    self.holder[engine] = NEW
                    self.do(self.machine.handle_took(NEW, engine))
                    break
            else:
                assert self.take(rng)
        assert self.machine.phase in (BAKE, DONE)

    def check(self) -> None:
        """What holds at the end."""
        assert self.machine.done
        if self.fallen:
            assert not self.alive, "supervision starts the old version: nobody else may wait for its engines"
            return
        home = {COMMITTED: {NEW}, ROLLED_BACK: {OLD, BACK}, ABORTED: {OLD}}[self.outcome]
        assert self.serving in home
        for engine, holder in self.holder.items():
            # One that was let go just then is waited for by who serves.
            assert holder == self.serving or (holder is None and (self.serving, engine) not in self.retired)


def test_an_upgrade_goes_from_brownout_to_commit_engine_by_engine() -> None:
    world = World()
    world.to_bake()
    assert (world.serving, world.outcome) == (NEW, "")
    world.fire(BAKE_TIMER)
    assert world.outcome == "", "it has not yet said how it is"
    world.answer()
    world.fire(BAKE_TIMER)
    assert (world.outcome, world.alive) == (COMMITTED, {NEW})


def test_without_rollback_it_is_committed_as_soon_as_it_runs() -> None:
    world = World(rollback=False)
    world.to_bake()
    assert (world.outcome, world.alive) == (COMMITTED, {NEW})


@pytest.mark.parametrize("how", ["dies", "hangs", "refuses", "is not well", "says nothing", "is cancelled"])
def test_who_fails_before_any_engine_moved_is_ended_and_the_old_one_serves_on(how: str) -> None:
    world = World()
    if how == "dies":
        world.die(NEW)
    elif how == "hangs":
        world.fire(PROGRESS_TIMER)
    elif how == "refuses":
        world.do(world.machine.handle_refused(NEW, "schema"))
    elif how == "is cancelled":
        world.do(world.machine.handle_cancel("no"))
    else:
        world.get_ready(NEW)
        if how == "is not well":
            world.answer("sick")
        else:
            world.fire(PROGRESS_TIMER)
    assert (world.outcome, world.alive, world.serving) == (ABORTED, {OLD}, OLD)
    assert set(world.holder.values()) == {OLD}


def test_progress_is_rewarded_with_patience() -> None:
    world = World()
    world.timers.clear()
    world.do(world.machine.handle_progress())
    assert world.timers == {PROGRESS_TIMER: 60.0}


@pytest.mark.parametrize("migrates", [False, True])
@pytest.mark.parametrize("how", ["death", "health", "silence", "trouble", "operator"])
def test_trouble_in_the_bake_brings_the_old_version_back(how: str, migrates: bool) -> None:
    world = World(migrates=migrates)
    world.to_bake()
    if how == "death":
        world.die(NEW)
    elif how == "operator":
        world.do(world.machine.handle_cancel("rolled back by an operator"))
    elif how == "trouble":
        world.do(world.machine.handle_trouble("slow"))
    else:
        if how == "health":
            world.answer("sick")
        for _ in range(5):
            world.fire(CHECK_TIMER)
    world.settle()
    assert world.outcome == ROLLED_BACK
    if migrates and how == "death":
        assert world.fallen
    else:
        assert (world.serving, world.alive) == ((BACK, {BACK}) if migrates else (OLD, {OLD}))


def test_an_old_process_that_does_not_let_go_is_killed_and_loses_its_engines() -> None:
    world = World()
    world.hung.add(OLD)
    world.get_ready(NEW)
    world.answer()
    world.fire(FLIP_TIMER)
    assert OLD not in world.alive
    world.settle()
    assert (world.outcome, world.serving) == (COMMITTED, NEW)


def test_a_new_process_that_never_takes_is_given_up_after_a_few_rounds() -> None:
    world = World()
    world.get_ready(NEW)
    world.answer()
    world.hung.add(NEW)
    rng = random.Random(1)
    for _ in range(10):
        if not world.take(rng):
            break
    assert (world.outcome, world.alive) == (ABORTED, {OLD})


def test_the_old_ones_death_while_the_new_one_gets_ready_is_left_to_supervision() -> None:
    world = World()
    world.die(OLD)
    assert (world.outcome, world.fallen, world.alive) == (ABORTED, True, set())


def test_the_old_ones_death_when_the_new_one_is_ready_only_hurries_it() -> None:
    world = World()
    world.get_ready(NEW)
    world.die(OLD)
    world.settle()
    assert (world.outcome, world.serving) == (COMMITTED, NEW)


def test_a_take_of_the_old_one_heard_before_the_death_of_the_new_one_is_a_rollback() -> None:
    world = World()
    world.to_bake()
    world._die(NEW)
    rng = random.Random(0)
    while world.take(rng):
        pass
    world.do(world.machine.handle_ended(NEW, "killed"))
    assert (world.outcome, world.serving) == (ROLLED_BACK, OLD)


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    migrates=st.booleans(),
    rollback=st.booleans(),
    steps=st.integers(0, 40),
)
def test_whatever_happens_it_ends_with_somebody_serving_or_with_supervision(
    seed: int, migrates: bool, rollback: bool, steps: int
) -> None:
    rng = random.Random(seed)
    world = World(migrates=migrates, rollback=rollback)
    for _ in range(steps):
        if world.outcome:
            break
        who = rng.choice([OLD, NEW, BACK])
        step = rng.choice(
            ["ready", "take", "take", "die", "hang", "resume", "answer", "ill", "fire", "refuse", "kernel"]
        )
        if step == "ready":
            world.get_ready(who)
        elif step == "take":
            world.take(rng)
        elif step == "die" and rng.random() < 0.3:
            world.die(who)
        elif step == "hang":
            world.hung |= {who} & world.alive
        elif step == "resume":
            world.hung.discard(who)
        elif step == "answer":
            world.answer()
        elif step == "ill":
            world.answer("ill")
        elif step == "fire" and world.timers:
            world.fire(rng.choice(sorted(world.timers)))
        elif step == "kernel":
            world.lose_kernel(who if rng.random() < 0.2 else "")
        elif step == "refuse" and who != OLD and who in world.alive and who not in world.prepared:
            world.do(world.machine.handle_refused(who, "schema"))
    world.hung.clear()
    if not world.outcome:
        world.settle()
    world.check()


def test_an_engine_that_was_let_go_when_the_new_version_died_is_waited_for() -> None:
    world = World(rollback=False)
    world.get_ready(NEW)
    world.answer()
    world.holder["a"] = NEW
    world.do(world.machine.handle_took(NEW, "a"))
    assert world.holder == {"a": NEW, "b": None, "c": OLD}
    world.die(NEW)
    rng = random.Random(0)
    while world.take(rng):
        pass
    assert (world.outcome, world.serving) == (upgrade.ROLLED_BACK, OLD)
    assert set(world.holder.values()) == {OLD}


def test_a_kernel_that_dies_in_the_brownout_ends_the_upgrade_with_it() -> None:
    world = World()
    world.get_ready(NEW)
    world.lose_kernel()
    assert (world.outcome, world.alive, world.serving) == (ABORTED, {OLD}, OLD)
    assert "the kernel" in world.reason


@pytest.mark.parametrize("migrates", [False, True])
def test_a_kernel_that_dies_in_the_blackout_has_it_carried_through_and_baked(migrates: bool) -> None:
    world = World(migrates=migrates)
    world.get_ready(NEW)
    world.answer()
    assert world.machine.phase == upgrade.BLACKOUT
    world.lose_kernel()
    assert (world.machine.phase, world.outcome) == (upgrade.BLACKOUT, "")
    world.to_bake()
    world.settle()
    assert (world.outcome, world.alive) == (COMMITTED, {NEW})


def test_a_kernel_that_dies_in_the_bake_has_it_baked_again() -> None:
    world = World()
    world.to_bake()
    world.timers[BAKE_TIMER] = 0.1
    world.lose_kernel()
    assert (world.machine.phase, world.timers[BAKE_TIMER]) == (BAKE, 5.0)
    world.answer("ill")
    world.settle()
    assert (world.outcome, world.serving) == (ROLLED_BACK, OLD)


def test_a_kernel_that_dies_in_the_return_has_it_ended() -> None:
    world = World(migrates=True)
    world.to_bake()
    world.answer("ill")
    world.lose_kernel()
    assert world.machine.phase == upgrade.RETURN_BROWNOUT
    world.settle()
    assert (world.outcome, world.serving) == (ROLLED_BACK, BACK)
