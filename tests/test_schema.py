"""Schemas, and the tables, slabs and arrays that an engine sees."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from snap.dataplane._native import State
from snap.dataplane.errors import SchemaError, StateDamagedError, StateFullError, UsageError
from snap.modules import Array, Schema, Slab, Table
from snap.modules.schema import check_exchange, described
from snap.modules.tables import EngineState

Open = Callable[[Schema], tuple[State, EngineState]]
SCHEMA = Schema(
    version=2,
    oldest=1,
    totals=Table(key="S16", row={"count": "u8", "last": "f8"}, capacity=1000),
    ids=Table(key="i4", row="f8", capacity=100),
    edges=Table(key={"a": "u4", "b": "u4"}, row={"weights": "(3,)f4", "name": "S8"}, capacity=100),
    history=Array({"t": "f8"}, 1000),
    counters=Array("u4", 10),
    sessions=Slab({"since": "f8", "user": "S8"}, 64),
)


@pytest.fixture
def opened() -> Iterator[Open]:
    fds: list[int] = []
    states: list[State] = []

    def make(schema: Schema) -> tuple[State, EngineState]:
        fd = os.memfd_create("state", os.MFD_CLOEXEC)
        fds.append(fd)
        os.ftruncate(fd, State.MIN_BYTES + (1 << 20))
        State.format(fd, "engine", "module.engine", schema.version, schema.oldest, schema.specs())
        state = State(fd)
        states.append(state)
        return state, EngineState(state, schema)

    yield make
    for state in states:
        state.close()
    for fd in fds:
        os.close(fd)


def test_a_table_is_like_a_dictionary(opened: Open) -> None:
    _, state = opened(SCHEMA)
    table = state.totals
    table[b"one"] = {"count": 1, "last": 0.5}
    table["two"] = (2, 1.5)
    table[b"three"] = table[b"two"]
    assert table[b"one"]["count"] == 1 and table[b"three"]["last"] == 1.5
    assert b"one" in table and b"four" not in table and len(table) == 3
    assert table.get(b"four") is None and table.get(b"four", 7) == 7
    assert list(table) == [b"one", b"two", b"three"]
    del table[b"two"]
    assert {key: row["count"] for key, row in table.items()} == {b"one": 1, b"three": 2}
    for act in (lambda: table[b"two"], lambda: table.__delitem__(b"two")):
        with pytest.raises(KeyError):
            act()


def test_keys_may_be_numbers_or_several_fields(opened: Open) -> None:
    _, state = opened(SCHEMA)
    state.ids[-5] = 2.5
    assert state.ids[-5] == 2.5 and list(state.ids) == [-5]
    state.edges[(1, 2)] = ([1, 2, 3], b"edge")
    assert state.edges[{"a": 1, "b": 2}]["weights"].tolist() == [1, 2, 3]
    assert (2, 1) not in state.edges
    with pytest.raises(OverflowError):
        state.ids[1 << 40] = 1.0


def test_many_rows_at_once_are_as_the_same_one_by_one(opened: Open) -> None:
    _, state = opened(SCHEMA)
    keys = np.array([b"k%d" % n for n in range(500)], "S16")
    rows = np.zeros(500, [("count", "<u8"), ("last", "<f8")])
    rows["count"] = np.arange(500)
    state.totals.put_many(keys, rows)
    assert state.totals[b"k77"]["count"] == 77
    got, found = state.totals.get_many(np.append(keys[:3], b"none"))
    assert got["count"].tolist() == [0, 1, 2, 0] and found.tolist() == [True, True, True, False]
    assert state.totals.delete_many(keys[:100]) == 100 and len(state.totals) == 400
    assert state.totals.rows["count"].sum() == sum(range(100, 500))
    assert state.totals.keys().tolist() == keys[100:].tolist()
    live = state.totals.slots[state.totals.slots["state"] == 1]
    assert live["row"]["count"].sum() == sum(range(100, 500))
    with pytest.raises(ValueError, match="read-only"):
        state.totals.slots["row"]["count"][0] = 1


def test_a_slab_gives_numbers_out_and_takes_them_back(opened: Open) -> None:
    _, state = opened(SCHEMA)
    first, second = state.sessions.allocate((1.5, b"ann")), state.sessions.allocate()
    assert state.sessions[first]["user"] == b"ann" and state.sessions[second]["since"] == 0
    state.sessions[second] = {"since": 2.5, "user": b"bob"}
    assert list(state.sessions) == [first, second]
    assert state.sessions.items["since"][second] == 2.5
    state.sessions.free(first)
    with pytest.raises(UsageError):
        state.sessions[first]


def test_an_array_is_numpys_to_read_and_written_whole_or_in_place(opened: Open) -> None:
    _, state = opened(SCHEMA)
    state.counters[3] = 7
    state.counters[-1] = 9
    state.history.write(10, [(1.0,), (2.0,)])
    state.history.edit(20, 2)["t"] = [3.0, 4.0]
    assert state.counters[:].tolist() == [0, 0, 0, 7, 0, 0, 0, 0, 0, 9]
    assert state.history["t"].sum() == 10.0
    with pytest.raises(ValueError, match="read-only"):
        state.history["t"][0] = 1
    with pytest.raises(IndexError):
        state.counters[10] = 1


def test_what_was_not_committed_is_gone_after_an_abort(opened: Open) -> None:
    native, state = opened(SCHEMA)
    state.totals[b"kept"] = (1, 0.0)
    native.commit()
    state.totals[b"kept"] = (2, 0.0)
    state.totals[b"new"] = (3, 0.0)
    state.counters.edit(0, 10)[:] = 5
    state.sessions.allocate()
    assert native.abort() > 0
    assert state.totals[b"kept"]["count"] == 1 and b"new" not in state.totals
    assert not state.counters[:].any() and len(state.sessions) == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"count": 1}, "has the fields count, last"),
        ({"count": 1, "first": 2}, "not count, first"),
        ((1,), "2 fields"),
    ],
)
def test_a_row_of_other_fields_is_refused(opened: Open, row: object, said: str) -> None:
    _, state = opened(SCHEMA)
    with pytest.raises(UsageError, match=said):
        state.totals[b"x"] = row
    assert len(state.totals) == 0


def test_a_key_that_is_too_long_is_refused_and_a_full_table_says_so(opened: Open) -> None:
    _, state = opened(SCHEMA)
    with pytest.raises(UsageError, match="longer than 16 bytes"):
        state.totals[b"x" * 17] = (1, 1.0)
    with pytest.raises(StateFullError, match="all its 100 rows"):
        for number in range(101):
            state.ids[number] = 0.0


def test_random_operations_on_a_table_agree_with_a_dictionary(opened: Open) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    native, state = opened(SCHEMA)
    model: dict[int, float] = {}
    for _ in range(2000):
        key = chance.randrange(120)
        if chance.random() < 0.4:
            assert (key in state.ids) == (key in model)
            if key in model:
                del state.ids[key], model[key]
        elif len(model) < 100:
            state.ids[key] = model[key] = chance.random()
        if chance.random() < 0.1:
            native.commit()
    assert dict(state.ids.items()) == model and native.verify() == []


# -- schemas -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Table(key="S16", row={"a": "O"}, capacity=1),
        lambda: Table(key="nonsense", row="u8", capacity=1),
        lambda: Table(key="S0", row="u8", capacity=1),
        lambda: Array({"a": "u8,u8"}, 1),
        lambda: Schema(version=0),
        lambda: Schema(version=2, oldest=3),
        lambda: Schema(_hidden=Array("u8", 1)),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        make()


def test_every_object_describes_itself_in_the_segment(opened: Open) -> None:
    native, _ = opened(SCHEMA)
    for spec in native.header["objects"]:
        about = SCHEMA.objects[spec["name"]]
        assert described(spec["fields"], spec["key"], spec["item"]) == (about.key, about.row)
    SCHEMA.check_same(native.header)


HOSTILE = [
    "",
    "{",
    "[]",
    '{"row": 5}',
    '{"row": "O"}',
    '{"row": "<u8", "key": "<u8"}',
    '{"row": "<f4"}',
    '{"row": [["a", "O", []]]}',
    '{"row": [["a", "<u8", []], ["a", "<u8", []]]}',
    '{"row": [["a", "<u8", [4611686018427387904]]]}',
    '{"row": [["a", "<u8", [-1]]]}',
    '{"row": "<u8", "more": 1}',
    '{"row": [["a", "u8,u8", []]]}',
    '{"row": "' + "(" * 500 + '"}',
]


@pytest.mark.parametrize("fields", HOSTILE)
def test_a_description_that_is_wrong_is_damage(fields: str) -> None:
    with pytest.raises(StateDamagedError):
        described(fields, 0, 8)


@pytest.mark.parametrize(
    "other",
    [
        Schema(
            version=2, oldest=1, totals=Table(key="S16", row={"count": "u8", "last": "f4"}, capacity=1000)
        ),
        Schema(version=2, oldest=1, totals=Table(key="S16", row={"count": "u8", "last": "f8"}, capacity=999)),
        Schema(
            version=2, oldest=1, others=Table(key="S16", row={"count": "u8", "last": "f8"}, capacity=1000)
        ),
        Schema(version=2, oldest=1),
    ],
)
def test_a_changed_schema_of_the_same_version_is_noticed(opened: Open, other: Schema) -> None:
    mine = Schema(version=2, oldest=1, totals=SCHEMA.objects["totals"])
    native, _ = opened(mine)
    with pytest.raises(SchemaError, match="raise `version`"):
        other.check_same(native.header)


@pytest.mark.parametrize(
    ("versions", "fine"),
    [
        ((2, 1, 1, 1), True),
        ((1, 1, 2, 1), True),
        ((3, 2, 1, 1), False),
        ((1, 1, 3, 2), False),
        ((2, 1, 3, 2), True),
    ],
)
def test_the_newer_version_says_how_far_back_state_can_be_exchanged(
    versions: tuple[int, int, int, int], fine: bool
) -> None:
    if fine:
        check_exchange(*versions)
    else:
        with pytest.raises(SchemaError, match="in between"):
            check_exchange(*versions)
