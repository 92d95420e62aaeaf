"""The ticker: every half second an entry for the ledger, with no application anywhere."""

from snap.dataplane.errors import ChannelError
from snap.ipc import Channel
from snap.modules import Engine, Module

PERIOD_NS = 500_000_000


class Clock(Engine):
    """Sends a tick when it is due, and prints what the ledger answers. Without a ledger, ticks fall out."""

    def __init__(self) -> None:
        self.ledger: Channel | None = None
        self.due = 0
        self.ticks = 0

    def use(self, ledger: Channel) -> None:
        self.ledger = ledger
        self.watch(ledger)

    def on_lost(self, channel: object, error: ChannelError) -> None:
        # The ledger died or was restarted: go on without it, and with the next one as soon as it is there.
        self.ledger = None
        if self.module is not None:
            self.module.connect_soon("ledger", self, self.use)

    def wake_after(self) -> float | None:
        return max(0, self.due - self.clock()) / 1e9

    def poll(self, budget: int) -> int:
        if self.clock() >= self.due:
            self.due = self.clock() + PERIOD_NS
            self.ticks += 1
            if self.ledger is not None:
                self.ledger.send(b"tick %d" % self.ticks, timeout=0)
        if self.ledger is None:
            return 0
        answers = self.ledger.recv_many(budget, timeout=0)
        for answer in answers:
            print(answer.decode(), flush=True)
        return len(answers)


class Main(Module):
    """Connects the engine to the ledger before it begins to poll."""

    def on_start(self) -> None:
        clock = self.running["clock"]
        assert isinstance(clock, Clock)
        clock.use(self.connect("ledger"))
