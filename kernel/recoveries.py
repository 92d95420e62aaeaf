"""What became of modules whose process died: upgrades that nobody planned, told in the same words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from snap.ipc.protocol import UpgradeEngineView, UpgradeView

from . import supervision
from .incarnation import Incarnation
from .runner import Runner
from .upgrading import Waits

RECOVERED: Final = "recovered"
GIVEN_UP: Final = "given_up"

SILENT_NS: Final = 2_000_000_000
"""An engine without work shows that it lives every second: one that did not for so long had stopped by then."""
LISTEN: Final = 1.0
"""Seconds after which the clients that waited have their answers."""


@dataclass
class Recovery:
    """`view` so far; the process died at `died_ns`, as the kernel saw it, and showed last at `beats` that its engines
    lived. Times are CLOCK_MONOTONIC."""

    view: UpgradeView
    died_ns: int
    beats: dict[str, int]

    def blackout_ns(self, engine: str, first_poll_ns: int) -> int:
        """From the last sign of the old process to the first poll of the new one; -1 when that is not known."""
        beat = self.beats.get(engine, 0)
        if not first_poll_ns:
            return -1
        # A standby polls, now and then, before the kernel sees the death.
        seen_late = self.died_ns > first_poll_ns or self.died_ns - beat > SILENT_NS
        return max(0, first_poll_ns - (beat if beat and seen_late else self.died_ns))


class Recoveries:
    """`number()` gives an id, `note(view)` keeps what is told of it, `waits(runner)` what clients measure."""

    def __init__(
        self,
        number: Callable[[], int],
        note: Callable[[UpgradeView], None],
        waits: Callable[[Runner], Waits],
    ) -> None:
        self._number, self._note, self._waits = number, note, waits
        self._open: dict[str, Recovery] = {}

    def fell(self, runner: Runner, incarnation: Incarnation, reason: str) -> None:
        """The process that served has died, and nobody had asked it to."""
        now = time.monotonic_ns()
        manifest = runner.found.manifest
        view = UpgradeView(
            id=self._number(),
            module=runner.name,
            kind="recovery",
            phase="blackout",
            outcome="",
            reason=reason,
            from_version=manifest.module.version,
            to_version=manifest.module.version,
            from_generation=incarnation.generation,
            to_generation=0,
            from_path=str(runner.found.path),
            to_path=str(runner.found.path),
            started=time.time(),
            engines=[UpgradeEngineView(name=name) for name in manifest.engines],
        )
        self._waits(runner).clear()
        self._open[runner.name] = Recovery(view, now, incarnation.last_beats)
        self._note(view)

    def changed(self, runner: Runner) -> None:
        """The module's state is another one: it may serve again, or never."""
        if runner.ready:
            self._served(runner)
        elif runner.machine.state in (supervision.STOPPED, supervision.FAILED):
            self._end(runner, outcome=GIVEN_UP, reason=runner.machine.cause)

    def record(self) -> dict[str, Any]:
        return {name: [each.view.id, each.died_ns, each.beats] for name, each in self._open.items()}

    def restore(self, record: dict[str, Any], views: dict[int, UpgradeView]) -> None:
        """`views` by id: what was told of them."""
        for name, (number, died_ns, beats) in record.items():
            if number in views:
                self._open[name] = Recovery(views[number], died_ns, beats)

    def _served(self, runner: Runner) -> None:
        recovery, current = self._open.get(runner.name), runner.current
        if recovery is None or current is None:
            return
        engines = [
            msgspec.structs.replace(
                each,
                stage="flipped",
                blackout_ns=recovery.blackout_ns(each.name, current.first_polls.get(each.name, 0)),
            )
            for each in recovery.view.engines
        ]
        view = self._end(runner, outcome=RECOVERED, to_generation=current.generation, engines=engines)
        if view is not None:
            asyncio.get_running_loop().call_later(LISTEN, self._listen, runner, view)

    def _listen(self, runner: Runner, view: UpgradeView) -> None:
        gap = self._waits(runner).read()
        if gap:
            self._note(msgspec.structs.replace(view, client_gap_ns=gap))

    def _end(self, runner: Runner, **changes: Any) -> UpgradeView | None:
        recovery = self._open.pop(runner.name, None)
        if recovery is None:
            return None
        view = msgspec.structs.replace(recovery.view, phase="done", finished=time.time(), **changes)
        self._note(view)
        blackout = max((each.blackout_ns for each in view.engines), default=-1)
        runner.emit("module.recovery", {"id": view.id, "outcome": view.outcome, "blackout_ns": blackout})
        return view
