"""snapctl as its users meet it: a process with arguments, two output streams and an exit code.

The kernel's part is played by a script (`cli_rig.py`); `test_cli_exit_codes.py` runs the real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from snap.cli import output
from snap.cli.commands.logs import fresh
from snap.cli.main import COMMANDS
from snap.ipc import protocol
from snap.ipc.protocol import CapView, ChannelView, EngineView, EventView, KernelView, ModuleView, Response
from tests.cli_rig import PlayedKernel, complete, data, interrupt, read_lines, snapctl, start

ECHO = ModuleView(
    name="echo",
    version="0.1.0",
    state="ready",
    cause="",
    pid=4711,
    generation=2,
    restarts=1,
    faults=0,
    since=1_700_000_000.25,
    path="/modules/echo",
    provides=["echo", "echo-py"],
    requires=[],
    engines=[
        EngineView(name="main", polls=10, work=7, busy_ns=1_000, heartbeat_age_ns=2_000_000, channels=1)
    ],
    sandbox=[{"layer": "landlock", "requested": "own files", "state": "applied", "reason": ""}],
)
BROKEN = msgspec.structs.replace(
    ECHO,
    name="broken",
    state="failed",
    cause="crash loop: 5 deaths in 10 s",
    pid=None,
    faults=5,
    provides=["broken"],
    engines=[],
    log_tail=["ImportError: no such thing", "a line \x1b]0;with an escape\x07"],
)
CAP = CapView(
    id=12,
    handle=1,
    object="service:echo",
    rights=["connect", "send"],
    badge="uid:0/pid:9",
    owner="app:9.1",
    parent=None,
    expires=None,
    rule="allow[0]",
)
CHANNEL = ChannelView(
    id=3,
    service="echo",
    module="echo",
    client="app:9.1",
    state="open",
    generation=1,
    cap=12,
    slots=1024,
    up_bytes=1 << 20,
    down_bytes=1 << 20,
    arena_bytes=0,
    depth_up=4,
    depth_down=0,
    since=1_700_000_000.0,
    read_only="up: sealed; down: advisory (same uid)",
)
EVENTS = [
    EventView(seq=1, time=1_700_000_000.0, kind="kernel.started", subject="kernel"),
    EventView(
        seq=2, time=1_700_000_001.0, kind="module.ready", subject="module:echo", data={"generation": 1}
    ),
]
KERNEL = KernelView(
    pid=99,
    version="0.1.0",
    runtime_dir="/run/x",
    started=1_700_000_000.0,
    uid=0,
    policy="default",
    modules=[ECHO, BROKEN],
    channels=1,
    principals=2,
    capabilities=3,
    events={"module.ready": 1},
)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[PlayedKernel]:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    played = PlayedKernel(directory)
    yield played
    played.close()


# -- what it costs, and what it says without a kernel -----------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["module", "--help"], ["up", "--help"], ["upgrade", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from snap.cli.main import run\n"
        f"run({arguments!r})\n"
        "heavy = {'rich', 'zmq', 'numpy', 'msgspec', 'snap.dataplane._native', 'snap.kernel', 'asyncio'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_json_is_printed_without_importing_rich(kernel: PlayedKernel) -> None:
    kernel.answers["module.list"] = [ECHO]
    script = (
        "import sys\n"
        "from snap.cli.main import run\n"
        f"run(['--runtime-dir', {str(kernel.directory)!r}, 'module', 'list', '-o', 'json'])\n"
        "print('rich' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kind"] == "ModuleList"
    assert done.stderr.splitlines() == ["False"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_exists_and_takes_the_common_options(name: str) -> None:
    """The table is written by hand so that help is fast: here each line is tied to a command that exists."""
    done = snapctl(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: snapctl {name}")
    for option in ("--runtime-dir", "-o, --output", "--timeout"):
        assert option in done.stdout


def test_every_exit_code_is_in_the_help() -> None:
    epilog = snapctl("--help").stdout.partition("Exit codes:")[2].split("\n")
    assert [line.split()[0] for line in epilog if line.strip()] == [
        *map(str, range(10)),
        "130",
        "141",
    ]


def test_an_unknown_command_exits_2_and_names_the_nearest() -> None:
    done = snapctl("modul", "list")
    assert done.returncode == 2
    assert "'module'" in done.stderr
    assert done.stdout == ""


def test_a_usage_error_is_json_as_well_when_asked() -> None:
    done = snapctl("-o", "json", "module", "logs", "echo", "-n", "0")
    assert done.returncode == 2
    error = json.loads(done.stderr.splitlines()[-1])
    assert (error["apiVersion"], error["kind"], error["code"]) == ("snap/v1", "Error", "usage")


def test_the_installation_says_its_version_without_a_kernel(tmp_path: Path) -> None:
    found = data(snapctl("version", "-o", "json", "--runtime-dir", tmp_path))
    assert found["kind"] == "Version"
    assert found["kernel"] is None
    assert found["protocol"] == protocol.PROTOCOL_VERSION


# -- data: the same content in three shapes ----------------------------------------------------------------------

LISTS: list[tuple[list[str], str, Any, str, list[str]]] = [
    (["module", "list"], "module.list", [ECHO, BROKEN], "ModuleList", ["echo", "broken"]),
    (["cap", "list"], "cap.list", [CAP], "CapabilityList", ["12"]),
    (["channel", "list"], "channel.list", [CHANNEL], "ChannelList", ["3"]),
]


@pytest.mark.parametrize(("command", "op", "answer", "kind", "names"), LISTS, ids=[row[3] for row in LISTS])
def test_a_list_has_three_shapes(
    kernel: PlayedKernel, command: list[str], op: str, answer: Any, kind: str, names: list[str]
) -> None:
    kernel.answers[op] = answer
    found = data(snapctl(*command, "-o", "json", "--runtime-dir", kernel.directory))
    assert (found["apiVersion"], found["kind"], len(found["items"])) == ("snap/v1", kind, len(answer))
    assert snapctl(*command, "-o", "name", "--runtime-dir", kernel.directory).stdout.split() == names
    table = snapctl(*command, "--runtime-dir", kernel.directory)
    assert table.stderr == ""
    assert len(table.stdout.splitlines()) == 1 + len(answer)
    assert all(name in line for name, line in zip(names, table.stdout.splitlines()[1:], strict=True))


def test_an_empty_list_is_an_empty_list(kernel: PlayedKernel) -> None:
    kernel.answers["channel.list"] = []
    assert data(snapctl("channel", "list", "-o", "json", "--runtime-dir", kernel.directory))["items"] == []
    assert snapctl("channel", "list", "-o", "name", "--runtime-dir", kernel.directory).stdout == ""


def test_times_are_text_and_nanoseconds(kernel: PlayedKernel) -> None:
    kernel.answers["module.show"] = ECHO
    found = data(snapctl("module", "show", "echo", "-o", "json", "--runtime-dir", kernel.directory))
    assert (found["since"], found["since_ns"]) == ("2023-11-14T22:13:20.250Z", 1_700_000_000_250_000_000)
    assert found["kind"] == "Module"
    assert kernel.asked[-1].args == {"name": "echo"}


def test_common_options_work_before_and_after_the_command(kernel: PlayedKernel) -> None:
    kernel.answers["module.list"] = [ECHO]
    before = snapctl("--runtime-dir", kernel.directory, "-o", "name", "--timeout", 7, "module", "list")
    between = snapctl("module", "--runtime-dir", kernel.directory, "-o", "name", "--timeout", 7, "list")
    after = snapctl("module", "list", "--runtime-dir", kernel.directory, "-o", "name", "--timeout", 7)
    assert before.stdout == between.stdout == after.stdout == "echo\n"
    assert [request.timeout for request in kernel.asked] == [7.0] * 3


def test_the_later_of_two_common_options_wins(kernel: PlayedKernel) -> None:
    kernel.answers["module.list"] = [ECHO]
    done = snapctl("-o", "json", "module", "list", "-o", "name", SNAP_RUNTIME_DIR=str(kernel.directory))
    assert done.stdout == "echo\n"


def test_status_tells_the_story_of_a_broken_module(kernel: PlayedKernel) -> None:
    kernel.answers["kernel.status"] = KERNEL
    done = snapctl("status", "--runtime-dir", kernel.directory)
    assert done.returncode == 0
    for words in ("pid 99", "1/2 ready", "crash loop: 5 deaths", "restarts 1", "faults 5", "ImportError"):
        assert words in done.stdout


def test_a_standby_the_memory_of_the_state_and_a_running_upgrade_are_shown(kernel: PlayedKernel) -> None:
    view = msgspec.structs.replace(ECHO, standby="starting", state_bytes=3 << 20, upgrade=12)
    kernel.answers |= {"kernel.status": msgspec.structs.replace(KERNEL, modules=[view]), "module.show": view}
    for command in (["status"], ["module", "show", "echo"]):
        shown = snapctl(*command, "--runtime-dir", kernel.directory).stdout
        for words in ("starting", "3.0 MiB", "snapctl upgrade show 12 --watch", "generation"):
            assert words in shown


def test_control_characters_of_a_module_do_not_reach_the_terminal(kernel: PlayedKernel) -> None:
    kernel.answers |= {
        "kernel.status": KERNEL,
        "module.show": BROKEN,
        "module.logs": {"lines": BROKEN.log_tail},
    }
    for command in (["status"], ["module", "show", "broken"], ["module", "logs", "broken"]):
        shown = snapctl(*command, "--runtime-dir", kernel.directory).stdout
        assert "with an escape" in shown
        assert "\x1b" not in shown


def test_no_color_is_respected_where_colour_is_forced(kernel: PlayedKernel) -> None:
    kernel.answers["module.list"] = [ECHO]
    arguments = ("module", "list", "--runtime-dir", kernel.directory)
    assert "\x1b[32m" in snapctl(*arguments, FORCE_COLOR="1", TERM="xterm").stdout
    assert "\x1b[32m" not in snapctl(*arguments, FORCE_COLOR="1", TERM="xterm", NO_COLOR="1").stdout


def test_each_sandbox_layer_is_shown_as_given(kernel: PlayedKernel) -> None:
    kernel.answers["module.show"] = ECHO
    shown = snapctl("module", "show", "echo", "--runtime-dir", kernel.directory).stdout
    assert "LAYER" in shown
    assert any({"landlock", "applied"} <= set(line.split()) for line in shown.splitlines())


def test_a_capability_is_shown_with_what_was_derived_from_it(kernel: PlayedKernel) -> None:
    kernel.answers["cap.inspect"] = {**msgspec.to_builtins(CAP), "children": [13, 14]}
    assert data(snapctl("cap", "inspect", 12, "-o", "json", "--runtime-dir", kernel.directory))[
        "children"
    ] == [13, 14]
    assert "13, 14" in snapctl("cap", "inspect", 12, "--runtime-dir", kernel.directory).stdout


def test_why_gives_the_rule_and_exits_5_when_denied(kernel: PlayedKernel) -> None:
    kernel.answers["cap.why"] = lambda asked: {
        "allowed": asked["who"] == "uid:0",
        "rule": "allow[0]",
        "reason": "owner",
    }
    allowed = snapctl("cap", "why", "uid:0", "echo", "send", "--runtime-dir", kernel.directory)
    denied = snapctl("cap", "why", "uid:7", "echo", "-o", "json", "--runtime-dir", kernel.directory)
    assert (allowed.returncode, denied.returncode) == (0, 5)
    assert "allow[0]" in allowed.stdout
    assert json.loads(denied.stdout)["allowed"] is False
    assert [request.args for request in kernel.asked] == [
        {"who": "uid:0", "service": "echo", "right": "send"},
        {"who": "uid:7", "service": "echo"},
    ]


def test_grant_and_revoke_send_what_was_asked(kernel: PlayedKernel) -> None:
    kernel.answers |= {"cap.grant": CAP, "cap.revoke": {"revoked": [12, 13]}}
    granted = snapctl(
        *("cap", "grant", "app:9.1", "echo", "--right", "send", "--right", "recv", "--expires", 60),
        *("-o", "name", "--runtime-dir", kernel.directory),
    )
    revoked = snapctl("cap", "revoke", 12, "--runtime-dir", kernel.directory)
    assert (granted.stdout, revoked.stdout) == ("12\n", "12\n13\n")
    assert [request.args for request in kernel.asked] == [
        {"owner": "app:9.1", "service": "echo", "rights": ["send", "recv"], "expires": 60.0},
        {"id": 12},
    ]


def test_events_are_listed_by_kind_page_after_page(kernel: PlayedKernel) -> None:
    kernel.answers["events.since"] = lambda asked: [event for event in EVENTS if event.seq > asked["seq"]][:1]
    found = data(snapctl("events", "-o", "json", "--kind", "module.*", "--runtime-dir", kernel.directory))
    assert [event["seq"] for event in found["items"]] == [2]
    assert found["items"][0]["data"] == {"generation": 1}
    table = snapctl("events", "--since", 0, "--runtime-dir", kernel.directory).stdout.splitlines()
    assert [line.split()[2] for line in table] == ["kernel.started", "module.ready"]


# -- waiting ----------------------------------------------------------------------------------------------------


def test_start_waits_by_default_and_fails_when_the_module_does_not_get_ready(kernel: PlayedKernel) -> None:
    kernel.answers["module.start"] = BROKEN
    done = snapctl("module", "start", "broken", "--runtime-dir", kernel.directory)
    assert done.returncode == 3
    assert "crash loop" in done.stderr
    assert "hint: `snapctl module logs broken`" in done.stderr
    assert (
        snapctl("module", "start", "broken", "--no-wait", "--runtime-dir", kernel.directory).returncode == 0
    )
    assert [request.args["wait"] for request in kernel.asked] == [True, False]


def test_logs_follow_until_ctrl_c_and_print_each_line_once(kernel: PlayedKernel) -> None:
    lines: list[str] = ["one", "two"]
    kernel.answers["module.logs"] = lambda _: {"lines": lines}
    process = start("module", "logs", "-f", "echo", "--runtime-dir", kernel.directory)
    assert read_lines(process, 2) == ["one", "two"]
    lines = [*lines, "two", "three"]
    assert read_lines(process, 2) == ["two", "three"]
    lines = ["after", "a flood"]
    assert read_lines(process, 2) == lines
    status, rest, said = interrupt(process)
    assert (status, rest) == (130, "")
    assert said == f"some lines were missed: all are in {kernel.directory}/log/echo.log"


def test_a_reader_that_leaves_ends_it_quietly(kernel: PlayedKernel) -> None:
    kernel.answers["module.logs"] = {"lines": ["x" * 100] * 400}
    process = start("module", "logs", "-n", "400", "echo", "--runtime-dir", kernel.directory)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(30) == 141


# -- errors -----------------------------------------------------------------------------------------------------

CODES = [
    ("failed", 1),
    ("usage", 2),
    ("policy", 2),
    ("not_running", 3),
    ("not_found", 4),
    ("bad_handle", 4),
    ("denied", 5),
    ("quota", 5),
    ("busy", 6),
    ("timeout", 7),
]


@pytest.mark.parametrize(("code", "status"), CODES)
def test_what_the_kernel_answers_becomes_message_hint_and_exit_code(
    kernel: PlayedKernel, code: str, status: int
) -> None:
    kernel.answers["module.stop"] = Response(key="", ok=False, code=code, message="it did not work", hint="")
    done = snapctl("module", "stop", "echo", "-o", "json", "--runtime-dir", kernel.directory)
    message, hint, error = done.stderr.splitlines()
    assert done.returncode == status
    assert done.stdout == ""
    assert message == "snapctl: it did not work"
    assert hint.startswith("hint: ") and len(hint) > 12
    assert json.loads(error) | {"hint": ""} == {
        "apiVersion": "snap/v1",
        "kind": "Error",
        "code": code,
        "message": "it did not work",
        "hint": "",
        "exit_code": status,
    }


def test_the_kernels_own_hint_is_the_one_that_is_printed(kernel: PlayedKernel) -> None:
    kernel.answers["module.show"] = Response(
        key="", ok=False, code="not_found", message="no", hint="turn left"
    )
    assert "hint: turn left\n" in snapctl("module", "show", "x", "--runtime-dir", kernel.directory).stderr


@pytest.mark.parametrize("answer", [{"name": 7}, [1, 2], "text"])
def test_an_answer_of_the_wrong_shape_is_an_error_that_names_the_versions(
    kernel: PlayedKernel, answer: Any
) -> None:
    kernel.answers["module.show"] = answer
    done = snapctl("module", "show", "echo", "--runtime-dir", kernel.directory)
    assert done.returncode == 1
    assert "snapctl version" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_kernel_that_never_answers_is_a_deadline(kernel: PlayedKernel) -> None:
    kernel.answers["module.list"] = lambda _: None
    done = snapctl("module", "list", "--timeout", 0.3, "--runtime-dir", kernel.directory)
    assert done.returncode == 7
    assert "hint: " in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "status",
        "down",
        "down --force",
        "module list",
        "module start echo",
        "upgrade echo",
        "upgrade --all",
        "upgrade --kernel",
        "upgrade history",
        "upgrade show 1 --watch",
        "rollback echo",
        "module logs -f echo",
        "cap list",
        "channel list",
        "events",
        "events --follow",
    ],
)
def test_without_a_kernel_every_command_exits_9_and_says_how_to_get_one(command: str, tmp_path: Path) -> None:
    done = snapctl(*command.split(), "--runtime-dir", tmp_path)
    assert done.returncode == 9, done.stderr
    assert "snapctl up" in done.stderr
    assert done.stdout == ""


# -- completion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_calls_back(shell: str) -> None:
    done = snapctl("completion", shell)
    assert done.returncode == 0, done.stderr
    assert f"_SNAPCTL_COMPLETE={shell}_complete" in done.stdout


def test_commands_and_the_kernels_names_are_completed(kernel: PlayedKernel) -> None:
    kernel.answers |= {"module.list": [ECHO, BROKEN], "cap.list": [CAP]}
    assert complete("do", kernel.directory) == ["down", "doctor"]
    assert complete("module show ", kernel.directory) == ["broken", "echo"]
    assert complete("module stop e", kernel.directory) == ["echo"]
    assert complete("cap why app:9.1 e", kernel.directory) == ["echo", "echo-py"]
    assert complete("cap revoke ", kernel.directory) == ["12"]


def test_completion_without_a_kernel_or_with_a_mute_one_gives_nothing(
    kernel: PlayedKernel, tmp_path: Path
) -> None:
    kernel.answers["module.list"] = lambda _: None
    assert complete("module show ", tmp_path) == []
    assert complete("module show ", kernel.directory) == []


# -- new modules ------------------------------------------------------------------------------------------------


def test_a_new_module_passes_its_check_and_its_own_tests(tmp_path: Path) -> None:
    made = data(snapctl("module", "new", "my-first_one", "--path", tmp_path, "-o", "json"))
    target = tmp_path / "my-first_one"
    assert made["path"] == str(target)
    assert {"module.toml", "engine.py"} <= set(made["files"])
    assert not any("$" in path.read_text() for path in target.glob("*.py"))
    checked = data(snapctl("module", "check", target, "-o", "json"))
    assert (checked["kind"], checked["module"], checked["problems"]) == ("ModuleCheck", "my-first_one", [])
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(target)],
        cwd=target,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tests.returncode == 0, tests.stdout + tests.stderr


@pytest.mark.parametrize("name", ["Upper", "1st", "has space", "../escape", "x" * 33, "ümlaut", ".", "a\n"])
def test_a_bad_name_for_a_module_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    done = snapctl("module", "new", "--path", tmp_path / "in", "--", name)
    assert done.returncode == 2
    assert "hint: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_new_module_does_not_overwrite_or_shadow_one(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    taken = snapctl("module", "new", "mine", "--path", tmp_path)
    shipped = snapctl("module", "new", "relay", "--path", tmp_path)
    assert (taken.returncode, shipped.returncode) == (2, 2)
    assert list((tmp_path / "mine").iterdir()) == []
    assert not (tmp_path / "relay").exists()


def test_check_exits_1_and_names_the_problem(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "module.toml").write_text("[module]\nname = 7\n")
    done = snapctl("module", "check", tmp_path / "odd")
    assert done.returncode == 1
    assert done.stdout.startswith("manifest: ")


def test_a_check_that_takes_too_long_is_a_deadline_and_leaves_no_process(tmp_path: Path) -> None:
    target = tmp_path / "stuck"
    assert snapctl("module", "new", "stuck", "--path", tmp_path).returncode == 0
    (target / "engine.py").write_text("import time\ntime.sleep(1000)\n")
    done = snapctl("module", "check", target, "--timeout", 2)
    assert done.returncode == 7
    assert "hint: " in done.stderr
    assert not [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if str(target) in read(entry)]


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# -- pure parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "now", "expected"),
    [
        ("", "ab", "ab"),
        ("ab", "ab", ""),
        ("ab", "abc", "c"),
        ("abc", "bcd", "d"),
        ("abc", "xyz", "xyz"),
        ("aab", "abaab", "aab"),
        ("abc", "", ""),
    ],
)
def test_following_a_log_finds_what_is_new(seen: str, now: str, expected: str) -> None:
    assert list(fresh(list(seen), list(now))) == list(expected)


@pytest.mark.parametrize(
    ("call", "argument", "expected"),
    [
        (output.age, 0.4, "0s"),
        (output.age, 61, "1m 1s"),
        (output.age, 3600, "1h"),
        (output.age, 90_061, "1d 1h"),
        (output.age, -5, "0s"),
        (output.size, None, "-"),
        (output.size, 1023, "1023 B"),
        (output.size, 1 << 20, "1.0 MiB"),
        (output.size, 1 << 50, "1024.0 TiB"),
        (output.plain, "a\tb\x07\n", "a\tb\\x07\\n"),
        (output.plain, "grün 😀", "grün 😀"),
    ],
)
def test_numbers_and_text_are_written_for_people(
    call: Callable[[Any], str], argument: Any, expected: str
) -> None:
    assert call(argument) == expected
