"""The kernel with real modules: how they come, go, die and come back, and what is told of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane.errors import BusyError, DeadlineError, NotRunningError
from snap.ipc import PeerGoneError, aconnect, paths
from tests.conftest import OWNER_MAY_ALL, descendants
from tests.kernel_rig import ECHO, HASTY, LIMITS, SERVES, Rig, fake_host, run, running, write_module

AUTOSTART = """\
version = 1
[[allow]]
who = "owner"
service = "*"
[[operator]]
who = "owner"
rights = ["operate", "inspect"]
[modules.echo]
autostart = true
"""
NO_RESTART = '[restart]\npolicy = "never"\n'


async def failed_start(rig: Rig, name: str) -> Any:
    with pytest.raises(NotRunningError):
        await rig.operate("module.start", name=name)
    return rig.kernel.module_view(name)


def test_a_module_runs_in_a_process_of_its_own_and_stops_when_asked(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with running(tmp_path) as rig:
            view = await rig.operate("module.start", name="mine")
            assert view["state"] == "ready"
            assert view["pid"] not in (None, os.getpid())
            assert title(view["pid"]) == "snap: module mine"
            assert os.getsid(view["pid"]) == view["pid"]
            view = await rig.operate("module.stop", name="mine")
            assert (view["state"], view["pid"], view["faults"]) == ("stopped", None, 0)

    run(test())


def test_clients_of_a_module_that_is_killed_carry_on_when_it_is_back(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")
    write_module(tmp_path / "modules", "other")

    async def test() -> None:
        async with running(tmp_path, start=["mine", "other"]) as rig, await aconnect(rig.directory) as client:
            mine, other = await client.aopen("mine"), await client.aopen("other")
            await mine.asend(b"1")
            assert await mine.arecv() == b"1"
            os.kill(rig.kernel.runner("mine").machine.pid or 0, signal.SIGKILL)
            await mine.asend(b"2")
            assert await mine.arecv(timeout=10) == b"2"
            await rig.until(lambda: rig.kernel.runner("mine").ready)
            await other.asend(b"3")
            assert await other.arecv() == b"3"
            view = rig.kernel.module_view("mine")
            assert (view.faults, view.restarts, view.generation) == (1, 1, 2)
            assert "SIGKILL" in rig.event("module.exited").data["how"]
            assert rig.kernel.module_view("other").generation == 1
            mine.close()
            other.close()

    run(test())


def test_an_error_in_import_fails_the_start_with_the_error_as_its_cause(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "bad", "raise ValueError('broken on purpose')", NO_RESTART)

    async def test() -> None:
        async with running(tmp_path) as rig:
            view = await failed_start(rig, "bad")
            assert view.state == "failed"
            assert "ValueError: broken on purpose" in view.cause
            assert any("broken on purpose" in line for line in view.log_tail)

    run(test())


def test_an_exit_in_import_until_it_is_a_crash_loop_stops_the_restarts(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "bad", "import os; os._exit(7)")
    write_module(tmp_path / "modules", "good")

    async def test() -> None:
        async with running(tmp_path, start=["good"]) as rig:
            await rig.operate("module.start", name="bad", wait=False)
            await rig.until(lambda: rig.kernel.module_view("bad").state == "failed")
            view = rig.kernel.module_view("bad")
            assert "crash loop" in view.cause
            assert "exit status 7" in view.cause
            assert (view.faults, view.generation) == (LIMITS.crashes, LIMITS.crashes)
            assert rig.kernel.module_view("good").state == "ready"

    run(test())


def test_a_hang_in_import_is_killed_and_delays_no_other_module(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "hangs", "import time; time.sleep(3600)", NO_RESTART)
    write_module(tmp_path / "modules", "good")

    async def test() -> None:
        async with running(tmp_path, limits=HASTY) as rig:
            hanging = asyncio.create_task(failed_start(rig, "hangs"))
            await asyncio.sleep(0)
            assert (await rig.operate("module.start", name="good"))["state"] == "ready"
            assert not hanging.done()
            assert "hung in import" in (await hanging).cause

    run(test())


def test_a_stop_takes_the_place_of_a_start_that_hangs(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "hangs", "import time; time.sleep(3600)")

    async def test() -> None:
        async with running(tmp_path) as rig:
            start = asyncio.create_task(rig.operate("module.start", name="hangs"))
            await rig.until(lambda: rig.kernel.module_view("hangs").pid)
            assert (await rig.operate("module.stop", name="hangs"))["state"] == "stopped"
            with pytest.raises(BusyError):
                await start

    run(test())


def test_an_operation_has_a_deadline_and_goes_on_after_it(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "slow", "import time; time.sleep(0.7)\n" + ECHO)

    async def test() -> None:
        async with running(tmp_path) as rig:
            with pytest.raises(DeadlineError):
                await rig.operate("module.start", within=0.1, name="slow")
            await rig.until(lambda: rig.kernel.module_view("slow").state == "ready")

    run(test())


def test_a_stopped_process_is_a_hang_and_is_replaced(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with running(tmp_path, limits=HASTY, start=["mine"]) as rig:
            os.kill(rig.kernel.runner("mine").machine.pid or 0, signal.SIGSTOP)
            await rig.until(lambda: "module.misbehaved" in rig.kinds())
            assert "no heartbeat" in rig.event("module.misbehaved").data["reason"]
            await rig.until(lambda: rig.kernel.module_view("mine").generation == 2)
            await rig.until(lambda: rig.kernel.module_view("mine").state == "ready")

    run(test())


def test_an_engine_that_never_returns_from_its_poll_is_a_hang(tmp_path: Path) -> None:
    hangs = "import time; self.polls = getattr(self, 'polls', 0) + 1; time.sleep(3600 * (self.polls > 1)); done = 0"
    code = ECHO.replace("done = 0", hangs)
    write_module(tmp_path / "modules", "stuck", code, NO_RESTART)

    async def test() -> None:
        async with running(tmp_path, limits=HASTY) as rig:
            await rig.operate("module.start", name="stuck", wait=False)
            await rig.until(lambda: rig.kernel.module_view("stuck").state == "failed")
            assert "engine main hung" in rig.kernel.module_view("stuck").cause

    run(test())


def test_a_module_starts_after_what_it_requires_and_stops_before_it(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "base")
    write_module(tmp_path / "modules", "above", more='[requires]\nservices = ["base"]\n')

    async def test() -> None:
        async with running(tmp_path) as rig:
            assert (await rig.operate("module.start", name="above"))["state"] == "ready"
            order = [
                (event.kind, event.subject)
                for event in rig.kernel.events.since(0, 1000)
                if event.kind == "module.ready"
            ]
            assert order == [("module.ready", "module:base"), ("module.ready", "module:above")]
            held = [cap.object for cap in rig.kernel.table.views("module:above")]
            assert held == ["service:base"]
            await rig.kernel.stop()
            gone = [
                event.subject for event in rig.kernel.events.since(0, 1000) if event.kind == "module.exited"
            ]
            assert gone == ["module:above", "module:base"]

    run(test())


def test_a_module_that_requires_what_policy_denies_is_refused_and_says_why(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "base")
    write_module(tmp_path / "modules", "above", more='[requires]\nservices = ["base"]\n')

    async def test() -> None:
        async with running(tmp_path, {"allow": []}) as rig:
            assert "policy denies" in rig.kernel.module_view("above").cause
            with pytest.raises(NotRunningError):
                await rig.operate("module.start", name="above")
            assert "module.refused" in rig.kinds()

    run(test())


def test_what_a_module_leaves_running_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '3600'])\nprint('child', child.pid, flush=True)\n"
        + ECHO
    )
    write_module(tmp_path / "modules", "parent", code)

    async def test() -> None:
        async with running(tmp_path, start=["parent"]) as rig:
            await rig.until(lambda: rig.kernel.runner("parent").log.tail)
            child = int(rig.kernel.runner("parent").log.tail[0].split()[1])
            assert alive(child)
            await rig.operate("module.stop", name="parent")
            await rig.until(lambda: not alive(child))

    run(test())


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_module_prints_is_kept_on_disk_and_its_end_in_memory(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "loud", "for i in range(1000): print('line', i)\n" + ECHO)

    async def test() -> None:
        async with running(tmp_path, start=["loud"]) as rig:
            await rig.until(lambda: list(rig.kernel.runner("loud").log.tail)[-1:] == ["line 999"])
            assert (await rig.operate("module.logs", name="loud", lines=2))["lines"] == [
                "line 998",
                "line 999",
            ]
            file = rig.directory / "log" / "loud.log"
            assert file.read_text().splitlines()[0] == "line 0"
            assert file.stat().st_mode & 0o777 == 0o600

    run(test())


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("link.send(b'garbage'); time.sleep(3600)", "garbage on its link"),
        ("link.send(bytes(60000)); time.sleep(3600)", "garbage on its link"),
        ("try:\n    while True: link.send(b'more')\nexcept OSError: time.sleep(3600)", "garbage on its link"),
        ("link.close(); time.sleep(3600)", "its link closed"),
        ("say(protocol.Lookup(service='x' * 50000)); time.sleep(3600)", "request of"),
        (
            "try:\n    while True: say(protocol.ListCaps(seq=1))\nexcept OSError: time.sleep(3600)",
            "flooded",
        ),
    ],
    ids=["garbage", "zeros", "more", "closed", "long", "flood"],
)
def test_a_module_that_misuses_its_link_is_killed_with_a_named_cause(
    tmp_path: Path, code: str, cause: str
) -> None:
    write_module(tmp_path / "modules", "rogue", more=NO_RESTART)

    async def test() -> None:
        async with running(tmp_path, host=fake_host(tmp_path, code)) as rig:
            view = await failed_start(rig, "rogue")
            assert view.state == "failed"
            assert cause in view.cause
            assert rig.kernel.events.totals["module.misbehaved"] <= 1

    run(test())


def test_a_module_that_reads_nothing_and_ignores_its_stop_is_killed(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "deaf")
    code = f"{SERVES}time.sleep(3600)"

    async def test() -> None:
        async with running(tmp_path, host=fake_host(tmp_path, code), start=["deaf"]) as rig:
            assert (await rig.operate("module.stop", name="deaf"))["state"] == "stopped"
            assert "SIGKILL" in rig.event("module.exited").data["how"]

    run(test())


def test_a_module_gets_its_gate_to_read_only(tmp_path: Path) -> None:
    """What it does by other ways, such as opening it again under /proc, is out of reach: it has the same user."""
    write_module(tmp_path / "modules", "rogue")
    code = (
        "import mmap\n"
        "try: mmap.mmap(fds[0], 4096)\n"
        "except PermissionError: print('refused', flush=True)\n"
        "try: os.pwrite(fds[0], b'x', 0)\n"
        "except OSError: print('refused', flush=True)\n"
        f"{SERVES}link.recv(10)"
    )

    async def test() -> None:
        async with running(tmp_path, host=fake_host(tmp_path, code), start=["rogue"]) as rig:
            await rig.until(lambda: len(rig.kernel.runner("rogue").log.tail) == 2)
            assert list(rig.kernel.runner("rogue").log.tail) == ["refused", "refused"]

    run(test())


def test_a_broken_manifest_hides_no_other_module(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "wrong", manifest="[module]\nname = 7\n")
    write_module(tmp_path / "modules", "good")

    async def test() -> None:
        async with running(tmp_path, start=["good"]) as rig:
            assert "wrong" in rig.event("manifest.refused").subject
            assert rig.kernel.module_view("good").state == "ready"

    run(test())


# -- the process around it ----------------------------------------------------------------------------------


def test_a_second_kernel_is_refused_with_the_pid_of_the_first(kernel: Callable[..., Any]) -> None:
    first = kernel()
    second = subprocess.run(
        [sys.executable, "-m", "snap.kernel", "--runtime-dir", first.directory],
        capture_output=True,
        text=True,
    )
    assert second.returncode == 6
    assert str(first.pid) in second.stderr
    first.connect().close()


def test_a_stop_leaves_no_socket_no_process_and_no_name(kernel: Callable[..., Any]) -> None:
    one = kernel(AUTOSTART)
    with one.control() as control:
        assert control.call("module.start", name="echo")["state"] == "ready"
        pid = control.call("module.show", name="echo")["pid"]
        # Nothing has a name while it runs, so there is nothing that any end could leave behind.
        assert list(Path("/dev/shm").glob("snap*")) == []
    assert one.stop() == 0
    assert not alive(pid)
    assert [path.name for path in one.directory.iterdir() if path.is_socket()] == []
    assert (one.directory / paths.LOCK).read_text() == ""


def test_what_a_killed_kernel_left_is_taken_over_by_the_next_one(kernel: Callable[..., Any]) -> None:
    one = kernel(AUTOSTART)
    with one.control() as control:
        control.call("module.start", name="echo")
        pid = control.call("module.show", name="echo")["pid"]
    one.kill()
    assert (one.directory / paths.BOOTSTRAP).is_socket()
    two = kernel(AUTOSTART, directory=one.directory)
    with two.control() as control, two.connect() as client:
        with client.open("echo") as channel:
            channel.send(b"x")
            assert channel.recv(timeout=10) == b"x"
        assert control.call("module.show", name="echo")["pid"] == pid


@pytest.mark.parametrize("language", ["rust", "python"])
def test_without_kernel_and_keeper_modules_end_and_clients_are_told(
    tmp_path: Path, kernel: Callable[..., Any], language: str
) -> None:
    write_module(tmp_path / "modules", "slate")
    one = kernel(OWNER_MAY_ALL, tmp_path / "modules")
    service = "echo" if language == "rust" else "slate"
    with one.control() as control:
        control.call("module.start", name=service)
        module = control.call("module.show", name=service)["pid"]
    with one.connect() as client, client.open(service) as channel:
        channel.send(b"x")
        assert channel.recv(timeout=10) == b"x"
        keepers = [pid for pid in descendants(one.pid) if title(pid) == "snap: keeper"]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: neither starts the other again
            for pid in (one.pid, *keepers):
                os.kill(pid, number)
        with pytest.raises(PeerGoneError):
            channel.recv(timeout=20)
    end = time.monotonic() + 20
    while alive(module) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(module)


def test_operators_hear_events_as_they_happen(kernel: Callable[..., Any]) -> None:
    one = kernel(AUTOSTART)
    with one.control() as control, one.control() as listener:
        control.call("module.start", name="echo")
        events = listener.events(["module.*"], since=0)
        assert "module.ready" in {next(events).kind for _ in range(4)}
        control.call("module.restart", name="echo")
        heard = [next(events).kind for _ in range(6)]
        assert heard[0] == "module.stopping"
        assert "module.exited" in heard


def test_channels_go_on_while_the_kernel_is_stopped(kernel: Callable[..., Any]) -> None:
    one = kernel(AUTOSTART)
    with one.connect() as client, client.open("echo") as channel:
        os.kill(one.pid, signal.SIGSTOP)
        for number in range(1000):
            channel.send(str(number).encode())
            assert channel.recv(timeout=10) == str(number).encode()
        os.kill(one.pid, signal.SIGCONT)
        assert client.lookup("echo").ready


def test_a_runtime_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    refused = subprocess.run(
        [sys.executable, "-m", "snap.kernel", "--runtime-dir", directory], capture_output=True, text=True
    )
    assert refused.returncode == 5
    assert "chmod" in refused.stderr


def test_a_runtime_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refused = subprocess.run(
        [sys.executable, "-m", "snap.kernel", "--runtime-dir", tmp_path / "link"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 5


def test_a_bad_policy_is_a_usage_error_and_nothing_starts(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("version = 1\n[[allow]]\nwho = 7\n")
    refused = subprocess.run(
        [
            sys.executable,
            "-m",
            "snap.kernel",
            "--runtime-dir",
            tmp_path / "run",
            "--policy",
            tmp_path / "policy.toml",
        ],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "allow" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_runtime_directory_too_deep_for_a_socket_is_a_named_error(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    refused = subprocess.run(
        [sys.executable, "-m", "snap.kernel", "--runtime-dir", directory], capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "shorter path" in refused.stderr


def test_ctl_is_the_second_name_of_snapctl() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "snap.kernel", "ctl", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert "status" in shown.stdout


def test_the_help_teaches_with_examples() -> None:
    shown = subprocess.run([sys.executable, "-m", "snap.kernel", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "examples:" in shown.stdout
    assert "Exit codes" in shown.stdout
