"""What an engine's author writes against: `Engine`, and the channels that its clients speak through."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Self

from snap.dataplane import _native
from snap.dataplane.errors import BusyError, ChannelError, DeniedError, MessageSizeError

if TYPE_CHECKING:
    from .module import Module

Work = Callable[[], object]

_RIGHT_BITS: Final = {"send": _native.RIGHT_SEND, "recv": _native.RIGHT_RECV}


class ServerChannel(_native.Endpoint):
    """The engine's end of a client's channel: an `Endpoint`, and who is at its other end.

    `badge` names the caller and comes from the kernel alone; `rights` are the caller's on the `service`.
    """

    id: int
    service: str
    badge: str
    rights: frozenset[str]
    drop_reason: str = ""
    _backlog: list[bytes] | None = None

    @classmethod
    def make(
        cls,
        *endpoint: Any,
        id: int = 0,
        service: str = "",
        badge: str = "",
        rights: frozenset[str] = frozenset(_RIGHT_BITS),
    ) -> Self:
        """Build from the eleven arguments of `Endpoint` up to `gate_index`, holding the client to `rights`.

        Raises as `Endpoint` does.
        """
        bits = sum(bit for right, bit in _RIGHT_BITS.items() if right in rights)
        arguments = (*endpoint, bits)
        channel = cls(*arguments)
        channel.id, channel.service, channel.badge, channel.rights = id, service, badge, rights
        return channel

    @property
    def stalled(self) -> bool:
        """Answers wait for the client to make room."""
        return self._backlog is not None

    def take(self, limit: int) -> list[bytes]:
        """Up to `limit` messages; none while earlier answers still wait for room.

        With `answer`, this makes a slow client hold up only itself: what it does not read stays here, at most one
        burst, and what it goes on sending stays in its own ring.
        """
        return self.recv_many(limit, timeout=0) if self.flush() else []

    def flush(self) -> bool:
        """Send what an `answer` left over. True when nothing is left, so that taking more messages is sound."""
        if self._backlog is not None:
            backlog, self._backlog = self._backlog, None
            self.answer(backlog)
        return self._backlog is None

    def answer(self, messages: list[bytes]) -> None:
        """Send `messages`; those that do not fit now go out before the next `take` receives anything.

        A client that may not receive, or whose pool can never hold an answer, is dropped: it asked for that itself.
        """
        try:
            sent = self.send_many(messages, timeout=0) if messages else 0
        except (DeniedError, MessageSizeError) as error:
            self.drop(f"it cannot be answered: {error.message}")
            return
        if sent < len(messages):
            self._backlog = (self._backlog or []) + messages[sent:]

    def drop(self, reason: str) -> None:
        """Give up this client after the current poll (it broke the engine's own protocol, say); others go on."""
        self.drop_reason = self.drop_reason or reason

    def verdict(self) -> str:
        """Why this channel cannot be served any more; empty while it can."""
        if self.drop_reason:
            return self.drop_reason
        try:
            self.check()
        except ChannelError as error:
            return f"{error.code}: {error}"
        return ""


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

    def run(self) -> None:
        """Do the work that waits, if any; called on the engine's thread between two polls."""
        work, self._work = self._work, None
        if work is not None:
            self._free.release()
            work()


class Engine:
    """A single-threaded task that never blocks. Subclass it and write `poll`; everything else has a default.

    All methods but `mail` run on the engine's own thread. `channels` holds the clients' channels; a channel that its
    client broke, or that was revoked, is dropped by the SDK: let its ChannelError pass, the rest is served on. Any
    other exception that leaves a method ends the module's process, and the kernel starts it again.
    """

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
        """The state that another generation needs to go on; empty when there is none."""
        return b""

    def restore(self, version: int, state: bytes) -> None:
        """Take over `state` as written by `snapshot` under state version `version`. Raises ValueError if it cannot."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {len(state)} bytes")

    def on_attach(self, channel: ServerChannel) -> None:
        """A client arrived; `channel` has just been added to `channels`."""

    def on_detach(self, channel: ServerChannel) -> None:
        """A client left; `channel` is no longer in `channels` and is closed after this."""

    def on_lost(self, channel: _native.Endpoint, error: ChannelError) -> None:
        """A watched channel failed (its module died, say) and is watched no more. By default that is this engine's own
        failure; override it to go on without, and `Module.connect_soon` for the next one."""
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
