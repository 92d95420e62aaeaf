"""Runs engines: `Turns` decides what happens at a poll boundary, `PythonWorker` gives it a thread.

A Rust engine runs in a `_native.Worker`; both kinds of worker answer to `Runner`, and the host knows nothing else.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from snap.dataplane import _native
from snap.dataplane.errors import ChannelError

from .engine import Engine, ServerChannel

HEARTBEAT: Final = 1.0
"""Seconds between two heartbeats of an idle engine: its longest sleep."""

_PATIENCE: Final = 8
"""Wake-ups for nothing, one after the other, before the worker rests between them."""

_SHORTEST_REST: Final = 50e-6
_LONGEST_REST: Final = 5e-3

_PUBLISH_NS: Final = 50_000_000
"""Nanoseconds between two records of a busy engine."""


class Runner(Protocol):
    """What the host does with an engine, of either language. No method waits for the engine but `stop`."""

    def attach(self, channel: int, endpoint: Any) -> None: ...
    def detach(self, channel: int) -> None: ...
    def take_faults(self) -> list[tuple[int, str]]: ...
    def fileno(self) -> int: ...
    @property
    def alive(self) -> bool: ...
    def stop(self, timeout: float = 1.0) -> None: ...


class Turns:
    """One engine's turns, without a thread: orders, mailbox, poll, and dropping the channels that failed in it."""

    def __init__(
        self,
        engine: Engine,
        budget: int,
        joined: Callable[[ServerChannel], None] = lambda channel: None,
        left: Callable[[ServerChannel], None] = lambda channel: None,
    ) -> None:
        self.engine = engine
        self.budget = budget
        self.faults: deque[tuple[int, str]] = deque()
        self._orders: deque[Callable[[], None]] = deque()
        self._joined, self._left = joined, left

    def attach(self, channel: ServerChannel) -> None:
        # Orders queue, though the mailbox has one slot: the host must never wait for an engine.
        self._orders.append(lambda: self._attach(channel))

    def detach(self, channel: int) -> None:
        self._orders.append(lambda: self._detach(channel))

    def turn(self) -> int:
        """Run what waits at the boundary, then poll once; returns the work done. Raises what the engine raises,
        unless it was the error of a channel that has indeed failed: that channel is dropped, and noted in `faults`."""
        try:
            while self._orders:
                self._orders.popleft()()
            self.engine._mailbox.run()
            done = self.engine.poll(self.budget)
        except ChannelError:
            if not (self._sweep() | self._sweep_watched()):
                raise
            return self.budget
        if not isinstance(done, int):
            raise TypeError(f"{type(self.engine).__name__}.poll returned {done!r}, not how much it did")
        if done == 0 or any(channel.drop_reason for channel in self.engine.channels):
            self._sweep()
            self._sweep_watched()
        return done

    def end(self) -> None:
        """Detach every channel: the last turn."""
        for channel in list(self.engine.channels):
            self._detach(channel.id)

    def _attach(self, channel: ServerChannel) -> None:
        self.engine.channels.append(channel)
        self._joined(channel)
        self.engine.on_attach(channel)

    def _detach(self, number: int) -> None:
        for channel in self.engine.channels:
            if channel.id == number:
                self._remove(channel)
                return

    def _remove(self, channel: ServerChannel) -> None:
        self.engine.channels.remove(channel)
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


class PythonWorker:
    """A thread that runs one Python engine. `crash` holds the traceback of what ended it, if anything did."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        stats: _native.StatsPage | None = None,
        stats_index: int = 0,
        budget: int = 64,
        wait: int = _native.ADAPTIVE,
    ) -> None:
        self.crash = ""
        self._engine = engine
        self._poller = _native.Poller()
        self._turns = Turns(engine, budget, joined=self._join, left=self._leave)
        self._stats, self._stats_index, self._wait = stats, stats_index, wait
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._waiting_for_room: set[ServerChannel] = set()
        self._watched: set[_native.Endpoint] = set()
        self._polls = self._work = self._busy_ns = self._published_ns = self._fruitless = 0
        engine._mailbox.wake = self._poller.wake
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    def attach(self, channel: int, endpoint: ServerChannel) -> None:
        """Hand `endpoint` over to the engine, who gets it at its next poll boundary."""
        self._turns.attach(endpoint)
        self._poller.wake()

    def detach(self, channel: int) -> None:
        self._turns.detach(channel)
        self._poller.wake()

    def take_faults(self) -> list[tuple[int, str]]:
        """Channels that were dropped since the last call, with the reason."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._news)
        faults = self._turns.faults
        return [faults.popleft() for _ in range(len(faults))]

    def fileno(self) -> int:
        """An eventfd that is rung when `take_faults` has news or the engine has ended."""
        return self._news

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.crash

    def stop(self, timeout: float = 1.0) -> None:
        """End the engine after its current poll. Raises TimeoutError when that takes longer than `timeout` seconds."""
        self._stopping = True
        self._poller.wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} is still in its poll after {timeout} s")
        if self._news >= 0:
            self._poller.close()
            os.close(self._news)
            self._news = -1

    def _run(self) -> None:
        try:
            while not self._stopping:
                done = self._turn()
                self._fruitless = 0 if done else self._fruitless + 1
                if done < self._turns.budget and not self._stopping:
                    self._sleep()
            self._turns.end()
        except BaseException:
            self.crash = traceback.format_exc()
        finally:
            os.eventfd_write(self._news, 1)

    def _turn(self) -> int:
        begin = time.monotonic_ns()
        done = self._turns.turn()
        end = time.monotonic_ns()
        self._polls += 1
        if done:
            self._work += done
            self._busy_ns += end - begin
        if end - self._published_ns >= _PUBLISH_NS:
            self._publish(end)
        if self._turns.faults:
            os.eventfd_write(self._news, 1)
        return done

    def _publish(self, now: int) -> None:
        self._published_ns = now
        if self._stats is not None:
            self._stats.write(
                self._stats_index,
                polls=self._polls,
                work=self._work,
                busy_ns=self._busy_ns,
                channels=len(self._engine.channels),
            )

    def _sleep(self) -> None:
        """Wait for messages, for room where answers wait, for the engine's timer, or for the next heartbeat."""
        for channel in self._engine.channels:
            if channel.stalled != (channel in self._waiting_for_room):
                self._waiting_for_room ^= {channel}
                self._poller.add(channel, room=channel.stalled)
        if self._watched != set(self._engine.watched):
            self._follow_watched()
        if self._fruitless > _PATIENCE:
            # Messages wait that the engine does not take (yet): a bell would ring at once, again and again.
            time.sleep(min(_SHORTEST_REST * 2 ** min(self._fruitless - _PATIENCE, 10), _LONGEST_REST))
        timer = self._engine.wake_after()
        if not self._poller.wait(HEARTBEAT if timer is None else max(0.0, min(timer, HEARTBEAT)), self._wait):
            self._fruitless = 0

    def _follow_watched(self) -> None:
        wanted = set(self._engine.watched)
        for channel in wanted - self._watched:
            self._poller.add(channel)
        for channel in self._watched - wanted:
            self._poller.remove(channel)
        self._watched = wanted

    def _join(self, channel: ServerChannel) -> None:
        self._poller.add(channel)

    def _leave(self, channel: ServerChannel) -> None:
        self._waiting_for_room.discard(channel)
        self._poller.remove(channel)
