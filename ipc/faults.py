"""Fault points: places where a test makes a process die, stop, fail or hang, one shot each.

Nothing happens unless `SNAP_FAULT_DIR` is in the environment. A file there that is named like a point is taken (whoever
unlinks it first) by the next process that reaches the point, and its content is done.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Final

DIRECTORY: Final = "SNAP_FAULT_DIR"
_directory: Final = os.environ.get(DIRECTORY)


def reach(point: str) -> None:
    """`kill` and `stop` signal this process, `hang` never returns, `raise` raises RuntimeError."""
    if _directory is not None:
        _reach(Path(_directory) / point)


def _reach(file: Path) -> None:
    try:
        action = file.read_text().strip()
        if not action:
            return  # it is just being written
        file.unlink()
    except FileNotFoundError:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "hang":
        threading.Event().wait()
    elif action == "raise":
        raise RuntimeError(f"fault point {file.name}")
    else:
        raise ValueError(f"{file}: {action!r} is none of kill, stop, hang, raise")
