"""Pieces of an arena, given out and taken back."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING, Any, Final, Self

from snap.dataplane.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_ALIGN: Final = 64


class Place:
    """`size` bytes of the arena from `offset` on, until `free` (or leaving `with`)."""

    def __init__(self, places: Places, offset: int, size: int) -> None:
        self._places: Places | None = places
        self.offset, self.size = offset, size

    @property
    def view(self) -> memoryview:
        """Its bytes, writable. Raises UsageError after `free`."""
        if self._places is None:
            raise UsageError("the place was freed")
        return self._places.arena[self.offset : self.offset + self.size]

    def array(self, dtype: npt.DTypeLike = "u1") -> npt.NDArray[Any]:
        """As many items of `dtype` as fit, in place."""
        import numpy as np

        kind: np.dtype[Any] = np.dtype(dtype)
        return np.frombuffer(self.view, kind, self.size // kind.itemsize)

    def free(self) -> None:
        """Idempotent. Nothing may use it any more: no region, no operation under way, no array."""
        places, self._places = self._places, None
        if places is not None:
            places.give_back(self.offset, self.size)

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.free()


class Places:
    """First fit, neighbours joined again."""

    def __init__(self, arena: memoryview) -> None:
        self.arena = arena
        self._free = [(0, len(arena))] if len(arena) else []

    def take(self, size: int) -> Place:
        """Raises ResourceError when no piece is large enough, UsageError for a size below 1."""
        if size < 1:
            raise UsageError(f"a place of {size} bytes")
        whole = -(-size // _ALIGN) * _ALIGN
        for index, (offset, length) in enumerate(self._free):
            if length >= whole:
                self._free[index : index + 1] = [(offset + whole, length - whole)] if length > whole else []
                return Place(self, offset, size)
        raise ResourceError(
            f"the arena of {len(self.arena)} bytes has no {size} left in one piece",
            "open it with a larger arena",
        )

    def give_back(self, offset: int, size: int) -> None:
        insort(self._free, (offset, -(-size // _ALIGN) * _ALIGN))
        joined: list[tuple[int, int]] = []
        for start, length in self._free:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((start, length))
        self._free = joined
