"""State of one schema version into state of another, while the old one is still being used.

`build` converts everything that is there, `converge` in rounds what changed meanwhile, until little is left;
`catch_up` is one more round, for as long as the new engine waits; `finish` converts the rest when nobody runs the old
engine any more. The old segment is only read, but for the marks that its engine sets on what it changes.

What makes concurrent reading sound: marks are set after the change that they tell of, and in the order of the
changes; slots have checksums, so that a half-written one is seen; and in each round whatever left its slot is deleted
before anything is put, so that a row that moved from one slot to another is never deleted by its old place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from snap.dataplane import _native
from snap.dataplane.errors import SchemaError, StateDamagedError, StateFullError
from snap.ipc import faults

from .crc import crc32c
from .schema import Object, Rows, Schema, Table, check_exchange, described, octets

F = Callable[..., Any]
Step = Callable[[str, int, int, int], object]
"""Told of progress: stage, done, total, round."""

_MARK: Final = "_snap_migrates"
_BATCH_BYTES: Final = 1 << 17
"""What is converted in one commit: well within the undo log."""

_FEW: Final = 64
_ROUNDS: Final = 20
_SHRINKS: Final = 0.8
"""What a round of converting may have, of the one before, to be worth another."""

_MOMENT: Final = 0.5
"""Seconds for which nobody may serve, at the most, because of what is left to convert."""

_ACKNOWLEDGED: Final = 3.0
"""Seconds for the old engine to say that it marks its changes; one that is idle looks once a second."""


def migrate(name: str, source: int, target: int) -> Callable[[F], F]:
    """Makes a method `(self, old, new)` of an Engine convert the rows of object `name` from schema version `source`
    to `target` (which may be the lower one). `old` and `new` are NumPy arrays of as many rows; fields of equal
    name were copied already and the rest is zero. It must depend on nothing but `old`."""

    def mark(method: F) -> F:
        setattr(method, _MARK, (*getattr(method, _MARK, ()), (name, source, target)))
        return method

    return mark


class Convert(Protocol):
    """Rows of the object `name`, as bytes of the old size each, into such of the new size."""

    def __call__(self, name: str, rows: Rows) -> Rows: ...


class Migration:
    """From `source` into `target`, a segment that was just formatted. Raises SchemaError when the objects cannot be
    matched; every step raises StateFullError when they do not fit, and what the author's functions raise."""

    def __init__(
        self, source: _native.State, target: _native.State, convert: Convert, step: Step = lambda *_: None
    ) -> None:
        self.source = source
        self.migrated = self.rounds = self.left = self.undone = self.converted = 0
        self._target, self._step = target, step
        self._complete = False
        olds = {spec["name"]: spec for spec in source.header["objects"]}
        self._movers: list[_Mover] = []
        for spec in target.header["objects"]:
            old = olds.get(spec["name"])
            if old is not None:
                self._movers.append(_mover(source, target, old, spec, convert))

    def build(self, asked: Callable[[], object] = lambda: None) -> None:
        """Convert in the background. When no engine answers, `finish` will do all of it. `asked` runs after
        the engine was asked to mark its changes (tests have no other process that would answer)."""
        self.source.track(True)
        asked()
        if self._acknowledged():
            self._convert_all()

    def converge(self) -> None:
        """Convert what changed meanwhile, and what changed while that was done, until hardly anything did. Raises
        SchemaError when the state changes so fast that nobody would serve for more than a moment."""
        before = None
        for _ in range(_ROUNDS):
            begin = time.monotonic()
            moved = self.catch_up()
            if moved <= _FEW or (before is not None and moved > before * _SHRINKS):
                break
            before = moved
        if moved > _FEW and (took := time.monotonic() - begin) > _MOMENT:
            raise SchemaError(
                f"the state changes faster than it is converted: {moved} entries within {took:.1f} s, again and again",
                "upgrade when there is less to do",
            )
        # Ready: what comes now is a part of waiting.
        self._step = lambda *_: None

    def catch_up(self) -> int:
        """Convert what changed since the last look; how much. Nothing, before everything was converted once."""
        if not self._complete:
            return 0
        self.left = sum(self._round(mover, frozen=False) for mover in self._movers)
        if self.left:
            self.rounds += 1
            self.migrated += self.left
            self._step("convert", self.left, self.left, self.rounds)
        return self.left

    def finish(self) -> int:
        """Nobody runs the old engine: convert the rest; how much that was."""
        before = self.migrated
        self.undone = self.source.recover()
        if not self._complete:
            self._convert_all()
        self.migrated += sum(self._round(mover, frozen=True) for mover in self._movers)
        self.source.track(False)
        self.converted = self.migrated - before
        return self.converted

    def _convert_all(self) -> None:
        for mover in self._movers:
            faults.reach("module.convert")
            for done in mover.everything():
                self._target.commit()
                self._step("convert", done, mover.total, 0)
            self.migrated += mover.moved
        self._complete = True

    def _round(self, mover: _Mover, frozen: bool) -> int:
        moved = 0
        for done in mover.changed(frozen):
            self._target.commit()
            moved += done
        return moved

    def _acknowledged(self) -> bool:
        end = time.monotonic() + _ACKNOWLEDGED
        owner = self.source.header["owner"]
        while not self.source.tracked():
            # After a crash nobody is there to answer, and the clients wait.
            if time.monotonic() > end or (owner and not Path(f"/proc/{owner}").exists()):
                return False
            time.sleep(0.001)
        return True


class _Mover(Protocol):
    total: int
    moved: int

    def everything(self) -> Any:
        """Batch by batch; yields how much was looked at so far."""

    def changed(self, frozen: bool) -> Any:
        """Batch by batch what is marked; yields how much that was. `frozen`: nobody changes it any more."""


class _Tables:
    def __init__(self, old: _native.StateTable, new: _native.StateTable, convert: Convert, name: str) -> None:
        self.total = self.moved = 0
        self._old, self._new, self._convert, self._name = old, new, convert, name
        self._slot = np.dtype(
            {
                "names": ["crc", "state", "key", "row"],
                "formats": ["<u4", "<u4", (np.uint8, (old.key,)), (np.uint8, (old.item,))],
                "offsets": [0, 4, 8, 8 + old.key],
                "itemsize": old.slot,
            }
        )
        self._batch = max(1, min(4096, _BATCH_BYTES // (max(old.slot, new.slot) + 64)))
        # Which key the new table has on account of each slot. Memory is taken when it is written to.
        self._keys = np.zeros((old.count, old.key), np.uint8)
        self._put = np.zeros(old.count, np.bool_)
        self._again = np.empty(0, np.uint64)

    def everything(self) -> Any:
        self.total = len(self._old)
        start = 0
        while True:
            slots = np.empty(self._batch, self._slot)
            count = self._old.slots(start, octets(slots))
            if count == 0:
                return
            numbers = np.arange(start, start + count, dtype=np.uint64)
            sound = self._sound(slots[:count])
            self._again = np.concatenate([self._again, numbers[~sound]])
            self._move(numbers, slots[:count], sound)
            start += count
            yield start

    def changed(self, frozen: bool) -> Any:
        first = _numbers(self._old.take_dirty())
        # A look takes time: what it found late may follow from what it passed by. That is found by a second look.
        second = _numbers(self._old.take_dirty())
        puts = np.union1d(first, self._again)
        both = np.union1d(puts, second)
        if len(both) == 0:
            return
        if frozen:
            puts = both
            if len(both) <= self._batch:
                # In the blackout: one look does.
                slots, sound = self._gather(both, frozen)
                self._forget(both, slots, sound)
                self._move(both, slots, sound)
                yield len(both)
                return
        again = [np.setdiff1d(second, puts)]
        for numbers in self._batches(both):
            slots, sound = self._gather(numbers, frozen)
            self._forget(numbers, slots, sound)
            yield 0
        for numbers in self._batches(puts):
            slots, sound = self._gather(numbers, frozen)
            # Another key than when it was looked at for deleting: its turn comes again.
            taken = self._put[numbers] & (slots["key"] != self._keys[numbers]).any(axis=1)
            again.append(numbers[~sound | taken])
            self._move(numbers, slots, sound & ~taken)
            yield len(numbers)
        self._again = np.concatenate(again)

    def _forget(self, numbers: Rows, slots: Rows, sound: Rows) -> None:
        """Delete what was put on account of slots that hold it no more."""
        other = (slots["state"] != 1) | (slots["key"] != self._keys[numbers]).any(axis=1)
        gone = numbers[self._put[numbers] & sound & other]
        self._new.delete_packed(octets(self._keys[gone]))
        self._put[gone] = False

    def _move(self, numbers: Rows, slots: Rows, wanted: Rows) -> None:
        live = wanted & (slots["state"] == 1)
        keys, rows = np.ascontiguousarray(slots["key"][live]), np.ascontiguousarray(slots["row"][live])
        if len(keys):
            self._new.put_packed(octets(keys), octets(self._convert(self._name, rows)))
        self._keys[numbers[live]] = keys
        self._put[numbers[live]] = True
        self.moved += len(keys)

    def _gather(self, numbers: Rows, frozen: bool) -> tuple[Rows, Rows]:
        slots = np.empty(len(numbers), self._slot)
        self._old.gather(octets(numbers), octets(slots))
        sound = self._sound(slots)
        if frozen and not sound.all():
            raise StateDamagedError(f"the checksum of slot {numbers[~sound][0]} of {self._name!r} is wrong")
        return slots, sound

    def _sound(self, slots: Rows) -> Rows:
        """Live slots must have the right checksum; one that is not live has none."""
        raw = slots.view(np.uint8).reshape(len(slots), slots.itemsize)
        sound: Rows = (slots["state"] != 1) | (crc32c(raw[:, 4:]) == slots["crc"])
        return sound

    def _batches(self, numbers: Rows) -> list[Rows]:
        return [numbers[start : start + self._batch] for start in range(0, len(numbers), self._batch)]


class _Slabs:
    def __init__(self, old: _native.StateSlab, new: _native.StateSlab, convert: Convert, name: str) -> None:
        self.total = self.moved = 0
        self._old, self._new, self._convert, self._name = old, new, convert, name
        self._batch = max(1, min(1024, _BATCH_BYTES // (max(old.item, new.item) + 128)))
        self._items = np.frombuffer(old.view(), np.uint8).reshape(old.count, old.item)

    def everything(self) -> Any:
        live = _numbers(self._old.live())
        self.total = len(live)
        for start in range(0, len(live), self._batch):
            self.moved += self._move(live[start : start + self._batch])
            yield self.moved

    def changed(self, frozen: bool) -> Any:
        dirty = _numbers(self._old.take_dirty())
        live = np.isin(dirty, _numbers(self._old.live()))
        ours = set(_numbers(self._new.live()).tolist())
        for number in dirty[~live].tolist():
            if number in ours:
                self._new.free(number)
        for start in range(0, len(dirty), self._batch):
            part = slice(start, start + self._batch)
            self._move(dirty[part][live[part]])
            yield len(dirty[part])

    def _move(self, numbers: Rows) -> int:
        if len(numbers) and int(numbers[-1]) >= self._new.count:
            raise StateFullError(
                f"slab {self._name!r} has item {numbers[-1]}, the new one {self._new.count} items"
            )
        rows = self._convert(self._name, np.ascontiguousarray(self._items[numbers]))
        for number, row in zip(numbers.tolist(), rows, strict=True):
            self._new.put_at(number, row.tobytes())
        return len(numbers)


class _Arrays:
    def __init__(
        self,
        old: _native.StateArray,
        new: _native.StateArray,
        convert: Convert,
        name: str,
        used: Callable[[], int],
    ) -> None:
        self.total = self.moved = 0
        self._used = used
        self._old, self._new, self._convert, self._name = old, new, convert, name
        self._count = min(old.count, new.count)
        self._batch = max(1, _BATCH_BYTES // max(old.item, new.item))

    def everything(self) -> Any:
        self.total = min(self._used(), self._count)
        for start in range(0, self.total, self._batch):
            self.moved += self._move(start, min(start + self._batch, self.total))
            yield self.moved

    def changed(self, frozen: bool) -> Any:
        per = self._old.per_block
        for block in _numbers(self._old.take_dirty()).tolist():
            end = min((block + 1) * per, self._count)
            for start in range(block * per, end, self._batch):
                yield self._move(start, min(start + self._batch, end))

    def _move(self, start: int, end: int) -> int:
        rows = np.frombuffer(self._old.read(start, end - start), np.uint8).reshape(
            end - start, self._old.item
        )
        self._new.write(start, octets(self._convert(self._name, rows)))
        return end - start


def _mover(
    source: _native.State, target: _native.State, old: dict[str, Any], new: dict[str, Any], convert: Convert
) -> _Mover:
    name, kind = new["name"], new["kind"]
    if (old["kind"], old["key"]) != (kind, new["key"]):
        raise SchemaError(
            f"{name!r} was a {old['kind']} with keys of {old['key']} bytes, now it is a {kind} of {new['key']}",
            "give the new one another name",
        )
    if kind == "table":
        return _Tables(source.table(name), target.table(name), convert, name)
    if kind == "slab":
        return _Slabs(source.slab(name), target.slab(name), convert, name)
    return _Arrays(source.array(name), target.array(name), convert, name, lambda: _used(source, name))


def _used(state: _native.State, name: str) -> int:
    """Items of an array up to the last that was ever written."""
    return next(int(spec["used"]) for spec in state.header["objects"] if spec["name"] == name)


def _numbers(packed: bytes) -> Rows:
    return np.frombuffer(packed, np.uint64)


# -- how an engine in Python converts -------------------------------------------------------------------------


def converter(engine: Any, schema: Schema, header: dict[str, Any]) -> Convert:
    """What the `migrate` methods of `engine`, and the default, make of rows of the state with this `header`.

    Raises SchemaError when its version cannot be taken over, StateDamagedError when it describes itself wrongly.
    """
    check_exchange(schema.version, schema.oldest, header["version"], header["oldest"])
    methods = _methods(engine, header["version"], schema.version)
    rules = {}
    for spec in header["objects"]:
        about = schema.objects.get(spec["name"])
        if about is not None:
            key, row = described(spec["fields"], spec["key"], spec["item"])
            if isinstance(about, Table) and key != about.key:
                raise SchemaError(
                    f"the keys of {spec['name']!r} were of another type", "give the new one another name"
                )
            rules[spec["name"]] = _rule(row, about, methods.get(spec["name"]))
    return lambda name, rows: rules[name](rows)


def _rule(old: Any, about: Object, method: F | None) -> Callable[[Rows], Rows]:
    if old == about.row and method is None:
        return lambda rows: rows
    shared = [
        name
        for name in about.row.names or ()
        if name in (old.names or ()) and old[name].shape == about.row[name].shape
    ]

    def convert(rows: Rows) -> Rows:
        before, after = rows.reshape(-1).view(old), np.zeros(len(rows), about.row)
        for name in shared:
            after[name] = before[name]
        if about.row.names is None and old.names is None:
            after[:] = before
        if method is not None:
            method(before, after)
        return after.view(np.uint8).reshape(len(rows), after.itemsize)

    return convert


def check_methods(engine: Any) -> None:
    """Raises SchemaError for a `migrate` method of an engine (or its class) that its schema has no use for."""
    schema: Schema = engine.schema or Schema()
    for attribute in dir(engine):
        for name, begin, end in getattr(getattr(engine, attribute), _MARK, ()):
            if name not in schema.objects:
                raise SchemaError(f"@migrate({name!r}, {begin}, {end}): the schema has no such object")
            if end != schema.version:
                raise SchemaError(
                    f"@migrate({name!r}, {begin}, {end}): the schema is of version {schema.version}",
                    "a migration leads to the version of the code that it is in",
                )


def _methods(engine: Any, source: int, target: int) -> dict[str, F]:
    """The `migrate` methods for this step, by object. Raises SchemaError for one that would be skipped."""
    found, skipped = {}, []
    for attribute in dir(type(engine)):
        method = getattr(type(engine), attribute)
        for name, begin, end in getattr(method, _MARK, ()):
            if (begin, end) == (source, target):
                found[name] = getattr(engine, attribute)
            elif _within(begin, end, source, target):
                skipped.append(name)
    for name in skipped:
        if name not in found:
            raise SchemaError(
                f"{name!r} has a migration for a part of the way from {source} to {target}, none for all of it",
                f'write @migrate("{name}", {source}, {target}), or raise `oldest`',
            )
    return found


def _within(begin: int, end: int, source: int, target: int) -> bool:
    """Whether the step is a part of the way, in the same direction."""
    low, high = sorted((source, target))
    return (begin < end) == (source < target) and low <= min(begin, end) and max(begin, end) <= high
