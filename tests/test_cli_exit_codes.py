"""The exit codes that `snapctl --help` promises, each from a real process against a real kernel."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

SNAPCTL = (sys.executable, "-m", "snap.cli")
LOOK_ONLY = """
version = 1
[[operator]]
who = "owner"
rights = ["inspect"]
"""
CRASHING = {
    "module.toml": """
[module]
name = "crashing"
version = "0.1.0"
[provides.crashing]
engine = "main"
[engines.main]
class = "engine:Crashing"
[restart]
policy = "never"
""",
    "__init__.py": "",
    "engine.py": "raise RuntimeError('it is broken')\n",
}


class Kernel:
    """A runtime directory and snapctl commands on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*SNAPCTL, "--runtime-dir", str(self.directory), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )

    def code(self, *arguments: object) -> int:
        """The exit code; a failure must have said what to do next."""
        done = self(*arguments)
        if done.returncode:
            assert "hint: " in done.stderr, done.stderr
            assert "Traceback" not in done.stderr
        return done.returncode

    @contextmanager
    def up(self, *options: object) -> Iterator[int]:
        """A kernel for a while; yields its pid."""
        started = self("up", "-o", "name", *options)
        assert started.returncode == 0, started.stderr
        pidfd = os.pidfd_open(int(started.stdout))
        try:
            yield int(started.stdout)
        finally:
            self("down", "--timeout", 10)
            if not gone(pidfd, 0):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                    if not gone(pidfd, 10):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def gone(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path / "run")


def test_0_up_status_and_down_leave_nothing(kernel: Kernel) -> None:
    up = kernel("up")
    assert up.returncode == 0, up.stderr
    assert str(kernel.directory) in up.stdout
    status = json.loads(kernel("status", "-o", "json").stdout)
    assert status["kind"] == "Kernel"
    assert f"kernel {status['pid']} " in up.stdout
    pidfd = os.pidfd_open(status["pid"])
    try:
        assert kernel.code("down") == 0
        assert gone(pidfd, 0)
    finally:
        os.close(pidfd)
    assert not list(kernel.directory.glob("*.sock"))


def test_1_and_3_a_module_that_breaks_fails_its_check_and_does_not_run(
    kernel: Kernel, tmp_path: Path
) -> None:
    package = tmp_path / "modules" / "crashing"
    package.mkdir(parents=True)
    for name, text in CRASHING.items():
        (package / name).write_text(text)
    assert kernel("module", "check", package).returncode == 1
    with kernel.up("--module-path", tmp_path / "modules"):
        assert kernel.code("module", "start", "crashing") == 3
        shown = json.loads(kernel("module", "show", "crashing", "-o", "json").stdout)
        assert shown["state"] == "failed"
        assert "it is broken" in kernel("status").stdout


def test_2_usage_and_policy(kernel: Kernel, tmp_path: Path) -> None:
    assert kernel("no-such-command").returncode == 2
    assert kernel("module", "logs", "echo", "-n", "none").returncode == 2
    (tmp_path / "policy.toml").write_text("version = 'one'\n")
    refused = kernel("up", "--policy", tmp_path / "policy.toml")
    assert refused.returncode == 2
    assert "policy.toml" in refused.stderr
    assert kernel.code("status") == 9


def test_4_no_such_object(kernel: Kernel) -> None:
    with kernel.up():
        for command in ("module show nix", "module start nix", "module logs nix", "cap inspect 987654"):
            assert kernel.code(*command.split()) == 4, command


def test_5_denied(kernel: Kernel, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(LOOK_ONLY)
    with kernel.up("--policy", policy):
        assert kernel.code("status") == 0
        assert kernel.code("module", "start", "echo") == 5
        assert kernel.code("down") == 5
        assert kernel("cap", "why", f"uid:{os.getuid()}", "echo").returncode == 5


def test_6_a_second_up_is_refused_with_the_pid_of_the_first(kernel: Kernel) -> None:
    with kernel.up() as pid:
        second = kernel("up")
        assert second.returncode == 6
        assert f"pid {pid}," in second.stderr
        assert kernel.code("status") == 0


def test_7_a_stopped_kernel_is_a_deadline_and_force_ends_it(kernel: Kernel) -> None:
    with kernel.up() as pid:
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        assert kernel.code("status", "--timeout", 0.5) == 7
        assert kernel.code("down", "--timeout", 0.5) == 7
        assert kernel.code("up") == 6
        forced = kernel("down", "--force", "--timeout", 0.5)
        assert forced.returncode == 0, forced.stderr
        assert gone(pidfd, 0)
        os.close(pidfd)
        # What a killed kernel leaves, the next one on its directory clears away.
        with kernel.up() as second:
            assert second != pid


@pytest.fixture
def fresh(kernel: Kernel, tmp_path: Path) -> Iterator[Path]:
    """The directory of a module that runs."""
    assert kernel("module", "new", "fresh", "--path", tmp_path / "own").returncode == 0
    with kernel.up("--module-path", tmp_path / "own"):
        assert kernel.code("module", "start", "fresh") == 0
        yield tmp_path / "own" / "fresh"


def shown(kernel: Kernel, *words: object) -> dict[str, Any]:
    done = kernel(*words, "-o", "json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def call_it(folder: Path, version: str) -> None:
    manifest = folder / "module.toml"
    manifest.write_text(re.sub('(?m)^version = ".*"$', f'version = "{version}"', manifest.read_text()))


def test_0_a_module_is_upgraded_in_place_and_rolled_back(kernel: Kernel, fresh: Path) -> None:
    first = shown(kernel, "module", "show", "fresh")
    call_it(fresh, "7.0")
    upgraded = kernel("upgrade", "--all", "--bake", "500ms", "-o", "json")
    assert upgraded.returncode == 0, upgraded.stderr
    (up,) = json.loads(upgraded.stdout)["items"]
    second = shown(kernel, "module", "show", "fresh")
    assert (second["version"], second["state"]) == ("7.0", "ready")
    assert second["generation"] > first["generation"]
    assert shown(kernel, "upgrade", "--all")["items"] == []
    back = shown(kernel, "rollback", "fresh")
    third = shown(kernel, "module", "show", "fresh")
    assert (third["version"], third["state"]) == (first["version"], "ready")
    assert [view["outcome"] for view in (up, back)] == ["committed"] * 2
    assert all(engine["blackout_ns"] > 0 for view in (up, back) for engine in view["engines"])
    history = shown(kernel, "upgrade", "history", "fresh")["items"]
    assert [(view["operation"], view["to_version"]) for view in history] == [
        ("upgrade", "7.0"),
        ("rollback", first["version"]),
    ]


def test_8_a_version_that_does_not_import_leaves_the_old_one_serving(kernel: Kernel, fresh: Path) -> None:
    before = shown(kernel, "module", "show", "fresh")
    call_it(fresh, "7.0")
    (fresh / "engine.py").write_text("raise RuntimeError('it is broken')\n")
    assert kernel.code("upgrade", "fresh") == 8
    after = shown(kernel, "module", "show", "fresh")
    assert [after[key] for key in ("pid", "generation", "version", "state")] == [
        before[key] for key in ("pid", "generation", "version", "state")
    ]
    (failed,) = shown(kernel, "upgrade", "history")["items"]
    assert failed["outcome"] == "aborted"
    assert "it is broken" in failed["reason"]


def test_6_a_second_upgrade_of_a_module_is_refused_while_one_runs(kernel: Kernel, fresh: Path) -> None:
    number = kernel("upgrade", "fresh", "--bake", "4s", "--no-wait", "-o", "name").stdout.strip()
    assert kernel.code("upgrade", "fresh") == 6
    assert kernel.code("upgrade", "show", number, "--watch", "--timeout", 0.2) == 7
    assert kernel.code("upgrade", "show", number, "--watch") == 0


def test_0_a_rollback_ends_the_bake_of_an_upgrade_which_then_exits_8(kernel: Kernel, fresh: Path) -> None:
    first = shown(kernel, "module", "show", "fresh")
    call_it(fresh, "7.0")
    number = kernel("upgrade", "fresh", "--bake", "1m", "--no-wait", "-o", "name").stdout.strip()
    while shown(kernel, "upgrade", "show", number)["phase"] != "bake":
        time.sleep(0.05)
    assert kernel.code("rollback", "fresh") == 0
    assert kernel.code("upgrade", "show", number, "--watch") == 8
    assert shown(kernel, "module", "show", "fresh")["pid"] == first["pid"]


def test_0_the_kernel_is_upgraded_under_its_modules(kernel: Kernel, fresh: Path) -> None:
    before = shown(kernel, "status")
    view = shown(kernel, "upgrade", "--kernel")
    after = shown(kernel, "status")
    assert (view["operation"], view["outcome"]) == ("kernel", "committed")
    assert after["pid"] != before["pid"]
    assert [(module["name"], module["pid"]) for module in after["modules"]] == [
        (module["name"], module["pid"]) for module in before["modules"]
    ]
    assert kernel.code("upgrade", "--kernel", fresh) == 4


def test_4_and_2_what_cannot_be_upgraded(kernel: Kernel, fresh: Path) -> None:
    assert kernel.code("upgrade", "nix") == 4
    assert kernel.code("upgrade", "show", 4711) == 4
    assert kernel.code("upgrade", "fresh", "no-such-version") in (2, 4)
    assert kernel.code("upgrade", "fresh", fresh.parent / "nix") in (2, 4)
    assert kernel.code("rollback", "fresh") in (2, 4)


def test_a_killed_kernel_comes_back_by_itself_and_9_is_for_one_that_was_stopped(kernel: Kernel) -> None:
    with kernel.up() as pid:
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert gone(pidfd, 10)
        os.close(pidfd)
        deadline = time.monotonic() + 30
        while (status := kernel("status", "-o", "name")).returncode and time.monotonic() < deadline:
            time.sleep(0.1)
        assert int(status.stdout) != pid
        assert kernel.code("down") == 0
        assert kernel.code("status") == 9
        assert kernel.code("down") == 9
        with kernel.up() as second:
            assert second != pid


def test_130_ctrl_c_ends_following_cleanly(kernel: Kernel) -> None:
    with kernel.up():
        process = subprocess.Popen(
            [*SNAPCTL, "--runtime-dir", str(kernel.directory), "events", "-f", "-o", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["kind"] == "Event"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said.strip()) == (130, "")


def test_a_module_is_started_stopped_and_restarted(kernel: Kernel) -> None:
    with kernel.up():
        assert kernel.code("module", "start", "echo") == 0
        first = json.loads(kernel("module", "show", "echo", "-o", "json").stdout)
        assert first["state"] == "ready"
        assert kernel.code("module", "restart", "echo") == 0
        second = json.loads(kernel("module", "show", "echo", "-o", "json").stdout)
        assert second["state"] == "ready"
        assert second["pid"] != first["pid"]
        assert second["generation"] > first["generation"]
        assert kernel.code("module", "stop", "echo") == 0
        assert json.loads(kernel("module", "show", "echo", "-o", "json").stdout)["pid"] is None
        kinds = [event["event"] for event in json.loads(kernel("events", "-o", "json").stdout)["items"]]
        assert "module.ready" in kinds


def test_a_new_module_runs(kernel: Kernel, tmp_path: Path) -> None:
    made = kernel("module", "new", "fresh", "--path", tmp_path / "own")
    assert made.returncode == 0, made.stderr
    with kernel.up("--module-path", tmp_path / "own"):
        assert kernel.code("module", "start", "fresh") == 0
        assert kernel("module", "list", "-o", "name").stdout.split().count("fresh") == 1
        allowed = kernel("cap", "why", f"uid:{os.getuid()}", "fresh", "connect")
        assert allowed.returncode == 0, allowed.stdout


def test_a_kernel_in_the_foreground_is_this_process_and_ends_with_a_signal(kernel: Kernel) -> None:
    process = subprocess.Popen(
        [*SNAPCTL, "--runtime-dir", str(kernel.directory), "up", "--foreground"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while (status := kernel("status", "-o", "name")).returncode == 9 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (status.stderr, status.stdout) == ("", f"{process.pid}\n")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_ctrl_c_while_a_kernel_comes_up_takes_it_down_again(kernel: Kernel) -> None:
    process = subprocess.Popen(
        [*SNAPCTL, "--runtime-dir", str(kernel.directory), "up"], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (kernel.directory / "kernel.log").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert kernel.code("status") == 9


def test_a_kernel_that_cannot_start_says_why_here(kernel: Kernel) -> None:
    kernel.directory.mkdir()
    kernel.directory.chmod(0o777)
    failed = kernel("up")
    assert failed.returncode not in (0, 9)
    assert "kernel: " in failed.stderr
    assert "hint: " in failed.stderr
