"""The module's end of its link to the kernel: one reader, requests from any thread."""

from __future__ import annotations

import itertools
import queue
import socket
import threading
from collections.abc import Sequence
from typing import Final

import msgspec

from snap.dataplane.errors import DeadlineError, NotFoundError, UnreachableError
from snap.ipc import seqpacket
from snap.ipc.protocol import (
    Caps,
    CloseChannel,
    Decoder,
    Done,
    Failure,
    Found,
    Message,
    Opened,
    Ready,
    ToModule,
    encode,
)
from snap.ipc.requester import Received

_ANSWERS: Final = (Found, Opened, Ready, Caps, Done, Failure)


class Link:
    """A `Requester` (see `snap.ipc.requester`) that also gets orders.

    Orders come out of `receive`, which one thread calls; answers go to the threads that wait in `request`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder: Decoder[Message] = Decoder(ToModule)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[Received | None]] = {}
        self._asked: dict[int, Message] = {}
        self._repeated: dict[int, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one datagram. Raises UnreachableError when the kernel has gone."""
        try:
            seqpacket.send(self._sock, encode(message), fds)
        except OSError as error:
            raise UnreachableError(f"the kernel has gone: {error.strerror}") from error

    def refuse(self, seq: int, message: str) -> None:
        """Answer an order for something that is not here."""
        self.send(Failure(seq=seq, code=NotFoundError.code, message=message))

    def receive(self) -> Received | None:
        """Wait for one datagram: an order, or None when it was an answer, which goes to who waits for it.

        Raises UnreachableError when the kernel has gone, ProtocolError for what cannot be decoded.
        """
        try:
            data, fds = seqpacket.recv(self._sock)
        except ConnectionError:
            data, fds = b"", []
        except seqpacket.LostDescriptorsError as lost:
            # One order cannot be carried out; who carries it out says so. The module serves on.
            data, fds = lost.data, []
        if not data:
            self._close()
            raise UnreachableError("the kernel has gone")
        try:
            message = self._decoder.decode(data)
        except BaseException:
            seqpacket.close_all(fds)
            raise
        received = Received(message, fds)
        if not isinstance(message, _ANSWERS):
            return received
        self._hand_over(received)
        return None

    def request(self, message: Message, timeout: float) -> Received:
        """Send a request and wait for its answer, from any thread but the link's own.

        Raises the error that the kernel answers with, DeadlineError after `timeout` seconds, UnreachableError when
        the kernel has gone.
        """
        number = next(self._numbers)
        answers: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        with self._lock:
            if self._closed:
                raise UnreachableError("the kernel has gone")
            self._waiting[number] = answers
            asked = self._asked[number] = msgspec.structs.replace(message, seq=number)
        try:
            self.send(asked)
            received = self._await(answers, number, timeout)
        except queue.Empty:
            raise DeadlineError(f"no answer to {type(message).__name__} within {timeout} s") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)
                self._asked.pop(number, None)
        if received is None:
            raise UnreachableError("the kernel has gone")
        if isinstance(received.message, Failure):
            seqpacket.close_all(received.fds)
            raise received.message.error()
        return received

    def repeat(self) -> None:
        """Another kernel process is at the other end: what had no answer may have been lost with the one before."""
        with self._lock:
            waiting = [asked for number, asked in self._asked.items() if self._waiting[number].empty()]
            for asked in waiting:
                self._repeated.setdefault(asked.seq, 0)
        for asked in waiting:
            self.send(asked)

    def _await(
        self, answers: queue.SimpleQueue[Received | None], number: int, timeout: float
    ) -> Received | None:
        try:
            return answers.get(timeout=timeout)
        except queue.Empty:
            with self._lock:
                self._waiting.pop(number, None)
                self._asked.pop(number, None)
            # One that came in this very moment carries descriptors: it counts.
            return answers.get_nowait()

    def _hand_over(self, received: Received) -> None:
        with self._lock:
            if self._came_already(received.message):
                seqpacket.close_all(received.fds)
                return
            answers = self._waiting.get(received.message.seq)
            if answers is not None:
                answers.put(received)
                return
        # Nobody waits any more: what the answer gives is given back.
        seqpacket.close_all(received.fds)
        if isinstance(received.message, Opened):
            self.send(CloseChannel(channel=received.message.channel))

    def _came_already(self, message: Message) -> bool:
        """Whether this answers for the second time what was asked twice; another channel than before does not."""
        before = self._repeated.get(message.seq)
        channel = message.channel if isinstance(message, Opened) else -1
        if before == 0:
            self._repeated[message.seq] = channel
        return before == channel

    def _close(self) -> None:
        with self._lock:
            self._closed = True
            for answers in self._waiting.values():
                answers.put(None)
