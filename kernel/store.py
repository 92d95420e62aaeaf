"""Where the kernel's descriptors outlive it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Store(Protocol):
    """Duplicates of descriptors under names, held by somebody who does not die with the kernel."""

    def put(self, name: str, fds: Sequence[int]) -> None:
        """Hold duplicates of `fds`, in this order, instead of what the name held before; `fds` stay the caller's."""

    def remove(self, name: str) -> None:
        """Forget a name; unknown ones are fine."""

    def take(self) -> dict[str, list[int]]:
        """What an earlier kernel put and nobody removed; the descriptors are the caller's now, and stay held."""


class NoStore:
    """For tests of parts: nothing outlives."""

    def put(self, name: str, fds: Sequence[int]) -> None:
        pass

    def remove(self, name: str) -> None:
        pass

    def take(self) -> dict[str, list[int]]:
        return {}
