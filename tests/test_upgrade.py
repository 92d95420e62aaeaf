"""Upgrades of real modules by a real kernel, under a client that checks every answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane.errors import (
    BusyError,
    DeniedError,
    ManifestError,
    NotFoundError,
    NotRunningError,
    RolledBackError,
    StateLostError,
    UsageError,
)
from snap.ipc import aconnect
from snap.ipc.channel import Channel
from snap.kernel.incarnation import Incarnation
from tests.kernel_rig import ECHO, PATIENCE, Rig, run, running, write_module

MANIFEST = """\
[module]
name = "{name}"
version = "{version}"
state_version = {schema}
{module}
[provides.{name}]
engine = "main"
[engines.main]
class = "engine:Sum"
state = "1MiB"
{more}
"""

SUM = """\
from snap.modules import Array, Engine, Module, Schema, Table, migrate

class Sum(Engine):
    schema = Schema(version={schema}, oldest=1, sums=Table(key="S8", row={row}, capacity=1024))

    def poll(self, budget):
        done = 0
        for channel in self.channels:
            messages = channel.take(budget)
            channel.answer([self.add(message) for message in messages])
            done += len(messages)
        return done

    def add(self, message):
        if message == b"poison":
            raise RuntimeError("this request kills me")
        count = self.state.sums.get(b"key", (0,) * {columns})[0] + 1
        self.state.sums[b"key"] = (count,) * {columns}
        return b"%d {label}" % count

{extra}
"""

ROWS = {1: '{"count": "u8"}', 2: '{"count": "u8", "again": "u8"}'}


def write_sum(
    base: Path,
    version: str,
    schema: int = 1,
    name: str = "sums",
    module: str = "",
    more: str = "",
    extra: str = "",
    says: int | None = None,
) -> Path:
    """Version `version` of a module that counts; its answers name it. `says`: the schema that its manifest claims."""
    code = (
        SUM.replace("{schema}", str(schema))
        .replace("{row}", ROWS[schema])
        .replace("{columns}", str(schema))
        .replace("{label}", version)
        .replace("{extra}", extra)
    )
    manifest = MANIFEST.format(name=name, version=version, schema=says or schema, module=module, more=more)
    write_module(base, name, code, manifest=manifest)
    return base / name


class Load:
    """A client that counts along: every answer must be the next number, whoever serves."""

    def __init__(self, channel: Channel) -> None:
        self.count = 0
        self.versions: list[str] = []
        self._channel = channel
        self._stopped = False
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._stopped:
            await self._channel.asend(b"more")
            number, version = (await self._channel.arecv(timeout=PATIENCE)).decode().split()
            self.count += 1
            assert int(number) == self.count
            if self.versions[-1:] != [version]:
                self.versions.append(version)

    async def some(self, more: int = 20) -> None:
        """Wait for some more answers."""
        goal = self.count + more
        async with asyncio.timeout(PATIENCE):
            while self.count < goal and not self._task.done():
                await asyncio.sleep(0.005)
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        self._stopped = True
        await self._task


@asynccontextmanager
async def loaded(base: Path, name: str = "sums", **rules: Any) -> AsyncIterator[tuple[Rig, Load]]:
    async with running(base, rules, start=[name]) as rig, await aconnect(rig.directory) as client:
        channel = await client.aopen(name)
        load = Load(channel)
        await load.some()
        yield rig, load
        await load.some()
        await load.stop()
        channel.close()


async def upgrade(
    rig: Rig, source: Path | str | None = None, bake: float = 0.0, **args: Any
) -> dict[str, Any]:
    view: dict[str, Any] = await rig.operate(
        "module.upgrade", name="sums", source=None if source is None else str(source), bake=bake, **args
    )
    return view


async def baking(rig: Rig, source: Path) -> int:
    """Begin an upgrade and wait for its bake; its id."""
    number: int = (await upgrade(rig, source, bake=60, wait=False))["id"]
    await rig.until(lambda: rig.kernel.upgrades.view(number).phase in ("bake", "done"))
    assert rig.kernel.upgrades.view(number).phase == "bake", rig.kernel.upgrades.view(number)
    return number


# -- upgrades that succeed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [1, 2], ids=["same schema", "migration"])
def test_an_upgrade_is_noticed_by_nobody_and_reported(tmp_path: Path, schema: int) -> None:
    write_sum(tmp_path / "modules", "one")
    new = write_sum(tmp_path / "new", "two", schema)

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            view = await upgrade(rig, new)
            await load.some()
            assert load.versions == ["one", "two"]
            assert (view["outcome"], view["phase"], view["kind"]) == ("committed", "done", "upgrade")
            assert (view["from_version"], view["to_version"]) == ("one", "two")
            (engine,) = view["engines"]
            assert (engine["stage"], engine["blackout_ns"] > 0) == ("flipped", True)
            assert (engine["migrated"] > 0) == (schema == 2)
            module = await rig.operate("module.show", name="sums")
            assert (module["state"], module["version"], module["faults"]) == ("ready", "two", 0)
            assert (await rig.operate("upgrade.history", name="sums")) == [view]
            assert (await rig.operate("upgrade.show", id=view["id"])) == view
            kinds = rig.kinds()
            assert kinds.count("upgrade.flip") == kinds.count("upgrade.done") == 1

    run(test())


def test_a_module_is_upgraded_to_what_its_directory_has_become_and_rolled_back(tmp_path: Path) -> None:
    place = write_sum(tmp_path / "modules", "one")

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            code = place / "engine.py"
            code.write_text(code.read_text().replace("one", "two"))
            toml = place / "module.toml"
            toml.write_text(toml.read_text().replace("one", "two"))
            await upgrade(rig)
            await load.some()
            view = await rig.operate("module.rollback", name="sums")
            assert (view["kind"], view["to_version"]) == ("rollback", "one")
            await load.some()
            await upgrade(rig, "two")
            await load.some()
            assert load.versions == ["one", "two", "one", "two"]

    run(test())


@pytest.mark.parametrize("schema", [1, 2], ids=["same schema", "migration"])
def test_a_rollback_in_the_bake_brings_back_what_the_new_version_wrote(tmp_path: Path, schema: int) -> None:
    write_sum(tmp_path / "modules", "one")
    new = write_sum(tmp_path / "new", "two", schema)

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            number = await baking(rig, new)
            await load.some()
            view = await rig.operate("module.rollback", name="sums")
            assert (view["id"], view["outcome"]) == (number, "rolled_back")
            await load.some()
            assert load.versions == ["one", "two", "one"]

    run(test())


def test_a_rollback_ends_an_upgrade_that_gets_ready_or_waits(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")
    write_sum(tmp_path / "modules", "one", name="above", more='[requires]\nservices = ["sums"]\n')
    new = write_sum(tmp_path / "new", "two", extra="import time; time.sleep(3600)")

    async def test() -> None:
        async with running(tmp_path, start=["above"]) as rig:
            before = rig.kernel.runner("sums").current
            first = await upgrade(rig, new, wait=False)
            second = await rig.operate("module.upgrade", name="above", wait=False)
            assert (first["phase"], second["phase"]) == ("brownout", "queued")
            for name, begun in (("above", second), ("sums", first)):
                view = await rig.operate("module.rollback", name=name)
                assert (view["id"], view["outcome"]) == (begun["id"], "aborted")
            runner = rig.kernel.runner("sums")
            assert runner.current is before and runner.ready
            await rig.until(lambda: runner.alive == {before})

    run(test())


def test_dependent_modules_are_upgraded_after_what_they_require(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")
    write_sum(tmp_path / "modules", "one", name="above", more='[requires]\nservices = ["sums"]\n')

    async def test() -> None:
        async with running(tmp_path, start=["above"]) as rig:
            first = await upgrade(rig, wait=False)
            second = await rig.operate("module.upgrade", name="above", bake=0.0, wait=False)
            assert second["phase"] == "queued"
            await rig.until(lambda: rig.kernel.upgrades.view(second["id"]).outcome)
            views = [rig.kernel.upgrades.view(each["id"]) for each in (first, second)]
            assert [view.outcome for view in views] == ["committed", "committed"]
            flips = [
                event.subject for event in rig.kernel.events.since(0, 1000) if event.kind == "upgrade.flip"
            ]
            assert flips == ["module:sums", "module:above"]

    run(test())


def test_a_client_that_waits_for_nothing_is_no_trouble(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")
    new = write_sum(tmp_path / "new", "two")

    async def test() -> None:
        async with running(tmp_path, start=["sums"]) as rig, await aconnect(rig.directory) as client:
            channel = await client.aopen("sums")
            waiting = asyncio.create_task(channel.arecv(timeout=20))
            view = await upgrade(rig, new, bake=3.0)
            assert view["outcome"] == "committed"
            await channel.asend(b"more")
            assert await waiting == b"1 two"
            channel.close()

    run(test())


def test_a_new_version_that_takes_no_messages_is_too_slow(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")
    new = write_sum(tmp_path / "new", "two", extra="Sum.poll = lambda self, budget: 0")

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            with pytest.raises(RolledBackError, match="none is taken"):
                await upgrade(rig, new, bake=20.0)
            await load.some()
            assert load.versions == ["one"]

    run(test())


def test_a_queued_upgrade_of_a_module_that_has_died_meanwhile_is_given_up(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")
    needs = '[requires]\nservices = ["sums"]\n[restart]\npolicy = "never"\n'
    write_sum(tmp_path / "modules", "one", name="above", more=needs)
    new = write_sum(tmp_path / "new", "two")

    async def test() -> None:
        async with running(tmp_path, start=["above"]) as rig:
            await baking(rig, new)
            queued = await rig.operate("module.upgrade", name="above", wait=False)
            os.kill(rig.kernel.runner("above").machine.pid or 0, signal.SIGKILL)
            await rig.until(lambda: rig.kernel.runner("above").machine.state == "failed")
            await rig.operate("module.rollback", name="sums")
            view = rig.kernel.upgrades.view(queued["id"])
            assert (view.outcome, "nothing to take over" in view.reason) == ("aborted", True)

    run(test())


# -- upgrades that do not ------------------------------------------------------------------------------------


def test_what_cannot_be_upgraded_to_is_refused_before_anything_happens(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")
    needy = write_sum(tmp_path / "needy", "two", more='[requires]\nservices = ["other"]\n')
    write_module(tmp_path / "modules", "other", ECHO)
    wider = write_sum(tmp_path / "wider", "two", more='[provides.more]\nengine = "main"\n')
    other = write_sum(tmp_path / "other", "two", name="else")
    rules = {
        "allow": [
            {"who": "owner", "service": "sums", "rights": ["connect", "send", "recv"]},
        ]
    }

    async def test() -> None:
        async with loaded(tmp_path, **rules) as (rig, load):
            for source, error in (
                (tmp_path / "nowhere", NotFoundError),
                ("7.0", NotFoundError),
                (needy, DeniedError),
                (wider, UsageError),
                (other, ManifestError),
            ):
                with pytest.raises(error):
                    await upgrade(rig, source)
            with pytest.raises(NotFoundError):
                await rig.operate("module.rollback", name="sums")
            with pytest.raises(NotRunningError):
                await rig.operate("module.upgrade", name="other")
            assert "upgrade.phase" not in rig.kinds()
            assert load.versions == ["one"]

    run(test())


def test_one_upgrade_at_a_time(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")
    new = write_sum(tmp_path / "new", "two")

    async def test() -> None:
        async with loaded(tmp_path) as (rig, _):
            await baking(rig, new)
            with pytest.raises(BusyError, match="under way"):
                await upgrade(rig, new)
            with pytest.raises(BusyError, match="under way"):
                await rig.operate("module.restart", name="sums")
            assert (await rig.operate("module.show", name="sums"))["upgrade"] is not None

    run(test())


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"extra": "import nothing_of_that_name"}, "nothing_of_that_name"),
        ({"says": 7}, "state_version"),
        ({"extra": "class Sick(Module):\n    def health(self):\n        return 'it hurts'"}, "it hurts"),
        ({"extra": "class Sick(Module):\n    def on_start(self):\n        raise OSError('no')"}, "no"),
    ],
    ids=["import", "lie", "health", "on_start"],
)
def test_a_version_that_does_not_get_ready_is_reported_and_the_old_one_serves(
    tmp_path: Path, made: dict[str, Any], reason: str
) -> None:
    write_sum(tmp_path / "modules", "one")
    if "Sick" in made.get("extra", ""):
        made = {**made, "module": 'entry = "engine:Sick"'}
    new = write_sum(tmp_path / "new", "two", **made)

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            with pytest.raises(RolledBackError, match=reason):
                await upgrade(rig, new)
            (view,) = await rig.operate("upgrade.history")
            assert view["outcome"] == "aborted"
            await load.some()
            assert load.versions == ["one"]

    run(test())


def test_a_state_of_a_newer_schema_than_the_code_knows_is_not_touched(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one", schema=2)
    older = write_sum(tmp_path / "old", "two", schema=1)
    code = tmp_path / "modules" / "sums" / "engine.py"
    code.write_text(code.read_text().replace("oldest=1", "oldest=2"))

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            with pytest.raises(RolledBackError):
                await upgrade(rig, older)
            assert load.versions == ["one"]

    run(test())


# -- deaths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "outcome", "versions"),
    [(signal.SIGKILL, "aborted", ["one"]), (signal.SIGSTOP, "committed", ["one", "two"])],
    ids=["killed", "stopped"],
)
def test_whatever_the_old_process_does_in_an_upgrade_somebody_serves(
    tmp_path: Path, number: signal.Signals, outcome: str, versions: list[str]
) -> None:
    write_sum(tmp_path / "modules", "one")
    new = write_sum(tmp_path / "new", "two")

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            old = rig.kernel.runner("sums").machine.pid or 0
            begun = await upgrade(rig, new, wait=False)
            os.kill(old, number)
            await rig.until(lambda: rig.kernel.upgrades.view(begun["id"]).outcome)
            assert rig.kernel.upgrades.view(begun["id"]).outcome == outcome
            await load.some()
            assert load.versions == versions

    run(test())


def test_a_new_version_that_dies_in_the_bake_is_rolled_back(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")
    new = write_sum(tmp_path / "new", "two")

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            number = await baking(rig, new)
            os.kill(rig.kernel.runner("sums").machine.pid or 0, signal.SIGKILL)
            with pytest.raises(RolledBackError, match="died"):
                await rig.kernel.upgrades.result(number, 20)
            await load.some()
            assert (load.versions[0], load.versions[-1]) == ("one", "one")
            module = await rig.operate("module.show", name="sums")
            assert (module["state"], module["version"]) == ("ready", "one")

    run(test())


def test_a_module_that_is_stopped_during_its_upgrade_is_stopped(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")
    new = write_sum(tmp_path / "new", "two")

    async def test() -> None:
        async with running(tmp_path, start=["sums"]) as rig:
            number = await baking(rig, new)
            assert (await rig.operate("module.stop", name="sums"))["state"] == "stopped"
            assert rig.kernel.upgrades.view(number).outcome == "aborted"
            assert rig.kernel.runner("sums").incarnations == []

    run(test())


def test_a_standby_takes_over_the_moment_that_its_module_dies(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one", module="standby = true")

    async def test() -> None:
        async with loaded(tmp_path) as (rig, load):
            runner = rig.kernel.runner("sums")
            for fault in (1, 2):
                await rig.until(lambda: runner.standby is not None and runner.standby.ready)
                first, second = runner.current, runner.standby
                assert first is not None and second is not None
                os.kill(first.pid or 0, signal.SIGKILL)
                await rig.until(lambda second=second: runner.current is second and runner.ready)
                await load.some()
                assert (runner.machine.faults, runner.machine.generation) == (fault, second.generation)
            assert (await rig.operate("module.show", name="sums"))["standby"] in ("starting", "ready")
            new = write_sum(tmp_path / "new", "two", module="standby = true")
            spawned: list[int] = []
            spawn = runner.spawn

            def watch(*what: Any) -> Incarnation:
                spawned.append(len(runner.alive))
                return spawn(*what)

            runner.spawn = watch  # type: ignore[method-assign]
            await upgrade(rig, new)
            await rig.until(lambda: runner.standby is not None and runner.standby.ready)
            await load.some()
            assert load.versions == ["one", "two"]
            assert spawned[-1] == 1, "the old version was still ending"

    run(test())


@pytest.mark.parametrize("standby", ["", "standby = true"], ids=["alone", "with a standby"])
def test_damage_that_is_met_while_serving_costs_the_state_at_once(tmp_path: Path, standby: str) -> None:
    """Nobody has to die of it first, nor does the standby go on with it."""
    write_sum(tmp_path / "modules", "one", module=standby)

    async def test() -> None:
        async with running(tmp_path, start=["sums"]) as rig, await aconnect(rig.directory) as client:
            runner = rig.kernel.runner("sums")
            channel = await client.aopen("sums")
            await channel.asend(b"more")
            assert await channel.arecv(timeout=10) == b"1 one"
            if standby:
                await rig.until(lambda: runner.standby is not None and runner.standby.ready)
            before = runner.standby or runner.current
            fd = runner.states.seats["main"].segment.fd
            row = os.pread(fd, os.fstat(fd).st_size, 0).index(b"key\0\0\0\0\0") + 8
            os.pwrite(fd, b"\x07", row)
            await channel.asend(b"more")
            with pytest.raises(StateLostError):
                await channel.arecv(timeout=20)
            assert "sums" in rig.event("state.poisoned").data["reason"]
            channel = await channel.areopen()
            await channel.asend(b"more")
            assert await channel.arecv(timeout=10) == b"1 one"
            assert runner.current is not None and before is not None
            assert runner.current.generation == before.generation + 1
            kinds = [event.kind for event in rig.kernel.events.since(0, 10_000)]
            assert kinds.count("state.refused") == 1
            channel.close()

    run(test())


def test_state_that_kills_who_adopts_it_is_set_aside_and_its_clients_are_told(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")

    async def test() -> None:
        async with running(tmp_path, start=["sums"]) as rig, await aconnect(rig.directory) as client:
            channel = await client.aopen("sums")
            await channel.asend(b"more")
            assert await channel.arecv(timeout=10) == b"1 one"
            await channel.asend(b"poison")
            with pytest.raises(StateLostError):
                await channel.arecv(timeout=20)
            event = rig.event("state.poisoned")
            assert Path(event.data["kept"]).stat().st_size > 0
            channel = await channel.areopen()
            await channel.asend(b"more")
            assert await channel.arecv(timeout=10) == b"1 one"
            channel.close()

    run(test())


def test_no_semaphore_outlives_its_module(tmp_path: Path) -> None:
    write_sum(tmp_path / "modules", "one")

    async def test() -> None:
        async with running(tmp_path, start=["sums"]) as rig:
            number = rig.kernel.runner("sums").states.seats["main"].semaphore
            assert f" {number} " in semaphores()
            await rig.operate("module.stop", name="sums")
            assert f" {number} " not in semaphores()

    run(test())


def semaphores() -> str:
    return subprocess.run(["ipcs", "-s"], capture_output=True, text=True, check=True).stdout
