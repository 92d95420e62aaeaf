"""What was measured, as tables for people, as one document for programs, and against what the project promises."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from .run import Figure, Results, machine

SNAP: Final = "Snap, adaptive"
PERCENTILES: Final = ("p50", "p99", "p999")
MEASURES: Final = (*PERCENTILES, "rates", "cpu")


@dataclass(frozen=True)
class Target:
    """`reached` and `wanted` in `unit`; `least`: at least that much, otherwise at most."""

    what: str
    reached: float | None
    wanted: float
    unit: str
    least: bool = False

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.wanted if self.least else self.reached <= self.wanted


def targets(results: Results) -> list[Target]:
    """What Snap means to reach at least. With the processors far apart, half of the rates."""
    rate = 0.5 if results.distance == "far" else 1.0

    def get(who: str, scenario: str, name: str, core: bool = False) -> float | None:
        found = results.figure(who, scenario, core)
        return found.median(name) if found else None

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    def millions(value: float | None) -> float | None:
        return value / 1e6 if value is not None else None

    def trips(name: str) -> list[Target]:
        snap = get("Snap, spinning", "round trip", name)
        return [
            Target(
                f"spinning round trip {name}, of iceoryx2's",
                ratio(snap, get("iceoryx2", "round trip", name)),
                0.1,
                "x",
            ),
            Target(
                f"spinning round trip {name}, of ZeroMQ's",
                ratio(snap, get("ZeroMQ", "round trip", name)),
                1 / 80,
                "x",
            ),
        ]

    snap_cpu, zeromq_cpu = get(SNAP, "single", "cpu"), get("ZeroMQ", "single", "cpu")
    loan, iceoryx_loan = get(SNAP, "loaned", "rates"), get("iceoryx2", "loaned", "rates")
    spinning = get("Snap, spinning", "round trip", "p50")
    return [
        *trips("p50"),
        *trips("p99"),
        Target(
            "spinning round trip p50, of the bare C ring's",
            ratio(spinning, get("bare C ring", "round trip", "p50")),
            3,
            "x",
        ),
        Target(
            "messages a second, one per call", millions(get(SNAP, "single", "rates")), 10 * rate, "M", True
        ),
        Target(
            "messages a second, bursts of objects",
            millions(get(SNAP, "burst", "rates")),
            40 * rate,
            "M",
            True,
        ),
        Target("messages a second, packed", millions(get(SNAP, "packed", "rates")), 80 * rate, "M", True),
        Target("1 MiB loaned, cost of iceoryx2's", ratio(iceoryx_loan, loan), 0.2, "x"),
        Target(
            "1 MiB filled by the sender, cost of iceoryx2's",
            ratio(get("iceoryx2", "filled", "rates"), get(SNAP, "filled", "rates")),
            1,
            "x",
        ),
        Target(
            "blocking round trip p50, of a Unix socket's",
            ratio(get("Snap, blocking", "round trip", "p50"), get("Unix socket", "round trip", "p50")),
            1,
            "x",
        ),
        Target(
            "blocking round trip p50 on one core", get("Snap, blocking", "round trip", "p50", True), 6, "µs"
        ),
        Target("CPU of an idle channel", get("Snap, blocking", "idle", "cpu"), 0.001, "s/s"),
        Target(
            "CPU per message in bursts, of ZeroMQ's", ratio(get(SNAP, "burst", "cpu"), zeromq_cpu), 0.1, "x"
        ),
        Target("CPU per message one per call, of ZeroMQ's", ratio(snap_cpu, zeromq_cpu), 0.1, "x"),
        Target("capability check", results.check_ns or None, 10, "ns"),
        Target(
            "Rust engine's echo p50, of Python's",
            ratio(get("Snap, Rust engine", "round trip", "p50"), spinning),
            1,
            "x",
        ),
    ]


def document(results: Results) -> dict[str, Any]:
    """Everything, medians and rounds; times in the units that `Figure` states."""
    return {
        "machine": machine(),
        "distance": results.distance,
        "line_round_trip_ns": results.lines_ns,
        "capability_check_ns": results.check_ns,
        "missing": results.missing,
        "seconds": round(results.seconds, 1),
        "figures": [
            {
                **dataclasses.asdict(figure),
                "medians": {name: figure.median(name) for name in MEASURES},
            }
            for figure in results.figures
        ],
        "targets": [{**dataclasses.asdict(target), "met": target.met} for target in targets(results)],
    }


def draw(results: Results) -> None:
    """Tables on standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    named = machine()
    console.print(
        f"{named['processor']} ({named['host']}, {named['cpus']} CPUs), {named['kernel']}, Python {named['python']}; "
        f"cache line {min(results.lines_ns):.0f} to {max(results.lines_ns):.0f} ns: {results.distance}"
    )

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for number, column in enumerate(columns):
            made.add_column(column, justify="right" if number else "left")
        return made

    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    for core, title in ((False, "Round trip of 64 B, µs"), (True, "The same, both ends on one core, µs")):
        rows = [
            figure for figure in results.figures if figure.scenario == "round trip" and figure.core is core
        ]
        if rows:
            best = next((row for row in rows if row.contender.startswith("Snap")), rows[0])
            trips = table(title, "way", "p50", "p99", "p99.9", f"of {best.contender}'s p50")
            for row in rows:
                share = (row.median("p50") or 0) / (best.median("p50") or 1)
                trips.add_row(
                    row.contender,
                    *(number(row.median(name)) for name in ("p50", "p99", "p999")),
                    f"{share:.1f}x",
                )
            console.print(trips)
    _rates(results, console.print, table, number)
    for who, why in results.missing.items():
        console.print(f"not measured: {who}: {why}")
    goals = table("Against the targets", "what", "reached", "wanted", "")
    for target in targets(results):
        sign = "at least" if target.least else "at most"
        verdict = {True: "yes", False: "[bold red]no[/]", None: "not measured"}[target.met]
        reached = "" if target.reached is None else f"{target.reached:.3g} {target.unit}"
        goals.add_row(target.what, reached, f"{sign} {target.wanted:.3g} {target.unit}", verdict)
    console.print(goals)


def _rates(results: Results, show: Any, table: Any, number: Any) -> None:
    small = table("64 B one way", "way", "M messages/s", "CPU s per M messages")
    large = table("1 MiB one way", "way", "GB/s", "µs a message")
    rows: list[Figure] = [figure for figure in results.figures if figure.rates]
    for row in rows:
        rate = row.median("rates") or 0.0
        if row.scenario in ("single", "burst", "packed"):
            small.add_row(
                f"{row.contender}, {row.scenario}", number(rate / 1e6), number(row.median("cpu"), 3)
            )
        else:
            # A loan that nobody touches moves nothing: its cost is a time, not a bandwidth.
            moved = "" if row.scenario == "loaned" else number(rate * (1 << 20) / 1e9, 1)
            large.add_row(f"{row.contender}, {row.scenario}", moved, number(1e6 / rate))
    for made in (small, large):
        if made.row_count:
            show(made)
