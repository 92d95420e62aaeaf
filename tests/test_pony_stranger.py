"""A peer that speaks the wire with malice, against a real engine: the engine lives, others go on, and nothing grows for ever."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snap.modules.pony import Connection, Pony, PonyError, Right
from tests.pony_hosts import Host, join
from tests.waiting import until

SOON = 20.0
HEADER = struct.Struct("<BBHIQIIQQQIIII")
PAYLOAD, ACK_NOW = 1, 2
KINDS = range(18)
EDGES = (0, 1, 2, 7, 63, 64, 255, 4095, 4096, 4097, 65_535, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def crc32c(data: bytes) -> int:
    crc = 0xFFFF_FFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFF_FFFF


def _entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F6_3B78 if value & 1 else 0)
    return value


_TABLE = [_entry(value) for value in range(256)]


class Stranger:
    """Attached to `host` as one of its peers, with a socket of its own."""

    def __init__(self, host: Host, seed: int) -> None:
        self.random = random.Random(seed)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.target = host.sockets[0].getsockname()
        self.flow = host.ask("reserve", host="evil")["flow"]
        address = "{}:{}".format(*self.socket.getsockname())
        host.ask(
            "attach",
            host="evil",
            remote=5,
            address=address,
            version=2,
            mtu=1472,
            algorithm="swift",
            keys=None,
        )
        self.seq = self.number = 1 << 36
        self.heard = 0

    def packet(self, payload: bytes, **changes: int) -> bytes:
        """A packet with a right checksum, whatever else is wrong with it."""
        fields = {
            "version": 2, "flags": PAYLOAD, "len": len(payload), "flow": self.flow, "number": self.number, "crc": 0,
            "epoch": 1, "seq": self.seq, "floor": self.seq, "ack": 0, "sent": 1, "echo": 0, "hold": 0, "queued": 0,
        }  # fmt: skip
        fields |= changes
        sack = b"\0" * 32
        raw = HEADER.pack(*fields.values()) + sack + payload
        return raw[:16] + struct.pack("<I", crc32c(raw)) + raw[20:]

    def send(self, payload: bytes, **changes: int) -> None:
        self.socket.sendto(self.packet(payload, **changes), self.target)
        self.seq += 1 if payload else 0
        self.number += 1

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Kinds of the frames that come, with what follows their heads. Packets are acknowledged."""
        while True:
            raw = self.socket.recv(65_536)
            header = HEADER.unpack_from(raw)
            self.heard = max(self.heard, header[7])
            self.send(b"", flags=0, ack=self.heard + header[1] % 2, echo=header[10])
            at = HEADER.size + 32
            while at < len(raw):
                kind, rest = raw[at], raw[at + 12 :]
                yield kind, rest
                at += 12 + self.size(kind, rest)

    @staticmethod
    def size(kind: int, rest: bytes) -> int:
        """Bytes of a frame after its head."""
        fixed, counted = {
            1: (6, 4), 2: (4, None), 3: (5, None), 7: (14, 12), 8: (2, 0), 9: (4, None), 10: (24, None),
            11: (16, None), 12: (18, 16), 13: (17, None), 14: (27, 25), 15: (27, 25),
        }.get(kind, (0, None))  # fmt: skip
        return fixed + (0 if counted is None else int.from_bytes(rest[counted : counted + 2], "little"))

    def await_frame(self, kind: int, wanted: Callable[[bytes], bool] = lambda rest: True) -> bytes:
        self.socket.settimeout(SOON)
        return next(rest for came, rest in self.frames() if came == kind and wanted(rest))

    def frame(self, kind: int, to: int, cookie: int = 0, rest: bytes = b"") -> bytes:
        return struct.pack("<BBHII", kind, cookie, self.random.choice((0, 1, 65_535)), to, 7) + rest

    def word(self) -> int:
        return self.random.choice(EDGES) if self.random.random() < 0.7 else self.random.getrandbits(64)

    def any_frame(self) -> bytes:
        words = b"".join(struct.pack("<Q", self.word()) for _ in range(self.random.randrange(6)))
        rest = words + self.random.randbytes(self.random.randrange(40))
        return self.frame(
            self.random.choice(KINDS), self.random.choice((0, 1, 2, 3, 9)), self.random.randrange(3), rest
        )

    def open(self, number: int, name: bytes = b".echo") -> bytes:
        """A frame that opens a connection, whose cookie is `number`."""
        head = struct.pack("<BBHII", 1, number & 0xFF, 0, 0, number)
        return head + struct.pack("<IH", number, len(name)) + name


@pytest.fixture
def seed() -> int:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    return seed


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with Host("a") as one, Host("b") as two:
        join(one, two)
        yield one, two


class Honest:
    """Two applications that go on, whatever a third host does."""

    def __init__(self, one: Host, two: Host) -> None:
        self.near, self.far = one.open(), two.open()
        self.far.bind("far")
        self.out: Connection = self.near.connect("b/far")
        self.back = self.far.accept(SOON)
        self.handle = self.far.register(self.far.place(64), Right.READ | Right.ATOMIC).handle
        self.count = 0

    def check(self) -> None:
        for _ in range(5):
            self.out.send(b"%d" % self.count)
            assert self.back.recv(SOON).data == b"%d" % self.count
            assert self.out.fetch_add(self.handle, 0, 1) == self.count
            self.count += 1


@pytest.fixture
def met(hosts: tuple[Host, Host], seed: int) -> Iterator[tuple[Honest, Stranger]]:
    """Two that talk, and one who knows the first one's host."""
    stranger = Stranger(hosts[0], seed)
    try:
        yield Honest(*hosts), stranger
    finally:
        stranger.socket.close()


def resident() -> int:
    """Bytes of this process, in which the engines are."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_what_is_no_packet_changes_nothing(hosts: tuple[Host, Host], met: tuple[Honest, Stranger]) -> None:
    honest, stranger = met
    good = stranger.packet(stranger.open(7))
    for turn in range(2000):
        kind = turn % 4
        if kind == 0:
            raw = stranger.random.randbytes(stranger.random.randrange(200))
        elif kind == 1:
            raw = good[: stranger.random.randrange(len(good))]
        elif kind == 2:
            changed = bytearray(good)
            changed[stranger.random.randrange(len(good))] ^= 1 << stranger.random.randrange(8)
            raw = bytes(changed)
        else:
            raw = stranger.packet(b"", flow=stranger.random.getrandbits(32))
        stranger.socket.sendto(raw, stranger.target)
        if turn % 200 == 0:
            honest.check()
    honest.check()
    flow = hosts[0].flow("evil")
    assert flow["bad"] > 0 and flow["received"] == 0 and flow["connections"] == 0


def test_headers_that_lie_harm_their_own_flow_only(
    hosts: tuple[Host, Host], met: tuple[Honest, Stranger]
) -> None:
    honest, stranger = met
    fields = ("seq", "floor", "ack", "epoch", "sent", "echo", "hold", "queued", "number", "flags", "version")
    bits = {"epoch": 32, "sent": 32, "echo": 32, "hold": 32, "queued": 32, "flags": 8, "version": 8}
    for turn in range(2000):
        changes = {
            field: stranger.word() % (1 << bits.get(field, 64))
            for field in stranger.random.sample(fields, stranger.random.randrange(1, 4))
        }
        stranger.send(stranger.open(turn + 1), **changes)
        if turn % 200 == 0:
            honest.check()
    honest.check()
    assert hosts[0].worker.alive


def test_frames_of_every_kind_with_anything_in_them(
    hosts: tuple[Host, Host], met: tuple[Honest, Stranger]
) -> None:
    honest, stranger = met
    for number in range(1, 4):
        stranger.send(stranger.open(number))
    for turn in range(4000):
        stranger.send(b"".join(stranger.any_frame() for _ in range(stranger.random.randrange(1, 6))))
        if turn % 400 == 0:
            honest.check()
    honest.check()
    assert hosts[0].worker.alive and hosts[0].flow("evil")["bad"] > 0


def test_who_asks_and_never_listens_is_bounded(
    hosts: tuple[Host, Host], met: tuple[Honest, Stranger]
) -> None:
    """Nothing that the engine says is acknowledged: opens, messages of ever new streams, requests, offers."""
    honest, stranger = met
    stranger.send(stranger.open(1))
    honest.check()
    before = resident()
    for turn in range(6000):
        reads = struct.pack("<QIIQBH", turn, 1, 0, 0, 9, 20) + struct.pack("<QQI", 0, 0, 64)
        message = struct.pack("<QHHH", turn % 3 + 1, 4096, turn % 4, 1) + b"x"
        offer = struct.pack("<QQQ", turn, 0, 2**64 - 1)
        head = struct.pack("<BBHII", 7, 1, turn & 0xFFFF, 3, 1)
        stranger.send(
            struct.pack("<BBHII", 14, 1, 0, 3, 1)
            + reads
            + head
            + message
            + struct.pack("<BBHII", 10, 1, 0, 3, 1)
            + offer
            + stranger.open(turn + 10)
        )
        if turn % 500 == 0:
            honest.check()
    honest.check()
    assert hosts[0].worker.alive
    assert resident() - before < 256 << 20


def test_a_sealed_flow_takes_nothing_that_is_not_sealed(hosts: tuple[Host, Host], seed: int) -> None:
    join(*hosts, sealed=True)
    honest = Honest(*hosts)
    random_bytes = random.Random(seed)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        for turn in range(1000):
            flags = 4 if turn % 2 else 1
            raw = HEADER.pack(2, flags, 16, 0x20001, turn, 0, 1, turn, turn, 0, 1, 0, 0, 0)
            raw += random_bytes.randbytes(64)
            other.sendto(raw, hosts[0].sockets[0].getsockname())
    honest.check()
    assert hosts[0].flow("b")["bad"] > 0


def test_credits_that_are_not_kept_end_the_connection(
    hosts: tuple[Host, Host], met: tuple[Honest, Stranger]
) -> None:
    honest, stranger = met
    victim = hosts[0].open()
    victim.bind("victim")
    stranger.send(stranger.open(1, b"victim"))
    connection = victim.accept(SOON)
    ends = struct.pack("<BBHII", 7, 1, 0, connection.number, 1)
    stranger.send(ends + struct.pack("<QHHH", 2**40, 1, 0, 1) + b"x")
    with pytest.raises(PonyError):
        connection.recv(SOON)
    honest.check()


def met_by_victim(host: Host, stranger: Stranger) -> tuple[Pony, Connection]:
    victim = host.open()
    victim.bind("victim")
    stranger.send(stranger.open(7, b"victim"))
    return victim, victim.accept(SOON)


def test_what_is_left_of_a_large_message_does_not_hold_up_the_next(
    hosts: tuple[Host, Host], met: tuple[Honest, Stranger]
) -> None:
    """It is done before all of it was sent: the receiver had the rest from an earlier time."""
    _, stranger = met
    victim, connection = met_by_victim(hosts[0], stranger)
    for seq in range(3):
        place = victim.place(1_000_000)
        place.array()[:] = seq
        sent = connection.begin_send_from(place)
        stranger.await_frame(10, lambda rest, seq=seq: struct.unpack_from("<Q", rest) == (seq,))
        stranger.send(stranger.frame(11, connection.number, 7, struct.pack("<QQ", seq, 0)))
        stranger.await_frame(12, lambda rest, seq=seq: struct.unpack_from("<QQ", rest) == (seq, 0))
        stranger.send(stranger.frame(13, connection.number, 7, struct.pack("<QBQ", seq, 0, place.size)))
        assert sent.result(SOON) == place.size


def test_credits_that_overtake_each_other_do_not_stop_the_sender(
    hosts: tuple[Host, Host], met: tuple[Honest, Stranger]
) -> None:
    _, stranger = met
    _, connection = met_by_victim(hosts[0], stranger)
    for number in range(64):
        connection.send(b"%d" % number)
    before = hosts[0].flow("evil")["received"]
    for taken in (64, 0):
        stranger.send(stranger.frame(9, connection.number, 7, struct.pack("<I", taken)))
    until(lambda: hosts[0].flow("evil")["received"] == before + 2, "both are there")
    connection.send(b"more")
