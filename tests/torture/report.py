"""What a run comes to, in a table: what happened, how it ended, and how long a client waited because of it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from .ledger import LONG_NS


@dataclass(frozen=True)
class Happened:
    """One event; it was over when all was well again. Times are CLOCK_MONOTONIC ns."""

    kind: str
    outcome: str
    begin_ns: int
    end_ns: int

    def shares(self, begin_ns: int, end_ns: int) -> int:
        """How many ns of this time are the event's."""
        return min(self.end_ns, end_ns) - max(self.begin_ns, begin_ns)


@dataclass
class Result:
    happened: list[Happened] = field(default_factory=list)
    waits: list[tuple[int, int]] = field(default_factory=list)
    """From when to when a client got no answer, where that was long."""

    operations: int = 0
    sessions: int = 0
    blackouts_ns: list[int] = field(default_factory=list)


def longest_waits(happened: Iterable[Happened], waits: Iterable[tuple[int, int]]) -> dict[str, int]:
    """By kind, in ns; a wait belongs to the event with the most of it, and one between events to none."""
    longest: dict[str, int] = {}
    events = list(happened)
    for begin, end in waits:
        cause = max(events, key=lambda event: event.shares(begin, end), default=None)
        if cause is not None and cause.shares(begin, end) > 0:
            longest[cause.kind] = max(longest.get(cause.kind, 0), end - begin)
    return longest


def table(result: Result) -> str:
    waits = longest_waits(result.happened, result.waits)
    rows = [("event", "count", "longest wait", "outcomes")]
    for kind, count in Counter(event.kind for event in result.happened).most_common():
        ends = Counter(event.outcome for event in result.happened if event.kind == kind)
        wait = f"{waits[kind] / 1e6:.0f} ms" if kind in waits else f"< {LONG_NS / 1e6:.0f} ms"
        rows.append((kind, str(count), wait, ", ".join(f"{n} {end}" for end, n in ends.most_common())))
    lines = [f"  {kind:15} {count:>5}  {wait:>12}  {ends}" for kind, count, wait, ends in rows]
    if flips := sorted(result.blackouts_ns):
        median, most = statistics.median(flips) / 1e3, flips[-1] / 1e3
        lines.append(f"  blackout of {len(flips)} flips: median {median:.0f} us, most {most:.0f} us")
    lines.append(
        f"  {result.operations} operations of {result.sessions} clients: "
        "none lost unsaid, doubled or wrong; nothing left behind"
    )
    return "\n".join(lines)
