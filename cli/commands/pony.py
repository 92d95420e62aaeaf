"""`snapctl pony`: flows to other hosts, this host's key, and measurements as an application makes them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from ._base import COMPLETION_TIMEOUT, Group, Settings, call, say

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from snap.modules.pony import Connection, Pony

    from ..pony.perf import Phase
    from ..pony.ping import Trips

SERVICE: Final = "pony-control"
MODULE: Final = "pony"
_ANSWER: Final = 4 << 20
"""Bytes of room for a list."""

_SHOWN: Final = 16
"""Digits of a fingerprint in a table."""


@click.group(cls=Group)
def pony() -> None:
    """Pony Express: flows, peers, regions, key, ping, perf."""


# -- what there is ----------------------------------------------------------------------------------------------


def listed(settings: Settings, what: str, timeout: float | None = None) -> list[dict[str, Any]]:
    """What the module says. Raises SnapError with its words, and what connecting raises."""
    from snap.ipc import SnapError, connect

    seconds = settings.seconds() if timeout is None else timeout
    with connect(settings.directory(), timeout=seconds) as client:
        channel = client.open(SERVICE, down_bytes=_ANSWER, timeout=seconds)
        with channel:
            channel.send(json.dumps({"list": what}).encode(), timeout=seconds)
            answer: dict[str, Any] = json.loads(channel.recv(timeout=seconds))
    if "error" in answer:
        raise SnapError(answer["error"])
    items: list[dict[str, Any]] = answer["items"]
    return items


def show(
    settings: Settings,
    kind: str,
    rows: Sequence[dict[str, Any]],
    name: str,
    columns: dict[str, Callable[[dict[str, Any]], object]] | None = None,
) -> None:
    """`name`: the key of the bare name; without `columns`, everything that the rows have."""
    from ..output import as_data, plain, print_json, print_table

    if settings.output == "json":
        print_json(f"{kind}List", {"items": [as_data(row) for row in rows]})
    elif settings.output == "name":
        for row in rows:
            click.echo(plain(str(row.get(name, "-"))))
    else:
        if columns is None:
            keys = list(dict.fromkeys(key for row in rows for key in row)) or [name]
            columns = {key.upper(): _column(key) for key in keys}
        print_table(list(columns), [[str(cell(row)) for cell in columns.values()] for row in rows])


def _column(key: str) -> Callable[[dict[str, Any]], object]:
    def cell(row: dict[str, Any]) -> object:
        value = row.get(key)
        return "-" if value is None else value if isinstance(value, str | int | float) else json.dumps(value)

    return cell


@pony.command()
@click.pass_obj
def flows(settings: Settings) -> None:
    """List the flows to other hosts: `-o json` has more of each."""
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "HOST": lambda row: row["host"],
        "ADDRESS": lambda row: row.get("address") or "-",
        "PORT": lambda row: row.get("port") or "-",
        "CONNECTIONS": lambda row: row["connections"],
        "WIRE": lambda row: f"{row['version']}, {row['mtu']} B" if row["attached"] else "-",
        "SEALED": lambda row: "yes" if row.get("sealed") else "no",
        "RTT": lambda row: f"{row['rtt_us']:.0f} µs" if row.get("rtt_us") else "-",
        "WINDOW": lambda row: f"{row['window']:.3g}" if row["attached"] else "-",
        "SENT": lambda row: row.get("sent", "-"),
        "AGAIN": lambda row: row.get("again", "-"),
        "RECEIVED": lambda row: row.get("received", "-"),
        "BAD": lambda row: row.get("bad", "-"),
        "ERROR": lambda row: row.get("refused") or "-",
    }
    show(settings, "PonyFlow", listed(settings, "flows"), "host", columns)


@pony.command()
@click.pass_obj
def regions(settings: Settings) -> None:
    """List the memory that applications let their peers use."""
    show(settings, "PonyRegion", listed(settings, "regions"), "id")


@pony.command()
@click.pass_obj
def peers(settings: Settings) -> None:
    """List the hosts that are known here, how it stands with them, and what went wrong last."""
    from ..output import age

    def since(row: dict[str, Any]) -> str:
        return age(time.time() - row["since"]) if row["since"] else "-"

    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "HOST": lambda row: row["host"],
        "ADDRESS": lambda row: row["address"] or "-",
        "STATE": lambda row: row["state"],
        "FOR": since,
        "CERTIFICATE": lambda row: row["fingerprint"][:_SHOWN] or "none",
        "ERROR": lambda row: row["error"] or "-",
    }
    show(settings, "PonyPeer", listed(settings, "peers"), "host", columns)


def complete_host(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    try:
        rows = listed(context.ensure_object(Settings), "peers", COMPLETION_TIMEOUT)
    except Exception:
        return []
    return [CompletionItem(row["host"]) for row in rows if row["host"].startswith(incomplete)]


# -- the key ----------------------------------------------------------------------------------------------------


@pony.command()
@click.option(
    "--force", is_flag=True, help="Make another key though there is one: peers need its certificate."
)
@click.pass_obj
def key(settings: Settings, force: bool) -> None:
    """Make this host's key, and print the certificate to give to its peers.

    They put it into peers/NAME.pem of their configuration directory, NAME being this host's name.
    """
    import socket

    from snap.ipc.paths import config_dir
    from snap.modules.pony import config, identity

    from ..output import print_json

    directory = config_dir()
    found = config.load(directory)
    name = socket.gethostname() if found is None else found.name
    made = identity.make(directory, name, force)
    pem = made.certificate.read_text()
    if settings.output == "json":
        data = {"name": name, "key": str(made.key), "certificate": pem, "fingerprint": made.own}
        print_json("PonyKey", data)
    elif settings.output == "name":
        click.echo(made.own)
    else:
        click.echo(pem, nl=False)
    say(f"{made.key} is made; SHA-256 of its certificate: {made.own}")
    say(f"give {made.certificate} to each peer, as peers/{name}.pem beside its pony.toml")
    if found is None:
        say(f"nothing listens before there is a {directory / config.FILE}: an empty one will do")


# -- measuring --------------------------------------------------------------------------------------------------


@contextmanager
def echo(settings: Settings, host: str | None, arena: int = 0) -> Iterator[tuple[Pony, Connection]]:
    """As an application, a connection to the echo of `host`, or of this host's own engine."""
    from snap.ipc import connect
    from snap.modules.pony import Pony

    from ..pony.ping import name_of

    seconds = settings.seconds()
    with (
        connect(settings.directory(), timeout=seconds) as client,
        Pony.open(client, arena, seconds) as opened,
    ):
        yield opened, opened.connect(name_of(host), seconds)


@pony.command()
@click.argument("host", required=False, shell_complete=complete_host)
@click.option("-c", "--count", type=click.IntRange(min=1), help="Stop after so many.  [default: at Ctrl-C]")
@click.option(
    "-i", "--interval", type=click.FloatRange(min=0), default=1.0, metavar="SECONDS", show_default=True
)
@click.option("-s", "--size", type=click.IntRange(8, 992), default=64, metavar="BYTES", show_default=True)
@click.pass_obj
def ping(settings: Settings, host: str | None, count: int | None, interval: float, size: int) -> None:
    """Measure round trips to the engine of HOST, or of this host: messages that come back, and one-sided reads."""
    from ..output import print_json, span
    from ..pony.ping import KINDS, Trips, name_of
    from ..pony.ping import ping as run

    trips = {kind: Trips(kind) for kind in KINDS}

    def tell(kind: str, number: int, took: int | None) -> None:
        if settings.output == "table":
            end = "no answer" if took is None else f"time={span(took)}"
            click.echo(f"{size} bytes from {host or 'this host'}: {kind} seq={number} {end}")

    try:
        with echo(settings, host) as (_, connection):
            run(connection, trips, size, count, interval, settings.seconds(), tell)
    except KeyboardInterrupt:
        if not trips[KINDS[0]].sent:
            raise
    finally:
        if settings.output == "table" and trips[KINDS[0]].sent:
            _ping_summary(name_of(host), trips)
    if settings.output == "json":
        results = [trips[kind].summary() for kind in KINDS]
        print_json("PonyPing", {"peer": name_of(host), "size": size, "trips": results})
    elif settings.output == "name":
        click.echo(name_of(host))


def _ping_summary(name: str, trips: dict[str, Trips]) -> None:
    from ..output import span

    click.echo(f"\n--- {name} ---")
    for each in trips.values():
        found = each.summary()
        times = [found[f"{which}_ns"] for which in ("min", "p50", "p99", "max")]
        words = " / ".join("-" if value is None else span(value) for value in times)
        click.echo(
            f"{each.kind + 's':>8}: {each.sent} sent, {found['received']} back, min / p50 / p99 / max = {words}"
        )


@pony.command()
@click.argument("host", required=False, shell_complete=complete_host)
@click.option(
    "-t", "--time", "seconds", type=click.FloatRange(min=0.01), default=5.0, show_default=True,
    metavar="SECONDS", help="For each kind.",
)  # fmt: skip
@click.option("-i", "--interval", type=click.FloatRange(min=0.01), default=1.0, show_default=True)
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(("messages", "reads", "writes")),
    help="May be repeated.  [default: all]",
)  # fmt: skip
@click.option(
    "--size", type=click.IntRange(1, 64 << 20), default=1 << 20, show_default=True, help="Bytes of a message."
)
@click.option(
    "--burst", type=click.IntRange(1, 1 << 16), default=1024, show_default=True,
    help="Reads or writes at once.",
)  # fmt: skip
@click.option(
    "--piece", type=click.IntRange(1, 4096), default=64, show_default=True, help="Bytes of a read or write."
)
@click.pass_obj
def perf(
    settings: Settings,
    host: str | None,
    seconds: float,
    interval: float,
    kinds: tuple[str, ...],
    size: int,
    burst: int,
    piece: int,
) -> None:
    """Measure how much goes to the engine of HOST, or of this host, and what processor time it takes here."""
    from snap.modules.pony import PonyError

    from ..output import print_json
    from ..pony.perf import KINDS, Phase, arena_bytes, run
    from ..pony.ping import name_of

    phases: list[Phase] = []

    def tell(phase: Phase, row: dict[str, float]) -> None:
        if settings.output == "table":
            took = row["end"] - row["begin"]
            span = f"{row['begin']:.2f}-{row['end']:.2f} s"
            click.echo(f"{phase.kind:>8}  {span:>15}  {_amounts(phase, row['bytes'], took)}")

    try:
        with echo(settings, host, arena_bytes(size, burst, piece)) as (opened, connection):
            pid = _engine_pid(settings)
            for kind in kinds or KINDS:
                phases.append(phase := Phase(kind))
                try:
                    run(opened, connection, phase, seconds, interval, size, burst, piece, pid, tell)
                except PonyError as error:
                    phase.error = error.message
    except KeyboardInterrupt:
        if not phases:
            raise
    if settings.output == "json":
        print_json("PonyPerf", {"peer": name_of(host), "phases": [phase.data() for phase in phases]})
    elif settings.output == "name":
        click.echo(name_of(host))
    else:
        _perf_summary(phases)
    if failed := [phase for phase in phases if phase.error]:
        raise PonyError(f"{failed[0].kind}: {failed[0].error}", "`snapctl pony flows` shows the flow")


def _amounts(phase: Phase, count: float, took: float) -> str:
    """Of `count` bytes in `took` seconds: how much, and how fast."""
    from ..output import size

    rate = f"{count * 8 / took / 1e9:.2f} Gbit/s" if took > 0 else "-"
    if phase.kind == "messages" or not phase.bytes:
        return f"{size(round(count)):>10}  {rate}"
    operations = count * phase.operations / phase.bytes
    each = f"{operations / took / 1e6:.3f} M/s" if took > 0 else "-"
    return f"{size(round(count)):>10}  {rate}  {each}"


def _perf_summary(phases: Sequence[Phase]) -> None:
    from ..output import print_table

    def per_core(phase: Phase) -> str:
        """What one processor did in a second: of the client and of the engine, as if each were alone."""
        return " / ".join(
            f"{phase.bytes * 8 / used / 1e9:.2f} Gbit" if used else "-"
            for used in (phase.client_cpu, phase.engine_cpu)
        )

    def cpu(phase: Phase) -> str:
        engine = "-" if phase.engine_cpu is None else f"{phase.engine_cpu:.2f}"
        return f"{phase.client_cpu:.2f} / {engine}"

    click.echo()
    print_table(
        (
            "",
            "SECONDS",
            "AMOUNT AND RATE",
            "CPU SECONDS, CLIENT / ENGINE",
            "PER CORE-SECOND, CLIENT / ENGINE",
        ),
        [
            (
                phase.kind,
                f"{phase.seconds:.2f}",
                phase.error or _amounts(phase, phase.bytes, phase.seconds).strip(),
                cpu(phase),
                per_core(phase),
            )
            for phase in phases
        ],
    )


def _engine_pid(settings: Settings) -> int | None:
    """None for who may not ask."""
    from snap.ipc import SnapError

    try:
        found = call(settings, "module.show", dict[str, Any], name=MODULE)
    except SnapError:
        return None
    pid: int | None = found["pid"]
    return pid
