"""A channel between two processes that know each other, with no kernel to broker it: for benchmarks.

The same segments, seals, gate and endpoints as a brokered channel has; the offerer plays the kernel's part.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from snap.dataplane import _native

from . import seqpacket
from .segment import Segment

_GENERATION = 1


@dataclass
class Offer:
    """The offerer's end and, for as long as the channel lives, the pages that a kernel would hold."""

    endpoint: _native.Endpoint
    control: _native.ChannelControl
    gate: _native.Gate

    def close(self) -> None:
        self.endpoint.close()
        self.control.close()
        self.gate.close()


def offer(sock: socket.socket, slots: int = 1024, pool: int = 4 << 20) -> Offer:
    """Make a channel, send its other end over `sock` (SEQPACKET), and keep the client's end.

    `pool`: bytes of payload memory per direction. Raises ResourceError, OSError.
    """
    sizes = (_native.ring_bytes(slots), pool, pool, _native.Gate.BYTES)
    segments = [Segment.create(size) for size in sizes]
    bells = (os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC))
    fds = [segment.fd for segment in segments]
    control = _native.ChannelControl(fds[0], slots, bells)
    control.init(1, _GENERATION)
    gate = _native.Gate(fds[3])
    gate.open(0, _GENERATION)
    endpoint = _native.Endpoint(_native.CLIENT, fds[0], fds[1], fds[2], slots, pool, pool, bells, _GENERATION)
    segments[1].seal_future_write()
    segments[3].seal_future_write()
    seqpacket.send(sock, f"{slots} {pool}".encode(), [*fds, *bells])
    for segment in segments:
        segment.close()
    seqpacket.close_all(bells)
    return Offer(endpoint, control, gate)


def accept(sock: socket.socket) -> _native.Endpoint:
    """The server's end of what `offer` sent. Raises what `Endpoint` raises."""
    data, fds = seqpacket.recv(sock)
    slots, pool = (int(word) for word in data.split())
    ring, up, down, gate, server, client = fds
    bells = (server, client)
    try:
        return _native.Endpoint(
            _native.SERVER, ring, up, down, slots, pool, pool, bells, _GENERATION, gate_fd=gate, gate_index=0
        )
    finally:
        seqpacket.close_all(fds)


def echo(endpoint: _native.Endpoint) -> _native.Worker:
    """Hand a server's end to the native echo engine on a thread of its own."""
    with Segment.create(_native.State.MIN_BYTES) as segment:
        name, version, oldest, objects = _native.engine_schema("echo")
        _native.State.format(segment.fd, "echo", name, version, oldest, objects)
        state = _native.State(segment.fd)
    worker = _native.Worker("echo", "echo", state, -1, 1, wait=_native.ADAPTIVE)
    worker.attach(1, endpoint, 0)
    return worker


def check_cost(endpoint: _native.Endpoint) -> float:
    """Nanoseconds that the checks of one message take on this end."""
    return _native.measure_check(endpoint)


def line_cost(cpu_a: int, cpu_b: int) -> float:
    """Nanoseconds of a cache line's round trip between two processors."""
    return _native.measure_line(cpu_a, cpu_b)
