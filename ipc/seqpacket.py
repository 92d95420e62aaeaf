"""Datagrams with descriptors over a SEQPACKET Unix socket: the one place that packs and unpacks SCM_RIGHTS.

Received descriptors are close-on-exec, and every one of them is closed when its datagram is refused, so that
a peer cannot fill our table by sending nonsense.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from snap.dataplane.errors import ProtocolError, UnreachableError

from .protocol import MAX_FDS, MAX_MESSAGE

_UCRED = struct.Struct("iII")


class LostDescriptorsError(ProtocolError):
    """A datagram came whole, but this process is out of descriptors: those that came with it are lost. `data` is it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(
            "no descriptor is free for what the peer sent",
            "close channels, or raise the limit of open files (ulimit -n)",
        )
        self.data = data


class Credentials(NamedTuple):
    """Who is at the other end, as the operating system says (SO_PEERCRED at connect time)."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> Credentials:
    return Credentials(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair, both ends close-on-exec."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def connect(path: Path, timeout: float | None = None) -> socket.socket:
    """Connect to a kernel's bootstrap socket. Raises UnreachableError when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout)
    try:
        sock.connect(os.fspath(path))
    except OSError as error:
        sock.close()
        raise UnreachableError(
            f"no kernel answers on {path}: {error.strerror or error}", "start one with `snapctl up`"
        ) from error
    return sock


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one datagram with descriptors. Raises OSError (EPIPE, EAGAIN) as the socket does."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def recv(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Receive one datagram and its descriptors; empty bytes mean that the peer has gone.

    Raises ProtocolError for a truncated datagram (larger than `MAX_MESSAGE`, or more than `MAX_FDS`
    descriptors), LostDescriptorsError when this process is out of descriptors, both with everything that came with it
    closed; OSError as the socket does.
    """
    fd_bytes = MAX_FDS * array.array("i").itemsize
    data, ancillary, flags, _ = sock.recvmsg(
        MAX_MESSAGE + 1, socket.CMSG_LEN(fd_bytes), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) > MAX_MESSAGE:
        close_all(fds)
        if not flags & socket.MSG_TRUNC and len(data) <= MAX_MESSAGE and len(fds) < MAX_FDS:
            raise LostDescriptorsError(data)
        raise ProtocolError(f"datagram exceeds {MAX_MESSAGE} bytes or {MAX_FDS} descriptors")
    return data, list(fds)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
