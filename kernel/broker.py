"""Channels: made here, handed to their two ends, and shut here. No message of one passes through the kernel.

A channel is `offered` when its opener has the descriptors, `attaching` when the provider has them too, `open` when
the provider said so. Each step has a deadline. A channel ends in one place, `_end`, whatever ends it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from snap.dataplane import _native
from snap.dataplane.errors import (
    DeadlineError,
    DeniedError,
    NotFoundError,
    NotRunningError,
    PeerGoneError,
    ProtocolError,
    ResourceError,
    RevokedError,
    SnapError,
    StateLostError,
    UsageError,
)
from snap.ipc import protocol, seqpacket
from snap.ipc.protocol import ChannelView
from snap.ipc.segment import Segment

from .capability import Capability, CapabilityTable
from .events import Events
from .gatepage import GatePage
from .incarnation import Incarnation
from .principals import Principal
from .runner import Runner
from .store import Store

DEFAULT_SLOTS: Final = 1024
DEFAULT_POOL: Final = 4 * 1024 * 1024
MAP_DEADLINE: Final = 10.0
ATTACH_DEADLINE: Final = 5.0
LONGEST_WAIT: Final = 3600.0
_PAGE: Final = 4096
_SLOTS: Final = (64, 65536)
_USABLE: Final = frozenset({"send", "recv"})

_RECORDED: Final = (
    *("id", "generation", "service", "engine", "rights", "slots", "up_bytes", "down_bytes", "backend"),
    *("line", "cap", "state", "seq", "answered", "since"),
)

OFFERED: Final = "offered"
ATTACHING: Final = "attaching"
OPEN: Final = "open"


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
    backend: str
    control: _native.ChannelControl
    gate: GatePage
    line: int
    segments: list[Segment]
    bells: tuple[int, ...]
    cap: int = 0
    state: str = OFFERED
    seq: int = 0
    answered: bool = False
    since: float = field(default_factory=time.time)
    timer: asyncio.TimerHandle | None = None
    adopted: bool = False

    @property
    def bytes(self) -> int:
        return _native.ring_bytes(self.slots) + self.up_bytes + self.down_bytes

    @property
    def fds(self) -> list[int]:
        return [*(segment.fd for segment in self.segments), *self.bells]

    def close_fds(self) -> None:
        for segment in self.segments:
            segment.close()
        seqpacket.close_all(self.bells)
        self.segments, self.bells = [], ()

    def order(self) -> protocol.Attach:
        """What a process of the provider is told, with `fds`."""
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
            gate_index=self.line,
        )

    def view(self) -> ChannelView:
        up, down = self.control.depth()
        memfd = self.backend == "memfd"
        return ChannelView(
            id=self.id,
            service=self.service,
            module=self.provider.name,
            client=self.client.id,
            state=self.control.state if self.state == OPEN else self.state,
            generation=self.generation,
            cap=self.cap,
            slots=self.slots,
            up_bytes=self.up_bytes,
            down_bytes=self.down_bytes,
            depth_up=up,
            depth_down=down,
            since=self.since,
            read_only=f"up: {'sealed' if memfd else 'advisory (same uid)'}; down: advisory (same uid)",
        )


@dataclass(eq=False)
class _Waiting:
    principal: Principal
    request: protocol.Open
    timer: asyncio.TimerHandle


class Broker:
    """`provider(service)` gives the runner of the module that provides a service, or None."""

    def __init__(
        self,
        table: CapabilityTable,
        events: Events,
        backend: str,
        provider: Callable[[str], Runner | None],
        store: Store,
    ) -> None:
        self.channels: dict[int, Channel] = {}
        self._store = store
        self._table, self._events, self._backend, self._provider = table, events, backend, provider
        self._waiting: dict[str, list[_Waiting]] = {}
        self._last_id = 0
        self._loop = asyncio.get_running_loop()

    # -- opening ----------------------------------------------------------------------------------------------

    def open(self, principal: Principal, request: protocol.Open) -> None:
        """Answer with `Opened`, now or when the service is ready. Raises SnapError."""
        cap = self._table.check(principal.id, request.handle, "connect", self._loop.time())
        service = cap.object.partition(":")[2]
        runner = self._provider(service)
        if runner is None:
            raise NotFoundError(f"no module provides the service {service!r}", "see `snapctl module list`")
        if runner.ready:
            self._offer(principal, request, cap, runner)
        elif request.wait > 0:
            self._wait(principal, request, service)
        else:
            raise _not_ready(service, runner)

    def service_ready(self, service: str) -> None:
        for waiting in self._waiting.pop(service, []):
            waiting.timer.cancel()
            waiting.principal.waiting -= 1
            try:
                self.open(waiting.principal, waiting.request)
            except SnapError as error:
                waiting.principal.fail(waiting.request.seq, error.code, error.message, error.hint)

    def _wait(self, principal: Principal, request: protocol.Open, service: str) -> None:
        principal.reserve(0)
        principal.waiting += 1
        timer = self._loop.call_later(
            min(request.wait, LONGEST_WAIT), self._give_up, service, principal, request
        )
        self._waiting.setdefault(service, []).append(_Waiting(principal, request, timer))

    def _give_up(self, service: str, principal: Principal, request: protocol.Open) -> None:
        self._forget_waiting(lambda waiting: waiting.request is request)
        runner = self._provider(service)
        why = _not_ready(service, runner).message if runner else f"nobody provides {service!r}"
        principal.fail(
            request.seq, DeadlineError.code, f"{why}, after {request.wait:g} s", "see `snapctl status`"
        )

    def _forget_waiting(self, match: Callable[[_Waiting], bool]) -> None:
        for service, waitings in list(self._waiting.items()):
            for waiting in [waiting for waiting in waitings if match(waiting)]:
                waiting.timer.cancel()
                waiting.principal.waiting -= 1
                waitings.remove(waiting)
            if not waitings:
                del self._waiting[service]

    def _offer(self, principal: Principal, request: protocol.Open, cap: Capability, runner: Runner) -> None:
        channel = self._make(principal, request, cap, runner)
        self.channels[channel.id] = channel
        principal.channels.add(channel.id)
        try:
            granted = self._table.mint(
                principal.id,
                f"channel:{channel.id}",
                cap.rights & {"send", "recv", "inspect"},
                rule=cap.rule,
                now=self._loop.time(),
                parent=cap.id,
            )
        except SnapError:
            self._end(channel, "closed", "no capability could be made for it", quiet=True)
            raise
        channel.cap = granted.id
        channel.timer = self._loop.call_later(
            MAP_DEADLINE, self._late, channel, "was not mapped by its opener"
        )
        self._store.put(f"channel.{channel.id}", channel.fds)
        self._events.emit(
            "channel.offered", f"channel:{channel.id}", service=channel.service, client=principal.id
        )
        answer = protocol.Opened(
            seq=request.seq,
            channel=channel.id,
            generation=channel.generation,
            slots=channel.slots,
            up_bytes=channel.up_bytes,
            down_bytes=channel.down_bytes,
            rights=channel.rights,
            backend=channel.backend,
            seal_up=channel.backend == "memfd",
        )
        principal.send(answer, channel.fds)

    def _make(self, principal: Principal, request: protocol.Open, cap: Capability, runner: Runner) -> Channel:
        """Raises SnapError; whatever was made by then is given back."""
        service = cap.object.partition(":")[2]
        if not cap.rights & _USABLE:
            raise DeniedError(
                f"{cap.object}: neither send nor recv is allowed", "a channel needs one of them"
            )
        slots, up, down = _geometry(request)
        need = _native.ring_bytes(slots) + up + down
        principal.reserve(need)
        segments: list[Segment] = []
        bells: list[int] = []
        gate, line = runner.gate, -1
        try:
            line = gate.take()
            for size in (_native.ring_bytes(slots), up, down):
                segments.append(Segment.create(size, self._backend))
            for _ in range(2):
                bells.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            control = _native.ChannelControl(segments[0].fd, slots, (bells[0], bells[1]))
            self._last_id += 1
            generation = self._last_id & 0xFFFFFFFF
            control.init(self._last_id, generation)
        except (SnapError, OSError) as error:
            principal.bytes -= need
            if line >= 0:
                gate.give_back(line)
            for segment in segments:
                segment.close()
            seqpacket.close_all(bells)
            if not isinstance(error, SnapError):
                error = ResourceError(f"cannot make a channel: {error.strerror}", "close channels")
            if isinstance(error, ResourceError):
                self._events.emit("resources.exhausted", principal.id, error=error.message)
            raise error from None
        return Channel(
            id=self._last_id,
            generation=generation,
            service=service,
            engine=runner.found.manifest.provides[service].engine,
            provider=runner,
            client=principal,
            rights=sorted(cap.rights & _USABLE),
            slots=slots,
            up_bytes=up,
            down_bytes=down,
            backend=self._backend,
            control=control,
            gate=gate,
            line=line,
            segments=segments,
            bells=(bells[0], bells[1]),
        )

    def mapped(self, principal: Principal, request: protocol.Mapped) -> None:
        """The opener is done: hand the channel to its provider. Raises SnapError."""
        channel = self._own(principal, request.channel)
        if channel.adopted and channel.state != OFFERED:
            # Asked again after a change of kernels: the answer may have been lost with the one before.
            channel.seq = request.seq
            if channel.state == OPEN:
                principal.send(protocol.Ready(seq=request.seq, channel=channel.id), ())
            return
        if channel.state != OFFERED:
            raise UsageError(f"channel {channel.id} is {channel.state} already")
        if channel.backend == "memfd" and "future_write" not in channel.segments[1].seals():
            self.close(channel, "its opener did not seal the up pool")
            raise ProtocolError(
                f"channel {channel.id}: the up pool is not sealed",
                "map it, add F_SEAL_FUTURE_WRITE, then say Mapped",
            )
        channel.state, channel.seq = ATTACHING, request.seq
        channel.gate.open(channel.line, channel.generation)
        self._set_timer(channel, ATTACH_DEADLINE, "was not attached by its module")
        channel.provider.send(channel.order(), channel.fds)

    def attach(self, runner: Runner, incarnation: Incarnation) -> None:
        """A process of the provider has loaded: it may come to serve every channel that there is."""
        for channel in self.channels.values():
            if channel.provider is runner and channel.state != OFFERED:
                incarnation.send(channel.order(), channel.fds)

    def news(self, runner: Runner, incarnation: Incarnation, message: Any) -> None:
        """What a module says of the channels that it serves; of others it has nothing to say."""
        number = message.seq if isinstance(message, protocol.Failure) else message.channel
        channel = self.channels.get(number)
        if channel is None or channel.provider is not runner or channel.state == OFFERED:
            return
        if isinstance(message, protocol.Dropped):
            self._end(channel, "faulted", message.reason[:500])
        elif isinstance(message, protocol.Attached):
            if channel.state == ATTACHING:
                self._attached(channel)
        elif incarnation is not runner.current:
            # It could not serve this client: it must not take over.
            runner.misbehaved(incarnation, f"channel {number} cannot be attached: {message.message[:500]}")
        else:
            self._fail(channel, message.code, message.message, message.hint)
            self._end(channel, "faulted", f"its module refused it: {message.message[:500]}")

    def _attached(self, channel: Channel) -> None:
        if channel.timer is not None:
            channel.timer.cancel()
            channel.timer = None
        channel.state = OPEN
        self._events.emit(
            "channel.open", f"channel:{channel.id}", service=channel.service, client=channel.client.id
        )
        channel.client.send(protocol.Ready(seq=channel.seq, channel=channel.id), ())

    # -- how clients fare -------------------------------------------------------------------------------------

    def longest_wait(self, runner: Runner) -> int:
        """ns that a client of `runner` waited for a message at the longest, since `clear_waits`; 0: none did
        for long."""
        return max((channel.control.longest_wait() for channel in self._of(runner)), default=0)

    def unanswered(self, runner: Runner) -> int:
        """Messages of clients that `runner` has not taken, as the indices claim."""
        return sum(max(0, channel.control.depth()[0]) for channel in self._of(runner))

    def clear_waits(self, runner: Runner) -> None:
        for channel in self._of(runner):
            channel.control.clear_longest_wait()

    def _of(self, runner: Runner) -> list[Channel]:
        return [channel for channel in self.channels.values() if channel.provider is runner]

    # -- outliving the kernel ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        return {
            "last": self._last_id,
            "channels": [
                [
                    *(getattr(channel, name) for name in _RECORDED),
                    channel.provider.name,
                    channel.client.id,
                ]
                for channel in self.channels.values()
            ],
        }

    def restore(
        self,
        record: dict[str, Any],
        take: Callable[[str], list[int]],
        runners: Mapping[str, Runner],
        principals: Mapping[str, Principal],
    ) -> None:
        """Go on with the channels of an earlier kernel. Raises KeyError for what is not there, and SnapError."""
        self._last_id = record["last"]
        for row in record["channels"]:
            values = dict(zip((*_RECORDED, "provider", "client"), row, strict=True))
            runner, client = runners[values.pop("provider")], principals.get(values.pop("client"))
            ring, up, down, *bells = take(f"channel.{values['id']}")
            sizes = (_native.ring_bytes(values["slots"]), values["up_bytes"], values["down_bytes"])
            segments = [Segment.adopt(fd, size) for fd, size in zip((ring, up, down), sizes, strict=True)]
            control = _native.ChannelControl(ring, values["slots"], (bells[0], bells[1]))
            runner.gate.hold(values["line"])
            if client is None:
                control.set_state("gone", "its client went while no kernel ran")
                control.close()
                runner.gate.give_back(values["line"])
                seqpacket.close_all([ring, up, down, *bells])
                self._store.remove(f"channel.{values['id']}")
                continue
            channel = Channel(
                **values,
                provider=runner,
                client=client,
                control=control,
                gate=runner.gate,
                segments=segments,
                bells=tuple(bells),
                adopted=True,
            )
            self.channels[channel.id] = channel
            channel.client.channels.add(channel.id)
            channel.client.bytes += channel.bytes
            if control.state != "open":
                self._end(channel, control.state, "it ended as the kernel did")
            elif channel.state != OPEN:
                self._set_timer(channel, MAP_DEADLINE, "was not set up")

    def fds_of(self, message: Any) -> list[int]:
        """What goes with an answer of an earlier kernel."""
        number = message.channel if isinstance(message, protocol.Opened) else 0
        return self.channels[number].fds if number in self.channels else []

    def held(self, runner: Runner, incarnation: Incarnation, channels: dict[int, int]) -> None:
        """A process of an earlier kernel says which channels it has: give it what it lacks, take what is no more."""
        for channel in self._of(runner):
            generation = channels.pop(channel.id, None)
            if channel.state == OFFERED:
                continue
            if generation is None:
                if incarnation.schemas is not None:
                    incarnation.send(channel.order(), channel.fds)
            elif generation != channel.generation:
                reason = f"it holds channel {channel.id} as generation {generation}"
                runner.misbehaved(incarnation, reason)
            elif channel.state == ATTACHING:
                self._attached(channel)
        for number in channels:
            incarnation.send(protocol.Detach(channel=number, reason="it is no more"))

    # -- ending -----------------------------------------------------------------------------------------------

    def close_own(self, principal: Principal, number: int) -> None:
        """One that has ended already is closed: its client could not know. Raises NotFoundError for any other."""
        if number in self.channels or not 0 < number <= self._last_id:
            self.close(self._own(principal, number), "closed by its client")

    def close(self, channel: Channel, reason: str) -> None:
        self._end(channel, "gone", reason)

    def revoked(
        self, caps: list[Capability], word: str = "revoked", reason: str = "its capability was revoked"
    ) -> None:
        """Shut the channels of capabilities that are no more."""
        for cap in caps:
            kind, _, number = cap.object.partition(":")
            if kind == "channel" and (channel := self.channels.get(int(number))) is not None:
                self._end(channel, word, reason)

    def principal_gone(self, principal: Principal, reason: str) -> None:
        self._forget_waiting(lambda waiting: waiting.principal is principal)
        for number in list(principal.channels):
            self._end(self.channels[number], "gone", reason)

    def provider_ended(self, runner: Runner, reason: str) -> None:
        """Nobody will serve the channels of `runner` any more."""
        for channel in self._of(runner):
            message = f"module {runner.name!r} ended: {reason}"
            self._fail(channel, NotRunningError.code, message, "open the channel again")
            self._end(channel, "gone", f"module {runner.name!r}: {reason}")

    def state_lost(self, runner: Runner, engine: str, reason: str) -> None:
        """The engine goes on without its state: what was under way on its channels is lost."""
        for channel in self._of(runner):
            if channel.engine == engine:
                self._fail(channel, StateLostError.code, reason, "open the channel again")
                self._end(channel, "lost", f"engine {engine!r} lost its state: {reason}")

    def _end(self, channel: Channel, word: str, reason: str, quiet: bool = False) -> None:
        if self.channels.pop(channel.id, None) is None:
            return
        if channel.timer is not None:
            channel.timer.cancel()
        self._fail(channel, RevokedError.code if word == "revoked" else PeerGoneError.code, reason)
        channel.gate.give_back(channel.line)
        channel.control.set_state("gone" if word == "closed" else word, reason[:200])
        channel.control.close()
        channel.close_fds()
        self._store.remove(f"channel.{channel.id}")
        channel.client.channels.discard(channel.id)
        channel.client.bytes -= channel.bytes
        if channel.state != OFFERED:
            channel.provider.send(protocol.Detach(channel=channel.id, reason=reason[:200]))
        if not quiet:
            self._events.emit(
                f"channel.{word}", f"channel:{channel.id}", service=channel.service, reason=reason
            )
        with suppress(NotFoundError):  # revoked already: that is why it ends
            self._table.revoke_id(channel.cap, f"channel {channel.id} ended: {reason}")

    def _fail(self, channel: Channel, code: str, message: str, hint: str = "") -> None:
        """Answer the opener's `Mapped`, unless that has its answer."""
        if channel.state == ATTACHING and not channel.answered:
            channel.answered = True
            channel.client.fail(channel.seq, code, message, hint)

    def _late(self, channel: Channel, what: str) -> None:
        channel.timer = None
        self._fail(channel, DeadlineError.code, f"channel {channel.id} {what} in time")
        self._end(channel, "gone", f"it {what} in time")

    def _set_timer(self, channel: Channel, delay: float, what: str) -> None:
        if channel.timer is not None:
            channel.timer.cancel()
        channel.timer = self._loop.call_later(delay, self._late, channel, what)

    def _own(self, principal: Principal, number: int) -> Channel:
        if number not in principal.channels:
            raise NotFoundError(f"{principal.id} has no channel {number}", "it may have ended")
        return self.channels[number]


def _geometry(request: protocol.Open) -> tuple[int, int, int]:
    """Slots and pool sizes in bytes, whole pages. Raises UsageError."""
    slots = request.slots or DEFAULT_SLOTS
    least, most = _SLOTS
    if not least <= slots <= most or slots & (slots - 1):
        raise UsageError(
            f"slots is {slots}", f"a power of two from {least} to {most}, or 0 for {DEFAULT_SLOTS}"
        )
    sizes = []
    for name, wish in (("up_bytes", request.up_bytes), ("down_bytes", request.down_bytes)):
        if not 0 <= wish <= 1 << 40:
            raise UsageError(f"{name} is {wish}", f"0 (for {DEFAULT_POOL}) to {1 << 40}")
        sizes.append(-(-(wish or DEFAULT_POOL) // _PAGE) * _PAGE)
    return slots, sizes[0], sizes[1]


def _not_ready(service: str, runner: Runner) -> NotRunningError:
    machine = runner.machine
    return NotRunningError(
        f"service {service!r} is not ready: module {runner.name!r} is {machine.state} ({machine.cause})",
        f"`snapctl module start {runner.name}`, or open it with a time to wait",
    )
