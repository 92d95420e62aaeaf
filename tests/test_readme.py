"""The README's application and module are run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snap.cli.demo.stage import Stage
from snap.ipc import connect

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def block(language: str, containing: str) -> str:
    (found,) = [
        text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text
    ]
    return str(found)


@pytest.fixture
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A kernel that also finds the README's module."""
    package = tmp_path / "modules" / "upper"
    package.mkdir(parents=True)
    (package / "module.toml").write_text(block("toml", 'name = "upper"'))
    (package / "engine.py").write_text(block("python", "class Upper"))
    monkeypatch.setenv("SNAP_MODULE_PATH", str(package.parent))
    with Stage() as stage:
        stage.start_kernel(tmp_path / "run")
        yield tmp_path / "run"


def test_the_application_says_what_its_comments_promise(runtime_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block("python", "snap.ipc import connect")],
        env={**os.environ, "SNAP_RUNTIME_DIR": str(runtime_dir)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["b'hello'", "100 of 100", "b'large' 1048576"]


def test_the_module_answers(runtime_dir: Path) -> None:
    with connect(runtime_dir=runtime_dir) as client, client.open("upper", wait=30) as channel:
        channel.send(b"quiet")
        assert channel.recv(timeout=30) == b"QUIET"


@pytest.mark.parametrize("containing", ["snap.ipc import connect", "class Upper"])
def test_the_examples_are_about_fifteen_lines(containing: str) -> None:
    lines = [line for line in block("python", containing).splitlines() if line.strip()]
    assert len(lines) <= 15
