"""An upgrade as it goes: a picture that changes on a terminal, else a line for whatever is new."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Self

from ..output import plain, span
from ._base import say
from ._report import outcome, title

if TYPE_CHECKING:
    from rich.console import RenderableType

    from snap.ipc.protocol import UpgradeEngineView, UpgradeView

PHASES: Final = {
    "queued": "waits for its turn",
    "brownout": "the new version gets ready, the old one serves",
    "blackout": "engine by engine is handed over",
    "bake": "the new version serves and has to prove itself",
    "done": "over",
}
_MOVED: Final = ("flipped", "returned")
_TENTHS: Final = 10


class Lines:
    """For pipes and logs: what is new since the last look, a line each."""

    def __init__(self) -> None:
        self._last: UpgradeView | None = None

    def show(self, view: UpgradeView) -> None:
        for line in news(self._last, view):
            say(plain(line))
        self._last = view


def news(before: UpgradeView | None, now: UpgradeView) -> list[str]:
    """What `now` tells that `before` did not: its phase, and each engine's stage, round and tenth."""
    head = [] if before is not None else [f"{title(now)}: {now.from_version} → {now.to_version or '?'}"]
    phase = []
    if now.phase != "done" and (before is None or before.phase != now.phase):
        phase.append(f"  {now.phase}: {PHASES.get(now.phase, '')}".rstrip(": "))
    known = {} if before is None else {engine.name: engine for engine in before.engines}
    engines = []
    for engine in now.engines:
        old = known.get(engine.name)
        if _mark(engine) != (("waiting",) if old is None else _mark(old)):
            engines.append(f"  engine {engine.name}: {_stage(engine)}")
    # The engines moved before the bake began; all else they do within the phase.
    return [*head, *engines, *phase] if now.phase == "bake" else [*head, *phase, *engines]


def _mark(engine: UpgradeEngineView) -> tuple[str | int, ...]:
    """What of an engine's progress is worth a line."""
    if engine.stage == "waiting" or engine.stage in _MOVED or engine.total <= 1:
        return (engine.stage,)
    return (engine.stage, engine.rounds, engine.done * _TENTHS // engine.total)


def _stage(engine: UpgradeEngineView) -> str:
    if engine.stage in _MOVED:
        rows = f", {engine.converted} rows converted meanwhile" if engine.converted else ""
        return f"{engine.stage} after {span(engine.blackout_ns)}{rows}"
    return " ".join(filter(None, (engine.stage, _count(engine))))


def _count(engine: UpgradeEngineView) -> str:
    count = f"{engine.done}/{engine.total}" if engine.total > 1 else ""
    return f"{count} round {engine.rounds}" if engine.rounds > 1 else count


class Screen:
    """For a terminal: drawn over itself on standard error, gone when it is over."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._baking_since: float | None = None
        self._live = Live(console=Console(stderr=True), refresh_per_second=10, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def show(self, view: UpgradeView) -> None:
        now = time.monotonic()
        if view.phase != "bake":
            self._baking_since = None
        elif self._baking_since is None:
            self._baking_since = now
        baked = 0.0 if self._baking_since is None else now - self._baking_since
        self._live.update(picture(view, baked))


def picture(view: UpgradeView, baked: float) -> RenderableType:
    """`baked`: how many seconds of the bake are over."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Text.assemble(
        (title(view), "bold"),
        plain(f"  {view.from_version} → {view.to_version or '?'}  "),
        (view.phase if not view.outcome else outcome(view), "yellow"),
        f"  {PHASES.get(view.phase, '')}",
    )
    table = Table.grid(padding=(0, 2))
    for engine in view.engines:
        ready = engine.stage in ("prepared", *_MOVED)
        bar = ProgressBar(
            total=1 if ready else engine.total or None, completed=1 if ready else engine.done, width=30
        )
        moved = span(engine.blackout_ns) if engine.stage in _MOVED else ""
        table.add_row(
            Text(f"  {plain(engine.name)}"), plain(engine.stage), bar, _count(engine), Text(moved, "green")
        )
    if view.phase == "bake":
        whole = view.bake_seconds
        bar = ProgressBar(total=whole, completed=min(baked, whole), width=30)
        table.add_row("  bake", "", bar, f"{max(0.0, whole - baked):.0f} s left", "")
    return Group(head, table)
