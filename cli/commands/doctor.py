"""`snapctl doctor`: what this machine allows, what follows from it, and what to do about it."""

from __future__ import annotations

import click

from ._base import Settings


@click.command()
@click.pass_obj
@click.pass_context
def doctor(context: click.Context, settings: Settings) -> None:
    """Tell what this machine allows, and what follows.

    Each line is tried, not guessed, and nothing is changed. Exits 1 when something is missing that Snap cannot do
    without.
    """
    from ..output import plain, print_json, state
    from ._probes import examine

    findings = examine(settings.directory())
    fatal = [finding.name for finding in findings if finding.essential and finding.state == "unavailable"]
    if settings.output == "json":
        items = [finding.as_dict() for finding in findings]
        print_json("DoctorReport", {"items": items, "usable": not fatal})
    elif settings.output == "name":
        for finding in findings:
            if finding.state != "ok":
                click.echo(finding.name)
    else:
        for finding in findings:
            mark = state(finding.state) + " " * (11 - len(finding.state))
            click.echo(f"{mark}  {finding.name}: {plain(finding.found)}")
            if finding.state != "ok":
                click.echo(f"{'':11}    so: {finding.means}")
                click.echo(f"{'':11}    do: {finding.fix}")
        click.echo()
        click.echo("Snap runs here." if not fatal else f"Snap cannot run here: {', '.join(fatal)}.")
    context.exit(1 if fatal else 0)
