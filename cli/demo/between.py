"""The demo's second part: a tree copied by Pony Express between two hosts, whose engines are upgraded and killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from snap import ipc
from snap.modules.pony import Pony

from ..bench import pony as bench
from ..bench.pony_hosts import Site
from .pipe import ARENA_BYTES, NAME, Outlet, reach
from .plan import Plan
from .script import PATIENCE_SECONDS, Act, Happened, Script, Victim
from .sender import Sender
from .stage import Writer

MODULE: Final = "pony"
MTU: Final = 9000


@dataclass(frozen=True)
class Goodput:
    """Of large messages from memory to memory, in Gbit/s and Gbit per second of all processors' work."""

    who: str
    rate: float
    per_core: float


def events(site: Site) -> list[tuple[str, Act]]:
    """What happens to the two engines."""
    sender, receiver = (Victim(runtime, MODULE) for runtime in site.runtimes)
    return [
        ("upgrade sender", sender.upgrade),
        ("upgrade receiver", receiver.upgrade),
        ("kill receiver", receiver.kill),
    ]


@dataclass(frozen=True)
class Copy:
    """What was sent and what was seen of it; `seen` is the writer's account."""

    frames: int
    laps: int
    bytes: int
    digest: str
    seconds: float
    seen: dict[str, Any]
    happened: list[Happened]


def copy(site: Site, tree: Plan, written: Path, say: Callable[[str], None]) -> Copy:
    """Send `tree` from one host to the other until all has happened, into `written`. Raises SnapError."""
    writer = Writer(site.stage, site.runtimes[1], written, "pony")
    with ExitStack() as stack:
        client = stack.enter_context(ipc.connect(runtime_dir=site.runtimes[0]))
        pony = stack.enter_context(Pony.open(client, ARENA_BYTES))
        connection = reach(pony, site.prefix + NAME, PATIENCE_SECONDS)

        def mark(event: str) -> None:
            writer.mark(event)
            say(event or "sending")

        def on_wait() -> None:
            writer.check()
            play.check()

        outlet = Outlet(pony, connection)
        play = Script(site.runtimes, events(site), mark)
        sender = Sender(outlet, tree, play.is_alive, on_wait)
        stack.callback(play.stop)
        play.start()
        begin = time.monotonic()
        sender.run()
        outlet.finish(PATIENCE_SECONDS)
        seen = writer.finish()
        seconds = time.monotonic() - begin
        play.check()
    return Copy(sender.frames, sender.laps, sender.bytes, sender.digest, seconds, seen, play.happened)


def compare(site: Site) -> list[Goodput]:
    """One stream of large messages, Pony Express beside TCP over the same link."""
    return [Goodput(*row) for row in bench.bulk_once(site)]
