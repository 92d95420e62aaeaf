"""What an earlier kernel left for this one: its record, and the descriptors that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from snap.dataplane.errors import StateDamagedError
from snap.ipc.seqpacket import close_all

from .record import NAME, Outbox, Record
from .store import Store

LISTENER: Final = "listener"

Take = Callable[[str], list[int]]
"""Gives the descriptors that an earlier kernel stored under a name; StateDamagedError when they are not there."""


class Adoption:
    """`take(name)` gives the descriptors of a name, once; `close` gives back what nobody took."""

    def __init__(self, store: Store, found: dict[str, list[int]]) -> None:
        """`found` is what `store` holds, record included. Raises SchemaError, StateDamagedError; nothing is touched
        then but the descriptors in `found`, which are closed."""
        self._store, self._found = store, found
        self.confirm: Callable[[], None] = lambda: None
        """Called when all is taken over, before the first word to anybody."""
        try:
            self.record, self.data = Record.adopt(found[NAME])
        except BaseException:
            for fds in found.values():
                close_all(fds)
            raise
        del found[NAME]

    def take(self, name: str) -> list[int]:
        """Raises StateDamagedError when it is not there."""
        if name not in self._found:
            raise StateDamagedError(
                f"the kernel's record names {name!r}, which nobody holds",
                "end `snap: keeper`, and start the kernel afresh",
            )
        return self._found.pop(name)

    def close(self) -> list[str]:
        """The names that nobody took: of what the earlier kernel began, and could not record any more."""
        left = list(self._found)
        for name in left:
            self._store.remove(name)
            close_all(self._found.pop(name))
        return left


def adoption(store: Store) -> Adoption | None:
    """What `store` holds of an earlier kernel; None when that is nothing. Raises SnapError."""
    found = store.take()
    if NAME in found:
        return Adoption(store, found)
    for name, fds in found.items():
        store.remove(name)
        close_all(fds)
    return None


class RecordedStore:
    """A store in which a name is there as long as the record may speak of it: what is removed goes after the next
    commit."""

    def __init__(self, store: Store, outbox: Outbox) -> None:
        self._store, self._outbox = store, outbox
        self._gone: set[str] = set()

    def put(self, name: str, fds: Any) -> None:
        self._gone.discard(name)
        self._store.put(name, fds)
        self._outbox.touch()

    def remove(self, name: str) -> None:
        self._gone.add(name)
        self._outbox.add(self._release)

    def take(self) -> dict[str, list[int]]:
        return self._store.take()

    def _release(self) -> None:
        gone, self._gone = self._gone, set()
        for name in gone:
            self._store.remove(name)
