"""A module's process: started by exec, watched by pidfd, logged through a bounded pipe, killed with its whole group."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from snap.dataplane.errors import ResourceError

from .events import BoundedFile

LINK_FD: Final = "SNAP_LINK_FD"
TAIL_LINES: Final = 200
_LINE: Final = 4096
_READ: Final = 65536
_PASSED_ON: Final = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "PYTHONPATH",
    "PYTHONDONTWRITEBYTECODE",
    "LD_LIBRARY_PATH",
    "SNAP_FAULT_DIR",
)


class Log:
    """What a module's processes print: whole lines to a bounded file, the last ones in memory."""

    def __init__(self, path: Path) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._file = BoundedFile(path)

    def take(self, lines: list[bytes]) -> None:
        for line in lines:
            text = line[:_LINE].decode("utf-8", "replace")
            self.tail.append(text)
            self._file.write(text + "\n")

    def close(self) -> None:
        self._file.close()


class LogPipe:
    """The pipe from one process into a `Log`."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._rest = b""
        self.fd = -1

    def open(self) -> int:
        """The write end for the process, which the caller closes. Raises OSError."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Only our end may be non-blocking: a module's print must not fail because the kernel is busy.
        os.set_blocking(write, True)
        self.adopt(read)
        return write

    def adopt(self, fd: int) -> None:
        """Go on reading a pipe that an earlier kernel made."""
        self.fd = fd
        asyncio.get_running_loop().add_reader(fd, self._readable)

    def drain(self) -> None:
        """Take what is left, and close the pipe. Idempotent."""
        if self.fd < 0:
            return
        while self._take():
            pass
        asyncio.get_running_loop().remove_reader(self.fd)
        os.close(self.fd)
        self.fd = -1
        if self._rest:
            self._lines(b"\n")

    def _readable(self) -> None:
        if not self._take():
            asyncio.get_running_loop().remove_reader(self.fd)

    def _take(self) -> bool:
        try:
            data = os.read(self.fd, _READ)
        except BlockingIOError:
            return False
        self._lines(data)
        return bool(data)

    def _lines(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE:
            lines.append(self._rest)
            self._rest = b""
        self._log.take(lines)


class Process:
    """Leader of its own session: no signal of the kernel's terminal reaches it, and its helpers die with it."""

    def __init__(
        self, argv: Sequence[str], link: int, log: int, descriptors: int, on_exit: Callable[[str, bool], None]
    ) -> None:
        """Start `argv` with descriptor `link` inherited and output going to `log`. `on_exit(how, clean)` is called
        once, from the event loop. Raises ResourceError."""
        env = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        env |= {LINK_FD: str(link), "PYTHONUNBUFFERED": "1"}
        self._on_exit = on_exit
        try:
            self._popen = subprocess.Popen(
                argv,
                env=env,
                pass_fds=(link,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise ResourceError(f"cannot start {argv[0]}: {error.strerror}") from error
        self.pid = self._popen.pid
        try:
            self._limit(descriptors)
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            self.kill()
            self._popen.wait()
            raise ResourceError(f"cannot watch a new process: {error.strerror}") from error
        asyncio.get_running_loop().add_reader(self._pidfd, self._exited)

    def kill(self) -> None:
        """Kill the process and its group. Its pid is safe to use: only `_exited` reaps it."""
        if self._popen.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)

    def _limit(self, descriptors: int) -> None:
        _, most = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        ceiling = descriptors if most == resource.RLIM_INFINITY else min(descriptors, most)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (ceiling, ceiling))
        resource.prlimit(self.pid, resource.RLIMIT_CORE, (0, 0))

    def _exited(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self.kill()  # what it left running in its group; the group exists as long as the leader is not reaped
        found = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        os.close(self._pidfd)
        assert found is not None
        if found.si_code == os.CLD_EXITED:
            self._popen.returncode = found.si_status
            how = f"exit status {found.si_status}"
        else:
            self._popen.returncode = -found.si_status
            how = f"killed by {signal.Signals(found.si_status).name}"
        self._on_exit(how, self._popen.returncode == 0)
