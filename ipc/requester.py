"""Requests to the kernel and their answers over one SEQPACKET socket, from threads and from asyncio.

What both share is `Conversation`, which does no I/O. A module's link, which also receives orders, is a `Requester`
as well: whatever opens channels (`snap.ipc.client`) works over any of them.
"""

# ruff: noqa: ASYNC109 (deadlines are written as in the blocking forms, and come out as the same error)

from __future__ import annotations

import asyncio
import contextlib
import itertools
import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

from snap.dataplane.errors import DeadlineError, ProtocolError, ResourceError, SnapError, UnreachableError

from . import seqpacket
from .protocol import Adopted, CloseChannel, Decoder, Failure, Message, Opened, ToPrincipal, encode

_KERNEL_GONE: Final = "the kernel has gone; established channels go on"
_HINT: Final = "connect again when `snapctl status` shows a kernel"
_PATIENCE: Final = 1.0
"""Seconds that a kernel may take nothing of what is told to it."""


class Received(NamedTuple):
    """An answer and the descriptors that came with it, which are now the receiver's to close."""

    message: Message
    fds: list[int]


class Requester(Protocol):
    """What `Client` needs of its way to the kernel; may be used by any thread."""

    def request(self, message: Message, timeout: float) -> tuple[Message, list[int]]:
        """Send a request and wait for its answer. Raises the error that the kernel answers with, DeadlineError
        after `timeout` seconds, UnreachableError when the kernel has gone."""

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send what needs no answer. Raises UnreachableError when the kernel has gone."""


class Conversation:
    """Pairs answers with requests by number. No I/O and no locks: its user has both."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._decoder: Decoder[Message] = Decoder(ToPrincipal)
        self._answers: dict[int, Received | None] = {}
        self._asked: dict[int, bytes] = {}
        self._repeated: dict[int, int] = {}
        self.ended: SnapError | None = None

    def ask(self, message: Message) -> tuple[int, bytes]:
        """Number a request. Raises the error that ended the conversation, ProtocolError when it is too large."""
        self._check()
        number = next(self._numbers)
        data = encode(msgspec.structs.replace(message, seq=number))
        self._answers[number], self._asked[number] = None, data
        return number, data

    def feed(self, data: bytes, fds: list[int]) -> tuple[int, list[bytes]]:
        """Take in a datagram. Returns the number of the request that it answers (0: none that still waits), and the
        datagrams to send back. No data ends the conversation.

        Raises ProtocolError for what cannot be decoded.
        """
        if not data:
            self.end(UnreachableError(_KERNEL_GONE, _HINT))
            return 0, []
        try:
            received = Received(self._decoder.decode(data), fds)
        except ProtocolError:
            seqpacket.close_all(fds)
            raise
        number = received.message.seq
        if isinstance(received.message, Adopted):
            seqpacket.close_all(fds)
            return 0, self._again()
        if self._came_already(received):
            seqpacket.close_all(fds)
            return 0, []
        if number in self._answers:
            self._answers[number] = received
            return number, []
        if number == 0 and isinstance(received.message, Failure):
            # The kernel says why it is about to hang up.
            self.end(received.message.error())
        return 0, _refusal(received)

    def feed_lost(self, lost: seqpacket.LostDescriptorsError) -> tuple[int, list[bytes]]:
        """Take in a datagram whose descriptors are lost: its request fails, the others go on. Returns as `feed`."""
        message = self._decoder.decode(lost.data)
        failure = Failure(seq=message.seq, code=ResourceError.code, message=lost.message, hint=lost.hint)
        return self.feed(encode(failure), [])[0], _refusal(Received(message, []))

    def answer(self, number: int) -> Received | None:
        """The answer to request `number`, or None when it has not come. Raises the error that it carries, or the one
        that ended the conversation."""
        received = self._answers.get(number)
        if received is None:
            self._check()
            return None
        self._drop(number)
        if isinstance(received.message, Failure):
            seqpacket.close_all(received.fds)
            raise received.message.error()
        return received

    def forget(self, number: int) -> list[bytes]:
        """Nobody waits for request `number` any more. Returns what to send back, as `feed` does."""
        received = self._drop(number)
        return [] if received is None else _refusal(received)

    def end(self, error: SnapError) -> None:
        """No answer will come any more."""
        self.ended = self.ended or error

    def _again(self) -> list[bytes]:
        """Requests without an answer: who was to answer them may have died over them."""
        waiting = {number: data for number, data in self._asked.items() if self._answers[number] is None}
        for number in waiting:
            self._repeated.setdefault(number, 0)
        return list(waiting.values())

    def _came_already(self, received: Received) -> bool:
        """Whether this answers for the second time what was asked twice. Another channel than the first time is none
        of that: it is there too, and has to be given back."""
        message = received.message
        if message.seq not in self._repeated:
            return False
        channel = message.channel if isinstance(message, Opened) else -1
        before = self._repeated[message.seq]
        if before == 0:
            self._repeated[message.seq] = channel
        return before == channel

    def _drop(self, number: int) -> Received | None:
        self._asked.pop(number, None)
        return self._answers.pop(number, None)

    def _check(self) -> None:
        if self.ended is not None:
            # A new one each time: many threads may raise it at once.
            raise type(self.ended)(self.ended.message, self.ended.hint)


def _refusal(received: Received) -> list[bytes]:
    """Give back an answer that nobody waits for: its descriptors, and the channel if it is one."""
    seqpacket.close_all(received.fds)
    if isinstance(received.message, Opened):
        return [encode(CloseChannel(channel=received.message.channel))]
    return []


class SocketRequester:
    """A `Requester` for threads, without one of its own: whoever waits first reads the socket, for all who wait."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._conversation = Conversation()
        self._changed = threading.Condition(threading.Lock())
        self._reading = False

    def request(self, message: Message, timeout: float) -> Received:
        end = time.monotonic() + timeout
        with self._changed:
            number, data = self._conversation.ask(message)
        try:
            received = self._wait(number, end) if self._put(data, end) else None
        finally:
            with self._changed:
                self._tell(self._conversation.forget(number))
        if received is None:
            raise DeadlineError(f"no answer to {type(message).__name__} within {timeout} s")
        return received

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        _send(self._sock, encode(message), fds)

    def close(self) -> None:
        """Leave: the kernel then revokes every channel of this connection. Idempotent."""
        with self._changed:
            self._conversation.end(UnreachableError("this client is closed", "connect again"))
            if self._sock.fileno() < 0:
                return
            # Wakes a thread that reads: closing under its feet would not.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._reading)
            self._sock.close()

    def _put(self, data: bytes, end: float) -> bool:
        """Send; False when the kernel takes nothing until `end`."""
        while True:
            try:
                _send(self._sock, data)
            except BlockingIOError:
                if not _ready(self._sock, select.POLLOUT, end):
                    return False
            else:
                return True

    def _wait(self, number: int, end: float) -> Received | None:
        """The answer to request `number`; None when it has not come until `end`."""
        with self._changed:
            while (received := self._conversation.answer(number)) is None:
                left = end - time.monotonic()
                if left <= 0:
                    return None
                if self._reading:
                    self._changed.wait(left)
                else:
                    self._read(end)
            return received

    def _read(self, end: float) -> None:
        """Take in one datagram, if one comes until `end`. Holds the lock, but for the time that it waits."""
        self._reading = True
        self._changed.release()
        try:
            readable = _ready(self._sock, select.POLLIN, end)
        finally:
            self._changed.acquire()
            self._reading = False
            self._changed.notify_all()
        if readable:
            self._tell(_take(self._sock, self._conversation)[1])

    def _tell(self, datagrams: list[bytes]) -> None:
        """Best effort: a kernel that takes nothing for long learns it when this client leaves."""
        with contextlib.suppress(UnreachableError):
            for data in datagrams:
                self._put(data, time.monotonic() + _PATIENCE)


class AsyncRequester:
    """The same for one event loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._conversation = Conversation()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._turn = asyncio.Lock()
        self._late: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._read)

    async def request(self, message: Message, timeout: float) -> Received:
        """As `Requester.request`."""
        number, data = self._conversation.ask(message)
        answered = self._waiting[number] = self._loop.create_future()
        try:
            try:
                async with asyncio.timeout(timeout):
                    await self._put(data)
                    await answered
            except TimeoutError:
                raise DeadlineError(f"no answer to {type(message).__name__} within {timeout} s") from None
            received = self._conversation.answer(number)
            if received is None:
                raise ProtocolError(f"woken without an answer to {type(message).__name__}")
            return received
        finally:
            self._waiting.pop(number)
            self._tell(self._conversation.forget(number))

    def send(self, message: Message) -> None:
        """Send what needs no answer, as soon as the kernel takes it."""
        self._tell([encode(message)])

    def close(self) -> None:
        """Leave: the kernel then revokes every channel of this connection. Idempotent."""
        if self._sock.fileno() >= 0:
            self._end(UnreachableError("this client is closed", "connect again"))
            self._sock.close()

    async def _put(self, data: bytes) -> None:
        async with self._turn:
            while True:
                try:
                    return _send(self._sock, data)
                except BlockingIOError:
                    await self._writable()

    async def _writable(self) -> None:
        room = self._loop.create_future()
        self._loop.add_writer(self._sock, _resolve, room)
        try:
            await room
        finally:
            self._loop.remove_writer(self._sock)

    def _read(self) -> None:
        number, late = _take(self._sock, self._conversation)
        self._tell(late)
        if number in self._waiting:
            _resolve(self._waiting[number])
        if self._conversation.ended is not None:
            self._end(self._conversation.ended)

    def _end(self, error: SnapError) -> None:
        self._conversation.end(error)
        self._loop.remove_reader(self._sock)
        for task in self._late:
            task.cancel()
        for waiting in self._waiting.values():
            _resolve(waiting)

    def _tell(self, datagrams: list[bytes]) -> None:
        for index, data in enumerate(datagrams):
            try:
                _send(self._sock, data)
            except BlockingIOError:
                task = self._loop.create_task(self._put_all(datagrams[index:]))
                self._late.add(task)
                task.add_done_callback(self._late.discard)
                return
            except UnreachableError:
                return

    async def _put_all(self, datagrams: list[bytes]) -> None:
        with contextlib.suppress(UnreachableError):
            for data in datagrams:
                await self._put(data)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _take(sock: socket.socket, conversation: Conversation) -> tuple[int, list[bytes]]:
    """Feed one datagram, if there is one; a kernel that speaks nonsense ends the conversation."""
    try:
        try:
            return conversation.feed(*seqpacket.recv(sock))
        except seqpacket.LostDescriptorsError as lost:
            return conversation.feed_lost(lost)
    except BlockingIOError:
        return 0, []
    except ConnectionError:
        return conversation.feed(b"", [])
    except ProtocolError as error:
        conversation.end(error)
        return 0, []


def _send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Raises BlockingIOError when the kernel takes nothing now, UnreachableError when it has gone."""
    try:
        seqpacket.send(sock, data, fds)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UnreachableError(_KERNEL_GONE, _HINT) from error


def _ready(sock: socket.socket, event: int, end: float) -> bool:
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(max(end - time.monotonic(), 0) * 1000))
