"""`snapctl bench`: Snap measured beside its peers on this machine."""

from __future__ import annotations

import sys
from typing import Final

import click

from ._base import Settings

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 3
QUICK_SCALE: Final = 0.2
SCENARIOS: Final = ("round trip", "single", "burst", "packed", "copied", "filled", "loaned", "idle")


@click.command()
@click.option("--quick", is_flag=True, help="Fewer and shorter rounds: about ten seconds, rougher figures.")
@click.option(
    "--rounds", type=click.IntRange(1, 100), help=f"Rounds of everybody in turn.  [default: {ROUNDS}]"
)
@click.option(
    "--only",
    type=click.Choice(SCENARIOS),
    multiple=True,
    metavar="SCENARIO",
    help="Only this; may be repeated.",
)
@click.pass_obj
def bench(settings: Settings, quick: bool, rounds: int | None, only: tuple[str, ...]) -> None:
    """Compare Snap with a Unix socket, Pipe, ZeroMQ, iceoryx2 (if installed) and a bare C ring.

    Two processes on two processors; everybody in turn in each round; medians over the rounds. Needs no kernel. The
    figures are of this machine at this moment: quote the ratios. Scenarios: round trip, single, burst, packed (64 B),
    copied, filled, loaned (1 MiB), idle.
    """
    from ..bench import report, run
    from ..output import print_json

    scale = QUICK_SCALE if quick else 1.0
    results = run.measure(rounds or (QUICK_ROUNDS if quick else ROUNDS), scale, frozenset(only), _progress)
    if settings.output == "json":
        print_json("Benchmark", report.document(results))
    elif settings.output == "name":
        for figure in results.figures:
            click.echo(f"{figure.contender}/{figure.scenario}")
    else:
        report.draw(results)


def _progress(text: str) -> None:
    click.echo(text, err=True)
    sys.stderr.flush()
