"""What tests of modules are made of: time that you turn, channels in memory, and clients that misbehave."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable
from typing import Final, Self

from snap.dataplane import _native
from snap.ipc.channel import Channel

from .serving import ServerChannel

RIGHTS: Final = frozenset({"connect", "send", "recv"})
NS: Final = 1_000_000_000


class VirtualClock:
    """Time that passes only when told to. Calling it gives nanoseconds, as `Engine.clock` wants."""

    def __init__(self, seconds: float = 1.0) -> None:
        self._now = round(seconds * NS)

    def __call__(self) -> int:
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass. Raises ValueError for negative ones: this clock is monotonic too."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot go back {-seconds} s")
        self._now += round(seconds * NS)


class ChannelPair:
    """Both ends of a channel in this process, and the kernel's hold on it. Close it, or use it in `with`."""

    client: Channel
    server: ServerChannel
    descriptors: tuple[int, ...]
    """As an `Attach` carries them: ring, up, down, server bell, client bell."""

    def __init__(
        self,
        slots: int = 256,
        up_bytes: int = 1 << 20,
        down_bytes: int = 1 << 20,
        *,
        id: int = 1,
        service: str = "test",
        badge: str = "test",
        rights: Iterable[str] = RIGHTS,
        arena_bytes: int = 0,
    ) -> None:
        sizes = {
            "ring": _native.ring_bytes(slots),
            "up": up_bytes,
            "down": down_bytes,
            "gate": _native.Gate.BYTES,
        }
        self._fds: list[int] = []
        self._old: list[ServerChannel] = []
        try:
            ring, up, down, gate = (self._keep(memory(name, size)) for name, size in sizes.items())
            bells = (self._keep(_bell()), self._keep(_bell()))
            self._ring, self._ring_bytes = ring, sizes["ring"]
            self.descriptors = (ring, up, down, *bells)
            self._control = _native.ChannelControl(ring, slots, bells)
            self._control.init(id, 1)
            self._gate = _native.Gate(gate)
            self._gate.open(0, 1)
            geometry = (ring, up, down, slots, up_bytes, down_bytes, bells, 1)
            kept = frozenset(rights)
            arena = (self._keep(memory("arena", arena_bytes)), arena_bytes) if arena_bytes else (-1, 0)
            self.client = Channel.make(
                _native.CLIENT, *geometry, id=id, service=service, rights=kept, arena=arena
            )
            self._serve: Callable[[], ServerChannel] = lambda: ServerChannel.make(
                _native.SERVER,
                *geometry,
                gate,
                0,
                id=id,
                service=service,
                badge=badge,
                rights=kept,
                line=id,
                arena=arena,
            )
            self.server = self._serve()
        except BaseException:
            self._close_fds()
            raise

    def serve_again(self) -> ServerChannel:
        """A new `server`, as another process would map it; the old one stays as it is and belongs to nobody."""
        self._old.append(self.server)
        self.server = self._serve()
        return self.server

    def revoke(self, reason: str = "revoked by the test") -> None:
        """Do what the kernel does when the client's capability is revoked."""
        self._gate.shut(0)
        self._control.set_state("revoked", reason)

    def leave(self) -> None:
        """Be a client whose process leaves: the engine's end learns that its peer is gone."""
        self._control.set_state("gone", "the test's client left")

    def scribble(self, seed: int) -> None:
        """Be a hostile client: fill the whole ring segment with random bytes, repeatable by `seed`."""
        os.pwrite(self._ring, random.Random(seed).randbytes(self._ring_bytes), 0)

    def close(self) -> None:
        """Unmap everything; idempotent."""
        self.client.close()
        for server in (*self._old, self.server):
            server.close()
        self._control.close()
        self._gate.close()
        self._close_fds()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def channel_pair(
    slots: int = 256, up_bytes: int = 1 << 20, down_bytes: int = 1 << 20, *, badge: str = "test"
) -> ChannelPair:
    """A connected pair of endpoints: `pair.client` and `pair.server`.

    `slots` is a power of two from 64; the pools' sizes are bytes, the client writes `up`. Raises ValueError.
    """
    return ChannelPair(slots, up_bytes, down_bytes, badge=badge)


class FaultInjector:
    """A client of `pair` that misbehaves, each time with the given probability; `seed` repeats a run exactly.

    `drop` loses a message, `duplicate` sends it twice, `corrupt` flips one of its bits, `delay` holds it back
    for up to `max_delay` seconds of `clock` (so that later ones overtake it), `stall` stops reading answers
    for a while, `close` dies. What was done is in `log`; the seed is printed, and pytest shows it when the
    test fails."""

    def __init__(
        self,
        pair: ChannelPair,
        clock: VirtualClock,
        seed: int | None = None,
        *,
        drop: float = 0.0,
        duplicate: float = 0.0,
        corrupt: float = 0.0,
        delay: float = 0.0,
        stall: float = 0.0,
        close: float = 0.0,
        max_delay: float = 0.1,
    ) -> None:
        self.seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        print(f"FaultInjector(seed={self.seed})")
        self.pair = pair
        self.log: list[str] = []
        self.closed = False
        self._clock = clock
        self._random = random.Random(self.seed)
        self._chances = {
            "drop": drop,
            "duplicate": duplicate,
            "corrupt": corrupt,
            "delay": delay,
            "close": close,
        }
        self._stall, self._max_delay = stall, max_delay
        self._stalled = 0
        self._order = itertools.count()
        self._held: list[tuple[int, int, bytes]] = []

    def send(self, message: bytes) -> str:
        """Send `message`, or do to it what chance says; returns what was done: send, drop, duplicate, corrupt, delay
        or close. After a close nothing is sent. Raises FullError when the engine left no room."""
        self.deliver()
        action = self._choose()
        self.log.append(action)
        if action == "close":
            self.closed = True
            self.pair.leave()
        elif action == "delay":
            due = self._clock() + round(self._random.uniform(0, self._max_delay) * NS)
            self._held.append((due, next(self._order), message))
        elif action == "corrupt":
            self._put(self._flip(message))
        elif action != "drop":
            for _ in range(2 if action == "duplicate" else 1):
                self._put(message)
        return action

    def deliver(self) -> int:
        """Send the delayed messages that are due by the clock; returns how many."""
        due = sorted(held for held in self._held if held[0] <= self._clock())
        for held in due:
            self._held.remove(held)
            self._put(held[2])
        return len(due)

    def rest(self) -> None:
        """Be a good client from now on: send what was held back, read again, and inject nothing more."""
        for held in sorted(self._held):
            self._put(held[2])
        self._held.clear()
        self._chances, self._stall, self._stalled = {}, 0.0, 0

    def receive(self) -> list[bytes]:
        """The answers that are there; none while the client stalls."""
        if self.closed:
            return []
        if self._stalled == 0 and self._random.random() < self._stall:
            self._stalled = self._random.randint(1, 8)
            self.log.append("stall")
        if self._stalled:
            self._stalled -= 1
            return []
        answers: list[bytes] = []
        while burst := self.pair.client.recv_many(256, timeout=0):
            answers += burst
        return answers

    def _choose(self) -> str:
        if self.closed:
            return "close"
        draw = self._random.random()
        for action, chance in self._chances.items():
            if draw < chance:
                return action
            draw -= chance
        return "send"

    def _flip(self, message: bytes) -> bytes:
        if not message:
            return b"\0"
        flipped = bytearray(message)
        flipped[self._random.randrange(len(flipped))] ^= 1 << self._random.randrange(8)
        return bytes(flipped)

    def _put(self, message: bytes) -> None:
        if not self.closed:
            self.pair.client.send(message, timeout=0)


def memory(name: str, size: int) -> int:
    """A nameless segment; the caller closes it."""
    fd = os.memfd_create(f"snap-test-{name}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def _bell() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
