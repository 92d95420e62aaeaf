"""State of one version becomes state of another, while its engine goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from snap.dataplane._native import State
from snap.dataplane.errors import SchemaError, StateDamagedError, StateFullError
from snap.modules import Array, Engine, Schema, Slab, Table, migrate
from snap.modules.crc import crc32c
from snap.modules.migration import Migration, converter
from snap.modules.tables import EngineState

Open = Callable[[Schema], tuple[State, EngineState]]
Rows = np.ndarray[Any, Any]


class First(Engine):
    schema = Schema(
        version=1,
        totals=Table(key="u4", row={"count": "u4", "sum": "f8"}, capacity=3000),
        ring=Array({"t": "f8"}, 5000),
        people=Slab({"name": "S8"}, 500),
        dropped=Array("u8", 10),
    )


class Second(Engine):
    schema = Schema(
        version=2,
        oldest=1,
        totals=Table(key="u4", row={"mean": "f8", "count": "u8"}, capacity=4000),
        ring=Array({"t": "f8", "seen": "u1"}, 6000),
        people=Slab({"name": "S16", "age": "u1"}, 600),
        fresh=Table(key="u4", row="u4", capacity=10),
    )

    @migrate("totals", 1, 2)
    def _means(self, old: Rows, new: Rows) -> None:
        new["mean"] = old["sum"] / np.maximum(old["count"], 1)


@pytest.fixture
def opened() -> Iterator[Open]:
    fds: list[int] = []
    states: list[State] = []

    def make(schema: Schema) -> tuple[State, EngineState]:
        fd = os.memfd_create("state", os.MFD_CLOEXEC)
        fds.append(fd)
        os.ftruncate(fd, State.MIN_BYTES + (4 << 20))
        State.format(fd, "engine", "module.engine", schema.version, schema.oldest, schema.specs())
        state = State(fd)
        states.append(state)
        return state, EngineState(state, schema)

    yield make
    for state in states:
        state.close()
    for fd in fds:
        os.close(fd)


def fill(state: EngineState) -> None:
    for number in range(100):
        state.totals[number] = (number, number * 2.5)
    for number in range(0, 100, 3):
        del state.totals[number]
    state.ring.write(0, [(float(n),) for n in range(50)])
    for name in (b"ann", b"bob", b"cem"):
        state.people.allocate((name,))
    state.people.free(1)
    state.dropped[0] = 1


def migration(source: State, target: State, engine: Engine) -> Migration:
    assert engine.schema is not None
    return Migration(source, target, converter(engine, engine.schema, source.header))


def test_rows_are_converted_by_the_authors_method_and_equal_names_are_copied(opened: Open) -> None:
    source, before = opened(First.schema)
    target, after = opened(Second.schema)
    fill(before)
    source.commit()
    moving = migration(source, target, Second())
    assert moving.finish() == moving.migrated > 66
    assert {key: (row["mean"], row["count"]) for key, row in after.totals.items()} == {
        n: (2.5, n) for n in range(100) if n % 3
    }
    assert after.ring["t"][:50].tolist() == list(range(50)) and not after.ring["seen"].any()
    assert {n: after.people[n]["name"] for n in after.people} == {0: b"ann", 2: b"cem"}
    assert len(after.fresh) == 0 and target.verify() == []


def test_the_same_works_downwards_with_what_old_code_knows(opened: Open) -> None:
    source, before = opened(Second.schema)
    target, after = opened(First.schema)
    before.totals[5] = (2.5, 7)
    before.people.allocate((b"ann", 33))
    source.commit()
    migration(source, target, First()).finish()
    assert after.totals[5].tolist() == (7, 0.0)
    assert after.people[0]["name"] == b"ann"


def test_a_method_may_lead_downwards_too(opened: Open) -> None:
    class Back(Engine):
        schema = First.schema

        @migrate("totals", 2, 1)
        def _sums(self, old: Rows, new: Rows) -> None:
            new["sum"] = old["mean"] * old["count"]

    source, before = opened(Second.schema)
    target, after = opened(First.schema)
    before.totals[5] = (2.5, 4)
    source.commit()
    migration(source, target, Back()).finish()
    assert after.totals[5].tolist() == (4, 10.0)


def test_an_unfinished_poll_of_the_old_engine_is_not_migrated(opened: Open) -> None:
    source, before = opened(First.schema)
    target, after = opened(Second.schema)
    before.totals[1] = (1, 1.0)
    source.commit()
    before.totals[1] = (9, 9.0)
    before.totals[2] = (9, 9.0)
    moving = migration(source, target, Second())
    moving.finish()
    assert moving.undone > 0
    assert {key: row["count"] for key, row in after.totals.items()} == {1: 1}


def test_a_version_out_of_reach_is_refused(opened: Open) -> None:
    source, _ = opened(First.schema)
    with pytest.raises(SchemaError, match="reads from 2 on"):
        converter(First(), Schema(version=3, oldest=2), source.header)
    newer, _ = opened(Schema(version=3, oldest=3))
    with pytest.raises(SchemaError, match="can go back to 3"):
        converter(First(), First.schema, newer.header)


def test_a_method_for_a_part_of_the_way_is_not_skipped_in_silence(opened: Open) -> None:
    class Third(Second):
        schema = Schema(version=3, oldest=1, totals=Second.schema.objects["totals"])

    source, _ = opened(First.schema)
    with pytest.raises(SchemaError, match=r'@migrate\("totals", 1, 3\)'):
        converter(Third(), Third.schema, source.header)


def test_an_object_of_another_kind_or_key_is_refused(opened: Open) -> None:
    source, _ = opened(First.schema)
    for totals in (Array("u4", 10), Table(key="u8", row="u4", capacity=10)):
        schema = Schema(version=2, oldest=1, totals=totals)
        target, _ = opened(schema)
        with pytest.raises(SchemaError, match="another name"):
            Migration(source, target, lambda name, rows: rows)
    with pytest.raises(SchemaError, match="another type"):
        key = Table(key="f4", row="u4", capacity=10)
        converter(Second(), Schema(version=2, oldest=1, totals=key), source.header)


def test_what_does_not_fit_the_new_capacity_says_so(opened: Open) -> None:
    source, before = opened(First.schema)
    fill(before)
    source.commit()
    for smaller in ({"totals": Table(key="u4", row="u4", capacity=5)}, {"people": Slab({"name": "S8"}, 1)}):
        schema = Schema(version=2, oldest=1, **smaller)
        target, _ = opened(schema)
        with pytest.raises(StateFullError):
            Migration(source, target, converter(First(), schema, source.header)).finish()


def test_a_damaged_slot_is_found_and_not_converted(opened: Open) -> None:
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    os.ftruncate(fd, State.MIN_BYTES + (4 << 20))
    State.format(fd, "engine", "module.engine", 1, 1, First.schema.specs())
    source = State(fd)
    table = EngineState(source, First.schema).totals
    table[0xABCDEF] = (0x12345678, 1.0)
    source.commit()
    place = os.pread(fd, os.fstat(fd).st_size, 0).index(
        (0x12345678).to_bytes(4, "little"), State.MIN_BYTES // 2
    )
    os.pwrite(fd, b"\xff", place)
    target, after = opened(Second.schema)
    with pytest.raises(StateDamagedError, match="checksum of slot 0"):
        migration(source, target, Second()).finish()
    assert len(after.totals) == 0
    source.close()
    os.close(fd)


def test_a_checksum_is_crc_32c() -> None:
    rows = np.frombuffer(b"123456789" * 2, np.uint8).reshape(2, 9)
    assert [hex(crc) for crc in crc32c(rows)] == ["0xe3069283"] * 2


def changing(source: State, seed: int) -> None:
    """An engine that never rests: inserts, deletes and moves rows, and now and then takes a poll back."""
    chance = random.Random(seed)
    state = EngineState(source, First.schema)
    while True:
        for _ in range(chance.randint(1, 5)):
            key = chance.randrange(2500)
            if chance.random() < 0.4 and key in state.totals:
                del state.totals[key]
                if chance.random() < 0.5:
                    state.totals[key + 1] = (1, chance.random())
            else:
                state.totals[key] = (chance.randrange(1000), chance.random())
        state.ring[chance.randrange(5000)] = (chance.random(),)
        people = list(state.people)
        if people and chance.random() < 0.5:
            state.people.free(chance.choice(people))
        elif len(people) < 400:
            state.people.allocate((b"p%d" % chance.randrange(1000),))
        if chance.random() < 0.05:
            source.abort()
        else:
            source.commit()


@pytest.mark.parametrize("how", ["killed", "before it is asked to mark"])
def test_a_migration_beside_a_busy_engine_that_dies_gives_exactly_what_it_had_committed(
    opened: Open, how: str
) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    for turn in range(4):
        source, before = opened(First.schema)
        target, after = opened(Second.schema)
        child = os.fork()
        if child == 0:
            try:
                changing(source, seed + turn)
            finally:
                os._exit(1)
        try:
            moving = migration(source, target, Second())
            time.sleep(0.05)
            if how == "killed":
                moving.build()
                for _ in range(20):
                    moving.catch_up()
                    time.sleep(0.001)
                assert moving.rounds > 0
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        moving.finish()
        assert {key: row["count"] for key, row in after.totals.items()} == {
            key: row["count"] for key, row in before.totals.items()
        }
        assert np.array_equal(after.ring["t"][:5000], before.ring["t"])
        assert {n: after.people[n]["name"] for n in after.people} == {
            n: before.people[n]["name"] for n in before.people
        }
        assert target.verify() == [] == source.verify()
        source.close()
        target.close()
