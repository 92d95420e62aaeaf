"""What `module.toml` says, typed: the module's own view of it (the kernel checks the graph of all of them)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from snap.dataplane import _native
from snap.dataplane.errors import ManifestError

FILE: Final = "module.toml"
NATIVE: Final = "native:"
_WAITS: Final = {"spin": _native.SPIN, "adaptive": _native.ADAPTIVE, "blocking": _native.BLOCK}

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Count = Annotated[int, msgspec.Meta(ge=1, le=65536)]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file: a key that nobody reads is an error, for it is most often a misspelled one."""


class About(Table, frozen=True):
    name: Name
    version: str
    description: str = ""
    state_version: Annotated[int, msgspec.Meta(ge=1)] = 1
    entry: str | None = None


class Provided(Table, frozen=True):
    engine: Name


class Required(Table, frozen=True):
    services: list[Name] = []


class EngineTable(Table, frozen=True):
    """`class_`: `native:NAME` for a Rust engine, else FILE:CLASS in the package; `budget` is messages per poll."""

    class_: str = msgspec.field(name="class")
    wait: Literal["spin", "adaptive", "blocking"] = "adaptive"
    budget: Count = 64

    @property
    def native(self) -> str | None:
        """The Rust engine's name, or None for a Python engine."""
        return self.class_.removeprefix(NATIVE) if self.class_.startswith(NATIVE) else None

    @property
    def wait_mode(self) -> int:
        return _WAITS[self.wait]


class Restart(Table, frozen=True):
    policy: Literal["always", "on-failure", "never"] = "always"


class Resources(Table, frozen=True):
    memory: str | None = None
    descriptors: Annotated[int, msgspec.Meta(ge=16)] | None = None


class Manifest(Table, frozen=True):
    module: About
    engines: dict[Name, EngineTable]
    provides: dict[Name, Provided] = {}
    requires: Required = Required()
    restart: Restart = Restart()
    resources: Resources = Resources()

    @classmethod
    def parse(cls, data: dict[str, Any], source: str) -> Manifest:
        """Raises ManifestError that names `source`, the key and what is wrong with it."""
        try:
            manifest = msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise ManifestError(
                f"{source}: {error}", "see docs/modules.md for the keys of a manifest"
            ) from error
        for service, provided in manifest.provides.items():
            if provided.engine not in manifest.engines:
                raise ManifestError(
                    f"{source}: provides.{service}.engine names {provided.engine!r}, which is no engine",
                    f"add a table [engines.{provided.engine}]",
                )
        for name, engine in manifest.engines.items():
            known = _native.engines()
            if engine.native is not None and engine.native not in known:
                raise ManifestError(
                    f"{source}: engines.{name}.class: no Rust engine {engine.native!r}",
                    f"there are: {', '.join(known)}",
                )
            if engine.native is None:
                split_target(engine.class_, f"{source}: engines.{name}.class")
        if manifest.module.entry is not None:
            split_target(manifest.module.entry, f"{source}: module.entry")
        return manifest

    @classmethod
    def read(cls, package: Path) -> Manifest:
        """Read PACKAGE/module.toml. Raises ManifestError."""
        path = package / FILE
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ManifestError(
                f"{path}: {error.strerror}", f"a module's directory holds a {FILE}"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ManifestError(f"{path}: {error}") from error
        manifest = cls.parse(data, str(path))
        if manifest.module.name != package.resolve().name:
            raise ManifestError(
                f"{path}: module.name is {manifest.module.name!r}, but its directory is {package.resolve().name!r}",
                "give both the same name",
            )
        return manifest


def split_target(target: str, source: str = "target") -> tuple[str, str]:
    """FILE:CLASS as a pair. Raises ManifestError, naming `source`."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", target):
        raise ManifestError(
            f"{source}: {target!r} is not of the form FILE:CLASS", 'for instance "engine:Echo"'
        )
    file, _, name = target.partition(":")
    return file, name
