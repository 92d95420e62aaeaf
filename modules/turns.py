"""`Turns` decides what happens at a poll boundary; it has no thread and never waits.

A turn is: orders and mail, each made permanent by itself, then a poll, then the commit. A poll that cannot be
finished is taken back as if it had never begun.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from snap.dataplane import _native
from snap.dataplane.errors import ChannelError, FullError, SchemaError
from snap.ipc import faults

from .engine import Engine
from .migration import Migration
from .schema import Schema
from .serving import ServerChannel
from .tables import EngineState

_SHORTEST_PAUSE_NS: Final = 500_000
_LONGEST_PAUSE_NS: Final = 16_000_000
"""For so long a client that left no room is let be: each look in vain takes the others' poll back, too."""


class Turns:
    """One engine's turns on one state. `joined` and `left` tell of the channels that the engine waits for."""

    def __init__(
        self,
        engine: Engine,
        state: _native.State,
        budget: int,
        joined: Callable[[ServerChannel], None] = lambda channel: None,
        left: Callable[[ServerChannel], None] = lambda channel: None,
    ) -> None:
        self.engine = engine
        self.state = state
        self.budget = budget
        self.faults: deque[tuple[int, str]] = deque()
        self.owned = False
        self.taken_back = 0
        """Polls that were taken back, for want of room."""
        self.short_of_room = False
        """The last poll was taken back, and the next one needs room that no known client can give."""
        self._ledger = _native.Ledger(state)
        self._orders: deque[Callable[[], None]] = deque()
        self._joined, self._left = joined, left
        self._coming: list[ServerChannel] = []
        self._going: list[ServerChannel] = []
        self._allowed = budget
        self._reduced: set[ServerChannel] = set()
        self._pause_ns = self._resume_ns = 0
        schema = engine.schema or Schema()
        self._version = schema.version
        self._attaches = type(engine).on_attach is not Engine.on_attach
        engine.state = EngineState(state, schema)

    def attach(self, channel: ServerChannel) -> None:
        # Orders queue, though the mailbox has one slot: the host must never wait for an engine.
        self._orders.append(lambda: self._attach(channel))

    def detach(self, channel: int) -> None:
        self._orders.append(lambda: self._detach(channel))

    @property
    def resting(self) -> bool:
        """A client leaves no room: it is to be looked at again soon."""
        return bool(self._reduced or self._coming)

    # -- ownership ------------------------------------------------------------------------------------------

    def obey(self) -> bool:
        """Run the orders that wait; True when there were any."""
        if not self._orders:
            return False
        while self._orders:
            self._orders.popleft()()
        return True

    def take(self, generation: int, migration: Migration | None = None) -> int:
        """The ownership was got: go on where the last commit of whoever had it left off. Returns the words of an
        unfinished poll that were rolled back.

        Raises StateError when the state cannot be taken over, and what the engine raises.
        """
        if migration is None:
            undone = self._ledger.take(generation)
            self._restore(self._version, self.state.saved())
        else:
            migration.finish()
            source = migration.source
            self._restore(source.header["version"], source.saved())
            # What was saved is of the old version; who takes over from us must find one of ours.
            self.state.save(self.engine.snapshot())
            self.state.commit()
            undone = migration.undone + self._ledger.take(generation, source)
        self.owned = True
        self.obey()
        self._announce()
        self._ledger.commit()
        faults.reach("module.took")
        return undone

    def hand_over(self) -> int:
        """The last commit before somebody else takes; when the last poll was, in ns."""
        faults.reach("module.yield")
        snapshot = self.engine.snapshot()
        if snapshot or self.state.saved():
            self.state.save(snapshot)
        last = self._ledger.hand_over()
        self.owned = False
        return last

    def _restore(self, version: int, saved: bytes) -> None:
        try:
            self.engine.restore(version, saved)
        except ValueError as error:
            raise SchemaError(f"the engine cannot restore its snapshot: {error}") from error

    # -- a turn ---------------------------------------------------------------------------------------------

    def turn(self) -> int:
        """Run what waits at the boundary, then poll once and commit; returns the work done. Raises what the engine
        raises, unless it was the error of a channel that has indeed failed: that channel is dropped, and noted in
        `faults`."""
        self.short_of_room = False
        try:
            if self.obey() | self.engine._mailbox.run() | self._announce():
                self._ledger.commit()
            try:
                done = self.engine.poll(self._allowed)
            except FullError:
                return self._take_back()
        except ChannelError:
            self._ledger.abort()
            if not (self._sweep() | self._sweep_watched()):
                raise
            self._ledger.commit()
            return self.budget
        if not isinstance(done, int):
            raise TypeError(f"{type(self.engine).__name__}.poll returned {done!r}, not how much it did")
        faults.reach("module.commit")
        self._ledger.commit()
        self._ledger.polled()
        self._after(done)
        return done

    def poll_uncommitted(self) -> None:
        """For tests of what a death leaves: a turn that gets everywhere but to its end."""
        self.obey()
        self._announce()
        self.engine.poll(self._allowed)

    def resume(self, at_once: bool = False) -> None:
        """Look again at the clients that had left no room, if it is time for that."""
        if self._reduced and (at_once or time.monotonic_ns() >= self._resume_ns):
            for channel in self._reduced:
                channel.resume()

    def acknowledge(self) -> None:
        """At a boundary: see what others ask of the state."""
        self._ledger.polled()

    def close(self, last: bool = False) -> None:
        """Unmap every channel: they go on, with whoever serves them next; with `last` they end."""
        for channel in [*self.engine.channels, *self._coming, *self._going]:
            if last:
                channel.abandon()
            else:
                channel.close()

    def _after(self, done: int) -> None:
        if self._allowed < self.budget:
            self._allowed = min(self.budget, self._allowed * 2)
        if self._reduced:
            for channel in list(self._reduced):
                if channel.grow():
                    self._pause_ns = 0
                if not channel.reduced:
                    self._reduced.discard(channel)
            self.resume()
        if (done == 0 or any(channel.drop_reason for channel in self.engine.channels)) and (
            self._sweep() | self._sweep_watched()
        ):
            self._ledger.commit()

    def _take_back(self) -> int:
        """There was no room for what the poll sent: as if it had not begun, and with less the next time."""
        self._ledger.abort()
        self.taken_back += 1
        held = {channel for channel in self.engine.channels if channel.hold()}
        self._reduced |= held
        if held:
            self._pause_ns = min(max(self._pause_ns * 2, _SHORTEST_PAUSE_NS), _LONGEST_PAUSE_NS)
            self._resume_ns = time.monotonic_ns() + self._pause_ns
            return self.budget
        self._allowed = max(1, self._allowed // 2)
        self.short_of_room = True
        self._sweep()
        return 0

    # -- channels -------------------------------------------------------------------------------------------

    def _attach(self, channel: ServerChannel) -> None:
        try:
            self._ledger.join(channel.line, channel.id, channel)
        except ChannelError as error:
            self.faults.append((channel.id, f"{error.code}: {error}"))
            channel.close()
        else:
            self._coming.append(channel)
            self._joined(channel)

    def _announce(self) -> bool:
        """Tell the engine who left and who came, each permanently; True when there were any."""
        if not (self._going or self._coming):
            return False
        while self._going:
            self._remove(self._going.pop(0))
            self._ledger.commit()
        while self._coming:
            channel = self._coming.pop(0)
            self.engine.channels.append(channel)
            if self._attaches and not self._greet(channel):
                break
        return True

    def _greet(self, channel: ServerChannel) -> bool:
        """Run `on_attach`; False when that has to wait until the client leaves room."""
        try:
            self.engine.on_attach(channel)
        except ChannelError as error:
            self._ledger.abort()
            self.engine.channels.remove(channel)
            if isinstance(error, FullError):
                self._coming.append(channel)
                return False
            verdict = channel.verdict()
            if not verdict:
                raise
            self.faults.append((channel.id, verdict))
            self._ledger.leave(channel.line)
            self._left(channel)
            channel.close()
        else:
            self._ledger.commit()
        return True

    def _detach(self, number: int) -> None:
        for channel in self._coming:
            if channel.id == number:
                self._coming.remove(channel)
                self._ledger.leave(channel.line)
                self._left(channel)
                channel.close()
                return
        for channel in self.engine.channels:
            if channel.id == number and channel not in self._going:
                self._ledger.leave(channel.line)
                # The engine may write down that somebody left: not before the state is ours.
                self._going.append(channel)
                return

    def _remove(self, channel: ServerChannel) -> None:
        self.engine.channels.remove(channel)
        self._reduced.discard(channel)
        self._left(channel)
        try:
            self.engine.on_detach(channel)
        finally:
            channel.close()

    def _sweep(self) -> bool:
        """Drop the channels that cannot be served any more; True when there were any."""
        failed = [(channel, verdict) for channel in self.engine.channels if (verdict := channel.verdict())]
        for channel, verdict in failed:
            self.faults.append((channel.id, verdict))
            self._ledger.leave(channel.line)
            self._remove(channel)
        return bool(failed)

    def _sweep_watched(self) -> bool:
        """Tell the engine of watched channels that failed; True when there were any."""
        failed = False
        for channel in list(self.engine.watched):
            try:
                channel.check()
            except ChannelError as error:
                failed = True
                self.engine.unwatch(channel)
                self.engine.on_lost(channel, error)
        return failed
