"""Finds modules by their manifests; no code of a module is imported. A broken one never hides the others."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from snap.dataplane.errors import ManifestError

from . import manifest
from .manifest import Manifest

GROUP: Final = "snap.modules"
"""The entry-point group, and the package whose directory holds the shipped modules."""

PATH_VARIABLE: Final = "SNAP_MODULE_PATH"
SYSTEM: Final = Path("/usr/lib/snap-kernel/modules")


@dataclass(frozen=True, slots=True)
class Found:
    """A module: `path` is its directory, `source` says where we looked (shipped, path, system, entry point)."""

    manifest: Manifest
    path: Path
    source: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something at `path` that is no usable module, or one that an earlier one of its name hides."""

    path: Path
    source: str
    message: str
    hint: str = ""


@dataclass(slots=True)
class Discovery:
    found: dict[str, Found] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def discover(extra_paths: Iterable[str | os.PathLike[str]] = ()) -> Discovery:
    """All modules: shipped, `SNAP_MODULE_PATH` and `extra_paths`, system, entry points. The first of a name wins."""
    result = Discovery()
    for directory in _shipped():
        _scan(result, directory, "shipped")
    named = [part for part in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if part]
    for given in [*named, *extra_paths]:
        _scan(result, Path(given).absolute(), "path")
    if SYSTEM.is_dir():
        _scan(result, SYSTEM, "system")
    for directory, entry in _entry_points(result):
        _add(result, directory, f"entry point {entry}")
    return result


def _shipped() -> list[Path]:
    spec = importlib.util.find_spec(GROUP)
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


def _scan(result: Discovery, directory: Path, source: str) -> None:
    try:
        children = sorted(child for child in directory.iterdir() if os.path.lexists(child / manifest.FILE))
    except OSError as error:
        message = f"{directory}: {error.strerror}"
        result.problems.append(Problem(directory, source, message, "name a directory of module directories"))
        return
    for child in children:
        _add(result, child, source)


def _add(result: Discovery, directory: Path, source: str) -> None:
    try:
        loaded = manifest.load(directory / manifest.FILE)
    except ManifestError as error:
        result.problems.append(Problem(directory, source, error.message, error.hint))
        return
    first = result.found.get(loaded.name)
    if first is None:
        result.found[loaded.name] = Found(loaded, directory, source)
    elif first.path.resolve() != directory.resolve():
        message = f"{directory}: module {loaded.name!r} is hidden by the one in {first.path} ({first.source})"
        result.problems.append(Problem(directory, source, message, "rename one of them"))


def _entry_points(result: Discovery) -> Iterator[tuple[Path, str]]:
    """The directory of the package that each entry point names, in the order of their names."""
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        top, *inner = entry.module.split(".")
        # Only the top-level package is asked for: finding an inner one would import those around it.
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError, AttributeError):
            spec = None
        places = list(spec.submodule_search_locations or ()) if spec else []
        if places:
            yield Path(places[0], *inner), entry.name
        else:
            message = f"entry point {entry.name!r} names {entry.value!r}, which is no installed package"
            result.problems.append(Problem(Path(entry.value), f"entry point {entry.name}", message))
