"""Upgrades measured: how long nobody serves, and how long a client waits, against state size and against the
usual way.

Everything runs on a kernel of its own in a temporary folder, with a client that writes rows at full rate all
the time."""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from snap.ipc import SnapError, connect
from snap.ipc.control import ControlClient

from ..demo.stage import Stage
from . import cell

PATIENCE: Final = 120.0
SETTLE: Final = 0.4
FLIPS: Final = 30
"""Upgrades at each size."""


@dataclass(frozen=True)
class Size:
    """`entries` rows and `bulk` bytes of state."""

    label: str
    entries: int
    bulk: int

    @property
    def bytes(self) -> int:
        return self.entries * 32 + self.bulk


SIZES: Final = (
    Size("1 KiB", 32, 0),
    Size("1 MiB", 32, 1 << 20),
    Size("1 M entries", 1_000_000, 0),
    Size("1 GiB", 32, 1 << 30),
)
SMALL: Final = (SIZES[0], SIZES[1], Size("10 k entries", 10_000, 0))


@dataclass
class Flips:
    """Upgrades at one size: blackouts as the engine measured them, the client's longest pause in each and its longest
    in as much time before, all in µs; completions a second in the brownouts, and just before them."""

    size: Size
    blackouts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    brownouts: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    rates_before: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The old generation's rate in a brownout as a part of its rate before."""
        return statistics.median(self.rates) / statistics.median(self.rates_before)


@dataclass
class Migrations:
    """Schema migrations of `entries` rows, of which the client writes the first `busy` again and again: rows converted
    in each blackout, its length and the client's longest pause in µs."""

    entries: int
    busy: int
    converted: list[int] = field(default_factory=list)
    blackouts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


@dataclass
class Results:
    flips: list[Flips] = field(default_factory=list)
    migrations: list[Migrations] = field(default_factory=list)
    standby: list[float] = field(default_factory=list)
    crashes: list[float] = field(default_factory=list)
    interpreter: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Parts that could not be measured, and why."""


Say = Callable[[str], None]


MOVES: Final = (
    (1_000_000, 0),
    (1_000_000, 100),
    (1_000_000, 10_000),
    (1_000_000, 100_000),
    (100_000, 10_000),
)
"""Rows of a table that is migrated, and those of them that the client writes."""

SMALL_MOVES: Final = ((10_000, 0), (10_000, 1000), (2000, 1000))


def measure(quick: bool, say: Say, times: int = FLIPS) -> Results:
    """`times`: upgrades at each size. Takes about twelve minutes, or about one if `quick`."""
    sizes, moves = (SMALL, SMALL_MOVES) if quick else (SIZES, MOVES)
    times = min(times, 3) if quick else times
    results = Results()
    for size in sizes:
        with _part(f"upgrades with {size.label} of state", results, say):
            results.flips.append(_flips(size, times))
            say(f"stop, serialise, start, restore with {size.label}")
            results.flips[-1].usual = [_usual(size) for _ in range(3)]
    for entries, busy in moves:
        with _part(f"migrations of {entries:,} rows while {busy:,} are written", results, say):
            results.migrations.append(_migrations(entries, busy, 2 if quick else 4))
    with _part("crashes with a standby", results, say):
        results.standby = _crashes(standby=True, times=3 if quick else 11)
    with _part("crashes without a standby", results, say):
        results.crashes = _crashes(standby=False, times=2 if quick else 5)
        results.interpreter = [_interpreter() for _ in range(5)]
    return results


@contextmanager
def _part(what: str, results: Results, say: Say) -> Iterator[None]:
    """When one part fails the others are still worth having: they took minutes."""
    say(what)
    try:
        yield
    except (SnapError, OSError, subprocess.SubprocessError) as error:
        results.failures.append(f"{what}: {error}")


# -- the parts ------------------------------------------------------------------------------------------------


class Pinger:
    """The client process, which writes the first `rows` again and again; `finish` gives its pauses and rates."""

    def __init__(self, stage: Stage, runtime: Path, rows: int) -> None:
        pipe = subprocess.PIPE
        self._child = stage.start("snap.cli.bench.pinger", runtime, str(rows), stdin=pipe, out=pipe)
        assert self._child.stdout is not None
        self._child.stdout.readline()

    def finish(self) -> None:
        """Raises ChildProcessError if the client has failed."""
        out, _ = self._child.communicate(timeout=PATIENCE)
        if self._child.returncode:
            raise ChildProcessError("the client has failed")
        told = json.loads(out.splitlines()[-1])
        self._begin, self._rates = told["begin"], told["rates"]
        self._pauses = told["pauses"]

    def longest(self, begin: int, end: int) -> float:
        """The longest pause that ended in between, in µs; times in ns."""
        return max((length for when, length in self._pauses if begin <= when <= end), default=0) / 1e3

    def rate(self, begin: int, end: int) -> float:
        """Completions a second in between."""
        width = 10_000_000
        first, last = (begin - self._begin) // width + 1, (end - self._begin) // width
        counts = self._rates[max(0, first) : max(0, last)]
        return statistics.mean(counts) * (1e9 / width) if counts else 0.0


@contextmanager
def _running(size: Size, standby: bool = False) -> Iterator[tuple[Stage, Path, ControlClient]]:
    with Stage() as stage:
        modules = stage.folder / "modules"
        cell.write(modules, "0", size.entries, size.bulk, standby=standby)
        runtime = stage.folder / "run"
        stage.start_kernel(runtime, "--module-path", os.fspath(modules))
        with ControlClient(runtime) as operator:
            operator.call("module.stop", name="relay", wait=True, timeout=PATIENCE)
            operator.call("module.start", name="cell", wait=True, timeout=PATIENCE)
            _fill(runtime, size)
            yield stage, runtime, operator


def _fill(runtime: Path, size: Size) -> None:
    with connect(runtime_dir=runtime) as client, client.open("cell", timeout=30) as channel:
        orders = [(2, at, min(4096, size.entries - at)) for at in range(0, size.entries, 4096)]
        orders += [(3, at, min(cell.CHUNK, size.bulk - at)) for at in range(0, size.bulk, cell.CHUNK)]
        for order in orders:
            channel.send(struct.pack("<BQQ", *order))
            channel.recv(timeout=PATIENCE)


def _flips(size: Size, times: int) -> Flips:
    flips, spans = Flips(size), []
    with _running(size) as (stage, runtime, operator):
        pinger = Pinger(stage, runtime, size.entries)
        for _ in range(times):
            time.sleep(SETTLE)
            begin = time.monotonic_ns()
            view = operator.call("module.upgrade", name="cell", bake=0.0, timeout=PATIENCE)
            end = time.monotonic_ns()
            flips.blackouts.append(view["engines"][0]["blackout_ns"] / 1e3)
            flips.brownouts.append(view["brownout_seconds"])
            spans.append((begin, begin + int(view["brownout_seconds"] * 1e9), end))
        time.sleep(SETTLE)
        pinger.finish()
        for begin, flip, end in spans:
            flips.gaps.append(pinger.longest(flip, end))
            flips.before.append(pinger.longest(begin - (end - flip), begin))
            flips.rates.append(pinger.rate(begin, flip))
            flips.rates_before.append(pinger.rate(begin - int(SETTLE * 0.75e9), begin))
    return flips


def _migrations(entries: int, busy: int, times: int) -> Migrations:
    found, spans = Migrations(entries, busy), []
    with _running(Size("", entries, 0)) as (stage, runtime, operator):
        places = [cell.write(stage.folder / f"v{n}", str(n), entries, 0, schema=n) for n in (1, 2)]
        pinger = Pinger(stage, runtime, busy)
        for turn in range(times):
            time.sleep(SETTLE)
            source = os.fspath(places[(turn + 1) % 2])
            view = operator.call("module.upgrade", name="cell", source=source, bake=0.0, timeout=PATIENCE)
            engine = view["engines"][0]
            found.converted.append(engine["converted"])
            found.blackouts.append(engine["blackout_ns"] / 1e3)
            now = time.monotonic_ns()
            spans.append((now - int(1e9), now))
        pinger.finish()
        found.gaps = [pinger.longest(*span) for span in spans]
    return found


def _crashes(standby: bool, times: int) -> list[float]:
    """The client's pauses, in µs, when the module is killed."""
    spans = []
    with _running(SIZES[0], standby) as (stage, runtime, operator):
        pinger = Pinger(stage, runtime, SIZES[0].entries)
        for _ in range(times):
            _await(
                operator,
                lambda view: view["state"] == "ready" and (not standby or view["standby"] == "ready"),
            )
            # A crash loop is not what is measured.
            time.sleep(8.0)
            view = operator.call("module.show", name="cell")
            begin = time.monotonic_ns()
            os.kill(view["pid"], signal.SIGKILL)
            _await(operator, _taken_over(view["generation"]))
            time.sleep(SETTLE)
            spans.append((begin, time.monotonic_ns()))
        pinger.finish()
        return [pinger.longest(*span) for span in spans]


def _taken_over(generation: int) -> Callable[[dict[str, Any]], bool]:
    return lambda view: view["generation"] != generation and view["state"] == "ready"


def _await(operator: ControlClient, what: Callable[[dict[str, Any]], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what(operator.call("module.show", name="cell")):
        if time.monotonic() > end:
            raise TimeoutError("the module is not ready")
        time.sleep(0.02)


def _usual(size: Size) -> float:
    """The client's pause, in µs, over an upgrade by stop, serialise, start, restore."""
    # Memory that ends with us, however we end; the same kind of file system as /dev/shm.
    file = os.memfd_create("snap-bench")
    try:
        with Stage() as stage:
            path = os.fspath(stage.folder / "usual.sock")
            arguments = (path, str(file), str(size.entries), str(size.bulk))

            def start() -> subprocess.Popen[bytes]:
                return stage.start(
                    "snap.cli.bench.baseline", *arguments, out=subprocess.PIPE, pass_fds=(file,)
                )

            server = start()
            _line(server.stdout)
            client = _UsualClient(path)
            time.sleep(SETTLE)
            server.terminate()
            server.wait(PATIENCE)
            _line(start().stdout)
            time.sleep(SETTLE)
            return client.finish()
    finally:
        os.close(file)


def _line(stream: IO[bytes] | None) -> None:
    assert stream is not None
    stream.readline()


class _UsualClient:
    """Asks at full rate and connects again when it must; a thread."""

    def __init__(self, path: str) -> None:
        self._path, self._stopped, self._longest = path, False, 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> float:
        self._stopped = True
        self._thread.join(PATIENCE)
        return self._longest / 1e3

    def _run(self) -> None:
        last = time.monotonic_ns()
        while not self._stopped:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(PATIENCE)
                try:
                    sock.connect(self._path)
                    while not self._stopped:
                        sock.sendall(b"\0" * 8)
                        if not sock.recv(8):
                            break
                        now = time.monotonic_ns()
                        self._longest, last = max(self._longest, now - last), now
                except OSError:
                    time.sleep(0.001)


def _interpreter() -> float:
    """µs to start Python and import what a module's process needs."""
    from ..commands._base import PYTHON

    begin = time.monotonic_ns()
    subprocess.run([*PYTHON[:-1], "-c", "import snap.modules.host"], check=True)
    return (time.monotonic_ns() - begin) / 1e3
