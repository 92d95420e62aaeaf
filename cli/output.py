"""How snapctl prints data: tables for people, versioned JSON for programs, bare names for shells.

rich is imported only when a table is drawn. Whatever came from a module or a peer is stripped of control
characters on its way to a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from msgspec import Struct

API_VERSION: Final = "snap/v1"
# The fields of views that are a point in time, in Unix seconds.
TIMES: Final = frozenset({"time", "since", "started", "finished", "expires"})
KINDS: Final = {"EventView": "event", "UpgradeView": "operation"}
COLOURS: Final = {
    "ready": "green",
    "ok": "green",
    "open": "green",
    "allowed": "green",
    "committed": "green",
    "recovered": "green",
    "starting": "yellow",
    "stopping": "yellow",
    "backoff": "yellow",
    "limited": "yellow",
    "paused": "yellow",
    "running": "yellow",
    "rolled back": "red",
    "aborted": "red",
    "given up": "red",
    "failed": "red",
    "unavailable": "red",
    "revoked": "red",
    "faulted": "red",
    "gone": "red",
    "denied": "red",
}

V = TypeVar("V", bound="Struct")


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def age(seconds: float) -> str:
    """A duration in its two largest units: `3d 4h`, `12s`."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count}{name}")
    return " ".join(parts[:2])


def span(nanoseconds: float) -> str:
    """A short time with three digits in the unit that suits it: `142 µs`, `3.20 ms`; a negative one is none: `-`."""
    if nanoseconds < 0:
        return "-"
    value = nanoseconds / 1000
    for unit in ("µs", "ms"):
        if value < 999.5:
            return f"{value:.3g} {unit}" if value >= 100 or value == 0 else f"{value:#.3g} {unit}"
        value /= 1000
    return f"{value:.2f} s"


def size(count: int | None) -> str:
    """A number of bytes in the largest binary unit that leaves it above one."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def plain(text: str) -> str:
    """`text` with control characters made visible, so that a log line cannot drive the operator's terminal."""
    return "".join(c if c == "\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_data(view: Any) -> Any:
    """A view as JSON-able data: a time becomes RFC 3339 text, with the same in integer nanoseconds beside it.

    What kind of event or upgrade it is stands under a name of its own, for `kind` is the document's."""
    import msgspec

    found = _with_times(msgspec.to_builtins(view))
    if (name := KINDS.get(type(view).__name__)) is not None:
        found = {name: found.pop("kind"), **found}
    return found


def _with_times(data: Any) -> Any:
    if isinstance(data, list):
        return [_with_times(item) for item in data]
    if not isinstance(data, dict):
        return data
    found: dict[str, Any] = {}
    for key, value in data.items():
        if key in TIMES and isinstance(value, int | float):
            found[key] = rfc3339(value)
            # A double holds microseconds of our days, and no more.
            found[f"{key}_ns"] = round(value * 1e6) * 1000
        else:
            # What an event carries is its sender's own: names in there say nothing about units.
            found[key] = value if key == "data" else _with_times(value)
    return found


def print_json(kind: str, data: dict[str, Any], *, one_line: bool = False, err: bool = False) -> None:
    """ASCII, for a terminal may take more than the first 32 characters as commands."""
    document = {"apiVersion": API_VERSION, "kind": kind, **data}
    click.echo(json.dumps(document, indent=None if one_line else 2), err=err)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Borderless, and of any width when standard output is not a terminal: grep and awk get whole lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell), style=COLOURS.get(cell, "")) for cell in row))
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()), color=True)


def show_list(
    output: str,
    kind: str,
    views: Sequence[V],
    columns: dict[str, Callable[[V], object]],
    name: Callable[[V], object],
) -> None:
    """Print `views` as the operator asked: `columns` gives each column's title and cell, `name` the bare name."""
    if output == "json":
        print_json(f"{kind}List", {"items": [as_data(view) for view in views]})
    elif output == "name":
        for view in views:
            click.echo(plain(str(name(view))))
    else:
        print_table(list(columns), [[str(cell(view)) for cell in columns.values()] for view in views])


def show_one(output: str, kind: str, view: V, text: Callable[[V], None], name: Callable[[V], object]) -> None:
    """Print one view; `text` prints it for people."""
    if output == "json":
        print_json(kind, as_data(view))
    elif output == "name":
        click.echo(plain(str(name(view))))
    else:
        text(view)


def field(label: str, value: object) -> None:
    """One `label: value` line of a page about one object."""
    click.echo(f"{label + ':':>12} {plain(str(value))}")


def state(text: str) -> str:
    """A state in its colour, for lines that are no table; click drops the colour where NO_COLOR or a pipe asks."""
    import os

    return text if os.environ.get("NO_COLOR") else click.style(text, fg=COLOURS.get(text))
