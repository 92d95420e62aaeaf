"""`python -m tests.torture`: see `--help`."""

from __future__ import annotations

import argparse
import ctypes
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from . import events
from .driver import Driver, Result
from .world import Violation, World

_CLONE_NEWIPC: Final = 0x08000000


def main() -> int:
    options = argparse.ArgumentParser("tests.torture", description=__doc__)
    options.add_argument("--events", type=int, default=100, help="how many (100)")
    options.add_argument("--seed", type=int, help="repeats the plan, the operations and the clients")
    options.add_argument("--clients", type=int, default=5, help="at a time (5: one of each way of waiting)")
    options.add_argument("--only", default="", help=f"kinds, with commas: {', '.join(events.WEIGHTS)}")
    options.add_argument(
        "--range", default="", help="FIRST:LAST, events of the plan to play, to narrow a failure"
    )
    options.add_argument("--standby", action="store_true", help="the module has a hot standby")
    options.add_argument(
        "--seconds", type=float, help="no event begins later; default: 6 for each event and 120"
    )
    options.add_argument("--keep", action="store_true", help="keep the folder with logs and ledgers")
    options.add_argument("--plan", action="store_true", help="print the plan and play nothing")
    given = options.parse_args()
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    say(f"seed {seed}")
    plan = events.plan(seed, given.events, [kind for kind in given.only.split(",") if kind])
    first, _, last = given.range.partition(":")
    plan = plan[int(first or 0) : int(last or len(plan))]
    if given.plan:
        for event in plan:
            say(str(event))
        return 0
    return play(plan, seed, given)


def isolate() -> None:
    """Semaphores of our own, so that what is left of them is ours. Without the right to that, others' may be blamed."""
    ctypes.CDLL(None).unshare(_CLONE_NEWIPC)


def play(plan: list[events.Event], seed: int, given: argparse.Namespace) -> int:
    begin = time.monotonic()
    until = begin + (given.seconds or 6 * len(plan) + 120)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Short, for the paths of Unix sockets are.
    directory = Path(tempfile.mkdtemp(prefix="snap-torture-"))
    keep = given.keep
    isolate()
    world = World(directory, seed, given.standby)
    driver = Driver(world, given.clients, say)
    try:
        driver.play(plan, until)
    except Violation as violation:
        keep = True
        say(f"VIOLATION: {violation}")
        say(f"seed {seed}: repeat with `python -m tests.torture --seed {seed} --events {given.events}`")
        return 1
    finally:
        world.end_all()
        if keep:
            say(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    report(driver.result, seed, time.monotonic() - begin)
    return 0


def report(result: Result, seed: int, seconds: float) -> None:
    blackouts = sorted(result.blackouts_ns)
    say(f"seed {seed}: {sum(result.events.values())} events in {seconds:.0f} s")
    say(f"  {dict(result.events.most_common())}")
    say(f"  {dict(result.outcomes.most_common(12))}")
    say(
        f"  {result.operations} operations of {result.sessions} clients: 0 lost, 0 doubled, 0 wrong, 0 left behind"
    )
    say(f"  longest gap of a client {result.longest_gap_ns / 1e6:.0f} ms")
    if blackouts:
        worst = blackouts[-1] / 1e3
        say(
            f"  blackout of {len(blackouts)} flips: median {statistics.median(blackouts) / 1e3:.0f} us, most {worst:.0f} us"
        )


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
