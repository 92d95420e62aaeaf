"""`PythonWorker` gives a Python engine its thread: wait for the ownership, take over, poll, hand over, wait again.

A Rust engine runs in a `_native.Worker`; both kinds answer to `Runner`, and the host knows nothing else.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

from snap.dataplane import _native
from snap.dataplane.errors import ResourceError, SnapError, StateDamagedError
from snap.ipc import faults

from .engine import Engine
from .migration import Migration
from .serving import ServerChannel
from .turns import Turns

HEARTBEAT: Final = 1.0
"""Seconds between two heartbeats of an idle engine: its longest sleep."""

_LOOK: Final = 0.01
"""Seconds between two looks at what a migration left to convert, while waiting for the ownership."""

_PATIENCE: Final = 8
"""Wake-ups for nothing, one after the other, before the worker rests between them."""

_SHORTEST_REST: Final = 50e-6
_LONGEST_REST: Final = 5e-3

_PUBLISH_NS: Final = 50_000_000
"""Nanoseconds between two records of a busy engine."""

News = tuple[str, int, Any]


class Runner(Protocol):
    """What the host does with an engine, of either language. No method waits for the engine but `stop`."""

    def attach(self, channel: int, endpoint: Any, line: int) -> None: ...
    def detach(self, channel: int) -> None: ...
    def hand_over(self, retire: bool = False) -> None: ...
    def take_news(self) -> list[News]: ...
    def fileno(self) -> int: ...
    @property
    def alive(self) -> bool: ...
    def stop(self, timeout: float = 1.0, last: bool = False) -> None: ...


class PythonWorker:
    """A thread that runs one Python engine on a `State` whenever it has the ownership. `crash` holds the traceback of
    what ended it, if anything did."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        state: _native.State,
        semaphore: int = -1,
        generation: int = 1,
        stats: _native.StatsPage | None = None,
        stats_index: int = 0,
        budget: int = 64,
        wait: int = _native.ADAPTIVE,
        migration: Migration | None = None,
        channels: Sequence[tuple[int, ServerChannel, int]] = (),
    ) -> None:
        """Begins to wait for the ownership at once, with `channels` attached (see `attach`). semaphore -1: there is
        none (tests, benchmarks)."""
        self.crash = ""
        self._engine, self._generation, self._migration = engine, generation, migration
        self._ownership = None if semaphore < 0 else _native.Ownership(semaphore)
        self._poller = _native.Poller()
        self._turns = Turns(engine, state, budget, joined=self._join, left=self._leave)
        self._stats, self._stats_index, self._wait = stats, stats_index, wait
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._news: deque[News] = deque()
        self._stopping = self._handing_over = self._retiring = self._last = False
        self._waiting_for_room: set[ServerChannel] = set()
        self._watched: set[_native.Endpoint] = set()
        self._polls = self._work = self._busy_ns = self._published_ns = self._fruitless = 0
        engine._mailbox.wake = self._poller.wake
        for channel in channels:
            self.attach(*channel)
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    def attach(self, channel: int, endpoint: ServerChannel, line: int) -> None:
        """Hand `endpoint` over to the engine, who gets it at its next poll boundary."""
        endpoint.line = line
        self._turns.attach(endpoint)
        self._wake()

    def detach(self, channel: int) -> None:
        self._turns.detach(channel)
        self._wake()

    def hand_over(self, retire: bool = False) -> None:
        """Let go at the next poll boundary, then wait for the ownership again, or end."""
        self._retiring = self._retiring or retire
        self._handing_over = True
        self._wake()

    def take_news(self) -> list[News]:
        """What happened since the last call; see `_native.Worker.take_news`."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        return [self._news.popleft() for _ in range(len(self._news))]

    def fileno(self) -> int:
        """An eventfd that is rung when `take_news` has something."""
        return self._bell

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.crash

    def stop(self, timeout: float = 1.0, last: bool = False) -> None:
        """End the engine after its current poll; what it has is handed over to whoever comes, but if it is the `last`
        the channels end. Raises TimeoutError when that takes longer than `timeout` seconds."""
        self._stopping, self._last = True, last
        self._wake()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} is still in its poll after {timeout} s")
        if self._bell >= 0:
            self._poller.close()
            os.close(self._bell)
            self._bell = -1

    def _wake(self) -> None:
        self._poller.wake()
        if self._ownership is not None and not self._turns.owned:
            self._ownership.cancel()

    def _tell(self, kind: str, number: int = 0, data: Any = None) -> None:
        self._news.append((kind, number, data))
        os.eventfd_write(self._bell, 1)

    # -- on the engine's thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        said = ""
        try:
            while self._acquire():
                if not self._take():
                    break
                while not (self._stopping or self._handing_over):
                    self._step()
                self._let_go()
                if self._stopping or self._retiring:
                    break
        except StateDamagedError as error:
            # The ownership stays until the process ends: by then there is another state to take.
            self._tell("refused", 1, (error.code, str(error)))
        except BaseException as error:
            # Nothing is committed and the ownership ends with the process: its successor takes the poll back.
            said = self.crash = traceback.format_exc()
            if isinstance(error, ResourceError) and not self._turns.owned:
                said = str(error)  # the semaphore is gone: nobody wants this engine any more
        else:
            self._turns.close(self._last)
        finally:
            self._tell("ended", 0, said)

    def _acquire(self) -> bool:
        """Wait for the ownership, obeying meanwhile; False when the engine is to end first."""
        while not self._stopping and not self._retiring:
            self._turns.obey()
            patience = HEARTBEAT if self._migration is None else _LOOK
            if self._ownership is None or self._ownership.acquire(patience):
                self._handing_over = False
                return True
            if self._migration is not None:
                self._migration.catch_up()
        return False

    def _take(self) -> bool:
        """Take over and poll for the first time; False when the state cannot be taken over."""
        try:
            migration, self._migration = self._migration, None
            undone = self._turns.take(self._generation, migration)
        except SnapError as error:
            self._release()
            self._tell("refused", 0, (error.code, str(error)))
            return False
        first = time.monotonic_ns()
        self._step(sleep=False)
        last = self._turns.state.header["last_poll_ns"]
        self._tell("took", first, {"last_poll_ns": last, "undone": undone})
        return True

    def _let_go(self) -> None:
        self._handing_over = False
        last = self._turns.hand_over()
        self._release()
        faults.reach("module.yielded")
        self._tell("yielded", last)
        self._publish(time.monotonic_ns())

    def _release(self) -> None:
        if self._ownership is not None:
            self._ownership.release()

    def _step(self, sleep: bool = True) -> None:
        begin = time.monotonic_ns()
        done = self._turns.turn()
        end = time.monotonic_ns()
        self._polls += 1
        if done:
            self._work += done
            self._busy_ns += end - begin
            self._fruitless = 0
        else:
            self._fruitless += 1
        if end - self._published_ns >= _PUBLISH_NS:
            self._publish(end)
        while self._turns.faults:
            self._tell("fault", *self._turns.faults.popleft())
        if sleep and done < self._turns.budget and not (self._stopping or self._handing_over):
            self._sleep()

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
        if self._fruitless > _PATIENCE or self._turns.short_of_room:
            # Messages wait that the engine does not take (yet): a bell would ring at once, again and again.
            time.sleep(min(_SHORTEST_REST * 2 ** min(self._fruitless, 10), _LONGEST_REST))
        timer = self._engine.wake_after()
        if self._turns.short_of_room or self._turns.resting:
            timer = _LONGEST_REST if timer is None else min(timer, _LONGEST_REST)
        if not self._poller.wait(HEARTBEAT if timer is None else max(0.0, min(timer, HEARTBEAT)), self._wait):
            self._fruitless = 0
        self._turns.resume()

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
