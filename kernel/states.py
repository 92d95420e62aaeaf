"""What outlives a module's processes: for each engine a state segment, and the semaphore whose holder runs the engine.

The kernel keeps both, hands them to every process of the module, and never looks into a state beyond its header. State
is kept across crashes, restarts and upgrades, and dropped when an operator stops the module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from snap.dataplane import _native
from snap.dataplane.errors import StateError
from snap.ipc.manifest import Manifest
from snap.ipc.protocol import StateSchema
from snap.ipc.segment import Segment

from .semaphores import Semaphores
from .store import Store

FATAL_ADOPTIONS: Final = 2
"""Adoptions without one whole poll in between after which a state is poison."""

FATAL_DEATHS: Final = 3
"""Deaths by an engine's own doing at the same commit: of who brought it there, and of two who adopted it."""

KEPT_POISONED: Final = 4
_PAGE: Final = 4096


@dataclass
class Seat:
    """One engine: its semaphore, its segment, and the schema that is in there (None: blank)."""

    semaphore: int
    size: int
    segment: Segment
    number: int
    schema: StateSchema | None = None
    deaths: int = 0
    died_at: int = -1
    pending: dict[int, tuple[Segment, int, StateSchema]] = field(default_factory=dict)
    """Segments that generations fill from this one, with their numbers."""


class States:
    """The seats of module `name`. `emit(kind, data)` reports; poisoned state is copied to the directory `poisoned`."""

    def __init__(
        self,
        name: str,
        store: Store,
        semaphores: Semaphores,
        poisoned: Path,
        emit: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self._name, self._store, self._semaphores = name, store, semaphores
        self._poisoned, self._emit = poisoned, emit
        self.seats: dict[str, Seat] = {}
        self._number = 0

    @property
    def bytes(self) -> int:
        """Memory that the segments take."""
        return sum(os.fstat(seat.segment.fd).st_blocks * 512 for seat in self.seats.values())

    def open(self, manifest: Manifest) -> None:
        """Have a seat for each engine. Raises ResourceError."""
        for engine, table in manifest.engines.items():
            if engine not in self.seats:
                size = -(-(table.state_bytes + _native.State.MIN_BYTES) // _PAGE) * _PAGE
                segment, number = self._blank(engine, size)
                self.seats[engine] = Seat(self._semaphores.make(), size, segment, number)

    def assign(self, engine: str, generation: int, schema: StateSchema) -> list[int]:
        """Descriptors for `Prepare`: the state, or a blank one and the state to migrate from. Raises ResourceError."""
        seat = self.seats[engine]
        if seat.schema is None or seat.schema.version == schema.version:
            seat.schema = seat.schema or schema
            return [seat.segment.fd]
        self.drop_pending(generation, engine)
        segment, number = self._blank(engine, seat.size)
        seat.pending[generation] = segment, number, schema
        return [segment.fd, seat.segment.fd]

    def migrates(self, generation: int) -> bool:
        """Whether `generation` fills segments of its own."""
        return any(generation in seat.pending for seat in self.seats.values())

    def took(self, engine: str, generation: int) -> None:
        """`generation` runs the engine: what it filled is the state now."""
        seat = self.seats[engine]
        if generation in seat.pending:
            self._discard(engine, seat.segment, seat.number)
            seat.segment, seat.number, seat.schema = seat.pending.pop(generation)

    def drop_pending(self, generation: int, engine: str | None = None) -> None:
        """A generation has ended that filled segments and did not take over."""
        for name, seat in self.seats.items():
            if engine in (None, name) and generation in seat.pending:
                segment, number, schema = seat.pending.pop(generation)
                if _phase(segment) == "serving":  # it took over, and could not say so any more
                    self._discard(name, seat.segment, seat.number)
                    seat.segment, seat.number, seat.schema = segment, number, schema
                else:
                    self._discard(name, segment, number)
                    _stop_tracking(seat.segment)

    def blame(self, engine: str) -> None:
        """The engine ended its process. What it did not commit comes again: the same end at the same commit is no
        accident."""
        seat = self.seats[engine]
        epoch = int(_header(seat.segment).get("epoch", 0))
        seat.deaths = seat.deaths + 1 if epoch == seat.died_at else 1
        seat.died_at = epoch

    def poisoned(self) -> list[str]:
        """Engines whose state has killed everybody who adopted it lately."""
        return [
            engine
            for engine, seat in self.seats.items()
            if seat.deaths >= FATAL_DEATHS or _adoptions(seat.segment) >= FATAL_ADOPTIONS
        ]

    def replace(self, engine: str, reason: str) -> None:
        """Keep the state aside for inspection, and go on with a blank one. Raises ResourceError."""
        seat = self.seats[engine]
        kept = self._keep_aside(engine, seat)
        segment, number = self._blank(engine, seat.size)
        self._discard(engine, seat.segment, seat.number)
        seat.segment, seat.number, seat.schema = segment, number, None
        seat.deaths, seat.died_at = 0, -1
        self._emit("state.poisoned", {"engine": engine, "reason": reason, "kept": kept})

    def close(self) -> None:
        """Give everything back: the state is gone."""
        for engine, seat in self.seats.items():
            for segment, number, _ in seat.pending.values():
                self._discard(engine, segment, number)
            self._discard(engine, seat.segment, seat.number)
            self._semaphores.remove(seat.semaphore)
        self.seats.clear()

    # -- outliving the kernel ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        return {
            "number": self._number,
            "seats": {
                engine: {
                    "semaphore": seat.semaphore,
                    "size": seat.size,
                    "number": seat.number,
                    "schema": _schema_record(seat.schema),
                    "pending": [
                        [generation, number, _schema_record(schema)]
                        for generation, (_, number, schema) in seat.pending.items()
                    ],
                }
                for engine, seat in self.seats.items()
            },
        }

    def restore(self, record: dict[str, Any], take: Callable[[str], Sequence[int]]) -> None:
        """`take(name)` gives the descriptors that were stored. Raises KeyError for one that is not there."""
        self._number = record["number"]
        for engine, each in record["seats"].items():

            def segment(number: int, engine: str = engine, size: int = each["size"]) -> Segment:
                return Segment.adopt(take(self._label(engine, number))[0], size)

            pending = {}
            for generation, number, schema in each["pending"]:
                restored = _schema_restored(schema)
                assert restored is not None
                pending[generation] = segment(number), number, restored
            self.seats[engine] = Seat(
                each["semaphore"],
                each["size"],
                segment(each["number"]),
                each["number"],
                _schema_restored(each["schema"]),
                pending=pending,
            )

    # -- inside -----------------------------------------------------------------------------------------------

    def _label(self, engine: str, number: int) -> str:
        return f"state.{self._name}.{engine}.{number}"

    def _blank(self, engine: str, size: int) -> tuple[Segment, int]:
        segment = Segment.create(size)
        self._number += 1
        self._store.put(self._label(engine, self._number), [segment.fd])
        return segment, self._number

    def _discard(self, engine: str, segment: Segment, number: int) -> None:
        self._store.remove(self._label(engine, number))
        segment.close()

    def _keep_aside(self, engine: str, seat: Seat) -> str:
        """The file with the copy; empty when it could not be made: the module goes on all the same."""
        path = self._poisoned / f"{self._name}.{engine}.{seat.number}.state"
        try:
            self._poisoned.mkdir(mode=0o700, exist_ok=True)
            _copy_sparse(seat.segment.fd, path)
            kept = sorted(self._poisoned.glob(f"{self._name}.{engine}.*.state"), key=os.path.getmtime)
            for old in kept[:-KEPT_POISONED]:
                old.unlink()
        except OSError as error:
            return f"not kept: {error.strerror}"
        return str(path)


def _header(segment: Segment) -> dict[str, Any]:
    """Empty when nobody formatted it, or it is not readable: its adopter says so."""
    try:
        return {} if _native.State.blank(segment.fd) else _read(segment)
    except StateError:
        return {}


def _read(segment: Segment) -> dict[str, Any]:
    state = _native.State(segment.fd, False)
    try:
        return state.header
    finally:
        state.close()


def _adoptions(segment: Segment) -> int:
    return int(_header(segment).get("adoptions", 0))


def _phase(segment: Segment) -> str:
    return str(_header(segment).get("phase", "blank"))


def _stop_tracking(segment: Segment) -> None:
    """Nobody looks any more at what the engine marks."""
    with suppress(StateError):
        state = _native.State(segment.fd)
        state.track(False)
        state.close()


def _copy_sparse(source: int, path: Path) -> None:
    """Copy what is not a hole. Raises OSError."""
    size = os.fstat(source).st_size
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(target, size)
        at = 0
        while at < size:
            try:
                at = os.lseek(source, at, os.SEEK_DATA)
            except OSError:
                return  # nothing but a hole from here on
            end = os.lseek(source, at, os.SEEK_HOLE)
            while at < end:
                at += os.pwrite(target, os.pread(source, min(end - at, 1 << 20), at), at)
    finally:
        os.close(target)


def _schema_record(schema: StateSchema | None) -> list[Any] | None:
    return None if schema is None else [schema.name, schema.version, schema.oldest]


def _schema_restored(record: list[Any] | None) -> StateSchema | None:
    if record is None:
        return None
    return StateSchema(name=record[0], version=record[1], oldest=record[2])
