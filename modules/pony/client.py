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
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import Buffer

from snap.dataplane._native import ADAPTIVE
from snap.dataplane.errors import DeadlineError, UsageError
from snap.ipc.channel import Channel

from .errors import BusyError, failure
from .places import Place, Places

if TYPE_CHECKING:
    import numpy.typing as npt

    from snap.ipc import Client

SERVICE: Final = "pony"
SMALL: Final = 4096
"""Bytes of the longest message that needs no place posted for it."""

BURST: Final = 1 << 16
"""Operations of one burst."""

INLINE_READ: Final = 992
"""Bytes of the longest result that needs no place in the own arena."""

INDIRECTION: Final = struct.Struct("<QQQ")
"""An entry of a table for indirect reads, or the pointer of an entry that is scanned: handle, offset, length."""

_INLINE: Final = (1 << 64) - 1
_HEAD: Final = struct.Struct("<BBHI")
_ANSWER: Final = struct.Struct("<BBHIQ")
_EVENT: Final = 0x80
# Seconds in which an engine that lives has answered, even one that is upgraded meanwhile.
_ANSWERED: Final = 10.0
# Seconds between two attempts to send to somebody who has no room.
_FIRST_PAUSE: Final = 20e-6
_LAST_PAUSE: Final = 0.01


class _Kind(IntEnum):
    BIND, CONNECT, CLOSE, SEND, SEND_ARENA, POST, REGISTER, RELEASE = range(1, 9)
    READ, WRITE, COMPARE_SWAP, FETCH_ADD, INDIRECT, SCAN, READS, WRITES, INDIRECTS = range(9, 18)
    SEND_DATAGRAM = 18
    CONNECTED, MESSAGE, POSTED, CLOSED, DATAGRAM = range(_EVENT | 1, _EVENT | 6)


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


@dataclass(frozen=True)
class Message:
    data: bytes
    stream: int = 0


class Operation:
    """Something under way. `value` and `data` are its result when `done`."""

    __slots__ = ("_pony", "data", "done", "scratch", "status", "tag", "value", "what")

    def __init__(self, pony: Pony, tag: int, what: str) -> None:
        self._pony, self.tag, self.what = pony, tag, what
        self.done = False
        self.status = self.value = 0
        self.data = b""
        self.scratch: Place | None = None
        """Memory that the engine reads until the end."""

    def result(self, timeout: float | None = None, wait: int = ADAPTIVE) -> int:
        """Wait for the end; the value. Raises PonyError as it ended, DeadlineError after `timeout` seconds: the
        operation is then still under way."""
        self._pony._await(lambda: self.done, timeout, wait)
        if self.status:
            raise failure(self.status, self.what, self.value)
        return self.value


class Connection:
    """One end of a connection to another application. Messages of one `stream` arrive in order; streams do not wait for
    each other. Regions of the peer are named by their handles."""

    def __init__(self, pony: Pony, number: int, peer: str) -> None:
        self.number, self.peer = number, peer
        self.closed = False
        self._pony = pony
        self._inbox: deque[Message] = deque()
        self._datagrams: deque[bytes] = deque()

    @property
    def pending(self) -> bool:
        """Whether `recv` or `recv_datagram` would return, or raise, at once."""
        return bool(self._inbox or self._datagrams) or self.closed

    # -- messages ---------------------------------------------------------------------------------------------

    def send(self, data: Buffer, stream: int = 0, timeout: float | None = 10.0, wait: int = ADAPTIVE) -> None:
        """Send up to `SMALL` bytes; returns when the engine has them for good. Raises TooLongError, ClosedByPeerError,
        BusyError when the peer has not taken the last 64 for `timeout` seconds."""
        raw = bytes(data)
        end = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                self._pony._call(_Kind.SEND, self.number, raw, "send", stream, _ANSWERED, wait)
                return
            except BusyError:
                if end is not None and time.monotonic() + pause > end:
                    raise
            # Nothing says when there is room again; what comes meanwhile is taken in.
            self._pony._listen(pause, wait)
            pause = min(2 * pause, _LAST_PAUSE)

    def begin_send(self, data: Buffer, stream: int = 0) -> Operation:
        return self._pony._begin(_Kind.SEND, self.number, bytes(data), "send", stream)

    def begin_send_from(self, place: Place, size: int | None = None, stream: int = 0) -> Operation:
        """Send the first `size` bytes of `place` to the next place that the peer posts; it must stay as it is until
        then."""
        body = struct.pack("<QQ", place.offset, place.size if size is None else size)
        return self._pony._begin(_Kind.SEND_ARENA, self.number, body, "send", stream)

    def begin_receive_into(self, place: Place) -> Operation:
        """Post `place` for the next large message; its result is the message's length."""
        body = struct.pack("<QQ", place.offset, place.size)
        return self._pony._begin(_Kind.POST, self.number, body, "receive")

    def recv(self, timeout: float | None = None, wait: int = ADAPTIVE) -> Message:
        """The next small message. Raises DeadlineError, ClosedByPeerError when there will be none."""
        if not self._inbox:
            self._pony._await(lambda: bool(self._inbox) or self.closed, timeout, wait)
        if self._inbox:
            return self._inbox.popleft()
        raise failure(10, "receive")

    def send_datagram(self, data: Buffer) -> None:
        """Send up to `SMALL` bytes (to another host: what fits a packet) that may overtake others, and are lost when
        the peer has no room for them or an engine dies. Raises TooLongError, ClosedByPeerError."""
        self._pony._call(_Kind.SEND_DATAGRAM, self.number, bytes(data), "send a datagram")

    def recv_datagram(self, timeout: float | None = None, wait: int = ADAPTIVE) -> bytes:
        """The next datagram. Raises DeadlineError, ClosedByPeerError when there will be none."""
        if not self._datagrams:
            self._pony._await(lambda: bool(self._datagrams) or self.closed, timeout, wait)
        if self._datagrams:
            return self._datagrams.popleft()
        raise failure(10, "receive")

    # -- the peer's memory ------------------------------------------------------------------------------------

    def read(
        self, handle: int, offset: int, size: int, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> bytes:
        """Up to `INLINE_READ` bytes of a region of the peer."""
        body = struct.pack("<QQQI", handle, offset, _INLINE, size)
        return self._pony._call(_Kind.READ, self.number, body, "read", 0, timeout, wait)[16:]

    def begin_read_into(self, handle: int, offset: int, place: Place) -> Operation:
        """Read as much as `place` holds into it; the result is its length."""
        body = struct.pack("<QQQI", handle, offset, place.offset, place.size)
        return self._pony._begin(_Kind.READ, self.number, body, "read")

    def write(
        self, handle: int, offset: int, data: Buffer, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> None:
        """Write up to `SMALL` bytes into a region of the peer."""
        raw = bytes(data)
        body = struct.pack("<QQQQ", handle, offset, _INLINE, len(raw)) + raw
        self._pony._call(_Kind.WRITE, self.number, body, "write", 0, timeout, wait)

    def begin_write_from(self, handle: int, offset: int, place: Place) -> Operation:
        body = struct.pack("<QQQQ", handle, offset, place.offset, place.size)
        return self._pony._begin(_Kind.WRITE, self.number, body, "write")

    def compare_swap(
        self,
        handle: int,
        offset: int,
        expected: int,
        desired: int,
        timeout: float | None = None,
        wait: int = ADAPTIVE,
    ) -> int:
        """Replace the 8-byte word at `offset` if it is `expected`; the word that was there."""
        body = struct.pack("<QQQQ", handle, offset, expected, desired)
        return self._pony._value(_Kind.COMPARE_SWAP, self.number, body, "compare and swap", timeout, wait)

    def fetch_add(
        self, handle: int, offset: int, add: int, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> int:
        """Add to the 8-byte word at `offset` (modulo 2**64); the word that was there."""
        body = struct.pack("<QQQ", handle, offset, add & _INLINE)
        return self._pony._value(_Kind.FETCH_ADD, self.number, body, "fetch and add", timeout, wait)

    def read_indirect(
        self, handle: int, index: int, size: int, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> bytes:
        """What entry `index` of the table in that region (see `INDIRECTION`) points to, at most `size` bytes."""
        body = struct.pack("<QQQI", handle, index, _INLINE, size)
        return self._pony._call(_Kind.INDIRECT, self.number, body, "indirect read", 0, timeout, wait)[16:]

    def scan_and_read(
        self,
        handle: int,
        needle: int,
        size: int,
        *,
        entries: int,
        stride: int,
        pointer: int = 8,
        offset: int = 0,
        timeout: float | None = None,
        wait: int = ADAPTIVE,
    ) -> bytes:
        """Of `entries` entries of `stride` bytes from `offset` on, the first whose 8-byte word is `needle`: what its
        indirection at byte `pointer` points to, at most `size` bytes. Raises NoMatchError."""
        body = struct.pack("<QQQQIHHH", handle, offset, needle, _INLINE, size, entries, stride, pointer)
        return self._pony._call(_Kind.SCAN, self.number, body, "scan and read", 0, timeout, wait)[16:]

    def begin_read_indirect_into(self, handle: int, index: int, place: Place) -> Operation:
        """As `read_indirect`, as much as `place` holds; the result is the length."""
        body = struct.pack("<QQQI", handle, index, place.offset, place.size)
        return self._pony._begin(_Kind.INDIRECT, self.number, body, "indirect read")

    def begin_scan_and_read_into(
        self,
        handle: int,
        needle: int,
        place: Place,
        *,
        entries: int,
        stride: int,
        pointer: int = 8,
        offset: int = 0,
    ) -> Operation:
        """As `scan_and_read`, as much as `place` holds; the result is the length, with the entry's index << 32."""
        body = struct.pack(
            "<QQQQIHHH", handle, offset, needle, place.offset, place.size, entries, stride, pointer
        )
        return self._pony._begin(_Kind.SCAN, self.number, body, "scan and read")

    # -- bursts -----------------------------------------------------------------------------------------------

    def begin_reads(self, handle: int, offsets: npt.NDArray[Any], size: int, into: Place) -> Operation:
        """Read `size` bytes at each of `offsets` (u8, at most `BURST`), packed into `into`. The result is how many; an
        error has how many came before it as `done`."""
        return self._burst(_Kind.READS, handle, offsets, "<u8", size, into)

    def begin_writes(self, handle: int, offsets: npt.NDArray[Any], size: int, from_: Place) -> Operation:
        """Write `size` bytes, packed in `from_`, at each of `offsets`."""
        return self._burst(_Kind.WRITES, handle, offsets, "<u8", size, from_)

    def begin_reads_indirect(
        self, handle: int, indices: npt.NDArray[Any], size: int, into: Place
    ) -> Operation:
        """Read what each of the entries (u4) of a table points to, at most `size` bytes, `size` bytes apart."""
        return self._burst(_Kind.INDIRECTS, handle, indices, "<u4", size, into)

    def _burst(
        self, kind: _Kind, handle: int, numbers: npt.NDArray[Any], dtype: str, size: int, place: Place
    ) -> Operation:
        import numpy as np

        packed = np.ascontiguousarray(numbers, dtype)
        if packed.size > BURST or packed.size * size > place.size:
            raise UsageError(
                f"{packed.size} times {size} bytes do not fit {place.size}", f"at most {BURST} at once"
            )
        scratch = self._pony.place(max(packed.nbytes, 1))
        scratch.array(dtype)[: packed.size] = packed
        body = struct.pack("<QQQII", handle, place.offset, scratch.offset, size, packed.size)
        operation = self._pony._begin(kind, self.number, body, kind.name.lower())
        operation.scratch = scratch
        return operation

    # -- the end ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Both ends; idempotent. Also for a connection that the peer closed, which the engine keeps until then."""
        self.closed = True
        self._pony._part(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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
        self._call(_Kind.BIND, 0, name.encode(), f"bind {name!r}")

    def connect(self, name: str, timeout: float | None = 10.0) -> Connection:
        """Raises NoPeerError."""
        answer = self._call(_Kind.CONNECT, 0, name.encode(), f"connect to {name!r}", 0, timeout)
        return self._connection(_ANSWER.unpack_from(answer)[3], name)

    def accept(self, timeout: float | None = None, wait: int = ADAPTIVE) -> Connection:
        """The next connection that somebody made to a name of ours."""
        self._await(lambda: bool(self._incoming), timeout, wait)
        return self._incoming.popleft()

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
        """Let peers (or `only` one) use `place`, until `release`."""
        number = 0 if only is None else only.number
        body = struct.pack("<QQI", place.offset, place.size, rights)
        handle = self._value(_Kind.REGISTER, number, body, "register")
        return Region(handle, place.offset, place.size, rights)

    def release(self, region: Region) -> None:
        """From now on nobody reads or writes it. Raises RegionError when it was released before."""
        self._value(_Kind.RELEASE, 0, struct.pack("<Q", region.handle), "release")

    def close(self) -> None:
        """Leave the engine; connections end. Idempotent."""
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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
        channel.send(_HEAD.pack(kind, 0, stream, connection) + body, tag, timeout, wait)
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
        value: int = _ANSWER.unpack_from(self._call(kind, connection, body, what, 0, timeout, wait))[4]
        return value

    def _begin(self, kind: int, connection: int, body: bytes, what: str, stream: int = 0) -> Operation:
        self._tag = tag = self._tag + 1
        operation = self._pending[tag] = Operation(self, tag, what)
        self.channel.send(_HEAD.pack(kind, 0, stream, connection) + body, tag)
        return operation

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
        kind, status, stream, number, value = _ANSWER.unpack_from(answer)
        operation = self._pending.pop(tag, None) if tag else None
        if operation is not None:
            operation.done, operation.status, operation.value = True, status, value
            operation.data = answer[_ANSWER.size :]
            if operation.scratch is not None:
                operation.scratch.free()
        elif kind == _Kind.DATAGRAM:
            if number in self._connections:
                self._connections[number]._datagrams.append(answer[_ANSWER.size :])
        elif kind == _Kind.MESSAGE:
            if number in self._connections:
                self._connections[number]._inbox.append(Message(answer[_ANSWER.size :], stream))
        elif kind == _Kind.CONNECTED:
            self._incoming.append(self._connection(number, answer[_ANSWER.size :].decode()))
        elif kind == _Kind.CONNECT and not status:
            # Who asked for it has given up waiting.
            self._begin(_Kind.CLOSE, number, b"", "close")
        elif kind == _Kind.CLOSED and number in self._connections:
            self._connections[number].closed = True

    def _connection(self, number: int, peer: str) -> Connection:
        connection = self._connections[number] = Connection(self, number, peer)
        return connection

    def _part(self, connection: Connection) -> None:
        if self._connections.pop(connection.number, None) is not None:
            self._call(_Kind.CLOSE, connection.number, b"", "close")
