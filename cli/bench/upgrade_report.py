"""What was measured of upgrades: tables for people, one document for programs, a plot for those who would
rather look."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Target
from .run import machine
from .upgrade import Results


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of them are, or the largest."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def targets(results: Results) -> list[Target]:
    medians = [statistics.median(flips.blackouts) for flips in results.flips]
    worst = [percentile(flips.blackouts, 0.99) for flips in results.flips]
    gaps = [percentile(flips.gaps, 0.99) for flips in results.flips]
    rates = [value for flips in results.flips for value in flips.rates]
    return [
        Target("blackout, median, of the size with the longest", max(medians), 200, "µs"),
        Target("blackout, p99, of the size with the longest", max(worst), 1000, "µs"),
        Target("largest median blackout of a size, of the smallest", max(medians) / min(medians), 2, "x"),
        Target(
            "client's longest wait in an upgrade, p99, of the size with the longest", max(gaps), 2000, "µs"
        ),
        Target(
            "client's longest wait in a crash with standby, median",
            statistics.median(results.standby),
            5000,
            "µs",
        ),
        Target(
            "old generation's rate in a brownout, of its rate before",
            statistics.median(rates),
            0.9,
            "x",
            True,
        ),
    ]


def document(results: Results) -> dict[str, Any]:
    """Everything, in µs."""
    return {
        "machine": machine(),
        **dataclasses.asdict(results),
        "targets": [{**dataclasses.asdict(target), "met": target.met} for target in targets(results)],
    }


def draw(results: Results) -> None:
    """Tables on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    named = machine()
    console.print(
        f"{named['processor']} ({named['host']}, {named['cpus']} CPUs), {named['kernel']}, Python {named['python']}"
    )

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, column in enumerate(columns):
            made.add_column(column, justify="right" if number else "left")
        return made

    def two(values: Sequence[float]) -> tuple[str, str]:
        if not values:
            return "", ""
        return f"{statistics.median(values):,.0f}", f"{percentile(values, 0.99):,.0f}"

    sizes = table(
        "Upgrades under a client at full rate, µs",
        *(
            "state",
            "flips",
            "blackout",
            "p99",
            "client waits",
            "p99",
            "without",
            "p99",
            "brownout s",
            "rate in it",
        ),
        *("stop and restore", "ratio"),
    )
    for flips in results.flips:
        usual = statistics.median(flips.usual)
        sizes.add_row(
            flips.size.label,
            str(len(flips.blackouts)),
            *two(flips.blackouts),
            *two(flips.gaps),
            *two(flips.before),
            f"{statistics.median(flips.brownouts):.2f}",
            f"{statistics.median(flips.rates):.2f}x" if flips.rates else "",
            f"{usual:,.0f}",
            f"{usual / statistics.median(flips.gaps):,.0f}x",
        )
    console.print(sizes)
    moves = table(
        "Migrations to another schema, medians",
        *(
            "rows",
            "written meanwhile",
            "times",
            "converted in the blackout",
            "blackout µs",
            "client waits µs",
        ),
    )
    for migration in results.migrations:
        middle = (
            statistics.median(each) for each in (migration.converted, migration.blackouts, migration.gaps)
        )
        counts = (migration.entries, migration.busy, len(migration.gaps))
        moves.add_row(*(f"{value:,.0f}" for value in (*counts, *middle)))
    console.print(moves)
    deaths = table("The client's wait when the module is killed, µs", "", "times", "median", "p99")
    for label, values in (
        ("with a standby", results.standby),
        ("without", results.crashes),
        ("to compare: start Python and import the SDK", results.interpreter),
    ):
        deaths.add_row(label, str(len(values)), *two(values))
    console.print(deaths)
    for failure in results.failures:
        console.print(f"[bold red]not measured[/]: {failure}")
    goals = table("Against the targets", "what", "reached", "wanted", "")
    for target in targets(results):
        sign = "at least" if target.least else "at most"
        reached = "" if target.reached is None else f"{target.reached:.3g} {target.unit}"
        goals.add_row(
            target.what,
            reached,
            f"{sign} {target.wanted:.3g} {target.unit}",
            "yes" if target.met else "[bold red]no[/]",
        )
    console.print(goals)


def plot(results: Results, file: Path) -> None:
    """The client's wait against the size of the state, for both ways. Needs matplotlib."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    sizes = [max(1, flips.size.bytes) for flips in results.flips]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, marker, values in (
        ("stop, serialise, start, restore", "s-", [statistics.median(f.usual) for f in results.flips]),
        ("snapctl upgrade, client", "o-", [statistics.median(f.gaps) for f in results.flips]),
        ("snapctl upgrade, engine", "^--", [statistics.median(f.blackouts) for f in results.flips]),
    ):
        axes.loglog([sizes[i] for i in order], [values[i] / 1e3 for i in order], marker, label=label)
    axes.set_xlabel("state, bytes")
    axes.set_ylabel("nobody serves, ms (median)")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
