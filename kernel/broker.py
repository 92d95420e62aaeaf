"""Channels: made here, handed to their two ends, and shut here. No message of one passes through the kernel.

A channel is `offered` when its opener has the descriptors, `attaching` when the provider has them too, `open` when
the provider said so. Each step has a deadline. A channel ends in one place, `_end`, whatever ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
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
from snap.ipc import protocol

from . import channels
from .capability import Capability, CapabilityTable
from .channels import ATTACHING, OFFERED, OPEN, Channel
from .events import Events
from .incarnation import Incarnation
from .principals import Principal
from .runner import Runner
from .store import Store
from .takeover import Take

MAP_DEADLINE: Final = 10.0
ATTACH_DEADLINE: Final = 5.0
LONGEST_WAIT: Final = 3600.0
_USABLE: Final = frozenset({"send", "recv"})


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
        self._set_timer(channel, MAP_DEADLINE, "was not mapped by its opener")
        self._store.put(channels.label(channel.id), channel.body.fds)
        self._events.emit(
            "channel.offered", f"channel:{channel.id}", service=channel.service, client=principal.id
        )
        principal.send(channel.offer(request.seq), channel.body.fds)

    def _make(self, principal: Principal, request: protocol.Open, cap: Capability, runner: Runner) -> Channel:
        """Raises SnapError; whatever was made by then is given back."""
        service = cap.object.partition(":")[2]
        if not cap.rights & _USABLE:
            raise DeniedError(
                f"{cap.object}: neither send nor recv is allowed", "a channel needs one of them"
            )
        slots, sizes = channels.geometry(request)
        need = _native.ring_bytes(slots) + sum(sizes)
        principal.reserve(need)
        try:
            body = channels.Body.make(self._last_id + 1, slots, sizes, self._backend, runner.gate)
        except SnapError as error:
            principal.bytes -= need
            if isinstance(error, ResourceError):
                self._events.emit("resources.exhausted", principal.id, error=error.message)
            raise
        self._last_id += 1
        return Channel(
            id=self._last_id,
            generation=channels.generation(self._last_id),
            service=service,
            engine=runner.found.manifest.provides[service].engine,
            provider=runner,
            client=principal,
            rights=sorted(cap.rights & _USABLE),
            slots=slots,
            up_bytes=sizes[0],
            down_bytes=sizes[1],
            arena_bytes=sizes[2],
            backend=self._backend,
            body=body,
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
        if channel.backend == "memfd" and not channel.body.sealed:
            self.close(channel, "its opener did not seal the up pool")
            raise ProtocolError(
                f"channel {channel.id}: the up pool is not sealed",
                "map it, add F_SEAL_FUTURE_WRITE, then say Mapped",
            )
        channel.state, channel.seq = ATTACHING, request.seq
        channel.body.open(channel.generation)
        self._set_timer(channel, ATTACH_DEADLINE, "was not attached by its module")
        channel.provider.send(channel.order(), channel.body.fds)

    def attach(self, runner: Runner, incarnation: Incarnation) -> None:
        """A process of the provider has loaded: it may come to serve every channel that there is."""
        for channel in self.channels.values():
            if channel.provider is runner and channel.state != OFFERED:
                incarnation.send(channel.order(), channel.body.fds)

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
        channel.set_timer(None)
        channel.state = OPEN
        self._events.emit(
            "channel.open", f"channel:{channel.id}", service=channel.service, client=channel.client.id
        )
        channel.client.send(protocol.Ready(seq=channel.seq, channel=channel.id), ())

    # -- how clients fare -------------------------------------------------------------------------------------

    def longest_wait(self, runner: Runner) -> int:
        """ns that a client of `runner` waited for a message at the longest, since `clear_waits`; 0: none did
        for long."""
        return max((channel.body.control.longest_wait() for channel in self._of(runner)), default=0)

    def unanswered(self, runner: Runner) -> int:
        """Messages of clients that `runner` has not taken, as the indices claim."""
        return sum(max(0, channel.body.control.depth()[0]) for channel in self._of(runner))

    def clear_waits(self, runner: Runner) -> None:
        for channel in self._of(runner):
            channel.body.control.clear_longest_wait()

    def _of(self, runner: Runner) -> list[Channel]:
        return [channel for channel in self.channels.values() if channel.provider is runner]

    # -- outliving the kernel ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        return {
            "last": self._last_id,
            "channels": [channel.record() for channel in self.channels.values()],
        }

    def restore(
        self,
        record: dict[str, Any],
        take: Take,
        runners: Mapping[str, Runner],
        principals: Mapping[str, Principal],
    ) -> None:
        """Go on with the channels of an earlier kernel. Raises KeyError for what is not there, and SnapError."""
        self._last_id = record["last"]
        for row in record["channels"]:
            number, channel = channels.restored(row, take, runners, principals)
            if channel is None:
                self._store.remove(channels.label(number))
                continue
            self.channels[channel.id] = channel
            channel.client.channels.add(channel.id)
            channel.client.bytes += channel.bytes
            state = channel.body.control.state
            if state != "open":
                self._end(channel, state, "it ended as the kernel did")
            elif channel.state != OPEN:
                self._set_timer(channel, MAP_DEADLINE, "was not set up")

    def fds_of(self, message: Any) -> list[int]:
        """What goes with an answer of an earlier kernel."""
        number = message.channel if isinstance(message, protocol.Opened) else 0
        return self.channels[number].body.fds if number in self.channels else []

    def held(self, runner: Runner, incarnation: Incarnation, channels: dict[int, int]) -> None:
        """A process of an earlier kernel says which channels it has: give it what it lacks, take what is no more."""
        for channel in self._of(runner):
            generation = channels.pop(channel.id, None)
            if channel.state == OFFERED:
                continue
            if generation is None:
                if incarnation.schemas is not None:
                    incarnation.send(channel.order(), channel.body.fds)
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
        channel.set_timer(None)
        self._fail(channel, RevokedError.code if word == "revoked" else PeerGoneError.code, reason)
        channel.body.close("gone" if word == "closed" else word, reason)
        self._store.remove(channels.label(channel.id))
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
        self._fail(channel, DeadlineError.code, f"channel {channel.id} {what} in time")
        self._end(channel, "gone", f"it {what} in time")

    def _set_timer(self, channel: Channel, delay: float, what: str) -> None:
        channel.set_timer(self._loop.call_later(delay, self._late, channel, what))

    def _own(self, principal: Principal, number: int) -> Channel:
        if number not in principal.channels:
            raise NotFoundError(f"{principal.id} has no channel {number}", "it may have ended")
        return self.channels[number]


def _not_ready(service: str, runner: Runner) -> NotRunningError:
    machine = runner.machine
    return NotRunningError(
        f"service {service!r} is not ready: module {runner.name!r} is {machine.state} ({machine.cause})",
        f"`snapctl module start {runner.name}`, or open it with a time to wait",
    )
