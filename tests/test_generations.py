"""What a generation of a module tells its kernel: what it holds, refuses and keeps, and how it is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane import _native
from snap.ipc.protocol import (
    Broken,
    Check,
    Failure,
    Health,
    Holding,
    Keep,
    Loaded,
    Message,
    Progress,
    Refused,
    Report,
    Started,
    Yield,
    Yielded,
)
from snap.modules.testing import ChannelPair

# Answers each message with the number of times that it was seen, and the number of all messages; both kept in state.
from tests.handover_rig import COUNTING, COUNTING_2, attach, took, total
from tests.host_rig import LIMIT, Ground, Kernel, manifest, package


def test_a_generation_tells_what_it_holds(ground: Ground, kernels: Any, tmp_path: Path) -> None:
    kernel = kernels(package(tmp_path, "count", COUNTING))
    kernel.tell(Report(seq=3))
    assert kernel.hear(Holding).engines == {"echo": "loading"}
    with ChannelPair(id=7) as pair:
        attach(kernel, pair)
        kernel.prepared()
        took(kernel)
        kernel.tell(Report(seq=4))
        assert kernel.hear(Holding) == Holding(
            seq=4,
            name="count",
            generation=1,
            pid=kernel.process.pid,
            engines={"echo": "running"},
            channels={7: 1},
        )
        kernel.tell(Yield(engine="echo", retire=True))
        kernel.hear(Yielded)


def test_a_state_of_another_schema_is_refused_and_another_may_be_prepared(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    first = kernels(package(tmp_path, "count", COUNTING))
    other = ground.blank()
    _native.State.format(other, "echo", "count.echo", 2, 2, [])
    first.prepare(other)
    refused = last(first, Refused)
    assert refused.code == "schema" and "version 2" in refused.message
    first.prepare(ground.blank(), other)
    assert "can go back to 2" in last(first, Refused).message
    lying = ground.blank()
    _native.State.format(lying, "echo", "count.echo", 1, 1, [])
    first.prepare(lying)
    assert "seen" in last(first, Refused).message
    foreign = ground.blank()
    _native.State.format(foreign, "echo", "other.echo", 1, 1, [])
    first.prepare(foreign)
    assert "other.echo" in last(first, Refused).message
    first.prepared()
    took(first)


def last(kernel: Kernel, kind: type[Any]) -> Any:
    """The next message of this kind, after any progress."""
    while isinstance(message := kernel.hear(Message), Progress):
        pass
    assert isinstance(message, kind), message
    return message


def test_a_damaged_state_is_refused_by_its_checksums(ground: Ground, kernels: Any, tmp_path: Path) -> None:
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as pair:
        first = kernels(path)
        attach(first, pair)
        first.prepared()
        took(first)
        pair.client.send(b"mark-in-table", timeout=LIMIT)
        pair.client.recv(timeout=LIMIT)
        first.process.kill()
        fd = ground.fds["state"]
        held = os.pread(fd, os.fstat(fd).st_size, 0)
        os.pwrite(fd, b"M", held.rindex(b"mark-in-table"))
        second = kernels(path)
        second.prepare()
        assert last(second, Refused).code == "state_damaged"
        pair.client.send(b"still there", timeout=0)


def test_damage_that_a_poll_meets_is_refused_and_nobody_else_takes_it(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as pair:
        first, second = kernels(path), kernels(path)
        attach(first, pair)
        first.prepared()
        took(first)
        second.prepared()
        pair.client.send(b"mark-in-table", timeout=LIMIT)
        assert pair.client.recv(timeout=LIMIT) == b"mark-in-table 1 1"
        fd = ground.fds["state"]
        row = os.pread(fd, os.fstat(fd).st_size, 0).index(b"mark-in-table") + 16
        os.pwrite(fd, b"\x07", row)
        pair.client.send(b"mark-in-table", timeout=LIMIT)
        refused = last(first, Refused)
        assert refused.code == "state_damaged" and refused.held
        assert ground.semaphore.value == 0
        first.process.kill()
        took(second)


def test_an_author_whose_migration_raises_is_told_what(ground: Ground, kernels: Any, tmp_path: Path) -> None:
    old = package(tmp_path, "count", COUNTING)
    (tmp_path / "new").mkdir()
    new = package(tmp_path / "new", "count", COUNTING_2.replace('new["n"] = old', 'new["m"] = old'))
    first, second = kernels(old), kernels(new, state_version=2)
    with ChannelPair(id=1) as pair:
        attach(first, pair)
        first.prepared()
        took(first)
        pair.client.send(b"x", timeout=LIMIT)
        pair.client.recv(timeout=LIMIT)
        second.prepare(ground.blank(128 << 20), ground.fds["state"])
        refused = last(second, Refused)
        assert "no field of name m" in refused.message
        pair.client.send(b"x", timeout=LIMIT)
        assert pair.client.recv(timeout=LIMIT) == b"x 2 2"


def test_a_module_that_lies_about_its_version_is_broken_when_it_loads(ground: Ground, tmp_path: Path) -> None:
    path = package(tmp_path, "count", COUNTING)
    kernel = Kernel(ground=ground)
    try:
        kernel.configure(path, manifest("count", "engine:E", state_version=2))
        kernel.hear(Started)
        broken = kernel.hear(Broken)
        assert broken.stage == "load" and "state_version is 2" in broken.error
    finally:
        kernel.close()


def test_a_snapshot_goes_with_a_hand_over_and_comes_back_at_every_take_over(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    code = """
        from snap.modules import Engine
        class E(Engine):
            value = 0
            def snapshot(self):
                return b"%d" % self.value
            def restore(self, version, state):
                self.value = int(state or b"0")
            def poll(self, budget):
                done = 0
                for channel in self.channels:
                    messages = channel.take(budget)
                    self.value += len(messages)
                    channel.answer([b"%d" % self.value for message in messages])
                    done += len(messages)
                return done
        """
    path = package(tmp_path, "small", code)
    with ChannelPair(id=1) as pair:
        first, second = kernels(path), kernels(path)
        for kernel in (first, second):
            attach(kernel, pair)
            kernel.prepared()
            if kernel is first:
                took(first)
        for turn in range(4):
            pair.client.send(b"?", timeout=LIMIT)
            assert pair.client.recv(timeout=LIMIT) == b"%d" % (turn + 1)
            giving, taking = (first, second) if turn % 2 == 0 else (second, first)
            giving.tell(Yield(engine="echo"))
            giving.hear(Yielded)
            took(taking)


def test_health_is_the_modules_own_and_a_hanging_one_is_named(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    code = """
        import threading
        from snap.modules import Engine, Module
        class E(Engine):
            def poll(self, budget): return 0
        class Main(Module):
            asked = 0
            def health(self):
                self.asked += 1
                if self.asked == 1: return ""
                if self.asked == 2: return "one disk is gone"
                if self.asked == 3: raise OSError("no disk")
                threading.Event().wait()
        """
    kernel = kernels(package(tmp_path, "well", code), entry="engine:Main")
    for said in ("", "one disk is gone", "health(): OSError: no disk"):
        kernel.tell(Check(seq=1))
        assert kernel.hear(Health) == Health(seq=1, reason=said)
        time.sleep(0.05)
    kernel.tell(Check(seq=2))
    time.sleep(0.05)
    kernel.tell(Check(seq=3))
    assert kernel.hear(Health) == Health(seq=3, reason="the last health() has not returned yet")


def test_descriptors_are_kept_for_the_generations_to_come(ground: Ground, tmp_path: Path) -> None:
    code = """
        import os
        from snap.modules import Engine, Module
        class E(Engine):
            def poll(self, budget): return 0
        class Main(Module):
            def on_start(self):
                found = self.kept("page")
                if found is None:
                    self.keep("page", os.memfd_create("page"))
                else:
                    os.write(found, b"hello")
                    self.keep("page", None)
        """
    path = package(tmp_path, "keeper", code)
    first, second = Kernel(ground=ground), Kernel(ground=ground)
    try:
        first.configure(path, manifest("keeper", "engine:E", entry="engine:Main"))
        first.hear(Started)
        assert first.hear(Keep).name == "page"
        (page,) = first.came
        first.hear(Loaded)
        second.configure(path, manifest("keeper", "engine:E", entry="engine:Main"), page=page)
        second.hear(Started)
        assert second.hear(Keep).name == "page" and second.came == []
        assert os.pread(page, 10, 0) == b"hello"
        os.close(page)
    finally:
        first.close()
        second.close()


def test_a_module_whose_kernel_has_gone_for_good_removes_its_semaphores(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    kernel = kernels(package(tmp_path, "count", COUNTING))
    kernel.prepared()
    took(kernel)
    kernel.sock.close()
    assert kernel.ended() == (0, "")
    with pytest.raises(_native_gone()):
        ground.semaphore.remove()


def _native_gone() -> type[Exception]:
    import sysv_ipc  # type: ignore[import-not-found]

    gone: type[Exception] = sysv_ipc.ExistentialError
    return gone


def test_a_waiting_generation_whose_semaphore_is_removed_ends(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    path = package(tmp_path, "count", COUNTING)
    first, second = kernels(path), kernels(path)
    first.prepared()
    took(first)
    second.prepared()
    ground.semaphore.remove()
    broken = second.hear(Broken)
    assert "semaphore" in broken.error and second.ended()[0] == 1


def test_a_prepared_generation_may_be_given_another_state(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as pair:
        first, second = kernels(path), kernels(path)
        first.prepared()
        took(first)
        attach(second, pair)
        second.prepared()
        second.prepared(ground.blank(128 << 20))
        first.process.kill()
        took(second)
        pair.client.send(b"x", timeout=LIMIT)
        assert pair.client.recv(timeout=LIMIT) == b"x 1 1"
        assert total(ground, "state 3") == 1 and total(ground) == 0


def test_an_attach_to_an_engine_that_is_not_there_is_refused(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    kernel = kernels(package(tmp_path, "count", COUNTING))
    with ChannelPair(id=1) as pair:
        kernel.attach(pair, engine="other")
        assert kernel.hear(Failure).code == "not_found"
