"""Generations of an engine that counts, and clients that check each answer."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

from snap.dataplane import _native
from snap.ipc.protocol import (
    Attached,
    Serving,
    Took,
)
from snap.modules import Array, Schema, Table
from snap.modules.tables import EngineState
from snap.modules.testing import ChannelPair
from tests.host_rig import LIMIT, Ground, Kernel

# Answers each message with the number of times that it was seen, and the number of all messages; both kept in state.


# Answers each message with the number of times that it was seen, and the number of all messages; both kept in state.
COUNTING = """
    from snap.modules import Array, Engine, Schema, Table
    class E(Engine):
        schema = Schema(version=1, seen=Table(key="S16", row="u8", capacity=1 << 19), all=Array("u8", 1))
        def poll(self, budget):
            done = 0
            for channel in self.channels:
                messages = channel.take(budget)
                channel.answer([self.count(message) for message in messages])
                done += len(messages)
            return done
        def count(self, message):
            seen = int(self.state.seen.get(message, 0)) + 1
            self.state.seen[message] = seen
            self.state.all.edit(0, 1)[0] += 1
            return b"%s %d %d" % (message, seen, self.state.all[0])
    """

# The same with a larger row: another schema version.
COUNTING_2 = COUNTING.replace("version=1,", "version=2, oldest=1,").replace(
    'row="u8"', 'row={"n": "u8", "more": "u8"}'
)
COUNTING_2 = COUNTING_2.replace(
    "int(self.state.seen.get(message, 0)) + 1", "int(self.state.seen.get(message, (0, 0))[0]) + 1"
).replace("self.state.seen[message] = seen", "self.state.seen[message] = (seen, 1)")
COUNTING_2 = COUNTING_2.replace(
    "import Array, Engine, Schema, Table", "import Array, Engine, Schema, Table, migrate"
)
COUNTING_2 = COUNTING_2.replace(
    "        def poll(self, budget):",
    '        @migrate("seen", 1, 2)\n        def more(self, old, new):\n            new["n"] = old\n'
    "        def poll(self, budget):",
)


def took(kernel: Kernel) -> Took:
    found = kernel.hear(Took)
    kernel.hear(Serving)
    return found


def attach(kernel: Kernel, *pairs: ChannelPair) -> None:
    for pair in pairs:
        kernel.attach(pair)
        kernel.hear(Attached)


class Asking(threading.Thread):
    """A client that never rests, and checks every answer: each message seen once, all counted, in order."""

    def __init__(self, pair: ChannelPair, alone: bool = True) -> None:
        super().__init__()
        self._pair, self._alone = pair, alone
        self._stop_asking = threading.Event()
        self.asked = 0
        self.wrong: list[object] = []
        self.start()

    def run(self) -> None:
        for number in itertools.count():
            if self._stop_asking.is_set() or self.wrong:
                return
            message = b"%d.%d" % (self._pair.server.id, number)
            try:
                self._pair.client.send(message, timeout=LIMIT)
                answer = self._pair.client.recv(timeout=LIMIT)
            except Exception as error:
                self.wrong.append(error)
                return
            self.asked += 1
            said, seen, every = answer.split()
            if (said, seen) != (message, b"1") or (self._alone and int(every) != self.asked):
                self.wrong.append((message, answer))

    def finish(self) -> int:
        """Stop, and fail if anything was wrong; how many were asked."""
        self._stop_asking.set()
        self.join()
        assert self.wrong == []
        assert self._pair.client.try_recv() is None
        return self.asked


@contextlib.contextmanager
def asking(pair: ChannelPair) -> Iterator[Asking]:
    client = Asking(pair)
    try:
        yield client
    finally:
        client._stop_asking.set()
        client.join()
    client.finish()


def wait_for_more(client: Asking, more: int = 20) -> None:
    until, end = client.asked + more, time.monotonic() + LIMIT
    while client.asked < until and not client.wrong:
        assert time.monotonic() < end, "the client gets no more answers"
        time.sleep(0.001)


def total(ground: Ground, name: str = "state") -> int:
    schema = Schema(version=1, seen=Table(key="S16", row="u8", capacity=1 << 19), all=Array("u8", 1))
    state = _native.State(ground.fds[name], writable=False)
    assert state.verify() == []
    counted = int(EngineState(state, schema).all[0])
    state.close()
    return counted
