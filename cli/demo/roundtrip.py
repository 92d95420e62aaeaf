"""Round trips of 64 bytes: Snap beside a Unix socket and ZeroMQ, between two processes each, interleaved in one run.

The peers' other ends run here too: `python -m snap.cli.demo.roundtrip unix|zmq WHERE`.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import zmq

from snap import ipc

from .stage import Stage

MESSAGE: Final = b"x" * 64
ROUNDS: Final = 5
TRIPS: Final = 2000
WARM_UP: Final = 200
TIMEOUT_SECONDS: Final = 10.0

Trip = Callable[[], None]


class Percentiles(NamedTuple):
    """Of one way to send, in microseconds: medians over the rounds."""

    way: str
    p50: float
    p99: float
    p999: float


def compare(stage: Stage, client: ipc.Client) -> list[Percentiles]:
    """Measure all ways, a round of each in turn. Raises SnapError when the service `echo` fails."""
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(client.open("echo", wait=TIMEOUT_SECONDS))
        ways = {
            "Snap, spinning": _snap(channel, ipc.SPIN),
            "Snap, blocking": _snap(channel, ipc.BLOCK),
            "Unix socket": stack.enter_context(_unix(stage)),
            "ZeroMQ": stack.enter_context(_zeromq(stage)),
        }
        rounds: dict[str, list[list[int]]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, trip in ways.items():
                rounds[way].append(_measure(trip))
    return [_percentiles(way, samples) for way, samples in rounds.items()]


def _measure(trip: Trip) -> list[int]:
    clock = time.perf_counter_ns
    for _ in range(WARM_UP):
        trip()
    samples = []
    for _ in range(TRIPS):
        begin = clock()
        trip()
        samples.append(clock() - begin)
    return sorted(samples)


def _percentiles(way: str, rounds: list[list[int]]) -> Percentiles:
    p50, p99, p999 = (
        statistics.median(samples[int(len(samples) * share)] for samples in rounds) / 1000
        for share in (0.5, 0.99, 0.999)
    )
    return Percentiles(way, p50, p99, p999)


def _snap(channel: ipc.Channel, wait: int) -> Trip:
    def trip() -> None:
        channel.send(MESSAGE, wait=wait)
        channel.recv(TIMEOUT_SECONDS, wait)

    return trip


@contextlib.contextmanager
def _unix(stage: Stage) -> Iterator[Trip]:
    near, far = socket.socketpair()
    with near:
        with far:
            stage.start(__name__, "unix", str(far.fileno()), pass_fds=(far.fileno(),))
        near.settimeout(TIMEOUT_SECONDS)

        def trip() -> None:
            near.sendall(MESSAGE)
            near.recv(len(MESSAGE))

        yield trip


@contextlib.contextmanager
def _zeromq(stage: Stage) -> Iterator[Trip]:
    with zmq.Context() as context, context.socket(zmq.PAIR) as near:
        near.setsockopt(zmq.LINGER, 0)
        near.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_SECONDS * 1000))
        path = stage.folder / "peer.sock"
        near.bind(f"ipc://{path}")
        stage.start(__name__, "zmq", path)

        def trip() -> None:
            near.send(MESSAGE)
            near.recv()

        yield trip


def _echo_unix(fd: int) -> None:
    with socket.socket(fileno=fd) as sock:
        while data := sock.recv(4096):
            sock.sendall(data)


def _echo_zeromq(path: str) -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as sock:
        sock.connect(f"ipc://{path}")
        while True:
            sock.send(sock.recv())


if __name__ == "__main__":
    kind, where = sys.argv[1:]
    if kind == "unix":
        _echo_unix(int(where))
    else:
        _echo_zeromq(where)
