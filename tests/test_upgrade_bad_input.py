"""Versions that must not get in, and state that must not be adopted: who served goes on, the report says why, nothing is
lost. Real kernels and modules; the versions are those of the torture."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snap import ipc
from snap.dataplane import _native
from snap.ipc import Channel, SnapError, StateLostError
from tests.torture import ops, versions
from tests.torture.world import HANGING, PATIENCE, World

SEED = 11
FAST = [version for version in versions.BAD if not (version.slow or version.loses_state)]
SLOW = [version for version in versions.BAD if version.slow]


@pytest.fixture
def world() -> Iterator[World]:
    # Short, for the paths of Unix sockets are.
    with tempfile.TemporaryDirectory(prefix="snap-bad-") as folder:
        one = World(Path(folder), SEED)
        try:
            one.start_kernel()
            yield one
            one.stop_kernel()
        finally:
            one.end_all()


class Caller:
    """A client in this process that knows what every answer must be."""

    def __init__(self, channel: Channel, number: int = 1) -> None:
        self.channel = channel
        self.model = ops.Model(SEED, number)

    def ask(self, count: int = 100) -> set[int]:
        """Do `count` operations; the versions that answered. Raises Wrong."""
        versions = set()
        for number in range(self.model.state.ops + 1, self.model.state.ops + count + 1):
            self.channel.send(self.model.message(number), timeout=PATIENCE)
            answer = self.channel.recv(PATIENCE)
            self.model.check_answer(answer)
            versions.add(ops.ANSWER.unpack_from(answer)[1])
        return versions

    def check_state(self) -> None:
        self.channel.send(ops.dump_request(self.model.client))
        self.model.check_dump(self.channel.recv(PATIENCE))


@pytest.fixture
def caller(world: World) -> Iterator[Caller]:
    with ipc.open_channel("tally", world.runtime, "test", PATIENCE) as channel:
        yield Caller(channel)


def upgrade(world: World, version: str) -> dict[str, Any]:
    """Raises SnapError when it is refused."""
    source = str(world.versions[version])
    view = world.call("module.upgrade", name="tally", source=source, bake=0.5, rollback=True, wait=False)
    return until_done(world, view["id"])


def until_done(world: World, number: int) -> dict[str, Any]:
    world.until(
        "the upgrade to end", lambda: world.ask("upgrade.show", id=number)["phase"] == "done", HANGING
    )
    view: dict[str, Any] = world.ask("upgrade.show", id=number)
    return view


def refuse(world: World, caller: Caller, version: versions.Version) -> None:
    """It does not get in, while `caller` is served."""
    caller.ask()
    before = world.module()
    try:
        view = upgrade(world, version.name)
    except SnapError as error:
        outcome, reason = "refused", str(error)
    else:
        outcome, reason = view["outcome"], view["reason"]
        assert view["from_version"] == before["version"]
    assert outcome in version.outcomes, reason
    assert reason and re.search(version.reason, reason), reason
    after = world.settle()
    assert (after["version"], after["path"]) == (before["version"], before["path"])
    assert caller.ask() == {versions.ALL[before["version"]].number}
    caller.check_state()


@pytest.mark.parametrize("version", FAST, ids=lambda version: version.name)
def test_a_version_that_fails_leaves_the_one_before_serving_and_says_why(
    world: World, caller: Caller, version: versions.Version
) -> None:
    refuse(world, caller, version)


@pytest.mark.slow
@pytest.mark.parametrize("version", SLOW, ids=lambda version: version.name)
def test_a_version_that_hangs_is_found_out(world: World, caller: Caller, version: versions.Version) -> None:
    refuse(world, caller, version)


def test_the_generation_that_served_is_not_even_started_anew_by_an_aborted_upgrade(
    world: World, caller: Caller
) -> None:
    before = world.module()
    assert upgrade(world, "does_not_import")["outcome"] == "aborted"
    after = world.settle()
    assert (after["pid"], after["generation"]) == (before["pid"], before["generation"])
    assert caller.ask() == {10}


def test_what_failed_does_not_stand_in_the_way_of_what_works(world: World, caller: Caller) -> None:
    caller.ask()
    assert upgrade(world, "raises_in_migration")["outcome"] == "aborted"
    assert upgrade(world, "dies_in_bake")["outcome"] == "rolled_back"
    caller.ask()
    assert upgrade(world, "two")["outcome"] == "committed"
    assert caller.ask() == {20}
    caller.check_state()


def test_an_upgrade_to_itself_changes_nothing(world: World, caller: Caller) -> None:
    caller.ask()
    assert upgrade(world, "one")["outcome"] == "committed"
    assert caller.ask() == {10}
    caller.check_state()


def test_a_second_upgrade_at_the_same_time_is_refused(world: World, caller: Caller) -> None:
    source = str(world.versions["one_again"])
    first = world.call("module.upgrade", name="tally", source=source, bake=2.0, rollback=True, wait=False)
    with pytest.raises(ipc.BusyError):
        upgrade(world, "two")
    assert until_done(world, first["id"])["outcome"] == "committed"
    assert caller.ask() == {11}


@pytest.mark.parametrize("source", ["/nowhere/tally", "9.9.9"])
def test_a_source_that_is_not_there_is_refused_before_anything_starts(
    world: World, caller: Caller, source: str
) -> None:
    with pytest.raises(SnapError, match=re.escape(source)):
        world.call("module.upgrade", name="tally", source=source, bake=0.5, rollback=True, wait=False)
    assert caller.ask() == {10}


def test_a_version_that_corrupts_a_table_is_stopped_and_its_clients_are_told(
    world: World, caller: Caller
) -> None:
    """Bytes that a wild store destroyed are nowhere else: this is the one that can cost state."""
    caller.ask()
    world.call(
        "module.upgrade", name="tally", source=str(world.versions["corrupts_a_table"]), bake=1.0, rollback=True,
        wait=False,
    )  # fmt: skip
    with pytest.raises(StateLostError):
        while True:
            caller.ask()
    reopened(world, caller, version=10)


def test_damaged_state_is_refused_kept_and_reported_and_its_clients_are_told(
    world: World, caller: Caller
) -> None:
    caller.ask()
    damage(world)
    os.kill(world.module()["pid"], signal.SIGKILL)
    with pytest.raises(StateLostError):
        caller.ask(100_000)
    reopened(world, caller, version=10)


@pytest.mark.parametrize("offset", [0, 64], ids=lambda offset: f"byte {offset}")
def test_state_whose_head_is_damaged_is_refused_as_well(world: World, caller: Caller, offset: int) -> None:
    caller.ask()
    fd = state_fd(world)
    os.kill(world.module()["pid"], signal.SIGSTOP)
    os.pwrite(fd, b"\xff" * 64, offset)
    os.close(fd)
    os.kill(world.module()["pid"], signal.SIGKILL)
    with pytest.raises(StateLostError):
        caller.ask(100_000)
    reopened(world, caller, version=10)


def state_fd(world: World) -> int:
    """The state segment of the tally, by a descriptor of the kernel's."""
    (kernel,) = world.processes("kernel")
    for entry in Path(f"/proc/{kernel}/fd").iterdir():
        if "memfd:" in str(entry.readlink()):
            fd = os.open(entry, os.O_RDWR | os.O_CLOEXEC)
            try:
                state = _native.State(fd, writable=False)
                if [one["name"] for one in state.header["objects"]][:1] == ["rows"]:
                    return fd
            except (SnapError, OSError, ValueError):
                pass
            os.close(fd)
    raise AssertionError("no state segment")


def damage(world: World) -> None:
    """Other bytes in the row of a live slot, as a wild store of anybody would leave it."""
    fd = state_fd(world)
    try:
        state = _native.State(fd, writable=False)
        table = state.table("rows")
        slots = np.frombuffer(table.view(), np.uint8).reshape(-1, table.slot)
        live = bytes(slots[slots[:, 4:8].view(np.uint32)[:, 0] == 1][0])
        content = os.pread(fd, os.fstat(fd).st_size, 0)
        os.pwrite(fd, bytes(byte ^ 0x5A for byte in live[-8:]), content.index(live) + len(live) - 8)
        state.close()
    finally:
        os.close(fd)


def reopened(world: World, caller: Caller, version: int) -> None:
    """What was damaged is kept and reported; a channel that is opened again works on state that is sound."""
    channel = caller.channel.reopen(PATIENCE)
    again = Caller(channel, number=2)
    assert again.ask() == {version}
    again.check_state()
    channel.close()
    world.settle()
    kept = list((world.runtime / "poisoned").glob("tally.main.*.state"))
    assert len(kept) == 1 and kept[0].stat().st_mode & 0o777 == 0o600
    told = [event for event in world.ask("events.since", seq=0) if event["kind"] == "state.poisoned"]
    assert told and told[0]["subject"].startswith("module:tally")


def test_a_module_that_is_killed_twice_by_its_state_gets_other_state(world: World, caller: Caller) -> None:
    """One death is bad luck of the process, the second in a row before a whole poll is the state's fault."""
    caller.ask()
    before = world.module()
    for _ in range(2):
        fault = world.faults / "module.took"
        fault.write_text("kill")
        with contextlib.suppress(ProcessLookupError):
            os.kill(before["pid"], signal.SIGKILL)
        world.until("the next one to die", lambda: not any(world.faults.iterdir()))
    with pytest.raises(StateLostError):
        caller.ask(100_000)
    assert world.settle()["generation"] >= before["generation"] + 3
    reopened(world, caller, version=10)
