"""A module's process: started by exec, watched by pidfd, logged through a bounded pipe, killed with its whole group."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import resource
import signal
import struct
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from snap.dataplane.errors import ResourceError

from .events import BoundedFile

LINK_FD: Final = "SNAP_LINK_FD"
TAIL_LINES: Final = 200
_LINE: Final = 4096
_READ: Final = 65536
_NICE: Final = 12
"""A fifteenth of the weight of others: what a process that gets ready may cost the one that serves when both compete
for one processor."""

_MODEST: Final = 2.0
"""Seconds of that: then most modules are ready, and where there is more to do, or to compete with, it would take for
ever."""

_SOON: Final = 0.1

_LOOKS: Final = 20
_EXIT_CODE: Final = 49  # of /proc/PID/stat, after the name: see proc_pid_stat(5)
_LOOK_AGAIN: Final = 0.01
# None of these is named by Python 3.11: linux/pidfd.h (struct pidfd_info: mask first, exit_code last), 6.9 and 6.15.
_WHOLE_GROUP: Final = 1 << 2
_PIDFD_INFO: Final = struct.Struct("=Q52xi")
_PIDFD_INFO_EXIT: Final = 1 << 3
_PIDFD_GET_INFO: Final = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11
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
    # Where a module finds its configuration: see `snap.ipc.paths.config_dir`.
    "SNAP_CONFIG_DIR",
    "XDG_CONFIG_HOME",
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
    """Leader of its own session: no signal of the kernel's terminal reaches it, and its helpers die with it.

    `pidfd` is what a later kernel adopts it by: it is then no child of that kernel.
    """

    def __init__(self, pid: int, pidfd: int, on_exit: Callable[[str, bool], None], child: bool) -> None:
        self.pid, self.pidfd = pid, pidfd
        self._on_exit, self._child = on_exit, child
        self._looks = _LOOKS
        self._loop = asyncio.get_running_loop()
        self._nice = 0
        self._loop.add_reader(pidfd, self._exited)

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        link: int,
        log: int,
        descriptors: int,
        on_exit: Callable[[str, bool], None],
    ) -> Process:
        """Start `argv` with descriptor `link` inherited and output going to `log`. `on_exit(how, clean)` is called
        once, from the event loop. Raises ResourceError."""
        env = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        env |= {LINK_FD: str(link), "PYTHONUNBUFFERED": "1"}
        try:
            popen = subprocess.Popen(
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
        try:
            _limit(popen.pid, descriptors)
            pidfd = os.pidfd_open(popen.pid)
        except OSError as error:
            os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            raise ResourceError(f"cannot watch a new process: {error.strerror}") from error
        popen.returncode = 0  # reaped by pidfd, here
        return cls(popen.pid, pidfd, on_exit, child=True)

    @classmethod
    def adopt(cls, pid: int, pidfd: int, on_exit: Callable[[str, bool], None]) -> Process:
        """Go on with a process that an earlier kernel started; `pidfd` is the process's now."""
        process = cls(pid, pidfd, on_exit, child=False)
        process.step_back(False)  # that kernel will not say so any more
        return process

    def step_back(self, yes: bool) -> None:
        """Leave the processors to others for a while, or compete for them as everybody does. Its session is a
        scheduling group of its own where the OS has autogroups, and may be favoured less and as much again by whoever
        owns it; elsewhere nothing happens, for a nice value could not be taken back."""
        self._nice = _NICE if yes else 0
        self._be_nice()
        if yes:
            self._loop.call_later(_MODEST, self.step_back, False)

    def _be_nice(self) -> None:
        if self.pidfd < 0:
            return
        try:
            Path(f"/proc/{self.pid}/autogroup").write_text(f"{self._nice}\n")
        except BlockingIOError:
            # The OS lets it happen ten times a second, unless root asks.
            self._loop.call_later(_SOON, self._be_nice)
        except OSError:
            pass

    def kill(self) -> None:
        """Kill the process and its group."""
        if self.pidfd < 0:
            return
        with suppress(ProcessLookupError):
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL, None, _WHOLE_GROUP)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Before Linux 6.9. The pid is safe to use as long as the process has not been reaped.
                signal.pidfd_send_signal(self.pidfd, 0)
                os.killpg(self.pid, signal.SIGKILL)

    def _exited(self) -> None:
        self._loop.remove_reader(self.pidfd)
        self.kill()  # what it left running in its group
        if self._child:
            found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            assert found is not None
            code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        else:
            known = _exit_code(self.pid, self.pidfd)
            if known is None and self._looks:
                # Between the two ways to be told.
                self._looks -= 1
                self._loop.call_later(_LOOK_AGAIN, self._exited)
                return
            if known is None:
                self._end("exit status unknown", False)
                return
            code = known
        how = f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        self._end(how, code == 0)

    def _end(self, how: str, clean: bool) -> None:
        os.close(self.pidfd)
        self.pidfd = -1
        self._on_exit(how, clean)


def _limit(pid: int, descriptors: int) -> None:
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    ceiling = descriptors if most == resource.RLIM_INFINITY else min(descriptors, most)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (ceiling, ceiling))
    resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))


def _exit_code(pid: int, pidfd: int) -> int | None:
    """How a process ended that is no child of ours, as Popen.returncode has it; None where the OS does not say."""
    status = _status_of_zombie(pid, pidfd)
    if status is None:
        status = _status_of_reaped(pidfd)
    return None if status is None else os.waitstatus_to_exitcode(status)


def _status_of_zombie(pid: int, pidfd: int) -> int | None:
    """Its parent has not looked yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        signal.pidfd_send_signal(pidfd, 0)  # the pid was still its own
    except OSError:
        return None
    return int(fields[_EXIT_CODE]) if fields[0] == "Z" else None


def _status_of_reaped(pidfd: int) -> int | None:
    """Since Linux 6.15."""
    info = bytearray(_PIDFD_INFO.size)
    _PIDFD_INFO.pack_into(info, 0, _PIDFD_INFO_EXIT, 0)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, status = _PIDFD_INFO.unpack(info)
    return int(status) if mask & _PIDFD_INFO_EXIT else None
