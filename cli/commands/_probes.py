"""What `snapctl doctor` tries. A probe returns what it found, or raises: then its consequence and its cure are told."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import socket
import stat
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from . import _system
from ._system import on_a_thread

MIB: Final = 1 << 20
SHM: Final = Path("/dev/shm")
CGROUPS: Final = Path("/sys/fs/cgroup")
HALT_POLL: Final = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
AF_XDP: Final = 44
SUN_PATH: Final = 107
LANDLOCK_WANTED: Final = 4
CONTROLLERS: Final = ("cpu", "memory", "cpuset")

OK: Final = "ok"
LIMITED: Final = "limited"
UNAVAILABLE: Final = "unavailable"


@dataclass(frozen=True)
class Finding:
    """`state` is ok, limited or unavailable; `essential`: Snap cannot run without it."""

    name: str
    state: str
    found: str
    means: str
    fix: str
    essential: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Limited(Exception):
    """It works, but not as far as it could; the text says what was found."""


@dataclass(frozen=True)
class Probe:
    name: str
    attempt: Callable[[], str]
    means: str
    fix: str
    essential: bool = False

    def run(self) -> Finding:
        try:
            condition, found = OK, self.attempt()
        except Limited as error:
            condition, found = LIMITED, str(error)
        except OSError as error:
            condition, found = UNAVAILABLE, error.strerror or str(error)
        good = condition == OK
        return Finding(
            self.name, condition, found, "" if good else self.means, "" if good else self.fix, self.essential
        )


def examine(runtime: Path) -> list[Finding]:
    """Run every probe for a kernel on the directory `runtime`."""
    return [probe.run() for probe in _probes(runtime)]


def _probes(runtime: Path) -> list[Probe]:
    return [
        Probe(
            "runtime directory",
            lambda: _runtime_directory(runtime),
            "a kernel cannot start there",
            "name another one with --runtime-dir or SNAP_RUNTIME_DIR: short, and writable by you alone",
            essential=True,
        ),
        Probe(
            "sealed memfd",
            _sealed_memfd,
            'segments need the back end "posix", where a peer of the same uid can shrink one (a fault, not a crash)',
            'Linux 5.1 or later seals against future writes; or set `[segments] backend = "posix"` in the policy',
        ),
        Probe(
            "shared memory",
            _shared_memory,
            "channels fail with `resources` when it is full",
            "make it larger: mount -o remount,size=1G /dev/shm (in a container: --shm-size=1g)",
        ),
        Probe(
            "open files",
            lambda: _limit(resource.RLIMIT_NOFILE, 4096, str),
            "a channel takes 5 descriptors in the kernel: new ones fail with `resources` when they run out",
            "raise the limit: ulimit -n 65536, or LimitNOFILE= in the unit",
        ),
        Probe(
            "locked memory",
            lambda: _limit(resource.RLIMIT_MEMLOCK, 64 * MIB, _mib),
            "AF_XDP memory, io_uring buffers and pinned regions larger than this are refused",
            "raise the limit: ulimit -l unlimited, or LimitMEMLOCK= in the unit",
        ),
        Probe("eventfd", _eventfd, "doorbells for asyncio cannot be made", "run on Linux", essential=True),
        Probe(
            "pidfd",
            _pidfd,
            "the kernel cannot watch its modules",
            "Linux 5.3 or later; a container's seccomp profile must allow pidfd_open",
            essential=True,
        ),
        Probe(
            "futex_waitv",
            _futex_waitv,
            "an engine that sleeps on many channels waits for their eventfds only: a system call more to wake it",
            "Linux 5.16 or later; a container's seccomp profile must allow it",
        ),
        Probe(
            "landlock",
            _landlock,
            "modules are not kept from files and TCP ports by it; their uid and seccomp still hold",
            "boot with lsm=landlock,... on Linux 6.7 or later (ABI 4: files and TCP)",
        ),
        Probe(
            "seccomp",
            _seccomp,
            "modules may use every system call",
            "a kernel with CONFIG_SECCOMP_FILTER",
        ),
        Probe(
            "user namespaces",
            _user_namespaces,
            "an unprivileged kernel cannot give modules namespaces of their own",
            "sysctl user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1 "
            "(Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0)",
        ),
        Probe(
            "cgroups",
            _cgroups,
            "a module's CPU and memory limits are shown, but not all of them enforced",
            "run under the unit with Delegate=yes, or as root",
        ),
        Probe(
            "SCHED_FIFO",
            lambda: _scheduling(_system.try_fifo, "SCHED_FIFO"),
            "dedicated engines are preempted by ordinary tasks: gaps of milliseconds beside a busy one",
            "run as root, or give CAP_SYS_NICE or LimitRTPRIO= (ulimit -r 1)",
        ),
        Probe(
            "SCHED_DEADLINE",
            lambda: _scheduling(_system.try_deadline, "SCHED_DEADLINE"),
            "engines cannot reserve a runtime of every period: SCHED_FIFO or the fair scheduler is used",
            "run as root or with CAP_SYS_NICE, and with no CPU affinity",
        ),
        Probe(
            "AF_XDP",
            _af_xdp,
            "ports fall back to AF_PACKET, TAP or UDP",
            "run as root or with CAP_NET_RAW and CAP_NET_ADMIN, on a kernel with CONFIG_XDP_SOCKETS",
        ),
        Probe(
            "processors",
            _processors,
            "a spinning engine takes the core that its peer needs: choose wait = adaptive or blocking",
            "give the machine or container more CPUs for spinning to pay",
        ),
        Probe(
            "halt polling",
            _halt_polling,
            "in a virtual machine an idle CPU takes tens of microseconds to wake: blocking round trips show it",
            f"as root: echo 200000 > {HALT_POLL} (the CPU then polls before it halts)",
        ),
        Probe(
            "interpreter for other users",
            _interpreter,
            "modules cannot run under uids of their own: they could not execute this Python",
            "install Python and Snap where everyone may read and execute, such as /usr or /opt",
        ),
        Probe(
            "systemd",
            _systemd,
            "nothing starts the kernel at boot or restarts it: `snapctl up` does it by hand",
            "install the units on a machine that systemd runs",
        ),
    ]


def _mib(count: int) -> str:
    return f"{count / MIB:.0f} MiB"


def _runtime_directory(directory: Path) -> str:
    socket_path = os.fsencode(directory / "bootstrap.sock")
    if len(socket_path) > SUN_PATH:
        raise OSError(errno.ENAMETOOLONG, f"{directory} is too long for a Unix socket's name")
    present = directory
    while not present.exists():
        present = present.parent
    if not os.access(present, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, f"{present} is not writable")
    if present != directory:
        return f"{directory} can be made in {present}"
    found = directory.stat()
    if found.st_uid != os.geteuid():
        raise OSError(errno.EACCES, f"{directory} belongs to uid {found.st_uid}")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise OSError(errno.EPERM, f"{directory} is writable by others, mode {stat.S_IMODE(found.st_mode):o}")
    return str(directory)


def _sealed_memfd() -> str:
    """Map, seal, and then try what the seals are to forbid."""
    descriptor = os.memfd_create("snap-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        with mmap.mmap(descriptor, mmap.PAGESIZE) as mapped:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            if _allowed(lambda: os.ftruncate(descriptor, 0)):
                raise Limited("a sealed memfd can be shrunk all the same")
            if not _allowed(lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _system.F_SEAL_FUTURE_WRITE)):
                raise Limited("seals against shrinking hold, but there is none against future writes")
            if _allowed(lambda: mmap.mmap(descriptor, mmap.PAGESIZE).close()):
                raise Limited("a second writable mapping is possible in spite of F_SEAL_FUTURE_WRITE")
            mapped[0] = 1
    finally:
        os.close(descriptor)
    return "seals against shrinking, growing and future writes hold"


def _allowed(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _shared_memory() -> str:
    found = os.statvfs(SHM)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"{_mib(free)} free of {_mib(total)} in {SHM}"
    with tempfile.TemporaryFile(dir=SHM):
        pass
    if free < 256 * MIB:
        raise Limited(text)
    return text


def _limit(which: int, wanted: int, show: Callable[[int], str]) -> str:
    soft, hard = resource.getrlimit(which)
    infinite = resource.RLIM_INFINITY
    texts = ["unlimited" if value == infinite else show(value) for value in (soft, hard)]
    text = f"{texts[0]}, at most {texts[1]}"
    if soft != infinite and soft < wanted:
        raise Limited(text)
    return text


def _eventfd() -> str:
    descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        os.eventfd_write(descriptor, 1)
        return "works" if os.eventfd_read(descriptor) == 1 else "broken"
    finally:
        os.close(descriptor)


def _pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return "works"


def _futex_waitv() -> str:
    if not _system.has_futex_waitv():
        raise OSError(errno.ENOSYS, "this system has no such call")
    return "works"


def _landlock() -> str:
    abi = _system.landlock_abi()
    if abi < LANDLOCK_WANTED:
        raise Limited(f"ABI {abi}: files, but not TCP")
    return f"ABI {abi}"


def _seccomp() -> str:
    _system.check_seccomp_filter()
    return "filters can kill a process"


def _user_namespaces() -> str:
    _system.try_user_namespace()
    return "can be made"


def _cgroups() -> str:
    """Which controllers of this process's own groups may be written: tried by access(2), nothing is made."""
    writable, present = set(), set()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names:
            group = CGROUPS / names / path.lstrip("/")
            controllers = set(names.split(","))
        else:
            root = CGROUPS / "unified" if (CGROUPS / "unified").is_dir() else CGROUPS
            group = root / path.lstrip("/")
            listed = group / "cgroup.controllers"
            controllers = set(listed.read_text().split()) if listed.exists() else set()
        present |= controllers
        if os.access(group, os.W_OK):
            writable |= controllers
    usable = [name for name in CONTROLLERS if name in writable]
    version = "v2" if (CGROUPS / "cgroup.controllers").exists() else "v1"
    text = f"{version}, writable: {', '.join(usable) or 'none'} of {', '.join(CONTROLLERS)}"
    if not usable:
        raise OSError(errno.EACCES, text)
    if len(usable) < len(CONTROLLERS):
        raise Limited(text)
    return text


def _scheduling(attempt: Callable[[], None], name: str) -> str:
    on_a_thread(attempt)
    return f"a thread may take {name}"


def _af_xdp() -> str:
    socket.socket(AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0).close()
    return "sockets can be made"


def _processors() -> str:
    usable = len(os.sched_getaffinity(0))
    text = f"{usable} usable of {os.cpu_count()}"
    if usable < 2:
        raise OSError(errno.EAGAIN, f"{text}: spinning only delays the other side")
    if usable < 4:
        raise Limited(f"{text}: one spinning pair takes them all")
    return f"{text}: spinning is sensible for {usable // 2 - 1} engines"


def _halt_polling() -> str:
    if not HALT_POLL.exists():
        if b"hypervisor" in Path("/proc/cpuinfo").read_bytes():
            raise Limited("a virtual machine without the haltpoll driver")
        return "not needed: no virtual machine"
    nanoseconds = int(HALT_POLL.read_text())
    text = f"guest_halt_poll_ns is {nanoseconds}"
    if nanoseconds == 0:
        raise Limited(text)
    return text


def _interpreter() -> str:
    """Another uid needs to enter every directory on the way to what Python executes and imports."""
    for name in (sys.executable, os.__file__, __file__):
        path = Path(name).resolve()
        for parent in path.parents:
            if not parent.stat().st_mode & stat.S_IXOTH:
                raise OSError(errno.EACCES, f"{parent}, on the way to {path.name}, is closed to others")
        needed = stat.S_IROTH | (stat.S_IXOTH if name == sys.executable else 0)
        if path.stat().st_mode & needed != needed:
            raise OSError(errno.EACCES, f"{path} is closed to others")
    return f"{Path(sys.executable).resolve()} is open to every uid"


def _systemd() -> str:
    first = Path("/proc/1/comm").read_text().strip()
    if first != "systemd" or not Path("/run/systemd/system").is_dir():
        raise OSError(errno.ENOENT, f"process 1 is {first}")
    return "process 1 is systemd"
