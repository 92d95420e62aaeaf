"""The second process: writes what the relay delivers, each number once. Run as `python -m snap.cli.demo.writer`.

Ends when its standard input closes, which happens when the sender is done with it, or dead; the last line on
standard output is a JSON object of what it saw.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path
from typing import BinaryIO

from snap import ipc

from .frames import ACK, END, FIRST, LAST, Frame, parse

IDLE_SECONDS = 0.1
REOPEN_SECONDS = 30.0


class Assembler:
    """Puts frames back together under `root`: in order, each number once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._file: BinaryIO | None = None
        self.expected = 0
        self.files = 0
        self.bytes = 0
        self.duplicates = 0

    def accept(self, frame: Frame) -> bool:
        """Write the frame if it is the one expected; one seen before is counted, one too early ignored.

        Raises ValueError for a name outside `root`.
        """
        if frame.seq != self.expected:
            self.duplicates += frame.seq < self.expected
            return False
        if frame.flags & FIRST:
            self._file = self._create(frame.name)
        if self._file is not None:
            self.bytes += self._file.write(frame.data)
        if frame.flags & (LAST | END):
            self.close()
            self.files += bool(frame.flags & LAST)
        self.expected += 1
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _create(self, name: bytes) -> BinaryIO:
        if name.startswith(b"/") or b".." in name.split(b"/"):
            raise ValueError(f"name {name!r} leaves the folder that is written to")
        path = self._root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")


class Writer:
    """Feeds an `Assembler` from the service `relay-out`, and opens the channel again when the module went away."""

    def __init__(self, channel: ipc.Channel, assembler: Assembler) -> None:
        self._channel = channel
        self._assembler = assembler
        self._last_ns = 0
        self._gone_ns = 0
        self.gap_ns = 0

    def run(self) -> None:
        """Until standard input closes."""
        while True:
            try:
                if not self._receive() and _input_closed():
                    break
                self._channel.send(ACK.pack(self._assembler.expected), timeout=IDLE_SECONDS)
            except ipc.DeadlineError:
                continue
            except ipc.PeerGoneError:
                self._gone_ns = self._last_ns
                self._channel = self._channel.reopen(timeout=REOPEN_SECONDS)
        self._channel.close()

    def _receive(self) -> bool:
        try:
            payload = self._channel.receive(timeout=IDLE_SECONDS)
        except ipc.DeadlineError:
            return False
        with payload, payload.view as view:
            frame = parse(view)
            with frame.data:
                self._assembler.accept(frame)
        self._last_ns = time.monotonic_ns()
        if self._gone_ns:
            self.gap_ns = max(self.gap_ns, self._last_ns - self._gone_ns)
            self._gone_ns = 0
        return True


def _input_closed() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def main(runtime_dir: str, root: str) -> None:
    assembler = Assembler(Path(root))
    with ipc.connect(runtime_dir=runtime_dir) as client:
        writer = Writer(client.open("relay-out"), assembler)
        writer.run()
    assembler.close()
    seen = {
        "files": assembler.files,
        "bytes": assembler.bytes,
        "duplicates": assembler.duplicates,
        "gap_ns": writer.gap_ns,
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
