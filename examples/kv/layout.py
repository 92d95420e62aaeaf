"""What server and clients agree on: the memory that is read, and the messages."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from hashlib import blake2b
from typing import Final, NamedTuple, Self
from zlib import crc32

from snap.ipc import UsageError
from snap.modules.pony import INDIRECTION, INLINE_READ

SLOT: Final = 8 + INDIRECTION.size
"""Bytes of a slot of the index: a hash, and the pointer to a cell."""

SET: Final = 1
DELETE: Final = 2
REQUEST: Final = struct.Struct("<QBH")
"""Number of the request, SET or DELETE, bytes of the key; key and value follow."""

ANSWER: Final = struct.Struct("<QBQ")
"""Number of the request, 0 or 1 + the index in `REFUSALS`, version (of a DELETE: 0 when there was nothing).
The text of a refusal follows."""

_CHECK: Final = struct.Struct("<I")
_HEAD: Final = struct.Struct("<IQ")
_RECORD: Final = struct.Struct("<QHH")
_LAYOUT: Final = struct.Struct("<IHIHBQ")


class Record(NamedTuple):
    """`version` grows with each SET to the store, so that of a key never goes back."""

    version: int
    value: bytes


@dataclass(frozen=True)
class Layout:
    """`buckets` of `slots` each, up to `capacity` entries in cells of `cell` bytes. Of a hash the lowest `bits`
    count. `handle` is that of the index. Raises UsageError."""

    buckets: int = 1024
    slots: int = 8
    capacity: int = 4096
    cell: int = 512
    bits: int = 64
    handle: int = 0

    def __post_init__(self) -> None:
        least = min(self.buckets, self.slots, self.capacity, self.bits)
        if least < 1 or self.bits > 64 or self.cell % 8 or not 64 <= self.cell <= INLINE_READ:
            raise UsageError(f"there is no {self}", f"cells are 64 to {INLINE_READ} bytes, a multiple of 8")

    def pack(self) -> bytes:
        return _LAYOUT.pack(*astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_LAYOUT.unpack(data))

    def hash(self, key: bytes) -> int:
        """Never 0, which is an empty slot."""
        whole = int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
        return whole & (1 << self.bits) - 1 or 1

    def bucket(self, hash: int) -> int:
        """Offset of its first slot in the index, in bytes."""
        return hash % self.buckets * self.slots * SLOT


def encode(hash: int, records: dict[bytes, Record]) -> bytes:
    """The entry of a hash: all keys that have it, so that a scan, which ends at the first match, finds each of them."""
    body = b"".join(
        _RECORD.pack(record.version, len(key), len(record.value)) + key + record.value
        for key, record in records.items()
    )
    checked = _HEAD.pack(len(body), hash) + body
    return _CHECK.pack(crc32(checked)) + checked


def decode(cell: bytes, hash: int) -> dict[bytes, Record] | None:
    """The records of an entry; None when it is torn, or meanwhile of another hash."""
    start = _CHECK.size + _HEAD.size
    size, found = _HEAD.unpack_from(cell, _CHECK.size)
    checked = cell[_CHECK.size : start + size]
    if found != hash or _CHECK.unpack_from(cell) != (crc32(checked),):
        return None
    records: dict[bytes, Record] = {}
    while start < _CHECK.size + len(checked):
        version, key, value = _RECORD.unpack_from(cell, start)
        start += _RECORD.size
        records[cell[start : start + key]] = Record(version, cell[start + key : start + key + value])
        start += key + value
    return records
