"""The application's side of Pony Express: names, connections, messages, and memory that peers use without its help.

    from snap.ipc import connect
    from snap.modules.pony import Pony

    with connect() as client, Pony.open(client, arena=1 << 20) as pony:
        pony.bind("store")
        peer = pony.accept()
        print(peer.recv().data)

One thread at a time uses a `Pony` and what it made. An operation is under way as soon as it is begun: `begin_...`
gives an `Operation` to wait for later, so that many are under way at once; the plain form waits.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Self

from snap.dataplane._native import ADAPTIVE
from snap.dataplane.errors import DeadlineError, FullError, UsageError
from snap.ipc.channel import Channel

from .commands import ANSWER, HEAD, SERVICE, Kind
from .connection import Connection, Message, Operation
from .errors import failure
from .places import Place, Places

if TYPE_CHECKING:
    from snap.ipc import Client

# Seconds until another look for completions while there is no room for a command.
_SLICE = 0.01


class Right(IntFlag):
    """What peers may do with a region."""

    READ = 1
    WRITE = 2
    ATOMIC = 4


@dataclass(frozen=True)
class Region:
    """Memory of an application that its peers may use, as they name it. `handle` is what to tell them."""

    handle: int
    offset: int
    size: int
    rights: Right


class Pony:
    """An application's place at the engine of its host."""

    def __init__(self, channel: Channel) -> None:
        """`channel` is to the service `pony`, and belongs to this object."""
        self.channel = channel
        self.places = Places(memoryview(b"") if channel.arena is None else channel.arena)
        self._tag = 0
        self._pending: dict[int, Operation] = {}
        self._connections: dict[int, Connection] = {}
        self._incoming: deque[Connection] = deque()

    @classmethod
    def open(cls, client: Client, arena: int = 0, timeout: float = 10.0) -> Self:
        """`arena`: bytes of memory to share with peers. Raises what `Client.open` raises."""
        return cls(client.open(SERVICE, arena_bytes=arena, timeout=timeout))

    def place(self, size: int) -> Place:
        """Memory of the arena. Raises ResourceError."""
        return self.places.take(size)

    def bind(self, name: str) -> None:
        """Be known by `name` (at most 64 bytes, no slash). Raises PonyError when somebody is."""
        self._call(Kind.BIND, 0, name.encode(), f"bind {name!r}")

    def connect(self, name: str, timeout: float | None = 10.0) -> Connection:
        """Raises NoPeerError."""
        answer = self._call(Kind.CONNECT, 0, name.encode(), f"connect to {name!r}", 0, timeout)
        return self._connection(ANSWER.unpack_from(answer)[3], name)

    def begin_connect(self, name: str) -> Operation:
        """`connection_of` the operation, once it is done, is the connection. What comes over it before is kept."""
        return self._begin(Kind.CONNECT, 0, name.encode(), f"connect to {name!r}")

    def connection_of(self, operation: Operation, name: str) -> Connection:
        """Raises NoPeerError."""
        connection = self._connections[operation.outcome()]
        connection.peer = name
        return connection

    def accept(self, timeout: float | None = None, wait: int = ADAPTIVE) -> Connection:
        """The next connection that somebody made to a name of ours."""
        self._await(lambda: bool(self._incoming), timeout, wait)
        return self._incoming.popleft()

    def waited_for(self) -> bool:
        """Whether `accept` would return at once."""
        return bool(self._incoming)

    def wait(self, timeout: float | None = None, wait: int = ADAPTIVE) -> bool:
        """Wait until something has come for any connection, or an operation is done; False after `timeout` seconds. For
        who serves many peers: look at their `pending` then."""
        if any(each.pending for each in self._connections.values()) or self._incoming:
            return True
        try:
            self._dispatch(*self.channel.recv_tagged(timeout, wait))
        except DeadlineError:
            return False
        return True

    def register(self, place: Place, rights: Right, only: Connection | None = None) -> Region:
        """Let peers (or `only` one) use `place`, until `release`. Raises UsageError when that one is closed."""
        number = 0 if only is None else only.number
        if only is not None and not number:
            raise UsageError(f"the connection to {only.peer} is closed", "register for one that is open")
        body = struct.pack("<QQI", place.offset, place.size, rights)
        handle = self._value(Kind.REGISTER, number, body, "register")
        return Region(handle, place.offset, place.size, rights)

    def release(self, region: Region) -> None:
        """From now on nobody reads or writes it. Raises RegionError when it was released before."""
        self._value(Kind.RELEASE, 0, struct.pack("<Q", region.handle), "release")

    def close(self) -> None:
        """Leave the engine; connections end. Idempotent."""
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- in somebody else's loop ------------------------------------------------------------------------------

    def fileno(self) -> int:
        """A descriptor for `select` and the like: readable when something has come since `arm`."""
        return self.channel.fileno()

    def arm(self) -> bool:
        """Before waiting on `fileno()`. False: something is here already, `poll` first."""
        return self.channel.arm_recv()

    def poll(self) -> int:
        """Take in what is here, without waiting: operations become `done`, connections `pending`. How much it was."""
        self.channel.drain_bell()
        count = 0
        while self._listen(0):
            count += 1
        return count

    # -- how --------------------------------------------------------------------------------------------------

    def _call(
        self,
        kind: int,
        connection: int,
        body: bytes,
        what: str,
        stream: int = 0,
        timeout: float | None = 10.0,
        wait: int = ADAPTIVE,
    ) -> bytes:
        """Do it and wait: the whole completion. The way that most operations go, so it is short."""
        self._tag = tag = self._tag + 1
        channel = self.channel
        command = HEAD.pack(kind, 0, stream, connection) + body
        try:
            channel.send(command, tag, 0)
        except FullError:
            self._press(command, tag, timeout, wait)
        while True:
            came, answer = channel.recv_tagged(timeout, wait)
            if came == tag:
                if answer[1]:
                    raise failure(answer[1], what)
                return answer
            self._dispatch(came, answer)

    def _value(
        self,
        kind: int,
        connection: int,
        body: bytes,
        what: str,
        timeout: float | None = 10.0,
        wait: int = ADAPTIVE,
    ) -> int:
        value: int = ANSWER.unpack_from(self._call(kind, connection, body, what, 0, timeout, wait))[4]
        return value

    def _begin(self, kind: int, connection: int, body: bytes, what: str, stream: int = 0) -> Operation:
        self._tag = tag = self._tag + 1
        operation = self._pending[tag] = Operation(self, tag, what)
        command = HEAD.pack(kind, 0, stream, connection) + body
        try:
            self.channel.send(command, tag, 0)
        except FullError:
            self._press(command, tag, None, ADAPTIVE)
        return operation

    def _press(self, command: bytes, tag: int, timeout: float | None, wait: int) -> None:
        """Send a command for which there was no room: the engine takes none while it has no room for their
        completions, so those that are here are taken in. Raises DeadlineError."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            while self._listen(0, wait):
                pass
            try:
                self.channel.send(command, tag, _SLICE, wait)
                return
            except (FullError, DeadlineError):
                if end is not None and time.monotonic() >= end:
                    raise

    def _await(self, until: Callable[[], bool], timeout: float | None, wait: int) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while not until():
            left = None if end is None else max(0.0, end - time.monotonic())
            self._dispatch(*self.channel.recv_tagged(left, wait))

    def _listen(self, seconds: float, wait: int = ADAPTIVE) -> bool:
        """Take in what comes within `seconds`, the first of it; whether anything came."""
        try:
            self._dispatch(*self.channel.recv_tagged(seconds, wait))
        except DeadlineError:
            return False
        return True

    def _dispatch(self, tag: int, answer: bytes) -> None:
        kind, status, stream, number, value = ANSWER.unpack_from(answer)
        operation = self._pending.pop(tag, None) if tag else None
        if operation is not None:
            operation.finish(status, value, answer[ANSWER.size :])
            if kind == Kind.CONNECT and not status:
                self._connection(number, "")
        elif kind == Kind.DATAGRAM:
            if number in self._connections:
                self._connections[number]._datagrams.append(answer[ANSWER.size :])
        elif kind == Kind.MESSAGE:
            if number in self._connections:
                self._connections[number]._inbox.append(Message(answer[ANSWER.size :], stream))
        elif kind == Kind.CONNECTED:
            self._incoming.append(self._connection(number, answer[ANSWER.size :].decode()))
        elif kind == Kind.CONNECT and not status:
            # Who asked for it has given up waiting.
            self._begin(Kind.CLOSE, number, b"", "close")
        elif kind == Kind.REGISTER and not status:
            self._begin(Kind.RELEASE, 0, struct.pack("<Q", value), "release")
        elif kind == Kind.CLOSED and number in self._connections:
            self._connections[number].closed = True

    def _connection(self, number: int, peer: str) -> Connection:
        connection = self._connections[number] = Connection(self, number, peer)
        return connection

    def _part(self, connection: Connection) -> None:
        # Somebody else may have the number next.
        number, connection.number = connection.number, 0
        if self._connections.pop(number, None) is not None:
            self._call(Kind.CLOSE, number, b"", "close")
