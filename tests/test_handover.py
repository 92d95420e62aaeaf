"""One generation of an engine hands over to the next, however it ends: real processes on shared state."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane import _native
from snap.ipc.protocol import (
    Attached,
    Broken,
    Check,
    Detach,
    Failure,
    Health,
    Holding,
    Keep,
    Loaded,
    Message,
    Progress,
    Refused,
    Report,
    Serving,
    Started,
    Stop,
    Took,
    Yield,
    Yielded,
)
from snap.modules import Array, Schema, Table
from snap.modules.tables import EngineState
from snap.modules.testing import ChannelPair
from tests.host_rig import LIMIT, Ground, Kernel, manifest, package

# Answers each message with the number of times that it was seen, and the number of all messages; both kept in state.
COUNTING = """
    from snap.modules import Array, Engine, Schema, Table
    class E(Engine):
        schema = Schema(version=1, seen=Table(key="S16", row="u8", capacity=1 << 19), all=Array("u8", 1))
        def poll(self, budget):
            done = 0
            for channel in self.channels:
                messages = channel.take(budget)
                channel.answer([self.count(message) for message in messages])
                done += len(messages)
            return done
        def count(self, message):
            seen = int(self.state.seen.get(message, 0)) + 1
            self.state.seen[message] = seen
            self.state.all.edit(0, 1)[0] += 1
            return b"%s %d %d" % (message, seen, self.state.all[0])
    """

# The same with a larger row: another schema version.
COUNTING_2 = COUNTING.replace("version=1,", "version=2, oldest=1,").replace(
    'row="u8"', 'row={"n": "u8", "more": "u8"}'
)
COUNTING_2 = COUNTING_2.replace(
    "int(self.state.seen.get(message, 0)) + 1", "int(self.state.seen.get(message, (0, 0))[0]) + 1"
).replace("self.state.seen[message] = seen", "self.state.seen[message] = (seen, 1)")
COUNTING_2 = COUNTING_2.replace(
    "import Array, Engine, Schema, Table", "import Array, Engine, Schema, Table, migrate"
)
COUNTING_2 = COUNTING_2.replace(
    "        def poll(self, budget):",
    '        @migrate("seen", 1, 2)\n        def more(self, old, new):\n            new["n"] = old\n'
    "        def poll(self, budget):",
)


@pytest.fixture
def ground() -> Iterator[Ground]:
    made = Ground(128 << 20)
    yield made
    made.close()


@pytest.fixture
def kernels(ground: Ground) -> Iterator[Any]:
    """Start the process of a generation, with everything loaded: `kernels(path)`."""
    started: list[Kernel] = []

    def start(path: Path, target: str = "engine:E", faults: Path | None = None, **more: Any) -> Kernel:
        kernel = Kernel(ground=ground, faults=faults)
        started.append(kernel)
        kernel.configure(path, manifest(path.name, target, **more), generation=len(started))
        kernel.hear(Started)
        kernel.hear(Loaded)
        return kernel

    yield start
    for kernel in started:
        kernel.close()


def took(kernel: Kernel) -> Took:
    found = kernel.hear(Took)
    kernel.hear(Serving)
    return found


def attach(kernel: Kernel, *pairs: ChannelPair) -> None:
    for pair in pairs:
        kernel.attach(pair)
        kernel.hear(Attached)


class Asking(threading.Thread):
    """A client that never rests, and checks every answer: each message seen once, all counted, in order."""

    def __init__(self, pair: ChannelPair, alone: bool = True) -> None:
        super().__init__()
        self._pair, self._alone = pair, alone
        self._stop_asking = threading.Event()
        self.asked = 0
        self.wrong: list[object] = []
        self.start()

    def run(self) -> None:
        for number in itertools.count():
            if self._stop_asking.is_set() or self.wrong:
                return
            message = b"%d.%d" % (self._pair.server.id, number)
            try:
                self._pair.client.send(message, timeout=LIMIT)
                answer = self._pair.client.recv(timeout=LIMIT)
            except Exception as error:
                self.wrong.append(error)
                return
            self.asked += 1
            said, seen, every = answer.split()
            if (said, seen) != (message, b"1") or (self._alone and int(every) != self.asked):
                self.wrong.append((message, answer))

    def finish(self) -> int:
        """Stop, and fail if anything was wrong; how many were asked."""
        self._stop_asking.set()
        self.join()
        assert self.wrong == []
        assert self._pair.client.try_recv() is None
        return self.asked


@contextlib.contextmanager
def asking(pair: ChannelPair) -> Iterator[Asking]:
    client = Asking(pair)
    try:
        yield client
    finally:
        client._stop_asking.set()
        client.join()
    client.finish()


def wait_for_more(client: Asking, more: int = 20) -> None:
    until, end = client.asked + more, time.monotonic() + LIMIT
    while client.asked < until and not client.wrong:
        assert time.monotonic() < end, "the client gets no more answers"
        time.sleep(0.001)


def total(ground: Ground, name: str = "state") -> int:
    schema = Schema(version=1, seen=Table(key="S16", row="u8", capacity=1 << 19), all=Array("u8", 1))
    state = _native.State(ground.fds[name], writable=False)
    assert state.verify() == []
    counted = int(EngineState(state, schema).all[0])
    state.close()
    return counted


def test_generations_hand_over_back_and_forth_and_the_client_notices_nothing(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as pair:
        first, second = kernels(path), kernels(path)
        attach(first, pair)
        first.prepared()
        took(first)
        with asking(pair) as client:
            attach(second, pair)
            second.prepared()
            for turn in range(20):
                giving, taking = (first, second) if turn % 2 == 0 else (second, first)
                wait_for_more(client)
                giving.tell(Yield(engine="echo"))
                given, taken = giving.hear(Yielded), took(taking)
                assert taken.last_poll_ns == given.last_poll_ns < taken.first_poll_ns
                assert taken.undone == 0
            wait_for_more(client)
        assert total(ground) == client.asked


@pytest.mark.parametrize("standby", [True, False], ids=["with a standby", "without"])
def test_a_generation_killed_at_any_instant_loses_and_repeats_nothing(
    ground: Ground, kernels: Any, tmp_path: Path, standby: bool
) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as pair:
        serving = kernels(path)
        attach(serving, pair)
        serving.prepared()
        took(serving)
        with asking(pair) as client:
            for _ in range(5):
                after = kernels(path)
                attach(after, pair)
                if standby:
                    after.prepared()
                time.sleep(chance.random() * 0.02)
                serving.process.kill()
                if not standby:
                    after.prepared()
                took(after)
                wait_for_more(client)
                serving = after
        assert total(ground) == client.asked


@pytest.mark.parametrize("point", ["module.took", "module.yield", "module.yielded", "module.commit"])
def test_a_death_at_a_step_of_the_hand_over_loses_and_repeats_nothing(
    ground: Ground, kernels: Any, tmp_path: Path, point: str
) -> None:
    path = package(tmp_path, "count", COUNTING)
    faults = tmp_path / "faults"
    faults.mkdir()
    with ChannelPair(id=1) as pair:
        first, second = kernels(path, faults=faults), kernels(path, faults=faults)
        attach(first, pair)
        first.prepared()
        took(first)
        with asking(pair) as client:
            attach(second, pair)
            second.prepared()
            wait_for_more(client)
            (tmp_path / "fault").write_text("kill")
            (tmp_path / "fault").rename(faults / point)
            if point != "module.commit":
                first.tell(Yield(engine="echo"))
            dying, other = (second, first) if point == "module.took" else (first, second)
            assert dying.process.wait(LIMIT) == -signal.SIGKILL
            if point == "module.took":
                other.hear(Yielded)
            took(other)
            wait_for_more(client)
        assert total(ground) == client.asked


def test_a_schema_change_is_migrated_while_the_old_one_serves_and_back(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    old, new = package(tmp_path, "count", COUNTING), tmp_path / "new"
    new.mkdir()
    new = package(new, "count", COUNTING_2)
    with ChannelPair(id=1) as pair:
        first, second = kernels(old), kernels(new, state_version=2)
        attach(first, pair)
        first.prepared()
        took(first)
        with asking(pair) as client:
            wait_for_more(client, 200)
            attach(second, pair)
            ready = second.prepared(ground.blank(128 << 20), ground.fds["state"])
            assert ready.migrated >= 200
            wait_for_more(client)
            first.tell(Yield(engine="echo", retire=True))
            given, taken = first.hear(Yielded), took(second)
            assert taken.last_poll_ns == given.last_poll_ns
            wait_for_more(client)
            third = kernels(old)
            attach(third, pair)
            third.prepared(ground.blank(128 << 20), ground.fds["state 3"])
            second.tell(Yield(engine="echo", retire=True))
            second.hear(Yielded)
            took(third)
            wait_for_more(client)
        assert total(ground, "state 4") == client.asked


def test_messages_sent_while_nobody_owns_the_engine_are_answered_by_the_next(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as pair:
        first = kernels(path)
        attach(first, pair)
        first.prepared()
        took(first)
        first.tell(Stop(grace=LIMIT))
        assert first.ended() == (0, "")
        pair.client.send_many([b"a", b"b", b"a"], timeout=LIMIT)
        second = kernels(path)
        attach(second, pair)
        second.prepared()
        took(second)
        answers: list[bytes] = []
        while len(answers) < 3:
            answers += pair.client.recv_many(3, timeout=LIMIT)
        assert answers == [b"a 1 1", b"b 1 2", b"a 2 3"]


def test_a_channel_that_is_detached_from_a_waiting_generation_is_not_served_by_it(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as leaving, ChannelPair(id=2) as staying:
        first, second = kernels(path), kernels(path)
        for kernel in (first, second):
            attach(kernel, leaving, staying)
            kernel.prepared()
            if kernel is first:
                took(first)
        for kernel in (first, second):
            kernel.tell(Detach(channel=1, reason="closed"))
        first.tell(Yield(engine="echo"))
        first.hear(Yielded)
        took(second)
        leaving.client.send(b"x", timeout=0)
        staying.client.send(b"y", timeout=LIMIT)
        assert staying.client.recv(timeout=LIMIT) == b"y 1 1"
        assert leaving.client.try_recv() is None


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


def test_a_native_engine_hands_over_in_the_same_way(ground: Ground, kernels: Any) -> None:
    from snap.modules.echo.engine import PyEcho

    path = Path(__import__(PyEcho.__module__, fromlist=["x"]).__file__).parent
    with ChannelPair(id=1) as pair:
        first, second = kernels(path, "native:echo"), kernels(path, "native:echo")
        for kernel in (first, second):
            attach(kernel, pair)
            kernel.prepared()
            if kernel is first:
                took(first)
        for turn in range(6):
            message = b"%d" % turn
            pair.client.send(message, timeout=LIMIT)
            giving, taking = (first, second) if turn % 2 == 0 else (second, first)
            giving.tell(Yield(engine="echo"))
            given, taken = giving.hear(Yielded), took(taking)
            assert taken.last_poll_ns == given.last_poll_ns < taken.first_poll_ns
            assert pair.client.recv(timeout=LIMIT) == message
