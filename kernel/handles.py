"""A principal's own table of handles.

A handle is the slot in its lower bits and above it a generation that no other handle of any principal ever has: one
kept after a revocation, or heard from another principal, names nothing instead of what took the slot next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

_BITS: Final = 16
_MASK: Final = (1 << _BITS) - 1

MAX_HANDLES: Final = 1 << _BITS
"""Handles that one principal can hold."""


class _Slot:
    __slots__ = ("cap", "generation")

    def __init__(self) -> None:
        self.generation = 0
        self.cap: int | None = None


class Principal:
    """One holder and its handles; `quota` is for the caller to keep."""

    def __init__(
        self, name: str, badge: str, pid: int | None, quota: int, generation: Callable[[], int]
    ) -> None:
        """`generation` gives a number that it never gave before."""
        self.name = name
        self.badge = badge
        self.pid = pid
        self.quota = quota
        self.held = {False: 0, True: 0}  # by Capability.given
        self._generation = generation
        self._slots: list[_Slot] = []
        self._free: list[int] = []

    def insert(self, cap: int, given: bool) -> int:
        """The new handle. The caller has looked at the quota and at `MAX_HANDLES`."""
        if not self._free:
            self._free.append(len(self._slots))
            self._slots.append(_Slot())
        index = self._free.pop()
        slot = self._slots[index]
        slot.generation = self._generation()
        slot.cap = cap
        self.held[given] += 1
        return slot.generation << _BITS | index

    def remove(self, handle: int, given: bool) -> None:
        index = handle & _MASK
        self._slots[index].cap = None
        self._free.append(index)
        self.held[given] -= 1

    def find(self, handle: int) -> int | None:
        """The id of the capability behind `handle`, None for a stale or forged one."""
        index = handle & _MASK
        if handle < 0 or index >= len(self._slots):
            return None
        slot = self._slots[index]
        return slot.cap if slot.generation == handle >> _BITS else None

    def ids(self) -> list[int]:
        return [slot.cap for slot in self._slots if slot.cap is not None]

    # -- outliving the kernel ---------------------------------------------------------------------------------

    def record(self) -> list[Any]:
        slots = [[slot.generation, slot.cap] for slot in self._slots]
        return [self.name, self.badge, self.pid, self.quota, slots, list(self._free)]

    @classmethod
    def restored(cls, record: list[Any], generation: Callable[[], int]) -> Principal:
        """The same handles name the same capabilities; the caller counts what is `held`."""
        name, badge, pid, quota, slots, free = record
        principal = cls(name, badge, pid, quota, generation)
        for number, cap in slots:
            slot = _Slot()
            slot.generation, slot.cap = number, cap
            principal._slots.append(slot)
        principal._free = list(free)
        return principal
