"""What is going to happen, drawn from a seed: the same seed, count and kinds give the same plan."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .versions import BAD, GOOD

KERNEL_POINTS: Final = (
    "kernel.spawned",
    "kernel.prepared",
    "kernel.yield_sent",
    "kernel.took",
    "kernel.bake",
    "kernel.commit",
    "kernel.recorded",
)
MODULE_POINTS: Final = (
    "module.loaded",
    "module.prepare",
    "module.convert",
    "module.prepared",
    "module.took",
    "module.yield",
    "module.yielded",
    "module.commit",
)
WEIGHTS: Final = {
    "upgrade": 14,
    "failing": 14,
    "rollback": 8,
    "concurrent": 6,
    "fault": 22,
    "disturbed": 14,
    "kill_module": 7,
    "stop_module": 4,
    "kill_kernel": 6,
    "stop_kernel": 3,
    "upgrade_kernel": 3,
    "kill_keeper": 2,
    "kill_both": 1,
    "corrupt": 1,
    "kill_client": 5,
    "stop_client": 3,
    "leave_client": 4,
}
"""Kinds, and how often they come beside each other."""

BAKE: Final = 0.2
SLOW_SHARE: Final = 0.03
"""How many of the failing upgrades are to versions that only time finds out."""


@dataclass(frozen=True)
class Event:
    """`version` is that of an upgrade under way; `victim` who is killed or stopped, `after` seconds from its start;
    `point` and `action` what is put into the fault directory before it; `seconds` for how long somebody is stopped."""

    index: int
    kind: str
    pause: float
    version: str = ""
    other: str = ""
    victim: str = ""
    action: str = ""
    point: str = ""
    after: float = 0.0
    seconds: float = 0.0
    client: int = 0

    @property
    def kills_kernel(self) -> bool:
        return self.kind in ("kill_kernel", "kill_both") or (
            self.action == "kill" and (self.victim == "kernel" or self.point.startswith("kernel."))
        )

    @property
    def needs_keeper(self) -> bool:
        return self.kills_kernel or self.kind in ("kill_keeper", "upgrade_kernel")

    def __str__(self) -> str:
        words = [self.version, self.other and f"and {self.other}", self.point, self.action, self.victim]
        words.append(f"after {self.after:.3f} s" if self.after else "")
        words.append(f"for {self.seconds:.2f} s" if self.seconds else "")
        return " ".join([f"{self.index:4} {self.kind}", *filter(None, words)])


def plan(seed: int, count: int, only: Sequence[str] = ()) -> list[Event]:
    """Raises ValueError for kinds that there are not."""
    if unknown := set(only) - set(WEIGHTS):
        raise ValueError(f"no kinds of events: {', '.join(sorted(unknown))}; there are {', '.join(WEIGHTS)}")
    weights = {kind: weight for kind, weight in WEIGHTS.items() if not only or kind in only}
    kinds = random.Random(f"kinds {seed}").choices(list(weights), list(weights.values()), k=count)
    # Each by itself, so that a shorter plan is the beginning of a longer one.
    return [_event(random.Random(f"event {seed} {index}"), index, kind) for index, kind in enumerate(kinds)]


def _event(chance: random.Random, index: int, kind: str) -> Event:
    good = chance.choice(GOOD).name
    pause = chance.uniform(0.0, 0.15)
    if kind == "upgrade":
        return Event(index, kind, pause, good)
    if kind == "failing":
        slow = chance.random() < SLOW_SHARE
        return Event(
            index, kind, pause, chance.choice([v for v in BAD if v.slow == slow and not v.loses_state]).name
        )
    if kind == "concurrent":
        return Event(index, kind, pause, good, other=chance.choice(GOOD).name)
    if kind == "fault":
        return _fault(chance, Event(index, kind, pause, good))
    if kind == "disturbed":
        victim = chance.choice(["old", "new", "kernel", "client", "module"])
        action = chance.choice(["kill", "kill", "stop"])
        seconds = chance.uniform(0.05, 1.0) if action == "stop" else 0.0
        after = chance.uniform(0.0, 1.5)
        return Event(index, kind, pause, good, victim=victim, action=action, after=after, seconds=seconds)
    if kind.startswith("stop_"):
        # Now and then for longer than a heartbeat may stay away.
        seconds = 10.0 if chance.random() < SLOW_SHARE else chance.uniform(0.05, 1.0)
        return Event(index, kind, pause, seconds=seconds, client=chance.randrange(1 << 16))
    return Event(index, kind, pause, client=chance.randrange(1 << 16))


def _fault(chance: random.Random, event: Event) -> Event:
    point = chance.choice(KERNEL_POINTS + MODULE_POINTS)
    actions = ["kill", "kill", "stop"] + (["raise"] if point.startswith("module.") else [])
    action = chance.choice(actions)
    seconds = chance.uniform(0.05, 1.0) if action == "stop" else 0.0
    victim = chance.choice(["upgrade", "rollback"])
    return Event(
        event.index,
        "fault",
        event.pause,
        event.version,
        victim=victim,
        action=action,
        point=point,
        seconds=seconds,
    )
