"""Order an upgrade and follow it to its end. It is the kernel's: whoever stops watching stops nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import click

from ._base import Settings, ask, call, control, say
from ._report import failure, show_report, succeeded, title

if TYPE_CHECKING:
    from snap.ipc.control import ControlClient
    from snap.ipc.protocol import UpgradeView

LOOK_EVERY: Final = 0.1
ASK_SECONDS: Final = 2.0
# A kernel that died meanwhile is given so long to come back: its modules wait as long for it.
AWAY_SECONDS: Final = 30.0


class Display(Protocol):
    def show(self, view: UpgradeView) -> None: ...


@dataclass(frozen=True)
class Order:
    """An operation of the control plane that starts an upgrade."""

    op: str
    arguments: dict[str, Any]


class _Blank:
    def show(self, view: UpgradeView) -> None:
        """Nothing."""


def run(settings: Settings, order: Order, watch: bool, wait: bool) -> None:
    """Start it and, when `wait`, follow it to its end. Raises RolledBackError when the version before serves on."""
    view = _begin(settings, order)
    if not wait:
        say(f"{title(view)} is under way: `{_again(view)}` follows it")
        if settings.output != "table":
            show_report(settings.output, view)
        return
    _to_the_end(settings, view, watch, order.op.rpartition(".")[2])


def watch_on(settings: Settings, view: UpgradeView) -> None:
    """Follow one that runs, then report. Raises RolledBackError when the version before serves on."""
    _to_the_end(settings, view, True)


def run_all(settings: Settings, orders: Sequence[Order], watch: bool) -> None:
    """One after the other, until one fails. Raises RolledBackError then."""
    from ..output import as_data, print_json

    views: list[UpgradeView] = []
    try:
        for order in orders:
            view = follow(settings, _begin(settings, order), watch)
            views.append(view)
            if settings.output != "json":
                show_report(settings.output, view)
            _demand_success(view)
    finally:
        if settings.output == "json":
            print_json("UpgradeList", {"items": [as_data(view) for view in views]})
        if left := [order.arguments["name"] for order in orders[len(views) :]]:
            say(f"not upgraded: {', '.join(left)}")


def _begin(settings: Settings, order: Order) -> UpgradeView:
    from snap.ipc.protocol import UpgradeView

    arguments = order.arguments if order.op.startswith("kernel.") else {**order.arguments, "wait": False}
    return call(settings, order.op, UpgradeView, **arguments)


def _to_the_end(settings: Settings, view: UpgradeView, watch: bool, wanted: str = "") -> None:
    view = follow(settings, view, watch)
    show_report(settings.output, view)
    _demand_success(view, wanted)


def _demand_success(view: UpgradeView, wanted: str = "") -> None:
    from snap.ipc import RolledBackError

    if not succeeded(view, wanted):
        hint = f"{view.from_version} serves on; `snapctl module logs {view.module}` has what {view.to_version} wrote"
        raise RolledBackError(failure(view), hint if view.module else "")


def _again(view: UpgradeView) -> str:
    return f"snapctl upgrade show {view.id} --watch"


def follow(settings: Settings, view: UpgradeView, watch: bool) -> UpgradeView:
    """Look until it is over. Raises DeadlineError when that takes longer than the operator's --timeout, click.Abort on
    Ctrl-C, UnreachableError when the kernel stays away; the upgrade goes on in any case."""
    from snap.ipc import DeadlineError

    end = None if settings.timeout is None else time.monotonic() + settings.timeout
    try:
        with control(settings) as client, _display(watch) as display:
            while True:
                display.show(view)
                if view.outcome:
                    return view
                if end is not None and time.monotonic() > end:
                    raise DeadlineError(
                        f"{title(view)} is not over after {settings.timeout:g} s but in its {view.phase}",
                        f"it goes on: `{_again(view)}` follows it",
                    )
                time.sleep(LOOK_EVERY)
                view = _look(client, view, end)
    except KeyboardInterrupt:
        say(f"\n{title(view)} goes on: `{_again(view)}` follows it")
        raise click.Abort from None


def _look(client: ControlClient, view: UpgradeView, end: float | None) -> UpgradeView:
    """How it is now. A kernel that died, or is itself being upgraded, is waited for."""
    from snap.ipc import DeadlineError, UnreachableError
    from snap.ipc.protocol import UpgradeView

    until = time.monotonic() + AWAY_SECONDS
    told = False
    while True:
        try:
            return ask(client, "upgrade.show", UpgradeView, ASK_SECONDS, id=view.id)
        except (UnreachableError, DeadlineError):
            now = time.monotonic()
            if now > until or (end is not None and now > end):
                raise
            if not told and view.kind != "kernel":
                say("the kernel does not answer; its modules go on without it: waiting for the next one")
            told = True
            time.sleep(LOOK_EVERY)


def _display(watch: bool) -> AbstractContextManager[Display]:
    if not watch:
        return nullcontext(_Blank())
    from ._progress import Lines, Screen

    return Screen() if sys.stderr.isatty() else nullcontext(Lines())
