"""`snapctl upgrade`: put another version of a module, or of the kernel, in the place of the one that runs."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._base import (
    Group,
    Settings,
    add_common_options,
    call,
    complete,
    complete_module,
    duration,
    say,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from snap.ipc.protocol import ModuleView, UpgradeView

BAKE = 30.0


class Upgrade(Group):
    """`upgrade MODULE` beside `upgrade history` and `upgrade show`: the first word that is no option decides."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if self._means_a_command(args):
            return super().make_context(info_name, args, parent, **extra)
        return start.make_context(info_name, args, parent, **extra)

    def _means_a_command(self, args: Sequence[str]) -> bool:
        takes_a_word = {
            name
            for option in start.params
            if isinstance(option, click.Option) and not option.is_flag and option.name != "kernel"
            for name in option.opts
        }
        words = iter(args)
        for word in words:
            if word == "--":
                return False
            if not word.startswith("-"):
                return word in self.commands
            if word in takes_a_word:
                next(words, None)
        return False


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    commands = [CompletionItem(name) for name in sorted(upgrade.commands) if name.startswith(incomplete)]
    return complete_module(context, parameter, incomplete) + commands


def _complete_source(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


@click.command("upgrade")
@click.argument("module", required=False, shell_complete=_complete)
@click.argument("source", required=False, metavar="[PATH|VERSION]", shell_complete=_complete_source)
@click.option(
    "--watch/--no-watch", default=True, help="Show how it goes, on standard error.  [default: watch]"
)
@click.option(
    "--rollback/--no-rollback",
    default=True,
    help="Go back by itself when the new version does not prove itself.  [default: rollback]",
)
@click.option(
    "--bake",
    type=duration,
    metavar="DURATION",
    help="How long the new version has to prove itself: 30s, 500ms, 2m.  [default: 30s]",
)
@click.option("--wait/--no-wait", default=True, help="Return when it is over.  [default: wait]")
@click.option(
    "--all",
    "every",
    is_flag=True,
    help="Each running module whose directory holds another version than the one that runs, providers first.",
)
@click.option(
    "--kernel",
    metavar="[PATH]",
    is_flag=False,
    flag_value="",
    help="The kernel instead of a module: to what is installed now, or in the environment at PATH.",
)
@click.pass_obj
def start(
    settings: Settings,
    module: str | None,
    source: str | None,
    watch: bool,
    rollback: bool,
    bake: float | None,
    wait: bool,
    every: bool,
    kernel: str | None,
) -> None:
    """Put another version of MODULE in the place of the one that runs, without its clients noticing.

    The new version is started beside the old one and made ready (brownout). Then engine by engine is handed over with
    its state, which takes microseconds (blackout). Then the new version has to prove itself (bake) before the old
    one ends; if it dies, hangs, or finds itself ill, the old one takes its engines back.

    PATH is a directory of the module, VERSION one that ran before; without either it is the module's own directory
    as it is now. MODULE may be such a directory itself.

    \b
    snapctl upgrade shaper                     what its directory holds now
    snapctl upgrade shaper ~/src/shaper        this directory
    snapctl upgrade ./shaper --bake 2m         the same, and look at it for longer
    snapctl upgrade shaper 1.4.0               a version that ran before
    snapctl upgrade --all                      every module that changed on disk
    snapctl upgrade --kernel                   the kernel itself, no module restarts
    snapctl upgrade history [MODULE]           what was upgraded, and how it ended
    snapctl upgrade show ID [--watch]          one of them; follow one that runs
    snapctl rollback shaper                    back to the version before

    Ctrl-C ends the watching, not the upgrade. Exits with 8 when the old version serves on, and says why.
    A module named like one of these commands is given as a directory (./history) or after `--`.
    """
    from ._follow import Order, run, run_all

    _demand_one(module, every, kernel)
    if kernel is not None:
        if bake is not None or not rollback:
            raise click.UsageError("--bake and --no-rollback are of modules: a kernel decides at once.")
        run(settings, Order("kernel.upgrade", {"source": _source(kernel) if kernel else None}), watch, wait)
        return
    options = {"bake": BAKE if bake is None else bake, "rollback": rollback}
    if module is not None:
        name, source = _named(module, source)
        arguments = {"name": name, "source": None if source is None else _source(source), **options}
        run(settings, Order("module.upgrade", arguments), watch, wait)
        return
    if not wait:
        raise click.UsageError("--all goes one by one, so it has to wait: leave out --no-wait.")
    names = outdated(settings)
    if not names:
        say("every module that runs is the one that its directory holds")
    orders = [Order("module.upgrade", {"name": name, "source": None, **options}) for name in names]
    run_all(settings, orders, watch)


def _demand_one(module: str | None, every: bool, kernel: str | None) -> None:
    if (module is not None) + every + (kernel is not None) != 1:
        raise click.UsageError("Name one of: a MODULE, --all, --kernel.")


def _named(module: str, source: str | None) -> tuple[str, str | None]:
    """The module's name and the source; a directory in the module's place is both."""
    if "/" not in module:
        return module, source
    if source is not None:
        raise click.UsageError(f"{module!r} is a directory already: what is {source!r}?")
    return Path(module).resolve().name, module


def _source(text: str) -> str:
    """A directory as the kernel finds it from wherever it is, or a version as it stands."""
    if "/" in text or Path(text).is_dir():
        return str(Path(text).absolute())
    return text


def outdated(settings: Settings) -> list[str]:
    """The running modules whose directories hold another version, providers before those who require them.

    Raises ManifestError when a directory holds no valid module any more.
    """
    from snap.ipc import manifest
    from snap.ipc.protocol import ModuleView

    views = [view for view in call(settings, "module.list", list[ModuleView]) if view.pid is not None]
    other = {view.name for view in views if manifest.load(view.path).module.version != view.version}
    return [name for name in in_order(views) if name in other]


def in_order(views: Sequence[ModuleView]) -> list[str]:
    """The modules' names, providers first; the kernel lets no circle run."""
    providers = {service: view.name for view in views for service in view.provides}
    needs = {view.name: {providers[name] for name in view.requires if name in providers} for view in views}
    return list(TopologicalSorter(needs).static_order())


@click.group(cls=Upgrade)
def upgrade() -> None:
    """Upgrade a module or the kernel while its clients go on."""


@upgrade.command()
@click.argument("module", required=False, shell_complete=complete_module)
@click.pass_obj
def history(settings: Settings, module: str | None) -> None:
    """List upgrades, rollbacks and recoveries from crashes, of MODULE or of all: the latest last."""
    from snap.ipc.protocol import UpgradeView

    from ..output import rfc3339, show_list, span
    from ._report import blackout_ns, outcome, took

    arguments: dict[str, Any] = {} if module is None else {"name": module}
    show_list(
        settings.output,
        "Upgrade",
        call(settings, "upgrade.history", list[UpgradeView], **arguments),
        {
            "ID": lambda view: view.id,
            "MODULE": lambda view: view.module or "-",
            "KIND": lambda view: view.kind,
            "FROM": lambda view: view.from_version,
            "TO": lambda view: view.to_version,
            "OUTCOME": outcome,
            "STARTED": lambda view: rfc3339(view.started),
            "TOOK": took,
            "BLACKOUT": lambda view: span(blackout_ns(view)),
            "CLIENTS WAITED": lambda view: span(view.client_gap_ns),
            "REASON": lambda view: view.reason or "-",
        },
        lambda view: view.id,
    )


def _complete_id(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return complete(context, "upgrade.history", lambda row: [row["id"]], incomplete)


@upgrade.command()
@click.argument("number", metavar="ID", type=click.IntRange(min=0), shell_complete=_complete_id)
@click.option("--watch", is_flag=True, help="Follow it until it is over; exits with 8 when it failed.")
@click.pass_obj
def show(settings: Settings, number: int, watch: bool) -> None:
    """Show one upgrade, phase by phase and engine by engine."""
    from snap.ipc.protocol import UpgradeView

    from ._follow import watch_on
    from ._report import show_report

    view: UpgradeView = call(settings, "upgrade.show", UpgradeView, id=number)
    if watch:
        watch_on(settings, view)
    else:
        show_report(settings.output, view)


add_common_options(start)
