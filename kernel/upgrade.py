"""One upgrade of one module, without I/O: facts in, actions out.

OLD serves, NEW is to serve after it, BACK is a fresh process of the old version, for when NEW has changed the schema of
the state and must be left again. Whoever waits for an engine takes it when its holder yields or dies: the machine gives
orders and draws conclusions, it hands nothing over itself. Every phase has a timer, every death an answer, and `Fall`
(end all, let supervision start the old version) is always safe: state is whole after every poll.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

OLD: Final = "old"
NEW: Final = "new"
BACK: Final = "back"
NOBODY: Final = ""

BROWNOUT: Final = "brownout"
BLACKOUT: Final = "blackout"
BAKE: Final = "bake"
RETURN_BROWNOUT: Final = "return_brownout"
RETURN: Final = "return"
DONE: Final = "done"

COMMITTED: Final = "committed"
ROLLED_BACK: Final = "rolled_back"
ABORTED: Final = "aborted"

PROGRESS_TIMER: Final = "progress"
FLIP_TIMER: Final = "flip"
BAKE_TIMER: Final = "bake"
CHECK_TIMER: Final = "check"

KERNEL_DIED: Final = "the kernel ended while it was under way"
PATIENT_WITH: Final = 3
"""Times that NEW may leave an engine that was let go for it to OLD."""


@dataclass(frozen=True)
class Patience:
    """Seconds: without progress in a brownout, for a yield or a take, for one health check, between two of them."""

    progress: float = 60.0
    flip: float = 2.0
    health: float = 5.0
    every: float = 1.0


@dataclass(frozen=True)
class Spawn:
    who: str


@dataclass(frozen=True)
class Kill:
    who: str


@dataclass(frozen=True)
class Stop:
    """In its own time: it serves nothing any more."""

    who: str


@dataclass(frozen=True)
class Yield:
    who: str
    engine: str
    retire: bool


@dataclass(frozen=True)
class AskHealth:
    who: str


@dataclass(frozen=True)
class Serve:
    """`who` is the module's process from now on."""

    who: str


@dataclass(frozen=True)
class Fall:
    """Nobody is left: supervision starts the old version."""

    reason: str


@dataclass(frozen=True)
class SetTimer:
    name: str
    delay: float


@dataclass(frozen=True)
class CancelTimer:
    name: str


@dataclass(frozen=True)
class Phase:
    name: str
    reason: str = ""


@dataclass(frozen=True)
class Finish:
    outcome: str
    reason: str


Action = Spawn | Kill | Stop | Yield | AskHealth | Serve | Fall | SetTimer | CancelTimer | Phase | Finish


class Upgrade:
    """Every `handle_*` returns the actions to carry out, in order; after `Finish` none come any more."""

    def __init__(
        self, engines: Sequence[str], bake: float, rollback: bool = True, patience: Patience | None = None
    ) -> None:
        """`bake`: seconds that NEW must do well; without `rollback` it is committed as soon as it runs."""
        self.phase = BROWNOUT
        self.reason = ""
        self.migrates = False
        self.holder: dict[str, str] = dict.fromkeys(engines, OLD)
        self.alive: set[str] = {OLD}
        self._bake, self._rollback, self._patience = bake, rollback, patience or Patience()
        self._prepared: set[str] = set()
        self._waiting_for_health = False
        self._unanswered = 0
        self._moved = False
        self._refusals = 0

    @property
    def done(self) -> bool:
        return self.phase == DONE

    # -- outliving the kernel ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "reason": self.reason,
            "migrates": self.migrates,
            "holder": self.holder,
            "bake": self._bake,
            "rollback": self._rollback,
            "moved": self._moved,
            "alive": sorted(self.alive),
        }

    @classmethod
    def restored(cls, record: dict[str, Any]) -> Upgrade:
        """As an earlier kernel recorded it; nothing but `handle_resumed` comes next."""
        machine = cls(list(record["holder"]), record["bake"], record["rollback"])
        machine.phase, machine.reason = record["phase"], record["reason"]
        machine.migrates, machine._moved = record["migrates"], record["moved"]
        machine.holder = dict(record["holder"])
        machine.alive = set(record["alive"])
        return machine

    def handle_resumed(self, holder: dict[str, str], alive: set[str], prepared: set[str]) -> list[Action]:
        """Go on after the kernel's death: who says that it runs engines, lives, and waits for all of its engines. In a
        brownout nothing has moved, and is given up; what has moved moves on, and bakes anew."""
        self.holder.update(holder)
        self._moved = self._moved or NEW in self.holder.values()
        dead = self.alive - alive
        self.alive, self._prepared = self.alive & alive, set(prepared)
        if self.phase in (RETURN_BROWNOUT, RETURN):
            return self._resume_return()
        if self.phase == BROWNOUT and OLD in self.alive and not self._moved:
            return self._fail(KERNEL_DIED)
        if self.phase == BROWNOUT and OLD not in self.alive:
            return self._old_ended(KERNEL_DIED)
        if NEW in dead:
            return self._fail("the new version died while no kernel ran")
        self.phase = BLACKOUT
        return self._next_engine()

    def retires(self, who: str) -> bool:
        """Whether engines may have ended in `who` for one with another schema."""
        if self.phase in (RETURN_BROWNOUT, RETURN):
            return who == OLD or (who == NEW and BACK in self.alive)
        return who == OLD and self.migrates

    # -- requests ---------------------------------------------------------------------------------------------

    def begin(self) -> list[Action]:
        self.alive.add(NEW)
        return [Phase(BROWNOUT), Spawn(NEW), SetTimer(PROGRESS_TIMER, self._patience.progress)]

    def handle_cancel(self, reason: str) -> list[Action]:
        """An operator wants the old version (back)."""
        return self._fail(reason)

    # -- facts ------------------------------------------------------------------------------------------------

    def handle_progress(self) -> list[Action]:
        if self.phase in (BROWNOUT, RETURN_BROWNOUT):
            return [SetTimer(PROGRESS_TIMER, self._patience.progress)]
        return []

    def handle_prepared(self, who: str, migrates: bool) -> list[Action]:
        """All engines of `who` wait for their ownership; `migrates`: on state of another schema, which they fill."""
        self._prepared.add(who)
        if who == NEW and self.phase == BROWNOUT:
            self.migrates = migrates
            if self.holder and OLD not in self.alive:
                return self._forward()
            self._waiting_for_health = True
            return [AskHealth(NEW), SetTimer(PROGRESS_TIMER, self._patience.health)]
        if who == BACK and self.phase == RETURN_BROWNOUT:
            return [CancelTimer(PROGRESS_TIMER), *self._return()]
        return []

    def handle_health(self, reason: str) -> list[Action]:
        """Of NEW; empty: well."""
        self._waiting_for_health = False
        if self.phase == BROWNOUT and NEW in self._prepared:
            if reason:
                return self._fail(f"the new version is not well: {reason}")
            return self._forward()
        if self.phase == BAKE and reason:
            return self._fail(f"the new version is not well: {reason}")
        return []

    def handle_took(self, who: str, engine: str) -> list[Action]:
        back = self.phase == BLACKOUT and who == OLD
        self.holder[engine] = who
        self._moved = self._moved or who == NEW
        if back:
            return self._not_taken()
        if self.phase == BROWNOUT and who == NEW:
            # Its predecessor died just then: what was to come has come.
            return self._forward()
        if self.phase == BLACKOUT:
            return self._next_engine()
        if self.phase == RETURN:
            return self._next_return()
        return []

    def handle_trouble(self, reason: str) -> list[Action]:
        """What is watched while NEW bakes went wrong."""
        return self._fail(reason) if self.phase == BAKE else []

    def handle_refused(self, who: str, reason: str) -> list[Action]:
        if self.done:
            return []
        return [Kill(who), *self.handle_ended(who, reason)]

    def handle_ended(self, who: str, reason: str) -> list[Action]:
        """The process `who` is dead, or as good as dead."""
        if self.done or who not in self.alive:
            return []
        self.alive.discard(who)
        self._prepared.discard(who)
        if who == OLD:
            return self._old_ended(reason)
        if who == BACK:
            return self._fall(f"{self.reason}; then the old version did not come back: {reason}")
        if self.phase in (RETURN, RETURN_BROWNOUT):
            return self._new_ended_returning()
        return self._fail(f"the new version died: {reason}")

    def handle_timer(self, name: str) -> list[Action]:
        if self.done:
            return []
        if name == PROGRESS_TIMER and self.phase == BROWNOUT:
            what = "did not say how it is" if self._waiting_for_health else "made no progress getting ready"
            return self._fail(f"the new version {what} for {self._progress_limit():g} s")
        if name == PROGRESS_TIMER and self.phase == RETURN_BROWNOUT:
            return self._fall(f"{self.reason}; then the old version made no progress getting ready")
        if name == FLIP_TIMER:
            return self._flip_late()
        if name == CHECK_TIMER and self.phase == BAKE:
            return self._check()
        if name == BAKE_TIMER and self.phase == BAKE:
            # Not before it has answered what it was asked last.
            if self._waiting_for_health:
                return [SetTimer(BAKE_TIMER, self._patience.every)]
            return self._commit("")
        return []

    # -- forward ----------------------------------------------------------------------------------------------

    def _forward(self) -> list[Action]:
        self.phase = BLACKOUT
        return [CancelTimer(PROGRESS_TIMER), Phase(BLACKOUT), *self._next_engine()]

    def _next_engine(self) -> list[Action]:
        left = [engine for engine, who in self.holder.items() if who != NEW]
        if not left:
            return [CancelTimer(FLIP_TIMER), *self._bake_it()]
        timer = SetTimer(FLIP_TIMER, self._patience.flip)
        if OLD not in self.alive:
            return [timer]  # nobody holds it: the waiting one takes it
        return [timer, Yield(OLD, left[0], self.migrates)]

    def _not_taken(self) -> list[Action]:
        """OLD let go, waited a moment, and took the engine again: NEW does not. Once that can be bad luck."""
        self._refusals += 1
        if self._refusals < PATIENT_WITH:
            return self._next_engine()
        return self._fail("the new version waits for its engines, and does not take them")

    def _bake_it(self) -> list[Action]:
        self.phase = BAKE
        actions: list[Action] = [Serve(NEW)]
        if not self._rollback or self._bake <= 0:
            return [*actions, *self._commit("")]
        self._waiting_for_health = False
        return [*actions, Phase(BAKE), SetTimer(BAKE_TIMER, self._bake), *self._check()]

    def _check(self) -> list[Action]:
        """Ask how it is, again and again; an answer may take a while."""
        again = SetTimer(CHECK_TIMER, self._patience.every)
        if not self._waiting_for_health:
            self._waiting_for_health, self._unanswered = True, 0
            return [AskHealth(NEW), again]
        self._unanswered += 1
        if self._unanswered * self._patience.every >= self._patience.health:
            return self._fail("the new version does not say how it is")
        return [again]

    def _commit(self, reason: str) -> list[Action]:
        old: list[Action] = [Stop(OLD)] if OLD in self.alive else []
        return [*old, *self._finish(COMMITTED, reason)]

    # -- back -------------------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> list[Action]:
        if self.done or self.phase in (RETURN, RETURN_BROWNOUT):
            return []
        self.reason = reason
        moved = self._moved
        # In the blackout of a migration OLD may have retired an engine by now, and cannot take it again.
        retired = self.phase == BLACKOUT and self.migrates
        if not moved and not retired and OLD in self.alive:
            kill: list[Action] = [Kill(NEW)] if NEW in self.alive else []
            return [*kill, *self._finish(ABORTED, reason)]
        if self.migrates or OLD not in self.alive:
            return self._come_back()
        if self.phase == BLACKOUT:
            # OLD was told to let it go, and may have done so: only who takes it says whose it is.
            self.holder[next(engine for engine, who in self.holder.items() if who != NEW)] = NOBODY
        self.phase = RETURN
        return [Phase(RETURN, reason), *self._return()]

    def _come_back(self) -> list[Action]:
        """By a fresh process of the old version, which migrates the state back while NEW still serves, if it does."""
        if NEW not in self.alive or self.phase == BLACKOUT:
            return self._fall(self.reason)
        self.phase = RETURN_BROWNOUT
        actions: list[Action] = [Phase(RETURN_BROWNOUT, self.reason)]
        if OLD in self.alive:
            self.alive.discard(OLD)
            actions.append(Stop(OLD))
        self.alive.add(BACK)
        return [*actions, Spawn(BACK), SetTimer(PROGRESS_TIMER, self._patience.progress)]

    def _return(self) -> list[Action]:
        self.phase = RETURN
        return self._next_return()

    def _next_return(self) -> list[Action]:
        home = BACK if BACK in self.alive else OLD
        left = [engine for engine, who in self.holder.items() if who != home]
        if not left:
            stop: list[Action] = [Stop(NEW)] if NEW in self.alive else []
            return [CancelTimer(FLIP_TIMER), Serve(home), *stop, *self._finish(ROLLED_BACK, self.reason)]
        timer = SetTimer(FLIP_TIMER, self._patience.flip)
        if NEW not in self.alive or self.holder[left[0]] != NEW:
            return [timer]
        return [timer, Yield(NEW, left[0], home == BACK)]

    def _resume_return(self) -> list[Action]:
        home = BACK if BACK in self.alive else OLD
        if home not in self.alive:
            return self._fall(f"{self.reason}; then the old version did not come back")
        if self.phase == RETURN or (home == BACK and BACK in self._prepared):
            return self._return()
        if NEW not in self.alive:
            return self._new_ended_returning()
        return [SetTimer(PROGRESS_TIMER, self._patience.progress)]

    def _new_ended_returning(self) -> list[Action]:
        if self.phase == RETURN_BROWNOUT:
            # What BACK fills can be filled up when it takes over; but nobody serves until then.
            return self._fall(f"{self.reason}; then the new version died")
        return self._next_return()

    # -- deaths and deadlines ---------------------------------------------------------------------------------

    def _old_ended(self, reason: str) -> list[Action]:
        if self.phase == BROWNOUT:
            if NEW in self._prepared:
                return self._forward()
            kill: list[Action] = [Kill(NEW)] if NEW in self.alive else []
            return [*kill, *self._end(ABORTED, f"the old version died: {reason}")]
        if self.phase == BLACKOUT:
            return self._next_engine()
        if self.phase == RETURN:
            return self._fall(f"{self.reason}; then the old version died: {reason}")
        return []

    def _flip_late(self) -> list[Action]:
        if self.phase == BLACKOUT and OLD in self.alive:
            # It does not let go: then the OS takes it away.
            self.alive.discard(OLD)
            return [Kill(OLD), SetTimer(FLIP_TIMER, self._patience.flip)]
        if self.phase == BLACKOUT:
            return self._fall("the new version did not take over in time")
        if self.phase == RETURN and NEW in self.alive:
            self.alive.discard(NEW)
            return [Kill(NEW), SetTimer(FLIP_TIMER, self._patience.flip)]
        return self._fall(f"{self.reason}; then the old version did not take over in time")

    def _fall(self, reason: str) -> list[Action]:
        return self._end(ROLLED_BACK if self._moved else ABORTED, reason)

    def _end(self, outcome: str, reason: str) -> list[Action]:
        """Everybody out; supervision starts the old version."""
        kills: list[Action] = [Kill(who) for who in (OLD, NEW, BACK) if who in self.alive]
        self.alive.clear()
        return [*kills, Fall(reason), *self._finish(outcome, reason)]

    def _finish(self, outcome: str, reason: str) -> list[Action]:
        self.phase, self.reason = DONE, reason
        timers: list[Action] = [
            CancelTimer(name) for name in (PROGRESS_TIMER, FLIP_TIMER, BAKE_TIMER, CHECK_TIMER)
        ]
        return [*timers, Finish(outcome, reason)]

    def _progress_limit(self) -> float:
        return self._patience.health if self._waiting_for_health else self._patience.progress
