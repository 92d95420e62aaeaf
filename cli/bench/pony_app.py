"""An application that is measured: `python -m snap.cli.bench.pony_app RUNTIME-DIR` does what it is told in lines of
JSON on standard input, and answers in lines of JSON. The duties of Pony are here, those of its rivals in
`pony_rivals`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from snap.ipc import SnapError, connect
from snap.modules.pony import INDIRECTION, Connection, Operation, Pony, Right
from snap.modules.pony.places import Place

from .pony_hosts import busy
from .pony_rivals import Rivals

SMALL: Final = 64
"""Bytes of a small message or read."""

LARGE: Final = 1 << 20
"""Bytes of a large message."""

WINDOW: Final = 8
"""Operations under way at once, or one on each connection if these are more."""

BATCH: Final = 32
"""Small messages that are answered at once: half of what a peer may leave untaken."""

ENTRIES: Final = 16_384
"""Entries of a table for indirect reads."""

ROOM: Final = 64 << 20
"""Bytes of an arena beside what it shares: places for what is under way."""

DISTINCT: Final = 1 << 21
"""Places that are read before any is read again: together they are larger than caches are."""

_LONG: Final = 60.0
_PR_SET_PDEATHSIG: Final = 1


class Duties:
    """What an application does for the benchmark; sizes are in bytes, times in seconds, round trips in ns."""

    def __init__(self, runtime: Path) -> None:
        self._runtime = runtime
        self._connections: list[Connection] = []
        self._random = np.random.default_rng(1)

    def open(self, arena: int) -> None:
        client = connect(runtime_dir=self._runtime)
        self._pony = Pony.open(client, arena + ROOM)

    def bind(self, name: str) -> None:
        self._pony.bind(name)

    def connect(self, name: str, count: int) -> None:
        self._connections += [self._pony.connect(name) for _ in range(count)]

    def accept(self, count: int) -> None:
        self._connections += [self._pony.accept(_LONG) for _ in range(count)]

    def share(self, size: int) -> dict[str, int]:
        """Share a region of that size, and a table whose entries point to random places in it: their handles."""
        place, table = self._pony.place(size), self._pony.place(ENTRIES * INDIRECTION.size)
        place.array()[:] = 1
        region, entries = (self._pony.register(each, Right.READ) for each in (place, table))
        offsets = self._random.integers(0, size // SMALL, ENTRIES) * SMALL
        table.array("<u8").reshape(-1, 3)[:] = np.array(
            [(region.handle, int(offset), SMALL) for offset in offsets], "<u8"
        )
        return {"handle": region.handle, "size": size, "table": entries.handle}

    def pin(self, cpus: list[int]) -> None:
        """Run on these processors only."""
        os.sched_setaffinity(0, cpus)

    # -- rates ------------------------------------------------------------------------------------------------

    def reads(self, region: dict[str, int], burst: int, seconds: float, how: str) -> dict[str, float]:
        """Bursts of reads of random places, on each connection in turn. `how`: direct, indirect, or twice: entries of
        the table are read, and then what they point to, which counts once."""
        places = [self._pony.place(burst * SMALL) for _ in range(WINDOW)]
        flying: deque[tuple[Operation, Place, bool]] = deque()
        connections, rows = cycle(self._connections), cycle(self._bursts(region, burst, how))

        def start(place: Place) -> None:
            connection, numbers = next(connections), next(rows)
            if how == "indirect":
                begun = connection.begin_reads_indirect(region["table"], numbers, SMALL, place)
            elif how == "twice":
                begun = connection.begin_reads(region["table"], numbers, INDIRECTION.size, place)
            else:
                begun = connection.begin_reads(region["handle"], numbers, SMALL, place)
            flying.append((begun, place, how == "twice"))

        operations, now = 0, time.monotonic()
        begin, end = now, now + seconds
        for place in places:
            start(place)
        while now < end:
            operation, place, first = flying.popleft()
            operation.result(_LONG)
            if first:
                found = place.array("<u8")[: burst * 3].reshape(-1, 3)[:, 1]
                flying.append(
                    (next(connections).begin_reads(region["handle"], found, SMALL, place), place, False)
                )
            else:
                operations += burst
                start(place)
            now = time.monotonic()
        for operation, _, _ in flying:
            operation.result(_LONG)
        for place in places:
            place.free()
        return {"operations": operations, "seconds": now - begin}

    def _bursts(self, region: dict[str, int], burst: int, how: str) -> Iterable[Any]:
        """The offsets, or the entries, of bursts that repeat late."""
        scale, dtype = {
            "direct": (SMALL, "<u8"),
            "indirect": (1, "<u4"),
            "twice": (INDIRECTION.size, "<u8"),
        }[how]
        count = region["size"] // SMALL if how == "direct" else ENTRIES
        return (self._random.integers(0, count, DISTINCT) * scale).astype(dtype).reshape(-1, burst)

    def send_small(self, batches: int) -> None:
        """Batches of small messages, on each connection in turn; two batches are under way before one is answered."""
        data, turns = bytes(SMALL), cycle(self._connections)
        for batch in range(batches):
            for operation in [next(turns).begin_send(data) for _ in range(BATCH)]:
                operation.result(_LONG)
            if batch:
                self._connections[0].recv(_LONG)
        self._connections[0].recv(_LONG)

    def take_small(self, batches: int) -> dict[str, float]:
        """Take them and answer; from the end of the first batch on."""
        turns, begin = cycle(self._connections), 0.0
        for _ in range(batches):
            for _ in range(BATCH):
                next(turns).recv(_LONG)
            self._connections[0].send(b"taken")
            begin = begin or time.monotonic()
        return {"operations": (batches - 1) * BATCH, "seconds": time.monotonic() - begin}

    # -- bulk -------------------------------------------------------------------------------------------------

    def send_large(self, count: int) -> None:
        """That many large messages, on each connection in turn."""
        self._connections[0].send(b"begin")
        _all(islice(self._large(Connection.begin_send_from), count), max(WINDOW, len(self._connections)))

    def take_large(self, count: int) -> dict[str, float]:
        """Until they have come; bytes, seconds, and the CPU seconds of the whole machine."""
        self._connections[0].recv(_LONG)
        begin, before = time.monotonic(), busy()
        window = max(WINDOW, len(self._connections))
        _all(islice(self._large(Connection.begin_receive_into), count), window)
        return {"bytes": count * LARGE, "seconds": time.monotonic() - begin, "cpu": busy() - before}

    def _large(self, begin: Callable[[Connection, Any], Operation]) -> Iterator[Operation]:
        """Without end. All connections share a few places: it is not the memory that is measured."""
        places = [self._pony.place(LARGE) for _ in range(WINDOW)]
        try:
            turn = 0
            while True:
                yield begin(self._connections[turn % len(self._connections)], places[turn % WINDOW])
                turn += 1
        finally:
            for place in places:
                place.free()

    # -- latency ----------------------------------------------------------------------------------------------

    def echo(self, count: int, wait: int) -> None:
        connection = self._connections[0]
        for _ in range(count):
            connection.send(connection.recv(_LONG, wait).data, wait=wait)

    def trips(self, count: int, wait: int) -> list[int]:
        """Of small messages, to an `echo`."""
        connection, data = self._connections[0], bytes(SMALL)

        def trip() -> None:
            connection.send(data, wait=wait)
            connection.recv(_LONG, wait)

        return timed(count, trip)

    def read_trips(self, region: dict[str, int], count: int, wait: int, how: str) -> list[int]:
        """`how` as for `reads`."""
        connection, table = self._connections[0], region["table"]
        turn = iter([int(number) for number in self._random.integers(0, ENTRIES, count)])

        def direct() -> None:
            offset = next(turn) * SMALL % region["size"]
            connection.read(region["handle"], offset, SMALL, _LONG, wait)

        def indirect() -> None:
            connection.read_indirect(table, next(turn), SMALL, _LONG, wait)

        def twice() -> None:
            entry = next(turn) * INDIRECTION.size
            found = connection.read(table, entry, INDIRECTION.size, _LONG, wait)
            handle, offset, size = INDIRECTION.unpack(found)
            connection.read(handle, offset, size, _LONG, wait)

        return timed(count, {"direct": direct, "indirect": indirect, "twice": twice}[how])


def _all(begun: Iterator[Operation], window: int) -> None:
    """Wait for all of them, `window` under way at once."""
    flying = deque(islice(begun, window))
    for operation in begun:
        flying.append(operation)
        flying.popleft().result(_LONG)
    for operation in flying:
        operation.result(_LONG)


def timed(count: int, trip: Callable[[], None]) -> list[int]:
    """ns of each, the first tenth of them left out."""
    times = []
    clock = time.perf_counter_ns
    for _ in range(count):
        begin = clock()
        trip()
        times.append(clock() - begin)
    return times[count // 10 :]


def main() -> None:
    # A spinning application would not notice that the measuring process was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    duties: tuple[object, ...] = (Duties(Path(sys.argv[1])), Rivals())
    for line in sys.stdin:
        order = json.loads(line)
        name = order.pop("do")
        does = next(getattr(each, name) for each in duties if hasattr(each, name))
        try:
            answer = {"result": does(**order)}
        except (SnapError, OSError) as error:
            answer = {"error": f"{name}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
