"""Operations, answers, and the model: everything about operation `number` of a client follows from the run's seed.

So a ledger needs to say only which operations were sent and a checksum of what came back, and anybody can check it.
"""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass, field
from typing import Final, NamedTuple

KEYS: Final = 8
MAX_CONTENT: Final = 16 * 1024
OP: Final = struct.Struct("<BxHIIII")
"""Kind, key, client, number (from 1), value, CRC-32 of the content that follows."""

ANSWER: Final = struct.Struct("<BxHIIIIIII")
"""Kind, version of the code, client, number, operations of this client so far, count and sum of the key, chain over
all operations of the client, CRC-32 of the content that follows."""

ADD: Final = 1
DUMP: Final = 2
"""Answered by the state of the client: `DUMPED`, then `ROW` for each of its keys."""

DUMPED: Final = struct.Struct("<BxHIIIIQQ")
"""Kind, version, client, operations, chain, operations as its slab item has them, and the totals of its cell of the
digest: operations, sum."""

ROW: Final = struct.Struct("<II")
CELLS: Final = 256
_MASK: Final = 0xFFFFFFFF
_NOISE: Final = random.Random(0).randbytes(1 << 17)


class Op(NamedTuple):
    number: int
    key: int
    value: int
    content: bytes


class Wrong(Exception):
    """The system did not do what the model did."""


@dataclass
class State:
    """What the engine must hold of one client."""

    ops: int = 0
    chain: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * KEYS)
    sums: list[int] = field(default_factory=lambda: [0] * KEYS)
    total: int = 0


class Model:
    """One client's operations, one after the other, and what must come of them."""

    def __init__(self, seed: int, client: int) -> None:
        self.client = client
        self.state = State()
        self._seed = zlib.crc32(struct.pack("<QI", seed, client))

    def op(self, number: int) -> Op:
        """Sizes: most small, some up to what fits a descriptor, a few that need the pool."""
        chance = (number * 0x9E3779B1 ^ self._seed) * 0x85EBCA6B & 0xFFFFFFFFFFFFFFFF
        chance ^= chance >> 29
        kind, size = chance % 100, chance >> 8 & 0x3FFF
        size = size % 64 if kind < 85 else size % 900 if kind < 96 else size
        at = chance >> 24 & 0xFFFF
        return Op(number, chance >> 3 & KEYS - 1, chance >> 16 & _MASK, _NOISE[at : at + size])

    def message(self, number: int) -> bytes:
        op = self.op(number)
        crc = zlib.crc32(op.content)
        return OP.pack(ADD, op.key, self.client, op.number, op.value, crc) + op.content

    def step(self) -> Op:
        """The next operation takes effect."""
        state, op = self.state, self.op(self.state.ops + 1)
        state.ops += 1
        state.counts[op.key] += 1
        state.sums[op.key] = state.sums[op.key] + op.value & _MASK
        state.total += op.value
        state.chain = zlib.crc32(struct.pack("<III", op.number, op.key, op.value), state.chain)
        return op

    def answer(self) -> bytes:
        """The next operation takes effect, and this answers it; the version is 0."""
        op, state = self.step(), self.state
        head = ANSWER.pack(
            ADD,
            0,
            self.client,
            op.number,
            state.ops,
            state.counts[op.key],
            state.sums[op.key],
            state.chain,
            zlib.crc32(op.content),
        )
        return head + op.content

    def check_answer(self, message: bytes) -> bytes:
        """`message` must answer the next operation. Returns it without the version. Raises Wrong."""
        expected, given = self.answer(), message[:2] + b"\0\0" + message[4:]
        if given != expected:
            raise Wrong(f"client {self.client}: {difference(expected, given)}")
        return given

    def check_dump(self, message: bytes) -> None:
        """`message` must be the state after the operations so far. Raises Wrong."""
        _, _, client, ops, chain, item, _, _ = DUMPED.unpack_from(message)
        rows = list(ROW.iter_unpack(message[DUMPED.size :]))
        state = self.state
        expected = (self.client, state.ops, state.chain, list(zip(state.counts, state.sums, strict=True)))
        if (client, ops, chain, rows) != expected or item != state.ops:
            raise Wrong(
                f"state of client {self.client}: {(client, ops, chain, rows)}, item {item}; not {expected}"
            )


def dump_request(client: int) -> bytes:
    return OP.pack(DUMP, 0, client, 0, 0, 0)


def difference(expected: bytes, given: bytes) -> str:
    """In words, for people who look for the reason."""
    if len(given) < ANSWER.size:
        return f"an answer of {len(given)} bytes: {given[:64]!r}"
    names = ("kind", "version", "client", "number", "ops", "count", "sum", "chain", "crc")
    pairs = zip(names, ANSWER.unpack_from(given), ANSWER.unpack_from(expected), strict=True)
    wrong = [f"{name} {was}, not {should}" for name, was, should in pairs if was != should]
    if given[ANSWER.size :] != expected[ANSWER.size :]:
        wrong.append(
            f"content of {len(given) - ANSWER.size} bytes, not {len(expected) - ANSWER.size}, or others"
        )
    number = ANSWER.unpack_from(expected)[3]
    return f"answer to operation {number}: " + "; ".join(wrong)
