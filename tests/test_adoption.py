"""A kernel dies, another one takes over: clients, modules and operators go on with the same processes and channels."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane import _native
from snap.dataplane.errors import DeniedError, HandleError, SnapError, UnreachableError
from snap.ipc import aconnect, connect
from snap.ipc.channel import Channel
from snap.ipc.client import Client
from snap.ipc.control import ControlClient

PATIENCE = 60.0
SEED = random.randrange(1 << 32)


class System:
    """A kernel that is started again when it dies, by its keeper or by the test."""

    def __init__(self, base: Path, respawn: bool, grace: float) -> None:
        self.directory = base / "run"
        self.command = [sys.executable, "-P", "-m", "snap.kernel", "--runtime-dir", str(self.directory)]
        self.command += ["--orphan-grace", str(grace), *(["--respawn"] if respawn else [])]
        self.base = base
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, *more: str, faults: Path | None = None) -> int:
        environment = {**os.environ, **({"SNAP_FAULT_DIR": str(faults)} if faults else {})}
        with (self.base / "output").open("ab") as output:
            child = subprocess.Popen([*self.command, *more], stdout=output, stderr=output, env=environment)
        self.children.append(child)
        self.until(self.pid)
        return child.pid

    def call(self, op: str, **args: Any) -> Any:
        with ControlClient(self.directory, 5) as control:
            return control.call(op, **args)

    def pid(self) -> int:
        """Of the kernel that answers now; 0: none does."""
        try:
            return int(self.call("kernel.status")["pid"])
        except SnapError:
            return 0

    def modules(self) -> dict[str, tuple[int, int]]:
        """Pid and generation by name."""
        views = self.call("kernel.status")["modules"]
        return {view["name"]: (view["pid"], view["generation"]) for view in views}

    def ready(self, *names: str) -> bool:
        try:
            views = self.call("kernel.status")["modules"]
        except SnapError:
            return False
        return set(names) <= {view["name"] for view in views if view["state"] == "ready"}

    def connect(self) -> Client:
        return connect(self.directory, timeout=PATIENCE)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        for child in self.children:
            if child.pid == pid:
                child.wait()

    def until(self, what: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not what():
            if time.monotonic() > end:
                pytest.fail(f"it does not come about:\n{(self.base / 'output').read_text()[-3000:]}")
            time.sleep(0.02)

    def reborn(self, dead: int) -> int:
        """The pid of the kernel after `dead`."""
        self.until(lambda: self.pid() not in (0, dead))
        return self.pid()

    def stop(self) -> None:
        with suppress(UnreachableError):
            self.call("kernel.stop")
        self.until(lambda: not (self.directory / "keeper.sock").exists())
        for child in self.children:
            child.wait(PATIENCE)


@contextmanager
def system(base: Path, respawn: bool = True, grace: float = 20.0) -> Iterator[System]:
    made = System(base, respawn, grace)
    made.start()
    try:
        made.until(lambda: made.ready("echo", "relay"))
        yield made
    finally:
        made.stop()


class Load:
    """A thread that sends numbers, and wants each of them back, in order, once."""

    def __init__(self, client: Client, wait: int, service: str = "echo") -> None:
        self.channel = client.open(service, timeout=PATIENCE)
        self.count = 0
        self.error: BaseException | None = None
        self._wait, self._over = wait, False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over:
                self.channel.send(b"%d" % self.count)
                self.check(self.channel.recv(timeout=PATIENCE, wait=self._wait))
                self.count += 1
        except BaseException as error:
            self.error = error

    def check(self, got: bytes) -> None:
        assert got == b"%d" % self.count, (got, self.count)

    def more(self, system: System, count: int = 200) -> None:
        goal = self.count + count
        system.until(lambda: self.count > goal or self.error)
        assert self.error is None, self.error

    def end(self) -> None:
        self._over = True
        self._thread.join(PATIENCE)
        self.channel.close()
        assert self.error is None, self.error


class Opening(threading.Thread):
    channel: Channel

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client

    def run(self) -> None:
        self.channel = self._client.open("echo", timeout=PATIENCE)


@pytest.mark.parametrize("wait", [_native.SPIN, _native.ADAPTIVE], ids=["spinning", "adaptive"])
def test_kill_9_of_the_kernel_under_load_disturbs_no_client_and_keeps_every_generation(
    tmp_path: Path, wait: int
) -> None:
    with system(tmp_path) as running, running.connect() as client:
        load = Load(client, wait)
        load.more(running)
        before, pid = running.modules(), running.pid()
        running.kill(pid)
        load.more(running)
        running.reborn(pid)
        assert running.modules() == before
        load.more(running)
        load.end()
        with client.open("echo", timeout=PATIENCE) as another:
            another.send(b"new")
            assert another.recv(timeout=PATIENCE) == b"new"
        kinds = running.call("kernel.status")["events"]
        assert kinds["kernel.adopted"] == 1
        assert kinds["module.spawned"] == len(before)


def test_rights_handles_and_revocation_survive_the_kernel(tmp_path: Path) -> None:
    with system(tmp_path) as running, running.connect() as client, running.connect() as other:
        service = client.lookup("echo")
        weak = client.attenuate(service, {"connect", "send", "recv"})
        gone = client.attenuate(service, {"connect", "send", "recv"})
        client.delegate(service, other.principal, {"connect", "send"})
        client.revoke(gone)
        channel = client.open(weak, timeout=PATIENCE)
        before = running.call("cap.list")
        pid = running.pid()
        running.kill(pid)
        running.reborn(pid)
        assert running.call("cap.list") == before
        assert client.lookup("echo").handle == service.handle
        with pytest.raises(HandleError):
            client.open(gone)
        with pytest.raises(DeniedError):
            client.copy(weak)
        channel.send(b"still")
        assert channel.recv(timeout=PATIENCE) == b"still"
        client.revoke(weak)
        with pytest.raises(SnapError, match="revoked"):
            while True:
                channel.send(b"x")
                channel.recv(timeout=PATIENCE)
        assert len(other.capabilities()) == 1
        channel.close()


def test_requests_on_their_way_when_the_kernel_dies_are_answered_once(tmp_path: Path) -> None:
    with system(tmp_path) as running, running.connect() as client:
        service = client.lookup("echo")
        made: list[int] = []
        over = threading.Event()

        def derive() -> None:
            while not over.is_set() and len(made) < 150:
                made.append(client.attenuate(service, {"connect", "send"}, timeout=PATIENCE).handle)

        thread = threading.Thread(target=derive)
        thread.start()
        chance = random.Random(SEED)
        print(f"seed {SEED}")
        for _ in range(3):
            time.sleep(chance.random() * 0.2)
            pid = running.pid()
            os.kill(pid, signal.SIGKILL)
            running.reborn(pid)
        over.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        held = {cap.handle for cap in client.capabilities()}
        assert len(set(made)) == len(made)
        assert held == {service.handle, *made}  # nothing was derived that nobody asked for


def test_an_asyncio_client_opens_across_the_kernels_death(tmp_path: Path) -> None:
    with system(tmp_path) as running:

        async def test() -> None:
            async with await aconnect(running.directory, timeout=PATIENCE) as client:
                pid = running.pid()
                os.kill(pid, signal.SIGSTOP)
                opening = asyncio.create_task(client.aopen("echo", timeout=PATIENCE))
                await asyncio.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
                channel = await opening
                await channel.asend(b"over")
                assert await channel.arecv(timeout=PATIENCE) == b"over"
                channel.close()

        asyncio.run(test())


def test_a_client_that_leaves_while_no_kernel_runs_leaves_nothing_behind(tmp_path: Path) -> None:
    with system(tmp_path, respawn=False) as running:
        client = running.connect()
        channel = client.open("echo", timeout=PATIENCE)
        channel.send(b"x")
        assert channel.recv(timeout=PATIENCE) == b"x"
        running.kill(running.pid())
        running.start()
        assert len(running.call("channel.list")) == 1
        running.kill(running.pid())
        client.close()
        channel.close()
        running.start()
        running.until(lambda: running.call("channel.list") == [])
        assert not [cap for cap in running.call("cap.list") if cap["owner"].startswith("app:")]


def test_a_module_that_dies_while_no_kernel_runs_is_started_again_and_its_clients_go_on(
    tmp_path: Path,
) -> None:
    with system(tmp_path, respawn=False) as running, running.connect() as client:
        load = Load(client, _native.ADAPTIVE)
        load.more(running, 20)
        pid, generation = running.modules()["echo"]
        running.kill(running.pid())
        os.kill(pid, signal.SIGKILL)
        running.start()
        running.until(lambda: running.ready("echo"))
        load.more(running, 20)
        load.end()
        assert running.modules()["echo"][1] == generation + 1


def test_a_kernel_that_dies_between_recording_and_answering_is_answered_for_by_the_next(
    tmp_path: Path,
) -> None:
    faults = tmp_path / "faults"
    faults.mkdir()
    with system(tmp_path, respawn=False) as running, running.connect() as client:
        load = Load(client, _native.ADAPTIVE)
        before = running.modules()
        running.kill(running.pid())
        running.start(faults=faults)
        for _ in range(4):
            opening = Opening(client)
            (faults / "kernel.recorded").write_text("kill")
            opening.start()
            running.children[-1].wait(PATIENCE)
            running.start(faults=faults)
            opening.join(PATIENCE)
            with opening.channel as channel:
                channel.send(b"over")
                assert channel.recv(timeout=PATIENCE) == b"over"
        load.more(running)
        load.end()
        assert running.modules() == before
        running.until(lambda: running.call("channel.list") == [])


def test_events_go_on_without_a_gap_or_a_number_used_twice(tmp_path: Path) -> None:
    with system(tmp_path) as running:
        seen = [event["seq"] for event in running.call("events.since", seq=0, limit=1000)]
        pid = running.pid()
        running.kill(pid)
        running.reborn(pid)
        again = running.call("events.since", seq=0, limit=1000)
        numbers = [event["seq"] for event in again]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] > max(seen)
        assert "kernel.adopted" in [event["kind"] for event in again]


def test_kill_9_of_kernel_and_keeper_ends_everything(tmp_path: Path) -> None:
    made = System(tmp_path, True, 20.0)
    made.start()
    made.until(lambda: made.ready("echo", "relay"))
    modules = [pid for pid, _ in made.modules().values()]
    kernel = made.pid()
    parents = {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] for pid in _all()}
    keepers = [pid for pid in _titled("snap: keeper") if parents.get(pid) == str(kernel)]
    assert len(keepers) == 1
    os.kill(kernel, signal.SIGSTOP)  # or it would start another keeper
    os.kill(keepers[0], signal.SIGKILL)
    made.kill(kernel)
    made.until(lambda: not any(_lives(pid) for pid in [*modules, *keepers]))


def _all() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _titled(title: str) -> list[int]:
    found = []
    for pid in _all():
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                found.append(pid)
        except OSError:
            pass
    return found


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
