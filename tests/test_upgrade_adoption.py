"""An upgrade whose kernel dies goes on with the next kernel, under a client that counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane import _native

from .test_adoption import Load, System
from .test_upgrade import write_sum

UNMOVED = ("prepared", "yield_sent")
"""Points at which no order to yield has left yet: it leaves when it is recorded."""
LONG = 3600.0


class Sums(Load):
    """Every answer is the next number, whoever serves."""

    def __init__(self, client: Any) -> None:
        self.versions: list[str] = []
        super().__init__(client, _native.ADAPTIVE, "sums")

    def check(self, got: bytes) -> None:
        number, version = got.decode().split()
        assert int(number) == self.count + 1, (got, self.count)
        if self.versions[-1:] != [version]:
            self.versions.append(version)


class Upgraded:
    """A kernel that dies when the test says, with module `sums` in version one, and two to upgrade to."""

    def __init__(self, system: System, base: Path, load: Sums) -> None:
        self.system, self.base, self.load = system, base, load
        self.number = 0

    def begin(self, bake: float = LONG, version: str = "new") -> None:
        source = str(self.base / version / "sums")
        answer = self.system.call("module.upgrade", name="sums", source=source, bake=bake, wait=False)
        self.number = answer["id"]

    def view(self) -> dict[str, Any]:
        view: dict[str, Any] = self.system.call("upgrade.show", id=self.number)
        return view

    def until_phase(self, phase: str) -> dict[str, Any]:
        self.system.until(lambda: self.view()["phase"] in (phase, "done"))
        view = self.view()
        assert view["phase"] == phase, view
        return view

    def process(self) -> tuple[int, int]:
        """Pid and generation of who serves."""
        return self.system.modules()["sums"]

    def kill_kernel(self, also: int = 0) -> None:
        """And process `also`, which no kernel sees dying."""
        self.system.kill(self.system.pid())
        if also:
            os.kill(also, signal.SIGKILL)
        self.system.start()

    def check(self) -> None:
        """It is ready, and its clients go on; the next upgrade does not care."""
        self.system.until(lambda: self.system.ready("sums"))
        self.load.more(self.system)
        self.begin(bake=0.0, version="modules")
        assert self.until_phase("done")["outcome"] == "committed"
        self.load.more(self.system)


@contextmanager
def upgraded(base: Path, schema: int = 1, respawn: bool = True) -> Iterator[Upgraded]:
    write_sum(base / "modules", "one")
    write_sum(base / "new", "two", schema)
    (base / "faults").mkdir()
    system = System(base, respawn, 20.0)
    system.command += ["--module-path", str(base / "modules")]
    system.start(faults=base / "faults")
    try:
        system.until(lambda: system.ready("sums"))
        with system.connect() as client:
            load = Sums(client)
            load.more(system)
            yield Upgraded(system, base, load)
            load.end()
    finally:
        system.stop()


@pytest.mark.parametrize("schema", [1, 2], ids=["same schema", "migration"])
@pytest.mark.parametrize("point", ["prepared", "yield_sent", "took", "bake", "commit"])
def test_an_upgrade_goes_on_with_the_next_kernel_wherever_the_one_before_died(
    tmp_path: Path, point: str, schema: int
) -> None:
    with upgraded(tmp_path, schema) as it:
        _, generation = it.process()
        (tmp_path / "faults" / f"kernel.{point}").write_text("kill")
        dead = it.system.pid()
        it.begin(bake=0.5)
        it.system.reborn(dead)
        view = it.until_phase("done")
        aborted = point in UNMOVED
        assert view["outcome"] == ("aborted" if aborted else "committed"), view
        assert it.process()[1] == (generation if aborted else view["to_generation"])
        it.load.more(it.system)
        assert it.load.versions == (["one"] if aborted else ["one", "two"])
        assert it.system.call("module.show", name="sums")["restarts"] == 0
        it.check()


def test_who_bakes_when_the_kernel_dies_bakes_again_and_can_be_rolled_back(tmp_path: Path) -> None:
    with upgraded(tmp_path, respawn=False) as it:
        before = it.process()
        it.begin()
        it.until_phase("bake")
        after = it.process()
        for _ in range(2):
            it.kill_kernel()
            it.until_phase("bake")
            assert it.process() == after
        it.load.more(it.system)
        it.system.call("module.rollback", name="sums", wait=False)
        assert it.until_phase("done")["outcome"] == "rolled_back"
        assert it.process() == before
        it.load.more(it.system)
        assert it.load.versions == ["one", "two", "one"]
        it.check()


@pytest.mark.parametrize("schema", [1, 2], ids=["same schema", "migration"])
def test_a_new_version_that_dies_with_the_kernel_is_rolled_back(tmp_path: Path, schema: int) -> None:
    with upgraded(tmp_path, schema, respawn=False) as it:
        before = it.process()
        it.begin()
        it.until_phase("bake")
        it.kill_kernel(it.process()[0])
        view = it.until_phase("done")
        assert view["outcome"] == "rolled_back"
        assert "died" in view["reason"]
        it.system.until(lambda: it.system.ready("sums"))
        assert (it.process() == before) == (schema == 1)
        it.load.more(it.system)
        assert it.load.versions in (["one", "two", "one"], ["one"])
        it.check()


def test_an_old_version_that_dies_with_the_kernel_is_not_missed(tmp_path: Path) -> None:
    with upgraded(tmp_path, respawn=False) as it:
        old, _ = it.process()
        it.begin()
        it.until_phase("bake")
        after = it.process()
        it.kill_kernel(old)
        it.until_phase("bake")
        assert it.process() == after
        it.load.more(it.system)


def test_an_old_version_that_dies_with_the_kernel_in_the_blackout_leaves_its_engines_to_the_new_one(
    tmp_path: Path,
) -> None:
    with upgraded(tmp_path, respawn=False) as it:
        old, _ = it.process()
        (tmp_path / "faults" / "kernel.took").write_text("kill")
        it.begin(bake=0.1)
        it.system.children[-1].wait()
        os.kill(old, signal.SIGKILL)
        it.system.start()
        view = it.until_phase("done")
        assert view["outcome"] == "committed"
        assert it.process()[1] == view["to_generation"]
        it.check()


def test_a_module_that_is_stopped_when_its_upgrade_goes_on_stops(tmp_path: Path) -> None:
    with upgraded(tmp_path, respawn=False) as it:
        it.load.end()
        it.begin()
        it.until_phase("bake")
        it.kill_kernel()
        it.system.call("module.stop", name="sums", wait=False)
        it.system.until(lambda: it.system.call("module.show", name="sums")["state"] == "stopped")
        assert it.view()["outcome"] == "aborted"
