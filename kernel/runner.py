"""One module as the kernel runs it: carries out what its `Supervision` decides, and tells it what happened.

A module has one current process, and now and then another: a successor or predecessor (see `upgrading`), or a
hot standby. Each gets ready in the same way and then waits for the ownership of each engine; who has it serves.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from snap.dataplane.errors import ProtocolError, SnapError, StateDamagedError
from snap.ipc import faults, paths, protocol, seqpacket
from snap.ipc.discovery import Found

from . import supervision
from .events import Events
from .gatepage import GatePage
from .heritage import Heritage
from .hooks import Follower, Hooks
from .incarnation import Ears, Incarnation
from .kept import Kept
from .operations import Operations
from .processes import Log
from .record import Outbox
from .semaphores import Semaphores
from .states import States
from .store import Store
from .supervision import Action, Supervision

_CULPRIT: Final = re.compile(r"\bengine ([a-z][a-z0-9_-]*)(?::| hung)")
"""Who ended a process, in what is said of its end."""

STANDBY_PAUSE: Final = 1.0
"""Seconds before a standby that ended is replaced."""


class Runner:
    """All that belongs to one module: machine, operations, processes, gate, states, log."""

    def __init__(
        self,
        found: Found,
        host: Sequence[str],
        machine: Supervision,
        events: Events,
        directory: Path,
        hooks: Hooks,
        store: Store,
        semaphores: Semaphores,
        outbox: Outbox | None = None,
    ) -> None:
        """`directory` is the kernel's runtime directory. Raises ResourceError."""
        self.outbox = outbox or Outbox()
        self.found: Found = found
        self.origin: Found = found
        self.name = found.manifest.name
        self.machine = machine
        self.operations = Operations(self.name, self._settled_in)
        self.log = Log(directory / paths.LOGS / f"{self.name}.log")
        self.current: Incarnation | None = None
        self.standby: Incarnation | None = None
        self.follower: Follower | None = None
        self.alive: set[Incarnation] = set()
        self.kept = Kept(self.name, store)
        self.gate = GatePage()
        self.states = States(self.name, store, semaphores, directory / "poisoned", self.emit)
        self._host, self._events, self._hooks, self._store = host, events, hooks, store
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._seen = (machine.state, machine.since)
        self.since = time.time()
        self._stale = 0
        self.ears = Ears(self._on_message, self._on_bad, self._on_link_closed, self._on_exit)
        self.heritage = Heritage(self, hooks.held)

    # -- facts and requests -----------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.machine.state == supervision.READY

    @property
    def incarnations(self) -> list[Incarnation]:
        """All processes that are to know the module's channels."""
        others = [] if self.follower is None else self.follower.incarnations
        found = [each for each in (self.current, self.standby, *others) if each is not None]
        return list(dict.fromkeys(found))

    def start(self) -> None:
        self.perform(self.machine.handle_start(self._now()))

    def stop(self, cause: str = "stopped by an operator") -> None:
        for other in self.alive - {self.current}:
            other.kill()
        self.perform(self.machine.handle_stop(self._now(), cause))

    def restart(self) -> None:
        self.dismiss_standby()
        self.perform(self.machine.handle_restart(self._now()))

    def require(self, missing: frozenset[str]) -> None:
        self.perform(self.machine.handle_requirements(self._now(), missing))

    def misbehaved(self, incarnation: Incarnation, reason: str) -> None:
        """Kill it; what it still has to say is not heard."""
        incarnation.error = incarnation.error or reason
        if incarnation is self.current:
            self.perform(self.machine.handle_misbehaved(self._now(), reason))
        incarnation.kill()
        if incarnation.link is not None:
            incarnation.link.close(reason)

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """To every process of the module that may serve."""
        for incarnation in self.incarnations:
            if incarnation.schemas is not None:
                incarnation.send(message, fds)

    def watch_heartbeats(self) -> None:
        """Called periodically. Two stale looks in a row are a hang: one could be our own pause."""
        current, limit = self.current, self.machine.limits.heartbeat
        stale = None
        if current is not None and self.ready:
            stale = current.stale(limit, self._now() - self.machine.since, resting=self.follower is not None)
        self._stale = self._stale + 1 if stale else 0
        if current is not None and self._stale >= 2:
            self._stale = 0
            self.misbehaved(current, f"engine {stale} hung: no heartbeat for {limit:g} s")

    def resume(self, machine: dict[str, Any], since: float) -> None:
        """Go on with what supervision recorded in an earlier kernel; `since`: the time of day it entered its state."""
        actions = self.machine.restore(machine)
        self.since, self._seen = since, (self.machine.state, self.machine.since)
        self.perform(actions)

    def serving(self) -> None:
        """The current process has all engines."""
        self.perform(self.machine.handle_serving(self._now()))

    def close(self) -> None:
        """Give back what outlives the processes, which must have ended."""
        for timer in self._timers.values():
            timer.cancel()
        self.heritage.close()
        self.log.close()
        self.states.close()
        self.kept.close()
        self._store.remove(f"gate.{self.name}")
        self.gate.close()

    # -- processes --------------------------------------------------------------------------------------------

    def spawn(self, found: Found, generation: int | None = None) -> Incarnation:
        """A new process, which gets ready and waits. Raises SnapError, OSError, with nothing left behind."""
        self.states.open(found.manifest)
        # Not earlier: a new kernel must not put its own page in the place of the one that it is about to take over.
        self._store.put(f"gate.{self.name}", [self.gate.segment.fd])
        number = self.machine.next_generation() if generation is None else generation
        incarnation = Incarnation(number, found, self.log)
        incarnation.start(self._host, self.ears, self.outbox)
        self._store.put(self.label(incarnation), incarnation.fds)
        kept = self.kept.fds
        order = protocol.Configure(
            name=self.name,
            generation=number,
            manifest=found.manifest.to_builtins(),
            path=str(found.path),
            kept=list(kept),
        )
        fds = [self.gate.reader, incarnation.page.fd, *kept.values()]
        incarnation.send(order, fds)
        # As long as somebody serves, getting ready has time.
        incarnation.step_back(self.current is not None)
        self.alive.add(incarnation)
        self._hooks.spawned(self, incarnation)
        faults.reach("kernel.spawned")
        return incarnation

    def adopt(self, incarnation: Incarnation, found: Found) -> None:
        """`incarnation` is the module's process from now on."""
        self.current, self.found = incarnation, found
        self.perform(
            self.machine.handle_replaced(
                self._now(), incarnation.generation, incarnation.pid, incarnation.serves
            )
        )

    def fall(self, reason: str) -> None:
        """All other processes are being ended; start again from the state that is there."""
        self.perform(self.machine.handle_exited(self._now(), reason, clean=False))

    def dismiss_standby(self) -> None:
        self._cancel_timer("standby")
        standby, self.standby = self.standby, None
        if standby is not None:
            standby.kill()

    def want_standby(self) -> None:
        """Have one, where the manifest asks for it and nothing else is under way."""
        wanted = self.found.manifest.module.standby
        if not wanted or self.follower is not None or not self.ready:
            return
        if self.current is None or self.current.error:  # what is to end soon needs no standby
            return
        # Nor while another one ends: it would wait for the same engines. "standby" is the pause after the last one.
        if self.alive - {self.current} or "standby" in self._timers:
            return
        try:
            self.standby = self.spawn(self.found)
        except (SnapError, OSError) as error:
            self.emit("standby.failed", {"error": str(error)})
            self._set_timer("standby", STANDBY_PAUSE)

    def emit(self, kind: str, data: dict[str, Any]) -> None:
        self._events.emit(kind, f"module:{self.name}", **data)

    # -- what the machine decided -----------------------------------------------------------------------------

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case supervision.Spawn(generation):
                    self._spawn(generation)
                case supervision.Terminate(grace):
                    if self.current is not None:
                        self.current.send(protocol.Stop(grace=grace))
                case supervision.Kill():
                    if self.current is not None:
                        self.current.kill()
                case supervision.SetTimer(name, delay):
                    self._set_timer(name, delay)
                case supervision.CancelTimer(name):
                    self._cancel_timer(name)
                case supervision.Release():
                    self.current = None
                    self._discard_poison()
                case supervision.FailChannels(reason):
                    self._end(reason)
                case supervision.Emit(kind, data):
                    self.emit(kind, data)
        now_in = (self.machine.state, self.machine.since)
        if now_in != self._seen:
            self._seen, self.since = now_in, time.time()
            self._hooks.changed(self)
            self.operations.settle()
            self.want_standby()

    def _set_timer(self, name: str, delay: float) -> None:
        self._cancel_timer(name)
        loop = asyncio.get_running_loop()
        self._timers[name] = loop.call_later(delay, self._timer_fired, name)

    def _cancel_timer(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _timer_fired(self, name: str) -> None:
        self._timers.pop(name, None)
        if name == "standby":
            self.want_standby()
        else:
            self.perform(self.machine.handle_timer(self._now(), name))

    def _spawn(self, generation: int) -> None:
        try:
            self.current = self.spawn(self.found, generation)
        except (SnapError, OSError) as error:
            self.perform(self.machine.handle_spawn_failed(self._now(), str(error)))
        else:
            assert self.current.pid is not None
            self.perform(self.machine.handle_spawned(self._now(), self.current.pid))

    def _end(self, reason: str) -> None:
        """Nobody will serve the channels: end them, and drop the state."""
        self.dismiss_standby()
        self._hooks.ended(self, reason)
        self.states.close()
        self.kept.close()

    def _discard_poison(self) -> None:
        for engine in self.states.poisoned():
            self._replace_state(engine, "it killed everybody who adopted it lately")

    def _replace_state(self, engine: str, reason: str) -> None:
        try:
            self.states.replace(engine, reason)
        except SnapError as error:
            self.emit("state.stuck", {"engine": engine, "error": str(error)})
            return
        self._hooks.lost(self, engine, reason)

    # -- what a process says ----------------------------------------------------------------------------------

    def _on_message(self, incarnation: Incarnation, message: Any, fds: list[int], size: int) -> None:
        try:
            self._hear(incarnation, message, fds, size)
        finally:
            seqpacket.close_all(fds)

    def _hear(self, incarnation: Incarnation, message: Any, fds: list[int], size: int) -> None:
        mine = incarnation is self.current
        match message:
            case protocol.Started():
                self.emit("module.started", {"pid": incarnation.pid, "generation": incarnation.generation})
            case protocol.Loaded(schemas=schemas):
                self._loaded(incarnation, schemas)
            case protocol.Progress(round=turn):
                if turn:
                    # It catches up with the one that serves: at their pace it would never.
                    incarnation.step_back(False)
                if mine:
                    self.perform(self.machine.handle_progress(self._now()))
            case protocol.Prepared(engine=engine):
                incarnation.prepared.add(engine)
                if incarnation.ready:
                    incarnation.step_back(False)
                if incarnation is self.standby and incarnation.ready:
                    self.emit("standby.ready", {"pid": incarnation.pid})
            case protocol.Took(engine=engine):
                incarnation.first_polls[engine] = message.first_poll_ns
                self.took(incarnation, engine)
                if self.follower is None:  # else it is of the upgrade
                    what = {"engine": engine, "generation": incarnation.generation, "undone": message.undone}
                    self.emit("engine.took", {**what, "first_poll_ns": message.first_poll_ns})
            case protocol.Yielded(engine=engine):
                incarnation.running.discard(engine)
                incarnation.prepared.add(engine)
            case protocol.Serving():
                if mine:
                    self.serving()
            case protocol.Refused():
                self._refused(incarnation, message)
            case protocol.Broken(stage=stage, error=text):
                incarnation.error = f"broke in {stage[:32]}: {text[:2000]}"
                if mine:
                    self.perform(self.machine.handle_broken(self._now(), stage[:32], text[:2000]))
            case protocol.Keep(name=name):
                self.kept.put(name, fds)
            case protocol.Health():
                pass
            case protocol.Holding():
                self.heritage.heard(incarnation, message)
            case protocol.Attached() | protocol.Dropped() | protocol.Failure():
                incarnation.faults += isinstance(message, protocol.Dropped)
                self._hooks.news(self, incarnation, message)
            case _ if size > protocol.MAX_REQUEST:
                self._on_bad(
                    incarnation, ProtocolError(f"request of {size} bytes exceeds {protocol.MAX_REQUEST}")
                )
            case _:
                self._hooks.request(self, incarnation, message)
        if self.follower is not None:
            self.follower.on_message(incarnation, message)

    def _loaded(self, incarnation: Incarnation, schemas: dict[str, protocol.StateSchema]) -> None:
        if set(schemas) != set(incarnation.engines) or incarnation.schemas is not None:
            self._on_bad(incarnation, ProtocolError("Loaded is not about the engines of its manifest, once"))
            return
        incarnation.schemas = schemas
        if incarnation is self.current:
            self.perform(self.machine.handle_progress(self._now()))
        self._hooks.attach(self, incarnation)
        for engine in schemas:
            self.prepare(incarnation, engine)

    def prepare(self, incarnation: Incarnation, engine: str) -> None:
        assert incarnation.schemas is not None
        try:
            fds = self.states.assign(engine, incarnation.generation, incarnation.schemas[engine])
        except SnapError as error:
            self.misbehaved(incarnation, f"no state for engine {engine}: {error}")
            return
        incarnation.send(protocol.Prepare(engine=engine, semaphore=self.states.seats[engine].semaphore), fds)

    def took(self, incarnation: Incarnation, engine: str) -> None:
        if engine not in incarnation.engines or engine not in self.states.seats:
            self._on_bad(incarnation, ProtocolError(f"it took {engine!r}, which is no engine of its"))
            return
        for other in self.incarnations:
            other.running.discard(engine)
        incarnation.running.add(engine)
        incarnation.prepared.discard(engine)
        self.states.took(engine, incarnation.generation)

    def _refused(self, incarnation: Incarnation, refused: protocol.Refused) -> None:
        engine, text = refused.engine, refused.message
        said = f"engine {engine} refused its state: {text}"
        self.emit("state.refused", {"engine": engine, "code": refused.code, "error": text})
        if incarnation is not self.current:
            incarnation.error = said
            if incarnation is self.standby:
                self.dismiss_standby()
            elif refused.held:
                incarnation.kill()
        elif self.follower is not None or not self._is_damage(incarnation, engine, refused.code):
            # In an upgrade the next one may never meet the damage; whoever does is ended, too.
            self.misbehaved(incarnation, said)
        else:
            # Who waits for it has looked at it before it was damaged.
            self.dismiss_standby()
            self._replace_state(engine, text)
            if refused.held:
                self.misbehaved(incarnation, said)
            else:
                self.prepare(incarnation, engine)

    def _is_damage(self, incarnation: Incarnation, engine: str, code: str) -> bool:
        """Whatever the words: code that refuses a state which it should be able to read has found damage."""
        seat = self.states.seats.get(engine)
        if seat is None or incarnation.schemas is None:
            return False
        return code == StateDamagedError.code or seat.schema == incarnation.schemas[engine]

    def _on_bad(self, incarnation: Incarnation, error: ProtocolError) -> None:
        self._hooks.bad(self, incarnation, error.message)
        self.misbehaved(incarnation, f"garbage on its link: {error.message}")

    def _on_link_closed(self, incarnation: Incarnation, reason: str) -> None:
        incarnation.link = None
        if incarnation is self.current:
            self.perform(self.machine.handle_link_lost(self._now(), reason))

    def _on_exit(self, incarnation: Incarnation, how: str, clean: bool) -> None:
        self.alive.discard(incarnation)
        reason = f"{incarnation.error} ({how})" if incarnation.error else how
        self._store.remove(self.label(incarnation))
        incarnation.release()
        self._hooks.died(self, incarnation, reason)
        self.states.drop_pending(incarnation.generation)
        if self.follower is not None and self.follower.on_exit(incarnation, reason):
            if incarnation is self.current:
                self.current = None
        elif incarnation is self.current:
            self._current_exited(how, reason, clean)
        elif incarnation is self.standby:
            self.standby = None
            self.emit("standby.exited", {"how": reason})
            self._set_timer("standby", STANDBY_PAUSE)
        self.operations.settle()
        self.want_standby()

    def _current_exited(self, how: str, reason: str, clean: bool) -> None:
        assert self.current is not None
        culprit = _CULPRIT.search(self.current.error)
        if culprit is not None and culprit[1] in self.states.seats:
            self.states.blame(culprit[1])
        if self.ready and not (clean and self.machine.policy != "always"):
            self._hooks.fell(self, self.current, reason)
        standby = self.standby
        over = self.machine.state == supervision.STOPPING or self.machine.loops(self._now())
        if standby is None or not standby.ready or over or self.states.poisoned():
            self.dismiss_standby()
            self.current = None
            self.perform(self.machine.handle_exited(self._now(), how, clean))
            return
        self.standby = None
        self.perform(self.machine.handle_failed_over(self._now(), how))
        self.adopt(standby, self.found)

    def label(self, incarnation: Incarnation) -> str:
        return f"process.{self.name}.{incarnation.generation}"

    def _settled_in(self) -> tuple[str, str]:
        """State and cause; stopped is a module when the last of its processes has ended."""
        state = self.machine.state
        if state == supervision.STOPPED and self.alive:
            state = supervision.STOPPING
        return state, self.machine.cause

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
