"""One SEQPACKET connection on the event loop: a module's link, or an application's bootstrap connection.

Nothing leaves before what it tells of is recorded: `send` queues, and the outbox lets go once per round of the loop.
Nobody can make the kernel wait or grow: a wake-up reads a bounded burst (the rest waits for its turn after the
others), and a peer that does not read its answers is dropped once a bounded backlog is full.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from snap.dataplane.errors import ProtocolError
from snap.ipc import protocol, seqpacket

from .record import Outbox

BURST: Final = 16
BACKLOG: Final = 256
GONE: Final = "the peer has gone"


class Connection:
    """Calls `on_message(data, fds)` per datagram, whose descriptors the callee owns, and `on_closed(reason)` once.

    Either callback may close the connection. Refused datagrams (truncated, too many descriptors) go to `on_bad`.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[bytes, list[int]], None],
        on_bad: Callable[[ProtocolError], None],
        on_closed: Callable[[str], None],
        backlog: int = BACKLOG,
        outbox: Outbox | None = None,
    ) -> None:
        self._sock = sock
        self._on_message, self._on_bad, self._on_closed = on_message, on_bad, on_closed
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._backlog = backlog
        self._outbox = outbox or Outbox()
        self._held = 0  # of the last in `_unsent`: not recorded yet
        self._blocked = self._ended = False
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self._readable)

    def send(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Send or queue one message; the descriptors stay the caller's. A full backlog closes the connection."""
        if self.closed:
            return
        data = protocol.encode(message)
        if len(self._unsent) >= self._backlog:
            self._outbox.flush()  # a burst of our own is no fault of the peer's
        if len(self._unsent) >= self._backlog:
            self.close(f"it left {self._backlog} answers unread")
        if self.closed:
            return
        try:
            kept = _duplicates(fds)
        except OSError as error:
            self.close(f"no descriptors for its answers: {error.strerror}")
            return
        self._unsent.append((data, kept))
        self._held += 1
        self._outbox.add(self._release)

    @property
    def unsent(self) -> list[bytes]:
        """What waits to leave, encoded. Descriptors that belong to it are not in there."""
        return [data for data, _ in self._unsent]

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self, reason: str) -> None:
        if self._held and not self._ended:
            self._ended = True  # the last words leave before the end does
            self._outbox.flush()
            self._release()
        if self.closed:
            return
        self.closed = self._ended = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        while self._unsent:
            seqpacket.close_all(self._unsent.popleft()[1])
        self._on_closed(reason)

    def drain(self) -> None:
        """The peer has ended: hear what it said before, up to its end."""
        for _ in range(BACKLOG):
            if self.closed:
                return
            self._readable()

    def _try_send(self, data: bytes, fds: Sequence[int]) -> bool:
        try:
            seqpacket.send(self._sock, data, fds)
        except BlockingIOError:
            return False
        except OSError as error:
            self.close(f"{GONE}: {error.strerror}")
            return False
        return True

    def _release(self) -> None:
        """What is queued by now is recorded."""
        self._held = 0
        if self._unsent and not self._blocked:
            self._writable()

    def _writable(self) -> None:
        while len(self._unsent) > self._held:
            data, fds = self._unsent[0]
            if not self._try_send(data, fds):
                if not self.closed and not self._blocked:
                    self._blocked = True
                    self._loop.add_writer(self._sock, self._writable)
                return
            self._unsent.popleft()
            seqpacket.close_all(fds)
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        for _ in range(BURST):
            if self.closed:
                return
            try:
                data, fds = seqpacket.recv(self._sock)
            except (BlockingIOError, InterruptedError):
                return
            except ProtocolError as error:
                self._on_bad(error)
                continue
            except OSError as error:
                self.close(f"{GONE}: {error.strerror}")
                return
            if not data:
                seqpacket.close_all(fds)
                self.close(GONE)
                return
            self._on_message(data, fds)


def _duplicates(fds: Sequence[int]) -> list[int]:
    kept: list[int] = []
    try:
        for fd in fds:
            kept.append(os.dup(fd))
    except OSError:
        seqpacket.close_all(kept)
        raise
    return kept
