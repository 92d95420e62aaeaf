"""Copies of modules' code: what a rollback finds when its author has gone on."""

from __future__ import annotations

from pathlib import Path

import pytest

from snap.dataplane.errors import ManifestError, NotFoundError, ResourceError
from snap.ipc.discovery import Found
from snap.kernel import packages
from tests.kernel_rig import run, running, write_module

MANIFEST = """\
[module]
name = "{name}"
version = "{version}"
description = "For tests"

[provides.{name}]
engine = "main"

[engines.main]
class = "engine:Main"
"""


def module(directory: Path, version: str = "1", code: str = "", name: str = "thing") -> Found:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "module.toml").write_text(MANIFEST.format(name=name, version=version))
    (directory / "engine.py").write_text(code)
    return packages.load(directory, name)


def test_a_copy_is_what_was_there_and_is_made_once(tmp_path: Path) -> None:
    source, place = tmp_path / "thing", tmp_path / "packages"
    first = packages.keep(module(source, code="old"), place)
    (source / "__pycache__").mkdir()
    (source / "__pycache__" / "engine.pyc").write_bytes(b"x")
    assert packages.keep(module(source, code="old"), place) == first, "caches are not code"
    second = packages.keep(module(source, "2", code="new"), place)
    assert second.path != first.path
    assert (first.path / "engine.py").read_text() == "old"
    assert (second.path / "engine.py").read_text() == "new"
    assert packages.load(first.path, "thing").manifest.module.version == "1"
    assert not list(second.path.rglob("*.pyc"))


def test_a_shipped_module_stays_where_it_is(tmp_path: Path) -> None:
    found = module(tmp_path / "thing")
    shipped = Found(found.manifest, found.path, packages.SHIPPED)
    assert packages.keep(shipped, tmp_path / "packages") is shipped
    assert not (tmp_path / "packages").exists()


def test_what_nobody_needs_goes_and_other_modules_stay(tmp_path: Path) -> None:
    place = tmp_path / "packages"
    kept = [packages.keep(module(tmp_path / "thing", str(n), code=str(n)), place) for n in range(4)]
    other = packages.keep(module(tmp_path / "other", name="other"), place)
    packages.prune(place, "thing", kept[2:])
    assert [found.path.is_dir() for found in kept] == [False, False, True, True]
    assert other.path.is_dir()
    packages.prune(place, "unknown", [])


def test_what_cannot_be_a_module_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no directory"):
        packages.load(tmp_path / "nowhere", "thing")
    module(tmp_path / "thing")
    with pytest.raises(ManifestError, match="not 'other'"):
        packages.load(tmp_path / "thing", "other")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ResourceError, match="cannot keep a copy"):
        packages.keep(module(tmp_path / "thing"), file)


def test_a_record_is_read_back(tmp_path: Path) -> None:
    found = module(tmp_path / "thing")
    assert packages.restored(packages.record(found)) == found


def test_a_kernel_that_starts_afresh_removes_copies_that_nobody_can_go_back_to(tmp_path: Path) -> None:
    def copies() -> set[str]:
        return {place.name for place in (tmp_path / "run" / packages.DIRECTORY / "mine").iterdir()}

    async def test() -> None:
        async with running(tmp_path):
            return

    write_module(tmp_path / "modules", "mine")
    run(test())
    first = copies()
    (tmp_path / "modules" / "mine" / "engine.py").write_text("# another\n")
    run(test())
    assert len(first) == len(copies()) == 1
    assert not first & copies()
