"""The demo's second part: what `snapctl demo` runs and shows of it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from ._base import say

if TYPE_CHECKING:
    from ..demo.between import Goodput
    from ..demo.plan import Plan
    from .demo import Stretch


@dataclass(frozen=True)
class Between:
    """`bytes_per_second` is that of the transfer, its gaps included; `namespaces`: whether each host had a
    network of its own."""

    namespaces: bool
    laps: int
    stream_bytes: int
    stream_sha256: str
    seconds: float
    bytes_per_second: float
    chunks: int
    lost: int
    duplicated: int
    verified: int
    quiet: Stretch
    events: list[Stretch]
    goodput: list[Goodput]


def run(tree: Plan) -> Between:
    """Raises SnapError when a chunk was lost, came twice, or a checksum differs."""
    from ..bench import pony_hosts
    from ..demo import between, verify
    from .demo import demand_equal, stretches

    why = pony_hosts.unable()
    say(f"two hosts on loopback: {why}" if why else "two hosts in network namespaces")
    with ExitStack() as stack:
        hosts = pony_hosts.two_ports() if why else pony_hosts.two_hosts(between.MTU)
        site = stack.enter_context(hosts)
        written = site.stage.folder / "written"
        written.mkdir()
        copy = between.copy(site, tree, written, say)
        demand_equal(copy, copy.seen, verify.differences(tree, written, lambda _: None))
        say("measuring goodput")
        goodput = between.compare(site)
    quiet, events = stretches(copy.seen["periods"], copy.happened)
    return Between(
        namespaces=not why,
        laps=copy.laps,
        stream_bytes=copy.bytes,
        stream_sha256=copy.digest,
        seconds=copy.seconds,
        bytes_per_second=copy.bytes / copy.seconds,
        chunks=copy.frames,
        lost=copy.seen["lost"],
        duplicated=copy.seen["duplicated"],
        verified=len(tree.files),
        quiet=quiet,
        events=events,
        goodput=goodput,
    )


def show(found: Between) -> None:
    from ..output import print_table, size, span

    def rate(count: float) -> str:
        return f"{size(round(count))}/s"

    where = "two kernels in network namespaces" if found.namespaces else "two kernels on loopback"
    rows = [
        ("between", where),
        ("sent", f"{found.laps} times over, {size(found.stream_bytes)} in {found.seconds:.2f} s"),
        ("rate", f"{rate(found.bytes_per_second)}, all of the gaps included"),
        ("ledger", f"{found.chunks} chunks, {found.lost} lost, {found.duplicated} duplicated"),
        ("checksums", f"{found.verified} of {found.verified} files and the stream equal (SHA-256)"),
    ]
    click.echo()
    print_table(("between hosts", ""), rows)
    click.echo()
    print_table(
        ("meanwhile", "longest gap", "no engine polled", "rate", ""),
        [
            (
                each.event or "nothing",
                span(each.gap_ns),
                "-" if each.engine_ns is None else span(each.engine_ns),
                rate(each.bytes_per_second),
                each.what,
            )
            for each in (found.quiet, *found.events)
        ],
    )
    click.echo()
    print_table(
        ("memory to memory", "Gbit/s", "Gbit per core-second"),
        [(each.who, f"{each.rate:.1f}", f"{each.per_core:.1f}") for each in found.goodput],
    )
