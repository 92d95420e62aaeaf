"""What a client notes of its session, in a file of its own: a record before anything is sent, one after it came.

Written by `write` at once, so that the death of the client loses none of it.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .ops import Model, Wrong

RECORD: Final = struct.Struct("<B3xIIIQ")
"""Kind, first and last operation, running CRC-32 of all answers so far, CLOCK_MONOTONIC ns."""

SENT: Final = 1
RECEIVED: Final = 2
ENDED: Final = 3
"""The client left by itself, having got an answer to everything."""

LOST: Final = 4
"""The client was told that the engine lost its state."""

LONG_NS: Final = 10_000_000
"""Shorter waits for an answer are not told."""

_KINDS: Final = {SENT: "sent", RECEIVED: "received", ENDED: "ended", LOST: "lost"}


class Ledger:
    """The writer; for one client."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._crc = 0

    def sent(self, first: int, last: int) -> None:
        self._note(SENT, first, last)

    def received(self, first: int, answers: list[bytes]) -> None:
        for answer in answers:
            self._crc = zlib.crc32(answer, self._crc)
        self._note(RECEIVED, first, first + len(answers) - 1)

    def ended(self) -> None:
        self._note(ENDED, 0, 0)

    def lost(self) -> None:
        self._note(LOST, 0, 0)

    def close(self) -> None:
        os.close(self._fd)

    def _note(self, kind: int, first: int, last: int) -> None:
        os.write(self._fd, RECORD.pack(kind, first, last, self._crc, time.monotonic_ns()))


@dataclass(frozen=True)
class Session:
    """What a ledger says. `waits`: from when to when no answer came, where that was long; CLOCK_MONOTONIC ns."""

    sent: int
    received: int
    ended: bool
    lost: bool
    waits: list[tuple[int, int]]


def received(path: Path) -> int:
    """How far a client is that may be at work; 0: nothing came yet."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) // RECORD.size
            for index in range(size - 1, -1, -1):
                file.seek(index * RECORD.size)
                kind, _, last, _, _ = RECORD.unpack(file.read(RECORD.size))
                if kind == RECEIVED:
                    return int(last)
    except FileNotFoundError:
        pass
    return 0


def check(path: Path, model: Model) -> Session:
    """Read a ledger to its end, with a fresh `model`, which is then where the last answer was.

    Raises Wrong when anything came twice, not at all, out of order, or with other bytes than the model's.
    """
    sent = got = crc = last_ns = 0
    ended = lost = False
    waits = []
    data = path.read_bytes()
    for kind, first, last, noted, at in RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]):
        if kind == SENT:
            sent = _follow(kind, sent, first, last)
        elif kind == RECEIVED:
            got = _follow(kind, got, first, last)
            for _ in range(first, last + 1):
                crc = zlib.crc32(model.answer(), crc)
            if crc != noted:
                raise Wrong(
                    f"client {model.client}: the answers to operations {first} to {last} are not the model's"
                )
            if last_ns and at - last_ns >= LONG_NS:
                waits.append((last_ns, at))
            last_ns = at
        elif kind == ENDED:
            ended = True
        elif kind == LOST:
            lost = True
        else:
            raise Wrong(f"client {model.client}: its ledger has a record of kind {kind}")
        if got > sent:
            raise Wrong(f"client {model.client}: operation {got} was answered, {sent} were sent")
    if ended and got != sent:
        raise Wrong(f"client {model.client}: {sent - got} operations of {sent} were never answered")
    return Session(sent, got, ended, lost, waits)


def _follow(kind: int, before: int, first: int, last: int) -> int:
    if first != before + 1 or last < first:
        raise Wrong(f"operations {first} to {last} were {_KINDS[kind]} after {before}")
    return last
