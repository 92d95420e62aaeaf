"""The first process's half: sends a plan's chunks, reading files straight into loaned shared memory."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable

from snap import ipc

from . import frames
from .plan import Plan, open_file, shown
from .window import Window

PAUSE_SECONDS = 0.001
STEP_SECONDS = 0.1
REOPEN_SECONDS = 30.0
STALL_SECONDS = 60.0


class Sender:
    """Owns `channel`, and sends until the writer has acknowledged everything.

    `on_progress(acknowledged)` is called as it goes; `on_wait` now and then while nothing moves, and it may raise.

    `interrupt` is called once, when half is acknowledged; the last quarter waits until the channel was lost and
    opened again, so that the interruption always falls into the transfer however fast that is.
    """

    def __init__(
        self,
        channel: ipc.Channel,
        plan: Plan,
        window: int,
        on_progress: Callable[[int], None],
        on_wait: Callable[[], None],
        interrupt: Callable[[], None] | None = None,
    ) -> None:
        total = len(plan.chunks)
        self._plan = plan
        self._progress = on_progress
        self._wait = on_wait
        self._interrupt = interrupt
        self._half = total // 2
        self._file = -1
        self._fd = -1
        self._moved = 0.0
        self.channel = channel
        self.window = Window(total, window, None if interrupt is None else total - max(total // 4, 1))
        self.reopened = 0

    def run(self) -> None:
        """Raises SnapError when the channel fails for good, or a file changed; OSError when one cannot be read."""
        self._moved = time.monotonic()
        try:
            while not self.window.done:
                self._step_or_reopen()
        finally:
            self._close_file()
            self.channel.close()

    def _step_or_reopen(self) -> None:
        try:
            self._step()
        except ipc.PeerGoneError:
            self.channel = self.channel.reopen(timeout=REOPEN_SECONDS)
            self.reopened += 1
            self.window.free()
            self.window.rewind()

    def _step(self) -> None:
        number = self.window.take()
        if number is not None:
            self._send(number)
        self._read_acknowledgements(0 if number is not None else STEP_SECONDS)
        if self._interrupt is not None and self.window.acknowledged >= self._half:
            interrupt, self._interrupt = self._interrupt, None
            interrupt()

    def _read_acknowledgements(self, timeout: float) -> None:
        news = False
        for message in self.channel.recv_many(64, timeout=timeout):
            try:
                (expected,) = frames.ACK.unpack(message)
                news |= self.window.acknowledge(expected)
            except (struct.error, ValueError) as error:
                raise ipc.ProtocolError(f"the writing process sent nonsense: {error}") from error
        now = time.monotonic()
        if news:
            self._moved = now
            self._progress(self.window.acknowledged)
            return
        if timeout:
            self._wait()
        if now - self._moved > STALL_SECONDS:
            raise ipc.DeadlineError(
                f"nothing was acknowledged for {STALL_SECONDS:.0f} s, at chunk {self.window.acknowledged}",
                "the log of the module says why: run with --keep",
            )

    def _send(self, number: int) -> None:
        chunk = self._plan.chunks[number]
        name = self._plan.files[chunk.file] if chunk.flags & frames.FIRST else b""
        head = frames.head(number, chunk.flags, name)
        while True:
            try:
                loan = self.channel.loan(len(head) + chunk.size, timeout=STEP_SECONDS)
                break
            except ipc.DeadlineError:  # the pool is full: what the writer has taken makes room
                self._read_acknowledgements(PAUSE_SECONDS)
        with loan, loan.view as view:
            view[: len(head)] = head
            self._read(chunk.file, chunk.offset, view[len(head) :])
            self._push(loan)

    def _push(self, loan: ipc.Loan) -> None:
        while True:
            try:
                return self.channel.send_loan(loan, timeout=STEP_SECONDS)
            except ipc.DeadlineError:
                self._read_acknowledgements(PAUSE_SECONDS)

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
