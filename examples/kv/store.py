"""The memory of the server, written so that who reads it meanwhile finds an entry as it was or as it is."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from typing import Final

from snap.modules.pony import Pony, Right

from .errors import BucketFullError, StoreFullError, TooLargeError
from .layout import SLOT, Layout, Record, decode, encode

GRACE: Final = 0.01
"""Seconds for which a cell stays as it is after its entry was replaced: much longer than an engine takes from a pointer
to what it points to. Where that fails, the checksum or the hash of the entry says so."""

SPARE: Final = 64
"""Cells beyond the capacity: a full store overwrites at most this often within `GRACE`, then it waits."""

_ALIGN: Final = 64
_WORDS: Final = SLOT // 8
_HASH, _HANDLE, _OFFSET, _LENGTH = range(_WORDS)


def arena_bytes(layout: Layout) -> int:
    """What a store needs of the arena."""
    return layout.buckets * layout.slots * SLOT + (layout.capacity + SPARE) * layout.cell + 2 * _ALIGN


class Store:
    """One thread writes."""

    def __init__(self, pony: Pony, layout: Layout) -> None:
        """`layout` without its handle. Raises ResourceError when the arena of `pony` is below `arena_bytes`."""
        index = pony.place(layout.buckets * layout.slots * SLOT)
        cells = pony.place((layout.capacity + SPARE) * layout.cell)
        data = pony.register(cells, Right.READ)
        self.layout = replace(layout, handle=pony.register(index, Right.READ).handle)
        # As native words: assigning one is a single store, so nobody reads half a pointer.
        self._index = index.view.cast("Q")
        self._cells = cells.view
        # All but hash and offset never changes, so that each change is one word.
        for slot in range(0, len(self._index), _WORDS):
            self._index[slot + _HASH] = 0
            self._index[slot + _HANDLE] = data.handle
            self._index[slot + _LENGTH] = layout.cell
        # Offsets of cells nothing points to, each with the time from which it may be written.
        self._free = deque((0.0, offset) for offset in range(0, cells.size, layout.cell))
        self._slots: dict[int, int] = {}
        self._version = 0

    def set(self, key: bytes, value: bytes) -> int:
        """The entry's version. Raises TooLargeError, BucketFullError, StoreFullError."""
        hash = self.layout.hash(key)
        self._publish(hash, self._records(hash) | {key: Record(self._version + 1, value)})
        self._version += 1
        return self._version

    def delete(self, key: bytes) -> int:
        """The version of what is no more; 0 when there was nothing."""
        hash = self.layout.hash(key)
        records = self._records(hash)
        record = records.pop(key, None)
        if record is None:
            return 0
        if records:
            self._publish(hash, records)
        else:
            slot = self._slots.pop(hash)
            self._index[slot + _HASH] = 0
            self._retire(self._index[slot + _OFFSET])
        return record.version

    def _records(self, hash: int) -> dict[bytes, Record]:
        if hash not in self._slots:
            return {}
        offset = self._index[self._slots[hash] + _OFFSET]
        return decode(bytes(self._cells[offset : offset + self.layout.cell]), hash) or {}

    def _publish(self, hash: int, records: dict[bytes, Record]) -> None:
        """Whole in a cell of its own first; then the one word that makes readers find it."""
        entry = encode(hash, records)
        if len(entry) > self.layout.cell:
            raise TooLargeError(f"{len(entry)} bytes do not fit into a cell of {self.layout.cell}")
        slot = self._slots.get(hash)
        if slot is None:
            slot = self._empty_slot(hash)
            self._index[slot + _OFFSET] = self._write(entry)
            self._index[slot + _HASH] = hash
            self._slots[hash] = slot
        else:
            old = self._index[slot + _OFFSET]
            self._index[slot + _OFFSET] = self._write(entry)
            self._retire(old)

    def _empty_slot(self, hash: int) -> int:
        if len(self._slots) == self.layout.capacity:
            raise StoreFullError(f"the store has its {self.layout.capacity} entries", "delete some")
        first = self.layout.bucket(hash) // 8
        for slot in range(first, first + self.layout.slots * _WORDS, _WORDS):
            if not self._index[slot + _HASH]:
                return slot
        raise BucketFullError(f"the bucket has its {self.layout.slots} entries", "have more buckets")

    def _write(self, entry: bytes) -> int:
        ready, offset = self._free.popleft()
        time.sleep(max(0.0, ready - time.monotonic()))
        self._cells[offset : offset + len(entry)] = entry
        return offset

    def _retire(self, offset: int) -> None:
        self._free.append((time.monotonic() + GRACE, offset))
