"""The application's client: look a service up, open channels to it, hand rights on.

What is said to the kernel is written once, as *dialogues*: generators that yield a request and get its answer, and
do no I/O. `Client` drives them by a blocking requester (an application's socket, or a module's link),
`AsyncClient` by one in the event loop.
"""

# ruff: noqa: ASYNC109 (deadlines are written as in the blocking forms, and come out as the same error)

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple, Self, TypeVar

from snap.dataplane import _native
from snap.dataplane.errors import ProtocolError, SnapError, UsageError

from . import protocol, seqpacket
from .channel import Channel
from .paths import BOOTSTRAP, runtime_dir
from .protocol import (
    PROTOCOL_VERSION,
    Attenuate,
    Caps,
    CapView,
    CloseChannel,
    Copy,
    Delegate,
    Done,
    Found,
    Hello,
    ListCaps,
    Lookup,
    Mapped,
    Message,
    Opened,
    Ready,
    Revoke,
    Welcome,
)
from .requester import AsyncRequester, Requester, SocketRequester
from .segment import Segment

__all__ = ["AsyncClient", "Channel", "Client", "Service", "aconnect", "connect", "open_channel"]

DEFAULT_TIMEOUT: Final = 10.0
_GRACE: Final = 1.0
"""Seconds that an answer may take longer than what the kernel itself waits for, so that its reason arrives."""
_FAREWELL: Final = 1.0
"""Seconds that closing a channel waits for the kernel to know: it may be stopped."""

T = TypeVar("T")
Runtime = str | os.PathLike[str] | None
M = TypeVar("M", bound=Message)


class Ask(NamedTuple):
    """What a dialogue yields: a request, and how long its answer may take, in seconds."""

    message: Message
    timeout: float


Dialogue = Generator[Ask, tuple[Message, list[int]], T]


@dataclass(frozen=True)
class Service:
    """A capability on a service: `handle` is its number in the caller's own table. `ready` as of the look-up."""

    name: str
    handle: int
    rights: frozenset[str]
    ready: bool = True


class Wish(NamedTuple):
    """What a new channel should be like; 0 means the kernel's default. `slots` is a power of two, the others bytes."""

    slots: int = 0
    up_bytes: int = 0
    down_bytes: int = 0
    arena_bytes: int = 0
    wait: float = DEFAULT_TIMEOUT


class Client:
    """A principal's connection to the kernel; any number of threads may use it. `close` (or leaving `with`)
    makes the kernel revoke the channels that were opened through it.

    Every call raises UnreachableError when the kernel has gone (established channels go on), DeadlineError when it does
    not answer in time, and the error that it answers with.
    """

    def __init__(self, requester: Requester, on_close: Callable[[], None] | None = None) -> None:
        self._requester = requester
        self._on_close = on_close
        self.principal = ""
        """Who the kernel says we are; empty over a module's link."""

    def lookup(self, service: str, timeout: float = DEFAULT_TIMEOUT) -> Service:
        """A capability on `service`. Raises DeniedError when policy gives none, NotFoundError."""
        return self._run(_lookup(service, timeout))

    def open(
        self,
        service: str | Service,
        *,
        slots: int = 0,
        up_bytes: int = 0,
        down_bytes: int = 0,
        arena_bytes: int = 0,
        timeout: float = DEFAULT_TIMEOUT,
        wait: float | None = None,
    ) -> Channel:
        """Open a channel, waiting until the service is ready for up to `wait` seconds (default: `timeout`, 0: not).

        `slots` (a power of two) and the sizes of the pools, which bound the largest message, default to the kernel's;
        `arena_bytes` of memory that both ends write (`channel.arena`) are for services with one-sided operations.
        Raises DeniedError, QuotaError, NotRunningError, DeadlineError, ResourceError, and FaultedError when what came
        is no channel.
        """
        wish = Wish(slots, up_bytes, down_bytes, arena_bytes, timeout if wait is None else wait)
        return self._open(self._run(_resolve(service, timeout)), wish, timeout)

    def capabilities(self, timeout: float = DEFAULT_TIMEOUT) -> list[CapView]:
        """Everything in this principal's table."""
        return self._run(_capabilities(timeout))

    def attenuate(
        self,
        service: Service,
        rights: Iterable[str],
        expires: float | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Service:
        """A new capability with fewer `rights`, for `expires` seconds if given. Raises DeniedError for more rights."""
        return self._run(_attenuate(service, frozenset(rights), expires, timeout))

    def copy(self, service: Service, timeout: float = DEFAULT_TIMEOUT) -> Service:
        """A second capability with the same rights. Raises DeniedError without the right `copy`."""
        return self._run(_copy(service, timeout))

    def delegate(
        self,
        service: Service,
        to: str,
        rights: Iterable[str] | None = None,
        move: bool = False,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        """Give principal `to` a copy, with `rights` only if given, or with `move` the capability itself.

        Raises DeniedError without the right `delegate` (or `move`), NotFoundError for an unknown principal.
        """
        chosen = None if rights is None else sorted(rights)
        self._run(_done(Delegate(handle=service.handle, to=to, rights=chosen, move=move), timeout))

    def revoke(self, service: Service, itself: bool = True, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Revoke everything derived from this capability, and it `itself`, with the channels opened by them."""
        self._run(_done(Revoke(handle=service.handle, itself=itself), timeout))

    def close(self) -> None:
        """Leave the kernel; idempotent."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self, service: Service, wish: Wish, timeout: float) -> Channel:
        channel = self._run(_open(service, wish, timeout, self._requester.send))
        return channel.owned_by(
            lambda: self._farewell(channel.id),
            reopen=lambda seconds: self._open(service, wish._replace(wait=seconds), seconds),
        )

    def _farewell(self, channel: int) -> None:
        # Waiting for the answer bounds how many of them lie unread; a kernel that has gone needs no farewell.
        with contextlib.suppress(SnapError):
            self._requester.request(CloseChannel(channel=channel), _FAREWELL)

    def _run(self, dialogue: Dialogue[T]) -> T:
        try:
            ask = next(dialogue)
            while True:
                try:
                    answer = self._requester.request(*ask)
                except BaseException as error:
                    ask = dialogue.throw(error)
                else:
                    ask = dialogue.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result


class AsyncClient:
    """A connection to the kernel for one event loop. Channels are the same; `await channel.areopen()` reopens them."""

    def __init__(self, requester: AsyncRequester) -> None:
        self._requester = requester
        self.principal = ""

    async def alookup(self, service: str, timeout: float = DEFAULT_TIMEOUT) -> Service:
        """As `Client.lookup`."""
        return await self._run(_lookup(service, timeout))

    async def aopen(
        self,
        service: str | Service,
        *,
        slots: int = 0,
        up_bytes: int = 0,
        down_bytes: int = 0,
        arena_bytes: int = 0,
        timeout: float = DEFAULT_TIMEOUT,
        wait: float | None = None,
    ) -> Channel:
        """As `Client.open`."""
        wish = Wish(slots, up_bytes, down_bytes, arena_bytes, timeout if wait is None else wait)
        return await self._open(await self._run(_resolve(service, timeout)), wish, timeout)

    async def acapabilities(self, timeout: float = DEFAULT_TIMEOUT) -> list[CapView]:
        """As `Client.capabilities`."""
        return await self._run(_capabilities(timeout))

    def close(self) -> None:
        """Leave the kernel, which revokes this client's channels; idempotent."""
        self._requester.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    async def _open(self, service: Service, wish: Wish, timeout: float) -> Channel:
        channel = await self._run(_open(service, wish, timeout, self._requester.send))
        return channel.owned_by(
            lambda: self._requester.send(CloseChannel(channel=channel.id)),
            areopen=lambda seconds: self._open(service, wish._replace(wait=seconds), seconds),
        )

    async def _run(self, dialogue: Dialogue[T]) -> T:
        try:
            ask = next(dialogue)
            while True:
                try:
                    answer = await self._requester.request(*ask)
                except BaseException as error:
                    ask = dialogue.throw(error)
                else:
                    ask = dialogue.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result


def connect(runtime_dir: Runtime = None, name: str = "", timeout: float = DEFAULT_TIMEOUT) -> Client:
    """Connect to the kernel of `runtime_dir` (default: see `snap.ipc.paths`); `name` is a label for operators.

    Raises UnreachableError when none runs there, DeadlineError when it does not answer, ProtocolError when it is of
    another version.
    """
    requester = SocketRequester(_dial(runtime_dir, timeout))
    client = Client(requester, requester.close)
    try:
        client.principal = client._run(_hello(name, timeout))
    except BaseException:
        client.close()
        raise
    return client


async def aconnect(
    runtime_dir: Runtime = None, name: str = "", timeout: float = DEFAULT_TIMEOUT
) -> AsyncClient:
    """`connect`, for the running event loop."""
    client = AsyncClient(AsyncRequester(_dial(runtime_dir, timeout)))
    try:
        client.principal = await client._run(_hello(name, timeout))
    except BaseException:
        client.close()
        raise
    return client


def open_channel(
    service: str, runtime_dir: Runtime = None, name: str = "", timeout: float = DEFAULT_TIMEOUT
) -> Channel:
    """One channel over a connection of its own, which ends with it: `with open_channel("echo") as channel`.

    `reopen` connects anew. Raises what `connect` and `Client.open` raise.
    """
    client = connect(runtime_dir, name, timeout)
    try:
        channel = client.open(service, timeout=timeout)
        return channel.owned_by(
            client.close, lambda seconds: open_channel(service, runtime_dir, name, seconds)
        )
    except BaseException:
        client.close()
        raise


# -- dialogues ------------------------------------------------------------------------------------------------


def _hello(name: str, timeout: float) -> Dialogue[str]:
    welcome = _only(Welcome, (yield Ask(Hello(version=PROTOCOL_VERSION, name=name), timeout)))
    if welcome.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the kernel speaks version {welcome.version}, this client {PROTOCOL_VERSION}",
            "use the client of the same release",
        )
    return welcome.principal


def _lookup(service: str, timeout: float) -> Dialogue[Service]:
    found = _only(Found, (yield Ask(Lookup(service=service), timeout)))
    return Service(service, found.handle, frozenset(found.rights), found.ready)


def _resolve(service: str | Service, timeout: float) -> Dialogue[Service]:
    return service if isinstance(service, Service) else (yield from _lookup(service, timeout))


def _capabilities(timeout: float) -> Dialogue[list[CapView]]:
    return _only(Caps, (yield Ask(ListCaps(), timeout))).caps


def _attenuate(
    service: Service, rights: frozenset[str], expires: float | None, timeout: float
) -> Dialogue[Service]:
    ask = Attenuate(handle=service.handle, rights=sorted(rights), expires=expires)
    return Service(service.name, (yield from _made(ask, timeout)), rights, service.ready)


def _copy(service: Service, timeout: float) -> Dialogue[Service]:
    handle = yield from _made(Copy(handle=service.handle), timeout)
    return Service(service.name, handle, service.rights, service.ready)


def _made(message: Message, timeout: float) -> Dialogue[int]:
    done = _only(Done, (yield Ask(message, timeout)))
    if done.handle is None:
        raise ProtocolError(f"the kernel answered {type(message).__name__} without a handle")
    return done.handle


def _done(message: Message, timeout: float) -> Dialogue[None]:
    _only(Done, (yield Ask(message, timeout)))


def _open(service: Service, wish: Wish, timeout: float, send: Callable[[Message], None]) -> Dialogue[Channel]:
    """Open, map, seal, and wait until the provider has attached. `send` takes back what cannot be finished."""
    if wish.wait < 0 or min(wish.slots, wish.up_bytes, wish.down_bytes, wish.arena_bytes) < 0:
        raise UsageError(f"sizes and seconds of a channel cannot be negative: {wish}")
    ask = protocol.Open(handle=service.handle, **wish._asdict())
    message, fds = yield Ask(ask, max(timeout, wish.wait) + _GRACE)
    try:
        opened = _expect(Opened, message)
        channel: Channel | None = None
        try:
            channel = _map(service, opened, fds)
            _only(Ready, (yield Ask(Mapped(channel=opened.channel), timeout + _GRACE)))
        except BaseException:
            if channel is not None:
                channel.close()
            with contextlib.suppress(SnapError, BlockingIOError):
                send(CloseChannel(channel=opened.channel))
            raise
        return channel
    finally:
        seqpacket.close_all(fds)


def _map(service: Service, opened: Opened, fds: list[int]) -> Channel:
    """Raises ProtocolError, FaultedError or ResourceError; the descriptors stay the caller's."""
    wanted = 6 if opened.arena_bytes else 5
    if len(fds) != wanted:
        raise ProtocolError(f"Opened came with {len(fds)} descriptors instead of {wanted}")
    ring, up, down, server_bell, client_bell, *arena = fds
    try:
        channel = Channel.make(
            _native.CLIENT,
            ring,
            up,
            down,
            opened.slots,
            opened.up_bytes,
            opened.down_bytes,
            (server_bell, client_bell),
            opened.generation,
            arena=(arena[0], opened.arena_bytes) if arena else (-1, 0),
            id=opened.channel,
            service=service.name,
            rights=frozenset(opened.rights),
        )
    except ValueError as error:
        raise ProtocolError(f"the kernel offered a channel that cannot be: {error}") from error
    if opened.seal_up:
        # After our own mapping: from now on nobody else can write what we send.
        with Segment.adopt(os.dup(up), opened.up_bytes) as pool:
            pool.seal_future_write()
    return channel


def _only(kind: type[M], answer: tuple[Message, list[int]]) -> M:
    """An answer that brings no descriptors. Raises ProtocolError for any other kind."""
    seqpacket.close_all(answer[1])
    return _expect(kind, answer[0])


def _expect(kind: type[M], message: Message) -> M:
    if not isinstance(message, kind):
        raise ProtocolError(f"the kernel answered with {type(message).__name__} instead of {kind.__name__}")
    return message


def _dial(directory: Runtime, timeout: float) -> socket.socket:
    return seqpacket.connect(runtime_dir(directory) / BOOTSTRAP, timeout)
