"""`snapctl module`: look at modules, start and stop them, write new ones."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ._base import Group, Settings, call, complete_module, say

if TYPE_CHECKING:
    from snap.ipc.protocol import ModuleView

WAIT_TIMEOUT = 30.0


@click.group(
    cls=Group,
    lazy={
        "new": ("snap.cli.commands.scaffold:new", "Write a new module that runs, with passing tests."),
        "check": (
            "snap.cli.commands.scaffold:check",
            "Say whether a directory is a module that a kernel could run.",
        ),
        "logs": ("snap.cli.commands.logs:logs", "Print what a module wrote."),
    },
)
def module() -> None:
    """Modules: list, show, start, stop, restart, logs, new, check."""


@module.command("list")
@click.pass_obj
def list_(settings: Settings) -> None:
    """List the modules that the kernel knows."""
    from snap.ipc.protocol import ModuleView

    from ..output import age, show_list

    show_list(
        settings.output,
        "Module",
        call(settings, "module.list", list[ModuleView]),
        {
            "NAME": lambda view: view.name,
            "VERSION": lambda view: view.version,
            "STATE": lambda view: view.state,
            "PID": lambda view: "-" if view.pid is None else view.pid,
            "GEN": lambda view: view.generation,
            "RESTARTS": lambda view: view.restarts,
            "FAULTS": lambda view: view.faults,
            "FOR": lambda view: age(time.time() - view.since),
            "PROVIDES": lambda view: ",".join(view.provides) or "-",
            "CAUSE": lambda view: view.cause or "-",
        },
        lambda view: view.name,
    )


@module.command()
@click.argument("name", shell_complete=complete_module)
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Show one module: its state, engines, sandbox layer by layer, and last log lines."""
    from snap.ipc.protocol import ModuleView

    _show(settings, call(settings, "module.show", ModuleView, name=name))


def _show(settings: Settings, view: ModuleView) -> None:
    from ..output import show_one

    show_one(settings.output, "Module", view, _page, lambda view: view.name)


def _page(view: ModuleView) -> None:
    from ..output import age, field, plain, print_table, rfc3339, size, state

    field("module", f"{view.name} {view.version}")
    click.echo(
        f"{'state:':>12} {state(view.state)} for {age(time.time() - view.since)} (since {rfc3339(view.since)})"
    )
    field("cause", view.cause or "-")
    field("pid", view.pid or "none")
    field("generation", f"{view.generation}, restarts {view.restarts}, faults {view.faults}")
    if view.upgrade is not None:
        field("upgrade", f"{view.upgrade} is under way: `snapctl upgrade show {view.upgrade} --watch`")
    field("standby", view.standby or "none")
    field("path", view.path)
    field("provides", ", ".join(view.provides) or "-")
    field("requires", ", ".join(view.requires) or "-")
    field("memory", size(view.memory_bytes))
    field("state memory", size(view.state_bytes))
    if view.engines:
        click.echo("\nengines")
        print_table(
            ("ENGINE", "CHANNELS", "POLLS", "MESSAGES", "BUSY", "HEARTBEAT"),
            [
                (
                    engine.name,
                    str(engine.channels),
                    str(engine.polls),
                    str(engine.work),
                    f"{engine.busy_ns / 1e9:.3f} s",
                    "-" if engine.heartbeat_age_ns < 0 else f"{engine.heartbeat_age_ns / 1e6:.1f} ms ago",
                )
                for engine in view.engines
            ],
        )
    if not view.sandbox:
        field("sandbox", "this kernel reports no layer")
    else:
        # The layers are the module's platform's to name: whatever keys they have are the columns.
        keys = list(dict.fromkeys(key for layer in view.sandbox for key in layer))
        click.echo("\nsandbox")
        print_table(
            [key.upper() for key in keys], [[layer.get(key, "-") for key in keys] for layer in view.sandbox]
        )
    if view.log_tail:
        click.echo("\nlast log lines")
        for line in view.log_tail:
            click.echo(f"  {plain(line)}")


def _waiting(action: str, description: str, goal: str) -> click.Command:
    """The command `module ACTION NAME`, which waits for the state `goal`."""

    @click.command(action, help=description)
    @click.argument("name", shell_complete=complete_module)
    @click.option(
        "--wait/--no-wait", default=True, help=f"Return when the module is {goal}.  [default: wait]"
    )
    @click.pass_obj
    def command(settings: Settings, name: str, wait: bool) -> None:
        from snap.ipc import NotRunningError
        from snap.ipc.protocol import ModuleView

        view = call(
            settings, f"module.{action}", ModuleView, default_timeout=WAIT_TIMEOUT, name=name, wait=wait
        )
        if wait and view.state != goal:
            raise NotRunningError(
                f"module {name} is {view.state}, not {goal}: {view.cause}",
                f"`snapctl module logs {name}` prints what it wrote",
            )
        if settings.output == "table":
            say(f"module {name} is {view.state}, generation {view.generation}")
        else:
            _show(settings, view)

    return command


module.add_command(_waiting("start", "Start a module, after what it requires.", "ready"))
module.add_command(_waiting("stop", "Stop a module: gracefully, then by force.", "stopped"))
module.add_command(_waiting("restart", "Stop a module and start it again.", "ready"))
