"""`snapctl doctor`: what it reports is tried, in processes that are really limited, and it changes nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snap.cli.commands import _probes, _system

STATES = ("ok", "limited", "unavailable")


def doctor(
    runtime: Path, *, limit: Callable[[], None] | None = None
) -> tuple[int, dict[str, dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "snap.cli", "doctor", "-o", "json", "--runtime-dir", str(runtime)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limit,
        check=False,
    )
    report = json.loads(done.stdout)
    assert (report["apiVersion"], report["kind"]) == ("snap/v1", "DoctorReport")
    assert report["usable"] == (done.returncode == 0)
    return done.returncode, {item["name"]: item for item in report["items"]}


def test_every_finding_that_is_not_ok_says_what_follows_and_what_to_do(tmp_path: Path) -> None:
    findings = _probes.examine(tmp_path)
    assert len({finding.name for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.state in STATES
        assert finding.found
        assert bool(finding.means) == bool(finding.fix) == (finding.state != "ok")


def test_the_page_for_people_has_each_finding_and_a_verdict(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snap.cli", "doctor", "--runtime-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    for probe in _probes.examine(tmp_path):
        assert f"{probe.name}: " in done.stdout
    assert done.stdout.splitlines()[-1] == "Snap runs here."


def test_looking_changes_nothing(tmp_path: Path) -> None:
    def surroundings() -> tuple[object, ...]:
        return (
            os.sched_getscheduler(0),
            Path("/proc/self/ns/user").readlink(),
            sorted(Path("/proc/self/fd").iterdir()),
            Path("/proc/self/cgroup").read_text(),
            threading.active_count(),
            sorted(tmp_path.iterdir()),
        )

    _probes.examine(tmp_path / "not" / "there")
    before = surroundings()
    _probes.examine(tmp_path / "not" / "there")
    assert surroundings() == before


def test_few_descriptors_and_little_locked_memory_are_limits(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 1 << 20))

    status, found = doctor(tmp_path, limit=limit)
    assert status == 0
    assert (found["open files"]["state"], found["open files"]["found"]) == ("limited", "256, at most 512")
    assert (found["locked memory"]["state"], found["locked memory"]["found"]) == (
        "limited",
        "0 MiB, at most 1 MiB",
    )


def test_one_processor_is_none_to_spin_on(tmp_path: Path) -> None:
    one = min(os.sched_getaffinity(0))
    _, found = doctor(tmp_path, limit=lambda: os.sched_setaffinity(0, {one}))
    assert found["processors"]["state"] == "unavailable"
    assert found["processors"]["found"].startswith("1 usable of ")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_process_without_privilege_is_told_what_it_may_not(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib\n"
        "from snap.cli.commands import _probes\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "for f in _probes.examine(pathlib.Path(sys.argv[1])): print(f.name, f.state, sep='\\t')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = dict(line.split("\t") for line in done.stdout.splitlines())
    for name in ("runtime directory", "SCHED_FIFO", "SCHED_DEADLINE", "AF_XDP", "cgroups"):
        assert found[name] == "unavailable", name
    for name in ("eventfd", "pidfd", "landlock", "seccomp", "sealed memfd"):
        assert found[name] != "unavailable", name


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_runtime_directory_that_others_can_write_is_fatal(mode: int, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(mode)
    status, found = doctor(directory)
    assert status == 1
    assert found["runtime directory"]["state"] == "unavailable"
    assert f"mode {mode:o}" in found["runtime directory"]["found"]


def test_a_runtime_directory_that_no_socket_fits_into_is_fatal(tmp_path: Path) -> None:
    status, found = doctor(tmp_path / ("long" * 30))
    assert status == 1
    assert "too long" in found["runtime directory"]["found"]


def test_a_runtime_directory_below_a_file_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o600)
    status, found = doctor(tmp_path / "file" / "run")
    assert status == 1
    assert "not writable" in found["runtime directory"]["found"]


def test_a_probe_sorts_what_it_meets() -> None:
    def limited() -> str:
        raise _probes.Limited("half")

    def absent() -> str:
        raise OSError(errno.ENOSYS, "no such call")

    found = [
        _probes.Probe("x", attempt, "means", "fix").run() for attempt in (lambda: "all", limited, absent)
    ]
    assert [(finding.state, finding.found, finding.fix) for finding in found] == [
        ("ok", "all", ""),
        ("limited", "half", "fix"),
        ("unavailable", "no such call", "fix"),
    ]


def test_what_fails_in_a_child_is_raised_here() -> None:
    def fail() -> None:
        raise PermissionError(errno.EPERM, "no")

    with pytest.raises(PermissionError):
        _system.in_a_child(fail)
    _system.in_a_child(lambda: None)


def test_an_attempt_that_hangs_is_given_up_and_its_child_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_system, "CHILD_TIMEOUT", 0.1)
    with pytest.raises(TimeoutError):
        _system.in_a_child(signal.pause)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_what_fails_on_a_thread_is_raised_here_and_leaves_this_one_as_it_was() -> None:
    def fail() -> None:
        raise PermissionError(errno.EPERM, "no")

    before = os.sched_getscheduler(0)
    with pytest.raises(PermissionError):
        _system.on_a_thread(fail)
    assert os.sched_getscheduler(0) == before


def test_seals_that_do_not_hold_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a seal that the system does not know, the probe must not say ok."""
    monkeypatch.setattr(_system, "F_SEAL_FUTURE_WRITE", 0x4000)
    assert _probes.Probe("seal", _probes._sealed_memfd, "", "").run().state == "limited"
