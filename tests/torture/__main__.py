"""`python -m tests.torture`: see `--help`."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.conftest import Holdings

from . import events, guard, report
from .driver import Driver
from .world import Violation, World

VIOLATED: Final = 1


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
    guard.isolate()
    before = Holdings.now()
    # Short, for the paths of Unix sockets are.
    directory = Path(tempfile.mkdtemp(prefix="snap-torture-"))
    code = guard.watched()
    if code is None:
        return play(plan, seed, given, directory)
    guard.tidy(before)
    if code == VIOLATED or given.keep:
        say(f"kept: {directory}")
    else:
        guard.remove(directory)
    return code


def play(plan: list[events.Event], seed: int, given: argparse.Namespace, directory: Path) -> int:
    """The driver's life. The guard removes `directory`; who is interrupted does it too, for the guard may be gone."""
    begin = time.monotonic()
    until = begin + (given.seconds or 6 * len(plan) + 120)
    world = World(directory, seed, given.standby)
    driver = Driver(world, given.clients, say)
    finished = False
    try:
        driver.play(plan, until)
        finished = True
    except Violation as violation:
        say(f"VIOLATION: {violation}")
        say(f"seed {seed}: repeat with `python -m tests.torture --seed {seed} --events {given.events}`")
        finished = True
        return VIOLATED
    finally:
        try:
            world.end_all()
        finally:
            if not finished and not given.keep:
                guard.remove(directory)
    say(f"seed {seed}: {len(driver.result.happened)} events in {time.monotonic() - begin:.0f} s")
    say(report.table(driver.result))
    return 0


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
