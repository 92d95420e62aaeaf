"""The system calls that Python has no name for, as far as `snapctl doctor` needs them. None of them changes anything
that outlives the calling thread or child."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import select
import signal
import struct
import threading
from collections.abc import Callable
from typing import Final

FUTEX_WAITV: Final = 449
LANDLOCK_CREATE_RULESET: Final = 444
LANDLOCK_CREATE_RULESET_VERSION: Final = 1
SECCOMP_GET_ACTION_AVAIL: Final = 2
SECCOMP_RET_KILL_PROCESS: Final = 0x80000000
SCHED_DEADLINE: Final = 6
CLONE_NEWUSER: Final = 0x10000000
F_SEAL_FUTURE_WRITE: Final = 0x10
CHILD_TIMEOUT: Final = 2.0

# Older calls have a number per architecture; newer ones, above 423, have one for all.
_NUMBERS: Final = {
    "x86_64": {"seccomp": 317, "sched_setattr": 314},
    "aarch64": {"seccomp": 277, "sched_setattr": 274},
    "riscv64": {"seccomp": 277, "sched_setattr": 274},
}

_libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """One system call. Raises OSError."""
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def number(name: str) -> int:
    """The number of an older call here. Raises OSError (ENOSYS) on an architecture that is not in the table."""
    found = _NUMBERS.get(platform.machine(), {}).get(name)
    if found is None:
        raise OSError(errno.ENOSYS, f"the number of {name} on {platform.machine()} is not known")
    return found


def landlock_abi() -> int:
    return syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)


def has_futex_waitv() -> bool:
    """Waiting for no futex at all is an error that only a kernel with the call can report."""
    try:
        syscall(FUTEX_WAITV, None, 0, 0, None, 0)
    except OSError as error:
        return error.errno == errno.EINVAL
    return True


def check_seccomp_filter() -> None:
    """Ask whether filters may kill. Raises OSError when there are no filters."""
    action = ctypes.create_string_buffer(struct.pack("I", SECCOMP_RET_KILL_PROCESS), 4)
    syscall(number("seccomp"), SECCOMP_GET_ACTION_AVAIL, 0, action)


def try_fifo() -> None:
    """Take SCHED_FIFO for the calling thread. Raises OSError."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def try_deadline() -> None:
    """Take SCHED_DEADLINE, 0.1 of every 1 ms, for the calling thread. Raises OSError."""
    # struct sched_attr, first version: size, policy, flags, nice, priority, runtime, deadline, period.
    attributes = struct.pack("IIQiIQQQ", 48, SCHED_DEADLINE, 0, 0, 0, 100_000, 1_000_000, 1_000_000)
    syscall(number("sched_setattr"), 0, ctypes.create_string_buffer(attributes, 48), 0)


def on_a_thread(attempt: Callable[[], None]) -> None:
    """Run `attempt` on a thread that ends with it, and its scheduling policy too. Raises what it raises."""
    raised: list[OSError] = []

    def run() -> None:
        try:
            attempt()
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(CHILD_TIMEOUT)
    if thread.is_alive():
        raise TimeoutError(errno.ETIMEDOUT, "the attempt did not return")
    if raised:
        raise raised[0]


def try_user_namespace() -> None:
    """Make a user namespace in a child, where it ends with it. Raises OSError."""
    in_a_child(lambda: None if _libc.unshare(CLONE_NEWUSER) == 0 else _raise_errno())


def _raise_errno() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))


def in_a_child(attempt: Callable[[], None]) -> None:
    """Run `attempt` in a forked child that ends with it. Raises OSError with its errno, or TimeoutError."""
    child = os.fork()
    if child == 0:
        try:
            attempt()
        except OSError as error:
            os._exit(min(error.errno or errno.EIO, 255))
        except BaseException:
            os._exit(errno.EIO)
        os._exit(0)
    pidfd = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(CHILD_TIMEOUT * 1000):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise TimeoutError(errno.ETIMEDOUT, "the attempt did not return")
    if code > 0:
        raise OSError(code, os.strerror(code))
