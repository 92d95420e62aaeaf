"""`snapctl rollback`: back to the version of a module that ran before."""

from __future__ import annotations

import click

from ._base import Settings, complete_module


@click.command()
@click.argument("module", shell_complete=complete_module)
@click.option(
    "--watch/--no-watch", default=True, help="Show how it goes, on standard error.  [default: watch]"
)
@click.option("--wait/--no-wait", default=True, help="Return when it is over.  [default: wait]")
@click.pass_obj
def rollback(settings: Settings, module: str, watch: bool, wait: bool) -> None:
    """Put MODULE back to the version that ran before, without its clients noticing.

    An upgrade of MODULE that is under way, or waits for others, is ended by this.

    The code of that version was kept, whatever its directory holds by now. If the state's schema changed in between,
    the older version's own migration takes it back, as long as it knows how.

    \b
    snapctl rollback shaper
    snapctl upgrade history shaper      what it would go back to

    Ctrl-C ends the watching, not the rollback.
    """
    from ._follow import Order, run

    run(settings, Order("module.rollback", {"name": module}), watch, wait)
