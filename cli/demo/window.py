"""Which chunk goes next: a window of unacknowledged numbers that can be sent again. No clock and no channel."""

from __future__ import annotations


class Window:
    """At most `size` of `total` chunks are unacknowledged. `hold` keeps the numbers from it on back until `free()`."""

    def __init__(self, total: int, size: int, hold: int | None = None) -> None:
        self._total = total
        self._size = size
        self._hold = total if hold is None else hold
        self._next = 0
        self._sent = 0
        self.acknowledged = 0
        self.resent = 0

    @property
    def done(self) -> bool:
        return self.acknowledged == self._total

    def take(self) -> int | None:
        """The number to send now, or None when the window is full or nothing may be sent."""
        number = self._next
        if number >= min(self.acknowledged + self._size, self._hold, self._total):
            return None
        self._next += 1
        if number < self._sent:
            self.resent += 1
        self._sent = max(self._sent, self._next)
        return number

    def acknowledge(self, expected: int) -> bool:
        """The writer has everything below `expected`; True when that is news.

        Raises ValueError for what was never sent.
        """
        if expected > self._sent:
            raise ValueError(f"acknowledgement of {expected}, but only {self._sent} chunks were sent")
        news = expected > self.acknowledged
        self.acknowledged = max(self.acknowledged, expected)
        self._next = max(self._next, self.acknowledged)
        return news

    def rewind(self) -> None:
        """Send again from the first number that is not acknowledged: the way to the writer lost what it held."""
        self._next = self.acknowledged

    def free(self) -> None:
        """Let go what `hold` kept back."""
        self._hold = self._total
