"""The second process: writes what the relay delivers. Run as `python -m snap.cli.demo.writer RUNTIME_DIR FOLDER`; with
`pony` behind it, what comes over Pony Express.

Lines on standard input say what happens from when on: nanoseconds and a name. Ends with the frame that says END; the
last line on standard output is a JSON object of what it saw. Input that closes before that is a sender that died.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from snap import ipc
from snap.modules.pony import Pony

from .frames import END, FIRST, LAST, POOL_BYTES, Frame, parse
from .gaps import Timeline
from .pipe import ARENA_BYTES, NAME, Inlet

IDLE_SECONDS = 0.1
ORPHAN_SECONDS = 5.0
CONNECT_SECONDS = 30.0
STDIN = 0


class Assembler:
    """Puts frames back together under `root`, and keeps the ledger: every number once and in order, or it is told."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._file: BinaryIO | None = None
        self.expected = 0
        self.files = 0
        self.lost = 0
        self.duplicated = 0
        self.ended = False

    def accept(self, frame: Frame) -> None:
        """Write the frame; one seen before is only counted, and so are those that are missing before it.

        Raises ValueError for a name outside `root`.
        """
        if frame.seq < self.expected:
            self.duplicated += 1
            return
        self.lost += frame.seq - self.expected
        self.expected = frame.seq + 1
        if frame.flags & FIRST:
            self.close()
            self._file = self._create(frame.name)
        if self._file is not None:
            self._file.write(frame.data)
        if frame.flags & LAST:
            self.files += 1
            self.close()
        self.ended = bool(frame.flags & END)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _create(self, name: bytes) -> BinaryIO:
        if name.startswith(b"/") or b".." in name.split(b"/"):
            raise ValueError(f"name {name!r} leaves the folder that is written to")
        path = self._root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")


class Marks:
    """Standard input, line by line, without ever waiting for it."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._rest = b""
        self.closed = False

    def read(self) -> None:
        while not self.closed and select.select([STDIN], [], [], 0)[0]:
            data = os.read(STDIN, 4096)
            self.closed = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                at, _, name = line.decode().partition(" ")
                self._timeline.mark(int(at), name)


class Writer:
    """Feeds an `Assembler` from the service `relay-out`. The channel is opened once: whatever happens, it lasts."""

    def __init__(self, channel: ipc.Channel | Inlet, assembler: Assembler, timeline: Timeline) -> None:
        self._channel = channel
        self._assembler = assembler
        self._timeline = timeline
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def run(self) -> None:
        """Until END. Raises SnapError when that cannot come any more."""
        marks = Marks(self._timeline)
        patience = ORPHAN_SECONDS
        while not self._assembler.ended:
            if self._receive(marks):
                patience = ORPHAN_SECONDS
            elif marks.closed:
                patience -= IDLE_SECONDS
                if patience <= 0:
                    raise ipc.SnapError("the sender left in the middle")

    def _receive(self, marks: Marks) -> bool:
        try:
            payload = self._channel.receive(timeout=IDLE_SECONDS)
        except ipc.DeadlineError:
            marks.read()
            return False
        now = time.monotonic_ns()
        with payload, payload.view as view:
            self._digest.update(view)
            frame = parse(view)
            with frame.data:
                self._assembler.accept(frame)
            marks.read()
            self._timeline.deliver(now, len(view))
        return True


@contextmanager
def source(client: ipc.Client, way: str) -> Iterator[ipc.Channel | Inlet]:
    if way == "relay":
        with client.open("relay-out", down_bytes=POOL_BYTES) as channel:
            yield channel
        return
    with Pony.open(client, ARENA_BYTES) as pony:
        pony.bind(NAME)
        with pony.accept(CONNECT_SECONDS) as connection:
            yield Inlet(pony, connection)


def main(runtime_dir: str, root: str, way: str = "relay") -> None:
    assembler = Assembler(Path(root))
    timeline = Timeline()
    with ipc.connect(runtime_dir=runtime_dir) as client, source(client, way) as channel:
        writer = Writer(channel, assembler, timeline)
        writer.run()
    assembler.close()
    seen = {
        "frames": assembler.expected,
        "files": assembler.files,
        "lost": assembler.lost,
        "duplicated": assembler.duplicated,
        "digest": writer.digest,
        "periods": [asdict(period) for period in timeline.periods],
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
