"""Above the driver is a process that only waits for it: however the driver ends, nothing that it started is left.

The driver ends what it started by itself; when it is killed, the guard does it. When the guard is killed, the driver is
interrupted. Only who kills both at once leaves something.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Final, NoReturn

from tests.conftest import Holdings, descendants, leaked_since

INTERRUPTIONS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLONE_NEWIPC: Final = 0x08000000
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_IPC_RMID: Final = 0
_PATIENCE: Final = 10.0
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def isolate() -> None:
    """Semaphores of our own, so that what is left of them is ours. Without the right to that, others' may be blamed."""
    _LIBC.unshare(_CLONE_NEWIPC)


def adopt_orphans() -> None:
    """What a process of ours started and left becomes our child, not init's."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def watched() -> int | None:
    """Fork. In the driver None; in the guard, when the driver has ended, its exit code (128 + N after signal N).

    An interruption is a SystemExit in the driver, once: what follows it does not come out of cleaning up.
    """
    adopt_orphans()
    guard = os.getpid()
    for number in INTERRUPTIONS:
        signal.signal(number, _interrupted)
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)
    driver = os.fork()
    if driver == 0:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != guard:
            os._exit(128 + signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
        return None
    for number in INTERRUPTIONS:
        signal.signal(number, lambda number, _: _pass_on(driver, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTIONS)
    code = os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1])
    return 128 - code if code < 0 else code


def _interrupted(number: int, _: object) -> NoReturn:
    for one in INTERRUPTIONS:
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def _pass_on(driver: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(driver, number)


def tidy(before: Holdings) -> None:
    """By force: end all descendants, and remove the semaphores that they leave in a namespace that others share."""
    end = time.monotonic() + _PATIENCE
    while (left := descendants(os.getpid())) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)
    for number in leaked_since(before).get("semaphores", {}):
        _LIBC.semctl(int(number), 0, _IPC_RMID)


def remove(directory: Path) -> None:
    """Somebody who is dying may still write there."""
    end = time.monotonic() + _PATIENCE
    while directory.exists() and time.monotonic() < end:
        shutil.rmtree(directory, ignore_errors=True)
