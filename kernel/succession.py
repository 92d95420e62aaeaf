"""The kernel's own upgrade: one kernel process puts another in its place.

The old one starts the new one, which imports its code, reads the policy and a copy of the record, and says that it is
prepared (brownout). Then the old one records a last time and stands still (blackout) while the new one takes over
everything, as after a death; but before its first word to anybody it says so, and only then the old one ends, without
touching anything. Until then the old one can kill it and serve on, as if nothing had been. Who holds the lock of the
runtime directory does not change in between: the new one inherits its descriptor.

They speak as a kernel and its keeper do, a letter and a text. New to old: `O` prepared (its version), `R` all is taken
over, `F` failed (why). Old to new: `P` a descriptor that the service manager holds, `G` take over (the upgrade's id,
when the old one stood still), `Y` it is yours.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from snap.dataplane.errors import BusyError, DeadlineError, NotFoundError, SnapError, UsageError
from snap.ipc import seqpacket
from snap.ipc.protocol import UpgradeEngineView, UpgradeView

from . import keeper, record, sdnotify, upgrade
from .sdstore import SystemdStore
from .store import Store

if TYPE_CHECKING:
    from .kernel import Kernel

PREPARE: Final = 60.0
BLACKOUT: Final = 10.0
"""Seconds that the new kernel may take to get prepared, and to take over."""

OPTION: Final = "--takeover"
_REASON: Final = 400


class Succession:
    """Upgrades `kernel`; `command` are the arguments after the interpreter that start a kernel like it, `lock` is the
    descriptor of its lock."""

    def __init__(
        self,
        kernel: Kernel,
        version: str,
        command: Sequence[str],
        lock: int,
        store: Store,
    ) -> None:
        self._kernel, self._version = kernel, version
        self._command, self._inherited, self._store = command, [lock, *kernel.copies], store
        self._task: asyncio.Task[None] | None = None
        self._since = 0.0

    def begin(self, source: str | None) -> UpgradeView:
        """To the code of the interpreter, or environment, at `source`; None: what is installed now. Raises BusyError,
        NotFoundError, UsageError."""
        upgrades = self._kernel.upgrades
        for view in upgrades.views():
            if not view.outcome and view.kind != "recovery":
                raise BusyError(
                    f"upgrade {view.id} of {view.module or 'the kernel'} is under way",
                    f"follow it with `snapctl upgrade show {view.id}`",
                )
        python = _interpreter(source)
        self._since = time.monotonic()
        self._view = UpgradeView(
            id=upgrades.number(),
            module="",
            kind="kernel",
            phase=upgrade.BROWNOUT,
            outcome="",
            reason="",
            from_version=self._version,
            to_version="",
            from_generation=os.getpid(),
            to_generation=0,
            from_path=sys.executable,
            to_path=str(python),
            started=time.time(),
            engines=[UpgradeEngineView(name="kernel")],
        )
        self._enter(upgrade.BROWNOUT)
        self._task = asyncio.get_running_loop().create_task(self._run([str(python), *self._command]))
        return self._view

    def close(self) -> None:
        """The kernel stops."""
        if self._task is not None:
            self._task.cancel()

    # -- inside -----------------------------------------------------------------------------------------------

    async def _run(self, command: Sequence[str]) -> None:
        ours, theirs = seqpacket.pair()
        process: subprocess.Popen[bytes] | None = None
        outcome, reason = upgrade.ABORTED, "the kernel stops"
        try:
            process = self._start(command, theirs.fileno())
            theirs.close()
            self._note(to_generation=process.pid)
            self._note(to_version=await _prepared(ours), brownout_seconds=time.monotonic() - self._since)
            outcome = upgrade.ROLLED_BACK
            self._black_out(ours, process.pid)
        except (SnapError, OSError) as error:
            reason = error.message if isinstance(error, SnapError) else f"{command[0]}: {error.strerror}"
        finally:
            if process is not None:
                process.kill()
                process.wait()
            ours.close()
            theirs.close()
            self._finish(outcome, reason)

    def _start(self, command: Sequence[str], dialogue: int) -> subprocess.Popen[bytes]:
        """Raises OSError."""
        fds = [dialogue, *self._inherited]
        return subprocess.Popen(
            [*command, OPTION, ",".join(map(str, fds))],
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,
            # The watchdog will be the new one's to feed.
            env={key: value for key, value in os.environ.items() if key != "WATCHDOG_PID"},
        )

    def _black_out(self, sock: socket.socket, pid: int) -> None:
        """Stand still until the new kernel has taken over; then this process ends. Raises SnapError, OSError: it has
        not, and nothing has changed."""
        self._enter(upgrade.BLACKOUT)
        self._kernel.outbox.flush()
        frozen = time.monotonic_ns()
        sock.settimeout(BLACKOUT)
        if isinstance(self._store, SystemdStore):
            for name, held in self._store.held.items():
                keeper.send(sock, f"P{name}", held)
        keeper.send(sock, f"G{self._view.id} {frozen}")
        try:
            letter, text, fds = keeper.receive(sock)
        except TimeoutError:
            raise DeadlineError(f"the new kernel did not take over within {BLACKOUT:g} s") from None
        keeper.close(fds)
        if letter != "R":
            raise SnapError(f"the new kernel did not take over: {text or 'it died'}")
        with suppress(SnapError):
            sdnotify.notify(f"MAINPID={pid}")
        keeper.send(sock, "Y")
        os._exit(0)  # not one destructor: all that this process has is the new one's

    def _enter(self, phase: str) -> None:
        self._note(phase=phase)
        self._emit("upgrade.phase", phase=phase, reason="")

    def _finish(self, outcome: str, reason: str) -> None:
        self._note(phase=upgrade.DONE, outcome=outcome, reason=reason, finished=time.time())
        self._emit("upgrade.done", outcome=outcome, reason=reason)

    def _note(self, **changes: Any) -> None:
        self._view = msgspec.structs.replace(self._view, **changes)
        self._kernel.upgrades.note(self._view)

    def _emit(self, kind: str, **data: Any) -> None:
        self._kernel.events.emit(kind, "kernel", id=self._view.id, **data)


class Heir:
    """The new kernel's side. `option`: descriptors of the dialogue, of the lock, and of the record's copies."""

    def __init__(self, option: str) -> None:
        """Raises UsageError."""
        try:
            dialogue, self._lock, *self._copies = (int(number) for number in option.split(","))
            self._sock = socket.socket(fileno=dialogue)
            for fd in (dialogue, self._lock, *self._copies):
                os.set_inheritable(fd, False)
        except (ValueError, OSError) as error:
            raise UsageError(f"{OPTION} is for kernels that start another: {error}") from error
        self._mine = False
        self.given: dict[str, list[int]] = {}
        """Descriptors that the service manager holds."""
        self._order: tuple[int, int] | None = None

    def prepare(self, version: str) -> None:
        """All that can be done beforehand is done: see whether the record can be read, then wait for the order to take
        over. The old kernel's death is one, too. Raises SchemaError, StateDamagedError."""
        record.load(self._copies)
        seqpacket.close_all(self._copies)
        with suppress(OSError):
            keeper.send(self._sock, f"O{version}")
        while True:
            letter, text, fds = keeper.receive(self._sock)
            if letter == "P":
                self.given[text] = fds
                continue
            keeper.close(fds)
            if letter == "G":
                number, frozen = text.split()
                self._order = int(number), int(frozen)
            return

    def fail(self, reason: str) -> None:
        """Unless all is taken over: tell the old kernel, which serves on, and end. Nothing is tidied up: it is that
        one's."""
        if not self._mine:
            with suppress(OSError):
                keeper.send(self._sock, f"F{reason[:_REASON]}")
            os._exit(1)

    def confirm(self) -> None:
        """Everything is taken over, and nobody has been told yet: from here on it is this kernel's, or never."""
        with suppress(OSError):  # the old one died: it is ours
            keeper.send(self._sock, "R")
            select.select([self._sock], [], [])  # a kernel that does not want this kills it here
        self._sock.close()
        self._mine = True
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def report(self, kernel: Kernel, version: str) -> None:
        """It serves: the upgrade is over."""
        if self._order is None:
            return
        number, frozen = self._order
        view = kernel.upgrades.view(number)
        blackout = time.monotonic_ns() - frozen
        engines = [UpgradeEngineView(name="kernel", stage="flipped", blackout_ns=blackout)]
        done = {"phase": upgrade.DONE, "outcome": upgrade.COMMITTED, "reason": "", "finished": time.time()}
        kernel.upgrades.note(
            msgspec.structs.replace(
                view, **done, to_version=version, to_generation=os.getpid(), engines=engines
            )
        )
        kernel.events.emit("upgrade.flip", "kernel", id=number, engine="kernel", blackout_ns=blackout)
        kernel.events.emit("upgrade.done", "kernel", id=number, outcome=upgrade.COMMITTED, reason="")

    @contextmanager
    def locked(self) -> Iterator[int]:
        """The lock of the runtime directory, which the old kernel took; its descriptor."""
        try:
            yield self._lock
        finally:
            if self._mine:
                os.ftruncate(self._lock, 0)
            os.close(self._lock)


async def _prepared(sock: socket.socket) -> str:
    """The version of the new kernel. Raises SnapError with what it says instead, DeadlineError."""
    sock.setblocking(False)
    try:
        async with asyncio.timeout(PREPARE):
            data = await asyncio.get_running_loop().sock_recv(sock, keeper.MAX_ORDER)
    except TimeoutError:
        raise DeadlineError(f"the new kernel was not prepared within {PREPARE:g} s") from None
    text = data.decode("utf-8", "replace")
    if text[:1] != "O":
        raise SnapError(f"the new kernel does not start: {text[1:] or 'it ended; see kernel.log'}")
    return text[1:]


def _interpreter(source: str | None) -> Path:
    """Raises NotFoundError, UsageError."""
    if source is None:
        return Path(sys.executable)
    path = Path(source)
    if not path.is_absolute():
        raise UsageError(f"{source!r} names no installation", "give the directory of an environment (venv)")
    if path.is_dir():
        path = path / "bin" / "python"
    if not os.access(path, os.X_OK) or not path.is_file():
        raise NotFoundError(f"there is no interpreter at {path}", "give the directory of an environment")
    return path
