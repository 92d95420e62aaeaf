"""A client that writes the first rows of `cell` at full rate until its input ends (or none of them, and asks all the
same), then tells every pause and its rate.

    python -m snap.cli.bench.pinger RUNTIME_DIR ROWS

Prints `ready` when it has begun. Its last line is JSON: `pauses`, pairs of CLOCK_MONOTONIC and length in ns, of those
longer than `PAUSE`; `rates`, completions in each `BUCKET` from `begin` on.
"""

from __future__ import annotations

import ctypes
import json
import select
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Final

from snap.ipc import SPIN, connect

PAUSE: Final = 50_000
BUCKET: Final = 10_000_000
_PR_SET_PDEATHSIG: Final = 1


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    directory, rows = Path(sys.argv[1]), int(sys.argv[2])
    order = int(rows > 0)
    with connect(runtime_dir=directory) as client, client.open("cell", timeout=30) as channel:
        print("ready", flush=True)
        pauses: list[tuple[int, int]] = []
        rates: list[int] = [0]
        begin = last = time.monotonic_ns()
        number = 0
        while number % 1024 or not select.select([sys.stdin], [], [], 0)[0]:
            channel.send(struct.pack("<BQQ", order, number % max(rows, 1), number))
            channel.recv(wait=SPIN)
            now = time.monotonic_ns()
            if now - last > PAUSE:
                pauses.append((now, now - last))
            bucket = (now - begin) // BUCKET
            if bucket >= len(rates):
                rates.extend([0] * (bucket + 1 - len(rates)))
            rates[bucket] += 1
            last = now
            number += 1
    print(json.dumps({"begin": begin, "pauses": pauses, "rates": rates}), flush=True)


if __name__ == "__main__":
    main()
