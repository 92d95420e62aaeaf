"""Where the kernel's descriptors outlive it: in a process of our own, or with the service manager (`sdnotify.py`)."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from snap.dataplane.errors import ResourceError

from . import keeper

PATIENCE: Final = 2.0
"""Seconds that a keeper may take nothing before it is replaced."""

_TAKE_PATIENCE: Final = 10.0
_PAUSE: Final = 1.0
_UCRED: Final = struct.Struct("iII")


class Store(Protocol):
    """Duplicates of descriptors under names, held by somebody who does not die with the kernel."""

    def put(self, name: str, fds: Sequence[int]) -> None:
        """Hold duplicates of `fds`, in this order, instead of what the name held before; `fds` stay the caller's, and
        stay open until the name is removed or put anew."""

    def remove(self, name: str) -> None:
        """Forget a name; unknown ones are fine."""

    def take(self) -> dict[str, list[int]]:
        """What an earlier kernel put and nobody removed; the descriptors are the caller's now, and stay held."""


class NoStore:
    """For tests of parts: nothing outlives."""

    def put(self, name: str, fds: Sequence[int]) -> None:
        pass

    def remove(self, name: str) -> None:
        pass

    def take(self) -> dict[str, list[int]]:
        return {}


class KeeperStore:
    """A keeper process: the one that serves the runtime directory already, or a new one.

    A keeper that dies, or takes nothing for `PATIENCE` seconds, is replaced, and the new one gets everything.
    Made inside a running event loop. `report(kind, data)` is told of that.
    """

    def __init__(
        self,
        directory: Path,
        grace: float = keeper.GRACE,
        command: Sequence[str] = (),
        report: Callable[[str, dict[str, object]], None] = lambda kind, data: None,
    ) -> None:
        """`grace` is how long a keeper waits for a new kernel, `command` what it starts as one (empty: nothing).

        Raises ResourceError when there is none and none can be started.
        """
        self._directory, self._grace, self._command = directory, grace, command
        self.report = report
        self._held: dict[str, tuple[int, ...]] = {}
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._started = 0.0
        self.fresh = not self._connect()
        """No earlier kernel has put anything."""
        if self.fresh:
            self._start()

    @property
    def pid(self) -> int | None:
        """The keeper's; None while there is none."""
        if self._process is not None:
            return self._process.pid
        if self._sock is None:
            return None
        pid, _, _ = _UCRED.unpack(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return int(pid)

    def put(self, name: str, fds: Sequence[int]) -> None:
        self._held[name] = tuple(fds)
        self._send(f"P{name}", fds)

    def remove(self, name: str) -> None:
        self._held.pop(name, None)
        self._send(f"R{name}")

    def take(self) -> dict[str, list[int]]:
        """Raises ResourceError when the keeper does not give everything."""
        found: dict[str, list[int]] = {}
        sock = self._sock
        if sock is None or (self.fresh and not self._held):
            return found
        sock.settimeout(_TAKE_PATIENCE)
        try:
            keeper.send(sock, "T")
            while (received := keeper.receive(sock))[0] != "E":
                letter, name, fds = received
                if letter != "P":
                    raise OSError(0, f"it ended in the middle ({letter!r})")
                found[name] = fds
        except OSError as error:
            for fds in found.values():
                keeper.close(fds)
            raise ResourceError(
                f"the keeper does not give back what it holds: {error.strerror or error}",
                "raise the limit of open files (ulimit -n), or start afresh: end `snap: keeper` first",
            ) from error
        sock.settimeout(PATIENCE)
        self._held.update((name, tuple(fds)) for name, fds in found.items())
        return found

    def settle(self) -> None:
        """All is taken over: from now on the keeper starts such a kernel as this again."""
        self._send(f"C{json.dumps(list(self._command))}")

    def detach(self) -> None:
        """Leave it to another kernel. Idempotent."""
        self._unwatch()
        if self._process is not None:
            self._process.returncode = 0  # it outlives this process: nobody here will wait for it
            self._process = None

    def close(self) -> None:
        """Nothing is to outlive this kernel: the keeper exits. Idempotent."""
        sock = self._sock
        if sock is not None:
            with suppress(OSError):
                keeper.send(sock, "G")
        self._unwatch()
        self._held.clear()
        if self._process is not None:
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    # -- inside -----------------------------------------------------------------------------------------------

    def _unwatch(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        sock, self._sock = self._sock, None
        if sock is not None:
            self._loop.remove_reader(sock)
            sock.close()

    def _send(self, order: str, fds: Sequence[int] = ()) -> None:
        if self._sock is None:
            return  # the next keeper gets all that is held
        try:
            keeper.send(self._sock, order, fds)
        except OSError as error:
            if error.errno == errno.EBADF:  # closed before it was removed, which it is about to be
                return
            self._replace(error.strerror or "it takes nothing")

    def _replace(self, reason: str) -> None:
        pid = self.pid
        alive = self._sock is not None and pid is not None and reason != _GONE
        self._unwatch()
        if alive and pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None
        self.report("keeper.lost", {"pid": pid, "reason": reason})
        rest = self._started + _PAUSE - time.monotonic()
        if rest > 0:
            self._retry = self._loop.call_later(rest, self._start_again)
        else:
            self._start_again()

    def _start_again(self) -> None:
        self._retry = None
        try:
            self._start()
        except ResourceError as error:
            self.report("keeper.failed", {"error": error.message})
            self._retry = self._loop.call_later(_PAUSE, self._start_again)
            return
        for name, fds in list(self._held.items()):
            self._send(f"P{name}", fds)
        self.report("keeper.started", {"pid": self.pid})

    def _connect(self) -> bool:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(os.fspath(self._directory / keeper.SOCKET))
        except OSError:
            sock.close()
            return False
        self._watch(sock)
        return True

    def _start(self) -> None:
        """It has its connection before it runs: nobody waits for it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [sys.executable, "-P", "-m", keeper.__name__, "--runtime-dir", os.fspath(self._directory)]
        argv += ["--kernel", str(theirs.fileno()), "--grace", str(self._grace), "--", *self._command]
        # A keeper that starts kernels gives them what this one prints to; any other holds no pipe open.
        output = None if self._command else subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise ResourceError(f"cannot start the keeper: {error.strerror}") from error
        finally:
            theirs.close()
        self._started = time.monotonic()
        ours.settimeout(PATIENCE)
        self._watch(ours)

    def _watch(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        if self._sock is None:
            return
        try:
            if self._sock.recv(1):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._replace(_GONE)


_GONE: Final = "it died"
