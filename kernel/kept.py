"""Descriptors that a module keeps for its generations to come, by name: of sockets and files that must not close."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from snap.ipc import seqpacket

from .store import Store
from .takeover import Take


class Kept:
    def __init__(self, name: str, store: Store) -> None:
        self._name, self._store = name, store
        self.fds: dict[str, int] = {}

    def put(self, name: str, fds: list[int]) -> None:
        """Take the first of `fds`, which is this object's then; none: forget the name."""
        old = self.fds.pop(name, None)
        if old is not None:
            seqpacket.close_all([old])
            self._store.remove(self._label(name))
        if fds:
            self.fds[name] = fds.pop(0)
            self._store.put(self._label(name), [self.fds[name]])

    def restore(self, names: Iterable[Any], take: Take) -> None:
        """`take(name)` gives the descriptors that were stored."""
        self.fds = {name: take(self._label(name))[0] for name in names}

    def close(self) -> None:
        for name in list(self.fds):
            self.put(name, [])

    def _label(self, name: str) -> str:
        return f"keep.{self._name}.{name}"
