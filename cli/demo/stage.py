"""The demo's own kernel and second process: started in a temporary folder, and gone again however the demo ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snap import ipc
from snap.ipc import paths

from ..commands._base import PYTHON

START_SECONDS = 30.0
STOP_SECONDS = 10.0


@contextlib.contextmanager
def workspace(keep: bool) -> Iterator[Path]:
    """A private temporary folder; short, for the paths of Unix sockets are."""
    folder = Path(tempfile.mkdtemp(prefix="snap-demo-"))
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def kernel(runtime_dir: Path) -> Iterator[int]:
    """Run a kernel on `runtime_dir` and yield its pid once it serves. Raises UnreachableError when it does not."""
    runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = runtime_dir / paths.KERNEL_LOG
    ready = runtime_dir / "ready.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices, log.open("ab") as out:
        notices.bind(os.fspath(ready))
        child = subprocess.Popen(
            [*PYTHON, "snap.kernel", "--runtime-dir", os.fspath(runtime_dir)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, "NOTIFY_SOCKET": os.fspath(ready)},
            start_new_session=True,  # Ctrl-C is for the demo, which stops the kernel in its turn
        )
        with _stopped(child):
            _await_ready(child, notices, log)
            yield child.pid


def _await_ready(child: subprocess.Popen[bytes], notices: socket.socket, log: Path) -> None:
    notices.settimeout(0.1)
    deadline = time.monotonic() + START_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            if "READY=1" in notices.recv(4096).decode().splitlines():
                return
    tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["its log is empty"]
    raise ipc.UnreachableError(
        f"the demo's kernel did not start: {tail[0]}", "`snapctl doctor` says what is missing"
    )


@contextlib.contextmanager
def _stopped(child: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Writer:
    """The second process. Leaving the context closes its standard input, which ends it."""

    def __init__(self, runtime_dir: Path, root: Path) -> None:
        self._child = subprocess.Popen(
            [*PYTHON, "snap.cli.demo.writer", os.fspath(runtime_dir), os.fspath(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._child:
            if self._child.poll() is None and exc[0] is not None:
                self._child.kill()

    def check(self) -> None:
        """Raises SnapError when it has ended before its time."""
        if self._child.poll() is not None:
            self.finish()
            raise ipc.SnapError("the writing process ended before everything was sent")

    def finish(self) -> dict[str, int]:
        """Let it end; what it saw. Raises SnapError with its last words when it failed."""
        try:
            out, err = self._child.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            raise ipc.DeadlineError(
                "the writing process does not end", "is the disk that it writes to stuck?"
            ) from None
        if self._child.returncode != 0:
            words = err.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise ipc.SnapError(f"the writing process failed: {words[0]}")
        seen: dict[str, int] = json.loads(out)
        return seen


@contextlib.contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that the demo leaves nothing behind."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
