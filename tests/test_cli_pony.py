"""`snapctl pony`: lists, the key, and measurements, against an echo that the test plays and against a real kernel."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snap.cli.commands import pony as commands
from snap.cli.main import run
from snap.cli.pony import perf, ping
from snap.dataplane.errors import DeadlineError
from snap.modules.pony import Message, NoPeerError, RightError, identity
from snap.modules.pony.places import Places
from tests.cli_rig import data, snapctl
from tests.conftest import OWNER_MAY_ALL, KernelProcess

PEERS = [
    {
        "host": "beta",
        "address": "10.0.0.2:4747",
        "state": "connected",
        "since": 1_700_000_000.0,
        "error": "",
        "fingerprint": "ab" * 32,
    },
    {
        "host": "gamma",
        "address": "",
        "state": "failed",
        "since": 0.0,
        "error": "bad \x1b[0m",
        "fingerprint": "",
    },
]
FLOWS = [
    {
        "host": "beta",
        "attached": True,
        "connections": 3,
        "address": "10.0.0.2:4747",
        "port": "udp",
        "version": 2,
        "mtu": 1472,
        "sealed": True,
        "rtt_us": 55.5,
        "window": 12.25,
        "sent": 7,
        "again": 1,
        "received": 6,
        "bad": 0,
    },
    {"host": "gamma", "attached": False, "connections": 1, "refused": "bad \x1b[0m"},
]


# -- lists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "rows", "kind", "names"),
    [
        ("peers", PEERS, "PonyPeer", ["beta", "gamma"]),
        ("flows", FLOWS, "PonyFlow", ["beta", "gamma"]),
        ("regions", [{"id": 7, "channel": 3}], "PonyRegion", ["7"]),
        ("regions", [], "PonyRegion", []),
    ],
)
def test_lists_have_three_shapes(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, what: str, rows: Any, kind: str, names: list[str]
) -> None:
    monkeypatch.setattr(commands, "listed", lambda settings, asked: rows if asked == what else None)
    assert run(["pony", what, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], len(found["items"])) == (f"{kind}List", len(rows))
    assert run(["pony", what, "-o", "name"]) == 0
    assert capsys.readouterr().out.split() == names
    assert run(["pony", what]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == len(rows) + 1
    assert all(name in table for name in names) and "\x1b" not in table


def test_hosts_are_completed_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    context, parameter = click.Context(commands.pony), click.Argument(["host"])
    monkeypatch.setattr(commands, "listed", lambda settings, what, timeout: PEERS)
    assert [item.value for item in commands.complete_host(context, parameter, "b")] == ["beta"]
    monkeypatch.undo()
    monkeypatch.setenv("SNAP_RUNTIME_DIR", "/nowhere")
    assert commands.complete_host(context, parameter, "") == []


def test_a_real_module_answers(
    kernel: Callable[..., KernelProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAP_CONFIG_DIR", str(tmp_path / "none"))
    started = kernel(OWNER_MAY_ALL + "[modules.pony]\nautostart = true\n")
    found = data(snapctl("pony", "peers", "-o", "json", "--runtime-dir", started.directory))
    assert (found["kind"], found["items"]) == ("PonyPeerList", [])
    away = snapctl("pony", "ping", "nowhere", "-c", "1", "--runtime-dir", started.directory)
    assert away.returncode == 1 and "connect to 'nowhere/.echo'" in away.stderr


def test_bulk_through_a_real_engine(kernel: Callable[..., KernelProcess]) -> None:
    started = kernel(OWNER_MAY_ALL + "[modules.pony]\nautostart = true\n")
    done = snapctl(
        "pony", "perf", "-t", "0.3", "--kind", "messages", "--size", 1 << 16, "-o", "json",
        "--runtime-dir", started.directory,
    )  # fmt: skip
    (phase,) = data(done)["phases"]
    assert phase["operations"] > 0 and phase["bytes"] == phase["operations"] << 16
    assert phase["engine_cpu_seconds"] is not None and phase["error"] == ""


# -- the key ----------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_its_certificate_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAP_CONFIG_DIR", str(tmp_path))
    (tmp_path / "pony.toml").write_text('name = "alpha"\n')
    made = snapctl("pony", "key")
    assert made.returncode == 0, made.stderr
    assert made.stdout == (tmp_path / identity.CERTIFICATE).read_text()
    own = identity.load(tmp_path).own
    assert own in made.stderr and "peers/alpha.pem" in made.stderr
    again = snapctl("pony", "key")
    assert again.returncode == 6 and "--force" in again.stderr
    assert identity.load(tmp_path).own == own
    found = data(snapctl("pony", "key", "--force", "-o", "json"))
    assert (found["name"], found["fingerprint"]) == ("alpha", identity.load(tmp_path).own)
    assert found["fingerprint"] != own and "PRIVATE" not in json.dumps(found)


# -- ping -------------------------------------------------------------------------------------------------------


class Echo:
    """A connection to an echo. `late`: echoes that come only after they were given up; `lost` reads get no answer."""

    def __init__(self, late: int = 0, lost: int = 0) -> None:
        self.late, self.lost = late, lost
        self.came: deque[bytes] = deque()
        self.reads: list[tuple[int, int, int]] = []

    def send(self, data: bytes, timeout: float) -> None:
        self.came.append(data)

    def recv(self, timeout: float) -> Message:
        if self.late > 0:
            self.late -= 1
            raise DeadlineError("late")
        return Message(self.came.popleft())

    def read(self, handle: int, offset: int, size: int, timeout: float) -> bytes:
        if self.lost > 0:
            self.lost -= 1
            raise DeadlineError("lost")
        self.reads.append((handle, offset, size))
        return bytes(size)


def test_trips_alternate_and_a_late_echo_is_no_other_trips(capsys: Any) -> None:
    connection, told = Echo(late=2, lost=1), []
    trips = {kind: ping.Trips(kind) for kind in ping.KINDS}
    slept: list[float] = []
    ping.ping(
        connection,  # type: ignore[arg-type]
        trips,
        100,
        4,
        0.5,
        1.0,
        lambda kind, number, took: told.append((kind, number, took is None)),
        slept.append,
    )
    assert told == [
        ("message", 1, True), ("read", 1, True), ("message", 2, True), ("read", 2, False),
        ("message", 3, False), ("read", 3, False), ("message", 4, False), ("read", 4, False),
    ]  # fmt: skip
    assert slept == [0.5] * 3
    assert not connection.came and connection.reads == [(0, 0, 100)] * 3
    assert [(each.sent, len(each.times)) for each in trips.values()] == [(4, 2), (4, 3)]


def test_percentiles_of_trips() -> None:
    assert ping.Trips("read", 3).summary() == {
        "kind": "read", "sent": 3, "received": 0, "min_ns": None, "p50_ns": None, "p99_ns": None, "max_ns": None
    }  # fmt: skip
    found = ping.Trips("read", 200, list(range(200, 0, -1))).summary()
    assert [found[f"{name}_ns"] for name in ("min", "p50", "p99", "max")] == [1, 101, 199, 200]
    assert (ping.name_of(None), ping.name_of("beta")) == (".echo", "beta/.echo")


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `ping` and `perf` of the command line connect to."""
    played = FakePony()

    @contextmanager
    def connected(settings: Any, host: str | None, arena: int = 0) -> Any:
        if host == "nowhere":
            raise NoPeerError("nobody")
        played.places = Places(memoryview(bytearray(arena)))
        yield played, played

    monkeypatch.setattr(commands, "echo", connected)
    monkeypatch.setattr(commands, "_engine_pid", lambda settings: None)
    return played


def test_ping_prints_lines_and_a_summary(echo: Any, capsys: Any) -> None:
    assert run(["pony", "ping", "beta", "-c", "2", "-i", "0", "-s", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" time=")[0] for line in lines[:4]] == [
        f"32 bytes from beta: {kind} seq={number}" for number in (1, 2) for kind in ("message", "read")
    ]
    assert lines[5] == "--- beta/.echo ---"
    assert "messages: 2 sent, 2 back, min / p50 / p99 / max = " in lines[6]
    assert run(["pony", "ping", "-c", "1", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["peer"], found["size"]) == ("PonyPing", ".echo", 64)
    assert [(trip["kind"], trip["received"]) for trip in found["trips"]] == [("message", 1), ("read", 1)]


def test_ctrl_c_ends_ping_with_the_summary(echo: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    echo.interrupt_after = 3
    assert run(["pony", "ping", "-i", "0"]) == 0
    out = capsys.readouterr().out
    assert "seq=3" in out and "reads: 3 sent, 3 back" in out


def test_a_host_without_an_echo_is_an_error(echo: Any, capsys: Any) -> None:
    assert run(["pony", "ping", "nowhere"]) == 1
    assert "nobody" in capsys.readouterr().err


# -- perf -------------------------------------------------------------------------------------------------------


class Done:
    """An operation that is done when somebody waits for it."""

    def __init__(self, echo: FakePony, what: tuple[Any, ...], error: Exception | None) -> None:
        self.echo, self.what, self.error = echo, what, error
        self.waited = False

    def result(self, timeout: float) -> int:
        self.echo.under_way -= not self.waited
        self.waited = True
        if self.error is not None:
            raise self.error
        self.echo.done.append(self.what)
        return 0


class FakePony(Echo):
    """Pony, its connection, and the echo at the other end."""

    def __init__(self) -> None:
        super().__init__()
        self.places = Places(memoryview(b""))
        self.done: list[tuple[Any, ...]] = []
        self.under_way = self.most = 0
        self.interrupt_after = -1
        self.no_writes = False

    def read(self, *args: Any) -> bytes:
        if self.interrupt_after == 0:
            raise KeyboardInterrupt
        self.interrupt_after -= 1
        return super().read(*args)

    def place(self, size: int) -> Any:
        return self.places.take(size)

    def _begin(self, *what: Any, error: Exception | None = None) -> Done:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return Done(self, what, error)

    def begin_send_from(self, place: Any) -> Done:
        return self._begin("messages", place.size)

    def begin_reads(self, handle: int, offsets: Any, size: int, place: Any) -> Done:
        assert handle == 0 and len(offsets) * size == place.size
        return self._begin("reads", place.size)

    def begin_writes(self, handle: int, offsets: Any, size: int, place: Any) -> Done:
        error = RightError("read only") if self.no_writes else None
        return self._begin("writes", place.size, error=error)


def test_perf_keeps_a_window_full_and_counts_what_is_done(echo: Any, capsys: Any) -> None:
    arguments = ["pony", "perf", "beta", "-t", "0.05", "-i", "0.02", "--size", "4096", "--burst", "16"]
    assert run([*arguments, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["peer"]) == ("PonyPerf", "beta/.echo")
    assert [phase["what"] for phase in found["phases"]] == list(perf.KINDS)
    for phase, (length, operations) in zip(found["phases"], ((4096, 1), (1024, 16), (1024, 16)), strict=True):
        count = phase["operations"] // operations
        assert phase["bytes"] == count * length
        # Those of the last window come after the time is measured.
        finished = len([what for what in echo.done if what == (phase["what"], length)])
        assert count < finished <= count + perf.WINDOW
        assert sum(row["bytes"] for row in phase["intervals"]) == phase["bytes"]
        assert phase["engine_cpu_seconds"] is None and phase["error"] == ""
    assert echo.most == perf.WINDOW and echo.under_way == 0
    assert run([*arguments, "--kind", "reads"]) == 0
    out = capsys.readouterr().out
    assert "PER CORE-SECOND" in out and "M/s" in out and "writes" not in out


def test_a_kind_that_the_peer_refuses_is_said_after_the_others(echo: Any, capsys: Any) -> None:
    echo.no_writes = True
    assert run(["pony", "perf", "-t", "0.02"]) == 1
    captured = capsys.readouterr()
    assert "writes: read only" in captured.err
    assert "messages" in captured.out and echo.under_way == 0


def test_the_processor_time_of_a_process() -> None:
    import os

    assert perf.cpu_seconds(None) is None and perf.cpu_seconds(1 << 30) is None
    found = perf.cpu_seconds(os.getpid())
    assert found is not None and found > 0
