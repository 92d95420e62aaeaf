"""What was measured of Pony: tables for people, one document for programs, a table for the README, a plot."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from snap.ipc import UsageError

from .pony import (
    BURST,
    BURSTS,
    MANY_WHO,
    MTUS,
    ONE_WHO,
    REGIONS,
    STREAMS,
    UNITS,
    Figure,
    Results,
    bulk_scenario,
)
from .report import Target
from .run import machine

BEGIN: Final = "<!-- pony bench: begin -->"
END: Final = "<!-- pony bench: end -->"
VERDICTS: Final = {True: "yes", False: "no", None: "not measured"}
BASELINES: Final = ("TCP", "gRPC unary", "Unix socket RPC", "two reads", ONE_WHO)
"""Who the others of a scenario are compared with: the first of these that is there."""

DECISIVE: Final = ("goodput_per_core", "p50", "per_core", "rate")
"""The first of these that both have is what is compared."""


def targets(results: Results) -> list[Target]:
    """What Pony is meant to reach; nothing is reached by what was not measured."""
    get = results.get

    def ratio(scenario: str, who: str, rival: str, name: str) -> float | None:
        above, below = get(scenario, who, name), get(scenario, rival, name)
        return above / below if above is not None and below else None

    here, one_mib, burst = "round trip, one host", "reads in 1 MiB", f"bursts of {BURST}"
    rpc = next((who for who in BASELINES[1:3] if get(one_mib, who, "per_core")), BASELINES[2])
    made = [
        Target("64 B reads in 1 MiB per engine-second", get(one_mib, burst, "per_core"), 20, "M", True),
        Target(
            "64 B reads in 256 MiB per engine-second",
            get("reads in 256 MiB", burst, "per_core"),
            10,
            "M",
            True,
        ),
        Target("indirect reads per engine-second", get(one_mib, "indirect", "per_core"), 10, "M", True),
        Target(
            f"64 B reads per core-second, of {rpc}'s", ratio(one_mib, burst, rpc, "per_core"), 50, "x", True
        ),
        Target("message's round trip, spinning, p50", get(here, "Snap, spinning", "p50"), 2, "µs"),
        Target("message's round trip, spinning, p99", get(here, "Snap, spinning", "p99"), 5, "µs"),
        Target("one-sided read, spinning, p50", get(here, "Snap, read, spinning", "p50"), 1, "µs"),
        Target(
            "message's round trip, blocking, p50, of TCP's",
            ratio(here, "Snap, blocking", "TCP, blocking", "p50"),
            0.8,
            "x",
        ),
        *(
            Target(
                f"indirect reads per engine-second {how}, of two reads'",
                ratio(f"indirection, {how}", "indirect read", "two reads", "per_core"),
                1.9,
                "x",
                True,
            )
            for how in ("in bursts", "one at a time")
        ),
        Target(
            "indirect read's latency, p50, of two reads'",
            ratio("indirection, latency", "indirect read", "two reads", "p50"),
            0.55,
            "x",
        ),
    ]
    links: list[tuple[str, bool | None, float]] = [("one host", None, 3)]
    links += [(f"MTU {mtu}", on, 1 if on else 3) for mtu in MTUS for on in (False, True)]
    for link, on, wanted in links:
        for streams in STREAMS:
            scenario = bulk_scenario(link, streams, on)
            reached = ratio(scenario, "Snap", "TCP", "goodput_per_core")
            made.append(
                Target(f"goodput per core-second, {scenario[6:]}, of TCP's", reached, wanted, "x", True)
            )
    for mtu in MTUS:
        made.append(Target(f"64 B reads, MTU {mtu}", get(f"reads, MTU {mtu}", burst, "rate"), 5, "M/s", True))
        for name in ("p50", "p99"):
            reached = ratio(f"round trip, MTU {mtu}", "Snap, spinning", "TCP, spinning", name)
            made.append(
                Target(f"message's round trip, spinning, MTU {mtu}, {name}, of TCP's", reached, 1, "x")
            )
    for what in ("bursts of 64 reads", "messages of 64 B"):
        reached = ratio(f"connections, {what}", MANY_WHO, ONE_WHO, "rate")
        made.append(Target(f"{what} on very many connections, of one's rate", reached, 0.8, "x", True))
    return made


def baseline(
    results: Results, scenario: str, who: str, names: Sequence[str] = DECISIVE
) -> tuple[str, float] | None:
    """What `who` is compared with, and how many times as much it reached, of the first of the units `names` that both
    have; None for who is compared with nobody."""
    there = [figure.who for figure in results.figures if figure.scenario == scenario]
    rivals = [f"TCP, {who.rpartition(', ')[2]}", *BASELINES]
    rival = next((rival for rival in rivals if rival in there), None)
    if rival is None or rival == who:
        return None
    for name in names:
        own, other = results.get(scenario, who, name), results.get(scenario, rival, name)
        if own is not None and other:
            return rival, own / other
    return None


def document(results: Results) -> dict[str, Any]:
    """Everything: the rounds and their median, in the unit that each figure names."""
    return {
        "machine": machine(),
        "figures": [
            {**dataclasses.asdict(figure), "median": figure.median, "baseline": _against(results, figure)}
            for figure in results.figures
        ],
        "failures": results.failures,
        "targets": [{**dataclasses.asdict(target), "met": target.met} for target in targets(results)],
    }


def _against(results: Results, figure: Figure) -> dict[str, Any] | None:
    names = [name for name, unit in UNITS.items() if unit == figure.unit]
    found = baseline(results, figure.scenario, figure.who, names)
    return None if found is None else {"who": found[0], "ratio": found[1]}


def of_machine() -> str:
    named = machine()
    return f"{named['processor']} ({named['host']}, {named['cpus']} CPUs), {named['kernel']}, Python {named['python']}"


def _wanted(target: Target) -> tuple[str, str]:
    """What was reached and wanted, in words."""
    sign = "at least" if target.least else "at most"
    reached = "" if target.reached is None else f"{target.reached:.3g} {target.unit}"
    return reached, f"{sign} {target.wanted:.3g} {target.unit}"


def draw(results: Results) -> None:
    """Tables on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(of_machine())

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, column in enumerate(columns):
            made.add_column(column, justify="right" if number else "left")
        return made

    for scenario in dict.fromkeys(figure.scenario for figure in results.figures):
        figures = [figure for figure in results.figures if figure.scenario == scenario]
        names = [name for name, unit in UNITS.items() if any(figure.unit == unit for figure in figures)]
        made = table(scenario, "", *(UNITS[name] for name in names), "compared with")
        for who in dict.fromkeys(figure.who for figure in figures):
            values = [results.get(scenario, who, name) for name in names]
            against = baseline(results, scenario, who)
            made.add_row(
                who,
                *("" if value is None else f"{value:,.4g}" for value in values),
                "" if against is None else f"{against[1]:.2f}x {against[0]}",
            )
        console.print(made)
    for failure in results.failures:
        console.print(f"[bold red]not measured[/]: {failure}")
    goals = table("Against the targets", "what", "reached", "wanted", "")
    for target in targets(results):
        verdict = VERDICTS[target.met]
        goals.add_row(
            target.what, *_wanted(target), f"[bold red]{verdict}[/]" if target.met is False else verdict
        )
    console.print(goals)


def markdown(results: Results, file: Path) -> None:
    """Put the table between the markers in `file`. Raises UsageError when they are not there."""
    text = file.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{file} has no {BEGIN} and {END}")
    lines = [
        f"`make bench-pony` on {of_machine()}, medians:",
        "",
        "| | reached | wanted | |",
        "|---|---|---|---|",
    ]
    for target in targets(results):
        lines.append("| " + " | ".join((target.what, *_wanted(target), VERDICTS[target.met])) + " |")
    lines += ["", *(f"Not measured: {failure}." for failure in results.failures)]
    file.write_text("\n".join([head + begin, *lines, end + tail]).replace("\n\n" + END, "\n" + END))


def plot(results: Results, file: Path) -> None:
    """Reads by the size of their bursts, and bulk per core-second beside TCP. Needs matplotlib."""
    import matplotlib  # type: ignore[import-not-found,unused-ignore]

    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for label in REGIONS:
        rates = [(burst, results.get(f"reads in {label}", f"bursts of {burst}", "rate")) for burst in BURSTS]
        known = [(burst, rate) for burst, rate in rates if rate]
        if not known:
            continue
        left.loglog([burst for burst, _ in known], [rate for _, rate in known], "o-", label=f"in {label}")
    left.set_xlabel("64 B reads in a burst")
    left.set_ylabel("million reads a second")
    left.grid(True, which="both", alpha=0.3)
    left.legend()
    scenarios = [
        scenario
        for scenario in dict.fromkeys(each.scenario for each in results.figures)
        if scenario.startswith("bulk") and "lost" not in scenario
    ]
    for shift, who in ((-0.2, "Snap"), (0.2, "TCP")):
        values = [results.get(scenario, who, "goodput_per_core") or 0.0 for scenario in scenarios]
        right.barh([row + shift for row in range(len(scenarios))], values, 0.4, label=who)
    right.set_yticks(range(len(scenarios)), [scenario[6:] for scenario in scenarios], fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("goodput, Gbit per core-second")
    right.grid(True, axis="x", alpha=0.3)
    right.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
