"""`Seat`: one engine's place in a module's process, from its preparation to its end. The main thread's."""

from __future__ import annotations

import gc
import os
import selectors
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from snap.dataplane import _native
from snap.dataplane.errors import (
    NotRunningError,
    ProtocolError,
    ResourceError,
    SchemaError,
    SnapError,
    UsageError,
)
from snap.ipc import faults, protocol, seqpacket
from snap.ipc.protocol import (
    Attach,
    Attached,
    Broken,
    Dropped,
    Failure,
    Prepare,
    Refused,
    Serving,
    Took,
    Yielded,
)

from .engine import Engine
from .migration import Migration
from .preparing import EngineCode, Prepared, prepare, reporter
from .serving import ServerChannel
from .worker import PythonWorker, Runner

if TYPE_CHECKING:
    from .host import Host

_WAITS: Final = {"spin": _native.SPIN, "adaptive": _native.ADAPTIVE, "blocking": _native.BLOCK}
_NICE: Final = 10
_STOP: Final = 1.0
_ERROR: Final = 2000


@dataclass
class _Attached:
    """A channel for this engine. Its descriptors are kept until the engine runs: a new preparation needs them."""

    order: Attach
    fds: list[int] = field(default_factory=list)
    channel: ServerChannel | None = None


class Seat:
    """`stage` is loading, prepared, running or ended."""

    def __init__(self, host: Host, code: EngineCode, index: int, fds: list[int]) -> None:
        """`fds`: what the module has for a native engine."""
        self.stage = "loading"
        self.semaphore = -1
        self._host, self._code, self._index, self._fds = host, code, index, fds
        self._worker: Runner | None = None
        self._migration: Migration | None = None
        self._turn = 0
        self._channels: dict[int, _Attached] = {}

    @property
    def name(self) -> str:
        return self._code.name

    def orders(self) -> list[Attach]:
        """How the channels that are here came."""
        return [attached.order for attached in self._channels.values()]

    # -- preparing ------------------------------------------------------------------------------------------

    def prepare(self, order: Prepare, fds: list[int]) -> None:
        """Begin to make the engine ready; `fds` become its. Raises ProtocolError for the wrong number of them."""
        if self.stage == "running" or not 1 <= len(fds) <= 2:
            raise ProtocolError(
                f"Prepare of engine {self.name!r}, which is {self.stage}, with {len(fds)} descriptors"
            )
        self._turn += 1
        self.stage, self.semaphore = "loading", order.semaphore
        threading.Thread(
            target=self._prepare,
            args=(self._turn, self._give_up_worker(), fds[0], fds[1] if len(fds) > 1 else None),
            name=f"prepare {self.name}",
            daemon=True,
        ).start()
        fds.clear()

    def _prepare(self, turn: int, before: Runner | None, state_fd: int, source_fd: int | None) -> None:
        """On its own thread, which leaves the processor to whoever serves."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        with self._refusing(turn):
            try:
                if before is not None:
                    before.stop(_STOP)
                faults.reach("module.prepare")
                prepared = prepare(self._code, state_fd, source_fd, reporter(self.name, self._host.link.send))
            finally:
                seqpacket.close_all([fd for fd in (state_fd, source_fd) if fd is not None])
            # What lives until now lives on: nothing of it is looked at again while the engine polls.
            gc.collect()
            gc.freeze()
            self._host.post(lambda: self._prepared(turn, prepared))

    def _prepared(self, turn: int, prepared: Prepared) -> None:
        """Here, for a thread is as nice as who starts it: whoever catches up with the one that serves must be fast."""
        if prepared.migration is None:
            self._take_seat(turn, prepared)
        else:
            threading.Thread(
                target=self._converge, args=(turn, prepared), name=f"converge {self.name}", daemon=True
            ).start()

    def _converge(self, turn: int, prepared: Prepared) -> None:
        assert prepared.migration is not None
        with self._refusing(turn):
            prepared.migration.converge()
            self._host.post(lambda: self._take_seat(turn, prepared))

    @contextmanager
    def _refusing(self, turn: int) -> Iterator[None]:
        """What is raised inside is why the state is refused."""
        try:
            yield
        except SnapError as error:
            code, said = error.code, str(error)
        except Exception as error:
            # Of the author's migration, most likely.
            code, said = SchemaError.code, f"{type(error).__name__}: {error}"
        else:
            return
        refused = Refused(engine=self.name, code=code, message=said[:_ERROR])
        self._host.post(lambda: self._refuse(turn, refused))

    def _refuse(self, turn: int, refused: Refused) -> None:
        if turn == self._turn:
            self.stage = "ended"
            self._host.link.send(refused)

    def _take_seat(self, turn: int, prepared: Prepared) -> None:
        """From here on the engine waits for the ownership."""
        if turn != self._turn:
            return
        try:
            worker = self._worker = self._start(
                prepared, [self._endpoint(each) for each in self._channels.values()]
            )
        except SnapError as error:
            self._refuse(turn, Refused(engine=self.name, code=error.code, message=str(error)[:_ERROR]))
            return
        self._host.selector.register(worker.fileno(), selectors.EVENT_READ, self._serve_news)
        self.stage = "prepared"
        migration = prepared.migration
        self._host.link.send(
            protocol.Prepared(engine=self.name)
            if migration is None
            else protocol.Prepared(
                engine=self.name, migrated=migration.migrated, rounds=migration.rounds, left=migration.left
            )
        )
        faults.reach("module.prepared")

    def _endpoint(self, attached: _Attached) -> tuple[int, ServerChannel, int]:
        channel, attached.channel = attached.channel, None
        channel = channel or server_channel(attached.order, attached.fds, self._host.gate_fd)
        return attached.order.channel, channel, channel.line

    def _start(self, prepared: Prepared, channels: list[tuple[int, ServerChannel, int]]) -> Runner:
        host, table, migration = self._host, self._code.table, prepared.migration
        self._migration = migration
        place = (prepared.state, self.semaphore, host.order.generation)
        if table.native is not None:
            return _native.Worker(
                self.name,
                table.native,
                *place,
                host.stats_fd,
                self._index,
                table.budget,
                _WAITS[table.wait],
                None if migration is None else migration.source,
                None if migration is None else migration.finish,
                channels,
                self._fds,
            )
        assert isinstance(self._code.engine, Engine)
        stats = _native.StatsPage(host.stats_fd, True)
        return PythonWorker(
            self.name,
            self._code.engine,
            *place,
            stats,
            self._index,
            table.budget,
            _WAITS[table.wait],
            migration,
            channels,
        )

    def _give_up_worker(self) -> Runner | None:
        worker, self._worker = self._worker, None
        if worker is not None:
            self._host.selector.unregister(worker.fileno())
        return worker

    # -- channels -------------------------------------------------------------------------------------------

    def attach(self, order: Attach, fds: list[int]) -> None:
        """Take a channel in, and answer."""
        link = self._host.link
        try:
            channel = server_channel(order, fds, self._host.gate_fd)
            attached = _Attached(order)
            if self.stage != "running":
                attached.fds = [os.dup(fd) for fd in fds]
            if self._worker is None:
                attached.channel = channel
            else:
                self._worker.attach(order.channel, channel, channel.line)
        except SnapError as error:
            link.send(Failure(seq=order.seq, code=error.code, message=error.message, hint=error.hint))
        except ValueError as error:
            link.send(Failure(seq=order.seq, code=UsageError.code, message=str(error)))
        except OSError as error:
            link.send(Failure(seq=order.seq, code=ResourceError.code, message=f"out of descriptors: {error}"))
        else:
            self._channels[order.channel] = attached
            link.send(Attached(seq=order.seq, channel=order.channel))

    def detach(self, channel: int) -> None:
        """Unknown ones are another engine's, or were dropped while the order was under way."""
        attached = self._channels.pop(channel, None)
        if attached is None:
            return
        seqpacket.close_all(attached.fds)
        if attached.channel is not None:
            attached.channel.close()
        if self._worker is not None:
            self._worker.detach(channel)

    # -- running --------------------------------------------------------------------------------------------

    def hand_over(self, retire: bool) -> None:
        if self._code.table.native is not None:
            faults.reach("module.yield")
        if self._worker is not None:
            self._worker.hand_over(retire)

    def stop(self, timeout: float, last: bool) -> None:
        """On a thread that may wait. `last`: nobody serves after this, and the clients are told."""
        if self._worker is not None:
            self._worker.stop(timeout, last and self.stage == "running")

    def ask(self, request: bytes) -> bytes:
        """From any thread: see `Module.request`."""
        worker = self._worker
        if not isinstance(worker, _native.Worker):
            raise NotRunningError(f"no native engine {self.name!r} runs here", "another generation has it")
        return worker.control(request)

    def _serve_news(self) -> None:
        worker = self._worker
        for kind, number, data in [] if worker is None else worker.take_news():
            if kind == "fault":
                self._dropped(number, data)
            elif kind == "took":
                self._took(number, data)
            elif kind == "yielded":
                self._yielded(number)
            elif kind == "refused":
                self._give_up_worker()
                refused = Refused(engine=self.name, code=data[0], message=data[1][:_ERROR], held=bool(number))
                self._refuse(self._turn, refused)
            elif kind == "said":
                self._host.said(self.name, data)
            elif kind == "ended":
                self._ended(data)

    def _dropped(self, channel: int, reason: str) -> None:
        attached = self._channels.pop(channel, None)
        if attached is not None:
            seqpacket.close_all(attached.fds)
            self._host.link.send(Dropped(channel=channel, reason=reason))

    def _took(self, first_poll_ns: int, how: dict[str, Any]) -> None:
        if self._code.table.native is not None:
            faults.reach("module.took")
        self.stage = "running"
        for attached in self._channels.values():
            seqpacket.close_all(attached.fds)
            attached.fds = []
        migration, self._migration = self._migration, None
        if migration is not None:
            how = how | {"converted": migration.converted}
        self._host.link.send(Took(engine=self.name, first_poll_ns=first_poll_ns, **how))
        seats = self._host.seats
        if all(seat.stage == "running" for seat in seats.values()):
            self._host.link.send(Serving(engines=list(seats)))

    def _yielded(self, last_poll_ns: int) -> None:
        if self._code.table.native is not None:
            faults.reach("module.yielded")
        self.stage = "prepared"
        self._host.link.send(Yielded(engine=self.name, last_poll_ns=last_poll_ns))

    def _ended(self, said: str) -> None:
        """With a text it died: a Python engine leaves a traceback, a Rust engine its panic."""
        self._give_up_worker()
        if self.stage != "ended" and said:
            last = said.strip().rpartition("\n")[2]
            self._host.fail(
                Broken(stage="run", error=f"engine {self.name}: {last}", traceback=said[-16_384:])
            )
        self.stage = "ended"


def server_channel(order: Attach, fds: list[int], gate_fd: int) -> ServerChannel:
    """Map the engine's end of the channel that `order` describes; the descriptors stay the caller's.

    Raises ResourceError when there was no room for them, ProtocolError for another number than belongs to it, and what
    `Endpoint` raises.
    """
    if not fds:
        raise ResourceError(
            "the module is out of descriptors", "raise resources.descriptors in its module.toml"
        )
    wanted = 6 if order.arena_bytes else 5
    if len(fds) != wanted:
        raise ProtocolError(f"Attach came with {len(fds)} descriptors instead of {wanted}")
    ring, up, down, server_bell, client_bell, *arena = fds
    return ServerChannel.make(
        _native.SERVER,
        ring,
        up,
        down,
        order.slots,
        order.up_bytes,
        order.down_bytes,
        (server_bell, client_bell),
        order.generation,
        gate_fd,
        order.gate_index,
        arena=(arena[0], order.arena_bytes) if arena else (-1, 0),
        id=order.channel,
        service=order.service,
        badge=order.badge,
        rights=frozenset(order.rights),
        line=order.gate_index,
    )
