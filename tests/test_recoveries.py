"""Deaths that nobody planned are in the history of upgrades: why, how long nobody served, and how it ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from snap.ipc.protocol import UpgradeView
from snap.kernel.recoveries import SILENT_NS, Recovery
from tests.kernel_rig import Rig, run, running
from tests.test_upgrade import loaded, upgrade, write_sum


def kill(rig: Rig) -> int:
    """Kill the process that serves; its generation."""
    current = rig.kernel.runner("sums").current
    assert current is not None
    os.kill(current.pid or 0, signal.SIGKILL)
    return current.generation


def recoveries(rig: Rig) -> list[UpgradeView]:
    return [view for view in rig.kernel.upgrades.views("sums") if view.kind == "recovery"]


@pytest.mark.parametrize("standby", ["", "standby = true"], ids=["started again", "standby"])
def test_a_death_is_in_the_history_with_its_cause_and_its_blackout(tmp_path: Path, standby: str) -> None:
    write_sum(tmp_path / "modules", "one", module=standby)

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            runner = rig.kernel.runner("sums")
            if standby:
                await rig.until(lambda: runner.standby is not None and runner.standby.ready)
            dead = kill(rig)
            await rig.until(lambda: [view for view in recoveries(rig) if view.outcome])
            [view] = recoveries(rig)
            assert (view.phase, view.outcome, view.from_version, view.to_version) == (
                "done",
                "recovered",
                "one",
                "one",
            )
            assert "SIGKILL" in view.reason
            assert (view.from_generation, view.to_generation) == (dead, runner.machine.generation)
            assert view.to_generation > dead
            assert view.finished is not None and view.finished >= view.started
            [engine] = view.engines
            assert (engine.name, engine.stage) == ("main", "flipped")
            assert engine.blackout_ns >= 0
            await load.some()
            await rig.until(lambda: recoveries(rig)[0].client_gap_ns > 0)
            await upgrade(rig, write_sum(tmp_path / "new", "two", module=standby))
            kinds = [view.kind for view in rig.kernel.upgrades.views("sums")]
            assert kinds == ["recovery", "upgrade"]
            assert rig.event("module.recovery").data["id"] == view.id

    run(test())


def test_a_module_that_nobody_starts_again_is_given_up_in_the_history(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one", more='[restart]\npolicy = "never"\n')

    async def test() -> None:
        async with running(tmp_path, start=["sums"]) as rig:
            kill(rig)
            await rig.until(lambda: rig.kernel.runner("sums").machine.state == "failed")
            [view] = recoveries(rig)
            assert (view.phase, view.outcome) == ("done", "given_up")
            assert "policy is never" in view.reason
            assert view.engines[0].blackout_ns == -1

    run(test())


def test_a_module_that_is_stopped_or_started_again_by_an_operator_has_not_recovered(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")

    async def test() -> None:
        async with running(tmp_path, start=["sums"]) as rig:
            await rig.operate("module.restart", name="sums")
            await rig.operate("module.stop", name="sums")
            assert recoveries(rig) == []

    run(test())


@pytest.mark.parametrize(
    ("died", "beat", "first", "blackout"),
    [
        (1000, 900, 1500, 500),
        (2000, 900, 1500, 600),
        (900 + SILENT_NS + 1, 900, SILENT_NS + 5000, SILENT_NS + 4100),
        (2000, 0, 1500, 0),
        (1000, 900, 0, -1),
    ],
    ids=["death", "seen late", "hung before", "never showed", "took over unheard"],
)
def test_a_blackout_is_from_the_last_that_is_known_of_the_dead(
    died: int, beat: int, first: int, blackout: int
) -> None:
    view = UpgradeView(
        id=1,
        module="sums",
        kind="recovery",
        phase="blackout",
        outcome="",
        reason="",
        from_version="1",
        to_version="1",
        from_generation=1,
        to_generation=0,
        from_path="",
        to_path="",
        started=0.0,
    )
    assert Recovery(view, died, {"main": beat}).blackout_ns("main", first) == blackout
