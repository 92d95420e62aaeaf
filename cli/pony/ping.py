"""Round trips to an engine's `.echo`: messages that come back, and one-sided reads of its region 0, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count as numbers
from typing import Any, Final

from snap.ipc import DeadlineError
from snap.modules.pony import Connection

ECHO: Final = ".echo"
KINDS: Final = ("message", "read")
_NUMBER: Final = 8
"""Bytes of the number at the start of a message, by which its echo is known."""


def name_of(host: str | None) -> str:
    """The echo of `host`, or of this host's own engine."""
    return ECHO if host is None else f"{host}/{ECHO}"


@dataclass
class Trips:
    """What became of one kind: `sent` trips, and the times in ns of those that came back."""

    kind: str
    sent: int = 0
    times: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Times in ns; None when nothing came back."""
        ranked = sorted(self.times)
        found = {
            name: ranked[min(len(ranked) - 1, int(len(ranked) * share))] if ranked else None
            for name, share in (("min", 0.0), ("p50", 0.5), ("p99", 0.99), ("max", 1.0))
        }
        return {"kind": self.kind, "sent": self.sent, "received": len(ranked)} | {
            f"{name}_ns": value for name, value in found.items()
        }


Tell = Callable[[str, int, int | None], None]
"""Kind, number, and ns of a trip, None for one that did not come back in time."""


def ping(
    connection: Connection,
    trips: dict[str, Trips],
    size: int,
    count: int | None,
    interval: float,
    timeout: float,
    tell: Tell,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """`count` messages and as many reads of `size` bytes (None: until interrupted), one of either every `interval`
    seconds; `trips` is filled as it goes on. Raises PonyError."""
    for number in range(1, count + 1) if count is not None else numbers(1):
        if number > 1:
            sleep(interval)
        for kind, once in (("message", _message), ("read", _read)):
            took: int | None
            begin = time.perf_counter_ns()
            try:
                once(connection, number, size, timeout)
            except DeadlineError:
                took = None
            else:
                took = time.perf_counter_ns() - begin
                trips[kind].times.append(took)
            trips[kind].sent += 1
            tell(kind, number, took)


def _message(connection: Connection, number: int, size: int, timeout: float) -> None:
    mark = number.to_bytes(_NUMBER, "little")
    connection.send(mark.ljust(size, b"\0"), timeout=timeout)
    for data in _received(connection, timeout):
        # One that is late was given up before, and is none of this trip's.
        if data.startswith(mark):
            return


def _received(connection: Connection, timeout: float) -> Iterator[bytes]:
    end = time.monotonic() + timeout
    while True:
        yield connection.recv(max(0.0, end - time.monotonic())).data


def _read(connection: Connection, number: int, size: int, timeout: float) -> None:
    connection.read(0, 0, size, timeout)
