"""What an engine keeps in its state: `Schema`, and the objects that it is made of.

    class Tally(Engine):
        schema = Schema(
            version=2,
            oldest=1,
            totals=Table(key="S16", row={"count": "u8", "last": "f8"}, capacity=1 << 20),
            history=Array({"t": "f8"}, 1000),
            sessions=Slab({"since": "f8"}, 4096),
        )

Types are NumPy's, in the notation of `numpy.dtype`; fields are packed. Every object describes itself in the state
segment, so that later code can read what this code wrote without carrying old schemas along.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from snap.dataplane.errors import SchemaError, StateDamagedError, UsageError

if TYPE_CHECKING:
    from snap.dataplane._native import ObjectSpec

Type = str | Mapping[str, str]
DType = np.dtype[Any]
Rows = npt.NDArray[Any]
_KINDS: Final = "biufSUV?"


class Table:
    """At most `capacity` rows under keys; a key is a number, bytes (`S16`: up to 16), or fields."""

    kind: Final = "table"

    def __init__(self, key: Type, row: Type, capacity: int) -> None:
        self.key, self.row, self.count = packed(key), packed(row), capacity


class Slab:
    """At most `count` items under numbers that are given out and given back."""

    kind: Final = "slab"

    def __init__(self, item: Type, count: int) -> None:
        self.key, self.row, self.count = None, packed(item), count


class Array:
    """`count` items in one piece, zero at first."""

    kind: Final = "array"

    def __init__(self, item: Type, count: int) -> None:
        self.key, self.row, self.count = None, packed(item), count


Object = Table | Slab | Array


class Schema:
    """The objects of an engine's state, by name. `version` counts their forms; code of this version exchanges state
    with code of every version from `oldest` on, both ways. Raises UsageError."""

    def __init__(self, version: int = 1, oldest: int | None = None, **objects: Object) -> None:
        self.version = version
        self.oldest = version if oldest is None else oldest
        self.objects = objects
        if not 1 <= self.oldest <= version:
            raise UsageError(
                f"a schema of version {version} cannot exchange state with version {self.oldest}"
            )
        for name in objects:
            if name.startswith("_") or keyword.iskeyword(name):
                raise UsageError(f"{name!r} cannot name an object of a state", "it becomes an attribute")

    def specs(self) -> list[ObjectSpec]:
        """The objects as `State.format` wants them."""
        return [
            (
                one.kind,
                name,
                0 if one.key is None else one.key.itemsize,
                one.row.itemsize,
                one.count,
                _describe(one),
            )
            for name, one in self.objects.items()
        ]

    def check_same(self, header: Mapping[str, Any]) -> None:
        """Raises SchemaError unless the state with this `header` has exactly these objects: what changes without a
        new version was written by code that lies about it."""
        found = {spec["name"]: spec for spec in header["objects"]}
        for kind, name, key, item, count, fields in self.specs():
            spec = found.pop(name, None)
            if spec is None or [spec[part] for part in ("kind", "key", "item", "count", "fields")] != [
                kind, key, item, count, fields,
            ]:  # fmt: skip
                raise SchemaError(
                    f"the state is of version {self.version}, as this code is, but its {name!r} is another one",
                    "raise `version` in the schema (and state_version in module.toml) with every change of it",
                )
        if found:
            raise SchemaError(
                f"the state is of version {self.version}, as this code is, but has {', '.join(found)} besides",
                "raise `version` in the schema (and state_version in module.toml) with every change of it",
            )


def check_exchange(version: int, oldest: int, found: int, found_oldest: int) -> None:
    """Raises SchemaError unless code of `version` and `oldest` can take state over that was written by code of
    `found` and `found_oldest`: whichever is newer says how far back it reaches."""
    if found < oldest:
        raise SchemaError(
            f"the state is of version {found}, this code reads from {oldest} on",
            "upgrade by a version in between",
        )
    if version < found_oldest:
        raise SchemaError(
            f"the state is of version {found}, which can go back to {found_oldest}, this code is of {version}",
            "roll back by a version in between",
        )


def packed(given: Type) -> DType:
    """The NumPy type of a row or key, little-endian and without padding. Raises UsageError."""
    try:
        fields = given if isinstance(given, str) else list(given.items())
        found = np.dtype(fields).newbyteorder("<")
    except (TypeError, ValueError) as error:
        raise UsageError(f"{given!r} is no NumPy type: {error}", 'for instance {"count": "u8"}') from None
    if found.itemsize == 0 or not all(_plain(found[name]) for name in found.names or ()):
        raise UsageError(f"{given!r} has fields of no size or of no fixed form", "use numbers and bytes")
    if found.names is None and not _plain(found):
        raise UsageError(f"{given!r} is of no fixed form", "use numbers and bytes")
    return found


def described(fields: str, key: int, item: int) -> tuple[DType | None, DType]:
    """Types of key and row from the description of an object in a state segment, where anybody may have written it.

    Raises StateDamagedError unless it is well-formed and of the sizes that the segment says.
    """
    try:
        about = msgspec.json.decode(fields, type=_Description)
        key_type = None if about.key is None else _read(about.key)
        row_type = _read(about.row)
    except (msgspec.MsgspecError, TypeError, ValueError, SyntaxError, UsageError) as error:
        raise StateDamagedError(f"an object of the state is described by {fields[:200]!r}: {error}") from None
    if row_type.itemsize != item or (0 if key_type is None else key_type.itemsize) != key:
        raise StateDamagedError(f"the description {fields[:200]!r} does not fit {key} and {item} bytes")
    return key_type, row_type


class _Description(msgspec.Struct, forbid_unknown_fields=True):
    row: str | list[tuple[str, str, list[int]]]
    key: str | list[tuple[str, str, list[int]]] | None = None


def _describe(one: Object) -> str:
    about = {"row": _write(one.row)} | ({} if one.key is None else {"key": _write(one.key)})
    return json.dumps(about, separators=(",", ":"))


def _write(kind: DType) -> Any:
    if kind.names is None:
        return kind.str
    return [(name, kind[name].base.str, list(kind[name].shape)) for name in kind.names]


def _read(about: str | list[tuple[str, str, list[int]]]) -> DType:
    if isinstance(about, str):
        return packed(about)
    found = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in about])
    if not all(_plain(found[name]) for name in found.names or ()):
        raise ValueError("a field of no fixed form")
    return found


def _plain(kind: DType) -> bool:
    return kind.base.names is None and kind.base.kind in _KINDS and kind.itemsize > 0


def octets(rows: Rows) -> memoryview:
    """The bytes of an array in one piece, in place."""
    return rows.reshape(-1).view(np.uint8).data
