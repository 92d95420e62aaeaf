"""One module as the kernel runs it: carries out what its `Supervision` decides, and tells it what happened."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from snap.dataplane import _native
from snap.dataplane.errors import ProtocolError, ResourceError, SnapError
from snap.ipc import protocol, seqpacket
from snap.ipc.discovery import Found
from snap.ipc.protocol import EngineView, ModuleView
from snap.ipc.segment import Segment

from . import supervision
from .events import Events
from .link import Connection
from .operations import Operations
from .processes import LogPipe, Process
from .supervision import Action, Supervision

DESCRIPTORS: Final = 1024
_DECODER: Final[protocol.Decoder[Any]] = protocol.Decoder(protocol.FromModule)


@dataclass(frozen=True)
class Hooks:
    """What a runner tells the kernel. `spawned` and `died` frame the life of a process; `request` gets what a module
    asks as a principal, `news` what it reports of its channels; `changed` every change of state; `bad` what could
    not be decoded."""

    spawned: Callable[[Runner, int], None]
    request: Callable[[Runner, Any], None]
    news: Callable[[Runner, Any], None]
    died: Callable[[Runner, str], None]
    changed: Callable[[Runner], None]
    bad: Callable[[Runner, str], None]


class GatePage:
    """The gate page of one generation: lines are handed out and taken back; the module cannot write it."""

    def __init__(self) -> None:
        self.segment = Segment.create(_native.Gate.BYTES)
        try:
            self._gate = _native.Gate(self.segment.fd)
            self.segment.seal_future_write()
        except BaseException:
            self.segment.close()
            raise
        self._free = list(range(_native.Gate.LINES - 1, -1, -1))

    def take(self) -> int:
        """A free line. Raises ResourceError when the module serves as many channels as it can."""
        if not self._free:
            raise ResourceError(f"the module serves {_native.Gate.LINES} channels already", "close some")
        return self._free.pop()

    def open(self, line: int, generation: int) -> None:
        self._gate.open(line, generation)

    def give_back(self, line: int) -> None:
        self._gate.shut(line)
        self._free.append(line)

    def close(self) -> None:
        self._gate.close()
        self.segment.close()


class Runner:
    """All that belongs to one module: machine, operations, process, link, gate, statistics, log."""

    def __init__(
        self,
        found: Found,
        host: Sequence[str],
        machine: Supervision,
        events: Events,
        log: Path,
        hooks: Hooks,
    ) -> None:
        """Raises ResourceError."""
        self.found = found
        self.name = found.manifest.name
        self.machine = machine
        self.operations = Operations(self.name, lambda: (machine.state, machine.cause))
        self.gate: GatePage | None = None
        self.log = LogPipe(log)
        self._host, self._events, self._hooks = host, events, hooks
        self._process: Process | None = None
        self._link: Connection | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._seen = (machine.state, machine.since)
        self._since = time.time()
        self._stale = 0
        self._page = Segment.create(_native.StatsPage.BYTES)
        self._stats = _native.StatsPage(self._page.fd, False)

    # -- facts and requests -----------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.machine.state == supervision.READY

    def start(self) -> None:
        self._perform(self.machine.handle_start(self._now()))

    def stop(self, cause: str = "stopped by an operator") -> None:
        self._perform(self.machine.handle_stop(self._now(), cause))

    def restart(self) -> None:
        self._perform(self.machine.handle_restart(self._now()))

    def require(self, missing: frozenset[str]) -> None:
        self._perform(self.machine.handle_requirements(self._now(), missing))

    def misbehaved(self, reason: str) -> None:
        """Kill it; what it still has to say is not heard."""
        self._perform(self.machine.handle_misbehaved(self._now(), reason))
        if self._link is not None:
            self._link.close(reason)

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """To the module, if it has a link now."""
        if self._link is not None:
            self._link.send(message, fds)

    def watch_heartbeats(self) -> None:
        """Called periodically. Two stale looks in a row are a hang: one could be our own pause."""
        limit = self.machine.limits.heartbeat
        waited = self._now() - self.machine.since
        ages = {view.name: view.heartbeat_age_ns for view in self.engine_views()}
        stale = [name for name, age in ages.items() if (waited if age < 0 else age / 1e9) > limit]
        self._stale = self._stale + 1 if stale and self.ready else 0
        if self._stale >= 2:
            self._stale = 0
            self.misbehaved(f"engine {stale[0]} hung: no heartbeat for {limit:g} s")

    def close(self) -> None:
        """Give back what outlives the process, which must have ended."""
        for timer in self._timers.values():
            timer.cancel()
        self.log.close()
        self._stats.close()
        self._page.close()

    # -- views ------------------------------------------------------------------------------------------------

    def engine_views(self) -> list[EngineView]:
        now = time.monotonic_ns()
        views = []
        for index, name in enumerate(list(self.found.manifest.engines)[: _native.StatsPage.LINES]):
            record = self._stats.read(index)
            beat = record["heartbeat_ns"]
            views.append(
                EngineView(
                    name=name,
                    polls=record["polls"],
                    work=record["work"],
                    busy_ns=record["busy_ns"],
                    channels=record["channels"],
                    heartbeat_age_ns=max(0, now - beat) if beat and self.machine.live else -1,
                )
            )
        return views

    def view(self, log_lines: int = 10) -> ModuleView:
        machine, manifest = self.machine, self.found.manifest
        return ModuleView(
            name=self.name,
            version=manifest.module.version,
            state=machine.state,
            cause=machine.cause,
            pid=machine.pid,
            generation=machine.generation,
            restarts=machine.restarts,
            faults=machine.faults,
            since=self._since,
            path=str(self.found.path),
            provides=list(manifest.provides),
            requires=list(manifest.requires.services),
            engines=self.engine_views(),
            log_tail=list(self.log.tail)[-log_lines:] if log_lines else [],
            sandbox=self._sandbox(),
            memory_bytes=_resident(machine.pid),
        )

    def _sandbox(self) -> list[dict[str, str]]:
        """What confines the process, layer by layer."""
        resources = self.found.manifest.resources
        state = "applied" if self.machine.pid else "at start"
        layers = [
            {"layer": "process", "requested": "session of its own, inherits only its link", "state": state},
            {"layer": "descriptors", "requested": str(resources.descriptors or DESCRIPTORS), "state": state},
            {"layer": "core dumps", "requested": "none", "state": state},
        ]
        if resources.memory is not None:
            unavailable = "unavailable: this release does not use cgroups"
            layers.append({"layer": "memory", "requested": resources.memory, "state": unavailable})
        return layers

    # -- what the machine decided -----------------------------------------------------------------------------

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case supervision.Spawn():
                    self._spawn()
                case supervision.Terminate(grace):
                    self.send(protocol.Stop(grace=grace))
                case supervision.Kill():
                    if self._process is not None:
                        self._process.kill()
                case supervision.SetTimer(name, delay):
                    self._set_timer(name, delay)
                case supervision.CancelTimer(name):
                    self._cancel_timer(name)
                case supervision.FailChannels(reason):
                    self._release(reason)
                case supervision.Emit(kind, data):
                    self._events.emit(kind, f"module:{self.name}", **data)
        now_in = (self.machine.state, self.machine.since)
        if now_in != self._seen:
            self._seen, self._since = now_in, time.time()
            self._hooks.changed(self)
            self.operations.settle()

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
        self._perform(self.machine.handle_timer(self._now(), name))

    def _spawn(self) -> None:
        try:
            pid = self._new_process()
        except (SnapError, OSError) as error:
            self._perform(self.machine.handle_spawn_failed(self._now(), str(error)))
        else:
            self._perform(self.machine.handle_spawned(self._now(), pid))

    def _new_process(self) -> int:
        """Raises SnapError and OSError, with nothing left behind."""
        # A new generation must not be judged by the heartbeats of the last one.
        os.pwrite(self._page.fd, bytes(_native.StatsPage.BYTES), 0)
        self.gate = GatePage()
        ours, theirs = seqpacket.pair()
        try:
            write = self.log.open()
            try:
                limit = self.found.manifest.resources.descriptors or DESCRIPTORS
                exited = partial(self._exited, self.machine.generation)
                self._process = Process(self._host, theirs.fileno(), write, limit, exited)
            finally:
                theirs.close()
                seqpacket.close_all([write])
            link = self._link = Connection(ours, self._on_message, self._on_bad, self._on_link_closed)
        except BaseException:
            ours.close()
            theirs.close()
            self._release_gate()
            if self._process is not None:
                self._process.kill()
                self._process = None
            raise
        order = protocol.Configure(
            name=self.name,
            generation=self.machine.generation,
            manifest=self.found.manifest.to_builtins(),
            path=str(self.found.path),
        )
        link.send(order, [self.gate.segment.fd, self._page.fd])
        self._hooks.spawned(self, self._process.pid)
        return self._process.pid

    def _release(self, reason: str) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close("its process ended")
        self._process = None
        self.log.drain()
        self._hooks.died(self, reason)
        self._release_gate()

    def _release_gate(self) -> None:
        if self.gate is not None:
            self.gate.close()
            self.gate = None

    def _exited(self, generation: int, how: str, clean: bool) -> None:
        if generation != self.machine.generation:
            return  # one whose start failed half-way
        self._perform(self.machine.handle_exited(self._now(), how, clean))

    # -- what the module says ---------------------------------------------------------------------------------

    def _on_message(self, data: bytes, fds: list[int]) -> None:
        seqpacket.close_all(fds)  # nothing that a module says comes with descriptors
        try:
            message = _DECODER.decode(data)
        except ProtocolError as error:
            self._on_bad(error)
            return
        match message:
            case protocol.Started():
                self._events.emit("module.started", f"module:{self.name}", pid=self.machine.pid)
            case protocol.Serving():
                self._perform(self.machine.handle_serving(self._now()))
            case protocol.Broken(stage=stage, error=text):
                self._perform(self.machine.handle_broken(self._now(), stage[:32], text[:2000]))
            case protocol.Attached() | protocol.Dropped() | protocol.Failure():
                self._hooks.news(self, message)
            case _ if len(data) > protocol.MAX_REQUEST:
                self._on_bad(ProtocolError(f"request of {len(data)} bytes exceeds {protocol.MAX_REQUEST}"))
            case _:
                self._hooks.request(self, message)

    def _on_bad(self, error: ProtocolError) -> None:
        self._hooks.bad(self, error.message)
        self.misbehaved(f"garbage on its link: {error.message}")

    def _on_link_closed(self, reason: str) -> None:
        self._link = None
        self._perform(self.machine.handle_link_lost(self._now(), reason))

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _resident(pid: int | None) -> int | None:
    """Bytes of memory that the process `pid` has in RAM."""
    if pid is None:
        return None
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGESIZE")
