"""`snapctl demo`: see it work, on real input. What happens is told in `snap.cli.demo`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ._base import Settings, say

if TYPE_CHECKING:
    from snap.ipc import Client

    from ..demo.between import Copy
    from ..demo.plan import Plan
    from ..demo.roundtrip import Percentiles
    from ..demo.script import Happened
    from ..demo.sender import Sender
    from ..demo.stage import Stage

MODULES: Final = ("relay", "echo")
PARTS: Final = ("relay", "hosts")
EVENTS: Final = ("upgrade", "kill", "kernel", "rollback")
IN_WORDS: Final = {
    "": "nothing",
    "upgrade": "upgrade in place",
    "kill": "SIGKILL of the module",
    "kernel": "SIGKILL of the kernel",
    "rollback": "rollback",
}
READY_SECONDS: Final = 30.0
DRAW_BYTES: Final = 1 << 20
SHOWN: Final = 5


@dataclass(frozen=True)
class Stretch:
    """A part of the transfer: `gap_ns` is the longest without a delivery, as the writer saw it; `engine_ns` the longest
    without a poll, as the engines measured, and `client_ns` what the kernel read of it from the channels."""

    event: str
    gap_ns: int
    bytes_per_second: float
    engine_ns: int | None = None
    client_ns: int | None = None
    what: str = ""


@dataclass(frozen=True)
class Result:
    """`bytes` and `files` are the tree's; it was sent `laps` times, `stream_bytes` in all. `quiet`: the stretches in
    which nothing happened."""

    path: str
    files: int
    bytes: int
    laps: int
    chunks: int
    stream_bytes: int
    stream_sha256: str
    seconds: float
    bytes_per_second: float
    lost: int
    duplicated: int
    verified: int
    quiet: Stretch
    events: list[Stretch]
    skipped: dict[str, int]
    unreadable: list[str]


def parse_events(text: str) -> list[str]:
    """The option's list. Raises click.BadParameter."""
    names = [] if text == "none" else text.split(",")
    upgraded = False
    for name in names:
        if name not in EVENTS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(EVENTS)}; or `none` alone.")
        if name == "rollback" and not upgraded:
            raise click.BadParameter("there is nothing to roll back to without an upgrade before.")
        upgraded = name == "upgrade" or (upgraded and name != "rollback")
    return names


@click.command()
@click.option(
    "--path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The tree to send.  [default: Python's standard library]",
)
@click.option(
    "--events",
    type=parse_events,
    default=",".join(EVENTS),
    show_default=True,
    metavar="LIST",
    help="What happens meanwhile, in this order; `none`: nothing.",
)
@click.option(
    "--only",
    type=click.Choice(PARTS),
    help="Only the part through one module, or only the one between two hosts.",
)
@click.option("--keep", is_flag=True, help="Keep the temporary folder: logs, and the tree as written.")
@click.make_pass_decorator(Settings, ensure=True)
def demo(settings: Settings, path: Path | None, events: list[str], only: str | None, keep: bool) -> None:
    """Send a directory tree through a module that is upgraded, killed, loses its kernel and is rolled back meanwhile.

    Starts a kernel of its own in a temporary folder; needs no root and leaves nothing behind. The tree goes from this
    process through the engine of the module `relay` to a second process, which writes it out: again and again until
    all has happened. Neither of the two does anything about it, and nothing is sent twice. Ends with two tables: what
    arrived, with the longest time without a delivery around each event, and round trips beside a Unix socket and
    ZeroMQ, measured in the same run.

    Then the tree goes between two kernels, in network namespaces of their own (without root: on two ports), by Pony
    Express, while the engines of both are upgraded and one is killed; with its goodput beside TCP. Exits with 1 when
    a chunk was lost, came twice, or a checksum differs.
    """
    from ..demo.stage import Stage
    from ..output import print_json
    from . import _between

    tree = _scan(path)
    parts: dict[str, object] = {}
    digests = []
    if only != "hosts":
        with Stage(keep) as stage:
            if keep:
                say(f"keeping {stage.folder}")
            result, trips = _run(settings, stage, tree, events)
        parts |= {**asdict(result), "round_trips": [trip._asdict() for trip in trips]}
        digests.append(result.stream_sha256)
        if settings.output not in ("json", "name"):
            _show(result, trips)
    if only != "relay":
        found = _between.run(tree)
        parts["hosts"] = asdict(found)
        digests.append(found.stream_sha256)
        if settings.output not in ("json", "name"):
            _between.show(found)
    if settings.output == "json":
        print_json("Demo", parts)
    elif settings.output == "name":
        click.echo("\n".join(digests))


def _scan(path: Path | None) -> Plan:
    """Raises UsageError."""
    from snap.ipc import UsageError

    from ..demo import plan

    try:
        return plan.scan(path or plan.standard_library(), frozenset() if path else plan.NOT_STANDARD)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give another --path") from error


def _run(
    settings: Settings, stage: Stage, tree: Plan, events: Sequence[str]
) -> tuple[Result, list[Percentiles]]:
    from snap.ipc import connect
    from snap.ipc.control import ControlClient

    from ..demo import roundtrip

    runtime_dir = settings.runtime_dir or stage.folder / "run"
    with ExitStack() as stack:
        stage.start_kernel(runtime_dir, "--respawn")
        with ControlClient(runtime_dir) as operator:
            for module in MODULES:
                operator.call("module.start", timeout=READY_SECONDS, name=module, wait=True)
        client = stack.enter_context(connect(runtime_dir=runtime_dir))
        result = _transfer(stage, client, tree, runtime_dir, events)
        say("measuring round trips")
        return result, roundtrip.compare(stage, client)


def _transfer(stage: Stage, client: Client, tree: Plan, runtime_dir: Path, events: Sequence[str]) -> Result:
    from ..demo import plan, script, verify
    from ..demo.frames import POOL_BYTES
    from ..demo.sender import Sender
    from ..demo.stage import Writer

    written = stage.folder / "written"
    written.mkdir()
    newer = script.write_newer(stage.folder / "newer")
    writer = Writer(stage, runtime_dir, written)
    with ExitStack() as stack:
        channel = stack.enter_context(client.open("relay-in", up_bytes=POOL_BYTES, wait=READY_SECONDS))
        on_event, on_bytes = stack.enter_context(_sending(tree.bytes if not events else None))

        def mark(event: str) -> None:
            writer.mark(event)
            on_event(IN_WORDS[event] if event else "sending")

        def on_wait() -> None:
            writer.check()
            play.check()
            on_bytes(sender.bytes)

        acts = script.relay(runtime_dir, newer)
        play = script.Script([runtime_dir], [(event, acts[event]) for event in events], mark)
        sender = Sender(channel, tree, lambda: not play.over, on_wait)
        stack.callback(play.stop)
        play.start()
        begin = time.monotonic()
        sender.run()
        seen = writer.finish()
        seconds = time.monotonic() - begin
        play.check()
    with _verifying(len(tree.files)) as on_progress:
        wrong = verify.differences(tree, written, on_progress)
    demand_equal(sender, seen, wrong)
    quiet, events_seen = stretches(seen["periods"], play.happened)
    return Result(
        path=plan.shown(tree.root),
        files=len(tree.files),
        bytes=tree.bytes,
        laps=sender.laps,
        chunks=sender.frames,
        stream_bytes=sender.bytes,
        stream_sha256=sender.digest,
        seconds=seconds,
        bytes_per_second=sender.bytes / seconds,
        lost=seen["lost"],
        duplicated=seen["duplicated"],
        verified=len(tree.files),
        quiet=quiet,
        events=events_seen,
        skipped=dict(tree.skipped),
        unreadable=tree.unreadable,
    )


def stretches(periods: list[dict[str, Any]], happened: Sequence[Happened]) -> tuple[Stretch, list[Stretch]]:
    """The quiet periods taken together, and each of the others with what happened in it."""

    def stretch(name: str, parts: list[dict[str, Any]], **more: Any) -> Stretch:
        took = sum(part["end_ns"] - part["begin_ns"] for part in parts)
        gap = max((part["gap_ns"] for part in parts), default=0)
        return Stretch(name, gap, sum(part["bytes"] for part in parts) / max(took, 1) * 1e9, **more)

    loud = [period for period in periods if period["name"]]
    return stretch("", [period for period in periods if not period["name"]]), [
        stretch(one.event, [period], engine_ns=one.engine_ns, client_ns=one.client_ns, what=one.what)
        for period, one in zip(loud, happened, strict=True)
    ]


def demand_equal(sender: Sender | Copy, seen: dict[str, Any], wrong: list[str]) -> None:
    """Raises SnapError unless every frame arrived once, in order, and as it was sent."""
    from snap.ipc import SnapError

    if seen["lost"] or seen["duplicated"] or seen["frames"] != sender.frames:
        wrong.append(
            f"{sender.frames} chunks were sent, {seen['frames']} counted: "
            f"{seen['lost']} lost, {seen['duplicated']} came twice"
        )
    if seen["digest"] != sender.digest:
        wrong.append(f"SHA-256 of the stream: {sender.digest} sent, {seen['digest']} arrived")
    if wrong:
        for line in wrong[:SHOWN]:
            say(line)
        raise SnapError(
            f"{len(wrong)} differences between what was sent and what was written, the first: {wrong[0]}",
            "send a tree that nobody writes to, or look at both with --keep",
        )


@contextmanager
def _sending(total: int | None) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """Tell on standard error what happens, and how many bytes were sent: a bar on a terminal, else a line an event."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>22}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("sending", total=total)
        shown = 0

        def on_event(words: str) -> None:
            bar.update(task, description=words)
            if bar.disable:
                say(words)

        def on_bytes(count: int) -> None:
            nonlocal shown
            if count - shown >= DRAW_BYTES:
                shown = count
                bar.update(task, completed=count)

        yield on_event, on_bytes


@contextmanager
def _verifying(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; drawn at most a few hundred times, for comparing is faster than a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("verifying", total=total)
        step = max(total // 200, 1)

        def update(done: int) -> None:
            if done % step == 0 or done == total:
                bar.update(task, completed=done)

        yield update


def _show(result: Result, trips: list[Percentiles]) -> None:
    from ..output import plain, print_table, size, span

    for line in result.unreadable[:SHOWN]:
        say(f"not sent: {plain(line)}")

    def rate(count: float) -> str:
        return f"{size(round(count))}/s"

    rows = [
        ("tree", f"{result.path}: {result.files} files, {size(result.bytes)}"),
        ("sent", f"{result.laps} times over, {size(result.stream_bytes)} in {result.seconds:.2f} s"),
        ("rate", f"{rate(result.bytes_per_second)}, all of the gaps included"),
        ("ledger", f"{result.chunks} chunks, {result.lost} lost, {result.duplicated} duplicated"),
        ("checksums", f"{result.verified} of {result.files} files and the stream equal (SHA-256)"),
        ("skipped", ", ".join(f"{count} {what}" for what, count in result.skipped.items()) or "nothing"),
        ("unreadable", str(len(result.unreadable))),
    ]
    print_table(("transfer", ""), rows)
    click.echo()
    print_table(
        ("meanwhile", "longest gap", "no engine polled", "rate", ""),
        [
            (
                IN_WORDS[stretch.event],
                span(stretch.gap_ns),
                "-" if stretch.engine_ns is None else span(stretch.engine_ns),
                rate(stretch.bytes_per_second),
                stretch.what,
            )
            for stretch in (result.quiet, *result.events)
        ],
    )
    click.echo()
    print_table(
        ("round trip of 64 B, µs", "p50", "p99", "p99.9"),
        [(trip.way, f"{trip.p50:.2f}", f"{trip.p99:.2f}", f"{trip.p999:.2f}") for trip in trips],
    )
