"""One end of a connection, and what is under way over it."""

from __future__ import annotations

import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from typing_extensions import Buffer

from snap.dataplane._native import ADAPTIVE
from snap.dataplane.errors import UsageError

from .commands import BURST, INLINE, Kind
from .errors import BusyError, Status, failure
from .places import Place

if TYPE_CHECKING:
    import numpy.typing as npt

    from .client import Pony

# Seconds in which an engine that lives has answered, even one that is upgraded meanwhile.
_ANSWERED: Final = 10.0
# Seconds between two attempts to send to somebody who has no room.
_FIRST_PAUSE: Final = 20e-6
_LAST_PAUSE: Final = 0.01


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

    def finish(self, status: int, value: int, data: bytes) -> None:
        self.done, self.status, self.value, self.data = True, status, value, data
        if self.scratch is not None:
            self.scratch.free()

    def outcome(self) -> int:
        """The value of an operation that is done. Raises PonyError as it ended."""
        if self.status:
            raise failure(self.status, self.what, self.value)
        return self.value

    def result(self, timeout: float | None = None, wait: int = ADAPTIVE) -> int:
        """Wait for the end; the value. Raises PonyError as it ended, DeadlineError after `timeout` seconds: the
        operation is then still under way."""
        self._pony._await(lambda: self.done, timeout, wait)
        return self.outcome()


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
                self._pony._call(Kind.SEND, self.number, raw, "send", stream, _ANSWERED, wait)
                return
            except BusyError:
                if end is not None and time.monotonic() + pause > end:
                    raise
            # Nothing says when there is room again; what comes meanwhile is taken in.
            self._pony._listen(pause, wait)
            pause = min(2 * pause, _LAST_PAUSE)

    def begin_send(self, data: Buffer, stream: int = 0) -> Operation:
        return self._pony._begin(Kind.SEND, self.number, bytes(data), "send", stream)

    def begin_send_from(self, place: Place, size: int | None = None, stream: int = 0) -> Operation:
        """Send the first `size` bytes of `place` to the next place that the peer posts; it must stay as it is until
        then."""
        body = struct.pack("<QQ", place.offset, place.size if size is None else size)
        return self._pony._begin(Kind.SEND_ARENA, self.number, body, "send", stream)

    def begin_receive_into(self, place: Place) -> Operation:
        """Post `place` for the next large message; its result is the message's length."""
        body = struct.pack("<QQ", place.offset, place.size)
        return self._pony._begin(Kind.POST, self.number, body, "receive")

    def recv(self, timeout: float | None = None, wait: int = ADAPTIVE) -> Message:
        """The next small message. Raises DeadlineError, ClosedByPeerError when there will be none."""
        if not self._inbox:
            self._pony._await(lambda: bool(self._inbox) or self.closed, timeout, wait)
        return self.take()

    def take(self) -> Message:
        """The next small message, which is here. Raises ClosedByPeerError when there is none."""
        if self._inbox:
            return self._inbox.popleft()
        raise failure(Status.CLOSED, "receive")

    def send_datagram(self, data: Buffer) -> None:
        """Send up to `SMALL` bytes (to another host: what fits a packet) that may overtake others, and are lost when
        the peer has no room for them or an engine dies. Raises TooLongError, ClosedByPeerError."""
        self._pony._call(Kind.SEND_DATAGRAM, self.number, bytes(data), "send a datagram")

    def recv_datagram(self, timeout: float | None = None, wait: int = ADAPTIVE) -> bytes:
        """The next datagram. Raises DeadlineError, ClosedByPeerError when there will be none."""
        if not self._datagrams:
            self._pony._await(lambda: bool(self._datagrams) or self.closed, timeout, wait)
        if self._datagrams:
            return self._datagrams.popleft()
        raise failure(Status.CLOSED, "receive")

    # -- the peer's memory ------------------------------------------------------------------------------------

    def read(
        self, handle: int, offset: int, size: int, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> bytes:
        """Up to `INLINE_READ` bytes of a region of the peer."""
        body = struct.pack("<QQQI", handle, offset, INLINE, size)
        return self._pony._call(Kind.READ, self.number, body, "read", 0, timeout, wait)[16:]

    def begin_read(self, handle: int, offset: int, size: int) -> Operation:
        """`read`; the bytes are the operation's `data`."""
        body = struct.pack("<QQQI", handle, offset, INLINE, size)
        return self._pony._begin(Kind.READ, self.number, body, "read")

    def begin_read_into(self, handle: int, offset: int, place: Place) -> Operation:
        """Read as much as `place` holds into it; the result is its length."""
        body = struct.pack("<QQQI", handle, offset, place.offset, place.size)
        return self._pony._begin(Kind.READ, self.number, body, "read")

    def write(
        self, handle: int, offset: int, data: Buffer, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> None:
        """Write up to `SMALL` bytes into a region of the peer."""
        raw = bytes(data)
        body = struct.pack("<QQQQ", handle, offset, INLINE, len(raw)) + raw
        self._pony._call(Kind.WRITE, self.number, body, "write", 0, timeout, wait)

    def begin_write(self, handle: int, offset: int, data: Buffer) -> Operation:
        raw = bytes(data)
        body = struct.pack("<QQQQ", handle, offset, INLINE, len(raw)) + raw
        return self._pony._begin(Kind.WRITE, self.number, body, "write")

    def begin_write_from(self, handle: int, offset: int, place: Place) -> Operation:
        body = struct.pack("<QQQQ", handle, offset, place.offset, place.size)
        return self._pony._begin(Kind.WRITE, self.number, body, "write")

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
        return self._pony._value(Kind.COMPARE_SWAP, self.number, body, "compare and swap", timeout, wait)

    def fetch_add(
        self, handle: int, offset: int, add: int, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> int:
        """Add to the 8-byte word at `offset` (modulo 2**64); the word that was there."""
        body = struct.pack("<QQQ", handle, offset, add & INLINE)
        return self._pony._value(Kind.FETCH_ADD, self.number, body, "fetch and add", timeout, wait)

    def begin_compare_swap(self, handle: int, offset: int, expected: int, desired: int) -> Operation:
        body = struct.pack("<QQQQ", handle, offset, expected, desired)
        return self._pony._begin(Kind.COMPARE_SWAP, self.number, body, "compare and swap")

    def begin_fetch_add(self, handle: int, offset: int, add: int) -> Operation:
        body = struct.pack("<QQQ", handle, offset, add & INLINE)
        return self._pony._begin(Kind.FETCH_ADD, self.number, body, "fetch and add")

    def read_indirect(
        self, handle: int, index: int, size: int, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> bytes:
        """What entry `index` of the table in that region (see `INDIRECTION`) points to, at most `size` bytes."""
        body = struct.pack("<QQQI", handle, index, INLINE, size)
        return self._pony._call(Kind.INDIRECT, self.number, body, "indirect read", 0, timeout, wait)[16:]

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
        body = struct.pack("<QQQQIHHH", handle, offset, needle, INLINE, size, entries, stride, pointer)
        return self._pony._call(Kind.SCAN, self.number, body, "scan and read", 0, timeout, wait)[16:]

    def begin_read_indirect_into(self, handle: int, index: int, place: Place) -> Operation:
        """As `read_indirect`, as much as `place` holds; the result is the length."""
        body = struct.pack("<QQQI", handle, index, place.offset, place.size)
        return self._pony._begin(Kind.INDIRECT, self.number, body, "indirect read")

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
        return self._pony._begin(Kind.SCAN, self.number, body, "scan and read")

    # -- bursts -----------------------------------------------------------------------------------------------

    def begin_reads(self, handle: int, offsets: npt.NDArray[Any], size: int, into: Place) -> Operation:
        """Read `size` bytes at each of `offsets` (u8, at most `BURST`), packed into `into`. The result is how many; an
        error has how many came before it as `done`."""
        return self._burst(Kind.READS, handle, offsets, "<u8", size, into)

    def begin_writes(self, handle: int, offsets: npt.NDArray[Any], size: int, from_: Place) -> Operation:
        """Write `size` bytes, packed in `from_`, at each of `offsets`."""
        return self._burst(Kind.WRITES, handle, offsets, "<u8", size, from_)

    def begin_reads_indirect(
        self, handle: int, indices: npt.NDArray[Any], size: int, into: Place
    ) -> Operation:
        """Read what each of the entries (u4) of a table points to, at most `size` bytes, `size` bytes apart."""
        return self._burst(Kind.INDIRECTS, handle, indices, "<u4", size, into)

    def _burst(
        self, kind: Kind, handle: int, numbers: npt.NDArray[Any], dtype: str, size: int, place: Place
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
