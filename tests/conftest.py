"""What all tests share: the detector of leaks, pairs of endpoints, real kernels, and modules without one."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane import _native
from snap.ipc import Channel, Client, UnreachableError, connect
from snap.ipc.control import ControlClient
from snap.ipc.paths import runtime_dir
from snap.ipc.protocol import Loaded, Started
from snap.ipc.segment import NAME_PREFIX, Segment
from tests.host_rig import Ground, Kernel, manifest

PATIENCE = 15.0
LEAVE = 5.0
_PR_SET_CHILD_SUBREAPER = 36
_GETPID = 11
_KINDS = ("socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/shm/")
_OUTCOME: pytest.StashKey[bool] = pytest.StashKey()

# A shell that runs the tests in its background has SIGINT ignored, which processes of the tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

OWNER_MAY_ALL = """\
version = 1
[[allow]]
who = "owner"
service = "*"
rights = ["connect", "send", "recv", "copy", "move", "delegate", "inspect"]
[[operator]]
who = "owner"
rights = ["operate", "inspect"]
[modules.echo]
autostart = true
"""


# -- leaks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holdings:
    """What this test process and its descendants hold of the machine."""

    processes: Counter[str] = field(default_factory=Counter)
    shared_memory: Counter[str] = field(default_factory=Counter)
    semaphores: Counter[str] = field(default_factory=Counter)
    descriptors: Counter[str] = field(default_factory=Counter)
    mappings: Counter[str] = field(default_factory=Counter)
    socket_files: Counter[str] = field(default_factory=Counter)

    @classmethod
    def now(cls) -> Holdings:
        return cls(
            Counter(f"{pid}: {_title(pid)}" for pid in descendants(os.getpid())),
            Counter(path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("snap")),
            Counter(line.split()[1] for line in Path("/proc/sysvipc/sem").read_text().splitlines()[1:]),
            Counter(kind for kind in map(_kind, Path("/proc/self/fd").iterdir()) if kind),
            Counter(
                line.split(maxsplit=5)[5]
                for line in Path("/proc/self/maps").read_text().splitlines()
                if "/memfd:" in line or f"/dev/shm/{NAME_PREFIX}" in line
            ),
            Counter(str(path) for path in _default_sockets()),
        )

    def beyond(self, before: Holdings) -> dict[str, dict[str, int]]:
        """What is held now and was not before, by kind; empty when nothing is."""
        more = {name: getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__}
        return {name: dict(counter) for name, counter in more.items() if counter}


def descendants(root: int) -> list[int]:
    """Living processes below `root`, the dead ones being reaped on the way."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    found = [root]
    for pid in found:
        found += (child for child, parent in parents.items() if parent == pid)
    return found[1:]


def _title(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return "gone"


def _kind(entry: Path) -> str:
    try:
        target = str(entry.readlink())
    except OSError:
        return ""  # the listing's own descriptor
    if not target.startswith(_KINDS):
        return ""
    return target if target.startswith("anon_inode:") else target.split(":")[0]


def _default_sockets() -> list[Path]:
    """Socket files where a program puts them that was told no directory of its own."""
    directory = runtime_dir()
    try:
        return [path for path in directory.iterdir() if stat.S_ISSOCK(path.lstat().st_mode)]
    except OSError:
        return []


def _reap() -> None:
    """Collect orphans of dead descendants, which become ours: see `_adopt_orphans`."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@pytest.fixture(scope="session", autouse=True)
def _adopt_orphans() -> None:
    """A process whose parent was killed becomes our child, not init's: so it is seen."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if report.when == "call":
        item.stash[_OUTCOME] = report.passed
    return report


@pytest.fixture(autouse=True)
def leaks_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, segment, semaphore, socket or descriptor behind.

    What was told to end gets a moment for it. A test that failed anyway is not blamed for what its frames still hold,
    but its processes are ended as well.
    """
    before = Holdings.now()
    yield
    passed = request.node.stash.get(_OUTCOME, False)
    # pytest keeps what fixtures returned until after this; they have been torn down by now.
    request.node.funcargs.clear()
    begin = time.monotonic()
    while left := leaked_since(before):
        patience = LEAVE if left.keys() - {"descriptors", "mappings"} else LEAVE / 10
        if not passed or time.monotonic() > begin + patience:
            break
        time.sleep(0.02)
    for process in left.get("processes", {}):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process.split(":")[0]), signal.SIGKILL)
    _reap()
    if left and passed:
        pytest.fail(f"leaked: {left}")


def leaked_since(before: Holdings) -> dict[str, dict[str, int]]:
    """What is held beyond `before`, but for named segments and semaphores of somebody else's kernel, which may run beside
    us."""
    left = Holdings.now().beyond(before)
    if left:
        # Only now: collecting takes ten times as long as looking.
        gc.collect()
        left = Holdings.now().beyond(before)
    semaphores = {
        number: count
        for number, count in left.pop("semaphores", {}).items()
        if not _used_elsewhere(int(number))
    }
    if semaphores:
        left["semaphores"] = semaphores
    if names := left.pop("shared_memory", {}):
        elsewhere = _mapped_elsewhere()
        if ours := {name: count for name, count in names.items() if f"/dev/shm/{name}" not in elsewhere}:
            left["shared_memory"] = ours
    return left


def _used_elsewhere(semaphore: int) -> bool:
    """Whether the process that last did something with a semaphore lives, and is not ours."""
    last = ctypes.CDLL(None, use_errno=True).semctl(semaphore, 0, _GETPID)
    return (
        last > 0 and last not in {os.getpid(), *descendants(os.getpid())} and Path(f"/proc/{last}").exists()
    )


def _mapped_elsewhere() -> str:
    """The memory maps of the processes that are not ours."""
    ours = {os.getpid(), *descendants(os.getpid())}
    texts = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in ours:
            with contextlib.suppress(OSError):
                texts.append((entry / "maps").read_text())
    return "".join(texts)


# -- endpoints ----------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Both ends of a channel in this process, and what the kernel holds of it. Unpacks to (client, server)."""

    client: Channel
    server: _native.Endpoint
    control: _native.ChannelControl
    gate: _native.Gate
    ring: Segment
    up: Segment
    down: Segment

    def __iter__(self) -> Iterator[_native.Endpoint]:
        return iter((self.client, self.server))


@pytest.fixture
def channel_pair() -> Iterator[Callable[..., Pair]]:
    """Make connected endpoints: `client, server = channel_pair(slots=64, up_bytes=..., backend="posix")`."""
    with contextlib.ExitStack() as stack:

        def make(
            slots: int = 64, up_bytes: int = 1 << 20, down_bytes: int = 1 << 20, backend: str = "memfd"
        ) -> Pair:
            def segment(size: int) -> Segment:
                return stack.enter_context(Segment.create(size, backend))

            def bell() -> int:
                fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                stack.callback(os.close, fd)
                return fd

            ring, up, down = segment(_native.ring_bytes(slots)), segment(up_bytes), segment(down_bytes)
            page = segment(_native.Gate.BYTES)
            bells = (bell(), bell())
            control = _native.ChannelControl(ring.fd, slots, bells)
            stack.callback(control.close)
            control.init(1, 1)
            gate = _native.Gate(page.fd)
            stack.callback(gate.close)
            gate.open(0, 1)
            ends = (ring.fd, up.fd, down.fd, slots, up_bytes, down_bytes, bells, 1)
            client = stack.enter_context(Channel.make(_native.CLIENT, *ends, id=1, service="test"))
            server = _native.Endpoint(_native.SERVER, *ends, page.fd, 0)
            stack.callback(server.close)
            return Pair(client, server, control, gate, ring, up, down)

        yield make


# -- kernels ------------------------------------------------------------------------------------------------


@dataclass
class KernelProcess:
    """A real kernel on a runtime directory of its own."""

    process: subprocess.Popen[bytes]
    directory: Path
    output: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self, name: str = "test") -> Client:
        return connect(self.directory, name)

    def control(self, timeout: float = PATIENCE) -> ControlClient:
        return ControlClient(self.directory, timeout)

    def wait_ready(self) -> None:
        """Until an application can connect. Fails with the kernel's output when that never comes."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.connect().close()
            except UnreachableError:
                if self.process.poll() is not None or time.monotonic() > end:
                    pytest.fail(f"the kernel does not serve:\n{self.output.read_text()}")
                time.sleep(0.02)
            else:
                return

    def stop(self) -> int:
        """Ask it to end and wait until it has. Returns its exit code; fails when it does not end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the kernel does not stop:\n{self.output.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Callable[..., KernelProcess]]:
    """Start kernels: `kernel()`, `kernel(policy="...", modules=directory)`; each is stopped when the test ends.

    `policy` is the text of a policy file (default: the own uid may do everything), `modules` a directory of modules.
    """
    started: list[KernelProcess] = []

    def start(
        policy: str = OWNER_MAY_ALL, modules: Path | None = None, directory: Path | None = None
    ) -> KernelProcess:
        base = tmp_path / f"k{len(started)}"
        base.mkdir()
        (base / "policy.toml").write_text(policy)
        directory = directory or base / "run"
        command = [
            sys.executable,
            "-m",
            "snap.kernel",
            "--runtime-dir",
            directory,
            "--policy",
            base / "policy.toml",
        ]
        command += [] if modules is None else ["--module-path", modules]
        with (base / "output").open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        started.append(KernelProcess(process, directory, base / "output"))
        started[-1].wait_ready()
        return started[-1]

    yield start
    for one in started:
        one.stop()


# -- a module's processes without a kernel --------------------------------------------------------------------


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
