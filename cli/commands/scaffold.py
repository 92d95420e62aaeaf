"""`snapctl module new` and `snapctl module check`: for who writes modules. No kernel is needed for either."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any, Final

import click

from ._base import PYTHON, Settings, say

NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
CHECK_TIMEOUT: Final = 60.0


@click.command()
@click.argument("name")
@click.option(
    "--path",
    "parent",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where to put the directory NAME.  [default: here]",
)
@click.pass_obj
def new(settings: Settings, name: str, parent: Path) -> None:
    """Write a new module that runs, with passing tests."""
    from ..output import print_json

    target = write_module(name, parent.absolute())
    if settings.output == "json":
        files = sorted(path.name for path in target.iterdir())
        print_json("NewModule", {"name": name, "path": str(target), "files": files})
    else:
        click.echo(target)
    say(f"test it:  cd {target} && python -m pytest")
    say(f"run it:   snapctl up --module-path {parent.absolute()} && snapctl module start {name}")


def write_module(name: str, parent: Path) -> Path:
    """Render the templates into `parent`/`name`. Raises UsageError when the name is bad or taken."""
    from snap.ipc import UsageError

    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a module",
            "begin with a small letter, then small letters, digits, '-' and '_': at most 32 in all",
        )
    shipped = _modules()
    if (shipped / name / "module.toml").exists():
        raise UsageError(
            f"a module {name!r} is shipped with Snap", "choose another name: the shipped one would win"
        )
    target = parent / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        target.mkdir()
    except FileExistsError:
        raise UsageError(f"{target} exists", "choose another name, another --path, or remove it") from None
    words = {
        "name": name,
        "class_name": "".join(word.capitalize() for word in re.split("[-_]", name)),
    }
    for template in sorted((shipped / "templates").glob("*.in")):
        text = Template(template.read_text(encoding="utf-8")).substitute(words)
        (target / template.stem).write_text(text, encoding="utf-8")
    return target


def _modules() -> Path:
    """The directory of the package `snap.modules`, found without importing it."""
    spec = find_spec("snap.modules")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("snap.modules is not installed")
    return Path(spec.submodule_search_locations[0])


@click.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.pass_obj
@click.pass_context
def check(context: click.Context, settings: Settings, path: Path) -> None:
    """Say whether PATH is a module that a kernel could run. Exits 1 when not."""
    from ..output import plain, print_json

    report = _report(path, settings.seconds(CHECK_TIMEOUT))
    problems = report["problems"]
    if settings.output == "json":
        print_json("ModuleCheck", report)
    elif settings.output == "name":
        click.echo(report["module"] or "")
    else:
        for problem in problems:
            click.echo(plain(f"{problem['stage']}: {problem['message']}"))
            if problem["hint"]:
                click.echo(plain(f"  hint: {problem['hint']}"))
        if not problems:
            click.echo(f"{plain(report['module'])}: ok")
    context.exit(1 if problems else 0)


def _report(path: Path, seconds: float) -> dict[str, Any]:
    """What `python -m snap.modules.check` finds. Raises DeadlineError, or SnapError when it breaks itself."""
    from snap.ipc import DeadlineError, SnapError

    # A session of its own: what the module's code starts, or is stuck in, ends with the check.
    process = subprocess.Popen(
        [*PYTHON, "snap.modules.check", str(path.resolve())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            said, complained = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise DeadlineError(
                f"the check of {path} did not end within {seconds:g} s", "does it work at import time?"
            ) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    try:
        report: dict[str, Any] = json.loads(said)
    except json.JSONDecodeError:
        last = complained.strip().rpartition("\n")[2]
        raise SnapError(f"the check itself failed: {last}", "install Snap again: `pip install .`") from None
    return report
