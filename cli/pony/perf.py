"""Bulk to and from an engine's `.echo`: messages that it swallows, and bursts of reads and writes of its region 0."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from snap.modules.pony import Connection, Operation, Pony, PonyError

KINDS: Final = ("messages", "reads", "writes")
WINDOW: Final = 8
"""Operations under way at once."""

_DRAIN: Final = 10.0
"""Seconds for what is under way at the end."""

_TICK: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Phase:
    """One kind of traffic for a while. Times in seconds; CPU times are those of the process; None: not known."""

    kind: str
    seconds: float = 0.0
    operations: int = 0
    bytes: int = 0
    client_cpu: float = 0.0
    engine_cpu: float | None = None
    error: str = ""
    intervals: list[dict[str, float]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds if self.seconds else 0.0

    def data(self) -> dict[str, Any]:
        return {
            "what": self.kind,
            "seconds": self.seconds,
            "operations": self.operations,
            "bytes": self.bytes,
            "operations_per_second": self.operations / self.seconds if self.seconds else 0.0,
            "bytes_per_second": self.rate,
            "client_cpu_seconds": self.client_cpu,
            "engine_cpu_seconds": self.engine_cpu,
            "error": self.error,
            "intervals": self.intervals,
        }


def arena_bytes(size: int, burst: int, piece: int) -> int:
    """What `run` needs of the arena: `size` bytes of a message; bursts of `burst` pieces of `piece` bytes."""
    return WINDOW * (max(size, burst * piece) + 64)


def run(
    pony: Pony,
    connection: Connection,
    phase: Phase,
    seconds: float,
    interval: float,
    size: int,
    burst: int,
    piece: int,
    engine_pid: int | None,
    tell: Callable[[Phase, dict[str, float]], None],
) -> None:
    """Fill `phase`; it is right whenever this is interrupted. Raises PonyError."""
    client, engine = time.process_time(), cpu_seconds(engine_pid)
    begin = last = time.monotonic()
    marked = 0
    with ExitStack() as stack:
        flying: deque[tuple[Operation, int, int]] = deque()
        try:
            for begun in _begin(stack, pony, connection, phase.kind, size, burst, piece):
                flying.append(begun)
                if len(flying) == WINDOW:
                    _finish(phase, flying)
                now = time.monotonic()
                phase.seconds = now - begin
                # On a busy machine it may take longer than it should until anything is done at all.
                over = phase.seconds >= seconds and phase.operations > 0
                if now - last >= interval or over:
                    row = {"begin": last - begin, "end": phase.seconds, "bytes": phase.bytes - marked}
                    phase.intervals.append(row)
                    tell(phase, row)
                    last, marked = now, phase.bytes
                if over:
                    break
        finally:
            phase.client_cpu = time.process_time() - client
            now_engine = cpu_seconds(engine_pid)
            if engine is not None and now_engine is not None:
                phase.engine_cpu = now_engine - engine
            # Their places are given back; that one of them failed was said already, or it was not counted.
            for operation, _, _ in flying:
                with suppress(PonyError):
                    operation.result(_DRAIN)


def _finish(phase: Phase, flying: deque[tuple[Operation, int, int]]) -> None:
    operation, operations, count = flying[0]
    operation.result(_DRAIN)
    flying.popleft()
    phase.operations += operations
    phase.bytes += count


def _begin(
    stack: ExitStack, pony: Pony, connection: Connection, kind: str, size: int, burst: int, piece: int
) -> Iterator[tuple[Operation, int, int]]:
    """Operations without end, each with how many it counts for and their bytes. `WINDOW` of them may be under way."""
    length = size if kind == "messages" else burst * piece
    places = [stack.enter_context(pony.place(length)) for _ in range(WINDOW)]
    offsets = np.zeros(burst, "<u8")
    while True:
        for place in places:
            if kind == "messages":
                yield connection.begin_send_from(place), 1, size
            elif kind == "reads":
                yield connection.begin_reads(0, offsets, piece, place), burst, length
            else:
                yield connection.begin_writes(0, offsets, piece, place), burst, length


def cpu_seconds(pid: int | None) -> float | None:
    """Of all threads of a process, user and system. None when there is no such process."""
    if pid is None:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICK
