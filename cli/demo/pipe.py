"""A connection of Pony Express in the shape that sender and writer know from a channel: loans go in, payloads come out.

Each frame is a large message, from a place in the sender's arena to one in the receiver's; several are under way."""

from __future__ import annotations

import time
from collections import deque
from typing import Final, Self

from snap.modules.pony import Connection, NoPeerError, Operation, Pony
from snap.modules.pony.places import Place

from .plan import CHUNK_BYTES

PLACES: Final = 16
PLACE_BYTES: Final = CHUNK_BYTES + 8192
"""Room for a chunk with the longest head."""

ARENA_BYTES: Final = PLACES * PLACE_BYTES
NAME: Final = "copy"


class Lent:
    """`size` bytes of a place; `view` are the bytes."""

    def __init__(self, place: Place, size: int) -> None:
        self.place, self.size = place, size

    @property
    def view(self) -> memoryview:
        return self.place.view[: self.size]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Outlet:
    """The sender's end."""

    def __init__(self, pony: Pony, connection: Connection) -> None:
        self._connection = connection
        self._free = [pony.place(PLACE_BYTES) for _ in range(PLACES)]
        self._flying: deque[tuple[Operation, Place]] = deque()

    def loan(self, size: int, timeout: float) -> Lent:
        """Raises DeadlineError when all places are under way for `timeout` seconds."""
        if not self._free:
            self._reclaim(timeout)
        return Lent(self._free.pop(), size)

    def send_loan(self, loan: Lent, *, timeout: float) -> None:
        operation = self._connection.begin_send_from(loan.place, loan.size)
        self._flying.append((operation, loan.place))

    def finish(self, timeout: float) -> None:
        """Wait until everything was received. Raises DeadlineError."""
        while self._flying:
            self._reclaim(timeout)

    def _reclaim(self, timeout: float) -> None:
        operation, place = self._flying[0]
        operation.result(timeout)
        self._flying.popleft()
        self._free.append(place)


class Inlet:
    """The receiver's end."""

    def __init__(self, pony: Pony, connection: Connection) -> None:
        self._connection = connection
        self._posted: deque[tuple[Operation, Place]] = deque()
        for _ in range(PLACES):
            self._post(pony.place(PLACE_BYTES))

    def receive(self, timeout: float) -> Payload:
        """The next frame in place, until the `with` ends. Raises DeadlineError."""
        operation, place = self._posted[0]
        size = operation.result(timeout)
        self._posted.popleft()
        return Payload(self, place, size)

    def _post(self, place: Place) -> None:
        self._posted.append((self._connection.begin_receive_into(place), place))


class Payload(Lent):
    def __init__(self, inlet: Inlet, place: Place, size: int) -> None:
        super().__init__(place, size)
        self._inlet = inlet

    def __exit__(self, *exc: object) -> None:
        self._inlet._post(self.place)


def reach(pony: Pony, name: str, seconds: float) -> Connection:
    """Connect to a name that somebody is about to bind. Raises NoPeerError."""
    end = time.monotonic() + seconds
    while True:
        try:
            return pony.connect(name, timeout=seconds)
        except NoPeerError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
