"""What was measured of upgrades: tables for people, one document for programs, a plot for those who would
rather look."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from .pinger import PAUSE
from .report import Target
from .run import machine
from .upgrade import Results

SHORTEST: Final = PAUSE / 1e3
"""µs: clients do not tell of shorter waits."""


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which `part` of them are, or the largest."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def targets(results: Results) -> list[Target]:
    """What upgrades are meant to reach; nothing is reached by what was not measured."""
    medians = [statistics.median(flips.blackouts) for flips in results.flips]
    worst = [percentile(flips.blackouts, 0.99) for flips in results.flips]
    gaps = [percentile(flips.gaps, 0.99) for flips in results.flips]
    shares = [flips.share for flips in results.flips]
    spread = max(medians) / min(medians) if medians else None
    return [
        Target("blackout, median, of the size with the longest", max(medians, default=None), 200, "µs"),
        Target("blackout, p99, of the size with the longest", max(worst, default=None), 1000, "µs"),
        Target("largest median blackout of a size, of the smallest", spread, 2, "x"),
        Target(
            "client's wait in an upgrade, p99, of the size with the longest",
            max(gaps, default=None),
            2000,
            "µs",
        ),
        Target("client's wait in a crash with standby, median", _median(results.standby), 5000, "µs"),
        Target(
            "migration's blackout, of that with as much written in the smallest table",
            _growth(results),
            2,
            "x",
        ),
        Target(
            "rate in a brownout, of that before, of the size with the least",
            min(shares, default=None),
            0.9,
            "x",
            True,
        ),
    ]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _growth(results: Results) -> float | None:
    """How much longer a migration's blackout is in the largest table than in the smallest, at as many rows written."""
    for small in sorted(results.migrations, key=lambda each: each.entries):
        for large in sorted(results.migrations, key=lambda each: -each.entries):
            if large.busy == small.busy and large.entries > small.entries:
                return statistics.median(large.blackouts) / statistics.median(small.blackouts)
    return None


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
        usual = _median(flips.usual)
        sizes.add_row(
            flips.size.label,
            str(len(flips.blackouts)),
            *two(flips.blackouts),
            *two(flips.gaps),
            *two(flips.before),
            f"{statistics.median(flips.brownouts):.2f}",
            f"{flips.share:.2f}x",
            f"{usual:,.0f}" if usual else "",
            f"{usual / max(statistics.median(flips.gaps), SHORTEST):,.0f}x" if usual else "",
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
            {True: "yes", False: "[bold red]no[/]", None: "not measured"}[target.met],
        )
    console.print(goals)


def plot(results: Results, file: Path) -> None:
    """The client's wait against the size of the state, for both ways. Needs matplotlib."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    flips_by_size = sorted(results.flips, key=lambda flips: flips.size.bytes)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, marker, name in (
        ("stop, serialise, start, restore", "s-", "usual"),
        ("snapctl upgrade, client", "o-", "gaps"),
        ("snapctl upgrade, engine", "^--", "blackouts"),
    ):
        points = [(flips.size.bytes, _median(getattr(flips, name))) for flips in flips_by_size]
        known = [(size, value / 1e3) for size, value in points if value]
        axes.loglog([size for size, _ in known], [value for _, value in known], marker, label=label)
    axes.set_xlabel("state, bytes")
    axes.set_ylabel("nobody serves, ms (median)")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
