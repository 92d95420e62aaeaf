"""One process of a module, as the kernel knows it: process, link, statistics, and what it has said of its engines."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from snap.dataplane import _native
from snap.dataplane.errors import ProtocolError, SnapError
from snap.ipc import protocol, seqpacket
from snap.ipc.discovery import Found
from snap.ipc.protocol import EngineView, StateSchema
from snap.ipc.segment import Segment

from . import packages
from .link import Connection
from .processes import Log, LogPipe, Process
from .record import Outbox

DESCRIPTORS = 1024
BACKLOG = 2 * _native.Gate.LINES
"""A process that loads slowly is told of all channels before it reads any."""

_DECODER: protocol.Decoder[Any] = protocol.Decoder(protocol.FromModule)


@dataclass(frozen=True)
class Ears:
    """Who hears of an incarnation. `message(incarnation, message, fds, size)` owns the descriptors, `bad` and `closed`
    come from its link, `exit(incarnation, how, clean)` once when the process was reaped."""

    message: Callable[[Incarnation, Any, list[int], int], None]
    bad: Callable[[Incarnation, ProtocolError], None]
    closed: Callable[[Incarnation, str], None]
    exit: Callable[[Incarnation, str, bool], None]


class Incarnation:
    """Generation `generation` of a module, from the code in `found`."""

    def __init__(self, generation: int, found: Found, log: Log, page: Segment | None = None) -> None:
        """`page` is the statistics' of a process that an earlier kernel started."""
        self.generation = generation
        self.found = found
        self.schemas: dict[str, StateSchema] | None = None
        self.prepared: set[str] = set()
        self.running: set[str] = set()
        self.error = ""
        self.unsent: list[bytes] = []
        """Orders of an earlier kernel, encoded, which may or may not have left."""
        self.unprepared: set[str] = set()
        self.faults = 0
        self.first_polls: dict[str, int] = {}
        self.last_beats: dict[str, int] = {}
        """When engines polled first, and, of a process that has ended, showed last that they lived: CLOCK_MONOTONIC
        in ns."""
        self.log = LogPipe(log)
        self.page = page or Segment.create(_native.StatsPage.BYTES)
        self.stats = _native.StatsPage(self.page.fd, False)
        self.process: Process | None = None
        self.link: Connection | None = None

    def start(self, host: Sequence[str], ears: Ears, outbox: Outbox) -> None:
        """Raises SnapError and OSError, with nothing left behind."""
        ours, theirs = seqpacket.pair()
        try:
            write = self.log.open()
            try:
                limit = self.found.manifest.resources.descriptors or DESCRIPTORS
                self.process = Process.start(host, theirs.fileno(), write, limit, partial(ears.exit, self))
            finally:
                theirs.close()
                seqpacket.close_all([write])
        except BaseException:
            ours.close()
            theirs.close()
            self.release()
            raise
        self._connect(ours, ears, outbox)

    def adopt(self, fds: Sequence[int], pid: int, ears: Ears, outbox: Outbox) -> None:
        """Go on with a process of an earlier kernel: `fds` are link, pidfd and log."""
        link, pidfd, log = fds
        self.process = Process.adopt(pid, pidfd, partial(ears.exit, self))
        self.log.adopt(log)
        self._connect(socket.socket(fileno=link), ears, outbox)

    def _connect(self, sock: socket.socket, ears: Ears, outbox: Outbox) -> None:
        self.link = Connection(
            sock,
            partial(self._decode, ears),
            partial(ears.bad, self),
            partial(ears.closed, self),
            BACKLOG,
            outbox,
        )

    @property
    def fds(self) -> list[int]:
        """Of a process that was just started: link, pidfd, log, statistics."""
        assert self.link is not None
        assert self.process is not None
        return [self.link.fileno(), self.process.pidfd, self.log.fd, self.page.fd]

    def record(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "pid": self.pid,
            "found": packages.record(self.found),
            "schemas": None if self.schemas is None else msgspec.to_builtins(self.schemas),
            "prepared": sorted(self.prepared),
            "running": sorted(self.running),
            "error": self.error,
            "faults": self.faults,
            "unsent": [] if self.link is None else self.link.unsent,
        }

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    @property
    def engines(self) -> list[str]:
        return list(self.found.manifest.engines)

    @property
    def _shown(self) -> list[str]:
        """Engines that have a line on the statistics' page."""
        return self.engines[: _native.StatsPage.LINES]

    @property
    def ready(self) -> bool:
        """Every engine waits for its ownership, or runs."""
        return self.schemas is not None and self.prepared | self.running >= set(self.engines)

    @property
    def serves(self) -> bool:
        """Every engine runs here."""
        return self.running >= set(self.engines)

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        if self.link is not None:
            self.link.send(message, fds)

    def step_back(self, yes: bool) -> None:
        if self.process is not None:
            self.process.step_back(yes)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def release(self) -> None:
        """The process has ended: give back what belonged to it."""
        if self.link is not None:
            self.link.drain()
        link, self.link = self.link, None
        if link is not None:
            link.close("its process ended")
        self.process = None
        self.log.drain()
        self.last_beats = {
            name: self.stats.read(index)["heartbeat_ns"] for index, name in enumerate(self._shown)
        }
        self.stats.close()
        self.page.close()

    def stale(self, limit: float, waited: float, resting: bool = True) -> str | None:
        """The first engine that gave no sign of life for `limit` seconds; `waited`: how long one could have.
        `resting`: engines that do not run here may do so elsewhere."""
        for view in self.engine_views():
            if resting and view.name not in self.running:
                continue
            if (waited if view.heartbeat_age_ns < 0 else view.heartbeat_age_ns / 1e9) > limit:
                return view.name
        return None

    def engine_views(self) -> list[EngineView]:
        now = time.monotonic_ns()
        views = []
        for index, name in enumerate(self._shown):
            record = self.stats.read(index)
            beat = record["heartbeat_ns"]
            views.append(
                EngineView(
                    name=name,
                    polls=record["polls"],
                    work=record["work"],
                    busy_ns=record["busy_ns"],
                    channels=record["channels"],
                    heartbeat_age_ns=max(0, now - beat) if beat and self.process is not None else -1,
                )
            )
        return views

    def resident(self) -> int | None:
        """Bytes of memory that the process has in RAM."""
        if self.pid is None:
            return None
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return None
        return pages * 4096

    def _decode(self, ears: Ears, data: bytes, fds: list[int]) -> None:
        try:
            message = _DECODER.decode(data)
        except SnapError as error:
            seqpacket.close_all(fds)
            ears.bad(self, ProtocolError(error.message, error.hint))
        else:
            ears.message(self, message, fds, len(data))
