"""State segments as Python sees them: objects, transactions, views, tracking, damage, and a writer that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest

from snap.dataplane._native import State
from snap.dataplane.errors import SchemaError, StateDamagedError, StateError, StateFullError, UsageError

FIELDS = json.dumps([["hits", "u8"], ["name", "S24"]])
OBJECTS = [
    ("table", "flows", 16, 32, 1000, FIELDS),
    ("slab", "buffers", 0, 100, 70, ""),
    ("array", "counts", 0, 8, 10_000, "u8"),
]
SLOT = np.dtype([("crc", "u4"), ("state", "u4"), ("key", "V16"), ("row", "V32")])


def memory(size: int = State.MIN_BYTES + (1 << 20)) -> int:
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


@pytest.fixture
def fd() -> Iterator[int]:
    fd = memory()
    State.format(fd, "nat", "flows", 3, 2, OBJECTS)
    yield fd
    os.close(fd)


@pytest.fixture
def state(fd: int) -> State:
    return State(fd)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_header_tells_the_schema_and_what_is_used(fd: int, state: State) -> None:
    state.table("flows").put(key(1), bytes(32))
    state.commit()
    header = State(fd, writable=False).header
    assert {name: header[name] for name in ("engine", "schema", "version", "oldest", "epoch", "phase")} == {
        "engine": "nat",
        "schema": "flows",
        "version": 3,
        "oldest": 2,
        "epoch": 1,
        "phase": "blank",
    }
    assert header["size"] == os.fstat(fd).st_size > header["used_bytes"] > 0
    assert header["objects"][0] == {
        "kind": "table",
        "name": "flows",
        "key": 16,
        "item": 32,
        "count": 1000,
        "fields": FIELDS,
        "used": 1,
    }
    assert [entry["used"] for entry in header["objects"]] == [1, 0, 0]


def test_a_segment_is_blank_until_it_is_formatted_once() -> None:
    fd = memory()
    assert State.blank(fd)
    with pytest.raises(StateDamagedError, match="magic"):
        State(fd)
    State.format(fd, "nat", "flows", 1, 1, [])
    assert not State.blank(fd)
    with pytest.raises(UsageError, match="already"):
        State.format(fd, "nat", "flows", 1, 1, [])
    os.close(fd)


def test_min_bytes_hold_everything_but_the_objects() -> None:
    fd = memory(State.MIN_BYTES)
    State.format(fd, "e", "s", 1, 1, [("slab", f"s{n}", 0, 8, 1, "") for n in range(32)])
    assert State(fd).verify() == []
    os.close(fd)
    fd = memory(State.MIN_BYTES)
    with pytest.raises(StateFullError, match="need a segment of"):
        State.format(fd, "e", "s", 1, 1, [("array", "a", 0, 1 << 20, 2, "")])
    os.close(fd)


@pytest.mark.parametrize(
    "spec",
    [
        ("heap", "x", 0, 8, 1, ""),
        ("table", "x", 0, 8, 1, ""),
        ("slab", "x", 4, 8, 1, ""),
        ("slab", "", 0, 8, 1, ""),
        ("array", "x", 0, 0, 1, ""),
        ("array", "x", 0, 8, 0, ""),
        ("array", "x", 0, 1 << 40, 1 << 40, ""),
    ],
)
def test_objects_that_make_no_sense_are_refused(spec: tuple[str, str, int, int, int, str]) -> None:
    fd = memory()
    with pytest.raises(UsageError):
        State.format(fd, "e", "s", 1, 1, [spec])
    assert State.blank(fd)
    os.close(fd)


def test_objects_are_found_by_kind_and_name(state: State) -> None:
    with pytest.raises(SchemaError, match='no table called "nothing"'):
        state.table("nothing")
    with pytest.raises(SchemaError, match='"flows" is a table, not a slab'):
        state.slab("flows")


def test_a_table_answers_like_a_dict(state: State) -> None:
    table = state.table("flows")
    assert (table.key, table.item, table.count, table.slot, len(table)) == (16, 32, 1000, 56, 0)
    seed = time.time_ns()
    print(f"{seed=}")
    random, model = Random(seed), dict[bytes, bytes]()
    for step in range(20_000):
        name = key(random.randrange(1500))
        if random.random() < 0.5:
            row = random.randbytes(32)
            if name in model or len(model) < 1000:
                table.put(name, row)
                model[name] = row
        else:
            assert table.delete(name) == (model.pop(name, None) is not None)
        assert table.get(name) == model.get(name)
        if step % 50 == 0:
            state.commit()
    assert len(table) == len(model)
    assert {name: table.get(name) for name in model} == model
    assert state.verify() == []


def test_a_full_table_and_wrong_sizes_raise(state: State) -> None:
    table = state.table("flows")
    for number in range(1000):
        table.put(key(number), bytes(32))
    with pytest.raises(StateFullError, match="all its 1000 rows"):
        table.put(key(1000), bytes(32))
    table.put(key(5), b"x" * 32)
    with pytest.raises(UsageError, match="keys of 16 and rows of 32"):
        table.put(b"short", bytes(32))
    with pytest.raises(UsageError):
        table.get(b"short")


def test_packed_operations_do_what_single_ones_do(state: State) -> None:
    table = state.table("flows")
    names = np.arange(600, dtype="u8").repeat(2).reshape(-1, 2).copy()
    rows = np.arange(600 * 4, dtype="u8").reshape(-1, 4)
    table.put_packed(names, rows)
    assert len(table) == 600
    assert table.get(names[7].tobytes()) == rows[7].tobytes()
    out, found = np.zeros((700, 4), "u8"), np.zeros(700, "u1")
    asked = np.arange(700, dtype="u8").repeat(2).reshape(-1, 2).copy()
    assert table.get_packed(asked, out, found) == 600
    assert found.tolist() == [1] * 600 + [0] * 100
    assert (out[:600] == rows).all()
    assert table.delete_packed(asked[500:]) == 100
    assert len(table) == 500
    with pytest.raises(UsageError):
        table.put_packed(names, rows[:10])


def test_slots_can_be_walked_gathered_and_seen_in_place(state: State) -> None:
    table = state.table("flows")
    for number in range(10):
        table.put(key(number), bytes([number]) * 32)
    table.delete(key(3))
    out = np.zeros(64, SLOT)
    assert table.slots(0, out) == 10
    live = out[:10][out["state"][:10] == 1]
    assert [bytes(name)[0] for name in live["key"]] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert table.slots(8, out) == 2
    assert table.slots(10, out) == 0
    table.gather(np.array([5, 9], "u8"), out)
    assert [bytes(name)[0] for name in out["key"][:2]] == [5, 9]
    view = np.frombuffer(table.view(), SLOT)
    assert len(view) == 1000
    assert view["key"][9].tobytes() == key(9)
    table.put(key(9), b"n" * 32)
    assert view["row"][9].tobytes() == b"n" * 32, "a row keeps its slot"
    with pytest.raises(UsageError, match="no slot 1000"):
        table.gather(np.array([1000], "u8"), out)


def test_a_slab_hands_out_zeroed_items_under_stable_numbers(state: State) -> None:
    slab = state.slab("buffers")
    numbers = [slab.allocate() for _ in range(70)]
    assert sorted(numbers) == list(range(70))
    with pytest.raises(StateFullError, match="all its 70 items"):
        slab.allocate()
    slab.write(5, b"hello", 10)
    assert slab.read(5) == bytes(10) + b"hello" + bytes(85)
    slab.free(5)
    with pytest.raises(UsageError, match="not in use"):
        slab.read(5)
    with pytest.raises(UsageError, match="not in use"):
        slab.free(5)
    state.commit()
    assert slab.allocate() == 5
    assert slab.read(5) == bytes(100)
    with pytest.raises(UsageError, match="exceed"):
        slab.write(5, b"12345", 96)
    slab.free(0)
    assert np.frombuffer(slab.live(), "u8").tolist() == list(range(1, 70))
    assert len(slab) == 69
    slab.put_at(0, b"m" * 100)
    assert bytes(slab.view()[:100]) == b"m" * 100
    state.commit()
    assert state.verify() == []


def test_an_array_is_written_in_pieces_or_edited_in_place(state: State) -> None:
    array = state.array("counts")
    assert (array.item, array.count, array.per_block) == (8, 10_000, 512)
    array.write(3, np.arange(600, dtype="u8"))
    edited = np.frombuffer(array.edit(9_990, 10), "u8")
    edited[:] = 7
    state.commit()
    seen = np.frombuffer(array.view(), "u8")
    assert seen[3:603].tolist() == list(range(600))
    assert seen[-10:].tolist() == [7] * 10
    assert np.frombuffer(array.read(9_989, 2), "u8").tolist() == [0, 7]
    assert state.verify() == []
    with pytest.raises(UsageError, match="10000 items"):
        array.write(9_999, bytes(16))
    with pytest.raises(UsageError, match="whole number"):
        array.write(0, b"123")


def test_views_are_read_only_and_outlive_the_state(state: State) -> None:
    array = state.array("counts")
    array.write(0, b"12345678")
    view = array.view()
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1
    assert not array.edit(0, 1).readonly
    state.close()
    del array
    assert bytes(view[:8]) == b"12345678"
    with pytest.raises(StateError, match="closed"):
        state.commit()


def test_abort_takes_everything_back(state: State) -> None:
    table, slab, array = state.table("flows"), state.slab("buffers"), state.array("counts")
    table.put(key(1), b"a" * 32)
    slab.allocate()
    array.write(0, b"a" * 8)
    state.save(b"first")
    state.commit()
    table.put(key(1), b"b" * 32)
    table.put(key(2), b"b" * 32)
    slab.free(0)
    slab.allocate()
    np.frombuffer(array.edit(0, 10), "u8")[:] = 9
    state.save(b"second")
    assert state.saved() == b"first"
    assert state.abort() > 0
    assert (table.get(key(1)), table.get(key(2)), len(table)) == (b"a" * 32, None, 1)
    assert (len(slab), slab.read(0)) == (1, bytes(100))
    assert array.read(0, 2) == b"a" * 8 + bytes(8)
    assert state.saved() == b"first"
    assert state.abort() == 0
    assert state.verify() == []


def test_snapshots_are_replaced_by_commits(fd: int, state: State) -> None:
    assert state.saved() == b""
    for number in range(5):
        state.save(bytes([number]) * (number * 10_000))
        state.commit()
        assert State(fd, writable=False).saved() == bytes([number]) * (number * 10_000)
    with pytest.raises(StateFullError):
        state.save(bytes(65_537))


def test_a_poll_that_is_larger_than_the_log_can_be_taken_back() -> None:
    fd = memory()
    State.format(fd, "e", "s", 1, 1, OBJECTS, log_bytes=4096)
    state = State(fd)
    table = state.table("flows")
    with pytest.raises(StateFullError, match="undo log of 4096"):
        for number in range(1000):
            table.put(key(number), bytes(32))
    assert len(table) > 10
    with pytest.raises(StateFullError):
        state.array("counts").write(0, bytes(8000))
    state.abort()
    assert len(table) == 0
    assert state.verify() == []
    os.close(fd)


def test_a_reader_changes_nothing(fd: int, state: State) -> None:
    reader = State(fd, writable=False)
    for change in (
        lambda: reader.table("flows").put(key(1), bytes(32)),
        lambda: reader.slab("buffers").allocate(),
        lambda: reader.array("counts").edit(0, 0),
        lambda: reader.table("flows").take_dirty(),
        lambda: reader.save(b""),
        lambda: reader.set_phase("serving"),
        lambda: reader.track(True),
        reader.recover,
        reader.commit,
    ):
        with pytest.raises(UsageError, match="read-only"):
            change()
    state.set_phase("serving")
    assert reader.phase == "serving"
    with pytest.raises(UsageError, match="unknown phase"):
        state.set_phase("dreaming")


def test_changes_are_marked_once_the_engine_has_acknowledged(fd: int, state: State) -> None:
    table, slab, array = state.table("flows"), state.slab("buffers"), state.array("counts")
    other = State(fd)
    table.put(key(1), bytes(32))
    state.commit()
    assert other.table("flows").take_dirty() == b""
    other.track(True)
    assert other.header["tracking"]
    assert not other.tracked()
    state.commit()
    assert other.tracked()
    table.put(key(1), b"x" * 32)
    table.put(key(2), bytes(32))
    slab.allocate()
    array.write(600, bytes(8))
    state.commit()

    def dirty() -> list[list[int]]:
        objects = (other.table("flows"), other.slab("buffers"), other.array("counts"))
        return [np.frombuffer(part.take_dirty(), "u8").tolist() for part in objects]

    assert dirty() == [[0, 1], [0], [1]]
    assert dirty() == [[], [], []]
    table.delete(key(1))
    state.abort()
    assert dirty()[0] == [0], "what was taken back has changed, too"
    other.track(False)
    state.commit()
    assert other.tracked()
    table.put(key(1), bytes(32))
    state.commit()
    assert dirty() == [[], [], []]


def test_damage_is_found_and_named(fd: int, state: State) -> None:
    table = state.table("flows")
    for number in range(5):
        table.put(key(number), bytes(32))
    state.array("counts").write(0, b"12345678")
    state.commit()
    assert state.verify() == []
    pristine = os.pread(fd, os.fstat(fd).st_size, 0)
    os.pwrite(fd, b"\x01", pristine.index(key(3)) + 20)
    os.pwrite(fd, b"\x01", pristine.index(b"12345678") + 20)
    assert State(fd).verify() == [
        'table "flows": the checksum of slot 3 does not match',
        'array "counts": the checksum of block 0 does not match',
    ]
    os.pwrite(fd, b"\x01", 60)
    with pytest.raises(StateDamagedError, match="header and directory"):
        State(fd)
    os.pwrite(fd, pristine[:4096], 0)
    os.pwrite(fd, (2).to_bytes(4, "little"), 8)
    with pytest.raises(SchemaError, match="layout 2"):
        State(fd)


@pytest.mark.parametrize("at", [0, 20], ids=["key", "row"])
def test_a_row_that_something_else_wrote_over_is_neither_read_nor_replaced(
    fd: int, state: State, at: int
) -> None:
    table = state.table("flows")
    for number in range(5):
        table.put(key(number), bytes(32))
    state.commit()
    live = (1).to_bytes(
        4, "little"
    )  # before the key, which alone may look like the end of a word of the index
    place = os.pread(fd, os.fstat(fd).st_size, 0).index(live + key(3)) + 4 + at
    os.pwrite(fd, b"\xaa", place)
    for work in (table.get, table.delete, lambda name: table.put(name, bytes(32))):
        with pytest.raises(StateDamagedError, match="slot 3"):
            work(key(3))
    assert table.get(key(2)) == bytes(32)
    assert len(table) == 5


def test_a_damaged_undo_log_is_not_used(fd: int, state: State) -> None:
    state.table("flows").put(key(1), bytes(32))
    stamp, length = (int.from_bytes(os.pread(fd, 8, at), "little") for at in (520, 528))
    assert (stamp, length > 0) == (1, True)
    for wrong in (length + 8, length - 8, 7, 1 << 62):
        os.pwrite(fd, wrong.to_bytes(8, "little"), 528)
        with pytest.raises(StateDamagedError, match="undo log"):
            State(fd).recover()
        assert State(fd).verify() != []
    os.pwrite(fd, length.to_bytes(8, "little"), 528)
    assert State(fd).recover() > 0
    assert State(fd).verify() == []


def test_a_segment_cut_short_is_damaged_not_fatal(fd: int) -> None:
    os.ftruncate(fd, State.MIN_BYTES)
    with pytest.raises(StateDamagedError):
        State(fd)
    os.ftruncate(fd, 100)
    with pytest.raises(StateDamagedError, match="too small"):
        State(fd)


def test_a_copy_is_a_state_of_its_own_and_stays_sparse(state: State) -> None:
    state.table("flows").put(key(1), b"c" * 32)
    state.save(b"snapshot")
    state.commit()
    copy = memory()
    copied = state.copy_to(copy)
    assert 0 < copied < 500_000
    state.table("flows").delete(key(1))
    state.commit()
    other = State(copy)
    assert (other.table("flows").get(key(1)), other.saved(), other.verify()) == (b"c" * 32, b"snapshot", [])
    assert os.fstat(copy).st_blocks * 512 <= copied + 64 * 1024
    os.close(copy)
    small = memory(4096)
    with pytest.raises(StateFullError):
        state.copy_to(small)
    os.close(small)


def test_opening_a_large_state_touches_almost_nothing() -> None:
    fd = memory(State.MIN_BYTES + (1 << 30) + (64 << 20))
    State.format(
        fd, "e", "s", 1, 1, [("array", "a", 0, 4096, 1 << 18, ""), ("table", "t", 16, 32, 500_000, "")]
    )
    state = State(fd)
    state.array("a").write(1 << 17, b"x" * 4096)
    state.commit()
    assert State(fd).verify() == []
    assert State(fd).table("t").get(key(1)) is None
    assert os.fstat(fd).st_blocks * 512 < 8 << 20
    os.close(fd)


WRITER = """
import sys
from snap.dataplane._native import State
state = State(int(sys.argv[1]))
state.recover()
table, array = state.table("flows"), state.array("counts")
while True:
    poll = state.header["epoch"] + 1
    array.edit(0, 1)[:] = poll.to_bytes(8, "little")
    for step in range(8):
        table.put((poll * 7 % 500 + step).to_bytes(16, "little"), poll.to_bytes(32, "little"))
    table.delete((poll * 11 % 500).to_bytes(16, "little"))
    state.save(poll.to_bytes(8, "little"))
    state.commit()
"""


def test_a_killed_writer_leaves_whole_polls(fd: int) -> None:
    seed = time.time_ns()
    print(f"{seed=}")
    random, model, done = Random(seed), dict[bytes, bytes](), 0
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(fd)], pass_fds=[fd])
        reader = State(fd, writable=False)
        deadline = time.monotonic() + 20
        while reader.header["epoch"] == done and time.monotonic() < deadline:
            assert writer.poll() is None
            time.sleep(0.001)
        time.sleep(random.random() * 0.05)
        assert reader.verify() == []
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        state = State(fd)
        state.recover()
        epoch = state.header["epoch"]
        assert epoch > done
        for poll in range(done + 1, epoch + 1):
            for step in range(8):
                model[key(poll * 7 % 500 + step)] = poll.to_bytes(32, "little")
            model.pop(key(poll * 11 % 500), None)
        done = epoch
        table = state.table("flows")
        assert len(table) == len(model)
        assert {name: table.get(name) for name in model} == model
        assert state.saved() == epoch.to_bytes(8, "little") == state.array("counts").read(0, 1)
        assert state.verify() == []
