"""Test a module without a daemon: channels in memory, a clock that you turn, faults that you can repeat.

The rings are the real ones, on nameless memory; nothing here starts a thread or waits. A typical test:

    def test_echo_answers_every_client():
        with EngineHarness(PyEcho()) as harness:
            client = harness.attach().client
            client.send(b"hello")
            harness.run()
            upgrade(harness, PyEcho)
            assert client.try_recv() == b"hello"
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Self

from snap.dataplane._native import State
from snap.dataplane.errors import ChannelError
from snap.ipc import manifest as manifests

from .engine import Engine
from .loading import load_class, load_package
from .migration import Migration, converter
from .preparing import verify
from .rigs import NS, RIGHTS, ChannelPair, FaultInjector, VirtualClock, channel_pair, memory
from .schema import Schema, Slab, Table
from .turns import Turns

__all__ = [
    "RIGHTS",
    "ChannelPair",
    "EngineHarness",
    "FaultInjector",
    "VirtualClock",
    "channel_pair",
    "crash",
    "load_engine",
    "upgrade",
]

_GIVE_UP: Final = 64
"""Polls taken back, one after the other, before the harness lets a client that leaves no room be."""


class EngineHarness:
    """Runs one engine by hand, without threads: the same turns as in a worker, one after the other, on a state
    segment of its own.

    Leaving `with` reads what clients left unread, asserts that the engine gave back every payload and sent or
    released every loan, that its state passes every check, and takes the clients away.
    """

    def __init__(
        self,
        engine: Engine,
        budget: int = 64,
        clock: VirtualClock | None = None,
        *,
        state_bytes: int | None = None,
    ) -> None:
        self.clock = clock or VirtualClock()
        self.pairs: list[ChannelPair] = []
        self.generation = 0
        self._budget, self._state_bytes = budget, state_bytes
        self._numbers = itertools.count(1)
        self._serving: list[ChannelPair] = []
        self._faults: dict[int, str] = {}
        self._segment = self._blank(engine)
        self._take(engine, State(self._segment))

    # -- clients and turns ----------------------------------------------------------------------------------

    def attach(
        self,
        badge: str = "test",
        rights: Iterable[str] = RIGHTS,
        service: str = "test",
        *,
        slots: int = 256,
        up_bytes: int = 1 << 20,
        down_bytes: int = 1 << 20,
    ) -> ChannelPair:
        """A new client; the engine gets its channel with the next turn."""
        number = next(self._numbers)
        pair = ChannelPair(
            slots, up_bytes, down_bytes, id=number, service=service, badge=badge, rights=rights
        )
        self.pairs.append(pair)
        self._serving.append(pair)
        self._turns.attach(pair.server)
        return pair

    def detach(self, pair: ChannelPair) -> None:
        """Take a client away, as the kernel does when it closes its channel."""
        self._serving.remove(pair)
        self._turns.detach(pair.server.id)

    @property
    def dropped(self) -> dict[int, str]:
        """Channels (by `pair.server.id`) that were dropped because they failed, with the reason."""
        return dict(self._faults)

    def turn(self) -> int:
        """One turn; returns the work done. Raises whatever the engine raises, but a failed channel's own error."""
        done = self._turns.turn()
        while self._turns.faults:
            number, reason = self._turns.faults.popleft()
            self._faults[number] = reason
            self._serving = [pair for pair in self._serving if pair.server.id != number]
        return done

    def run(self, limit: int = 10_000) -> int:
        """Turns until one does nothing; returns the work done. Raises AssertionError after `limit` turns."""
        total = in_vain = 0
        resumed = False
        for _ in range(limit):
            before = self._turns.taken_back
            done = self.turn()
            if self._turns.taken_back > before:
                in_vain, resumed = in_vain + 1, False
                if in_vain > _GIVE_UP:
                    return total
            elif done > 0:
                total += done
                in_vain, resumed = 0, False
            elif self._turns.resting and not resumed:
                self._turns.resume(at_once=True)
                resumed = True
            else:
                return total
        raise AssertionError(f"{type(self.engine).__name__} still finds work after {limit} turns")

    def advance(self, seconds: float) -> int:
        """Let `seconds` pass, stopping at each of the engine's timers to run it; returns the work done."""
        end = self.clock() + round(seconds * NS)
        total = self.run()
        while (left := end - self.clock()) > 0:
            timer = self.engine.wake_after()
            step = left if timer is None else min(left, max(1, round(timer * NS)))
            self.clock.advance(step / NS)
            total += self.run()
        return total

    # -- generations ----------------------------------------------------------------------------------------

    def contents(self) -> dict[str, Any]:
        """All that the state holds, object by object, to be compared."""
        state = self.engine.state
        found: dict[str, Any] = {}
        for name, about in (self.engine.schema or Schema()).objects.items():
            one = getattr(state, name)
            if isinstance(about, Table):
                found[name] = {key: row.tobytes() for key, row in one.items()}
            elif isinstance(about, Slab):
                found[name] = {number: one[number].tobytes() for number in one}
            else:
                found[name] = one[:].tobytes()
        return found

    def upgrade(self, engine: Engine | type[Engine]) -> int:
        """Hand state and clients over to another engine, migrating when its schema is of another version: what
        `snapctl upgrade` does. Returns the words of state that were rolled back: none. Raises SchemaError,
        StateDamagedError and what the engine raises; the old engine has gone on then, as it would."""
        successor = engine() if isinstance(engine, type) else engine
        successor.module, successor.name = self.engine.module, self.engine.name
        segment, migration = self._segment, None
        try:
            if self._schema(successor).version == self._state.header["version"]:
                state = State(segment)
                self._schema(successor).check_same(state.header)
                verify(state)
            else:
                convert = converter(successor, self._schema(successor), self._state.header)
                segment = self._blank(successor)
                state, source = State(segment), State(self._segment)
                state.set_phase("building")
                verify(source)
                migration = Migration(source, state, convert)
                migration.build(self._turns.acknowledge)
                migration.converge()
        except BaseException:
            if segment != self._segment:
                os.close(segment)
            raise
        self._turns.hand_over()
        undone = self._take(successor, state, migration)
        if segment != self._segment:
            os.close(self._segment)
            self._segment = segment
        return undone

    def crash(self, engine: Engine | type[Engine] | None = None) -> int:
        """Let the engine die at the end of its next poll, before anything of it is permanent, and have another
        one (of the same class, unless given) take over. Returns the words of state that were rolled back."""
        with contextlib.suppress(ChannelError):
            self._turns.poll_uncommitted()
        return self.succeed(type(self.engine) if engine is None else engine)

    def succeed(self, engine: Engine | type[Engine]) -> int:
        """Have another engine take over from one that died (raised in its poll, say)."""
        return self._take(engine() if isinstance(engine, type) else engine, State(self._segment))

    def _take(self, engine: Engine, state: State, migration: Migration | None = None) -> int:
        before = getattr(self, "_turns", None)
        engine.clock = self.clock
        turns = Turns(engine, state, self._budget)
        for pair in self._serving if before is not None else ():
            pair.serve_again()
            turns.attach(pair.server)
        self.generation += 1
        self.engine, self._turns, self._state = engine, turns, state
        return turns.take(self.generation, migration)

    def _blank(self, engine: Engine) -> int:
        schema = self._schema(engine)
        size = self._state_bytes or State.MIN_BYTES + sum(
            2 * count * (key + item + 32) for _, _, key, item, count, _ in schema.specs()
        )
        segment = memory("state", size)
        try:
            State.format(segment, "engine", "test", schema.version, schema.oldest, schema.specs())
        except BaseException:
            os.close(segment)
            raise
        return segment

    @staticmethod
    def _schema(engine: Engine) -> Schema:
        return engine.schema or Schema()

    # -- the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take all clients away. Raises AssertionError when the engine, at rest, kept memory of theirs or a loan, or
        left its state damaged."""
        try:
            self.run()
            for pair in self.pairs:
                self._assert_nothing_kept(pair)
            wrong = self._state.verify()
            assert not wrong, f"the state of {type(self.engine).__name__}: {wrong[0]}"
        finally:
            self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            # The test has failed already: its own error is the one to see.
            self._discard()

    def _discard(self) -> None:
        for pair in self.pairs:
            pair.close()
        if self._segment >= 0:
            os.close(self._segment)
            self._segment = -1

    def _assert_nothing_kept(self, pair: ChannelPair) -> None:
        if pair not in self._serving or pair.server.verdict():
            return
        while pair.client.recv_many(256, timeout=0):
            self.run()  # what was sent is not kept: read it, and what had no room behind it
        payloads, loans = pair.client.stats["loans_out"], pair.server.stats["loans_out"]
        kept = f"keeps {payloads} payloads and {loans} loans of channel {pair.server.id}"
        assert payloads == loans == 0, f"{type(self.engine).__name__}, at rest, {kept}"


def upgrade(harness: EngineHarness, engine: Engine | type[Engine]) -> int:
    """See `EngineHarness.upgrade`."""
    return harness.upgrade(engine)


def crash(harness: EngineHarness, engine: Engine | type[Engine] | None = None) -> int:
    """See `EngineHarness.crash`."""
    return harness.crash(engine)


def load_engine(package: Path, name: str) -> Engine:
    """Build engine `name` of the module in directory `package`, as its process would. Raises ManifestError."""
    manifest = manifests.load(package)
    return load_class(load_package(package, manifest.name), manifest.engines[name].class_, Engine)()
