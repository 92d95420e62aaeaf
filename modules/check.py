"""`python -m snap.modules.check PATH`: is this directory a module that a kernel could run? Problems as JSON on
stdout.

    {"path": "/...", "module": "echo", "problems": [{"stage": "import", "message": "...", "hint": "..."}]}

`stage` is manifest, import, engine, or state (its schema against the manifest). Exits 0 without problems, 1
with some, 2 when called without a path. The module's code runs in a process of its own with a time limit, so
that nothing it does reaches the caller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Final

import msgspec

from snap.dataplane import _native
from snap.dataplane._native import State
from snap.dataplane.errors import ManifestError, SnapError, StateFullError
from snap.ipc import manifest as manifests
from snap.ipc.manifest import Manifest

from .engine import Engine
from .loading import load_class, load_package
from .migration import check_methods
from .module import Module
from .preparing import EngineCode, check_version

IMPORT_LIMIT: Final = 20.0
"""Seconds that importing a module may take."""

_PROBE: Final = "--probe"
_MARK: Final = "snap.modules.check:"


class Problem(msgspec.Struct, frozen=True):
    stage: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, stage: str, error: BaseException) -> Problem:
        if isinstance(error, SnapError):
            return cls(stage, error.message, error.hint)
        return cls(stage, _where(error))


class Report(msgspec.Struct, frozen=True):
    path: str
    module: str | None
    problems: list[Problem]


def check(path: Path, limit: float = IMPORT_LIMIT) -> Report:
    """Check the module in directory `path`; its import may take `limit` seconds."""
    path = path.absolute()
    try:
        manifest = manifests.load(path)
    except ManifestError as error:
        return Report(str(path), None, [Problem.of("manifest", error)])
    return Report(str(path), manifest.name, [*_look(manifest), *_probe_apart(path, limit)])


def _look(manifest: Manifest) -> list[Problem]:
    """What is wrong with a manifest that is well-formed."""
    known = _native.engines()
    unknown = [
        Problem(
            "engine",
            f"engines.{name}.class: no Rust engine {engine.native!r}",
            f"there are: {', '.join(known)}",
        )
        for name, engine in manifest.engines.items()
        if engine.native is not None and engine.native not in known
    ]
    own = [
        Problem("manifest", f"requires.services: {service!r} is provided by this module itself", "remove it")
        for service in manifest.requires.services
        if service in manifest.provides
    ]
    return unknown + own


def _probe_apart(path: Path, limit: float) -> list[Problem]:
    command = [sys.executable, "-m", "snap.modules.check", _PROBE, str(path)]
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return [Problem("import", f"importing did not end within {limit:g} s", "do no work at import time")]
    # The module may print too: only the marked line is the probe's.
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            return msgspec.json.decode(line.removeprefix(_MARK), type=list[Problem])
    said = done.stderr.strip().rpartition("\n")[2]
    return [
        Problem(
            "import", f"the process ended with status {done.returncode} during import; {said}".rstrip("; ")
        )
    ]


def probe(path: Path) -> list[Problem]:
    """Import the module here and look at what its manifest names."""
    manifest = manifests.load(path)
    try:
        package = load_package(path, manifest.name)
    except Exception as error:
        return [Problem.of("import", error)]
    targets: list[tuple[str, type[Engine] | type[Module]]] = [
        (table.class_, Engine) for table in manifest.engines.values() if table.native is None
    ]
    if manifest.module.entry is not None:
        targets.append((manifest.module.entry, Module))
    problems = []
    found_classes: dict[str, type] = {}
    for target, base in targets:
        try:
            found = load_class(package, target, base)
        except ManifestError as error:
            problems.append(Problem.of("engine", error))
        except Exception as error:
            problems.append(Problem.of("import", error))
        else:
            if issubclass(found, Engine) and found.poll is Engine.poll:
                problems.append(
                    Problem("engine", f"{target!r} has no poll", "define poll(self, budget) -> int")
                )
            found_classes[target] = found
    return problems + _look_at_states(manifest, found_classes)


def _look_at_states(manifest: Manifest, classes: dict[str, type]) -> list[Problem]:
    """Does what the engines keep agree with the manifest, and fit?"""
    problems = []
    for name, table in manifest.engines.items():
        code = EngineCode(manifest.name, name, table, classes.get(table.class_))
        if table.native is not None or code.engine is None:
            continue
        try:
            check_version(manifest, {name: code})
            check_methods(code.engine)
            _try_format(code)
        except SnapError as error:
            problems.append(Problem.of("state", error))
    return problems


def _try_format(code: EngineCode) -> None:
    own = code.state_schema()
    fd = os.memfd_create("snap-check", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, code.table.state_bytes + State.MIN_BYTES)
        State.format(fd, code.name, own.name, own.version, own.oldest, code.specs())
    except StateFullError as error:
        raise StateFullError(
            f"engines.{code.name}.state is {code.table.state}: {error.message}",
            "raise it, or lower a capacity",
        ) from None
    finally:
        os.close(fd)


def _where(error: BaseException) -> str:
    """The error in one line, with the innermost place in the module's code."""
    frames = traceback.extract_tb(error.__traceback__)
    line = traceback.format_exception_only(error)[-1].strip()
    return f"{frames[-1].filename}:{frames[-1].lineno}: {line}" if frames else line


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == _PROBE:
        problems = probe(Path(arguments[1]))
        print(f"\n{_MARK}{msgspec.json.encode(problems).decode()}", flush=True)
        return 0
    if len(arguments) != 1:
        print("usage: python -m snap.modules.check PATH", file=sys.stderr)
        return 2
    report = check(Path(arguments[0]))
    print(json.dumps(msgspec.to_builtins(report), indent=2))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
