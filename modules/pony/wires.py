"""Wires of shared memory between two engines of one machine: made by the host that is dialed, handed to the other.

Descriptors go over an abstract Unix socket: it needs no place in the file system, and nobody in another network
namespace reaches it; then packets go by UDP. Its name and a token, both random, are told inside TLS. The first who
knows the token, and is the same user, gets the other end.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Self

import msgspec

from snap.dataplane import _native

from . import setup
from .streams import Stream

FRAMES: Final = 512
"""Packets that a direction holds: more than the largest window of a flow, and acknowledgements."""

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_CREDENTIALS: Final = struct.Struct("=iII")
_PATIENCE: Final = 1.0
"""Seconds for the other end to say its part; UDP serves as well."""

_MOST: Final = 256
_VISITORS: Final = 4
"""Others may find the socket, too; they cannot hold up a set-up."""


def machine() -> list[str]:
    """The feature that says which machine this is; none where that is not known."""
    try:
        boot = _BOOT.read_bytes()
    except OSError:
        return []
    return [setup.MACHINE + hashlib.sha256(b"snap pony " + boot.strip()).hexdigest()[:16]]


class _Shape(msgspec.Struct, frozen=True):
    frames: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    mtu: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]


@dataclass(frozen=True)
class Wire:
    """One end. `fds`: the segment, the bell that this end listens to, the one that it rings."""

    side: int
    shape: _Shape
    fds: tuple[int, ...]

    @classmethod
    def make(cls, mtu: int, frames: int = FRAMES) -> Self:
        """Raises OSError."""
        fds = [_native.make_wire(frames, mtu)]
        try:
            for _ in range(2):
                fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError:
            _close(fds)
            raise
        return cls(0, _Shape(frames, mtu), tuple(fds))

    def request(self) -> dict[str, Any]:
        """As the engine is told of it."""
        return {
            "side": self.side,
            "frames": self.shape.frames,
            "mtu": self.shape.mtu,
            "fds": [*self.fds],
        }

    def other(self) -> Wire:
        """The other end, with the same descriptors."""
        segment, mine, theirs = self.fds
        return Wire(1 - self.side, self.shape, (segment, theirs, mine))

    def hand_over(self, sock: socket.socket) -> None:
        """Give the other end away. Raises OSError."""
        socket.send_fds(sock, [msgspec.json.encode(self.shape)], self.other().fds)

    @classmethod
    def receive(cls, sock: socket.socket) -> Self:
        """The end that is handed over. Raises OSError, msgspec.DecodeError."""
        room = socket.CMSG_SPACE(3 * 4)
        data, ancillary, _, _ = sock.recvmsg(_MOST, room, socket.MSG_CMSG_CLOEXEC)
        fds = [
            fd
            for level, kind, numbers in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for (fd,) in struct.iter_unpack("=i", numbers[: len(numbers) // 4 * 4])
        ]
        try:
            shape = msgspec.json.decode(data, type=_Shape)
            if len(fds) != 3:
                raise OSError(f"{len(fds)} descriptors came")
        except (msgspec.DecodeError, OSError):
            _close(fds)
            raise
        return cls(1, shape, tuple(fds))

    def close(self) -> None:
        """The engine has duplicates."""
        _close(self.fds)


class Offer:
    """The other end of a wire, for who was told of it. Raises OSError."""

    def __init__(self, mtu: int) -> None:
        self.told = os.urandom(setup.WIRE_BYTES).hex()
        self.taken = False
        name, self._token = _parts(self.told)
        self._listener = _socket()
        try:
            self._listener.bind(name)
            self._listener.listen(_VISITORS)
            self.wire = Wire.make(mtu)
        except OSError:
            self._listener.close()
            raise

    def serve(self, stream: Stream) -> None:
        """Until the end is taken, the other host says something else, or too many others came. Raises TimeoutError."""
        for _ in range(_VISITORS):
            if self.taken or not stream.waits_for(self._listener):
                return
            with contextlib.suppress(OSError), self._listener.accept()[0] as sock:
                sock.settimeout(_PATIENCE)
                if _same_user(sock) and hmac.compare_digest(sock.recv(_MOST), self._token):
                    self.wire.hand_over(sock)
                    self.taken = True

    def close(self) -> None:
        self._listener.close()
        self.wire.close()


@contextmanager
def offered(mtu: int) -> Iterator[Offer | None]:
    """None: there is nothing to make it of, and UDP has to do."""
    try:
        made = Offer(mtu)
    except OSError:
        yield None
        return
    with contextlib.closing(made):
        yield made


@contextmanager
def taken(told: str) -> Iterator[Wire | None]:
    """The end that a host of this machine offers. None: it cannot be reached, say from another network namespace."""
    wire = _take(told)
    with contextlib.closing(wire) if wire else contextlib.nullcontext():
        yield wire


def _take(told: str) -> Wire | None:
    name, token = _parts(told)
    try:
        with _socket() as sock:
            sock.settimeout(_PATIENCE)
            sock.connect(name)
            if not _same_user(sock):
                return None
            sock.sendall(token)
            return Wire.receive(sock)
    except (OSError, msgspec.DecodeError):
        return None


def _parts(told: str) -> tuple[bytes, bytes]:
    """Name and token."""
    half = len(told) // 2
    return b"\0snap-pony-" + told[:half].encode(), told[half:].encode()


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def _same_user(sock: socket.socket) -> bool:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(data)[1]
    return uid == os.geteuid()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
