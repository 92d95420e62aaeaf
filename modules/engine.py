"""What an engine's author writes against: `Engine`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

from snap.dataplane import _native
from snap.dataplane.errors import BusyError, ChannelError

from .serving import ServerChannel

if TYPE_CHECKING:
    from .module import Module
    from .schema import Schema
    from .tables import EngineState

Work = Callable[[], object]


class Mailbox:
    """The depth-1 slot through which other threads run a short piece of work on the engine's thread."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(1)
        self._work: Work | None = None
        self.wake: Work = lambda: None

    def put(self, work: Work, timeout: float | None = None) -> None:
        """Hand in `work`; waits up to `timeout` seconds for the slot. Raises BusyError when it stays taken."""
        if not self._free.acquire(timeout=timeout):
            raise BusyError(
                f"the mailbox is still taken after {timeout} s", "the engine does not reach a poll boundary"
            )
        self._work = work
        self.wake()

    def run(self) -> bool:
        """Do the work that waits, if any, and say so; called on the engine's thread between two polls."""
        work, self._work = self._work, None
        if work is None:
            return False
        self._free.release()
        work()
        return True


class Engine:
    """A single-threaded task that never blocks. Subclass it and write `poll`; everything else has a default.

    A poll is a transaction: what it took, what it sent and what it wrote to `state` become permanent together when it
    returns, and not at all when it does not. `state` has the objects of `schema` and outlives the process,
    attributes do not: see docs/state.md.

    All methods but `mail` run on the engine's own thread. `channels` holds the clients' channels; a channel that its
    client broke, or that was revoked, is dropped by the SDK: let its ChannelError pass, the poll is taken back and
    repeated without it. Any other exception that leaves a method ends the module's process, and the next one
    starts from the last whole poll.
    """

    schema: ClassVar[Schema | None] = None
    state: EngineState
    """There when `restore`, `on_attach` and `poll` run, not before."""
    channels: list[ServerChannel]
    watched: list[_native.Endpoint]
    clock: Callable[[], int]
    """Nanoseconds; monotonic. Tests put a `VirtualClock` here, so ask it and not `time`."""
    module: Module | None
    name: str
    _mailbox: Mailbox

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Not in __init__: an author's own must not have to remember super().
        self = super().__new__(cls)
        self.channels = []
        self.watched = []
        self.clock = time.monotonic_ns
        self.module = None
        self.name = cls.__name__.lower()
        self._mailbox = Mailbox()
        return self

    def poll(self, budget: int) -> int:
        """Do at most `budget` messages' work and return how much was done.

        Having done less than `budget` means that nothing is left to do: the worker then waits for a message.
        """
        raise NotImplementedError(f"{type(self).__name__} has no poll(budget)")

    def wake_after(self) -> float | None:
        """Seconds after which to poll though no message came (a timer); None: only messages count."""
        return None

    def queueing_delay(self) -> int:
        """How long the oldest work has waited, in ns; 0 when nothing waits or it is not known."""
        return 0

    def snapshot(self) -> bytes:
        """Small values that are not in tables, at most 64 KiB: asked for at a planned hand-over, not at a crash."""
        return b""

    def restore(self, version: int, state: bytes) -> None:
        """Runs whenever this engine takes over, first of all, with its tables there: `state` is what `snapshot` gave
        under state version `version` at the last hand-over, b"" when it gave nothing. The place to build anew what
        attributes hold of the state. Raises ValueError if it cannot go on from this."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {len(state)} bytes")

    def on_attach(self, channel: ServerChannel) -> None:
        """A client arrived, or this engine took over with it; `channel` has just been added to `channels`."""

    def on_detach(self, channel: ServerChannel) -> None:
        """A client left; `channel` is no longer in `channels` and is closed after this."""

    def on_lost(self, channel: _native.Endpoint, error: ChannelError) -> None:
        """A watched channel failed (its module died, say) and is watched no more. By default that is this
        engine's own failure; override it to go on without, and `Module.connect_soon` for the next one."""
        raise error

    def mail(self, work: Work, timeout: float | None = None) -> None:
        """From any thread: run `work` on the engine's thread at the next poll boundary.

        Raises BusyError when earlier work still waits after `timeout` seconds (None: wait for ever).
        """
        self._mailbox.put(work, timeout)

    def watch(self, channel: _native.Endpoint) -> None:
        """Poll when `channel`, one that the engine is itself the client of, has a message."""
        self.watched.append(channel)

    def unwatch(self, channel: _native.Endpoint) -> None:
        self.watched.remove(channel)
