"""What is built, and what is asked of the machine before it is."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernel", "ipc", "dataplane", "modules", "cli")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with what the script itself needs, and this Python; no linker and no cargo."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "dirname", "sed", "sort", "head"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    (folder / "python3").symlink_to(sys.executable)
    return folder


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def require(tools: Path, **variables: str) -> tuple[int, str, str]:
    environment = {"PATH": os.fspath(tools), **variables}
    done = subprocess.run(
        [tools / "sh", ROOT / "tools" / "require.sh"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_every_folder_of_a_room_that_holds_python_is_packed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packed = set(setup["options"]["packages"].split())
    found = {
        "snap." + ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if "target" not in path.parts
    }
    assert packed == found


def test_a_complete_machine_is_told_its_python(tools: Path) -> None:
    program(tools, "cc", "exit 0")
    program(tools, "cargo", "echo cargo 1.999.0")
    assert require(tools) == (0, "python3\n", "")


def test_everything_that_is_missing_is_named_at_once_with_the_way_to_get_it(tools: Path) -> None:
    code, out, err = require(tools, PYTHON="no-such-python")
    assert (code, out) == (1, "")
    for thing in (
        "Python 3.11 or newer (looked at: no-such-python)",
        "a C linker (cc)",
        "cargo, Rust's build tool",
    ):
        assert f"missing: {thing}\n" in err
    assert "apt install python3" in err
    assert "apt install gcc" in err
    assert "rustup.rs" in err


def test_an_old_python_is_passed_over_for_a_newer_one(tools: Path) -> None:
    (tools / "python3").unlink()
    program(tools, "python3", "exit 1")
    (tools / "python3.12").symlink_to(sys.executable)
    program(tools, "cc", "exit 0")
    program(tools, "cargo", "echo cargo 1.999.0")
    assert require(tools)[:2] == (0, "python3.12\n")


def test_a_python_without_venv_is_named(tools: Path) -> None:
    (tools / "python3").unlink()
    program(tools, "python3", 'case "$2" in *venv*) exit 1;; esac')
    code, _, err = require(tools)
    assert code == 1
    assert "missing: the venv module of python3\n    apt install python3-venv" in err


def test_a_cargo_older_than_the_crate_needs_is_named_with_both_versions(tools: Path) -> None:
    program(tools, "cc", "exit 0")
    program(tools, "cargo", "echo cargo 1.9.0")
    code, _, err = require(tools)
    assert code == 1
    assert "or newer (this is 1.9)" in err
    assert "rustup update" in err
