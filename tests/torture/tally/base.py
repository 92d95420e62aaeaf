"""What all versions do: count and sum under each client's keys, in every kind of object that a state can have.

The formats are those of `tests/torture/ops.py`, which a module cannot import: it runs where the tests are not.
"""

from __future__ import annotations

import struct
import zlib

from snap.modules import Engine
from snap.modules.schema import Array, Schema, Slab, Table

OP = struct.Struct("<BxHIIII")
ANSWER = struct.Struct("<BxHIIIIIII")
DUMPED = struct.Struct("<BxHIIIIQQ")
ROW = struct.Struct("<II")
ADD, DUMP, KEYS, CELLS, MASK = 1, 2, 8, 256, 0xFFFFFFFF
CLIENTS = 2048


def schema(version: int = 1, row: dict[str, str] | None = None, **more: Table) -> Schema:
    """Rows of any version have at least `count` and `sum`."""
    return Schema(
        version=version,
        oldest=1,
        rows=Table({"client": "u4", "key": "u4"}, row or {"count": "u4", "sum": "u4"}, CLIENTS * KEYS),
        clients=Table("u4", {"ops": "u4", "chain": "u4", "item": "u4"}, CLIENTS),
        sessions=Slab({"client": "u4", "ops": "u4"}, CLIENTS),
        digest=Array({"ops": "u8", "sum": "u8"}, CELLS),
        **more,
    )


class Base(Engine):
    number = 0
    """Which version this is, told with every answer."""

    def poll(self, budget: int) -> int:
        done = 0
        for channel in self.channels:
            messages = channel.take(budget)
            channel.answer([self.handle(message) for message in messages])
            done += len(messages)
        return done

    def handle(self, message: bytes) -> bytes:
        kind, key, client, number, value, crc = OP.unpack_from(message)
        content = message[OP.size :]
        if kind == DUMP:
            return self.dump(client)
        if zlib.crc32(content) != crc:
            raise ValueError(f"operation {number} of client {client} came damaged")
        ops, chain = self.count(client, number, key, value)
        count, total = self.add(client, key, value)
        return ANSWER.pack(ADD, self.number, client, number, ops, count, total, chain, crc) + content

    def count(self, client: int, number: int, key: int, value: int) -> tuple[int, int]:
        """Operations of this client so far, and their chain."""
        state = self.state
        found = state.clients.get(client)
        ops, chain, item = (0, 0, state.sessions.allocate()) if found is None else map(int, found)
        chain = zlib.crc32(struct.pack("<III", number, key, value), chain)
        state.clients[client] = (ops + 1, chain, item)
        state.sessions[item] = (client, ops + 1)
        cell = state.digest[client % CELLS]
        state.digest[client % CELLS] = (int(cell["ops"]) + 1, int(cell["sum"]) + value)
        return ops + 1, chain

    def add(self, client: int, key: int, value: int) -> tuple[int, int]:
        """Count and sum of the key, with this operation."""
        found = self.state.rows.get((client, key))
        count, total = (0, 0) if found is None else self.read(found)
        count, total = count + 1, total + value & MASK
        self.state.rows[client, key] = self.write(count, total)
        return count, total

    def read(self, row: object) -> tuple[int, int]:
        return int(row["count"]), int(row["sum"])

    def write(self, count: int, total: int) -> tuple[int, ...]:
        return count, total

    def dump(self, client: int) -> bytes:
        state = self.state
        found = state.clients.get(client)
        ops, chain, item = (0, 0, -1) if found is None else map(int, found)
        in_item = 0 if found is None else int(state.sessions[item]["ops"])
        cell = state.digest[client % CELLS]
        head = DUMPED.pack(DUMP, self.number, client, ops, chain, in_item, int(cell["ops"]), int(cell["sum"]))
        rows = (state.rows.get((client, key)) for key in range(KEYS))
        return head + b"".join(ROW.pack(*((0, 0) if row is None else self.read(row))) for row in rows)
