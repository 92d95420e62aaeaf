"""`snapctl bench`: Snap measured beside its peers on this machine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Final

import click

from ._base import Settings

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 3
QUICK_SCALE: Final = 0.2
SCENARIOS: Final = ("round trip", "single", "burst", "packed", "copied", "filled", "loaned", "idle")
PONY: Final = ("reads", "trips", "indirect", "bulk", "connections", "hosts", "loss")


@click.group(invoke_without_command=True)
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
@click.pass_context
def bench(context: click.Context, quick: bool, rounds: int | None, only: tuple[str, ...]) -> None:
    """Compare Snap with a Unix socket, Pipe, ZeroMQ, iceoryx2 (if installed) and a bare C ring.

    Two processes on two processors; everybody in turn in each round; medians over the rounds. Needs no kernel. The
    figures are of this machine at this moment: quote the ratios. Scenarios: round trip, single, burst, packed (64 B),
    copied, filled, loaned (1 MiB), idle. `snapctl bench upgrade` and `snapctl bench
    pony` measure these instead.
    """
    if context.invoked_subcommand is not None:
        return
    from ..bench import report, run
    from ..output import print_json

    settings: Settings = context.obj
    scale = QUICK_SCALE if quick else 1.0
    results = run.measure(rounds or (QUICK_ROUNDS if quick else ROUNDS), scale, frozenset(only), _progress)
    if settings.output == "json":
        print_json("Benchmark", report.document(results))
    elif settings.output == "name":
        for figure in results.figures:
            click.echo(f"{figure.contender}/{figure.scenario}")
    else:
        report.draw(results)


@bench.command()
@click.option("--quick", is_flag=True, help="Small states and a few upgrades of each: about a minute.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw a PNG there (needs matplotlib)."
)
@click.option("--flips", type=click.IntRange(1), default=30, show_default=True, help="Upgrades at each size.")
@click.pass_obj
def upgrade(settings: Settings, quick: bool, plot: Path | None, flips: int) -> None:
    """How long nobody serves in an upgrade, and how long a client waits, beside stop, serialise, start, restore.

    Starts a kernel of its own, with a client that writes rows at full rate: 30 upgrades each at 1 KiB, 1 MiB,
    1 GiB and a million rows of state, schema migrations, crashes with and without a standby. About twelve minutes.
    """
    from ..bench import upgrade as measuring
    from ..bench import upgrade_report as report
    from ..output import print_json

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install matplotlib")
    results = measuring.measure(quick, _progress, flips)
    if plot is not None:
        report.plot(results, plot)
    if settings.output == "json":
        print_json("UpgradeBenchmark", report.document(results))
    else:
        report.draw(results)


@bench.command()
@click.option("--quick", is_flag=True, help="Fewer and shorter rounds: about two minutes, rougher figures.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw a PNG there (needs matplotlib)."
)
@click.option(
    "--markdown",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put the targets into this file, between its markers.",
)
@click.option(
    "--only", type=click.Choice(PONY), multiple=True, metavar="PART", help="Only this; may be repeated."
)
@click.pass_obj
def pony(
    settings: Settings, quick: bool, plot: Path | None, markdown: Path | None, only: tuple[str, ...]
) -> None:
    """One-sided operations, messages and bulk of Pony Express, on one host and between two, beside TCP.

    Starts kernels of its own; the two hosts are network namespaces, which need root. Parts: reads, trips, indirect,
    bulk, connections, hosts, loss. About ten minutes.
    """
    from ..bench import pony as measuring
    from ..bench import pony_report as report
    from ..output import print_json

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install matplotlib")
    results = measuring.measure(quick, _progress, frozenset(only))
    if plot is not None:
        report.plot(results, plot)
    if markdown is not None:
        report.markdown(results, markdown)
    if settings.output == "json":
        print_json("PonyBenchmark", report.document(results))
    else:
        report.draw(results)


def _progress(text: str) -> None:
    click.echo(text, err=True)
    sys.stderr.flush()
