"""The SDK: engines of both languages behind one interface, and the host process against a kernel made of a socket."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from snap.dataplane import _native
from snap.dataplane.errors import BusyError, ChannelError, PeerGoneError
from snap.ipc import seqpacket
from snap.ipc.protocol import (
    Attached,
    Broken,
    Detach,
    Dropped,
    Failure,
    Found,
    Loaded,
    Lookup,
    Mapped,
    Open,
    Opened,
    Ready,
    Serving,
    Started,
    Stop,
    Took,
    encode,
)
from snap.modules import Engine, Schema, ServerChannel
from snap.modules.echo.engine import PyEcho
from snap.modules.testing import ChannelPair, channel_pair
from snap.modules.worker import PythonWorker, Runner
from tests.host_rig import Kernel, manifest, package

LIMIT = 10.0
ECHO = Path(sys.modules[PyEcho.__module__].__file__ or "").parent
T = TypeVar("T")
Make = Callable[[int], Runner]


def until(ready: Callable[[], T]) -> T:
    """Ask until the answer is true; a wrong program shows as a failure here, after `LIMIT` seconds."""
    end = time.monotonic() + LIMIT
    while not (answer := ready()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)
    return answer


# -- one conformance suite for engines of both languages ----------------------------------------------------


def blank(schema: Schema | None = None, name: str = "test") -> _native.State:
    """A state that nobody else has; the mapping outlives the descriptor."""
    schema = schema or Schema()
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _native.State.MIN_BYTES + (1 << 20))
        _native.State.format(fd, name, name, schema.version, schema.oldest, schema.specs())
        return _native.State(fd)
    finally:
        os.close(fd)


def rust_echo(wait: int, **more: Any) -> Runner:
    return _native.Worker("echo", "echo", blank(), -1, 1, wait=wait, **more)


def python_echo(wait: int) -> Runner:
    return PythonWorker("echo", PyEcho(), blank(), wait=wait)


def dropped_by(runner: Runner) -> list[tuple[int, str]]:
    """Channels that were dropped since the last look, with the reason."""
    return [(number, data) for kind, number, data in runner.take_news() if kind == "fault"]


@pytest.fixture(params=[rust_echo, python_echo], ids=["rust", "python"])
def make(request: pytest.FixtureRequest) -> Make:
    chosen: Make = request.param
    return chosen


@contextlib.contextmanager
def started(make: Make, wait: int = _native.ADAPTIVE) -> Iterator[Runner]:
    worker = make(wait)
    try:
        yield worker
    finally:
        worker.stop(LIMIT)
    assert not getattr(worker, "crash", "")


@contextlib.contextmanager
def clients(runner: Runner, count: int, **geometry: Any) -> Iterator[list[ChannelPair]]:
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(ChannelPair(id=number + 1, **geometry)) for number in range(count)]
        for pair in pairs:
            runner.attach(pair.server.id, pair.server, pair.server.id)
        yield pairs


def receive(pair: ChannelPair, count: int) -> list[bytes]:
    answers: list[bytes] = []
    while len(answers) < count and (burst := pair.client.recv_many(count - len(answers), timeout=LIMIT)):
        answers += burst
    return answers


@pytest.mark.parametrize(
    "wait", [_native.ADAPTIVE, _native.BLOCK, _native.SPIN], ids=["adaptive", "block", "spin"]
)
def test_echo_answers_messages_of_every_size_in_order(make: Make, wait: int) -> None:
    with started(make, wait) as worker, clients(worker, 1) as (pair,):
        messages = [os.urandom(size) for size in (0, 1, 8, 40, 41, 64, 500, 4096, 100_000)]
        for message in messages:
            pair.client.send(message, timeout=LIMIT)
        assert receive(pair, len(messages)) == messages


def test_a_client_that_does_not_read_loses_nothing_and_holds_up_nobody(make: Make) -> None:
    with started(make) as runner, clients(runner, 2, slots=64) as (slow, quick):
        sent = [b"%d" % number for number in range(1000)]
        taken = 0
        while burst := slow.client.send_many(sent[taken:], timeout=0.1):
            taken += burst
        assert taken >= 64
        for number in range(200):
            quick.client.send(b"%d" % number, timeout=LIMIT)
            assert quick.client.recv(timeout=LIMIT) == b"%d" % number
        assert receive(slow, taken) == sent[:taken]


def test_a_slow_client_with_large_messages_loses_nothing(make: Make) -> None:
    with started(make) as runner, clients(runner, 1, slots=64, down_bytes=1 << 16) as (pair,):
        sent = [os.urandom(10_000) for _ in range(40)]
        for message in sent:
            pair.client.send(message, timeout=LIMIT)
        assert receive(pair, len(sent)) == sent


def test_a_client_whose_pool_cannot_hold_an_answer_is_dropped_and_others_served(make: Make) -> None:
    with started(make) as runner, clients(runner, 1, down_bytes=1 << 16) as (small,), channel_pair() as other:
        other.server.id = 99
        runner.attach(99, other.server, 99)
        small.client.send(bytes(500_000), timeout=LIMIT)
        faults = until(lambda: dropped_by(runner))
        assert [channel for channel, _ in faults] == [small.server.id]
        other.client.send(b"served", timeout=LIMIT)
        assert other.client.recv(timeout=LIMIT) == b"served"


def test_a_client_that_may_not_receive_is_dropped_when_it_is_answered(make: Make) -> None:
    with started(make) as runner, clients(runner, 1, rights=["send"]) as (pair,):
        pair.client.send(b"?", timeout=LIMIT)
        assert [channel for channel, _ in until(lambda: dropped_by(runner))] == [pair.server.id]


def test_a_client_that_sends_without_the_right_is_dropped(make: Make) -> None:
    with started(make) as runner, clients(runner, 1, rights=["recv"]) as (pair,):
        ring, up, down, *bells = pair.descriptors
        geometry = (ring, up, down, 256, 1 << 20, 1 << 20)
        forger = _native.Endpoint(_native.CLIENT, *geometry, (bells[0], bells[1]), 1, rights=3)
        forger.send(b"!", timeout=LIMIT)
        assert [channel for channel, _ in until(lambda: dropped_by(runner))] == [pair.server.id]
        forger.close()


def test_a_hostile_client_is_dropped_with_a_reason_and_others_served(make: Make) -> None:
    with started(make) as runner, clients(runner, 2) as (hostile, good):
        hostile.scribble(seed=4)
        assert select.select([runner], [], [], LIMIT)[0]
        ((channel, reason),) = until(lambda: dropped_by(runner))
        assert channel == hostile.server.id and reason
        good.client.send(b"served", timeout=LIMIT)
        assert good.client.recv(timeout=LIMIT) == b"served"


def test_random_bytes_anywhere_in_a_channel_hurt_that_channel_alone(make: Make) -> None:
    with started(make) as runner, channel_pair() as good:
        good.server.id = 1000
        runner.attach(1000, good.server, 1000)
        for seed in range(60):
            chance = random.Random(seed)
            with ChannelPair(id=seed + 1, slots=64, up_bytes=1 << 16, down_bytes=1 << 16) as hostile:
                runner.attach(hostile.server.id, hostile.server, hostile.server.id)
                for _ in range(20):
                    with contextlib.suppress(ChannelError):
                        hostile.client.send_many(
                            [chance.randbytes(chance.choice([8, 200, 5000]))] * 3, timeout=0
                        )
                        hostile.client.recv_many(chance.randint(1, 4), timeout=0)
                    segment = chance.choice(hostile.descriptors[:3])
                    place = chance.randrange(os.fstat(segment).st_size - 64) & ~7
                    os.pwrite(segment, chance.randbytes(chance.choice([1, 4, 8, 64])), place)
                good.client.send(b"%d" % seed, timeout=LIMIT)
                assert good.client.recv(timeout=LIMIT) == b"%d" % seed, f"seed {seed}"
                runner.detach(hostile.server.id)
        assert runner.alive
        assert 1000 not in [channel for channel, _ in dropped_by(runner)]


def test_a_revoked_channel_is_dropped_without_another_message(make: Make) -> None:
    with started(make) as runner, clients(runner, 1) as (pair,):
        pair.client.send(b"before", timeout=LIMIT)
        assert pair.client.recv(timeout=LIMIT) == b"before"
        pair.revoke()
        assert [channel for channel, _ in until(lambda: dropped_by(runner))] == [pair.server.id]


def test_a_detached_channel_is_served_no_more_and_its_end_is_for_the_kernel_to_tell(make: Make) -> None:
    with started(make) as runner, clients(runner, 2) as (leaving, staying):
        runner.detach(leaving.server.id)
        staying.client.send(b"1", timeout=LIMIT)
        assert staying.client.recv(timeout=LIMIT) == b"1"
        leaving.client.send(b"2", timeout=0)
        staying.client.send(b"3", timeout=LIMIT)
        assert staying.client.recv(timeout=LIMIT) == b"3"
        assert leaving.client.try_recv() is None
        assert dropped_by(runner) == []


@pytest.mark.parametrize("language", ["rust", "python"])
def test_the_statistics_page_tells_the_work_and_the_heartbeat(language: str) -> None:
    fd = os.memfd_create("stats", os.MFD_CLOEXEC)
    os.ftruncate(fd, _native.StatsPage.BYTES)
    page = _native.StatsPage(fd, True)
    worker: Runner = (
        _native.Worker("echo", "echo", blank(), -1, 1, fd, 3)
        if language == "rust"
        else PythonWorker("echo", PyEcho(), blank(), -1, 1, _native.StatsPage(fd, True), 3)
    )
    try:
        with clients(worker, 1) as (pair,):
            pair.client.send_many([b"x"] * 50, timeout=LIMIT)
            assert len(receive(pair, 50)) == 50
            until(lambda: page.read(3)["work"] == 50)
            record = page.read(3)
            assert record["polls"] >= 1 and record["channels"] == 1
            until(lambda: page.read(3)["heartbeat_ns"] > record["heartbeat_ns"])
    finally:
        worker.stop(LIMIT)
        page.close()
        os.close(fd)


def test_a_stopped_engine_is_not_alive(make: Make) -> None:
    with started(make) as runner:
        assert runner.alive
    assert not runner.alive


# -- what only Python engines have ---------------------------------------------------------------------------


class Recorder(Engine):
    """Notes what is called, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def poll(self, budget: int) -> int:
        return sum(len(channel.take(budget)) for channel in self.channels)

    def on_attach(self, channel: ServerChannel) -> None:
        self.seen.append(f"attach {channel.badge} {sorted(channel.rights)} {channel.service}")

    def on_detach(self, channel: ServerChannel) -> None:
        self.seen.append(f"detach {channel.badge} {channel.closed}")


@contextlib.contextmanager
def working(engine: Engine) -> Iterator[PythonWorker]:
    worker = PythonWorker("test", engine, blank(engine.schema))
    try:
        yield worker
    finally:
        worker.stop(LIMIT)


def test_a_client_without_room_for_large_answers_holds_up_nobody_and_gets_them_all() -> None:
    class Large(PyEcho):
        def poll(self, budget: int) -> int:
            done = 0
            for channel in self.channels:
                messages = channel.take(budget)
                channel.answer([message + bytes(20_000) for message in messages])
                done += len(messages)
            return done

    small = {"down_bytes": 1 << 17}
    with working(Large()) as worker, ChannelPair(id=1, **small) as slow, ChannelPair(id=2, **small) as quick:
        for pair in (slow, quick):
            worker.attach(pair.server.id, pair.server, pair.server.id)
        sent = [b"%03d" % number for number in range(100)]
        slow.client.send_many(sent, timeout=LIMIT)
        for number in range(300):
            quick.client.send(b"%03d" % number, timeout=LIMIT)
            assert quick.client.recv(timeout=LIMIT)[:3] == b"%03d" % number
        assert [answer[:3] for answer in receive(slow, 100)] == sent


def test_an_engine_sees_who_attaches_and_who_leaves() -> None:
    engine = Recorder()
    with ChannelPair(badge="uid:7/pid:8", rights=["send"], service="s") as pair, working(engine) as worker:
        worker.attach(1, pair.server, 1)
        until(lambda: len(engine.seen) == 1)
        worker.detach(1)
        until(lambda: len(engine.seen) == 2)
    assert engine.seen == ["attach uid:7/pid:8 ['send'] s", "detach uid:7/pid:8 False"]


def test_mail_runs_on_the_engines_thread_and_the_slot_holds_one_piece() -> None:
    engine = Recorder()
    names: list[str] = []
    engine.mail(lambda: names.append("early"), timeout=0)
    with pytest.raises(BusyError):
        engine.mail(lambda: names.append("refused"), timeout=0.01)
    with working(engine):
        engine.mail(lambda: names.append(__import__("threading").current_thread().name), timeout=LIMIT)
        until(lambda: len(names) == 2)
    assert names == ["early", "engine test"]


def test_an_engine_that_raises_leaves_its_traceback_and_is_not_alive() -> None:
    class Broken(Engine):
        def poll(self, budget: int) -> int:
            raise ZeroDivisionError("of my own")

    with working(Broken()) as worker:
        select.select([worker], [], [], LIMIT)
        assert not worker.alive
        assert "ZeroDivisionError: of my own" in worker.crash


def test_an_error_of_a_channel_that_has_not_failed_is_the_engines_own() -> None:
    class Confused(Engine):
        def poll(self, budget: int) -> int:
            if self.channels:
                raise PeerGoneError("says who?")
            return 0

    with channel_pair() as pair, working(Confused()) as worker:
        worker.attach(1, pair.server, 1)
        until(lambda: not worker.alive)
        assert "says who?" in worker.crash


def test_a_poll_that_returns_nothing_is_named() -> None:
    class Forgetful(Engine):
        def poll(self, budget: int) -> int:
            return None  # type: ignore[return-value]

    with working(Forgetful()) as worker:
        until(lambda: not worker.alive)
        assert "Forgetful.poll returned None" in worker.crash


def test_a_timer_polls_the_engine_though_no_message_came() -> None:
    class Timed(Engine):
        polls = 0

        def poll(self, budget: int) -> int:
            self.polls += 1
            return 0

        def wake_after(self) -> float | None:
            return 0.001

    engine = Timed()
    with working(engine):
        until(lambda: engine.polls > 20)


def test_an_engine_is_polled_for_a_channel_of_which_it_is_the_client() -> None:
    class Client(Engine):
        heard: list[bytes]

        def __init__(self, peer: _native.Endpoint) -> None:
            self.heard, self.peer = [], peer
            self.watch(peer)

        def poll(self, budget: int) -> int:
            burst = self.peer.recv_many(budget, timeout=0)
            self.heard += burst
            return len(burst)

    with channel_pair() as pair:
        engine = Client(pair.client)
        with working(engine):
            pair.server.send(b"pushed", timeout=LIMIT)
            assert until(lambda: engine.heard) == [b"pushed"]


# -- the host process ----------------------------------------------------------------------------------------


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    played = Kernel()
    yield played
    played.close()


@pytest.mark.parametrize("target", ["native:echo", "engine:PyEcho"])
def test_a_module_starts_serves_detaches_and_stops(kernel: Kernel, target: str) -> None:
    kernel.serve(ECHO, manifest("echo", target))
    with channel_pair() as pair:
        kernel.attach(pair)
        assert kernel.hear(Attached) == Attached(seq=1, channel=1)
        pair.client.send(b"through a process", timeout=LIMIT)
        assert pair.client.recv(timeout=LIMIT) == b"through a process"
        kernel.tell(Detach(channel=1, reason="closed"))
        kernel.tell(Stop(grace=LIMIT))
        assert kernel.ended() == (0, "")


def test_a_module_has_its_name_as_title_and_no_descriptor_of_others() -> None:
    secret = os.memfd_create("somebody-elses", 0)
    kernel = Kernel(extra_fd=secret)
    try:
        kernel.serve(ECHO, manifest("echo", "native:echo"))
        proc = Path(f"/proc/{kernel.process.pid}")
        assert proc.joinpath("cmdline").read_bytes().rstrip(b"\0") == b"snap: module echo"
        assert not [fd for fd in proc.joinpath("fd").iterdir() if "somebody-elses" in str(fd.readlink())]
    finally:
        kernel.close()
        os.close(secret)


@pytest.mark.parametrize("target", ["native:echo", "engine:PyEcho"])
def test_a_hostile_clients_channel_is_dropped_and_the_process_lives(kernel: Kernel, target: str) -> None:
    kernel.serve(ECHO, manifest("echo", target))
    with ChannelPair(id=1) as hostile, ChannelPair(id=2) as good:
        for pair in (hostile, good):
            kernel.attach(pair)
            kernel.hear(Attached)
        hostile.scribble(seed=1)
        dropped = kernel.hear(Dropped)
        assert dropped.channel == 1 and dropped.reason
        kernel.tell(Detach(channel=1, reason="it was dropped in the meantime"))
        good.client.send(b"x", timeout=LIMIT)
        assert good.client.recv(timeout=LIMIT) == b"x"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"engine": "none"}, "not_found"),
        ({"slots": 100}, "faulted"),
        ({"generation": 9}, "faulted"),
        ({"up_bytes": 1 << 40}, ""),
    ],
)
def test_an_attach_that_cannot_work_is_answered_and_the_module_serves_on(
    kernel: Kernel, change: dict[str, Any], code: str
) -> None:
    kernel.serve(ECHO, manifest("echo", "native:echo"))
    with channel_pair() as pair:
        kernel.attach(pair, **{"seq": 7, **change})
        failure = kernel.hear(Failure)
        assert failure.seq == 7 and code in failure.code and failure.message
        kernel.attach(pair)
        kernel.hear(Attached)


@pytest.mark.parametrize(
    ("code", "stage", "said"),
    [
        ("raise ImportError('no such luck')", "start", "no such luck"),
        ("import sys\nsys.exit(3)", "start", "SystemExit: 3"),
        ("this is no python", "start", "SyntaxError"),
        ("class Other: ...", "start", "'engine:E' is not a subclass of Engine"),
        (
            """
            from snap.modules import Engine
            class E(Engine):
                def __init__(self): raise OSError("no port")
            """,
            "start",
            "no port",
        ),
        (
            """
            from snap.modules import Engine
            class E(Engine):
                def poll(self, budget): return 1 // 0
            """,
            "run",
            "ZeroDivisionError",
        ),
    ],
)
def test_a_module_that_cannot_run_says_why_and_exits_1(
    kernel: Kernel, tmp_path: Path, code: str, stage: str, said: str
) -> None:
    kernel.configure(package(tmp_path, "bad", code), manifest("bad", "engine:E"))
    kernel.hear(Started)
    if stage == "run":
        kernel.hear(Loaded)
        kernel.prepared()
    broken = kernel.hear(Broken)
    assert said in broken.error and "Traceback" in broken.traceback
    status, stderr = kernel.ended()
    assert status == 1 and said in stderr


def test_a_package_that_raises_in_its_init_is_broken_in_import(kernel: Kernel, tmp_path: Path) -> None:
    path = package(tmp_path, "bad", "")
    (path / "__init__.py").write_text("raise RuntimeError('at import')")
    kernel.configure(path, manifest("bad", "engine:E"))
    kernel.hear(Started)
    broken = kernel.hear(Broken)
    assert broken.stage == "import" and "at import" in broken.error


def test_a_module_that_hangs_in_its_import_still_obeys_stop(kernel: Kernel, tmp_path: Path) -> None:
    kernel.configure(package(tmp_path, "slow", "import time\ntime.sleep(1000)"), manifest("slow", "engine:E"))
    kernel.hear(Started)
    kernel.tell(Stop(grace=LIMIT))
    assert kernel.ended() == (0, "")


def test_a_module_ends_when_its_kernel_has_gone(kernel: Kernel) -> None:
    kernel.serve(ECHO, manifest("echo", "engine:PyEcho"))
    kernel.sock.close()
    assert kernel.ended() == (0, "")


def test_an_engine_stuck_in_its_poll_does_not_keep_the_process(kernel: Kernel, tmp_path: Path) -> None:
    code = """
        import time
        from snap.modules import Engine
        class E(Engine):
            def poll(self, budget):
                time.sleep(1000)
        """
    kernel.configure(package(tmp_path, "stuck", code), manifest("stuck", "engine:E"))
    kernel.hear(Started)
    kernel.hear(Loaded)
    kernel.prepared()
    kernel.tell(Stop(grace=0.2))
    status, said = kernel.ended()
    assert status == 1 and "did not stop within 0.2 s" in said


@pytest.mark.parametrize("nonsense", [b"\xc1garbage", encode(Attached(channel=1)), encode(Started(pid=1))])
def test_nonsense_from_the_kernel_ends_the_process_with_a_named_error(
    kernel: Kernel, nonsense: bytes
) -> None:
    kernel.serve(ECHO, manifest("echo", "native:echo"))
    seqpacket.send(kernel.sock, nonsense)
    status, said = kernel.ended()
    assert status == 1 and "ProtocolError" in said


def test_a_first_order_other_than_configure_is_named(kernel: Kernel) -> None:
    kernel.tell(Stop())
    status, said = kernel.ended()
    assert status == 1 and "ProtocolError: first comes Stop" in said


def test_a_host_without_a_link_says_who_starts_modules() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "SNAP_LINK_FD"}
    done = subprocess.run(
        [sys.executable, "-m", "snap.modules.host"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "SNAP_LINK_FD" in done.stderr


def test_ctrl_c_does_not_end_a_module_behind_its_kernels_back(kernel: Kernel) -> None:
    kernel.serve(ECHO, manifest("echo", "native:echo"))
    kernel.process.send_signal(signal.SIGINT)
    with channel_pair() as pair:
        kernel.attach(pair)
        kernel.hear(Attached)


def test_an_entry_class_runs_before_and_after_its_engines(kernel: Kernel, tmp_path: Path) -> None:
    code = """
        import sys
        from snap.modules import Engine, Module
        class E(Engine):
            greeting = b""
            def poll(self, budget):
                for channel in self.channels:
                    channel.answer([self.greeting for _ in channel.take(budget)])
                return 0
        class Main(Module):
            def on_start(self):
                self.running["echo"].greeting = f"{self.name} {self.generation}".encode()
            def on_stop(self):
                print("stopped", file=sys.stderr)
        """
    kernel.serve(package(tmp_path, "greet", code), manifest("greet", "engine:E", entry="engine:Main"))
    with channel_pair() as pair:
        kernel.attach(pair)
        kernel.hear(Attached)
        pair.client.send(b"?", timeout=LIMIT)
        assert pair.client.recv(timeout=LIMIT) == b"greet 1"
        kernel.tell(Stop(grace=LIMIT))
        assert kernel.ended() == (0, "stopped\n")


CLIENT_OF_ANOTHER = """
    from snap.modules import Engine, Module
    class E(Engine):
        peer = None
        lost = 0
        def use(self, peer):
            self.peer = peer
            self.watch(peer)
            peer.send(b"used after %d losses" % self.lost)
        def on_lost(self, channel, error):
            self.lost += 1
            self.module.connect_soon("other", self, self.use)
        def poll(self, budget):
            return 0
    class Main(Module):
        def on_start(self):
            self.running["echo"].use(self.connect("other"))
    """


def grant(kernel: Kernel, pair: ChannelPair) -> None:
    """Give the module the client's end of `pair`, as the kernel does."""
    look = kernel.hear(Lookup)
    assert look.service == "other"
    kernel.tell(Found(seq=look.seq, handle=5, rights=["send", "recv"], ready=True))
    wish = kernel.hear(Open)
    assert wish.handle == 5
    opened = Opened(
        seq=wish.seq, channel=pair.server.id, generation=1, slots=256, up_bytes=1 << 20, down_bytes=1 << 20,
        rights=["send", "recv"], backend="memfd",
    )  # fmt: skip
    kernel.tell(opened, pair.descriptors)
    mapped = kernel.hear(Mapped)
    assert mapped.channel == pair.server.id
    kernel.tell(Ready(seq=mapped.seq, channel=mapped.channel))


def test_a_module_opens_a_channel_to_another_and_a_new_one_when_that_is_lost(
    kernel: Kernel, tmp_path: Path
) -> None:
    path = package(tmp_path, "client", CLIENT_OF_ANOTHER)
    kernel.configure(path, manifest("client", "engine:E", entry="engine:Main"))
    kernel.hear(Started)
    with ChannelPair(id=11) as first, ChannelPair(id=12) as second:
        grant(kernel, first)
        kernel.hear(Loaded)
        kernel.prepared()
        kernel.hear(Took)
        kernel.hear(Serving)
        assert first.server.recv(timeout=LIMIT) == b"used after 0 losses"
        first.leave()
        grant(kernel, second)
        assert second.server.recv(timeout=LIMIT) == b"used after 1 losses"


def test_a_module_that_is_denied_a_service_says_so(kernel: Kernel, tmp_path: Path) -> None:
    path = package(tmp_path, "client", CLIENT_OF_ANOTHER)
    kernel.configure(path, manifest("client", "engine:E", entry="engine:Main"))
    kernel.hear(Started)
    look = kernel.hear(Lookup)
    kernel.tell(Failure(seq=look.seq, code="denied", message="no rule allows it", hint="add one"))
    broken = kernel.hear(Broken)
    assert broken.stage == "start" and "DeniedError: no rule allows it" in broken.error


def test_a_module_that_waits_for_an_answer_obeys_stop(kernel: Kernel, tmp_path: Path) -> None:
    path = package(tmp_path, "client", CLIENT_OF_ANOTHER)
    kernel.configure(path, manifest("client", "engine:E", entry="engine:Main"))
    kernel.hear(Started)
    kernel.hear(Lookup)
    kernel.tell(Stop(grace=LIMIT))
    assert kernel.ended() == (0, "")
