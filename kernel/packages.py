"""The code of modules, kept: a rollback finds the old version though its author has overwritten the directory."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from snap.dataplane.errors import ManifestError, NotFoundError, ResourceError
from snap.ipc import manifest
from snap.ipc.discovery import Found

DIRECTORY: Final = "packages"
SHIPPED: Final = "shipped"
_LARGEST: Final = 256 << 20
_IGNORED: Final = ("__pycache__", ".git", ".pytest_cache", ".mypy_cache", ".ruff_cache")


def keep(found: Found, directory: Path) -> Found:
    """`found` as a copy under `directory`, named by its content. A shipped module stays where it is: it comes
    and goes with the installation. Raises ResourceError."""
    if found.source == SHIPPED:
        return found
    name = found.manifest.name
    try:
        place = directory / name / _digest(found.path) / name
        if not place.is_dir():
            _copy(found.path, place)
    except OSError as error:
        raise ResourceError(
            f"cannot keep a copy of {found.path}: {error.strerror or error}", f"make room in {directory}"
        ) from error
    return Found(found.manifest, place, found.source)


def load(path: Path, name: str) -> Found:
    """The module `name` in the directory `path`. Raises NotFoundError, ManifestError."""
    if not path.is_dir():
        raise NotFoundError(f"{path} is no directory", "give the directory that holds module.toml")
    loaded = manifest.load(path)
    if loaded.name != name:
        raise ManifestError(f"{path} holds module {loaded.name!r}, not {name!r}", "give another directory")
    return Found(loaded, path, "path")


def prune(directory: Path, name: str, needed: Iterable[Found]) -> None:
    """Remove the copies of module `name` under `directory` that nobody needs any more."""
    kept = {found.path.parent for found in needed}
    for place in (directory / name).glob("*"):
        if place not in kept:
            shutil.rmtree(place, ignore_errors=True)


def record(found: Found) -> list[Any]:
    """As plain data; `restored` reads it."""
    return [found.manifest.to_builtins(), str(found.path), found.source]


def restored(data: Sequence[Any]) -> Found:
    """Raises ManifestError."""
    return Found(manifest.from_builtins(data[0], f"{data[1]} (recorded)"), Path(data[1]), data[2])


def _files(path: Path) -> Iterator[Path]:
    """Regular files, in a fixed order."""
    for folder, names, files in os.walk(path):
        names[:] = sorted(name for name in names if name not in _IGNORED)
        yield from (Path(folder, file) for file in sorted(files) if Path(folder, file).is_file())


def _digest(path: Path) -> str:
    """Raises OSError, for too much as well: a path given by mistake is not read to its end."""
    digest = hashlib.blake2b(digest_size=12)
    total = 0
    for file in _files(path):
        data = file.read_bytes()
        total += len(data)
        if total > _LARGEST:
            raise OSError(f"it holds more than {_LARGEST >> 20} MiB")
        digest.update(f"{file.relative_to(path)}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _copy(source: Path, place: Path) -> None:
    """Under another name first: what bears the name is complete."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    half = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(source, half, ignore=shutil.ignore_patterns(*_IGNORED))
    half.rename(place)
