"""The demo's second part: a tree copied by Pony Express between two hosts, whose engines are upgraded and killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from snap import ipc
from snap.ipc.control import ControlClient
from snap.modules.pony import Pony

from ..bench import pony as bench
from ..bench.pony_hosts import Site
from .pipe import ARENA_BYTES, NAME, Outlet, reach
from .plan import Plan
from .script import AFTER_SECONDS, BAKE_SECONDS, PATIENCE_SECONDS, QUIET_SECONDS, Happened
from .sender import Sender
from .stage import Writer

MODULE: Final = "pony"
EVENTS: Final = ("upgrade sender", "upgrade receiver", "kill receiver")
LOOK_EVERY: Final = 0.02
MTU: Final = 9000


@dataclass(frozen=True)
class Goodput:
    """Of large messages from memory to memory, in Gbit/s and Gbit per second of all processors' work."""

    who: str
    rate: float
    per_core: float


class Script(threading.Thread):
    """What happens to the two engines, on a thread of its own; `mark` is told, "" for nothing."""

    def __init__(self, site: Site, mark: Callable[[str], None]) -> None:
        super().__init__(name="script", daemon=True)
        self._site, self._mark = site, mark
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self.happened: list[Happened] = []

    def check(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._stopping.set()
        # It may be in the middle of an order, which ends with the kernel at the latest.
        self.join(AFTER_SECONDS)

    def run(self) -> None:
        try:
            self._mark("")
            for event in EVENTS:
                self._pause(QUIET_SECONDS)
                self._mark(event)
                what, side = event.split()
                with ControlClient(self._site.runtimes[side == "receiver"]) as control:
                    self.happened.append((_upgrade if what == "upgrade" else self._kill)(control, event))
                self._pause(AFTER_SECONDS)
                self._mark("")
            self._pause(QUIET_SECONDS)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise _Stopped

    def _kill(self, control: ControlClient, event: str) -> Happened:
        before = control.call("module.show", name=MODULE)
        os.kill(before["pid"], signal.SIGKILL)
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            after = control.call("module.show", name=MODULE)
            if after["state"] == "ready" and after["pid"] not in (None, before["pid"]):
                return Happened(event, f"pid {before['pid']} → {after['pid']}")
            self._pause(LOOK_EVERY)
        raise ipc.DeadlineError(
            "the killed module does not serve again", "run with --keep, and read the logs"
        )


class _Stopped(Exception):
    """Nobody waits for the rest of the script."""


def _upgrade(control: ControlClient, event: str) -> Happened:
    view = control.call(
        "module.upgrade", timeout=PATIENCE_SECONDS, name=MODULE, source=None, bake=BAKE_SECONDS
    )
    if view["outcome"] != "committed":
        raise ipc.RolledBackError(f"the upgrade ended as {view['outcome']}: {view['reason']}")
    return Happened(
        event,
        f"generation {view['from_generation']} → {view['to_generation']}",
        max(engine["blackout_ns"] for engine in view["engines"] if engine["name"] == MODULE),
    )


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
        play = Script(site, mark)
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
