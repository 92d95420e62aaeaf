"""The demo's own kernel and second process: started in a temporary folder, and gone again however the demo ends."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final, Self

from snap import ipc
from snap.ipc import paths
from snap.ipc.control import ControlClient

from ..commands._base import PYTHON

START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
ASK_SECONDS: Final = 1.0
LOOK_EVERY: Final = 0.02
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_PR_SET_CHILD_SUBREAPER: Final = 36


class Stage:
    """A temporary folder and processes, all of them gone when `with` ends.

    Ctrl-C and SIGTERM raise KeyboardInterrupt, once; but never between a process's start and its being noted, and
    never while everything is taken down. A kernel that was killed leaves processes that are nobody's: they
    become this process's, and end with the stage too.
    """

    folder: Path

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep
        self._children: list[subprocess.Popen[bytes]] = []
        self._kernels: list[Path] = []
        self._exits = contextlib.ExitStack()
        self._held = True
        self._interrupted = False

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._interrupt) for number in SIGNALS]
        self._others = _children()
        _adopt_orphans(True)
        # Short, for the paths of Unix sockets are.
        self.folder = Path(tempfile.mkdtemp(prefix="snap-demo-"))
        try:
            self._release()
        except KeyboardInterrupt:
            # Without an entrance there is no exit either.
            self.__exit__(KeyboardInterrupt)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._held = True
        for directory in self._kernels:
            _stop_kernel(directory)
        while self._children:
            _end(self._children.pop())
        self._end_orphans()
        _adopt_orphans(False)
        self._exits.close()
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)
        if self._interrupted and kind is None:
            raise KeyboardInterrupt

    def start(
        self,
        module: str,
        *arguments: str | os.PathLike[str],
        stdin: int = subprocess.DEVNULL,
        out: IO[bytes] | int | None = None,
        err: IO[bytes] | int | None = None,
        pass_fds: tuple[int, ...] = (),
        netns: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run `python -m module`, out of Ctrl-C's reach, until the stage ends; in the network namespace `netns`, if
        any, and with that `environment` beside ours."""
        self._held = True
        inside = ("ip", "netns", "exec", netns) if netns else ()
        child = subprocess.Popen(
            [*inside, *PYTHON, module, *(os.fspath(argument) for argument in arguments)],
            stdin=stdin,
            stdout=out,
            stderr=err,
            pass_fds=pass_fds,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self._children.append(child)
        self._release()
        return child

    def start_kernel(
        self, runtime_dir: Path, *options: str, netns: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        """Run a kernel until the stage ends, and wait until it serves. Raises UnreachableError when it does not."""
        runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._kernels.append(runtime_dir)
        log = runtime_dir / paths.KERNEL_LOG
        ready = self.folder / f"ready{len(self._kernels)}.sock"
        # It stays: a kernel that takes the place of this one reports there as well.
        notices = self._exits.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notices.bind(os.fspath(ready))
        with log.open("ab") as out:
            arguments = ("--runtime-dir", os.fspath(runtime_dir), *options)
            told = {**(environment or {}), "NOTIFY_SOCKET": os.fspath(ready)}
            child = self.start("snap.kernel", *arguments, out=out, err=out, netns=netns, environment=told)
        _await_ready(child, notices, log)

    def at_end(self, call: Callable[..., object], *arguments: object) -> None:
        """Have it called when all processes are gone, the last one asked for first."""
        self._exits.callback(call, *arguments)

    def _end_orphans(self) -> None:
        """What a killed kernel left: by the order of the kernel that took its place, by SIGTERM, by force."""
        begin = time.monotonic()
        told: set[tuple[int, int]] = set()
        while orphans := _reap(_children() - self._others):
            waited = time.monotonic() - begin
            if waited < STOP_SECONDS / 2:
                for directory in self._kernels:
                    _stop_kernel(directory)
            else:
                number = signal.SIGTERM if waited < STOP_SECONDS else signal.SIGKILL
                for pid in orphans:
                    if (pid, number) not in told:
                        told.add((pid, number))
                        os.kill(pid, number)
            time.sleep(LOOK_EVERY)

    def _interrupt(self, *_: Any) -> None:
        again, self._interrupted = self._interrupted, True
        if not self._held and not again:
            raise KeyboardInterrupt

    def _release(self) -> None:
        self._held = False
        if self._interrupted:
            raise KeyboardInterrupt


def _adopt_orphans(yes: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


def _children() -> set[int]:
    """This process's children, those that were adopted included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found.update(map(int, (task / "children").read_text().split()))
    return found


def _reap(pids: set[int]) -> set[int]:
    """Those of these children that live; the dead are waited for."""
    living = set()
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                living.add(pid)
    return living


def _stop_kernel(directory: Path) -> None:
    """Order the kernel that serves there now, if any, to stop: it may not be the one that was started."""
    with contextlib.suppress(ipc.SnapError), ControlClient(directory, timeout=ASK_SECONDS) as control:
        control.call("kernel.stop")


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    child.wait()


def _await_ready(child: subprocess.Popen[bytes], notices: socket.socket, log: Path) -> None:
    notices.settimeout(0.1)
    deadline = time.monotonic() + START_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            if "READY=1" in notices.recv(4096).decode().splitlines():
                return
    words = log.read_text(errors="replace").strip().splitlines()[-1:] or ["its log is empty"]
    raise ipc.UnreachableError(
        f"the demo's kernel did not start: {words[0]}", "`snapctl doctor` says what is missing"
    )


class Writer:
    """The second process."""

    def __init__(self, stage: Stage, runtime_dir: Path, root: Path, way: str = "relay") -> None:
        pipe = subprocess.PIPE
        self._child = stage.start(
            "snap.cli.demo.writer", runtime_dir, root, way, stdin=pipe, out=pipe, err=pipe
        )

    def mark(self, name: str) -> None:
        """From now on it is `name` that happens. From any thread; a writer that has ended is not told."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(f"{time.monotonic_ns()} {name}\n".encode())
            self._child.stdin.flush()

    def check(self) -> None:
        """Raises SnapError when it has ended before its time."""
        if self._child.poll() is not None:
            self.finish()
            raise ipc.SnapError("the writing process ended before everything was sent")

    def finish(self) -> dict[str, Any]:
        """Let it end, by closing its input; returns what it saw. Raises SnapError with its last words if it failed."""
        try:
            out, err = self._child.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise ipc.DeadlineError("the writing process does not end", "is its disk stuck?") from None
        if self._child.returncode != 0:
            words = err.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise ipc.SnapError(f"the writing process failed: {words[0]}")
        seen: dict[str, Any] = json.loads(out)
        return seen
