"""What became of requests that change something, by who asked and with which key: who asks again, of this kernel or of
the next one, has the first answer, and nothing is done twice."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

KEY: Final = 128
KNOWN: Final = 1024
INHERITED: Final = 64
"""The next kernel knows as many: they are written with every change that is recorded."""


@dataclass
class Ticket:
    """Of one request. `begun` is set in the same step that begins what an answer has to wait for: the number of an
    upgrade, 0 for what has none. `answering` is under way in this kernel; `answer` is encoded."""

    begun: int | None = None
    answer: bytes | None = None
    answering: asyncio.Future[bytes] | None = None


class Answers:
    def __init__(self) -> None:
        self._tickets: OrderedDict[tuple[int, str], Ticket] = OrderedDict()

    def ticket(self, uid: int, key: str) -> Ticket:
        """That of user `uid` for `key`: a new one when it asks for the first time."""
        ticket = self._tickets.setdefault((uid, key[:KEY]), Ticket())
        while len(self._tickets) > KNOWN:
            self._tickets.popitem(last=False)
        return ticket

    def record(self) -> list[list[Any]]:
        """The latest ones; what has not begun can begin with the next kernel."""
        latest = islice(reversed(self._tickets.items()), INHERITED)
        return [
            [uid, key, ticket.begun, ticket.answer]
            for (uid, key), ticket in reversed(list(latest))
            if (ticket.begun, ticket.answer) != (None, None)
        ]

    def restore(self, record: Iterable[list[Any]]) -> None:
        for uid, key, begun, answer in record:
            self._tickets[uid, key] = Ticket(begun, answer)
