"""Connections between the control sides of two hosts: TCP to a deadline, TLS 1.3, messages of `setup` in it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from . import setup
from .identity import fingerprint
from .setup import Reader, Reason, Refusal, SetupError

_LINGER: Final = 1.0
"""Seconds for somebody who is turned away to read why."""

_IP_MTU: Final = 14
_IPV6_MTU: Final = 24


class Stream:
    """Messages over TLS until a point in time."""

    def __init__(self, sock: ssl.SSLSocket, end: float) -> None:
        self._sock, self._end = sock, end
        self._reader = Reader()

    @classmethod
    @contextmanager
    def over(cls, context: ssl.SSLContext, raw: socket.socket, server: bool, end: float) -> Iterator[Stream]:
        """After the handshake. Raises OSError (ssl.SSLError, TimeoutError)."""
        raw.settimeout(left(end))
        with context.wrap_socket(raw, server_side=server, do_handshake_on_connect=False) as sock:
            try:
                sock.do_handshake()
            except ssl.SSLError:
                linger(sock)
                raise
            yield cls(sock, end)

    @property
    def pin(self) -> str:
        return fingerprint(self._sock.getpeercert(True) or b"")

    def send(self, message: setup.Message) -> None:
        self._sock.settimeout(left(self._end))
        self._sock.sendall(setup.encode(message))

    def receive(self) -> setup.Message | None:
        """None: the other end has let go. Raises SetupError, OSError."""
        while True:
            self._sock.settimeout(left(self._end))
            data = self._sock.recv(setup.MOST)
            if not data:
                return None
            message = self._reader.feed(data)
            if message is not None:
                return message

    def waits_for(self, other: socket.socket) -> bool:
        """Sleep until there is something on `other` (true), or from the other end. Raises TimeoutError."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(other, select.POLLIN)
        found = [] if self._sock.pending() else poll.poll(left(self._end) * 1000)
        return any(fd == other.fileno() for fd, _ in found)

    def turn_away(self, error: SetupError) -> None:
        """Say why, as far as that goes."""
        with contextlib.suppress(OSError):
            self.send(Refusal(error.reason, error.detail[:400]))
            linger(self._sock)


def linger(sock: ssl.SSLSocket) -> None:
    """Closing at once, with something unread, would destroy what was said last."""
    end = time.monotonic() + _LINGER
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        # The bytes under TLS, whatever they are, and not for ever.
        raw = socket.socket(fileno=os.dup(sock.fileno()))
        with raw:
            for _ in range(16):
                raw.settimeout(left(end))
                if not raw.recv(1 << 14):
                    return


def connect(host: str, where: tuple[str, int], family: socket.AddressFamily, timeout: float) -> socket.socket:
    """To the first address of `where` that answers. Raises SetupError, OSError."""
    try:
        found = socket.getaddrinfo(*where, family, socket.SOCK_STREAM)
    except OSError as error:
        raise SetupError(Reason.UNKNOWN, f"{host}: {where[0]}: {error.strerror or error}") from error
    end = time.monotonic() + timeout
    place = f"{where[0]} port {where[1]}"
    failure: OSError = OSError("no address")
    for *_, address in found:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(left(end))
            sock.connect(address)
        except TimeoutError:
            sock.close()
            failure = OSError(f"{place} does not answer")
        except OSError as error:
            sock.close()
            failure = OSError(f"{place}: {error.strerror or error}")
        else:
            return sock
    raise failure


def path_payload(family: socket.AddressFamily, address: str) -> int:
    """Bytes of UDP payload that one packet carries to `address`, by the MTU of the interface that leads there."""
    six = family == socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        level, option = (socket.IPPROTO_IPV6, _IPV6_MTU) if six else (socket.IPPROTO_IP, _IP_MTU)
        mtu = probe.getsockopt(level, option)
    return max(setup.SMALLEST_MTU, min(mtu - (48 if six else 28), setup.LARGEST_MTU))


def left(end: float) -> float:
    """Raises TimeoutError when nothing is."""
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
