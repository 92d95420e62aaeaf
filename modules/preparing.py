"""Making an engine ready to run on a state segment: format it, check it, or fill it from one of another version.

All of it happens before the engine owns anything, on a thread of low priority, while another generation serves; but
what that changes meanwhile is caught up with as fast as it goes (`Migration.converge`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from snap.dataplane import _native
from snap.dataplane._native import State
from snap.dataplane.errors import ManifestError, SchemaError, StateDamagedError
from snap.ipc.manifest import EngineTable, Manifest
from snap.ipc.protocol import Progress, StateSchema

from .engine import Engine
from .migration import Convert, Migration, Step, converter
from .schema import Rows, Schema, check_exchange, octets

if TYPE_CHECKING:
    from snap.dataplane._native import ObjectSpec

_EVERY: Final = 0.1
"""Seconds between two reports of progress."""


@dataclass(frozen=True)
class EngineCode:
    """One engine of a module, of either language: `engine` is None for a Rust one (and may be a class where
    nothing is to be migrated)."""

    module: str
    name: str
    table: EngineTable
    engine: Engine | type[Engine] | None

    def state_schema(self) -> StateSchema:
        if self.table.native is not None:
            name, version, oldest, _ = _native.engine_schema(self.table.native)
            return StateSchema(name=name, version=version, oldest=oldest)
        schema = self._schema
        return StateSchema(name=f"{self.module}.{self.name}", version=schema.version, oldest=schema.oldest)

    def specs(self) -> list[ObjectSpec]:
        if self.table.native is not None:
            return _native.engine_schema(self.table.native)[3]
        return self._schema.specs()

    @property
    def _schema(self) -> Schema:
        return Schema() if self.engine is None or self.engine.schema is None else self.engine.schema

    def check_same(self, state: State) -> None:
        """Raises SchemaError unless `state` is exactly of this code's schema."""
        header, own = state.header, self.state_schema()
        if header["schema"] != own.name:
            raise SchemaError(f"the state is of {header['schema']!r}, this engine's is called {own.name!r}")
        if header["version"] != own.version:
            raise SchemaError(
                f"the state is of version {header['version']}, this code is of {own.version}",
                "it must be migrated",
            )
        if self.table.native is None:
            self._schema.check_same(header)

    def converter(self, source: State) -> Convert:
        """Raises SchemaError when this code cannot take `source` over."""
        header, own = source.header, self.state_schema()
        if header["schema"] != own.name:
            raise SchemaError(f"the state is of {header['schema']!r}, this engine's is called {own.name!r}")
        if self.table.native is None:
            return converter(self.engine, self._schema, header)
        check_exchange(own.version, own.oldest, header["version"], header["oldest"])
        sizes = {name: item for _, name, _, item, _, _ in self.specs()}
        native = self.table.native

        def convert(name: str, rows: Rows) -> Rows:
            made = np.zeros((len(rows), sizes[name]), np.uint8)
            _native.engine_convert(
                native, name, header["version"], own.version, octets(rows), octets(made), len(rows)
            )
            return made

        return convert


@dataclass
class Prepared:
    """An engine's state, mapped and checked. `migration`: what is left of filling it."""

    state: State
    migration: Migration | None = None


def check_version(manifest: Manifest, codes: dict[str, EngineCode]) -> None:
    """Raises ManifestError for a module that lies about its version: state_version counts its engines' schemas."""
    for name, code in codes.items():
        version = code.state_schema().version
        if code.specs() and version != manifest.module.state_version:
            raise ManifestError(
                f"module.state_version is {manifest.module.state_version}, but the state of engine {name!r} is of"
                f" version {version}",
                f"write state_version = {version} in module.toml",
            )


def prepare(code: EngineCode, state_fd: int, source_fd: int | None, step: Step) -> Prepared:
    """Make the segment `state_fd` one that `code` can run on, from `source_fd` when there is one.

    Raises StateDamagedError, SchemaError, StateFullError, and what the author's migration raises.
    """
    if source_fd is None:
        return Prepared(_adopt(code, state_fd, step))
    source = State(source_fd)
    convert = code.converter(source)
    verify(source, step)
    if not State.blank(state_fd):
        raise StateDamagedError("the migration that was to fill this state was cut short", "give a blank one")
    state = _format(code, state_fd, step)
    state.set_phase("building")
    migration = Migration(source, state, convert, step)
    migration.build()
    return Prepared(state, migration)


def _adopt(code: EngineCode, fd: int, step: Step) -> State:
    if State.blank(fd):
        return _format(code, fd, step)
    state = State(fd)
    if state.phase == "building":
        raise StateDamagedError("the migration that was to fill this state was cut short", "give a blank one")
    code.check_same(state)
    verify(state, step)
    return state


def _format(code: EngineCode, fd: int, step: Step) -> State:
    own = code.state_schema()
    step("format", 0, 1, 0)
    State.format(fd, code.name, own.name, own.version, own.oldest, code.specs())
    return State(fd)


def verify(state: State, step: Step = lambda *_: None) -> None:
    """Raises StateDamagedError when a check of `state` fails."""
    if state.phase == "poisoned":
        raise StateDamagedError("this state killed those who adopted it")
    step("verify", 0, 1, 0)
    wrong = state.verify()
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise StateDamagedError(f"the state fails its checks: {wrong[0]}{more}")


def reporter(engine: str, send: Callable[[Progress], object]) -> Step:
    """Sends progress now and then: at every change of stage or round, and as time passes."""
    last: tuple[str, int] = ("", 0)
    due = 0.0

    def step(stage: str, done: int, total: int, turn: int) -> None:
        nonlocal last, due
        now = time.monotonic()
        if (stage, turn) != last or now >= due:
            last, due = (stage, turn), now + _EVERY
            send(Progress(engine=engine, stage=stage, done=done, total=max(done, total), round=turn))

    return step
