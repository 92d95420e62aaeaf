"""The engine of tally, second version: keeps the mean as well, and has made it of the totals that were there."""

from typing import Any

from snap.dataplane.errors import StateFullError
from snap.modules import Engine, Schema, Table, migrate


class Tally(Engine):
    """Answers `apples 3` with `apples COUNT TOTAL MEAN`."""

    schema = Schema(
        version=2,
        oldest=1,  # and version 1 may take this state back
        totals=Table(key="S24", row={"count": "u8", "total": "f8", "mean": "f8"}, capacity=1 << 18),
    )

    @migrate("totals", 1, 2)
    def means(self, old: Any, new: Any) -> None:
        new["mean"] = old["total"] / old["count"]  # arrays; count and total were copied

    def poll(self, budget: int) -> int:
        done = 0
        for channel in self.channels:
            messages = channel.take(budget)
            channel.answer([self.add(message) for message in messages])
            done += len(messages)
        return done

    def add(self, message: bytes) -> bytes:
        try:
            name, value = message.split(b" ")
            amount = float(value)
        except ValueError:
            return b"error: send NAME NUMBER"
        if len(name) > 24:
            return b"error: a name has at most 24 bytes"
        count, total, _ = self.state.totals.get(name, (0, 0.0, 0.0))
        mean = (total + amount) / (count + 1)
        try:
            self.state.totals[name] = (count + 1, total + amount, mean)
        except StateFullError:
            return b"error: no room for another name"
        return b"%s %d %g %g" % (name, count + 1, total + amount, mean)
