"""The relay engine: one class, about thirty lines, no threads and no locks."""

from snap.dataplane.errors import MessageSizeError
from snap.modules import Engine, ServerChannel

OTHER = {"relay-in": "relay-out", "relay-out": "relay-in"}


class Relay(Engine):
    """Passes what the latest client of one service sends to the latest client of the other.

    While one of the two is missing, or has no room, nothing is taken from the other: its messages wait in its own ring.
    """

    def __init__(self) -> None:
        self.ends: dict[str, ServerChannel] = {}
        self.waiting = False  # for room

    def on_attach(self, channel: ServerChannel) -> None:
        self.ends[channel.service] = channel

    def on_detach(self, channel: ServerChannel) -> None:
        if self.ends.get(channel.service) is channel:
            del self.ends[channel.service]

    def poll(self, budget: int) -> int:
        self.waiting = False
        if len(self.ends) < len(OTHER):
            return 0
        return max(self._pass(source, self.ends[OTHER[name]], budget) for name, source in self.ends.items())

    def wake_after(self) -> float | None:
        # Room at the slow end rings no bell here.
        return 0.0005 if self.waiting else None

    def _pass(self, source: ServerChannel, sink: ServerChannel, budget: int) -> int:
        messages = source.recv_many(budget, timeout=0)
        try:
            sent = sink.send_many(messages, timeout=0) if messages else 0
        except MessageSizeError as error:
            sink.drop(f"a message for it does not fit its pool: {error.message}")
            sent = 1  # the first: it is lost with whom it was for
        if sent < len(messages):
            source.unread(len(messages) - sent)
            self.waiting = True
        return sent
