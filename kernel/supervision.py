"""The life of one module as a state machine without I/O: requests and facts in, actions out.

Time is a float of seconds from any monotonic clock, given by the caller with every fact. The machine asks for
timers by name and is told when one fires; it never sleeps, spawns or signals. Its invariant, whatever the order of
events: at most one process lives at any time, and every state that is not an end has a timer or a process that
will lead out of it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

STOPPED: Final = "stopped"
STARTING: Final = "starting"
READY: Final = "ready"
STOPPING: Final = "stopping"
BACKOFF: Final = "backoff"
FAILED: Final = "failed"

START_TIMER: Final = "start"
GRACE_TIMER: Final = "grace"
BACKOFF_TIMER: Final = "backoff"


@dataclass(frozen=True)
class Limits:
    """How patient supervision is; all in seconds but `crashes` (exits within `window` that make a crash loop).

    `heartbeat`: an engine that gave no sign of life for so long hangs. `settled`: who was ready for so long starts
    its back-off anew.
    """

    start_timeout: float = 20.0
    grace: float = 5.0
    backoff_first: float = 0.1
    backoff_most: float = 30.0
    jitter: float = 0.2
    crashes: int = 5
    window: float = 30.0
    settled: float = 10.0
    heartbeat: float = 8.0


@dataclass(frozen=True)
class Spawn:
    generation: int


@dataclass(frozen=True)
class Terminate:
    """Ask the process to stop by itself within `grace` seconds."""

    grace: float


@dataclass(frozen=True)
class Kill:
    pass


@dataclass(frozen=True)
class SetTimer:
    name: str
    delay: float


@dataclass(frozen=True)
class CancelTimer:
    name: str


@dataclass(frozen=True)
class Release:
    """The process is gone: give back what belonged to it. The module's channels stay, and wait for the next one."""


@dataclass(frozen=True)
class FailChannels:
    """No process will come: tell the clients of the module's channels, and drop its state."""

    reason: str


@dataclass(frozen=True)
class Emit:
    kind: str
    data: dict[str, Any] = field(default_factory=dict)


Action = Spawn | Terminate | Kill | SetTimer | CancelTimer | Release | FailChannels | Emit


class Supervision:
    """One module's machine. Every `handle_*` returns the actions to carry out, in order."""

    def __init__(
        self,
        name: str,
        policy: str = "always",
        limits: Limits | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.name = name
        self.policy = policy
        self.limits = limits or Limits()
        self.state = STOPPED
        self.cause = "never started"
        self.since = 0.0
        self.pid: int | None = None
        self.generation = 0
        self._last = 0
        self.restarts = 0
        self.faults = 0
        self.missing: frozenset[str] = frozenset()
        self._rng = rng or random.Random()
        self._live = False
        self._again = False
        self._attempt = 0
        self._error = ""
        self._crashes: deque[float] = deque(maxlen=self.limits.crashes)

    def next_generation(self) -> int:
        """A number that no process of this module has had."""
        self._last += 1
        return self._last

    @property
    def live(self) -> bool:
        """A process exists, or one was asked for."""
        return self._live

    def loops(self, now: float) -> bool:
        """Whether one more crash makes a crash loop."""
        recent = [when for when in self._crashes if now - when <= self.limits.window]
        return len(recent) >= self.limits.crashes - 1

    # -- requests ---------------------------------------------------------------------------------------------

    def handle_start(self, now: float) -> list[Action]:
        """An operator's start also ends a back-off and forgives a crash loop."""
        if self.state == STOPPING:
            self._again = True
            return []
        if self.state in (STARTING, READY):
            return []
        self._crashes.clear()
        self._attempt = 0
        return [*self._timers_off(), *self._start(now)]

    def handle_stop(self, now: float, cause: str = "stopped by an operator") -> list[Action]:
        self._again = False
        if self.state == STOPPING:
            self.cause = cause
            return []
        if not self._live:
            if self.state in (STOPPED, FAILED):
                return []
            return [*self._timers_off(), *self._end(now, STOPPED, cause)]
        return self._stop(now, cause)

    def handle_restart(self, now: float) -> list[Action]:
        if not self._live:
            return self.handle_start(now)
        self._crashes.clear()
        self._attempt = 0
        actions = [] if self.state == STOPPING else self._stop(now, "restarted by an operator")
        self._again = True
        return actions

    # -- facts ------------------------------------------------------------------------------------------------

    def handle_requirements(self, now: float, missing: frozenset[str]) -> list[Action]:
        """The services that this module requires and that are not ready now. Losing one later stops nobody: the
        channels to it say so, and reopen when it is back."""
        self.missing = missing
        if self.state != STARTING or self._live:
            return []
        return self._start(now)

    def handle_spawned(self, now: float, pid: int) -> list[Action]:
        self.pid = pid
        return [Emit("module.spawned", {"pid": pid, "generation": self.generation})]

    def handle_spawn_failed(self, now: float, error: str) -> list[Action]:
        if not self._live:
            return []
        self._error = error
        return self.handle_exited(now, "was not spawned", clean=False)

    def handle_serving(self, now: float) -> list[Action]:
        if self.state != STARTING or not self._live:
            return []
        return [CancelTimer(START_TIMER), *self._enter(now, READY, "serving")]

    def handle_progress(self, now: float) -> list[Action]:
        """It gets ready, which may take as long as it likes as long as it gets on."""
        if self.state != STARTING or not self._live:
            return []
        return [SetTimer(START_TIMER, self.limits.start_timeout)]

    def handle_replaced(self, now: float, generation: int, pid: int | None, serving: bool) -> list[Action]:
        """Another process of this module is the one to supervise from now on: by an upgrade, or as the standby of one
        that died."""
        self.generation, self.pid, self._live, self._error = generation, pid, True, ""
        if self.state == STOPPING:
            return [Terminate(self.limits.grace)]
        if serving:
            return [*self._timers_off(), *self._enter(now, READY, f"generation {generation} took over")]
        return [
            *self._timers_off(),
            *self._enter(now, STARTING, f"generation {generation} takes over"),
            SetTimer(START_TIMER, self.limits.start_timeout),
        ]

    def handle_failed_over(self, now: float, how: str) -> list[Action]:
        """The process died, and `handle_replaced` comes next: a fault, though nobody is started."""
        self.faults += 1
        self._crashes.append(now)
        return [Emit("module.exited", {"how": self._cause(how), "generation": self.generation})]

    def handle_broken(self, now: float, stage: str, error: str) -> list[Action]:
        """The process says that it cannot go on; it exits next, and is killed when it does not."""
        if not self._live or self.state == STOPPING:
            return []
        self._error = f"broke in {stage}: {error}"
        return [Emit("module.broken", {"stage": stage, "error": error}), *self._condemn()]

    def handle_link_lost(self, now: float, reason: str) -> list[Action]:
        """The link closed, as it does just before an exit; without its link a process is of no use."""
        if not self._live or self.state == STOPPING:
            return []
        self._error = self._error or f"its link closed: {reason}"
        return self._condemn()

    def handle_misbehaved(self, now: float, reason: str) -> list[Action]:
        """It hung, or wrote garbage to the kernel: kill it, and let its exit count as a crash."""
        if not self._live or self.state == STOPPING:
            return []
        self._error = reason
        return [Emit("module.misbehaved", {"reason": reason}), Kill()]

    def handle_timer(self, now: float, name: str) -> list[Action]:
        if name == BACKOFF_TIMER and self.state == BACKOFF:
            self.restarts += 1
            return self._start(now)
        if name == START_TIMER and self.state == STARTING and self._live:
            waited = f"{self.limits.start_timeout:g} s after its start"
            reason = f"not serving {waited} (hung in import, start or first poll)"
            self._error = self._error or reason
            return [Emit("module.start_timeout", {"reason": reason}), Kill()]
        if name == GRACE_TIMER and self._live:
            return [Emit("module.killed", {"reason": "did not exit in time"}), Kill()]
        return []

    def handle_exited(self, now: float, how: str, clean: bool) -> list[Action]:
        """The process has been reaped. `how` in words (`exit status 3`, `killed by SIGKILL`); `clean`: status 0."""
        if not self._live:
            return []
        was, cause = self.state, self._cause(how)
        settled = was == READY and now - self.since >= self.limits.settled
        self._live, self.pid, self._error = False, None, ""
        actions: list[Action] = [*self._timers_off(), Release()]
        actions.append(Emit("module.exited", {"how": how, "generation": self.generation}))
        if was == STOPPING:
            return [*actions, *self._stopped(now)]
        if clean and self.policy != "always":
            return [*actions, *self._end(now, STOPPED, "exited by itself with status 0")]
        self.faults += 1
        self._crashes.append(now)
        if settled:
            self._attempt = 0
        return [*actions, *self._crashed(now, cause, settled)]

    # -- outliving the kernel ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "cause": self.cause,
            "since": self.since,
            "pid": self.pid,
            "generation": self.generation,
            "last": self._last,
            "restarts": self.restarts,
            "faults": self.faults,
            "live": self._live,
            "again": self._again,
            "attempt": self._attempt,
            "error": self._error,
            "crashes": list(self._crashes),
        }

    def restore(self, record: dict[str, Any]) -> list[Action]:
        """Go on where an earlier kernel was; the times are of a clock that goes on too."""
        self.state, self.cause, self.since = record["state"], record["cause"], record["since"]
        self.pid, self.generation, self._last = record["pid"], record["generation"], record["last"]
        self.restarts, self.faults = record["restarts"], record["faults"]
        self._live, self._again = record["live"], record["again"]
        self._attempt, self._error = record["attempt"], record["error"]
        self._crashes.extend(record["crashes"])
        if self.state == BACKOFF:
            return [SetTimer(BACKOFF_TIMER, self.limits.backoff_first)]
        if self.state == STOPPING:
            return [SetTimer(GRACE_TIMER, self.limits.grace), Terminate(self.limits.grace)]
        if self.state == STARTING and self._live:
            return [SetTimer(START_TIMER, self.limits.start_timeout)]
        return []

    # -- parts ------------------------------------------------------------------------------------------------

    def _cause(self, how: str) -> str:
        return f"{self._error} ({how})" if self._error else how

    def _stopped(self, now: float) -> list[Action]:
        if self._again:
            self._again = False
            self.restarts += 1
            return self._start(now)
        return self._end(now, STOPPED, self.cause)

    def _end(self, now: float, state: str, cause: str) -> list[Action]:
        return [FailChannels(cause), *self._enter(now, state, cause)]

    def _crashed(self, now: float, cause: str, settled: bool) -> list[Action]:
        if self.policy == "never":
            return self._end(now, FAILED, f"{cause}; restart policy is never")
        full = len(self._crashes) == self.limits.crashes
        if full and now - self._crashes[0] <= self.limits.window:
            loop = (
                f"crash loop, {self.limits.crashes} exits within {self.limits.window:g} s; the last: {cause}"
            )
            return self._end(now, FAILED, loop)
        if settled:
            # It has done well for long: its clients need not wait.
            self.restarts += 1
            self._attempt += 1
            return self._start(now, f"starts again: {cause}")
        return self._back_off(now, cause)

    def _back_off(self, now: float, cause: str) -> list[Action]:
        limits = self.limits
        # The exponent is bounded before the power is taken: attempts are not.
        delay = min(limits.backoff_most, limits.backoff_first * 2.0 ** min(self._attempt, 32))
        delay *= 1 + limits.jitter * (2 * self._rng.random() - 1)
        self._attempt += 1
        return [SetTimer(BACKOFF_TIMER, delay), *self._enter(now, BACKOFF, cause, {"delay": round(delay, 3)})]

    def _start(self, now: float, cause: str = "its process starts") -> list[Action]:
        if self.missing:
            waiting = "waiting for " + ", ".join(sorted(self.missing))
            if (self.state, self.cause) == (STARTING, waiting):
                return []
            return self._enter(now, STARTING, waiting)
        self._live = True
        self._error = ""
        self.generation = self.next_generation()
        return [
            *self._enter(now, STARTING, cause),
            SetTimer(START_TIMER, self.limits.start_timeout),
            Spawn(self.generation),
        ]

    def _stop(self, now: float, cause: str) -> list[Action]:
        grace = self.limits.grace
        return [
            *self._timers_off(),
            *self._enter(now, STOPPING, cause),
            SetTimer(GRACE_TIMER, grace),
            Terminate(grace),
        ]

    def _condemn(self) -> list[Action]:
        return [CancelTimer(START_TIMER), SetTimer(GRACE_TIMER, self.limits.grace)]

    def _timers_off(self) -> list[Action]:
        return [CancelTimer(START_TIMER), CancelTimer(GRACE_TIMER), CancelTimer(BACKOFF_TIMER)]

    def _enter(self, now: float, state: str, cause: str, data: dict[str, Any] | None = None) -> list[Action]:
        self.state, self.cause, self.since = state, cause, now
        return [Emit(f"module.{state}", {"cause": cause, "generation": self.generation, **(data or {})})]


def stop_order(requires: dict[str, set[str]], running: Sequence[str]) -> list[list[str]]:
    """Waves of modules to stop, dependents before what they require. `requires` maps module to module names.

    A cycle, which the manifest graph refuses, ends up in one last wave.
    """
    left = set(running)
    waves: list[list[str]] = []
    while left:
        wave = sorted(
            name for name in left if not any(name in requires.get(other, ()) for other in left - {name})
        )
        waves.append(wave or sorted(left))
        left -= set(waves[-1])
    return waves
