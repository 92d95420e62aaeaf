"""What a new kernel has to know of an old one: every part as plain data, in memory that outlives the process.

There are two copies, each a memfd: a header (magic, format, CRC-32, counter, length) and msgpack. The older one is
written, its header last, so that a death at any instruction leaves one that is whole. `Outbox` sees to it that nobody
hears of a change before it is recorded.
"""

from __future__ import annotations

import asyncio
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from snap.dataplane.errors import ResourceError, SchemaError, StateDamagedError
from snap.ipc import faults
from snap.ipc.seqpacket import close_all

from .store import Store

NAME: Final = "kernel"
FORMAT: Final = 1
_MAGIC: Final = b"SNAPKREC"
_HEADER: Final = struct.Struct("<8sIIQQ")
_LARGEST: Final = 1 << 30


class Record:
    """`parts` give plain built-ins (of msgpack's types) by name; `write` stores those that changed, all in one."""

    def __init__(self, fds: Sequence[int], counter: int) -> None:
        self._fds, self._counter = list(fds), counter
        self._encoder = msgspec.msgpack.Encoder()
        self._last: dict[str, bytes] = {}
        self.parts: dict[str, Callable[[], Any]] = {}

    @classmethod
    def create(cls, store: Store) -> Record:
        """Raises ResourceError."""
        fds: list[int] = []
        try:
            for _ in range(2):
                fds.append(os.memfd_create("snap-kernel", os.MFD_CLOEXEC))
        except OSError as error:
            close_all(fds)
            raise ResourceError(f"cannot make the kernel's record: {error.strerror}") from error
        store.put(NAME, fds)
        return cls(fds, 0)

    @property
    def fds(self) -> Sequence[int]:
        return self._fds

    @classmethod
    def adopt(cls, fds: Sequence[int]) -> tuple[Record, dict[str, Any]]:
        """Go on with a record that an earlier kernel left, and what is in it. The descriptors are the record's now.

        Raises SchemaError when a newer kernel wrote it, StateDamagedError when no copy is whole; then they are the
        caller's still, and what is in there is untouched.
        """
        counter, data = load(fds)
        return cls(fds, counter), data

    def write(self) -> bool:
        """Write what changed; False: nothing did. Raises ResourceError when memory is short."""
        encoded = {name: self._encoder.encode(part()) for name, part in self.parts.items()}
        if encoded == self._last:
            return False
        body = self._encoder.encode({name: msgspec.Raw(data) for name, data in encoded.items()})
        counter = self._counter + 1
        fd = self._fds[counter % 2]
        sealed = _sum(counter, body)
        try:
            # Torn anywhere before the header is whole, the sum does not match, and the other copy counts.
            os.pwrite(fd, body, _HEADER.size)
            os.pwrite(fd, _HEADER.pack(_MAGIC, FORMAT, sealed, counter, len(body)), 0)
        except OSError as error:
            raise ResourceError(
                f"cannot write the kernel's record: {error.strerror}", "free memory: see `snapctl status`"
            ) from error
        self._counter, self._last = counter, encoded
        faults.reach("kernel.recorded")
        return True

    def close(self) -> None:
        close_all(self._fds)
        self._fds = []


def load(fds: Sequence[int]) -> tuple[int, dict[str, Any]]:
    """Counter and contents of the newer copy that is whole. Raises SchemaError, StateDamagedError."""
    found = [copy for copy in map(_read, fds) if copy is not None]
    if not found:
        raise StateDamagedError(
            "neither copy of the kernel's record is whole", "end `snap: keeper`, and start the kernel afresh"
        )
    counter, format, body = max(found)
    if format > FORMAT:
        raise SchemaError(
            f"the kernel's record has format {format}; this kernel knows formats up to {FORMAT}",
            "start the newer kernel again: it goes on from there",
        )
    try:
        data: dict[str, Any] = msgspec.msgpack.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateDamagedError(f"the kernel's record cannot be decoded: {error}") from error
    return counter, data


def _read(fd: int) -> tuple[int, int, bytes] | None:
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        return None
    magic, format, sealed, counter, length = _HEADER.unpack(header)
    if magic != _MAGIC or length > _LARGEST:
        return None
    body = os.pread(fd, length, _HEADER.size)
    return (counter, format, body) if len(body) == length and _sum(counter, body) == sealed else None


def _sum(counter: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<QQ", counter, len(body))))


class Outbox:
    """Lets go of what connections want to send, once per round of the loop, after what it tells of was recorded."""

    def __init__(self, commit: Callable[[], object] = lambda: None) -> None:
        self.commit = commit
        self._due: dict[Callable[[], None], None] = {}
        self._scheduled: asyncio.Handle | None = None

    def touch(self) -> None:
        """Something changed: record it by the next round."""
        if self._scheduled is None:
            self._scheduled = asyncio.get_running_loop().call_soon(self.flush)

    def add(self, release: Callable[[], None]) -> None:
        """Call `release` after the next commit, once."""
        self._due[release] = None
        self.touch()

    def flush(self) -> None:
        """Commit, and let go of everything, now."""
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        self.commit()
        due, self._due = self._due, {}
        for release in due:
            release()

    def close(self) -> None:
        """Let go of what waits; nothing is recorded any more."""
        self.commit = lambda: None
        self.flush()
