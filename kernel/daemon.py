"""`snap-kernel`: the process around the kernel: options, lock, signals, service manager, order of coming and going."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import resource
import signal
import socket
import stat
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import setproctitle

from snap.dataplane.errors import BusyError, DeniedError, ResourceError, SnapError
from snap.ipc import paths

from . import bootstrap, keeper, policy, sdnotify, sdstore
from .control import Control
from .kernel import VERSION, Kernel, Settings
from .operators import Operators
from .sdstore import SystemdStore
from .store import KeeperStore
from .succession import OPTION, Heir, Succession
from .takeover import LISTENER, Adoption, adoption

DESCRIPTION: Final = """\
The kernel of Snap: starts modules, each in a process of its own, gives applications channels to them where
the policy allows it, and keeps all of that going. It runs in the foreground; `snapctl up` puts it into the
background.
"""
EXAMPLES: Final = """\
examples:
  snap-kernel                                 serve the user's own runtime directory
  snap-kernel --runtime-dir /tmp/try          try something beside it
  snap-kernel --module-path ~/modules         with modules of your own, one directory each
  snap-kernel --policy policy.toml            who may use what; without one: its own user everything
  snap-kernel ctl status                      the same as `snapctl status`

It stops in order on SIGTERM, SIGINT or `snapctl down`. Exit codes: 0 stopped as asked, 1 failed, 2 usage (options,
policy), 6 another kernel serves that runtime directory.
"""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        "snap-kernel",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "--runtime-dir",
        type=Path,
        metavar="DIR",
        help="sockets, logs and lock; default: $SNAP_RUNTIME_DIR or the user's own",
    )
    options.add_argument(
        "--policy", type=Path, metavar="FILE", help="TOML; default: the owner may do everything"
    )
    options.add_argument(
        "--module-path",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="look for modules here too; repeatable",
    )
    options.add_argument("--foreground", action="store_true", help="log to standard error as well")
    options.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    options.add_argument(
        "--respawn",
        action="store_true",
        help="start again when this process dies; modules and channels go on",
    )
    options.add_argument(
        "--orphan-grace",
        type=float,
        default=keeper.GRACE,
        metavar="SECONDS",
        help="how long modules wait for a new kernel when this process dies (default: %(default)g)",
    )
    options.add_argument(
        "--fd-store",
        type=int,
        metavar="COUNT",
        help="the service manager keeps so many descriptors (systemd 254 and newer say so themselves)",
    )
    options.add_argument(OPTION, help=argparse.SUPPRESS)
    options.add_argument("--version", action="version", version=f"snap-kernel {VERSION}")
    return options


def prepare(directory: Path) -> None:
    """Make the runtime directory. Raises DeniedError when others could tamper with it, ResourceError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()  # in a shared /tmp somebody else may have put a link there
    except OSError as error:
        raise ResourceError(
            f"cannot use {directory}: {error.strerror}", "choose another --runtime-dir"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise DeniedError(
            f"{directory} is not this user's alone",
            f"chmod go-w {directory}, or choose another --runtime-dir",
        )


@contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold the runtime directory, by the descriptor that comes out. Raises BusyError naming the pid of who holds it."""
    fd = os.open(directory / paths.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"a kernel serves {directory} already: pid {_holder(fd)}",
                "stop it with `snapctl down`, or choose another --runtime-dir",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        try:
            yield fd
        finally:
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _holder(fd: int) -> str:
    for _ in range(20):
        if pid := os.pread(fd, 32, 0).strip():
            return pid.decode("ascii", "replace")
        time.sleep(0.05)  # it has the lock, and writes its pid next
    return "unknown"


@dataclass(frozen=True)
class Start:
    """How a kernel was started: `command` are the arguments after the interpreter that do it again, `lock` is the
    descriptor of its lock. With `respawn` its keeper does it, else that waits `grace` seconds for somebody who
    does. `heir` in an upgrade of the kernel."""

    command: Sequence[str]
    lock: int
    grace: float = keeper.GRACE
    respawn: bool = False
    heir: Heir | None = None


async def serve(settings: Settings, start: Start) -> None:
    """Run a kernel until it is told to stop. Raises SnapError, OSError."""
    stored, passed = sdstore.split(sdnotify.passed())
    activated = sdnotify.activated_sockets(passed)
    listener = activated.pop("bootstrap", None)
    for name in activated:
        raise ResourceError(
            f"activated socket {name!r} is unknown here", "name it bootstrap in the socket unit"
        )
    store: KeeperStore | SystemdStore
    if sdstore.wanted():
        store = SystemdStore(stored if start.heir is None else start.heir.given)
    else:
        again = [sys.executable, *start.command] if start.respawn else []
        store = KeeperStore(settings.runtime_dir, start.grace, again)
    left: Adoption | None = None
    try:
        left = adoption(store)
        if left is not None and start.heir is not None:
            left.confirm = start.heir.confirm
        await _serve(settings, start, store, listener, left)
    except BaseException:
        # What an earlier kernel left and this one cannot take over is for another one to take.
        if left is not None or not store.fresh:
            store.detach()
        raise
    finally:
        store.close()


async def _serve(
    settings: Settings,
    start: Start,
    store: KeeperStore | SystemdStore,
    listener: socket.socket | None,
    left: Adoption | None,
) -> None:
    loop = asyncio.get_running_loop()
    path = settings.runtime_dir / paths.BOOTSTRAP
    given = socket.socket(fileno=left.take(LISTENER)[0]) if left is not None else None
    if listener is not None and given is not None:
        given.close()
    with nullcontext(listener) if listener else _own_socket(path, given) as sock:
        try:
            kernel = Kernel(settings, sock, store, left)
        except Exception as error:
            if start.heir is not None:
                start.heir.fail(str(error))
            raise
        store.settle()
        store.report = lambda kind, data: kernel.events.emit(kind, "kernel", **data)
        loop.set_exception_handler(lambda _, context: _note_fault(kernel, context))
        leave = partial(_leave, kernel) if isinstance(store, SystemdStore) else kernel.stopping.set
        loop.add_signal_handler(signal.SIGTERM, leave)
        loop.add_signal_handler(signal.SIGINT, kernel.stopping.set)
        watchdog = loop.create_task(_feed_watchdog())
        succession = Succession(kernel, VERSION, start.command, start.lock, store)
        try:
            operators = Operators(kernel, succession)
            control = Control(settings.runtime_dir, operators, kernel.answers, kernel.events, kernel.outbox)
            try:
                if start.heir is not None:
                    start.heir.report(kernel, VERSION)
                kernel.autostart()
                sdnotify.notify("READY=1", f"STATUS=serving {settings.runtime_dir}")
                await kernel.stopping.wait()
            finally:
                with suppress(SnapError):
                    sdnotify.notify("STOPPING=1")
                succession.close()
                await kernel.stop()
                await control.close()
        finally:
            watchdog.cancel()
            kernel.close()


def _leave(kernel: Kernel) -> None:
    """Whether another kernel comes is the service manager's affair: it keeps everything over a restart, and closes it
    at a stop, by which the modules end."""
    kernel.events.emit("kernel.left", "kernel", pid=os.getpid())
    kernel.outbox.flush()
    with suppress(SnapError):
        sdnotify.notify("STOPPING=1")
    os._exit(0)


@contextmanager
def _own_socket(path: Path, given: socket.socket | None) -> Iterator[socket.socket]:
    """The one `given` by an earlier kernel. Without one, as we hold the lock, whatever is there was left by a kernel
    that died. Raises ResourceError."""
    try:
        if given is None:
            path.unlink(missing_ok=True)
        sock = given or bootstrap.listen(path)
    except OSError as error:
        raise ResourceError(
            f"cannot listen on {path}: {error.strerror or error}",
            "choose another --runtime-dir, with a shorter path",
        ) from error
    try:
        with sock:
            yield sock
    finally:
        path.unlink(missing_ok=True)


def _note_fault(kernel: Kernel, context: dict[str, Any]) -> None:
    """An exception that nobody caught is a fault of the kernel's own: said, and survived."""
    error = context.get("exception")
    where = traceback.format_exception(error)[-3:] if error else []
    kernel.events.emit("kernel.fault", "kernel", message=context["message"], error=repr(error), where=where)


async def _feed_watchdog() -> None:
    interval = sdnotify.watchdog_interval()
    while interval is not None:
        with suppress(SnapError):
            sdnotify.notify("WATCHDOG=1")
        await asyncio.sleep(interval)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["ctl"]:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "snap.cli", *arguments[1:]])
    options = parser().parse_args(arguments)
    setproctitle.setproctitle("snap: kernel")
    os.umask(0o077)
    if options.fd_store is not None:
        os.environ[sdstore.VARIABLE] = str(options.fd_store)
    heir: Heir | None = None
    try:
        if options.takeover is not None:
            heir = Heir(options.takeover)
        settings = Settings(
            runtime_dir=paths.runtime_dir(options.runtime_dir),
            policy=policy.load(options.policy),
            module_path=[path.absolute() for path in options.module_path],
            foreground=options.foreground,
            log_level=options.log_level,
        )
        prepare(settings.runtime_dir)
        with locked(settings.runtime_dir) if heir is None else heir.locked() as lock:
            _raise_descriptor_limit()
            if heir is not None:
                heir.prepare(VERSION)
            start = Start(_again(arguments), lock, options.orphan_grace, options.respawn, heir)
            asyncio.run(serve(settings, start))
    except SnapError as error:
        print(f"snap-kernel: {error}", file=sys.stderr)
        if heir is not None:
            heir.fail(str(error))
        return error.exit_code
    except OSError as error:
        print(f"snap-kernel: {error}", file=sys.stderr)
        return 1
    return 0


def _again(arguments: Sequence[str]) -> list[str]:
    """What starts such a kernel again, after the interpreter."""
    words = list(arguments)
    if OPTION in words:
        at = words.index(OPTION)
        del words[at : at + 2]
    return ["-P", "-m", "snap.kernel", *words]


def _raise_descriptor_limit() -> None:
    """A channel takes five descriptors while it is made: use what the hard limit gives."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
