"""The example of state: examples/tally-1 and tally-2, with no kernel and under a real one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snap.ipc import Channel
from snap.modules.check import check
from snap.modules.testing import EngineHarness, crash, upgrade

EXAMPLES = Path(__file__).parent.parent / "examples"
FIRST, SECOND = EXAMPLES / "tally-1" / "tally", EXAMPLES / "tally-2" / "tally"
LIMIT = 20.0


def engine(path: Path) -> type[Any]:
    """The class Tally of one version: both cannot be imported as `tally` by one process."""
    names: dict[str, Any] = {"__name__": path.parent.name}
    exec(compile((path / "engine.py").read_text(), str(path / "engine.py"), "exec"), names)
    found: type[Any] = names["Tally"]
    return found


def ask(harness: EngineHarness, client: Channel, *messages: bytes) -> list[bytes]:
    client.send_many(list(messages))
    harness.run()
    return client.recv_many(len(messages), timeout=0)


@pytest.mark.parametrize("path", [FIRST, SECOND], ids=["tally-1", "tally-2"])
def test_both_versions_are_sound_modules_of_less_than_60_lines(path: Path) -> None:
    assert check(path).problems == []
    assert len((path / "engine.py").read_text().splitlines()) < 60


def test_the_second_version_passes_its_own_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SECOND)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_totals_go_from_the_first_version_to_the_second_and_back() -> None:
    first, second = engine(FIRST), engine(SECOND)
    with EngineHarness(first()) as harness:
        client = harness.attach().client
        assert ask(harness, client, b"apples 3", b"pears 7", b"apples 5") == [
            b"apples 1 3",
            b"pears 1 7",
            b"apples 2 8",
        ]
        upgrade(harness, second)
        assert harness.engine.state.totals[b"apples"].tolist() == (2, 8.0, 4.0)
        assert ask(harness, client, b"apples 1") == [b"apples 3 9 3"]
        upgrade(harness, first)
        assert ask(harness, client, b"apples 1", b"pears 1") == [b"apples 4 10", b"pears 2 8"]


def test_a_crash_before_and_after_an_upgrade_counts_everything_once() -> None:
    first, second = engine(FIRST), engine(SECOND)
    with EngineHarness(first()) as harness:
        client = harness.attach().client
        client.send_many([b"apples 3", b"apples 5"])
        assert crash(harness) > 0
        upgrade(harness, second)
        client.send(b"apples 1")
        assert crash(harness) > 0
        harness.run()
        assert client.recv_many(8, timeout=0) == [b"apples 1 3 3", b"apples 2 8 4", b"apples 3 9 3"]


def test_what_cannot_be_added_is_answered_and_changes_nothing() -> None:
    with EngineHarness(engine(SECOND)()) as harness:
        client = harness.attach().client
        answers = ask(harness, client, b"", b"apples", b"apples many", b"a b c", b"x" * 25 + b" 1")
        assert all(answer.startswith(b"error: ") for answer in answers)
        assert len(harness.engine.state.totals) == 0


# -- under a real kernel -------------------------------------------------------------------------------------


class Customer(threading.Thread):
    """Adds 1 under a name of its own, again and again, and checks every count and total."""

    def __init__(self, channel: Channel, name: bytes) -> None:
        super().__init__()
        self._channel, self._name = channel, name
        self._enough = threading.Event()
        self.count = 0
        self.versions: set[int] = set()
        self.wrong: object = None
        self.start()

    def run(self) -> None:
        try:
            while not self._enough.is_set():
                self._channel.send(self._name + b" 1", timeout=LIMIT)
                name, count, total, *mean = self._channel.recv(timeout=LIMIT).split()
                self.count += 1
                self.versions.add(2 if mean else 1)
                said = (name, int(count), float(total), *map(float, mean))
                assert said == (self._name, self.count, self.count) + (1.0,) * len(mean), said
        except BaseException as error:
            self.wrong = error

    def finish(self) -> None:
        self._enough.set()
        self.join()

    def wait_for(self, version: int) -> None:
        """Until more answers came from this version, and it alone."""
        self.versions.clear()
        end = time.monotonic() + LIMIT
        while self.versions != {version} and self.wrong is None:
            assert time.monotonic() < end, f"answers come from {self.versions}, not from {version}"
            time.sleep(0.01)
            if version not in self.versions:
                self.versions.clear()
        assert self.wrong is None


@contextlib.contextmanager
def customers(running: Any, count: int) -> Iterator[list[Customer]]:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(running.connect())
        found = []
        for number in range(count):
            channel = stack.enter_context(client.open("tally"))
            found.append(Customer(channel, b"customer-%d" % number))
            stack.callback(found[-1].finish)
        yield found


def test_it_is_upgraded_and_rolled_back_under_customers_and_no_total_is_ever_wrong(
    kernel: Callable[..., Any],
) -> None:
    running = kernel(modules=FIRST.parent)
    with running.control(60.0) as control:
        control.call("module.start", name="tally", wait=True)
        with customers(running, 2) as found:
            for _ in range(2):
                for one in found:
                    one.wait_for(1)
                view = control.call("module.upgrade", name="tally", source=str(SECOND), bake=0.5, wait=True)
                assert view["outcome"] == "committed", view
                for one in found:
                    one.wait_for(2)
                view = control.call("module.rollback", name="tally", wait=True)
                assert view["outcome"] == "committed", view
            for one in found:
                one.wait_for(1)
        assert [one.wrong for one in found] == [None, None]
        assert all(one.count > 0 for one in found)


def test_it_is_killed_under_customers_and_no_total_is_ever_wrong(kernel: Callable[..., Any]) -> None:
    running = kernel(modules=FIRST.parent)
    with running.control(60.0) as control:
        control.call("module.start", name="tally", wait=True)
        with customers(running, 2) as found:
            for _ in range(3):
                for one in found:
                    one.wait_for(1)
                os.kill(control.call("module.show", name="tally")["pid"], signal.SIGKILL)
            for one in found:
                one.wait_for(1)
        assert [one.wrong for one in found] == [None, None]
