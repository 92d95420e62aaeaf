"""What an application and its engine say to each other, as `dataplane/src/pony/command.rs` has it."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

SERVICE: Final = "pony"
SMALL: Final = 4096
"""Bytes of the longest message that needs no place posted for it."""

BURST: Final = 1 << 16
"""Operations of one burst."""

INLINE_READ: Final = 992
"""Bytes of the longest result that needs no place in the own arena."""

INDIRECTION: Final = struct.Struct("<QQQ")
"""An entry of a table for indirect reads, or the pointer of an entry that is scanned: handle, offset, length."""

INLINE: Final = (1 << 64) - 1
HEAD: Final = struct.Struct("<BBHI")
ANSWER: Final = struct.Struct("<BBHIQ")
EVENT: Final = 0x80


class Kind(IntEnum):
    BIND, CONNECT, CLOSE, SEND, SEND_ARENA, POST, REGISTER, RELEASE = range(1, 9)
    READ, WRITE, COMPARE_SWAP, FETCH_ADD, INDIRECT, SCAN, READS, WRITES, INDIRECTS = range(9, 18)
    SEND_DATAGRAM = 18
    CONNECTED, MESSAGE, POSTED, CLOSED, DATAGRAM = range(EVENT | 1, EVENT | 6)
