"""`snapctl upgrade` and `rollback` against a kernel that plays a script: what is asked, told, and returned."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
from msgspec.structs import replace

from snap.cli import output
from snap.cli.commands._base import duration
from snap.cli.commands._progress import news, picture
from snap.cli.commands.upgrade import in_order
from snap.ipc.protocol import ModuleView, Response, UpgradeEngineView, UpgradeView
from tests.cli_rig import SNAPCTL, PlayedKernel, complete, data, interrupt, snapctl, start

ENGINE = UpgradeEngineView(name="main")
QUEUED = UpgradeView(
    id=7,
    module="shaper",
    kind="upgrade",
    phase="queued",
    outcome="",
    reason="",
    from_version="1.0",
    to_version="1.1",
    from_generation=3,
    to_generation=4,
    from_path="/old/shaper",
    to_path="/new/shaper",
    started=1_700_000_000.0,
    bake_seconds=30.0,
    engines=[ENGINE],
)


def at(phase: str, view: UpgradeView = QUEUED, **engine: Any) -> UpgradeView:
    return replace(view, phase=phase, engines=[replace(ENGINE, **engine)])


CONVERTING = at("brownout", stage="convert", done=500, total=1000, rounds=2)
FLIPPED = {
    "stage": "flipped",
    "done": 1000,
    "total": 1000,
    "rounds": 2,
    "migrated": 1000,
    "converted": 3,
    "blackout_ns": 142_000,
}
BAKING = at("bake", **FLIPPED)
COMMITTED = replace(
    at("done", **FLIPPED),
    outcome="committed",
    finished=1_700_000_031.5,
    brownout_seconds=1.25,
    client_gap_ns=310_000,
)
ROLLED_BACK = replace(COMMITTED, outcome="rolled_back", reason="it died: signal 11")
ABORTED = replace(at("done"), outcome="aborted", reason="it does not import: no module named 'x'")
STORY = [CONVERTING, BAKING, COMMITTED]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[PlayedKernel]:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    played = PlayedKernel(directory)
    yield played
    played.close()


def plays(*views: UpgradeView) -> Callable[[Any], UpgradeView]:
    """Answers with one after the other, and with the last for ever."""
    left = list(views)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def asked(kernel: PlayedKernel, op: str) -> list[dict[str, Any]]:
    return [request.args for request in kernel.asked if request.op == op]


# -- what is asked ----------------------------------------------------------------------------------------------

DEFAULT = {"bake": 30.0, "rollback": True, "wait": False}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("shaper", {"name": "shaper", "source": None}),
        ("shaper 1.0", {"name": "shaper", "source": "1.0"}),
        ("shaper {folder}/shaper", {"name": "shaper", "source": "{folder}/shaper"}),
        ("shaper not/there", {"name": "shaper", "source": "{folder}/not/there"}),
        ("shaper shaper", {"name": "shaper", "source": "{folder}/shaper"}),
        ("./shaper", {"name": "shaper", "source": "{folder}/shaper"}),
        ("./history", {"name": "history", "source": "{folder}/history"}),
        ("-- history", {"name": "history", "source": None}),
        ("--bake 500ms --no-rollback shaper", {"name": "shaper", "source": None, "bake": 0.5, "rollback": False}),
        ("shaper --bake 2m", {"name": "shaper", "source": None, "bake": 120.0}),
    ],
)  # fmt: skip
def test_what_is_written_becomes_what_is_asked(
    words: str,
    expected: dict[str, Any],
    kernel: PlayedKernel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "shaper").mkdir()
    monkeypatch.chdir(tmp_path)
    kernel.answers["module.upgrade"] = COMMITTED
    done = snapctl("upgrade", "--runtime-dir", kernel.directory, *words.format(folder=tmp_path).split())
    assert done.returncode == 0, done.stderr
    wanted = {**DEFAULT, **expected}
    if wanted["source"]:
        wanted["source"] = wanted["source"].format(folder=tmp_path)
    assert asked(kernel, "module.upgrade") == [wanted]


@pytest.mark.parametrize(
    ("words", "source"), [("--kernel", None), ("--kernel /opt/snap", "/opt/snap"), ("--kernel 1.3", "1.3")]
)
def test_a_kernel_is_upgraded_by_its_own_operation(
    words: str, source: str | None, kernel: PlayedKernel
) -> None:
    view = replace(COMMITTED, kind="kernel", module="", engines=[])
    kernel.answers["kernel.upgrade"] = view
    done = snapctl("upgrade", *words.split(), "--runtime-dir", kernel.directory)
    assert done.returncode == 0, done.stderr
    assert "7 of the kernel" in done.stdout
    assert asked(kernel, "kernel.upgrade") == [{"source": source}]


def test_a_rollback_asks_for_one(kernel: PlayedKernel) -> None:
    view = replace(COMMITTED, kind="rollback")
    kernel.answers |= {"module.rollback": replace(QUEUED, kind="rollback"), "upgrade.show": view}
    done = snapctl("rollback", "shaper", "--runtime-dir", kernel.directory)
    assert done.returncode == 0, done.stderr
    assert "rollback: 7 of shaper" in done.stdout
    assert asked(kernel, "module.rollback") == [{"name": "shaper", "wait": False}]


def test_a_rollback_of_an_upgrade_that_bakes_ends_that_one_and_is_what_was_wanted(
    kernel: PlayedKernel,
) -> None:
    kernel.answers |= {"module.rollback": BAKING, "upgrade.show": ROLLED_BACK}
    done = snapctl("rollback", "shaper", "--runtime-dir", kernel.directory)
    assert done.returncode == 0, done.stderr
    assert "rolled back" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--all shaper",
        "--kernel --all",
        "shaper --kernel",
        "--all --no-wait",
        "--kernel --bake 3s",
        "--kernel --no-rollback",
        "./shaper 1.0",
        "shaper --bake 1e3",
        "shaper --bake -1s",
        "shaper --bake 3d",
        "shaper --bake nan",
        "show seven",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_wrong_usage_and_asks_nothing(words: str, kernel: PlayedKernel) -> None:
    done = snapctl("upgrade", *words.split(), "--runtime-dir", kernel.directory)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert kernel.asked == []


# -- following --------------------------------------------------------------------------------------------------


def test_an_upgrade_is_followed_line_by_line_and_ends_with_a_report(kernel: PlayedKernel) -> None:
    kernel.answers |= {"module.upgrade": QUEUED, "upgrade.show": plays(*STORY)}
    done = snapctl("upgrade", "shaper", "--runtime-dir", kernel.directory)
    assert done.returncode == 0, done.stderr
    assert [line.strip().partition(":")[0] for line in done.stderr.splitlines()] == [
        "upgrade 7 of shaper",
        "queued",
        "brownout",
        "engine main",
        "engine main",
        "bake",
    ]
    assert "convert 500/1000 round 2" in done.stderr
    assert "flipped after 142 µs, 3 rows converted meanwhile" in done.stderr
    for words in ("committed", "1.25", "30 s", "waited at most 310 µs", "31.5 s"):
        assert words in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["main", "flipped", "142", "µs", "1000", "2", "3"]
    assert asked(kernel, "upgrade.show") == [{"id": 7}] * 3


def test_nothing_is_shown_of_its_course_when_nobody_watches(kernel: PlayedKernel) -> None:
    kernel.answers |= {"module.upgrade": QUEUED, "upgrade.show": plays(*STORY)}
    done = snapctl("upgrade", "shaper", "--no-watch", "--runtime-dir", kernel.directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert "committed" in done.stdout


def test_json_is_the_view_alone(kernel: PlayedKernel) -> None:
    kernel.answers |= {"module.upgrade": QUEUED, "upgrade.show": plays(*STORY)}
    found = data(snapctl("upgrade", "shaper", "-o", "json", "--runtime-dir", kernel.directory))
    assert (found["kind"], found["operation"], found["outcome"]) == ("Upgrade", "upgrade", "committed")
    assert found["engines"][0]["blackout_ns"] == 142_000
    assert (found["finished"], found["finished_ns"]) == (
        "2023-11-14T22:13:51.500Z",
        1_700_000_031_500_000_000,
    )


@pytest.mark.parametrize("end", [ROLLED_BACK, ABORTED], ids=["rolled back", "aborted"])
def test_8_the_old_version_serves_on_and_the_reason_is_told(end: UpgradeView, kernel: PlayedKernel) -> None:
    kernel.answers |= {"module.upgrade": QUEUED, "upgrade.show": end}
    done = snapctl("upgrade", "shaper", "--no-watch", "-o", "json", "--runtime-dir", kernel.directory)
    assert done.returncode == 8
    assert json.loads(done.stdout)["outcome"] == end.outcome
    message, hint, error = done.stderr.splitlines()
    assert end.reason in message
    assert "1.0 serves on" in hint
    assert json.loads(error)["code"] == "rolled_back"


def test_6_a_module_that_is_being_upgraded_is_busy(kernel: PlayedKernel) -> None:
    kernel.answers["module.upgrade"] = Response(key="", ok=False, code="busy", message="upgrade 6 runs")
    done = snapctl("upgrade", "shaper", "--runtime-dir", kernel.directory)
    assert (done.returncode, done.stdout) == (6, "")
    assert "upgrade 6 runs" in done.stderr


def test_7_it_goes_on_when_the_patience_ends(kernel: PlayedKernel) -> None:
    kernel.answers |= {"module.upgrade": QUEUED, "upgrade.show": CONVERTING}
    done = snapctl("upgrade", "shaper", "--timeout", 0.3, "--runtime-dir", kernel.directory)
    assert (done.returncode, done.stdout) == (7, "")
    assert "in its brownout" in done.stderr
    assert "`snapctl upgrade show 7 --watch`" in done.stderr


def test_130_ctrl_c_ends_the_watching_and_says_that_the_upgrade_goes_on(kernel: PlayedKernel) -> None:
    kernel.answers |= {"module.upgrade": QUEUED, "upgrade.show": BAKING}
    process = start("upgrade", "shaper", "--runtime-dir", kernel.directory)
    assert process.stderr is not None
    while not process.stderr.readline().strip().startswith("bake"):
        pass
    status, out, said = interrupt(process)
    assert (status, out) == (130, "")
    assert "upgrade 7 of shaper goes on: `snapctl upgrade show 7 --watch`" in said


def test_who_does_not_wait_is_told_how_to_follow(kernel: PlayedKernel) -> None:
    kernel.answers["module.upgrade"] = QUEUED
    done = snapctl("upgrade", "shaper", "--no-wait", "-o", "name", "--runtime-dir", kernel.directory)
    assert (done.returncode, done.stdout) == (0, "7\n")
    assert "`snapctl upgrade show 7 --watch`" in done.stderr
    assert asked(kernel, "upgrade.show") == []


def test_one_that_runs_is_followed_by_its_number(kernel: PlayedKernel) -> None:
    kernel.answers["upgrade.show"] = plays(CONVERTING, BAKING, ROLLED_BACK)
    done = snapctl("upgrade", "show", 7, "--watch", "--runtime-dir", kernel.directory)
    assert done.returncode == 8
    assert "rolled back" in done.stdout
    assert "it died: signal 11" in done.stdout
    assert "  bake: " in done.stderr


def test_a_kernel_that_dies_meanwhile_is_waited_for(kernel: PlayedKernel) -> None:
    kernel.answers |= {"module.upgrade": QUEUED, "upgrade.show": CONVERTING}
    process = start("upgrade", "shaper", "--runtime-dir", kernel.directory)
    assert process.stderr is not None
    while "brownout" not in process.stderr.readline():
        pass
    kernel.close()
    while "does not answer" not in process.stderr.readline():
        pass
    second = PlayedKernel(kernel.directory)
    try:
        second.answers["upgrade.show"] = COMMITTED
        out, said = process.communicate(timeout=30)
    finally:
        second.close()
    assert (process.returncode, said.count("does not answer")) == (0, 0), said
    assert "committed" in out


def test_on_a_terminal_a_picture_is_drawn_and_the_report_is_all_that_stays_in_the_output(
    kernel: PlayedKernel,
) -> None:
    kernel.answers |= {
        "module.upgrade": QUEUED,
        "upgrade.show": plays(*[CONVERTING] * 3, *[BAKING] * 3, COMMITTED),
    }
    near, far = pty.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        with suppress(OSError):
            while piece := os.read(near, 4096):
                drawn.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    process = subprocess.Popen(
        [*SNAPCTL, "upgrade", "shaper", "--runtime-dir", str(kernel.directory)],
        stdout=subprocess.PIPE,
        stderr=far,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(far)
    out, _ = process.communicate(timeout=30)
    reader.join()
    os.close(near)
    shown = b"".join(drawn).decode()
    assert process.returncode == 0, shown
    for words in ("upgrade 7 of shaper", "500/1000 round 2", "142 µs", "s left"):
        assert words in shown
    assert "s left" not in out
    assert "committed" in out


# -- all of them ------------------------------------------------------------------------------------------------


def module(
    tmp_path: Path, name: str, on_disk: str, *requires: str, pid: int | None = 5, version: str = "1"
) -> ModuleView:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "module.toml").write_text(
        f'[module]\nname = "{name}"\nversion = "{on_disk}"\n[engines.main]\nclass = "native:echo"\n'
    )
    return ModuleView(
        name=name,
        version=version,
        state="ready",
        cause="",
        pid=pid,
        generation=1,
        restarts=0,
        faults=0,
        since=0,
        path=str(folder),
        provides=[name],
        requires=list(requires),
    )


@pytest.fixture
def several(tmp_path: Path, kernel: PlayedKernel) -> PlayedKernel:
    """`top` needs `middle` needs `base`; `same` has not changed, `stopped` does not run."""
    kernel.answers["module.list"] = [
        module(tmp_path, "top", "2", "middle"),
        module(tmp_path, "middle", "2", "base"),
        module(tmp_path, "same", "1"),
        module(tmp_path, "stopped", "2", pid=None),
        module(tmp_path, "base", "2"),
    ]
    return kernel


def test_all_that_changed_is_upgraded_providers_first(several: PlayedKernel) -> None:
    several.answers["module.upgrade"] = lambda asked: replace(COMMITTED, module=asked["name"])
    found = data(
        snapctl("upgrade", "--all", "--bake", "1s", "-o", "json", "--runtime-dir", several.directory)
    )
    assert (found["kind"], [view["module"] for view in found["items"]]) == (
        "UpgradeList",
        ["base", "middle", "top"],
    )
    assert all(args["bake"] == 1.0 and args["source"] is None for args in asked(several, "module.upgrade"))


def test_all_ends_at_the_first_that_fails_and_names_the_rest(several: PlayedKernel) -> None:
    several.answers["module.upgrade"] = lambda asked: replace(
        ABORTED if asked["name"] == "middle" else COMMITTED, module=asked["name"]
    )
    done = snapctl("upgrade", "--all", "--runtime-dir", several.directory)
    assert done.returncode == 8
    assert "not upgraded: top" in done.stderr
    assert "middle to 1.1 was given up" in done.stderr
    assert len(asked(several, "module.upgrade")) == 2


def test_all_without_any_change_does_nothing(kernel: PlayedKernel, tmp_path: Path) -> None:
    kernel.answers["module.list"] = [module(tmp_path, "same", "1")]
    done = snapctl("upgrade", "--all", "-o", "json", "--runtime-dir", kernel.directory)
    assert data(done)["items"] == []
    assert "is the one that its directory holds" in done.stderr


def test_all_with_a_broken_manifest_upgrades_none(several: PlayedKernel, tmp_path: Path) -> None:
    (tmp_path / "top" / "module.toml").write_text("[module]\n")
    done = snapctl("upgrade", "--all", "--runtime-dir", several.directory)
    assert done.returncode == 2
    assert "top/module.toml" in done.stderr
    assert asked(several, "module.upgrade") == []


def test_the_order_is_providers_first_whatever_the_list_says(tmp_path: Path) -> None:
    views = [
        module(tmp_path, "a", "1", "b", "elsewhere"),
        module(tmp_path, "b", "1", "c"),
        module(tmp_path, "c", "1"),
    ]
    assert in_order(views) == in_order(views[::-1]) == ["c", "b", "a"]


# -- looking back -----------------------------------------------------------------------------------------------


def test_the_history_has_three_shapes(kernel: PlayedKernel) -> None:
    runs = replace(BAKING, id=9)
    kernel.answers["upgrade.history"] = [COMMITTED, replace(ROLLED_BACK, id=8), runs]
    command = ("upgrade", "history", "--runtime-dir", kernel.directory)
    assert [view["id"] for view in data(snapctl(*command, "-o", "json"))["items"]] == [7, 8, 9]
    assert snapctl(*command, "-o", "name").stdout.split() == ["7", "8", "9"]
    _, *rows = snapctl("upgrade", "-o", "table", *command[1:], "shaper").stdout.splitlines()
    for row, words in zip(
        rows, (("committed", "142 µs", "31.5 s"), ("rolled back", "signal 11"), ("running",)), strict=True
    ):
        assert all(word in row for word in words)
    assert asked(kernel, "upgrade.history") == [{}, {}, {"name": "shaper"}]


def test_one_is_shown_without_judging_it(kernel: PlayedKernel) -> None:
    kernel.answers["upgrade.show"] = ROLLED_BACK
    done = snapctl("upgrade", "show", 7, "--runtime-dir", kernel.directory)
    assert (done.returncode, done.stderr) == (0, "")
    assert "reason: it died: signal 11" in done.stdout


def test_an_engine_that_did_not_move_and_clients_that_did_not_wait_have_no_numbers(
    kernel: PlayedKernel,
) -> None:
    kernel.answers["upgrade.show"] = ABORTED
    shown = snapctl("upgrade", "show", 7, "--runtime-dir", kernel.directory).stdout
    assert shown.splitlines()[-1].split()[:3] == ["main", "waiting", "-"]
    assert "none waited" in shown


def test_control_characters_in_a_reason_do_not_reach_the_terminal(kernel: PlayedKernel) -> None:
    nasty = "no \x1b]0;title\x07"
    kernel.answers |= {
        "module.upgrade": replace(QUEUED, to_version=nasty),
        "upgrade.show": replace(ABORTED, reason=nasty, to_version=nasty),
    }
    done = snapctl("upgrade", "shaper", "--runtime-dir", kernel.directory)
    assert "\x1b" not in done.stdout + done.stderr
    assert "title" in done.stderr


# -- completion, help -------------------------------------------------------------------------------------------


def test_modules_commands_and_numbers_are_completed(kernel: PlayedKernel, tmp_path: Path) -> None:
    kernel.answers |= {
        "module.list": [module(tmp_path, "shaper", "1")],
        "upgrade.history": [COMMITTED],
    }
    assert complete("upgrade sh", kernel.directory) == ["shaper", "show"]
    assert complete("upgrade --bake 3s ", kernel.directory) == ["shaper", "history", "show"]
    assert complete("upgrade history ", kernel.directory) == ["shaper"]
    assert complete("upgrade show ", kernel.directory) == ["7"]
    assert complete("rollback ", kernel.directory) == ["shaper"]


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        ("upgrade", "Usage: snapctl upgrade [OPTIONS] [MODULE] [PATH|VERSION]"),
        ("upgrade history", "Usage: snapctl upgrade history [OPTIONS] [MODULE]"),
        ("upgrade show", "Usage: snapctl upgrade show [OPTIONS] ID"),
        ("rollback", "Usage: snapctl rollback [OPTIONS] MODULE"),
    ],
)
def test_each_command_has_its_help(words: str, usage: str) -> None:
    assert snapctl(*words.split(), "--help").stdout.startswith(usage)


# -- pure parts -------------------------------------------------------------------------------------------------


def test_news_are_only_what_is_new() -> None:
    assert news(CONVERTING, CONVERTING) == []
    further = at("brownout", stage="convert", done=555, total=1000, rounds=2)
    assert news(CONVERTING, further) == []
    assert news(CONVERTING, at("brownout", stage="convert", done=600, total=1000, rounds=2)) == [
        "  engine main: convert 600/1000 round 2"
    ]
    assert news(BAKING, COMMITTED) == []


def test_a_picture_of_every_phase_can_be_drawn() -> None:
    from rich.console import Console

    for view in (QUEUED, *STORY, ROLLED_BACK, ABORTED):
        console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
        with console.file:
            console.print(picture(view, 10.0))
        text = console.export_text()
        assert "upgrade 7 of shaper" in text
        assert ("20 s left" in text) == (view.phase == "bake")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("1.5", 1.5), (".5s", 0.5), ("0", 0)],
)
def test_durations_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", "1 s", "1d", "1e3", "nan", "inf", "1.2.3", "ms5", "5sm", "٣s", "."]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="30s"):
        duration(text)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(-1, "-"), (0, "0 µs"), (900, "0.900 µs"), (14_200, "14.2 µs"), (142_000, "142 µs"), (999_499, "999 µs"),
     (999_500, "1.00 ms"), (3_200_000, "3.20 ms"), (250_000_000, "250 ms"), (1_500_000_000, "1.50 s")],
)  # fmt: skip
def test_short_times_have_three_digits(nanoseconds: int, text: str) -> None:
    assert output.span(nanoseconds) == text
