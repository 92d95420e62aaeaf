"""A request that changes something is answered once, however often it is made, and whichever kernel hears it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane.errors import BusyError, NotFoundError, SnapError
from snap.ipc.control import ControlClient
from snap.kernel.answers import INHERITED, KNOWN, Answers

from .kernel_rig import ECHO, write_module
from .test_adoption import PATIENCE, System, system
from .test_upgrade_adoption import LONG, upgraded

HELD = "import pathlib, time\nwhile pathlib.Path({hold!r}).exists():\n    time.sleep(0.02)\n"


def ask(it: System, op: str, **args: Any) -> Any:
    with ControlClient(it.directory, PATIENCE) as control:
        return control.call(op, key="a key", **args)


@contextmanager
def asking(it: System, op: str, **args: Any) -> Iterator[None]:
    """Meanwhile somebody waits for an answer, which a kernel that dies never gives."""
    errors: list[SnapError] = []

    def wait() -> None:
        try:
            ask(it, op, **args)
        except SnapError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()
    assert errors


def state(it: System, name: str) -> str:
    return str(it.call("module.show", name=name)["state"])


def test_what_was_answered_is_answered_again_by_the_next_kernel_and_not_done_again(tmp_path: Path) -> None:
    with system(tmp_path) as it:
        answer = ask(it, "module.stop", name="echo")
        it.call("module.start", name="echo")
        for _ in range(2):
            dead = it.pid()
            it.kill(dead)
            it.reborn(dead)
            assert ask(it, "module.stop", name="echo") == answer
            assert state(it, "echo") == "ready"


def test_a_refusal_is_an_answer_too(tmp_path: Path) -> None:
    with system(tmp_path) as it:
        with pytest.raises(NotFoundError):
            ask(it, "cap.revoke", id=1 << 20)
        dead = it.pid()
        it.kill(dead)
        it.reborn(dead)
        with pytest.raises(NotFoundError):
            ask(it, "module.stop", name="echo")
        assert state(it, "echo") == "ready"


def test_an_upgrade_that_outlives_its_kernel_is_the_same_to_who_asks_again(tmp_path: Path) -> None:
    with upgraded(tmp_path, respawn=False) as it:
        wish = {"name": "sums", "source": str(tmp_path / "new" / "sums"), "bake": LONG}
        with asking(it.system, "module.upgrade", **wish):
            it.system.until(lambda: it.system.call("upgrade.history"))
            it.number = it.system.call("upgrade.history")[-1]["id"]
            it.until_phase("bake")
            it.kill_kernel()
        it.system.call("module.rollback", name="sums", wait=False)
        answer = ask(it.system, "module.upgrade", **wish)
        assert (answer["id"], answer["outcome"]) == (it.number, "rolled_back")
        assert len(it.system.call("upgrade.history")) == 1


@contextmanager
def restarting(base: Path) -> Iterator[tuple[System, Path]]:
    """A kernel whose forerunner died as it restarted module `slow`, which starts as soon as the file is gone."""
    hold = base / "hold"
    write_module(base / "modules", "slow", HELD.format(hold=str(hold)) + ECHO)
    it = System(base, respawn=False, grace=20.0)
    it.command += ["--module-path", str(base / "modules")]
    it.start()
    try:
        it.until(lambda: it.ready("slow"))
        hold.touch()
        with asking(it, "module.restart", name="slow"):
            it.until(lambda: state(it, "slow") == "starting")
            it.kill(it.pid())
        it.start()
        yield it, hold
    finally:
        it.stop()


def test_a_restart_that_outlives_its_kernel_is_awaited_and_not_begun_again(tmp_path: Path) -> None:
    with restarting(tmp_path) as (it, hold):
        release = threading.Timer(0.5, hold.unlink)
        release.start()
        assert ask(it, "module.restart", name="slow")["state"] == "ready"
        release.join()
        assert it.call("kernel.status")["events"]["module.stopping"] == 1


def test_what_took_its_place_meanwhile_is_said(tmp_path: Path) -> None:
    with restarting(tmp_path) as (it, hold):
        it.call("module.start", name="slow", wait=False)
        with pytest.raises(BusyError, match="replaced by a start"):
            ask(it, "module.restart", name="slow")
        hold.unlink()
        it.until(lambda: it.ready("slow"))


# -- without a kernel -----------------------------------------------------------------------------------------


def answered(count: int) -> Answers:
    answers = Answers()
    for number in range(count):
        answers.ticket(1, str(number)).answer = b"%d" % number
    return answers


def test_the_latest_are_left_to_the_next_kernel_in_order() -> None:
    answers = answered(INHERITED + 5)
    answers.ticket(1, "nothing came of it")
    answers.ticket(1, "begun").begun = 0
    record = answers.record()
    assert [row[1] for row in record] == [*(str(number) for number in range(7, INHERITED + 5)), "begun"]
    restored = Answers()
    restored.restore(record)
    assert restored.record() == record
    assert restored.ticket(1, "9").answer == b"9"
    assert restored.ticket(1, "begun").begun == 0


def test_keys_are_their_users_own_and_the_oldest_are_forgotten() -> None:
    answers = answered(KNOWN)
    assert answers.ticket(1, "0").answer == b"0"
    assert answers.ticket(2, "0").answer is None
    assert answers.ticket(1, "0").answer is None
