"""Processes of modules: started by one kernel, adopted by another, and how they ended."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snap.kernel.processes import Process

PATIENCE = 20.0

STARTER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def ended(pid: int, pidfd: int, kill: bool = False) -> tuple[str, bool]:
    """Adopt the process, and say how it ended."""
    end: asyncio.Future[tuple[str, bool]] = asyncio.get_running_loop().create_future()
    process = Process.adopt(pid, pidfd, lambda how, clean: end.set_result((how, clean)))
    if kill:
        process.kill()
    async with asyncio.timeout(PATIENCE):
        return await end


def orphan(code: str) -> tuple[int, int]:
    """A process that is no child of this one, and its pidfd."""
    starter = subprocess.Popen([sys.executable, "-c", STARTER, code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    pidfd = os.pidfd_open(pid)
    starter.stdout.close()
    starter.wait()
    return pid, pidfd


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import time; time.sleep(0.3); raise SystemExit(3)", ("exit status 3", False)),
        ("import time; time.sleep(0.3)", ("exit status 0", True)),
        ("import os, time; time.sleep(0.3); os.kill(os.getpid(), 15)", ("killed by SIGTERM", False)),
    ],
)
def test_how_an_adopted_process_ended_is_told(code: str, told: tuple[str, bool]) -> None:
    assert asyncio.run(ended(*orphan(code))) == told


def test_an_adopted_process_is_killed_with_its_whole_group(tmp_path: Path) -> None:
    helper = tmp_path / "helper"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "helper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(helper)!r} + '.new').write_text(str(helper.pid))\n"
        f"pathlib.Path({str(helper)!r} + '.new').rename({str(helper)!r})\n"
        "time.sleep(60)\n"
    )
    pid, pidfd = orphan(code)

    async def test() -> tuple[str, bool]:
        async with asyncio.timeout(PATIENCE):
            while not helper.exists():
                await asyncio.sleep(0.01)
        return await ended(pid, pidfd, kill=True)

    assert asyncio.run(test()) == ("killed by SIGKILL", False)
    end = time.monotonic() + PATIENCE
    while alive(int(helper.read_text())):
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.01)
