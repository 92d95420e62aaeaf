"""A channel as the kernel has it: what it is made of, how far it has come, what an earlier kernel left of it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Self

from snap.dataplane import _native
from snap.dataplane.errors import ResourceError, UsageError
from snap.ipc import protocol, seqpacket
from snap.ipc.protocol import ChannelView
from snap.ipc.segment import Segment

from .gatepage import GatePage
from .principals import Principal
from .runner import Runner
from .takeover import Take

DEFAULT_SLOTS: Final = 1024
DEFAULT_POOL: Final = 4 * 1024 * 1024
_PAGE: Final = 4096
_SLOTS: Final = (64, 65536)

Sizes = tuple[int, int, int]
"""Bytes of the up pool, the down pool and the arena, whole pages; an arena of 0 is none."""

OFFERED: Final = "offered"
ATTACHING: Final = "attaching"
OPEN: Final = "open"

_RECORDED: Final = (
    *("id", "generation", "service", "engine", "rights", "slots", "up_bytes", "down_bytes", "arena_bytes"),
    *("backend", "line", "cap", "state", "seq", "answered", "since"),
)


def geometry(request: protocol.Open) -> tuple[int, Sizes]:
    """Slots, and the sizes of the pools and the arena. Raises UsageError."""
    slots = request.slots or DEFAULT_SLOTS
    least, most = _SLOTS
    if not least <= slots <= most or slots & (slots - 1):
        raise UsageError(
            f"slots is {slots}", f"a power of two from {least} to {most}, or 0 for {DEFAULT_SLOTS}"
        )
    up, down = (
        _size("up_bytes", request.up_bytes, DEFAULT_POOL),
        _size("down_bytes", request.down_bytes, DEFAULT_POOL),
    )
    return slots, (up, down, _size("arena_bytes", request.arena_bytes, 0))


def _size(name: str, wish: int, default: int) -> int:
    if not 0 <= wish <= 1 << 40:
        raise UsageError(f"{name} is {wish}", f"0 (for {default}) to {1 << 40}")
    return -(-(wish or default) // _PAGE) * _PAGE


class Body:
    """What a channel is made of, until `close`: segments (rings, up pool, down pool, and the arena if there is one), a
    doorbell for each end, and a line of its provider's gate page."""

    def __init__(
        self, slots: int, segments: Sequence[Segment], bells: Sequence[int], gate: GatePage, line: int
    ) -> None:
        self._segments, self._bells, self._gate, self.line = segments, bells, gate, line
        self.control: Final = _native.ChannelControl(segments[0].fd, slots, (bells[0], bells[1]))

    @classmethod
    def make(cls, number: int, slots: int, sizes: Sizes, backend: str, gate: GatePage) -> Self:
        """Of channel `number`. Raises SnapError; whatever was made by then is given back."""
        with ExitStack() as undo:
            line = gate.take()
            undo.callback(gate.give_back, line)
            segments = [
                undo.enter_context(Segment.create(size, backend))
                for size in (_native.ring_bytes(slots), *sizes)
                if size
            ]
            bells = [_bell(undo) for _ in range(2)]
            body = cls(slots, segments, bells, gate, line)
            body.control.init(number, generation(number))
            undo.pop_all()
            return body

    @classmethod
    def adopt(cls, slots: int, sizes: Sizes, fds: Sequence[int], gate: GatePage, line: int) -> Self:
        """Of an earlier kernel; `fds` as the property gave them. Raises SnapError."""
        wanted = [size for size in (_native.ring_bytes(slots), *sizes) if size]
        segments = [Segment.adopt(fd, size) for fd, size in zip([*fds[:3], *fds[5:]], wanted, strict=True)]
        gate.hold(line)
        return cls(slots, segments, fds[3:5], gate, line)

    @property
    def fds(self) -> list[int]:
        """In the order of `Opened` and `Attach`."""
        ring, up, down, *arena = (segment.fd for segment in self._segments)
        return [ring, up, down, *self._bells, *arena]

    @property
    def sealed(self) -> bool:
        """Whether nobody can map the up pool for writing any more."""
        return "future_write" in self._segments[1].seals()

    def open(self, generation: int) -> None:
        """The provider may serve it from now on."""
        self._gate.open(self.line, generation)

    def close(self, state: str, reason: str) -> None:
        """Both ends see `state`; all is given back."""
        self._gate.give_back(self.line)
        self.control.set_state(state, reason[:200])
        self.control.close()
        for segment in self._segments:
            segment.close()
        seqpacket.close_all(self._bells)
        self._segments, self._bells = (), ()


@dataclass(eq=False)
class Channel:
    id: int
    generation: int
    service: str
    engine: str
    provider: Runner
    client: Principal
    rights: list[str]
    slots: int
    up_bytes: int
    down_bytes: int
    arena_bytes: int
    backend: str
    body: Body
    cap: int = 0
    state: str = OFFERED
    seq: int = 0
    answered: bool = False
    since: float = field(default_factory=time.time)
    timer: asyncio.TimerHandle | None = None
    adopted: bool = False

    @property
    def bytes(self) -> int:
        return _native.ring_bytes(self.slots) + self.up_bytes + self.down_bytes + self.arena_bytes

    @property
    def line(self) -> int:
        return self.body.line

    def set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        """The deadline of its present step takes the place of the one before."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = timer

    def order(self) -> protocol.Attach:
        """What a process of the provider is told, with the descriptors of its body."""
        return protocol.Attach(
            seq=self.id,
            channel=self.id,
            generation=self.generation,
            service=self.service,
            engine=self.engine,
            badge=self.client.badge,
            rights=self.rights,
            slots=self.slots,
            up_bytes=self.up_bytes,
            down_bytes=self.down_bytes,
            arena_bytes=self.arena_bytes,
            gate_index=self.line,
        )

    def offer(self, seq: int) -> protocol.Opened:
        """What its opener is told, with the descriptors of its body."""
        return protocol.Opened(
            seq=seq,
            channel=self.id,
            generation=self.generation,
            slots=self.slots,
            up_bytes=self.up_bytes,
            down_bytes=self.down_bytes,
            arena_bytes=self.arena_bytes,
            rights=self.rights,
            backend=self.backend,
            seal_up=self.backend == "memfd",
        )

    def view(self) -> ChannelView:
        up, down = self.body.control.depth()
        memfd = self.backend == "memfd"
        return ChannelView(
            id=self.id,
            service=self.service,
            module=self.provider.name,
            client=self.client.id,
            state=self.body.control.state if self.state == OPEN else self.state,
            generation=self.generation,
            cap=self.cap,
            slots=self.slots,
            up_bytes=self.up_bytes,
            down_bytes=self.down_bytes,
            arena_bytes=self.arena_bytes,
            depth_up=up,
            depth_down=down,
            since=self.since,
            read_only=f"up: {'sealed' if memfd else 'advisory (same uid)'}; down: advisory (same uid)",
        )

    # -- outliving the kernel ---------------------------------------------------------------------------------

    def record(self) -> list[Any]:
        return [*(getattr(self, name) for name in _RECORDED), self.provider.name, self.client.id]


def restored(
    row: Sequence[Any],
    take: Take,
    runners: Mapping[str, Runner],
    principals: Mapping[str, Principal],
) -> tuple[int, Channel | None]:
    """The number and the channel of a record; None when its client has gone, then it has ended.

    Raises KeyError for what is not there, and SnapError.
    """
    values = dict(zip((*_RECORDED, "provider", "client"), row, strict=True))
    runner, client = runners[values.pop("provider")], principals.get(values.pop("client"))
    fds = take(label(values["id"]))
    sizes = (values["up_bytes"], values["down_bytes"], values["arena_bytes"])
    body = Body.adopt(values["slots"], sizes, fds, runner.gate, values.pop("line"))
    if client is None:
        body.close("gone", "its client went while no kernel ran")
        return values["id"], None
    return values["id"], Channel(**values, provider=runner, client=client, body=body, adopted=True)


def generation(number: int) -> int:
    """What the lines of a gate page and the two ends know a channel by: 32 bits."""
    return number & 0xFFFFFFFF


def label(number: int) -> str:
    """The name under which the descriptors of a channel are stored."""
    return f"channel.{number}"


def _bell(undo: ExitStack) -> int:
    """Raises ResourceError."""
    try:
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise ResourceError(f"cannot make a channel: {error.strerror}", "close channels") from error
    undo.callback(os.close, bell)
    return bell
