"""Reading a small TOML file into msgspec structs, with errors that name file, key and reason."""

from __future__ import annotations

import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec

from snap.dataplane.errors import SnapError

MAX_BYTES: Final = 32 * 1024
"""A file of configuration is small; whoever made a larger one wants to hurt the reader."""

Size = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,12}(B|KiB|MiB|GiB)?\Z")]
"""An amount of memory as text, in bytes when it has no unit: "4096", "64KiB", "256MiB", "2GiB"."""

_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_AT_KEY: Final = re.compile(r"(?P<why>.*) - at `key` in `\$\.?(?P<path>.*)`", re.DOTALL)
_AT: Final = re.compile(r"(?P<why>.*) - at `\$\.?(?P<path>.*)`", re.DOTALL)

T = TypeVar("T")


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a file: a key that nobody reads is an error, for it is most often a misspelled one."""


def size_bytes(text: str) -> int:
    """The number of bytes of a `Size`."""
    number = text.rstrip("BKMGi")
    return int(number) * _UNITS[text[len(number) :] or "B"]


def read(path: Path, error: type[SnapError]) -> dict[str, Any]:
    """The tables of the file at `path`. Raises `error` when it cannot be read or is no TOML."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path}: not a regular file")
        if found.st_size > MAX_BYTES:
            raise error(f"{path}: {found.st_size} bytes, more than the {MAX_BYTES} that such a file may have")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise error(f"{path}: {failure.strerror}") from failure
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as failure:
        raise error(f"{path}: not valid TOML: {failure}") from failure


def convert(data: Mapping[str, Any], kind: type[T], source: str, error: type[SnapError], hint: str = "") -> T:
    """`data` as a `kind`. Raises `error`, naming `source`, the key and what is wrong with it."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as failure:
        path, why = _split(str(failure))
        key = _name_entry(data, kind, path, str(failure))
        raise error(f"{source}: {key}: {why}" if key else f"{source}: {why}", hint) from failure


def _split(message: str) -> tuple[str, str]:
    """A message of msgspec as (path of the value, reason)."""
    for pattern in (_AT_KEY, _AT):
        if match := pattern.fullmatch(message):
            path, why = match["path"], match["why"]
            return (path, why) if pattern is _AT else (f"{path}[...]", f"bad name: {why}")
    return "", message


def _name_entry(data: Mapping[str, Any], kind: type[Any], path: str, message: str) -> str:
    """`path` with the `[...]` that msgspec writes for "some entry of this mapping" replaced by the entry's key."""
    table, marker, rest = path.partition("[...]")
    entries = data.get(table)
    if not marker or not isinstance(entries, Mapping):
        return path
    for key, value in entries.items():
        try:
            msgspec.convert({**data, table: {key: value}}, kind)
        except msgspec.ValidationError as failure:
            if str(failure) == message:
                return f"{table}.{key}{rest}"
    return path
