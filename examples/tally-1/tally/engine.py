"""The engine of tally, first version: a total by name, in a table that outlives the process."""

from snap.dataplane.errors import StateFullError
from snap.modules import Engine, Schema, Table


class Tally(Engine):
    """Answers `apples 3` with `apples COUNT TOTAL`: how often and how much was sent under that name."""

    schema = Schema(
        version=1,
        totals=Table(key="S24", row={"count": "u4", "total": "f8"}, capacity=1 << 18),
    )

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
        count, total = self.state.totals.get(name, (0, 0.0))
        try:
            self.state.totals[name] = (count + 1, total + amount)
        except StateFullError:
            return b"error: no room for another name"
        return b"%s %d %g" % (name, count + 1, total + amount)
