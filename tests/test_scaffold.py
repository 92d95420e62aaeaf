"""A module made from the templates is sound, and `snap.modules.check` says what is wrong with one that is not."""

from __future__ import annotations

import json
import string
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from snap.modules.check import Report, check

LIMIT = 20.0
EXAMPLE = Path(__file__).parent.parent / "examples" / "ticker"
TEMPLATES = resources.files("snap.modules") / "templates"


def scaffold(folder: Path, name: str, class_name: str) -> Path:
    path = folder / name
    path.mkdir()
    for template in TEMPLATES.iterdir():
        text = string.Template(template.read_text(encoding="utf-8"))
        path.joinpath(template.name.removesuffix(".in")).write_text(
            text.substitute(name=name, class_name=class_name), encoding="utf-8"
        )
    return path


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(params=["pinger", "two-words"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return scaffold(tmp_path, request.param, "Pinger")


def test_a_fresh_module_passes_its_own_tests_with_plain_pytest(fresh: Path) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=fresh)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_a_fresh_module_has_no_problems(fresh: Path) -> None:
    done = python("-m", "snap.modules.check", str(fresh))
    assert (done.returncode, json.loads(done.stdout)) == (
        0,
        {"path": str(fresh), "module": fresh.name, "problems": []},
    )


def test_the_tests_of_a_fresh_module_notice_a_broken_engine(tmp_path: Path) -> None:
    path = scaffold(tmp_path, "pinger", "Pinger")
    engine = path / "engine.py"
    engine.write_text(engine.read_text().replace("return message.upper()", "return message"))
    assert python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=path).returncode == 1


@pytest.mark.parametrize("name", ["echo", "relay"])
def test_every_shipped_module_has_no_problems(name: str) -> None:
    path = Path(str(resources.files("snap.modules") / name))
    assert check(path).problems == []


GOOD = "from snap.modules import Engine\nclass E(Engine):\n    def poll(self, budget): return 0\n"


TABLE = """
from snap.modules import Engine, Schema, Table, migrate
class E(Engine):
    schema = Schema(version=1, t=Table(key="u8", row="u8", capacity=10))
    def poll(self, budget): return 0
"""
MIGRATING = (
    TABLE
    + """
    @migrate("NAME", 1, 1)
    def m(self, old, new): ...
"""
)


def broken(
    folder: Path, code: str = GOOD, target: str = "engine:E", extra: str = "", limit: float = 20.0
) -> Report:
    path = folder / "broken"
    path.mkdir()
    path.joinpath("module.toml").write_text(
        f'[module]\nname = "broken"\nversion = "1"\n{extra}\n[engines.e]\nclass = "{target}"\n'
    )
    path.joinpath("engine.py").write_text(textwrap.dedent(code))
    return check(path, limit)


@pytest.mark.parametrize(
    ("given", "stage", "said"),
    [
        ({"code": "raise RuntimeError('at import')"}, "import", "engine.py:1: RuntimeError: at import"),
        ({"code": "import nothing_of_the_kind"}, "import", "No module named 'nothing_of_the_kind'"),
        ({"code": "import os\nos._exit(7)"}, "import", "status 7"),
        ({"code": "import sys\nsys.exit('gave up')"}, "import", "gave up"),
        ({"code": "import time\ntime.sleep(1000)", "limit": 3.0}, "import", "within 3 s"),
        ({"code": "class E: ..."}, "engine", "not a subclass of Engine"),
        ({"code": ""}, "engine", "not a subclass of Engine"),
        ({"code": "from snap.modules import Engine\nclass E(Engine): ..."}, "engine", "has no poll"),
        ({"target": "native:nothing"}, "engine", "no Rust engine 'nothing'"),
        ({"target": "missing:E"}, "import", "No module named"),
        ({"extra": 'entry = "engine:E"'}, "engine", "not a subclass of Module"),
        ({"extra": "surprise = 1"}, "manifest", "surprise"),
        ({"code": TABLE.replace("version=1", "version=2")}, "state", "state_version is 1"),
        ({"code": TABLE.replace("10", "10**7")}, "state", "engines.e.state is 16MiB"),
        ({"code": MIGRATING.replace("NAME", "u")}, "state", "has no such object"),
        ({"code": MIGRATING.replace("NAME", "t").replace("1, 1", "1, 2")}, "state", "is of version 1"),
        ({"extra": '[provides.s]\nengine = "e"\n[requires]\nservices = ["s"]'}, "manifest", "module itself"),
    ],
)
def test_a_problem_is_named_with_its_stage(
    tmp_path: Path, given: dict[str, Any], stage: str, said: str
) -> None:
    (problem,) = broken(tmp_path, **given).problems
    assert problem.stage == stage and said in problem.message, problem


def test_a_module_that_prints_at_import_is_checked_all_the_same(tmp_path: Path) -> None:
    assert broken(tmp_path, "print('hello', end='')\n" + GOOD).problems == []


def test_a_name_that_python_already_uses_is_refused(tmp_path: Path) -> None:
    path = scaffold(tmp_path, "json", "Json")
    (problem,) = check(path).problems
    assert problem.stage == "import" and "already has a package 'json'" in problem.message


def test_a_directory_without_a_manifest_is_no_module(tmp_path: Path) -> None:
    done = python("-m", "snap.modules.check", str(tmp_path))
    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["stage"] == "manifest" and "module.toml" in problem["message"]


def test_the_check_without_a_path_says_how_to_call_it() -> None:
    done = python("-m", "snap.modules.check")
    assert (done.returncode, done.stdout) == (2, "") and "usage" in done.stderr


# -- under a real kernel -------------------------------------------------------------------------------------


def test_a_fresh_module_serves_an_application_under_a_kernel(fresh: Path, kernel: Callable[..., Any]) -> None:
    running = kernel(modules=fresh.parent)
    with running.control() as control:
        assert control.call("module.start", name=fresh.name, wait=True)["state"] == "ready"
    with running.connect() as client, client.open(fresh.name) as channel:
        channel.send(b"hello", timeout=LIMIT)
        assert channel.recv(timeout=LIMIT) == b"HELLO"


def logged(control: Any, beginning: str) -> list[str]:
    """The ticker's lines that begin so, as soon as there are any."""
    end = time.monotonic() + LIMIT
    while True:
        lines: list[str] = control.call("module.logs", name="ticker", lines=100)["lines"]
        if found := [line for line in lines if line.startswith(beginning)]:
            return found
        assert time.monotonic() < end, lines
        time.sleep(0.1)


def test_two_modules_speak_with_no_application_and_a_restart_of_one_skips_no_number(
    kernel: Callable[..., Any],
) -> None:
    policy = (EXAMPLE / "policy.toml").read_text()
    with kernel(policy=policy, modules=EXAMPLE / "modules").control() as control:
        assert logged(control, "1 tick ")[0].endswith("by module:ticker")
        control.call("module.restart", name="ledger", wait=True)
        after = control.call("module.logs", name="ticker", lines=100)["lines"][-1].split()[0]
        more = int(after) + 3
        logged(control, f"{more} tick ")
        lines = control.call("module.logs", name="ticker", lines=100)["lines"]
        numbers = [int(line.split()[0]) for line in lines if " tick " in line]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= more
        ticker = control.call("module.show", name="ticker")
        assert (ticker["state"], ticker["generation"]) == ("ready", 1)


def test_a_module_without_a_rule_gets_no_channel_to_another(kernel: Callable[..., Any]) -> None:
    policy = (EXAMPLE / "policy.toml").read_text().replace('who = "module:ticker"', 'who = "module:other"')
    with kernel(policy=policy, modules=EXAMPLE / "modules").control() as control:
        end = time.monotonic() + LIMIT
        while "denied" not in (cause := control.call("module.show", name="ticker")["cause"].lower()):
            assert time.monotonic() < end, cause
            time.sleep(0.1)
        assert control.call("channel.list") == []
