"""`ServerChannel`: the engine's end of a client's channel."""

from __future__ import annotations

from typing import Any, Final, Self

from snap.dataplane import _native
from snap.dataplane.errors import ChannelError, DeniedError, FullError, MessageSizeError

_RIGHT_BITS: Final = {"send": _native.RIGHT_SEND, "recv": _native.RIGHT_RECV}
_UNLIMITED: Final = 1 << 16


class ServerChannel(_native.Endpoint):
    """The engine's end of a client's channel: an `Endpoint`, and who is at its other end.

    `badge` names the caller and comes from the kernel alone; `rights` are the caller's on the `service`. `line` is
    the place of its positions in the engine's state. What is sent goes out, and what was taken is gone, when the poll
    ends.
    """

    id: int
    line: int
    service: str
    badge: str
    rights: frozenset[str]
    drop_reason: str = ""
    stalled: bool = False
    """The client leaves no room for answers: nothing was taken from it."""
    _full: bool = False
    _held: bool = False
    _limit: int = _UNLIMITED
    _taken: int = 0

    @classmethod
    def make(
        cls,
        *endpoint: Any,
        arena: tuple[int, int] = (-1, 0),
        id: int = 0,
        service: str = "",
        badge: str = "",
        rights: frozenset[str] = frozenset(_RIGHT_BITS),
        line: int = 0,
    ) -> Self:
        """Build from the eleven arguments of `Endpoint` up to `gate_index` and the descriptor and size of the arena,
        holding the client to `rights`.

        Raises as `Endpoint` does.
        """
        bits = sum(bit for right, bit in _RIGHT_BITS.items() if right in rights)
        arguments = (*endpoint, bits, *arena)
        channel = cls(*arguments)
        channel.id, channel.service, channel.badge, channel.rights = id, service, badge, rights
        channel.line = line
        return channel

    def take(self, limit: int) -> list[bytes]:
        """Up to `limit` messages, at most as many as there is room for answers (of a size that fits a descriptor).

        With `answer`, this makes a slow client hold up only itself: what it goes on sending stays in its own ring.
        """
        count = 0 if self._held else min(limit, self._limit, self.room())
        self.stalled = count == 0 and limit > 0
        if count <= 0:
            return []
        messages = self.recv_many(count, timeout=0)
        self._taken = len(messages)
        return messages

    def answer(self, messages: list[bytes]) -> None:
        """Send `messages`. Raises FullError when they do not all fit: let it pass, and the SDK takes the whole
        poll back and repeats it with less from this client, when there is room.

        A client that may not receive, or whose pool can never hold an answer, is dropped: it asked for that itself.
        """
        try:
            sent = self.send_many(messages, timeout=0) if messages else 0
        except (DeniedError, MessageSizeError) as error:
            self.drop(f"it cannot be answered: {error.message}")
            return
        if sent < len(messages):
            self._full = True
            raise FullError(f"{len(messages) - sent} of {len(messages)} answers do not fit", "let it pass")

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

    # -- for the SDK ----------------------------------------------------------------------------------------

    def hold(self) -> bool:
        """After a poll that was taken back: if it failed here, take nothing until `resume`, and less then. False
        when it did not, or when nothing had been taken here, so that taking less would not help."""
        failed, self._full = self._full, False
        if not failed or self._held or self._taken == 0:
            return False
        self._limit = max(1, self._taken // 2)
        self._held = self.stalled = True
        self._taken = 0
        return True

    def resume(self) -> None:
        """There may be room again."""
        self._held = False

    def grow(self) -> bool:
        """A poll went well: if something was taken here, take more next time, and say so."""
        if not self._taken:
            return False
        self._limit = min(_UNLIMITED, self._limit * 2)
        self._taken = 0
        return True

    @property
    def reduced(self) -> bool:
        return self._limit < _UNLIMITED or self._held
