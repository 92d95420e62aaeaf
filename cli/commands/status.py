"""`snapctl status`: one page that tells the story, like `systemctl status`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ._base import Settings, call

if TYPE_CHECKING:
    from snap.ipc.protocol import KernelView, ModuleView


@click.command()
@click.pass_obj
def status(settings: Settings) -> None:
    """Tell how the kernel and its modules are."""
    from snap.ipc.protocol import KernelView

    from ..output import show_one

    view = call(settings, "kernel.status", KernelView)
    show_one(settings.output, "Kernel", view, _page, lambda view: view.pid)


def _page(kernel: KernelView) -> None:
    from ..output import age, plain, rfc3339

    ready = sum(module.state == "ready" for module in kernel.modules)
    click.echo(
        f"kernel {plain(kernel.version)}, pid {kernel.pid}, uid {kernel.uid}, up {age(time.time() - kernel.started)} "
        f"(since {rfc3339(kernel.started)})"
    )
    click.echo(f"  runtime directory {plain(kernel.runtime_dir)}, policy {plain(kernel.policy)}")
    click.echo(
        f"  modules {ready}/{len(kernel.modules)} ready, channels {kernel.channels}, "
        f"principals {kernel.principals}, capabilities {kernel.capabilities}"
    )
    if kernel.events:
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kernel.events.items()))
        click.echo(f"  events: {plain(counts)}")
    for module in kernel.modules:
        click.echo()
        _module(module)


def _module(module: ModuleView) -> None:
    from ..output import age, plain, size, state

    click.echo(
        f"{module.name} {plain(module.version)}: {state(module.state)} for {age(time.time() - module.since)}"
    )
    if module.cause:
        click.echo(f"  cause: {plain(module.cause)}")
    pid = "no process" if module.pid is None else f"pid {module.pid}"
    click.echo(
        f"  {pid}, generation {module.generation}, restarts {module.restarts}, faults {module.faults}, "
        f"state {size(module.state_bytes)}"
    )
    if module.standby:
        click.echo(f"  standby: {state(module.standby)}")
    if module.upgrade is not None:
        click.echo(
            f"  upgrade {module.upgrade} is under way: `snapctl upgrade show {module.upgrade} --watch`"
        )
    for engine in module.engines:
        beat = "none yet" if engine.heartbeat_age_ns < 0 else f"{engine.heartbeat_age_ns / 1e6:.1f} ms ago"
        click.echo(
            f"  engine {plain(engine.name)}: {engine.channels} channels, {engine.polls} polls, {engine.work} messages, "
            f"busy {engine.busy_ns / 1e9:.3f} s, heartbeat {beat}"
        )
    if module.state != "ready":
        for line in module.log_tail:
            click.echo(f"  | {plain(line)}")
