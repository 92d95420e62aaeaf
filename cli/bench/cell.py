"""The module that the upgrade benchmark hands over: written out in two schema versions, with as much state as
asked."""

from __future__ import annotations

from pathlib import Path
from typing import Final

CHUNK: Final = 256 * 1024

_MANIFEST: Final = """\
[module]
name = "cell"
version = "{version}"
description = "A table and an array, as large as a benchmark wants"
state_version = {schema}
standby = {standby}

[provides.cell]
engine = "main"

[engines.main]
class = "engine:Cell"
wait = "spin"
state = "{state}"
"""

_ENGINE: Final = """\
import struct

import numpy as np

from snap.modules import Array, Engine, Schema, Table

ROW = {row}


class Cell(Engine):
    schema = Schema(
        version={schema},
        oldest=1,
        rows=Table(key="u8", row=ROW, capacity={capacity}),
        bulk=Array({{"byte": "u1"}}, {bulk}),
    )

    def poll(self, budget):
        done = 0
        for channel in self.channels:
            messages = channel.take(budget)
            channel.answer([self.serve(message) for message in messages])
            done += len(messages)
        return done

    def serve(self, message):
        order, start, count = struct.unpack_from("<BQQ", message)
        if order == 1:  # write one row, and say so
            self.state.rows[start] = (count,) * {columns}
        elif order == 2:  # fill rows
            keys = np.arange(start, start + count, dtype="u8")
            rows = np.zeros(count, dtype=list(ROW.items()))
            rows["count"] = keys
            self.state.rows.put_many(keys, rows)
        elif order == 3:  # fill bytes
            self.state.bulk.edit(start, count)["byte"] = start % 251
        return message
"""

_ROWS: Final = {1: '{"count": "u8"}', 2: '{"count": "u8", "again": "u8"}'}


def write(base: Path, version: str, entries: int, bulk: int, schema: int = 1, standby: bool = False) -> Path:
    """The module's directory. `entries` rows and `bulk` bytes at least; the table has room for a quarter more."""
    package = base / "cell"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    size = 2 * bulk + 128 * 2 * max(entries, 1024) + (16 << 20)
    (package / "module.toml").write_text(
        _MANIFEST.format(
            version=version, schema=schema, state=f"{size >> 20}MiB", standby=str(standby).lower()
        )
    )
    (package / "engine.py").write_text(
        _ENGINE.format(
            schema=schema,
            row=_ROWS[schema],
            columns=schema,
            capacity=max(1024, entries + entries // 4),
            bulk=max(bulk, 4096),
        )
    )
    return package
