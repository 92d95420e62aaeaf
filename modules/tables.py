"""What an engine sees of its state at run time: `self.state.NAME` is one of these, by the schema.

Everything written in a poll becomes permanent when the poll ends, together with the messages that it took and sent;
a poll that is cut short or taken back leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from snap.dataplane._native import State, StateArray, StateSlab, StateTable
from snap.dataplane.errors import UsageError

from .schema import Array, DType, Object, Rows, Schema, Slab, Table, octets

_BATCH: Final = 4096
_LIVE: Final = 1


class TableView:
    """Rows of one type under keys of one type, like a dictionary. A row comes out as a NumPy record (or number)."""

    def __init__(self, native: StateTable, about: Table) -> None:
        self._native = native
        self._row = about.row
        self._pack_key, self._pack_row = _packer(about.key), _packer(about.row)
        self._key = about.key
        self._slot = slot_type(native, about.key, about.row)

    def __len__(self) -> int:
        return len(self._native)

    def __contains__(self, key: Any) -> bool:
        return self._native.get(self._pack_key(key)) is not None

    def __getitem__(self, key: Any) -> Any:
        """The record under `key`: a copy. Raises KeyError."""
        row = self._native.get(self._pack_key(key))
        if row is None:
            raise KeyError(key)
        return np.frombuffer(row, self._row)[0]

    def get(self, key: Any, default: Any = None) -> Any:
        row = self._native.get(self._pack_key(key))
        return default if row is None else np.frombuffer(row, self._row)[0]

    def __setitem__(self, key: Any, row: Any) -> None:
        """Insert or replace; `row` is a record, a tuple, or a mapping with all fields. Raises StateFullError."""
        self._native.put(self._pack_key(key), self._pack_row(row))

    def __delitem__(self, key: Any) -> None:
        """Raises KeyError."""
        if not self._native.delete(self._pack_key(key)):
            raise KeyError(key)

    def __iter__(self) -> Iterator[Any]:
        """The keys, in the order of their slots. What is inserted meanwhile may or may not come."""
        for keys, _ in self._batches():
            yield from keys.tolist()

    def items(self) -> Iterator[tuple[Any, Any]]:
        for keys, rows in self._batches():
            yield from zip(keys.tolist(), rows, strict=True)

    @property
    def slots(self) -> Rows:
        """All slots in place, read-only, with fields `state` (1: live), `key` and `row`; look while polling only."""
        return np.frombuffer(self._native.view(), self._slot)

    def keys(self) -> Rows:
        """A copy of all keys."""
        return np.concatenate([np.empty(0, self._key), *(keys for keys, _ in self._batches())])

    @property
    def rows(self) -> Rows:
        """A read-only copy of all rows, as one structured array, in the order of `keys()`."""
        rows = np.concatenate([np.empty(0, self._row), *(rows for _, rows in self._batches())])
        rows.flags.writeable = False
        return rows

    def get_many(self, keys: Any) -> tuple[Rows, Rows]:
        """For an array of keys: rows (zero where there is none), and a boolean array that says where there was
        one."""
        wanted = np.ascontiguousarray(keys, self._key)
        rows, found = np.zeros(len(wanted), self._row), np.zeros(len(wanted), np.uint8)
        self._native.get_packed(octets(wanted), octets(rows), octets(found))
        return rows, found.view(np.bool_)

    def put_many(self, keys: Any, rows: Any) -> None:
        """Insert or replace, one by one in order. Raises StateFullError: take the poll back by letting it pass."""
        packed_keys, packed_rows = (
            np.ascontiguousarray(keys, self._key),
            np.ascontiguousarray(rows, self._row),
        )
        if len(packed_keys) != len(packed_rows):
            raise UsageError(f"{len(packed_keys)} keys for {len(packed_rows)} rows")
        self._native.put_packed(octets(packed_keys), octets(packed_rows))

    def delete_many(self, keys: Any) -> int:
        """How many there were."""
        return self._native.delete_packed(octets(np.ascontiguousarray(keys, self._key)))

    def _batches(self) -> Iterator[tuple[Rows, Rows]]:
        start = 0
        while True:
            slots = np.empty(_BATCH, self._slot)
            count = self._native.slots(start, octets(slots))
            if count == 0:
                return
            live = slots[:count][slots["state"][:count] == _LIVE]
            yield live["key"], live["row"]
            start += count


class SlabView:
    """Items of one type under numbers."""

    def __init__(self, native: StateSlab, about: Slab) -> None:
        self._native, self._row, self._pack = native, about.row, _packer(about.row)

    def __len__(self) -> int:
        return len(self._native)

    def allocate(self, item: Any = None) -> int:
        """The number of a new item, zero unless given. Raises StateFullError."""
        number = self._native.allocate()
        if item is not None:
            self[number] = item
        return number

    def free(self, number: int) -> None:
        """Raises UsageError when it is not in use."""
        self._native.free(number)

    def __getitem__(self, number: int) -> Any:
        """A copy. Raises UsageError when it is not in use."""
        return np.frombuffer(self._native.read(number), self._row)[0]

    def __setitem__(self, number: int, item: Any) -> None:
        self._native.write(number, self._pack(item))

    def __iter__(self) -> Iterator[int]:
        """The numbers in use, ascending."""
        return iter(np.frombuffer(self._native.live(), np.uint64).tolist())

    @property
    def items(self) -> Rows:
        """All items in place, read-only; those not in use hold anything."""
        return np.frombuffer(self._native.view(), self._row)


class ArrayView:
    """A NumPy array of fixed length. Reading is `array[...]`; writing is `array[i] = item`, or `edit`."""

    def __init__(self, native: StateArray, about: Array) -> None:
        self._native, self._row, self._pack = native, about.row, _packer(about.row)
        self._all = np.frombuffer(native.view(), about.row)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: Any) -> Any:
        """Items in place, read-only: they change when the array does."""
        return self._all[index]

    def __setitem__(self, index: int, item: Any) -> None:
        self._native.write(range(len(self))[index], self._pack(item))

    def write(self, start: int, items: Any) -> None:
        """Write as many items as are given, from `start` on. Raises UsageError, StateFullError."""
        self._native.write(start, octets(np.ascontiguousarray(items, self._row)))

    def edit(self, start: int, count: int) -> Rows:
        """Writable items in place, for this poll only."""
        return np.frombuffer(self._native.edit(start, count), self._row)


class EngineState:
    """The objects of an engine's state as attributes."""

    def __init__(self, native: State, schema: Schema) -> None:
        for name, about in schema.objects.items():
            setattr(self, name, _view(native, name, about))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the schema has no object {name!r}")


def slot_type(native: StateTable, key: DType, row: DType) -> DType:
    """A table's slot as NumPy sees it."""
    return np.dtype(
        {
            "names": ["crc", "state", "key", "row"],
            "formats": ["<u4", "<u4", key, row],
            "offsets": [0, 4, 8, 8 + native.key],
            "itemsize": native.slot,
        }
    )


def _view(native: State, name: str, about: Object) -> TableView | SlabView | ArrayView:
    if isinstance(about, Table):
        return TableView(native.table(name), about)
    if isinstance(about, Slab):
        return SlabView(native.slab(name), about)
    return ArrayView(native.array(name), about)


def _packer(kind: DType) -> Callable[[Any], bytes]:
    """How a key or a row of this type becomes bytes; the common ones without NumPy's detour."""
    size = kind.itemsize
    if kind.names is not None:
        return lambda row: _pack_fields(kind, row)
    if kind.kind == "S":
        return lambda text: _pack_text(text, size)
    if kind.kind in "ui":
        signed = kind.kind == "i"
        return lambda number: int(number).to_bytes(size, "little", signed=signed)
    return lambda value: np.array(value, kind).tobytes()


def _pack_text(text: bytes | str, size: int) -> bytes:
    given = text.encode() if isinstance(text, str) else bytes(text)
    if len(given) > size:
        raise UsageError(f"{given!r} is longer than {size} bytes", "choose a longer type in the schema")
    return given.ljust(size, b"\0")


def _pack_fields(kind: DType, row: Any) -> bytes:
    names = kind.names or ()
    if isinstance(row, Mapping):
        if row.keys() != set(names):
            raise UsageError(f"a row has the fields {', '.join(names)}, not {', '.join(map(str, row))}")
        row = tuple(row[name] for name in names)
    elif isinstance(row, tuple) and len(row) != len(names):
        raise UsageError(f"a row has {len(names)} fields ({', '.join(names)}), not {len(row)}")
    return np.array(row, kind).tobytes()
