"""The kernel's record and the tables in it: whole after death at any instant, and the same when read back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane.errors import HandleError, SchemaError, SnapError, StateDamagedError
from snap.ipc import seqpacket
from snap.ipc.protocol import Done
from snap.kernel import record
from snap.kernel.capability import RIGHTS, CapabilityTable
from snap.kernel.events import Events
from snap.kernel.link import Connection
from snap.kernel.record import Outbox, Record
from snap.kernel.store import NoStore

SEED = random.randrange(1 << 32)

WRITER = """
import sys
from snap.kernel.record import Record
record = Record(list(map(int, sys.argv[1:3])), 0)
number = 0
record.parts["number"] = lambda: number
record.parts["bulk"] = lambda: bytes([number & 255]) * (number * 7919 % 50_000)
print("go", flush=True)
while True:
    number += 1
    record.write()
    sys.stdout.write(f"{number}\\n"); sys.stdout.flush()
"""


def made(parts: dict[str, Any]) -> tuple[Record, list[int]]:
    fds = [os.memfd_create("test", os.MFD_CLOEXEC) for _ in range(2)]
    found = Record(fds, 0)
    found.parts = {name: (lambda name=name: parts[name]) for name in parts}
    return found, fds


def test_what_was_written_last_is_read_back_and_writing_goes_on_from_there() -> None:
    parts: dict[str, Any] = {"one": {"a": [1, None, "x"]}, "two": 5}
    first, fds = made(parts)
    assert first.write()
    assert not first.write()  # nothing changed
    parts["two"] = 6
    assert first.write()
    second, data = Record.adopt([os.dup(fd) for fd in fds])
    assert data == {"one": {"a": [1, None, "x"]}, "two": 6}
    second.parts["three"] = lambda: 7
    second.write()
    assert record.load(fds)[1] == {"three": 7}
    first.close()
    second.close()


def test_death_at_any_instant_of_writing_leaves_the_last_whole_record_or_the_one_before(
    tmp_path: Path,
) -> None:
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    for _ in range(15):
        fds = [os.memfd_create("test", os.MFD_CLOEXEC) for _ in range(2)]
        argv = [sys.executable, "-c", WRITER, *map(str, fds)]
        with subprocess.Popen(argv, pass_fds=fds, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"go\n"
            for _ in range(chance.randrange(1, 300)):
                writer.stdout.readline()
            os.kill(writer.pid, signal.SIGKILL)
            said = [line for line in writer.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
        last = int(said[-1]) if said else 0
        _, data = record.load(fds)
        assert data["number"] >= last
        assert data["bulk"] == bytes([data["number"] & 255]) * (data["number"] * 7919 % 50_000)
        seqpacket.close_all(fds)


def test_a_torn_newest_copy_gives_the_one_before_and_two_torn_copies_are_refused() -> None:
    parts = {"n": 1}
    first, fds = made(parts)
    first.write()
    parts["n"] = 2
    first.write()
    newest = next(fd for fd in fds if record._read(fd) == max(filter(None, map(record._read, fds))))
    for at in range(os.fstat(newest).st_size):
        byte = os.pread(newest, 1, at)
        os.pwrite(newest, bytes([byte[0] ^ 0x40]), at)
        if 8 <= at < 12:  # the format is not summed: a newer one has to be told from damage
            with pytest.raises(SchemaError):
                record.load(fds)
        else:
            assert record.load(fds)[1] == {"n": 1}, at
        os.pwrite(newest, byte, at)
    assert record.load(fds)[1] == {"n": 2}
    for fd in fds:
        os.ftruncate(fd, 20)
    with pytest.raises(StateDamagedError, match="neither copy"):
        record.load(fds)
    first.close()


def test_a_newer_format_is_refused_by_name_and_left_as_it_is() -> None:
    fds = [os.memfd_create("test", os.MFD_CLOEXEC) for _ in range(2)]
    body = b"whatever a newer kernel writes"
    sealed = zlib.crc32(body, zlib.crc32(struct.pack("<QQ", 9, len(body))))
    os.pwrite(fds[1], struct.pack("<8sIIQQ", b"SNAPKREC", record.FORMAT + 1, sealed, 9, len(body)) + body, 0)
    before = os.pread(fds[1], 1000, 0)
    with pytest.raises(SchemaError, match=f"format {record.FORMAT + 1}"):
        Record.adopt(fds)
    assert os.pread(fds[1], 1000, 0) == before
    seqpacket.close_all(fds)


def restored(table: CapabilityTable) -> CapabilityTable:
    fresh = CapabilityTable(lambda _: None)
    store = NoStore()
    keeping = Record.create(store)
    keeping.parts["table"] = table.record
    keeping.write()
    fresh.restore(record.load(keeping._fds)[1]["table"])
    keeping.close()
    return fresh


def test_a_restored_table_behaves_like_the_one_that_was_recorded_under_random_operations() -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    table = CapabilityTable(lambda _: None)
    for name in ("a", "b", "c"):
        table.add_owner(name, f"badge-{name}", 7, quota=20)
    now = 100.0
    handles: list[tuple[str, int]] = []

    def act(table: CapabilityTable, seed: int) -> object:
        """One random operation: what it gives, or which error."""
        dice = random.Random(seed)
        owner, other = dice.sample(["a", "b", "c"], 2)
        handle = dice.choice([h for o, h in handles if o == owner] or [3])
        rights = dice.sample(sorted(RIGHTS["service"]), dice.randrange(1, 8))
        lifetime = dice.choice([None, None, 5.0])
        try:
            match dice.randrange(7):
                case 0 | 1:
                    return table.mint(owner, "service:x", rights, rule="r", now=now, lifetime=lifetime)
                case 2:
                    return table.attenuate(owner, handle, rights, now, lifetime)
                case 3:
                    return table.delegate(owner, handle, other, now, rights)
                case 4:
                    return table.move(owner, handle, other, now)
                case 5:
                    return table.revoke(owner, handle) if dice.random() < 0.3 else None
                case _:
                    return table.handle_time(now)
        except SnapError as error:
            return type(error), error.message

    for _ in range(400):
        now += chance.random()
        seed = chance.randrange(1 << 32)
        if chance.random() < 0.1:
            other = restored(table)
            assert other.views() == table.views()
            assert other.next_expiry() == table.next_expiry()
            assert act(other, seed) == act(table, seed)
            assert other.views() == table.views()
            table = other
        else:
            act(table, seed)
        handles = [(view.owner, view.handle) for view in table.views()]


def test_a_handle_of_a_revoked_capability_stays_dead_in_a_restored_table() -> None:
    table = CapabilityTable(lambda _: None)
    table.add_owner("a", "badge")
    cap = table.mint("a", "service:x", {"connect"}, rule="r", now=0.0)
    table.revoke("a", cap.handle)
    fresh = restored(table)
    again = fresh.mint("a", "service:x", {"connect"}, rule="r", now=0.0)
    assert (again.id, again.handle) not in {(cap.id, again.handle), (again.id, cap.handle)}
    with pytest.raises(HandleError):
        fresh.check("a", cap.handle, "connect", 0.0)


def test_event_numbers_go_on_without_a_gap() -> None:
    first, second = Events(), Events()
    for _ in range(5):
        first.emit("some.thing", "kernel")
    second.restore(first.record())
    second.emit("some.thing", "kernel")
    assert [event.seq for event in second.since(0, 10)] == [6]
    assert second.totals["some.thing"] == 6


def test_messages_leave_after_the_commit_of_their_round_in_order_and_the_last_words_before_the_end() -> None:
    async def test() -> None:
        said: list[str] = []
        ours, theirs = seqpacket.pair()
        theirs.setblocking(False)

        def commit() -> None:
            with pytest.raises(BlockingIOError):
                theirs.recv(1000, seqpacket.socket.MSG_PEEK)
            said.append("commit")

        outbox = Outbox(commit)
        connection = Connection(ours, lambda *_: None, lambda _: None, said.append, outbox=outbox)
        for number in range(100):
            connection.send(Done(seq=number))
        assert said == []
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert said == ["commit"]
        seqs = [seqpacket.recv(theirs)[0] for _ in range(100)]
        assert len(set(seqs)) == 100 and seqs[0] < seqs[50] < seqs[99]
        connection.send(Done(seq=1000))
        connection.close("enough")
        assert said == ["commit", "commit", "enough"]
        assert seqpacket.recv(theirs)[0]
        assert seqpacket.recv(theirs)[0] == b""
        theirs.close()

    asyncio.run(test())


def test_a_peer_that_reads_nothing_is_dropped_at_the_backlog_and_costs_no_descriptors() -> None:
    async def test() -> None:
        ours, theirs = seqpacket.pair()
        ends: list[str] = []
        connection = Connection(ours, lambda *_: None, lambda _: None, ends.append, backlog=10)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(100_000):
            connection.send(Done(seq=1), [0])
            if ends:
                break
        assert ends == ["it left 10 answers unread"]
        assert len(os.listdir("/proc/self/fd")) == before - 1
        theirs.close()
        await asyncio.sleep(0)

    asyncio.run(test())
