"""`snapctl demo`: see it work, on real input. What happens is told in `snap.cli.demo`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ._base import Settings, say

if TYPE_CHECKING:
    from snap.ipc import Client
    from snap.ipc.control import ControlClient

    from ..demo.plan import Plan
    from ..demo.roundtrip import Percentiles
    from ..demo.stage import Stage

MODULE: Final = "relay"
READY_SECONDS: Final = 30.0
POOL_BYTES: Final = 16 << 20
SHOWN: Final = 5


@dataclass(frozen=True)
class Result:
    """`seconds` from the first chunk to the last acknowledgement, the gap within; the gap as the writer saw it."""

    path: str
    files: int
    bytes: int
    seconds: float
    bytes_per_second: float
    restart: str
    gap_seconds: float | None
    resent_chunks: int
    duplicates_dropped: int
    skipped: dict[str, int]
    unreadable: list[str]
    verified: int


@click.command()
@click.option(
    "--path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The tree to send.  [default: Python's standard library]",
)
@click.option(
    "--restart",
    type=click.Choice(["graceful", "kill", "none"]),
    default="graceful",
    show_default=True,
    help="How the module is interrupted half-way: by order, by SIGKILL, not at all.",
)
@click.option(
    "--window",
    type=click.IntRange(1, 512),
    default=64,
    show_default=True,
    help="Chunks of 64 KiB on their way at a time.",
)
@click.option("--keep", is_flag=True, help="Keep the temporary folder: logs, and the tree as written.")
@click.make_pass_decorator(Settings, ensure=True)
def demo(settings: Settings, path: Path | None, restart: str, window: int, keep: bool) -> None:
    """Send a directory tree through a module that is restarted half-way, and verify every file.

    Starts a kernel of its own in a temporary folder; needs no root and leaves nothing behind. The tree goes from this
    process through the engine of the module `relay` to a second process, which writes it out. Ends with
    a table: files, bytes, rate, the gap of the restart, and round trips beside a Unix socket and ZeroMQ, measured in
    the same run. Exits with 1 when a checksum differs.
    """
    from ..demo.stage import Stage

    with Stage(keep) as stage:
        if keep:
            say(f"keeping {stage.folder}")
        result, trips = _run(settings, stage, path, restart, window)
    _show(settings.output, result, trips)


def _run(
    settings: Settings, stage: Stage, path: Path | None, restart: str, window: int
) -> tuple[Result, list[Percentiles]]:
    from snap.ipc import UsageError, connect
    from snap.ipc.control import ControlClient

    from ..demo import plan, roundtrip
    from ..demo.stage import start_kernel

    try:
        tree = plan.scan(path or plan.standard_library(), frozenset() if path else plan.NOT_STANDARD)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give another --path") from error
    runtime_dir = settings.runtime_dir or stage.folder / "run"
    with ExitStack() as stack:
        start_kernel(stage, runtime_dir)
        operator = stack.enter_context(ControlClient(runtime_dir))
        for module in (MODULE, "echo"):
            operator.call("module.start", timeout=READY_SECONDS, name=module, wait=True)
        client = stack.enter_context(connect(runtime_dir=runtime_dir))
        result = _transfer(stage, client, operator, tree, runtime_dir, restart, window)
        say("measuring round trips")
        return result, roundtrip.compare(stage, client)


def _transfer(
    stage: Stage,
    client: Client,
    operator: ControlClient,
    tree: Plan,
    runtime_dir: Path,
    restart: str,
    window: int,
) -> Result:
    from ..demo import plan, verify
    from ..demo.sender import Sender
    from ..demo.stage import Writer

    written = stage.folder / "written"
    written.mkdir()
    interrupt = None if restart == "none" else _interruption(operator, restart)
    writer = Writer(stage, runtime_dir, written)
    with _progress("sending", len(tree.chunks)) as on_progress:
        channel = client.open("relay-in", up_bytes=POOL_BYTES, wait=READY_SECONDS)
        sender = Sender(channel, tree, window, on_progress, writer.check, interrupt)
        begin = time.monotonic()
        sender.run()
        seconds = time.monotonic() - begin
    seen = writer.finish()
    with _progress("verifying", len(tree.files)) as on_progress:
        wrong = verify.differences(tree, written, on_progress)
    _demand_equal(tree, seen["files"], wrong)
    return Result(
        path=plan.shown(tree.root),
        files=len(tree.files),
        bytes=tree.bytes,
        seconds=seconds,
        bytes_per_second=tree.bytes / seconds,
        restart=restart,
        gap_seconds=seen["gap_ns"] / 1e9 if restart != "none" else None,
        resent_chunks=sender.window.resent,
        duplicates_dropped=seen["duplicates"],
        skipped=dict(tree.skipped),
        unreadable=tree.unreadable,
        verified=len(tree.files),
    )


def _interruption(operator: ControlClient, restart: str) -> Callable[[], None]:
    def by_order() -> None:
        operator.call("module.restart", name=MODULE, wait=False)

    def by_kill() -> None:
        os.kill(operator.call("module.show", name=MODULE)["pid"], signal.SIGKILL)

    return by_kill if restart == "kill" else by_order


def _demand_equal(tree: Plan, files: int, wrong: list[str]) -> None:
    from snap.ipc import SnapError

    if files != len(tree.files):
        wrong.append(f"{len(tree.files)} files were sent, {files} written")
    if wrong:
        for line in wrong[:SHOWN]:
            say(line)
        raise SnapError(
            f"{len(wrong)} differences between what was sent and what was written, the first: {wrong[0]}",
            "send a tree that nobody writes to, or look at both with --keep",
        )


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; drawn at most a few hundred times, for the transfer is faster than a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        step = max(total // 200, 1)
        shown = 0

        def update(done: int) -> None:
            nonlocal shown
            if done - shown >= step or done == total:
                shown = done
                bar.update(task, completed=done)

        yield update


def _show(output: str, result: Result, trips: list[Percentiles]) -> None:
    from ..output import plain, print_json, print_table, size

    for line in result.unreadable[:SHOWN]:
        say(f"not sent: {plain(line)}")
    if output == "json":
        print_json("Demo", {**asdict(result), "round_trips": [trip._asdict() for trip in trips]})
        return
    gap = "-" if result.gap_seconds is None else f"{result.gap_seconds * 1000:.0f} ms without a delivery"
    rows = [
        ("tree", result.path),
        ("files", f"{result.files}"),
        ("bytes", f"{result.bytes} ({size(result.bytes)})"),
        ("checksums", f"{result.verified} of {result.files} equal (SHA-256)"),
        ("rate", f"{size(round(result.bytes_per_second))}/s over {result.seconds:.2f} s, the gap included"),
        ("restart", f"{result.restart}: {gap}" if result.restart != "none" else "none"),
        (
            "sent again",
            f"{result.resent_chunks} chunks, {result.duplicates_dropped} of them dropped as known",
        ),
        ("skipped", ", ".join(f"{count} {what}" for what, count in result.skipped.items()) or "nothing"),
        ("unreadable", str(len(result.unreadable))),
    ]
    print_table(("transfer", ""), rows)
    click.echo()
    print_table(
        ("round trip of 64 B, µs", "p50", "p99", "p99.9"),
        [(trip.way, f"{trip.p50:.2f}", f"{trip.p99:.2f}", f"{trip.p999:.2f}") for trip in trips],
    )
