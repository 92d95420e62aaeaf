"""The host process of a module, against a kernel made of a socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
from snap.modules.echo.engine import PyEcho
from snap.modules.testing import ChannelPair, channel_pair
from tests.host_rig import Kernel, manifest, package
from tests.waiting import LIMIT

ECHO = Path(sys.modules[PyEcho.__module__].__file__ or "").parent


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
        seq=wish.seq, channel=pair.server.id, generation=1, slots=256, up_bytes=1 << 20, down_bytes=1 << 20, arena_bytes=0,
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
