"""Commands of an application as bytes, for tests that alter them. `number` is the caller's end of a connection, `handle` a
region of the peer; offsets and lengths are in bytes."""

from __future__ import annotations

import struct

from snap.modules.pony.commands import HEAD, INLINE, Kind


def _command(kind: Kind, number: int, layout: str = "", *words: int, stream: int = 0) -> bytes:
    return HEAD.pack(kind, 0, stream, number) + struct.pack("<" + layout, *words)


def bind(name: str) -> bytes:
    return _command(Kind.BIND, 0) + name.encode()


def connect(name: str) -> bytes:
    return _command(Kind.CONNECT, 0) + name.encode()


def close(number: int) -> bytes:
    return _command(Kind.CLOSE, number)


def send(number: int, data: bytes, stream: int = 0) -> bytes:
    return _command(Kind.SEND, number, stream=stream) + data


def send_from(number: int, offset: int, size: int) -> bytes:
    return _command(Kind.SEND_ARENA, number, "QQ", offset, size)


def receive_into(number: int, offset: int, size: int) -> bytes:
    return _command(Kind.POST, number, "QQ", offset, size)


def register(number: int, offset: int, size: int, rights: int) -> bytes:
    """For the peer at connection `number` only; 0: for all peers."""
    return _command(Kind.REGISTER, number, "QQI", offset, size, rights)


def release(handle: int) -> bytes:
    return _command(Kind.RELEASE, 0, "Q", handle)


def read(number: int, handle: int, offset: int, size: int, into: int = INLINE) -> bytes:
    return _command(Kind.READ, number, "QQQI", handle, offset, into, size)


def write(number: int, handle: int, offset: int, data: bytes) -> bytes:
    return _command(Kind.WRITE, number, "QQQQ", handle, offset, INLINE, len(data)) + data


def write_from(number: int, handle: int, offset: int, source: int, size: int) -> bytes:
    return _command(Kind.WRITE, number, "QQQQ", handle, offset, source, size)


def compare_swap(number: int, handle: int, offset: int, expected: int, desired: int) -> bytes:
    return _command(Kind.COMPARE_SWAP, number, "QQQQ", handle, offset, expected, desired)


def fetch_add(number: int, handle: int, offset: int, add: int) -> bytes:
    return _command(Kind.FETCH_ADD, number, "QQQ", handle, offset, add)


def indirect(number: int, handle: int, index: int, size: int) -> bytes:
    return _command(Kind.INDIRECT, number, "QQQI", handle, index, INLINE, size)


def scan(
    number: int, handle: int, offset: int, needle: int, size: int, entries: int, stride: int, pointer: int
) -> bytes:
    words = (handle, offset, needle, INLINE, size, entries, stride, pointer)
    return _command(Kind.SCAN, number, "QQQQIHHH", *words)


def burst(kind: Kind, number: int, handle: int, place: int, numbers: int, size: int, count: int) -> bytes:
    """`count` operations on `size` bytes each, packed at `place`; what to do is at `numbers` of the own arena."""
    return _command(kind, number, "QQQII", handle, place, numbers, size, count)
