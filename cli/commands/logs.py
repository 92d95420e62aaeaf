"""`snapctl module logs`: what a module wrote to its standard output and error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from ._base import Settings, call, complete_module, say

ASK_EVERY: Final = 0.25
WINDOW: Final = 200
"""Lines asked for while following: as many as may be written between two looks without being missed."""


@click.command()
@click.argument("name", shell_complete=complete_module)
@click.option("-n", "--lines", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on with what it writes, until Ctrl-C.")
@click.pass_obj
def logs(settings: Settings, name: str, lines: int, follow: bool) -> None:
    """Print what a module wrote.

    The kernel keeps the last lines at hand; older ones are in log/NAME.log of its runtime directory.
    """
    from ..output import print_json

    seen = _tail(settings, name, max(lines, WINDOW) if follow else lines)
    if settings.output == "json" and not follow:
        print_json("ModuleLog", {"name": name, "lines": seen})
        return
    _print(settings.output, name, seen[-lines:])
    while follow:
        time.sleep(ASK_EVERY)
        now = _tail(settings, name, max(lines, WINDOW))
        more = fresh(seen, now)
        if seen and now and len(more) == len(now):
            say(f"some lines were missed: all are in {_file(settings, name)}")
        _print(settings.output, name, more)
        seen = now


def _file(settings: Settings, name: str) -> Path:
    from snap.ipc.paths import LOGS

    return settings.directory() / LOGS / f"{name}.log"


def _tail(settings: Settings, name: str, lines: int) -> list[str]:
    return call(settings, "module.logs", dict[str, list[str]], name=name, lines=lines)["lines"]


def fresh(seen: Sequence[str], now: Sequence[str]) -> Sequence[str]:
    """Those lines of `now` that follow the ones of `seen`: both are the end of one growing log."""
    for start in range(len(seen) + 1):
        kept = len(seen) - start
        if list(now[:kept]) == list(seen[start:]):
            return now[kept:]
    return now


def _print(output: str, name: str, lines: Sequence[str]) -> None:
    from ..output import plain, print_json

    for line in lines:
        if output == "json":
            print_json("LogLine", {"name": name, "line": line}, one_line=True)
        else:
            click.echo(plain(line))
