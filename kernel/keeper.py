"""The keeper: a process that outlives the kernel and holds a duplicate of every descriptor that the kernel needs.

As long as somebody holds them, nobody at the other ends notices that a kernel died: a new one connects to
`keeper.sock`, takes everything by name, and goes on. Nobody comes within the grace: the keeper closes
everything and exits, and the modules end. It imports next to nothing and decides nothing else, so that there
is little in it that could fail.

One datagram is one order: a letter and a name. `P` put (with the descriptors), `R` remove, `T` take (answered
by a `P` for each name, then `E`), `C` the command that starts a kernel again (a JSON list; empty: nothing
does), `G` goodbye: nothing is to be kept, exit.
"""

from __future__ import annotations

import argparse
import array
import errno
import json
import os
import resource
import selectors
import signal
import socket
import struct
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

SOCKET: Final = "keeper.sock"
LOG: Final = "kernel.log"
GRACE: Final = 30.0
MAX_FDS: Final = 64
MAX_ORDER: Final = 16 * 1024
RESPAWNS: Final = 5
RESPAWN_WINDOW: Final = 30.0
RESPAWN_PAUSE: Final = 0.1
BUSY: Final = 6
"""Exit code of a kernel that finds another one at work: then that one will come."""
_PATIENCE: Final = 10.0
_UCRED: Final = struct.Struct("iII")


def send(sock: socket.socket, order: str, fds: Sequence[int] = ()) -> None:
    """One datagram, waiting as long as the socket's timeout for room. Raises OSError (TimeoutError)."""
    end = time.monotonic() + (sock.gettimeout() or _PATIENCE)
    while True:
        try:
            socket.send_fds(sock, [order.encode()], fds, socket.MSG_NOSIGNAL)
            return
        except OSError as error:
            # Too many descriptors of this user are under way in sockets: their receivers need a moment.
            if error.errno != errno.ETOOMANYREFS or time.monotonic() > end:
                raise
        time.sleep(0.001)


def receive(sock: socket.socket) -> tuple[str, str, list[int]]:
    """Letter, name and descriptors; no letter at the end. One that came incomplete has the letter `?`. OSError."""
    fds = array.array("i")
    room = socket.CMSG_LEN(MAX_FDS * fds.itemsize)
    # socket.recv_fds would do, if it did not ignore its flags.
    data, ancillary, flags, _ = sock.recvmsg(MAX_ORDER, room, socket.MSG_CMSG_CLOEXEC)
    for _, _, payload in ancillary:
        fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close(fds)
        return "?", "", []
    text = data.decode("utf-8", "replace")
    return text[:1], text[1:], list(fds)


def close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


class Keeper:
    """Serves kernels until one says goodbye or none has come for `grace` seconds."""

    def __init__(self, listener: socket.socket, grace: float, command: Sequence[str], log: Path) -> None:
        """`command` starts a kernel again that died; empty: somebody else does."""
        self._held: dict[str, list[int]] = {}
        self._kernels: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._grace, self._command, self._log = grace, command, log
        self._uid = os.geteuid()
        self._deadline = time.monotonic() + grace
        self._respawns: deque[float] = deque(maxlen=RESPAWNS)
        self._due: float | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._over = False
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)

    def adopt(self, sock: socket.socket, kernel: bool = False) -> None:
        """Serve a connection: a kernel's, or one that has yet to speak as one."""
        sock.settimeout(_PATIENCE)
        if kernel:
            self._kernels.add(sock)
        self._selector.register(sock, selectors.EVENT_READ)

    def run(self) -> None:
        while not self._over:
            for key, _ in self._selector.select(self._pause()):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and not self._over:
                    self._serve(key.fileobj)
            self._watch()

    def _pause(self) -> float | None:
        """Seconds until something is to be done though nobody says anything."""
        if self._kernels and self._child is None:
            return None
        until = self._deadline if self._due is None else min(self._due, self._deadline)
        left = max(0.0, until - time.monotonic())
        return left if self._child is None else min(left or 1.0, 0.1 if not self._kernels else 1.0)

    def _accept(self) -> None:
        with suppress(OSError):
            sock, _ = self._listener.accept()
            _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if uid == self._uid:
                self.adopt(sock)
            else:
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            letter, name, fds = receive(sock)
            if letter in ("P", "R", "T", "C"):
                self._kernels.add(sock)
            match letter:
                case "P":
                    close(self._held.get(name, ()))
                    self._held[name] = fds
                    return
                case "R":
                    close(self._held.pop(name, ()))
                case "T":
                    self._give(sock)
                case "C":
                    self._command = json.loads(name)
                case "G":
                    self._over = True
                case "":
                    self._gone(sock)
            close(fds)
        except OSError:
            self._gone(sock)

    def _give(self, sock: socket.socket) -> None:
        for name, fds in self._held.items():
            send(sock, f"P{name}", fds)
        send(sock, "E")

    def _gone(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        sock.close()
        if sock in self._kernels:
            self._kernels.remove(sock)
            if not self._kernels:
                self._deadline = time.monotonic() + self._grace
                self._respawn_soon()

    def _watch(self) -> None:
        """Without a kernel: start one when it is time; give up when time is over."""
        if self._child is not None and (status := self._child.poll()) is not None:
            self._child = None
            if not self._kernels and status != BUSY:
                self._respawn_soon()
        if self._kernels:
            return
        now = time.monotonic()
        if self._due is not None and now >= self._due:
            self._due = None
            self._respawn()
        if now >= self._deadline:
            self._say("keeper.gave_up", f"no kernel came within {self._grace:g} s: everything ends")
            self._over = True

    def _respawn_soon(self) -> None:
        if self._command and self._due is None:
            recent = sum(then > time.monotonic() - RESPAWN_WINDOW for then in self._respawns)
            if recent < RESPAWNS:
                self._due = time.monotonic() + (RESPAWN_PAUSE * 2**recent if recent else 0.0)
                return
            self._command = ()
            self._say("keeper.respawn_failed", f"{RESPAWNS} kernels died within {RESPAWN_WINDOW:g} s")

    def _respawn(self) -> None:
        if self._child is not None:  # it has closed its connection, and is about to be gone
            self._due = time.monotonic() + RESPAWN_PAUSE
            return
        self._respawns.append(time.monotonic())
        try:
            self._child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            self._say("keeper.respawn_failed", f"{self._command[0]}: {error.strerror}")
            self._respawn_soon()

    def _say(self, event: str, message: str) -> None:
        line = json.dumps({"event": event, "subject": "kernel", "message": message, "level": "warning"})
        with suppress(OSError), self._log.open("a") as log:
            log.write(line + "\n")


def listen(path: Path) -> socket.socket:
    """Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path.unlink(missing_ok=True)  # of a keeper that was killed: its kernel starts a new one
    before = os.umask(0o177)  # its owner's alone from the first moment on
    try:
        sock.bind(os.fspath(path))
    finally:
        os.umask(before)
    sock.listen(8)
    return sock


def main(argv: Sequence[str] | None = None) -> int:
    """`--kernel FD` is the connection of the kernel that starts this; what follows the options starts it again."""
    parser = argparse.ArgumentParser("snap-keeper")
    parser.add_argument("--runtime-dir", type=Path, required=True)
    parser.add_argument("--kernel", type=int, required=True)
    parser.add_argument("--grace", type=float, default=GRACE)
    parser.add_argument("command", nargs="*")
    options = parser.parse_args(argv)
    import setproctitle

    setproctitle.setproctitle("snap: keeper")
    os.umask(0o077)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # It ends when its kernels have ended. Not SIG_IGN: a kernel that it starts would inherit that.
        signal.signal(number, lambda *_: None)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    path = options.runtime_dir / SOCKET
    with listen(path) as listener:
        inode = path.stat().st_ino
        keeper = Keeper(listener, options.grace, options.command, options.runtime_dir / LOG)
        keeper.adopt(socket.socket(fileno=options.kernel), kernel=True)
        keeper.run()
    with suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
