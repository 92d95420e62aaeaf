"""What the sender says to the writer: one frame a chunk."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

FIRST: Final = 1
LAST: Final = 2
END: Final = 4
# Of each end's pool: eight chunks. What is on its way covers a gap up, so it is little.
POOL_BYTES: Final = 512 * 1024

# Sequence number, flags, bytes of the name that follows (only with FIRST); then the file's bytes.
HEADER: Final = struct.Struct("<QBxH")


class Frame(NamedTuple):
    seq: int
    flags: int
    name: bytes
    data: memoryview


def head(seq: int, flags: int, name: bytes = b"") -> bytes:
    """What stands before a chunk's bytes."""
    return HEADER.pack(seq, flags, len(name)) + name


def parse(view: memoryview) -> Frame:
    """Raises ValueError for what `head` cannot have made."""
    if len(view) < HEADER.size:
        raise ValueError(f"frame of {len(view)} bytes is shorter than its header")
    seq, flags, length = HEADER.unpack_from(view)
    body = HEADER.size + length
    if len(view) < body:
        raise ValueError(f"frame {seq} ends within its name")
    return Frame(seq, flags, bytes(view[HEADER.size : body]), view[body:])
