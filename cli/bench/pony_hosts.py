"""Where Pony is measured: one host, or two in network namespaces joined by a veth; and the processes on them."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from snap.ipc import DeadlineError, SnapError
from snap.ipc.control import ControlClient
from snap.modules.pony import identity

from ..demo.stage import Stage

PATIENCE: Final = 120.0
_NAMES: Final = ("a", "b")

_POLICY: Final = """
version = 1
[[allow]]
who = "owner"
service = "pony*"
rights = ["connect", "send", "recv"]
[[operator]]
who = "owner"
rights = ["operate", "inspect"]
[quota]
bytes = "1GiB"
"""
"""Room for the largest regions, and no modules but those that are asked for."""


class App:
    """An application in a process of its own, `snap.cli.bench.pony_app`, which does what it is told."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    def begin(self, do: str, **arguments: Any) -> None:
        """Order it to `do` that; `result` waits for it."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._child.stdin.flush()

    def result(self) -> Any:
        """What the order came to. Raises SnapError when it failed."""
        assert self._child.stdout is not None
        if not select.select([self._child.stdout], [], [], PATIENCE)[0]:
            raise DeadlineError("a measuring process does not answer", "try --quick on a quieter machine")
        line = self._child.stdout.readline()
        if not line:
            raise SnapError("a measuring process ended; its message is above")
        answer = json.loads(line)
        if "error" in answer:
            raise SnapError(answer["error"])
        return answer["result"]

    def ask(self, do: str, **arguments: Any) -> Any:
        self.begin(do, **arguments)
        return self.result()


@dataclass
class Site:
    """Two applications, and how one names the other's host. `links`: the devices between them, none on one host."""

    stage: Stage
    runtimes: tuple[Path, Path]
    namespaces: tuple[str, str] = ("", "")
    address: str = "127.0.0.1"
    prefix: str = ""
    links: tuple[str, ...] = ()

    @contextmanager
    def apps(self, *arenas: int) -> Iterator[tuple[App, App]]:
        """An initiator and a target; they end with `with`. `arenas`: bytes that each shares with peers, if any."""
        with ExitStack() as stack:
            apps = []
            for runtime, netns in zip(self.runtimes, self.namespaces, strict=True):
                pipe = subprocess.PIPE
                child = self.stage.start(
                    "snap.cli.bench.pony_app", runtime, stdin=pipe, out=pipe, netns=netns
                )
                stack.callback(_finish, child)
                apps.append(App(child))
            for app, arena in zip(apps, arenas, strict=False):
                app.ask("open", arena=arena)
            yield apps[0], apps[1]

    def engine(self, side: int = 0) -> Thread:
        """The engine of the initiator's host (0) or of the target's (1)."""
        with ControlClient(self.runtimes[side]) as operator:
            pid = operator.call("module.show", name="pony")["pid"]
        for task in Path(f"/proc/{pid}/task").iterdir():
            if (task / "comm").read_text().strip() == "pony":
                return Thread(task)
        raise SnapError("the engine of pony does not run")


@dataclass(frozen=True)
class Thread:
    """A thread, by its folder in /proc."""

    task: Path

    def cpu(self) -> float:
        """Seconds on a processor so far."""
        return int((self.task / "schedstat").read_text().split()[0]) / 1e9

    def resident(self) -> int:
        """Bytes of its process in memory."""
        pages = int((self.task / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def _finish(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextmanager
def one_host() -> Iterator[Site]:
    """One kernel that knows no other host."""
    with Stage() as stage:
        runtime = _kernel(stage, stage.folder)
        yield Site(stage, (runtime, runtime))


def unable() -> str:
    """Why this machine cannot make two hosts; "" when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    return "" if shutil.which("ip") else "there is no `ip` (iproute2)"


@contextmanager
def two_hosts(mtu: int) -> Iterator[Site]:
    """Two kernels in namespaces of their own, a veth of that MTU between them; all gone again with `with`."""
    mark = f"{os.getpid():x}"
    namespaces = (f"snap-{mark}-a", f"snap-{mark}-b")
    devices = (f"sv{mark}a", f"sv{mark}b")
    addresses = ("10.213.47.1", "10.213.47.2")
    with Stage() as stage:
        for netns in namespaces:
            stage.at_end(_remove, netns)
            run("ip", "netns", "add", netns)
        run("ip", "-n", namespaces[0], *f"link add {devices[0]} type veth peer name {devices[1]}".split())
        run("ip", "-n", namespaces[0], "link", "set", devices[1], "netns", namespaces[1])
        for netns, device, address in zip(namespaces, devices, addresses, strict=True):
            run("ip", "-n", netns, "addr", "add", f"{address}/24", "dev", device)
            run("ip", "-n", netns, "link", "set", device, "mtu", str(mtu), "up")
            run("ip", "-n", netns, "link", "set", "lo", "up")
        runtimes = _pair(stage, namespaces, [("", address) for address in addresses])
        yield Site(stage, runtimes, namespaces, addresses[1], "b/", devices)


@contextmanager
def two_ports() -> Iterator[Site]:
    """Two kernels on different ports of the loopback device, which needs no root."""
    ports = [_free_port(), _free_port()]
    listen = [f'listen = "127.0.0.1"\ntcp_port = {port}\nudp_port = {port}\n' for port in ports]
    with Stage() as stage:
        where = [(lines, f"127.0.0.1:{port}") for lines, port in zip(listen, ports, strict=True)]
        yield Site(stage, _pair(stage, ("", ""), where), prefix="b/")


def _free_port() -> int:
    with socket.socket() as tcp:
        tcp.bind(("127.0.0.1", 0))
        port: int = tcp.getsockname()[1]
        return port


def _pair(stage: Stage, namespaces: tuple[str, str], where: Sequence[tuple[str, str]]) -> tuple[Path, Path]:
    """Two kernels that know each other; `where`: more lines of the configuration, and the address for the other."""
    folders = [stage.folder / name for name in _NAMES]
    certificates = [identity.make(folder, name) for folder, name in zip(folders, _NAMES, strict=True)]
    for own in (0, 1):
        peer, folder = 1 - own, folders[own]
        (folder / identity.PEERS).mkdir()
        shutil.copy(certificates[peer].certificate, folder / identity.PEERS / f"{_NAMES[peer]}.pem")
        (folder / "pony.toml").write_text(
            f'name = "{_NAMES[own]}"\nencryption = "off"\n{where[own][0]}'
            f'[peers.{_NAMES[peer]}]\naddress = "{where[peer][1]}"\n'
        )
        _kernel(stage, folder, namespaces[own])
    return folders[0] / "run", folders[1] / "run"


def _kernel(stage: Stage, folder: Path, netns: str = "") -> Path:
    """Start one that is configured in `folder`, with Pony: its runtime directory."""
    policy, runtime = folder / "policy.toml", folder / "run"
    policy.write_text(_POLICY)
    environment = {"SNAP_CONFIG_DIR": os.fspath(folder)}
    stage.start_kernel(runtime, "--policy", os.fspath(policy), netns=netns, environment=environment)
    with ControlClient(runtime) as operator:
        operator.call("module.start", name="pony", wait=True, timeout=PATIENCE)
    return runtime


def _remove(netns: str) -> None:
    with suppress(SnapError):
        run("ip", "netns", "del", netns)


def run(*command: str) -> None:
    """Raises SnapError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SnapError(f"{' '.join(command)}: {done.stderr.strip()}")


# -- the machine's processors -----------------------------------------------------------------------------------


def busy() -> float:
    """Seconds that all processors together have worked so far, for whomever: user, system and interrupts."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq = (int(field) for field in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def idle_share(seconds: float) -> float:
    """Processors that are busy while nothing is measured."""
    begin, before = time.monotonic(), busy()
    time.sleep(seconds)
    return (busy() - before) / (time.monotonic() - begin)
