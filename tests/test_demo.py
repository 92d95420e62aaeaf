"""`snapctl demo` from outside: real processes, a real tree, real interruptions."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from snap.cli.bench.pony_hosts import two_ports
from snap.cli.demo import between
from snap.cli.demo.plan import scan
from snap.cli.demo.verify import differences
from snap.ipc import paths

COMMAND = [sys.executable, "-P", "-m", "snap.cli", "demo", "--only", "relay"]
HOSTS = [*COMMAND[:-1], "hosts"]
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """About 20 MB, and what trees have besides files."""
    chance = random.Random(11)
    root = tmp_path / "tree"
    for number in range(60):
        folder = root / f"folder{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"file{number}").write_bytes(chance.randbytes(chance.choice([0, 1, 100, 70_000, 900_000])))
    Path(os.fsdecode(os.fsencode(root) + b"/odd \xff name")).write_bytes(b"odd")
    (root / "link").symlink_to("nowhere")
    return root


def start(scratch: Path, *arguments: object, command: list[str] = COMMAND) -> subprocess.Popen[str]:
    scratch.mkdir()
    return subprocess.Popen(
        [*command, *map(os.fspath, map(str, arguments))],
        env={**os.environ, "TMPDIR": os.fspath(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(scratch: Path, *arguments: object) -> tuple[int, str, str]:
    child = start(scratch, *arguments)
    out, err = child.communicate(timeout=100)
    return child.returncode, out, err


def result(scratch: Path, *arguments: object) -> dict[str, Any]:
    code, out, err = run(scratch, *arguments, "-o", "json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    assert (document["apiVersion"], document["kind"]) == ("snap/v1", "Demo")
    return document


EVENTS = ["upgrade", "kill", "kernel", "rollback"]


def test_a_tree_arrives_whole_whatever_happens_to_the_module_meanwhile(tree: Path, tmp_path: Path) -> None:
    seen = result(tmp_path / "tmp", "--path", tree)
    assert (seen["files"], seen["verified"], seen["lost"], seen["duplicated"]) == (61, 61, 0, 0)
    assert seen["bytes"] == sum(
        path.stat().st_size for path in tree.rglob("*") if not path.is_symlink() and path.is_file()
    )
    assert seen["stream_bytes"] == seen["laps"] * seen["bytes"]
    assert [one["event"] for one in seen["events"]] == EVENTS
    upgrade, kill, kernel, rollback = seen["events"]
    assert upgrade["engine_ns"] > 0 and rollback["engine_ns"] > 0
    assert kill["engine_ns"] > 0
    assert kernel["engine_ns"] is None
    assert all(one["bytes_per_second"] > 0 and one["gap_ns"] > 0 for one in (seen["quiet"], *seen["events"]))
    assert seen["skipped"] == {"symbolic links": 1}
    assert list((tmp_path / "tmp").iterdir()) == []


def test_round_trips_are_measured_beside_both_peers(tree: Path, tmp_path: Path) -> None:
    seen = result(tmp_path / "tmp", "--path", tree, "--events", "none")
    ways = [trip["way"] for trip in seen["round_trips"]]
    assert ways == ["Snap, spinning", "Snap, blocking", "Unix socket", "ZeroMQ"]
    assert all(0 < trip["p50"] <= trip["p99"] <= trip["p999"] for trip in seen["round_trips"])
    assert (seen["laps"], seen["events"]) == (1, [])


def test_an_empty_tree_is_sent_too(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    assert result(tmp_path / "tmp", "--path", tmp_path / "tree", "--events", "upgrade")["files"] == 0


def test_the_table_tells_files_checksums_and_the_gaps(tree: Path, tmp_path: Path) -> None:
    code, out, err = run(tmp_path / "tmp", "--path", tree, "--events", "kernel")
    assert code == 0, err
    for words in (
        "61 of 61 files and the stream equal (SHA-256)",
        "0 lost, 0 duplicated",
        "SIGKILL of the kernel",
        "the same modules run on",
        "longest gap",
        "p99.9",
        "ZeroMQ",
        "1 symbolic links",
    ):
        assert words in out


def test_kept_files_are_the_tree_as_it_was_sent(tree: Path, tmp_path: Path) -> None:
    result(tmp_path / "tmp", "--path", tree, "--keep", "--events", "none")
    (folder,) = (tmp_path / "tmp").iterdir()
    assert (folder / "run" / paths.KERNEL_LOG).exists()
    for path in tree.rglob("file*"):
        if path.is_file():
            assert (folder / "written" / path.relative_to(tree)).read_bytes() == path.read_bytes()


MOMENTS = ["sending", "upgrade in place", "SIGKILL of the module", "SIGKILL of the kernel", "rollback"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_demo_leaves_neither_process_nor_file(moment: str, tree: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    child = start(scratch, "--path", tree)
    assert child.stderr is not None
    while (line := child.stderr.readline()) and line.strip() != moment:
        pass
    assert line, "it ended before that moment"
    family = descendants(child.pid)
    child.send_signal(signal.SIGINT if moment != "sending" else signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert list(scratch.iterdir()) == []
    assert len(family) >= 2, "the kernel and its modules were not running yet"
    assert [pid for pid in family if runs(pid)] == []


def test_ctrl_c_at_any_moment_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for number in range(4):
        scratch = tmp_path / f"tmp{number}"
        child = start(scratch, "--path", tree)
        time.sleep(chance.uniform(0.3, 8.0))
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
        assert child.returncode in (0, 130), err
        assert "Traceback" not in err
        assert list(scratch.iterdir()) == []


def runs(pid: int) -> bool:
    """Whether the process runs; a dead one that only nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


def test_a_path_that_is_no_folder_is_wrong_usage(tmp_path: Path) -> None:
    code, out, err = run(tmp_path / "tmp", "--path", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "does not exist" in err


def test_events_that_cannot_be_are_wrong_usage(tmp_path: Path) -> None:
    code, out, err = run(tmp_path / "tmp", "--events", "rollback")
    assert (code, out) == (2, "")
    assert "nothing to roll back to" in err


# -- between hosts ----------------------------------------------------------------------------------------------


def namespaces() -> set[str]:
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in found.splitlines()}


@ROOT
@pytest.mark.netns
def test_a_tree_arrives_whole_at_another_host_whatever_happens_to_the_engines(
    tree: Path, tmp_path: Path
) -> None:
    before = namespaces()
    child = start(tmp_path / "tmp", "--path", tree, "-o", "json", command=HOSTS)
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    seen = json.loads(out)["hosts"]
    assert (seen["namespaces"], seen["verified"], seen["lost"], seen["duplicated"]) == (True, 61, 0, 0)
    assert [one["event"] for one in seen["events"]] == ["upgrade sender", "upgrade receiver", "kill receiver"]
    assert all(one["bytes_per_second"] > 0 and one["gap_ns"] > 0 for one in (seen["quiet"], *seen["events"]))
    assert [one["who"] for one in seen["goodput"]] == ["Snap", "TCP"]
    assert namespaces() == before
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_namespaces_the_hosts_are_two_ports(tree: Path, tmp_path: Path) -> None:
    plan = scan(tree)
    written = tmp_path / "written"
    written.mkdir()
    with two_ports() as site:
        copied = between.copy(site, plan, written, lambda _: None)
    assert (copied.seen["lost"], copied.seen["duplicated"], copied.seen["frames"]) == (0, 0, copied.frames)
    assert copied.seen["digest"] == copied.digest
    assert differences(plan, written, lambda _: None) == []


@ROOT
@pytest.mark.netns
@pytest.mark.parametrize("moment", ["two hosts", "upgrade sender", "kill receiver"])
def test_an_interrupted_copy_leaves_neither_host_nor_file(moment: str, tree: Path, tmp_path: Path) -> None:
    before = namespaces()
    scratch = tmp_path / "tmp"
    child = start(scratch, "--path", tree, command=HOSTS)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith(moment):
            break
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert namespaces() == before
    assert list(scratch.iterdir()) == []
