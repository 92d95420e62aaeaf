"""Carries out what `upgrade.Upgrade` decides on a `Runner`, and keeps the report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from snap.dataplane.errors import SnapError
from snap.ipc import faults, protocol
from snap.ipc.discovery import Found
from snap.ipc.protocol import UpgradeEngineView, UpgradeView

from . import packages, upgrade
from .incarnation import Incarnation
from .runner import Runner
from .upgrade import NEW, OLD, Action, Patience, Upgrade

STUCK: Final = 2
"""Checks in a row at which messages waited and no work had been done, after which a new version is too slow."""

FAULTS: Final = 3
"""Channels that a new version may drop while it bakes."""

PROGRESS_EVERY: Final = 0.1


@dataclass(frozen=True)
class Waits:
    """How long the clients of a module waited, at the longest, in ns: to clear, and to read. A wait may be for what
    nobody owes: `unanswered` counts the messages that the module has not taken."""

    clear: Callable[[], None]
    read: Callable[[], int]
    unanswered: Callable[[], int]


class Upgrading:
    """One upgrade (or rollback) of `runner` to `found`. `done(self)` is called when it has ended."""

    def __init__(
        self,
        number: int,
        runner: Runner,
        found: Found,
        kind: str,
        bake: float,
        rollback: bool,
        waits: Waits,
        done: Callable[[Upgrading], None],
        patience: Patience | None = None,
    ) -> None:
        self.runner, self.found, self.before = runner, found, runner.found
        self.origin = runner.origin
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._machine = Upgrade(list(runner.found.manifest.engines), bake, rollback, patience)
        self._waits, self._done = waits, done
        self._who: dict[str, Incarnation] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._engines = {name: UpgradeEngineView(name=name) for name in found.manifest.engines}
        self._faults_before = 0
        self._work = -1
        self._stuck = 0
        self._leaves_messages = False
        self._phase_since = time.monotonic()
        self._told = 0.0
        self._awaited: set[str] = set()
        """Who has still to say what it holds, after the kernel's death."""
        self.view = UpgradeView(
            id=number,
            module=runner.name,
            kind=kind,
            phase="queued",
            outcome="",
            reason="",
            from_version=runner.found.manifest.module.version,
            to_version=found.manifest.module.version,
            from_generation=runner.machine.generation,
            to_generation=0,
            from_path=str(runner.found.path),
            to_path=str(found.path),
            started=time.time(),
            bake_seconds=bake if rollback else 0.0,
            engines=list(self._engines.values()),
        )

    @property
    def incarnations(self) -> list[Incarnation]:
        return list(self._who.values())

    def begin(self) -> None:
        """The module is ready, and nobody else upgrades it."""
        assert self.runner.current is not None
        self._waits.clear()
        self.runner.follower = self
        # Whoever waits for an engine takes it when its holder lets go: that must be the new version.
        self.runner.dismiss_standby()
        self._who[OLD] = self.runner.current
        self._look(self.runner.current)
        self._perform(self._machine.begin())

    def cancel(self, reason: str) -> None:
        """Back to the old version, from wherever it is."""
        self._perform(self._machine.handle_cancel(reason))

    def abandon(self, reason: str) -> None:
        """The module is being stopped: end every process but its current one."""
        for incarnation in self.incarnations:
            if incarnation is not self.runner.current:
                incarnation.kill()
        self._finish("aborted", reason)

    # -- outliving the kernel ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        return {
            "found": packages.record(self.found),
            "before": packages.record(self.before),
            "origin": packages.record(self.origin),
            "machine": self._machine.record(),
            "leaves_messages": self._leaves_messages,
            "who": {who: incarnation.generation for who, incarnation in self._who.items()},
        }

    @classmethod
    def restored(
        cls,
        record: dict[str, Any],
        view: UpgradeView,
        runner: Runner,
        processes: dict[int, Incarnation],
        waits: Waits,
        done: Callable[[Upgrading], None],
    ) -> Upgrading:
        """Go on with what an earlier kernel had under way; `processes` are the module's, by generation."""
        found = packages.restored(record["found"])
        made = cls(view.id, runner, found, view.kind, 0.0, True, waits, done)
        made.view, made._machine = view, Upgrade.restored(record["machine"])
        made.before, made.origin = packages.restored(record["before"]), packages.restored(record["origin"])
        made._engines = {engine.name: engine for engine in view.engines}
        made._leaves_messages = record["leaves_messages"]
        made._who = {who: processes[number] for who, number in record["who"].items() if number in processes}
        made._awaited = set(made._who)
        runner.follower = made
        if not made._awaited:
            asyncio.get_running_loop().call_soon(made._resume)
        return made

    def on_report(self, incarnation: Incarnation) -> None:
        """What `incarnation` runs and waits for is known again."""
        who = self._name(incarnation)
        if who in self._awaited:
            self._awaited.discard(who)
            # Who gets ready may answer late; it is given up anyway.
            if not self._awaited or (who == OLD and self._machine.phase == upgrade.BROWNOUT):
                self._resume()

    def retires(self, incarnation: Incarnation) -> bool:
        """Whether engines may have ended in it, for their state is in the hands of code with another schema."""
        who = self._name(incarnation)
        return who is not None and self._machine.retires(who)

    def _resume(self) -> None:
        if self.finished.done():
            return
        self._awaited = set()
        holder = {engine: who for who, each in self._who.items() for engine in each.running}
        prepared = {who for who, each in self._who.items() if each.ready}
        self._perform(self._machine.handle_resumed(holder, set(self._who), prepared))

    # -- facts ------------------------------------------------------------------------------------------------

    def on_message(self, incarnation: Incarnation, message: Any) -> None:
        who = self._name(incarnation)
        if who is None or self._awaited:
            return
        match message:
            case protocol.Loaded():
                self._perform(self._machine.handle_progress())
            case protocol.Progress() if who != OLD:
                self._note(message)
                self._perform(self._machine.handle_progress())
            case protocol.Prepared(engine=engine) if who != OLD:
                self._note_engine(engine, stage="prepared", rounds=message.rounds, migrated=message.migrated)
                if incarnation.ready:
                    faults.reach("kernel.prepared")
                    migrates = self.runner.states.migrates(incarnation.generation)
                    self._perform(self._machine.handle_prepared(who, migrates))
            case protocol.Health(reason=reason) if who == NEW:
                self._perform(self._machine.handle_health(reason[:500]))
            case protocol.Took():
                self._took(who, message)
            case protocol.Refused(message=text) if who != OLD:
                self._perform(self._machine.handle_refused(who, f"it refused its state: {text[:1000]}"))

    def on_exit(self, incarnation: Incarnation, reason: str) -> bool:
        who = self._name(incarnation)
        if who is None:
            return False
        mine = incarnation is self.runner.current
        del self._who[who]
        if mine:
            # From here on the machine says who is current, or that nobody is.
            self.runner.current = None
        if self._awaited:
            self._awaited.discard(who)
            if not self._awaited:
                self._resume()
        else:
            self._perform(self._machine.handle_ended(who, reason))
        return mine

    def _took(self, who: str, message: protocol.Took) -> None:
        faults.reach("kernel.took")
        blackout = message.first_poll_ns - message.last_poll_ns if message.last_poll_ns else -1
        stage = "flipped" if who == NEW else "returned"
        self._note_engine(message.engine, stage=stage, blackout_ns=blackout, converted=message.converted)
        self._emit("upgrade.flip", engine=message.engine, blackout_ns=blackout)
        self._perform(self._machine.handle_took(who, message.engine))

    # -- what the machine decided -----------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case upgrade.Spawn(who):
                    self._spawn(who)
                case upgrade.Kill(who):
                    if who in self._who:
                        self._who[who].kill()
                case upgrade.Stop(who):
                    self._stop(who)
                case upgrade.Yield(who, engine, retire):
                    self._who[who].send(protocol.Yield(engine=engine, retire=retire))
                    faults.reach("kernel.yield_sent")
                case upgrade.AskHealth(who):
                    self._check(who)
                case upgrade.Serve(who):
                    self._serve(self._who[who])
                case upgrade.Fall(reason):
                    self._fall(reason)
                case upgrade.SetTimer(name, delay):
                    self._cancel_timer(name)
                    loop = asyncio.get_running_loop()
                    self._timers[name] = loop.call_later(delay, self._timer_fired, name)
                case upgrade.CancelTimer(name):
                    self._cancel_timer(name)
                case upgrade.Phase(name, reason):
                    self._enter(name, reason)
                case upgrade.Finish(outcome, reason):
                    self._finish(outcome, reason)

    def _spawn(self, who: str) -> None:
        found = self.found if who == NEW else self.before
        try:
            self._who[who] = self.runner.spawn(found)
        except (SnapError, OSError) as error:
            # Not before the actions that came with this one are done.
            asyncio.get_running_loop().call_soon(self._not_spawned, who, str(error))
        else:
            if who == NEW:
                self._set(to_generation=self._who[who].generation)

    def _not_spawned(self, who: str, error: str) -> None:
        self._perform(self._machine.handle_ended(who, error))

    def _serve(self, incarnation: Incarnation) -> None:
        if incarnation is not self.runner.current:  # it is already when it bakes again
            self.runner.adopt(incarnation, incarnation.found)

    def _stop(self, who: str) -> None:
        incarnation = self._who.get(who)
        if incarnation is not None:
            grace = self.runner.machine.limits.grace
            incarnation.send(protocol.Stop(grace=grace))
            asyncio.get_running_loop().call_later(grace + 1.0, incarnation.kill)

    def _check(self, who: str) -> None:
        """Ask how it is; look at what can be seen from outside as well."""
        if self._machine.phase == upgrade.BAKE:
            trouble = self._trouble(self._who[who])
            if trouble:
                asyncio.get_running_loop().call_soon(self._troubled, trouble)
                return
        self._who[who].send(protocol.Check())

    def _troubled(self, reason: str) -> None:
        self._perform(self._machine.handle_trouble(reason))

    def _trouble(self, incarnation: Incarnation) -> str:
        stale = incarnation.stale(self.runner.machine.limits.heartbeat, time.monotonic() - self._phase_since)
        if stale is not None:
            return f"engine {stale} hangs"
        if incarnation.faults - self._faults_before >= FAULTS:
            return f"it dropped {incarnation.faults} channels"
        waiting = self._look(incarnation)
        if self._stuck >= STUCK and not self._leaves_messages:
            return f"{waiting} messages wait, and none is taken"
        return ""

    def _look(self, incarnation: Incarnation) -> int:
        """Messages that wait; `_stuck` counts the looks in a row at which they did and nothing had been done."""
        work = sum(view.work for view in incarnation.engine_views())
        waiting = self._waits.unanswered()
        self._stuck = self._stuck + 1 if waiting and work == self._work else 0
        self._work = work
        return waiting

    def _fall(self, reason: str) -> None:
        """Everybody was killed; the next process may come when they are gone, which the semaphores see to."""
        self.runner.follower = None
        self.runner.current = None
        self.runner.found = self.before
        self.runner.fall(reason)

    def _timer_fired(self, name: str) -> None:
        self._timers.pop(name, None)
        self._perform(self._machine.handle_timer(name))

    def _cancel_timer(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    # -- the report -------------------------------------------------------------------------------------------

    def _enter(self, phase: str, reason: str) -> None:
        now = time.monotonic()
        if phase == upgrade.BLACKOUT:
            self._set(brownout_seconds=now - self._phase_since)
            if OLD in self._who:
                self._look(self._who[OLD])
                # So did the old version: there are engines that wait for a client of another service.
                self._leaves_messages = self._stuck > 0
            self._stuck, self._work = 0, -1
        if phase == upgrade.BAKE:
            self._keep_gap()
            self._waits.clear()
            self._faults_before = self._who[NEW].faults
            faults.reach("kernel.bake")
        self._phase_since = now
        shown = {upgrade.RETURN_BROWNOUT: "brownout", upgrade.RETURN: "blackout"}.get(phase, phase)
        self._set(phase=shown, reason=reason)
        self._emit("upgrade.phase", phase=shown, reason=reason)

    def _keep_gap(self) -> None:
        self._set(client_gap_ns=max(self.view.client_gap_ns, self._waits.read() or -1))

    def _finish(self, outcome: str, reason: str) -> None:
        if self.finished.done():
            return
        if outcome == upgrade.COMMITTED:
            faults.reach("kernel.commit")
        for name in list(self._timers):
            self._cancel_timer(name)
        if self.runner.follower is self:
            self.runner.follower = None
        if self.view.phase != upgrade.BAKE:
            self._keep_gap()
        self._set(phase="done", outcome=outcome, reason=reason, finished=time.time())
        self._emit("upgrade.done", outcome=outcome, reason=reason)
        self.finished.set_result(None)
        self._done(self)
        self.runner.want_standby()

    def _note(self, message: protocol.Progress) -> None:
        self._note_engine(
            message.engine, stage=message.stage, done=message.done, total=message.total, rounds=message.round
        )
        now = time.monotonic()
        if now - self._told >= PROGRESS_EVERY:
            self._told = now
            self._emit(
                "upgrade.progress",
                engine=message.engine,
                stage=message.stage,
                done=message.done,
                total=message.total,
                round=message.round,
            )

    def _note_engine(self, engine: str, **changes: Any) -> None:
        if engine in self._engines:
            self._engines[engine] = msgspec.structs.replace(self._engines[engine], **changes)
            self._set(engines=list(self._engines.values()))

    def _set(self, **changes: Any) -> None:
        self.view = msgspec.structs.replace(self.view, **changes)

    def _emit(self, kind: str, **data: Any) -> None:
        self.runner.emit(kind, {"id": self.view.id, **data})

    def _name(self, incarnation: Incarnation) -> str | None:
        return next((who for who, each in self._who.items() if each is incarnation), None)
