"""Everything that runs: a kernel with its keeper, the module, clients; who is who, and what state they are in."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from snap.ipc import DeadlineError, SnapError, UnreachableError
from snap.ipc.control import ControlClient
from snap.kernel.daemon import parser
from tests.conftest import Holdings, descendants, leaked_since

from . import guard, ledger, versions
from .client import GONE, MODES
from .ops import Model, Wrong

ROOT: Final = Path(__file__).parent.parent.parent
SITE: Final = Path(__file__).parent / "site"
PATIENCE: Final = 45.0
"""Seconds within which anything must be well again: longer than every patience of the kernel's own."""

HANGING: Final = 90.0
"""Seconds within which an upgrade must end, though its new version hangs."""

KEEPER: Final = "--respawn" in parser().format_help()
"""Whether this kernel can be killed: without a keeper nothing outlives it."""

ASK: Final = 3.0
LOOK: Final = 0.03
POLICY: Final = """\
version = 1
[[allow]]
who = "owner"
service = "tally"
rights = ["connect", "send", "recv"]
[[operator]]
who = "owner"
rights = ["operate", "inspect"]
[quota]
channels = 256
bytes = "1GiB"
[modules.tally]
autostart = true
"""


class Violation(Exception):
    """What must never be. The text says what, and what everybody was doing."""


@dataclass
class ClientProcess:
    number: int
    mode: str
    window: int
    process: subprocess.Popen[bytes]
    ledger: Path
    errors: Path
    killed: bool = False
    stops: list[tuple[int, int]] = field(default_factory=list)
    """From when to when it was itself stopped; CLOCK_MONOTONIC ns."""


class World:
    """In a folder, which is the caller's to remove. `end_all` ends what `stop_kernel` did not."""

    def __init__(self, directory: Path, seed: int, standby: bool = False) -> None:
        self.directory, self.seed = directory, seed
        self.runtime = directory / "run"
        self.faults = directory / "faults"
        self.versions = versions.write_all(directory / "versions", standby)
        self.clients: list[ClientProcess] = []
        self.sessions: list[tuple[ledger.Session, Model, bool]] = []
        """Of clients that are gone: what their ledger says, the model after it, and whether the client was killed."""
        self.operations = 0
        self.waits: list[tuple[int, int]] = []
        """Of clients that are gone: from when to when no answer came, though they were there to take it."""
        self._chance = random.Random(f"clients {seed}")
        self._number = 0
        self._control: ControlClient | None = None
        self._kernel: subprocess.Popen[bytes] | None = None
        self._before = Holdings.now()
        guard.adopt_orphans()
        for folder in (self.faults, directory / "modules", directory / "clients"):
            folder.mkdir()
        versions.write(versions.GOOD[0], directory / "modules", standby)
        versions.write_vault(directory / "modules")
        (directory / "policy.toml").write_text(POLICY)

    # -- kernel ---------------------------------------------------------------------------------------------

    def start_kernel(self) -> None:
        command = [sys.executable, "-m", "snap.kernel", "--runtime-dir", str(self.runtime)]
        command += ["--policy", str(self.directory / "policy.toml")]
        command += ["--module-path", str(self.directory / "modules")]
        command += ["--respawn"] if KEEPER else []
        path = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH", "")]))
        with (self.directory / "kernel.output").open("ab") as output:
            self._kernel = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "SNAP_FAULT_DIR": str(self.faults), "PYTHONPATH": path},
                start_new_session=True,
            )
        self.settle()

    def call(self, op: str, timeout: float = ASK, **args: Any) -> Any:
        """Raises SnapError."""
        if self._control is None:
            self._control = ControlClient(self.runtime, timeout)
        return self._control.call(op, timeout=timeout, **args)

    def ask(self, op: str, patience: float = PATIENCE, **args: Any) -> Any:
        """`call`, again and again while the kernel is dead or stopped; for questions only."""
        end = time.monotonic() + patience
        while True:
            try:
                return self.call(op, **args)
            except (UnreachableError, DeadlineError) as error:
                if time.monotonic() > end:
                    raise Violation(f"no answer to {op} for {patience} s: {error}") from error
                time.sleep(LOOK)

    def module(self) -> dict[str, Any]:
        view: dict[str, Any] = self.ask("module.show", name=versions.MODULE)
        return view

    def begin_anew(self) -> None:
        """After the end of kernel and keeper: all else ends by itself, and leaves nothing; then another kernel."""
        self.until("the modules to end", lambda: not self.processes())
        self._disconnect()
        self.lose_clients(GONE)
        if left := self.leftovers():
            raise Violation(self.diagnosis(f"left behind: {left}"))
        self.start_kernel()

    def any_client_ends(self) -> bool:
        """Once each of them has ended, or has got an answer since now."""
        before = {client.number: ledger.received(client.ledger) for client in self.clients}
        self.until(
            "clients to go on or end",
            lambda: all(
                client.process.poll() is not None or ledger.received(client.ledger) > before[client.number]
                for client in self.clients
            ),
        )
        return any(client.process.poll() is not None for client in self.clients)

    def lose_clients(self, code: int) -> None:
        """Every client is told what its exit `code` means, having got no wrong answer until then. What they counted is
        gone with the state."""
        for client in list(self.clients):
            self.until(f"client {client.number} to be told", lambda c=client: c.process.poll() is not None)
            if client.process.returncode != code:
                self._accuse(client)
            client.killed = True
            self.end_client(client)
        self.sessions.clear()

    def _disconnect(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    def stop_kernel(self) -> None:
        """As an operator does, and everything is gone after it."""
        self.ask("kernel.stop")
        self._disconnect()
        self.until("everything to end", lambda: not self.processes())
        if self._kernel is not None:
            self._kernel.wait()

    # -- processes ------------------------------------------------------------------------------------------

    def processes(self, role: str = "") -> list[int]:
        """Living processes of the system, oldest first: kernel, keeper, module (of the tally), or all."""
        found = [pid for pid in descendants(os.getpid()) if role_of(pid) and role_of(pid).startswith(role)]
        return sorted(found, key=started)

    def send(self, pid: int, number: int) -> bool:
        """False when it was gone already."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def stopped(self) -> list[int]:
        return [pid for pid in descendants(os.getpid()) if state(pid) == "T"]

    def wake_all(self) -> None:
        for pid in self.stopped():
            self.send(pid, signal.SIGCONT)

    # -- clients --------------------------------------------------------------------------------------------

    def start_client(self) -> ClientProcess:
        self._number += 1
        number, mode = self._number, MODES[self._number % len(MODES)]
        window = self._chance.choice([1, 4, 16, 64])
        base = self.directory / "clients" / str(number)
        command = [
            sys.executable,
            "-m",
            "tests.torture.client",
            self.runtime,
            number,
            self.seed,
            f"{base}.ledger",
        ]
        with Path(f"{base}.errors").open("wb") as errors:
            process = subprocess.Popen(
                [*map(str, command), mode, str(window), str(PATIENCE)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
            )
        paths = Path(f"{base}.ledger"), Path(f"{base}.errors")
        self.clients.append(ClientProcess(number, mode, window, process, *paths))
        return self.clients[-1]

    def kill_client(self, client: ClientProcess) -> None:
        client.killed = True
        client.process.kill()
        self.end_client(client)

    def end_client(self, client: ClientProcess) -> None:
        """Have it leave, unless it was killed, and check its ledger. Raises Violation."""
        assert client.process.stdin is not None
        client.process.stdin.close()
        self.until(f"client {client.number} to end", lambda: client.process.poll() is not None)
        self.clients.remove(client)
        if not client.killed and client.process.returncode:
            self._accuse(client)
        model = Model(self.seed, client.number)
        try:
            session = ledger.check(client.ledger, model) if client.ledger.exists() else None
        except Wrong as error:
            raise Violation(self.diagnosis(str(error))) from error
        if session is None:
            return
        if not (client.killed or session.ended):
            raise Violation(self.diagnosis(f"client {client.number} left without an end in its ledger"))
        self.operations += session.received
        self.waits += [
            (begin, end)
            for begin, end in session.waits
            if not any(begin < woken and stopped < end for stopped, woken in client.stops)
        ]
        self.sessions.append((session, model, client.killed))
        client.ledger.unlink()

    def _accuse(self, client: ClientProcess) -> None:
        text = read(client.errors)
        code = client.process.returncode
        raise Violation(
            self.diagnosis(
                f"client {client.number} ({client.mode}, window {client.window}) ended with {code}:\n{text}"
            )
        )

    # -- being well -----------------------------------------------------------------------------------------

    def settle(self, patience: float = PATIENCE) -> dict[str, Any]:
        """Wait until the module is ready, nothing is under way, and every client has got answers since now. Returns
        the module's view. Raises Violation."""
        self.wake_all()
        before = {client.number: ledger.received(client.ledger) for client in self.clients}
        end = time.monotonic() + patience
        reason = ""
        while True:
            reason, view = self._not_well(before)
            if not reason and view is not None:
                return view
            if time.monotonic() > end:
                raise Violation(self.diagnosis(f"not well again after {patience} s: {reason}"))
            time.sleep(LOOK)

    def _reap(self) -> None:
        """What a dead kernel started is ours now, and dead only when somebody looks."""
        own = {client.process.pid for client in self.clients} | {self._kernel and self._kernel.pid}
        for task in Path("/proc/self/task").iterdir():
            for pid in map(int, read(task / "children").split()):
                if pid not in own and state(pid) == "Z":
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)

    def _not_well(self, before: dict[int, int]) -> tuple[str, dict[str, Any] | None]:
        self._reap()
        for client in self.clients:
            if client.process.poll() is not None:
                self._accuse(client)
        if self._kernel is not None and self._kernel.poll() is not None and not self.processes():
            # Children that just lost their parent are nobody's for a moment.
            return f"the kernel has ended, with {self._kernel.returncode}", None
        try:
            view: dict[str, Any] = self.call("module.show", name=versions.MODULE)
        except SnapError as error:
            return f"{type(error).__name__}: {error}", None
        if view["state"] == "failed":
            raise Violation(self.diagnosis(f"the module has failed: {view['cause']}"))
        if view["state"] != "ready" or view["upgrade"] is not None or view["standby"] == "starting":
            words = {name: view[name] for name in ("state", "cause", "upgrade", "standby", "generation")}
            return f"the module is {words}", None
        if len(self.processes("kernel")) != 1 or bool(self.processes("keeper")) != KEEPER:
            return f"kernels {self.processes('kernel')}, keepers {self.processes('keeper')}", None
        slow = [client for client in self.clients if ledger.received(client.ledger) <= before[client.number]]
        if slow:
            names = ", ".join(f"{client.number} ({client.mode}, window {client.window})" for client in slow)
            return f"no answers to client {names}", None
        return "", view

    def until(self, what: str, done: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Raises Violation."""
        end = time.monotonic() + patience
        while not done():
            if time.monotonic() > end:
                raise Violation(self.diagnosis(f"waited {patience} s for {what}"))
            time.sleep(LOOK)

    def leftovers(self) -> dict[str, Any]:
        """What is left of the machine's when all should be gone; empty when nothing is."""
        end = time.monotonic() + 5.0
        while left := leaked_since(self._before):
            if time.monotonic() > end:
                break
            time.sleep(LOOK)
        return left

    def socket_files(self) -> list[str]:
        return [str(path.relative_to(self.runtime)) for path in self.runtime.rglob("*") if path.is_socket()]

    def end_all(self) -> None:
        """By force; for a run that failed, or was interrupted."""
        self._disconnect()
        guard.tidy(self._before)

    # -- telling --------------------------------------------------------------------------------------------

    def diagnosis(self, what: str) -> str:
        """`what`, and what is known of everybody now."""
        for client in self.clients:
            with contextlib.suppress(ProcessLookupError):
                client.process.send_signal(signal.SIGUSR1)
        lines = [what, "", "processes:"]
        lines += [f"  {describe(pid)}" for pid in descendants(os.getpid())]
        for op, args in (("module.show", {"name": versions.MODULE}), ("upgrade.history", {})):
            try:
                answer = self.call(op, 2.0, **args)
                lines += [
                    op,
                    *(f"  {line}" for line in (answer[-3:] if isinstance(answer, list) else [answer])),
                ]
            except SnapError as error:
                lines.append(f"{op}: {type(error).__name__}: {error}")
        time.sleep(0.2)
        logs = [self.directory / "kernel.output", self.runtime / "kernel.log"]
        logs += sorted((self.runtime / "log").glob("*")) + [client.errors for client in self.clients]
        for path in logs:
            if tail := read(path)[-4000:].strip():
                lines += [f"{path.name}:", *(f"  {line}" for line in tail.splitlines()[-25:])]
        return "\n".join(lines)


def read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def role_of(pid: int) -> str:
    """kernel, keeper, "module NAME", or empty for what is no part of the system."""
    title = read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
    if " -m snap.kernel " in title:
        return "kernel"
    return title.removeprefix("snap: ") if title.startswith("snap: ") else ""


def state(pid: int) -> str:
    """R, S, T (stopped), Z and so on; empty when it is gone."""
    return read(f"/proc/{pid}/stat").rpartition(")")[2].strip()[:1]


def started(pid: int) -> tuple[int, int]:
    """When, in ticks since the machine started; for an order."""
    fields = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(fields[19]) if len(fields) > 19 else 0, pid)


def describe(pid: int) -> str:
    """One process and what its threads wait for."""
    title = read(f"/proc/{pid}/cmdline").replace("\0", " ")[:70]
    threads = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            call = read(task / "syscall").split(" ")[0].strip()
            threads.append(f"{read(task / 'comm').strip()}:{read(task / 'wchan')}:{call}")
    return f"{pid} {state(pid)} {title} [{', '.join(threads)}]"
