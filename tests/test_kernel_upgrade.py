"""The kernel's own upgrade: another process in its place, while channels run; and what becomes of one that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane.errors import DeadlineError, UnreachableError
from snap.ipc import BusyError, NotFoundError, UsageError
from snap.ipc.client import Client
from tests.conftest import KernelProcess
from tests.waiting import LIMIT, until

Start = Callable[..., Any]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ask(kernel: Any, op: str, **args: Any) -> Any:
    """Of whichever kernel serves: there may be a moment without one."""

    def answer() -> Any:
        try:
            with kernel.control(2.0) as control:
                return [control.call(op, **args)]
        except (UnreachableError, DeadlineError):
            return None

    return until(answer)[0]


def outcome(kernel: Any, number: int) -> Any:
    return until(lambda: (view := ask(kernel, "upgrade.show", id=number))["outcome"] and view)


def upgrade(kernel: Any, source: str | None = None) -> Any:
    return outcome(kernel, ask(kernel, "kernel.upgrade", source=source)["id"])


@contextmanager
def traffic(client: Client) -> Iterator[list[int]]:
    """A client that sends and receives as fast as it can, and checks everything; the count so far."""
    counts, over, errors = [0], threading.Event(), []

    def spin() -> None:
        try:
            with client.open("echo") as channel:
                while not over.is_set():
                    channel.send(b"%d" % counts[0], timeout=LIMIT)
                    assert channel.recv(timeout=LIMIT) == b"%d" % counts[0]
                    counts[0] += 1
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        until(lambda: counts[0] > 100 or errors)
        yield counts
        before = counts[0]
        until(lambda: counts[0] > before + 100 or errors)
    finally:
        over.set()
        thread.join()
    assert errors == []


def end(kernel: Any) -> None:
    """The kernel that serves is no child of the test."""
    pid = ask(kernel, "kernel.status")["pid"]
    with kernel.control() as control:
        control.call("kernel.stop")
    until(lambda: not alive(pid))


def test_another_kernel_process_takes_over_and_nobody_notices(kernel: Start) -> None:
    one = kernel()
    with one.connect() as client, traffic(client) as counts:
        before = ask(one, "module.list")
        events = max(event["seq"] for event in ask(one, "events.since"))
        for _ in range(3):
            pid = ask(one, "kernel.status")["pid"]
            view = upgrade(one)
            assert (view["kind"], view["outcome"], view["reason"]) == ("kernel", "committed", "")
            assert view["engines"][0]["blackout_ns"] > 0
            assert (view["from_generation"], view["to_generation"]) == (pid, ask(one, "kernel.status")["pid"])
            assert pid != view["to_generation"]
            until(lambda gone=pid: not alive(gone))
            here = counts[0]
            until(lambda here=here: counts[0] > here + 1000)
            client.lookup("echo")
        after = ask(one, "module.list")
        fields = ("name", "pid", "generation", "state", "restarts", "faults")
        assert [[view[f] for f in fields] for view in after] == [[view[f] for f in fields] for view in before]
        seen = [event["seq"] for event in ask(one, "events.since", seq=events)]
        assert seen == list(range(seen[0], seen[0] + len(seen)))
        assert [view["outcome"] for view in ask(one, "upgrade.history")] == ["committed"] * 3
        assert (one.directory / "kernel.lock").read_text() == f"{ask(one, 'kernel.status')['pid']}\n"
        with client.open("echo") as channel:
            channel.send(b"new")
            assert channel.recv(timeout=LIMIT) == b"new"
    end(one)


NEW = """#!{python}
import os, signal, socket, sys
from snap.kernel import keeper
sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--takeover") + 1].split(",")[0]))
{code}
"""


@pytest.mark.parametrize(
    ("code", "outcome_", "reason"),
    [
        ("sys.exit(3)", "aborted", "it ended"),
        ("keeper.send(sock, 'Fthe record is too new')", "aborted", "the record is too new"),
        (
            "keeper.send(sock, 'O9'); keeper.receive(sock); os.kill(os.getpid(), signal.SIGKILL)",
            "rolled_back",
            "it died",
        ),
        (
            "keeper.send(sock, 'O9'); keeper.receive(sock); keeper.send(sock, 'Fno room'); sock.recv(1)",
            "rolled_back",
            "no room",
        ),
        ("keeper.send(sock, 'O9'); signal.pause()", "rolled_back", "within"),
    ],
)
def test_from_a_new_kernel_that_fails_the_old_one_serves_on(
    kernel: Start, tmp_path: Path, code: str, outcome_: str, reason: str
) -> None:
    new = tmp_path / "python"
    new.write_text(NEW.format(python=sys.executable, code=code))
    new.chmod(0o700)
    one = kernel()
    with one.connect() as client, traffic(client):
        view = upgrade(one, str(new))
        assert view["outcome"] == outcome_
        assert reason in view["reason"]
        assert ask(one, "kernel.status")["pid"] == one.pid
        client.lookup("echo")
        with client.open("echo") as channel:
            channel.send(b"still")
            assert channel.recv(timeout=LIMIT) == b"still"
        assert upgrade(one)["outcome"] == "committed"
    end(one)


def test_what_is_no_installation_is_refused_and_two_at_once_are_one_too_many(
    kernel: Start, tmp_path: Path
) -> None:
    one = kernel()
    with one.control() as control:
        with pytest.raises(NotFoundError, match="no interpreter"):
            control.call("kernel.upgrade", source=str(tmp_path))
        with pytest.raises(UsageError, match="no installation"):
            control.call("kernel.upgrade", source="1.2.3")
        slow = tmp_path / "python"
        slow.write_text(NEW.format(python=sys.executable, code="import time; time.sleep(1)"))
        slow.chmod(0o700)
        number = control.call("kernel.upgrade", source=str(slow))["id"]
        with pytest.raises(BusyError, match=f"upgrade {number} of the kernel"):
            control.call("kernel.upgrade")
    assert outcome(one, number)["outcome"] == "aborted"


def test_after_an_upgrade_to_another_installation_its_keeper_starts_that_one_again(tmp_path: Path) -> None:
    """The other installation is this one under another path, made as `venv` does."""
    venv = Path(sys.executable).parent.parent
    other = tmp_path / "other"
    (other / "bin").mkdir(parents=True)
    (other / "bin" / "python").symlink_to(sys.executable)
    for name in ("lib", "pyvenv.cfg"):
        (other / name).symlink_to(venv / name)
    directory = tmp_path / "run"
    argv = [sys.executable, "-m", "snap.kernel", "--respawn", "--runtime-dir", str(directory)]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    one = KernelProcess(process, directory, tmp_path / "output")
    one.wait_ready()
    assert upgrade(one, str(other))["outcome"] == "committed"
    process.wait()
    second = ask(one, "kernel.status")["pid"]
    os.kill(second, signal.SIGKILL)
    until(lambda: ask(one, "kernel.status")["pid"] != second)
    assert upgrade(one)["from_path"] == str(other / "bin" / "python")
    assert [view["outcome"] for view in ask(one, "upgrade.history")] == ["committed"] * 2
    end(one)
