"""The first process's half: sends a plan's chunks, reading files straight into loaned shared memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from snap import ipc

from . import frames
from .plan import Chunk, Plan, open_file, shown

STEP_SECONDS = 0.1
STALL_SECONDS = 60.0

T = TypeVar("T")


class Way(Protocol):
    """Where frames go: a channel, or what is like one."""

    def loan(self, size: int, timeout: float) -> Any:
        """Raises DeadlineError."""

    def send_loan(self, loan: Any, *, timeout: float) -> None:
        """Raises DeadlineError."""


class Sender:
    """Sends the plan over `channel`, again and again while `more()`, at least once; then a frame that says END.

    `on_wait` is called before each chunk and now and then while nothing moves, and it may raise.
    """

    def __init__(
        self, channel: Way, plan: Plan, more: Callable[[], bool], on_wait: Callable[[], None]
    ) -> None:
        self._channel = channel
        self._plan = plan
        self._more = more
        self._wait = on_wait
        self._file = -1
        self._fd = -1
        self._digest = hashlib.sha256()
        self.frames = 0
        self.bytes = 0
        self.laps = 0

    @property
    def digest(self) -> str:
        """SHA-256 of all frames."""
        return self._digest.hexdigest()

    def run(self) -> None:
        """Raises SnapError when the channel fails, or a file changed; OSError when one cannot be read."""
        try:
            while True:
                for chunk in self._plan.chunks:
                    self._send(chunk)
                self.laps += 1
                if not self._more():
                    break
            self._send(Chunk(-1, 0, 0, frames.END))
        finally:
            self._close_file()

    def _send(self, chunk: Chunk) -> None:
        self._wait()
        name = self._plan.files[chunk.file] if chunk.flags & frames.FIRST else b""
        head = frames.head(self.frames, chunk.flags, name)
        loan = self._patiently(lambda: self._channel.loan(len(head) + chunk.size, timeout=STEP_SECONDS))
        with loan:
            with loan.view as view:
                view[: len(head)] = head
                self._read(chunk.file, chunk.offset, view[len(head) :])
                self._digest.update(view)
            self._patiently(lambda: self._channel.send_loan(loan, timeout=STEP_SECONDS))
        self.frames += 1
        self.bytes += chunk.size

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """Try until it is done in time: the pool or the ring is full while the module is away, or the writer slow."""
        end = time.monotonic() + STALL_SECONDS
        while True:
            try:
                return attempt()
            except ipc.DeadlineError:
                self._wait()
                if time.monotonic() > end:
                    raise ipc.DeadlineError(
                        f"nothing moved for {STALL_SECONDS:.0f} s, at chunk {self.frames}",
                        "the log of the module says why: run with --keep",
                    ) from None

    def _read(self, file: int, offset: int, into: memoryview) -> None:
        if not into:
            return
        if file != self._file:
            self._close_file()
            self._fd = open_file(self._plan, file)
            self._file = file
        with into:
            if os.preadv(self._fd, [into], offset) != len(into):
                name = shown(self._plan.files[file])
                raise ipc.SnapError(
                    f"{name} became shorter while it was sent", "send a tree that nobody writes to"
                )

    def _close_file(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._file = -1
