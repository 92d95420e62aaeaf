"""Principals, and how much each may ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from snap.dataplane.errors import QuotaError
from snap.ipc.protocol import Failure

from .policy import Identity, Quota

Send = Callable[[Any, Sequence[int]], None]


class TokenBucket:
    """`rate` requests a second, with as many saved up for a burst."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate, self._tokens, self._then = rate, rate, now

    def take(self, now: float) -> bool:
        self._tokens = min(self._rate, self._tokens + (now - self._then) * self._rate)
        self._then = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(eq=False)
class Principal:
    """An application or a module: who it is, how to answer it, and what it uses up.

    `drop(reason)` disconnects it. `services` are the ids of capabilities that policy gave it, by service.
    """

    id: str
    badge: str
    identity: Identity
    quota: Quota
    bucket: TokenBucket
    send: Send
    drop: Callable[[str], None]
    refused: int = 0
    bytes: int = 0
    channels: set[int] = field(default_factory=set)
    waiting: int = 0
    services: dict[str, int] = field(default_factory=dict)
    heard: set[int] | None = None
    """Requests since an earlier kernel had this principal, which asks again what that may have lost: by number."""

    def reserve(self, count: int) -> None:
        """Count `count` bytes of a new channel against the quota. Raises QuotaError, which names what is used up."""
        if len(self.channels) + self.waiting >= self.quota.channels:
            raise QuotaError(
                f"{self.id} has {self.quota.channels} channels", "close some, or raise [quota] channels"
            )
        if self.bytes + count > self.quota.segment_bytes:
            raise QuotaError(
                f"{self.id} would have {self.bytes + count} bytes of segments; its quota is {self.quota.segment_bytes}",
                "ask for smaller pools, close channels, or raise [quota] bytes",
            )
        self.bytes += count

    def record(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "badge": self.badge,
            "identity": [self.identity.uid, self.identity.gid, self.identity.pid, self.identity.module],
            "services": dict(self.services),
        }

    def hears(self, seq: int) -> bool:
        """Whether a request is new: what still lay unread when the kernel changed comes a second time."""
        if self.heard is None or not seq:
            return True
        known = seq in self.heard
        self.heard.add(seq)
        return not known

    def fail(self, seq: int, code: str, message: str, hint: str = "") -> None:
        self.send(Failure(seq=seq, code=code, message=message[:1000], hint=hint[:1000]), ())
