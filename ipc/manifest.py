"""`module.toml`, typed: what a module provides, requires and runs. Read by the kernel, the SDK and snapctl alike."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from snap.dataplane.errors import ManifestError

from . import tomlfile
from .tomlfile import Size, Table

FILE: Final = "module.toml"
NATIVE: Final = "native:"

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}\Z")]

_TARGET: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_NATIVE_NAME: Final = re.compile(r"native:[a-z][a-z0-9_-]{0,31}")
_HINT: Final = "docs/modules.md lists the keys of a manifest"


class About(Table, frozen=True):
    """`state_version` counts the schemas of the engines' state; `entry` is FILE:CLASS of a `Module` subclass.
    `standby`: a second process of the module waits, everything loaded, to take over the moment that the first
    dies."""

    name: Name
    version: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    description: Annotated[str, msgspec.Meta(max_length=400)] = ""
    state_version: Annotated[int, msgspec.Meta(ge=1)] = 1
    entry: str | None = None
    standby: bool = False


class Provided(Table, frozen=True):
    engine: Name


class Required(Table, frozen=True):
    services: list[Name] = msgspec.field(default_factory=list)


class EngineTable(Table, frozen=True):
    """`class_` is `native:NAME` for a Rust engine, else FILE:CLASS in the package; `budget` is messages per poll.
    `state` is the most that its tables may take (memory is taken when it is written to)."""

    class_: str = msgspec.field(name="class")
    wait: Literal["spin", "adaptive", "blocking"] = "adaptive"
    budget: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 64
    state: Size = "16MiB"

    @property
    def state_bytes(self) -> int:
        return tomlfile.size_bytes(self.state)

    @property
    def native(self) -> str | None:
        """The Rust engine's name, or None for an engine in Python."""
        return self.class_.removeprefix(NATIVE) if self.class_.startswith(NATIVE) else None


class Restart(Table, frozen=True):
    policy: Literal["always", "on-failure", "never"] = "always"


class Resources(Table, frozen=True):
    """`memory` is a `Size`; `descriptors` becomes RLIMIT_NOFILE. None: no limit of the module's own."""

    memory: Size | None = None
    descriptors: Annotated[int, msgspec.Meta(ge=16, le=1 << 20)] | None = None

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else tomlfile.size_bytes(self.memory)


class Manifest(Table, frozen=True):
    """A checked manifest. `engines` and `provides` are keyed by the names of engines and of services."""

    module: About
    engines: Annotated[dict[Name, EngineTable], msgspec.Meta(min_length=1, max_length=64)]
    provides: Annotated[dict[Name, Provided], msgspec.Meta(max_length=64)] = msgspec.field(
        default_factory=dict
    )
    requires: Required = Required()
    restart: Restart = Restart()
    resources: Resources = Resources()

    @property
    def name(self) -> str:
        return self.module.name

    def to_builtins(self) -> dict[str, Any]:
        """The tables of the file as they would be parsed, defaults filled in: `from_builtins` reads them back."""
        builtins: dict[str, Any] = msgspec.to_builtins(self)
        return builtins


def from_builtins(data: Mapping[str, Any], source: str = FILE) -> Manifest:
    """Raises ManifestError that names `source`, the key and what is wrong with it."""
    manifest = tomlfile.convert(data, Manifest, source, ManifestError, _HINT)
    for service, provided in manifest.provides.items():
        if provided.engine not in manifest.engines:
            raise ManifestError(
                f"{source}: provides.{service}.engine: {provided.engine!r} is no engine of this module",
                f"add a table [engines.{provided.engine}]",
            )
    for name, engine in manifest.engines.items():
        if not (_NATIVE_NAME if engine.native is not None else _TARGET).fullmatch(engine.class_):
            raise ManifestError(
                f"{source}: engines.{name}.class: {engine.class_!r} is neither native:NAME nor FILE:CLASS",
                'for instance "native:echo" or "engine:Echo"',
            )
    entry = manifest.module.entry
    if entry is not None and not _TARGET.fullmatch(entry):
        raise ManifestError(
            f"{source}: module.entry: {entry!r} is not of the form FILE:CLASS", 'for instance "engine:Echo"'
        )
    services = manifest.requires.services
    if len(set(services)) != len(services):
        raise ManifestError(f"{source}: requires.services: names a service twice", "keep one of them")
    return manifest


def load(path: str | os.PathLike[str]) -> Manifest:
    """Read a `module.toml`, or the one in the directory `path`. Raises ManifestError naming file, key and reason."""
    file = Path(path)
    if file.is_dir():
        file = file / FILE
    manifest = from_builtins(tomlfile.read(file, ManifestError), str(file))
    directory = file.resolve().parent.name
    if manifest.name != directory:
        raise ManifestError(
            f"{file}: module.name: {manifest.name!r}, but its directory is named {directory!r}",
            "give both the same name",
        )
    return manifest
