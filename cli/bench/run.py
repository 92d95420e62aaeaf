"""Runs contenders against each other: rounds of everybody in turn, medians over the rounds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

from snap.ipc import BusyError, DeadlineError, ResourceError, direct, seqpacket

from .contenders import Contender, Way, contenders
from .peer import cpu_seconds
from .scenarios import SCENARIOS

STEP_SECONDS: Final = 60
NEAR_NS: Final = 250.0
"""A cache line that takes longer than this between the two processors makes them "far"."""


@dataclass(frozen=True)
class Step:
    """One line of the plan: `core` puts both ends on one processor. `count` is for a full run."""

    scenario: str
    who: tuple[str, ...]
    count: int
    core: bool = False


SPINNING: Final = ("Snap, spinning", "Snap, Rust engine", "bare C ring", "iceoryx2")
SLEEPING: Final = ("Snap, blocking", "Unix socket", "Pipe", "ZeroMQ")
ALL: Final = ("Snap, adaptive", "bare C ring", "iceoryx2", "Unix socket", "Pipe", "ZeroMQ")
PLAN: Final = (
    Step("round trip", (*SPINNING, "Snap, adaptive"), 20_000),
    Step("round trip", SLEEPING, 2_000),
    Step("round trip", SLEEPING, 5_000, core=True),
    Step("single", ALL, 300_000),
    Step("burst", ("Snap, adaptive",), 2_000_000),
    Step("packed", ("Snap, adaptive",), 4_000_000),
    Step("copied", ("Snap, adaptive", "iceoryx2", "Unix socket", "Pipe", "ZeroMQ"), 1_000),
    Step("filled", ("Snap, adaptive", "iceoryx2"), 2_000),
    Step("loaned", ("Snap, adaptive", "iceoryx2"), 50_000),
    Step("idle", ("Snap, blocking",), 2_000),
)


@dataclass
class Figure:
    """One contender in one scenario, over all rounds. `rates` are messages a second; `cpu` seconds of both
    processes a million messages (idle: CPU seconds a second); the percentiles are microseconds."""

    contender: str
    scenario: str
    core: bool
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    p999: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def median(self, name: str) -> float | None:
        values: list[float] = getattr(self, name)
        return statistics.median(values) if values else None


@dataclass
class Results:
    figures: list[Figure]
    missing: dict[str, str]
    lines_ns: list[float]
    check_ns: float
    seconds: float

    @property
    def distance(self) -> str:
        """How the two processors lay to each other during the run."""
        far = [ns > NEAR_NS for ns in self.lines_ns]
        return "far" if all(far) else "near" if not any(far) else "mixed"

    def figure(self, contender: str, scenario: str, core: bool = False) -> Figure | None:
        for found in self.figures:
            if (found.contender, found.scenario, found.core) == (contender, scenario, core):
                return found
        return None


class Pair:
    """A contender, set up between this process and a peer of its own."""

    def __init__(self, contender: Contender, stack: ExitStack) -> None:
        near, far = seqpacket.pair()
        self._sock = stack.enter_context(near)
        with far:
            command = [sys.executable, "-P", "-m", "snap.cli.bench.peer", contender.name, str(far.fileno())]
            process = subprocess.Popen(command, pass_fds=(far.fileno(),))
        stack.callback(_end, process)
        near.settimeout(STEP_SECONDS)
        self.way: Way = contender.offer(near, stack)

    def run(self, figure: Figure, count: int, cpus: tuple[int, int]) -> None:
        scenario = SCENARIOS[figure.scenario]
        order = {"scenario": figure.scenario, "count": count, "cpu": cpus[1]}
        seqpacket.send(self._sock, json.dumps(order).encode())
        self._answer()
        os.sched_setaffinity(0, {cpus[0]})
        before = cpu_seconds()
        measured = scenario.drive(self.way, count)
        own = cpu_seconds() - before
        peer = float(json.loads(self._answer())["cpu"])
        if isinstance(measured, list):
            measured.sort()
            for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
                getattr(figure, name).append(measured[int(len(measured) * share)] / 1000)
        elif figure.scenario == "idle":
            figure.cpu.append(peer / measured)
        else:
            figure.rates.append(count / measured)
            figure.cpu.append((own + peer) / count * 1e6)

    def _answer(self) -> bytes:
        data, _ = seqpacket.recv(self._sock)
        if not data:
            raise ResourceError("a measuring process died", "its message is above")
        return data


def measure(rounds: int, scale: float, only: frozenset[str], progress: Callable[[str], None]) -> Results:
    """Measure everything, or the scenarios `only`; `scale` shrinks the counts. Raises SnapError."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise BusyError("a benchmark between two processes needs two processors", "see `snapctl doctor`")
    begin, two = time.monotonic(), (cpus[0], cpus[1])
    plan = [step for step in PLAN if not only or step.scenario in only]
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cpus)
        field_of = contenders(*stack.enter_context(_floor()))
        wanted = {name for step in plan for name in step.who}
        missing = {name: field_of[name].missing for name in wanted if field_of[name].missing}
        pairs = {name: Pair(field_of[name], stack) for name in sorted(wanted - set(missing))}
        lines = [direct.line_cost(*two)]
        figures: list[Figure] = []
        for step in plan:
            names = [
                name for name in step.who if name in pairs and SCENARIOS[step.scenario].able(pairs[name].way)
            ]
            progress(f"{step.scenario}{' on one core' if step.core else ''}: {', '.join(names)}")
            row = {name: Figure(name, step.scenario, step.core) for name in names}
            count = step.count if step.scenario == "idle" else max(512, int(step.count * scale))
            for _ in range(1 if step.scenario == "idle" else rounds):
                for name in names:
                    with _deadline(STEP_SECONDS, name, step.scenario):
                        pairs[name].run(row[name], count, (two[0], two[0]) if step.core else two)
            figures += row.values()
            lines.append(direct.line_cost(*two))
        snap = next((pair.way.endpoint for pair in pairs.values() if pair.way.endpoint is not None), None)
        check = direct.check_cost(snap) if snap is not None else 0.0
    return Results(figures, missing, lines, check, time.monotonic() - begin)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@contextmanager
def _deadline(seconds: int, name: str, scenario: str) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise DeadlineError(
            f"{name}: {scenario} took longer than {seconds} s", "try --quick on a quieter machine"
        )

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _floor() -> Iterator[tuple[str, str]]:
    """Compile the bare ring: its path, and why there is none."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    headers = Path(sysconfig.get_paths()["include"])
    if compiler is None or not (headers / "Python.h").exists():
        yield "", "needs a C compiler and Python's headers"
        return
    with tempfile.TemporaryDirectory(prefix="snap-bench-") as folder:
        path = Path(folder) / "bare_ring.so"
        source = Path(__file__).with_name("bare_ring.c")
        command = [compiler, "-O3", "-shared", "-fPIC", f"-I{headers}", str(source), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        yield (
            (str(path), "")
            if done.returncode == 0
            else ("", f"does not compile: {done.stderr.strip()[:200]}")
        )


def machine() -> dict[str, str]:
    """What the figures are of."""
    facts = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name")]
    system = os.uname()
    return {
        "processor": models[0] if models else "unknown processor",
        "cpus": str(os.cpu_count()),
        "kernel": f"{system.sysname} {system.release}",
        "python": sys.version.split()[0],
        "host": "virtual" if "hypervisor" in facts else "real",
    }
