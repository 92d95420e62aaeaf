"""The gate page of a module: one line for each channel that it serves, which says whether the kernel lets it."""

from __future__ import annotations

import os

from snap.dataplane import _native
from snap.dataplane.errors import ResourceError
from snap.ipc.segment import Segment


class GatePage:
    """The gate page of one module: lines are handed out and taken back; the module cannot write it."""

    def __init__(self, fd: int | None = None) -> None:
        """`fd` is the page of an earlier kernel. It cannot be sealed: the next kernel has to write it as well."""
        size = _native.Gate.BYTES
        self.segment = Segment.create(size) if fd is None else Segment.adopt(fd, size)
        try:
            self._gate = _native.Gate(self.segment.fd)
            self.reader = os.open(f"/proc/self/fd/{self.segment.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.segment.close()
            raise
        self._free = list(range(_native.Gate.LINES - 1, -1, -1))

    def take(self) -> int:
        """A free line. Raises ResourceError when the module serves as many channels as it can."""
        if not self._free:
            raise ResourceError(f"the module serves {_native.Gate.LINES} channels already", "close some")
        return self._free.pop()

    def open(self, line: int, generation: int) -> None:
        self._gate.open(line, generation)

    def give_back(self, line: int) -> None:
        self._gate.shut(line)
        # At the far end: the longer a line rests, the surer that nobody still has its last channel in mind.
        self._free.insert(0, line)

    def hold(self, line: int) -> None:
        """A channel of an earlier kernel has it."""
        self._free.remove(line)

    def close(self) -> None:
        self._gate.close()
        os.close(self.reader)
        self.segment.close()
