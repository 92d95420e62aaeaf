"""The example of a key-value store: real kernel, real engine, server and writers as processes of their own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from zlib import crc32

import pytest

from examples.kv.client import KeyValue
from examples.kv.errors import (
    BucketFullError,
    NoAnswerError,
    StoreFullError,
    StoreGoneError,
    TooLargeError,
    TornError,
)
from examples.kv.layout import SLOT, Layout, Record, decode, encode
from examples.kv.store import Store, arena_bytes
from snap.ipc import UsageError, connect
from snap.modules.pony import NoPeerError, Pony

from .conftest import OWNER_MAY_ALL, KernelProcess
from .waiting import LIMIT, Background

ROOT = Path(__file__).parent.parent
PONY = OWNER_MAY_ALL + "[modules.pony]\nautostart = true\n"
WRITES = 400
KEYS = [b"key %d" % number for number in range(4)]


def whole(text: bytes) -> bytes:
    """A value that says by itself whether it is as it was written."""
    return b"%08x" % crc32(text) + text


def is_whole(value: bytes) -> bool:
    return value == whole(value[8:])


class Ground:
    """A kernel with Pony, and the processes and connections of a test."""

    def __init__(self, kernel: KernelProcess, stack: ExitStack) -> None:
        self.kernel, self._stack = kernel, stack

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "SNAP_RUNTIME_DIR": str(self.kernel.directory)}
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        self._stack.enter_context(ended(process))
        return process

    def serve(self, **layout: int) -> subprocess.Popen[str]:
        options = [f"--{name}={value}" for name, value in layout.items()]
        server = self.start("-m", "examples.kv.server", *options)
        assert server.stdout is not None and server.stdout.readline() == "kv is ready\n"
        return server

    def open(self, arena: int = 0) -> Pony:
        client = self._stack.enter_context(connect(self.kernel.directory))
        return self._stack.enter_context(Pony.open(client, arena))

    def connect(self, timeout: float = LIMIT) -> KeyValue:
        return self._stack.enter_context(KeyValue(self.open(), timeout=timeout))


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    with process:
        try:
            yield
        finally:
            process.kill()


@pytest.fixture
def ground(kernel: Callable[..., KernelProcess]) -> Iterator[Ground]:
    with ExitStack() as stack:
        yield Ground(kernel(policy=PONY), stack)


# -- one client ---------------------------------------------------------------------------------------------


def test_what_was_set_is_got_until_it_is_overwritten_or_deleted(ground: Ground) -> None:
    ground.serve()
    store = ground.connect()
    assert store.get(b"a") is None
    first = store.set(b"a", b"one")
    assert store.get(b"a") == b"one"
    assert store.set(b"a", b"two") > first
    assert (store.get(b"a"), store.get(b"b")) == (b"two", None)
    assert store.delete(b"a") and not store.delete(b"a")
    assert store.get(b"a") is None
    assert store.set(b"a", b"") > first + 1
    store.set(b"", b"of the empty key")
    assert (store.get(b"a"), store.get(b"")) == (b"", b"of the empty key")


def test_the_store_agrees_with_a_dictionary(ground: Ground) -> None:
    ground.serve(buckets=16, slots=16, capacity=64, cell=128, bits=5)
    store, model = ground.connect(), dict[bytes, bytes]()
    chance = random.Random(1)
    for _ in range(1500):
        key = b"%d" % chance.randrange(40)
        if chance.random() < 0.3:
            assert store.delete(key) == (model.pop(key, None) is not None)
        else:
            value = chance.randbytes(chance.randrange(9))
            try:
                store.set(key, value)
            except TooLargeError:
                continue
            model[key] = value
        asked = b"%d" % chance.randrange(40)
        assert store.get(asked) == model.get(asked)
    assert {key: store.get(key) for key in model} == model


def test_keys_of_one_hash_never_get_each_others_value(ground: Ground) -> None:
    ground.serve(bits=1, cell=992)
    store = ground.connect()
    keys = [b"%d" % number for number in range(10)]
    versions = [store.set(key, b"value of " + key) for key in keys]
    assert [store.find(key) for key in keys] == [
        Record(version, b"value of " + key) for version, key in zip(versions, keys, strict=True)
    ]
    assert store.get(b"other") is None
    assert store.delete(b"3") and not store.delete(b"other")
    assert [store.get(key) for key in (b"2", b"3", b"4")] == [b"value of 2", None, b"value of 4"]
    with pytest.raises(TooLargeError, match="do not fit into a cell of 992"):
        store.set(b"3", bytes(950))
    assert store.get(b"2") == b"value of 2"


def test_a_full_bucket_refuses_new_keys_and_takes_values_of_old_ones(ground: Ground) -> None:
    ground.serve(buckets=1, slots=4)
    store = ground.connect()
    for key in KEYS:
        store.set(key, key)
    with pytest.raises(BucketFullError, match="4 entries"):
        store.set(b"fifth", b"")
    assert store.get(b"fifth") is None
    store.set(KEYS[0], b"again")
    assert store.delete(KEYS[1])
    store.set(b"fifth", b"here")
    assert [store.get(key) for key in (*KEYS, b"fifth")] == [b"again", None, KEYS[2], KEYS[3], b"here"]


def test_a_full_store_refuses_new_keys_and_overwrites_on_and_on(ground: Ground) -> None:
    ground.serve(capacity=2)
    store = ground.connect()
    for key in KEYS[:2]:
        store.set(key, key)
    with pytest.raises(StoreFullError, match="2 entries"):
        store.set(KEYS[2], b"")
    for turn in range(300):
        store.set(KEYS[0], b"%d" % turn)
    assert (store.get(KEYS[0]), store.get(KEYS[1])) == (b"299", KEYS[1])


def test_what_no_cell_holds_is_refused(ground: Ground) -> None:
    ground.serve()
    store = ground.connect()
    for size in (500, 512, 100_000):
        with pytest.raises(TooLargeError):
            store.set(b"key", bytes(size - 3))
        assert store.get(b"key") is None and not store.delete(bytes(size))


# -- many ---------------------------------------------------------------------------------------------------


def test_readers_see_whole_values_and_no_version_goes_back_while_processes_write(ground: Ground) -> None:
    ground.serve(capacity=8, cell=992)
    writers = [ground.start("-m", "tests.test_kv", str(number)) for number in range(2)]
    readers = [ground.connect() for _ in range(2)]
    versions = [dict.fromkeys(KEYS, 0) for _ in readers]
    seen = set[int]()
    while any(writer.poll() is None for writer in writers):
        for reader, last in zip(readers, versions, strict=True):
            for key in KEYS:
                if (record := reader.find(key)) is not None:
                    assert is_whole(record.value) and record.value[8:].startswith(key)
                    assert record.version >= last[key]
                    last[key] = record.version
                    seen.add(record.version)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(seen) > len(KEYS)


def write(number: int) -> None:
    """What a writer's process does: set keys, now and then delete one."""
    chance = random.Random(number)
    with connect() as client, Pony.open(client) as pony, KeyValue(pony, timeout=LIMIT) as store:
        last = 0
        for turn in range(WRITES):
            key = chance.choice(KEYS)
            if turn % 20 == 19:
                store.delete(key)
            else:
                version = store.set(key, whole(key + bytes([65 + turn % 26]) * chance.randrange(900)))
                assert version > last
                last = version


# -- a server that does not take part -------------------------------------------------------------------------


def test_gets_go_on_while_the_server_is_stopped_and_sets_say_that_it_is(ground: Ground) -> None:
    server = ground.serve()
    store = ground.connect(timeout=0.2)
    store.set(b"a", b"one")
    server.send_signal(signal.SIGSTOP)
    for _ in range(200):
        assert (store.get(b"a"), store.get(b"b")) == (b"one", None)
    with pytest.raises(NoAnswerError, match=r"set: the server has not answered within 0.2 s \(it may still"):
        store.set(b"a", b"late")
    with pytest.raises(NoAnswerError, match="delete"):
        store.delete(b"b")
    with pytest.raises(NoAnswerError, match="connect"):
        ground.connect(timeout=0.2)
    assert store.get(b"a") == b"one"
    server.send_signal(signal.SIGCONT)
    patient = ground.connect()
    version = patient.set(b"b", b"new")
    assert patient.set(b"a", b"two") == version + 1
    assert (store.get(b"a"), store.get(b"b")) == (b"two", b"new")


def test_late_answers_are_not_taken_for_others(ground: Ground) -> None:
    server = ground.serve()
    store = ground.connect(timeout=0.2)
    server.send_signal(signal.SIGSTOP)
    with pytest.raises(NoAnswerError):
        store.set(b"a", b"late")
    server.send_signal(signal.SIGCONT)
    store._timeout = LIMIT
    assert not store.delete(b"b")
    assert store.get(b"a") == b"late"


def test_a_stopped_server_is_not_asked_without_end(ground: Ground) -> None:
    server = ground.serve()
    store = ground.connect(timeout=0.001)
    server.send_signal(signal.SIGSTOP)
    for _ in range(80):
        with pytest.raises(NoAnswerError):
            store.set(b"a", b"")


def test_a_killed_server_is_said_to_be_gone(ground: Ground) -> None:
    server = ground.serve()
    store = ground.connect()
    store.set(b"a", b"one")
    server.kill()
    server.wait()
    with pytest.raises(StoreGoneError, match="the server is gone"):
        while store.get(b"a") == b"one":
            pass
    with pytest.raises(StoreGoneError):
        store.set(b"a", b"two")
    with pytest.raises(NoPeerError):
        ground.connect()
    ground.serve()
    assert ground.connect().get(b"a") is None


def test_the_store_outlives_the_engine(ground: Ground) -> None:
    ground.serve()
    store = ground.connect()
    store.set(b"a", b"one")
    with ground.kernel.control() as operator:
        os.kill(operator.call("module.show", name="pony")["pid"], signal.SIGKILL)
    assert store.get(b"a") == b"one"
    store.set(b"b", b"two")
    assert (store.get(b"a"), store.get(b"b")) == (b"one", b"two")


def test_a_peer_that_sends_nonsense_loses_its_connection_and_nobody_else_does(ground: Ground) -> None:
    ground.serve()
    good, bad, worse = ground.connect(), ground.connect(), ground.connect()
    bad._peer.send(b"?")
    with pytest.raises(StoreGoneError):
        bad.set(b"a", b"")
    worse._peer.send(bytes(8) + b"\x07" + bytes(2))
    with pytest.raises(StoreGoneError):
        worse.set(b"a", b"")
    good.set(b"a", b"one")
    assert good.get(b"a") == b"one"


# -- the entry ----------------------------------------------------------------------------------------------


def test_an_entry_that_is_not_whole_is_none() -> None:
    records = {b"a": Record(3, b"one"), b"bc": Record(4, bytes(50))}
    entry = encode(77, records)
    assert decode(entry + bytes(20), 77) == records
    assert decode(entry, 78) is None
    other = encode(77, {b"a": Record(5, b"two"), b"bc": Record(4, bytes(51))})
    for place in range(1, len(entry)):
        torn = other[:place] + entry[place:]
        assert torn in (entry, other[: len(entry)]) or decode(torn, 77) is None
        assert decode(entry[:place].ljust(len(entry), b"\xff"), 77) is None


def test_a_torn_entry_is_read_again(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.serve()
    store = ground.connect()
    store.set(b"a", b"one")
    torn = iter([None] * 3)
    monkeypatch.setattr("examples.kv.client.decode", lambda *entry: next(torn, decode(*entry)))
    assert store.get(b"a") == b"one"


def test_memory_that_is_half_written_or_of_another_entry_is_never_a_value(ground: Ground) -> None:
    layout = Layout(buckets=1, capacity=4, cell=128)
    pony = ground.open(arena_bytes(layout))
    pony.bind("kv")
    store = Store(pony, layout)
    greeting = Background(lambda: pony.accept(LIMIT).send(store.layout.pack()))
    reader = ground.connect()
    greeting.finish()
    for key in KEYS[:2]:
        store.set(key, key * 10)
    # A new store writes its cells in turn, behind the index.
    cells = pony.places.arena[layout.slots * SLOT :]
    first, second = cells[:128], cells[128:256]
    was = bytes(first)
    first[40:60] = bytes(20)
    with pytest.raises(TornError):
        reader.get(KEYS[0])
    # Its cell was used again for another key.
    first[:] = second
    with pytest.raises(TornError):
        reader.get(KEYS[0])
    first[:] = was
    assert [reader.get(key) for key in KEYS[:2]] == [key * 10 for key in KEYS[:2]]


@pytest.mark.parametrize("wrong", [{"cell": 1000}, {"cell": 8}, {"cell": 100}, {"bits": 65}, {"slots": 0}])
def test_a_layout_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Layout(**wrong)


if __name__ == "__main__":
    write(int(sys.argv[1]))
