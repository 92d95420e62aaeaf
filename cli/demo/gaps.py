"""How long nothing was delivered, by what happened meanwhile. No clock: everybody brings the time along."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Period:
    """A stretch of the transfer. Nanoseconds of CLOCK_MONOTONIC, which all processes share."""

    name: str
    begin_ns: int
    end_ns: int = 0
    gap_ns: int = 0
    bytes: int = 0


class Timeline:
    """The transfer cut into periods, and the longest gap between two deliveries of each."""

    def __init__(self) -> None:
        self.periods: list[Period] = []
        self._last_ns = 0

    def mark(self, at_ns: int, name: str) -> None:
        """From now on it is `name`; marks come in order, though each may be heard of late."""
        if self.periods:
            self.periods[-1].end_ns = at_ns
        self.periods.append(Period(name, at_ns, at_ns))

    def deliver(self, at_ns: int, size: int) -> None:
        """`size` bytes came. The gap before them belongs to the period that most of it lay in."""
        if self.periods:
            self.periods[-1].end_ns = at_ns
            self.periods[-1].bytes += size
            if self._last_ns:
                period = max(self.periods, key=lambda period: self._share(period, at_ns))
                period.gap_ns = max(period.gap_ns, at_ns - self._last_ns)
        self._last_ns = at_ns

    def _share(self, period: Period, until_ns: int) -> int:
        """How much of the time since the last delivery lay in `period`."""
        end = until_ns if period is self.periods[-1] else period.end_ns
        return min(end, until_ns) - max(period.begin_ns, self._last_ns)
