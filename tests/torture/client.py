"""One client: sends numbered operations at full rate, checks every answer, and notes both in its ledger.

    python -m tests.torture.client RUNTIME_DIR CLIENT SEED LEDGER MODE WINDOW PATIENCE

It ends when its standard input does, having got an answer to everything. Exit codes: 0 all was well; 3 an answer did not
come within PATIENCE seconds; 4 an answer was wrong; 5 the channel failed; 6 the engine lost its state, and said so;
7 the engine is gone for good, and that was said.
The reason is on standard error; SIGUSR1 prints the stacks.
"""

from __future__ import annotations

import asyncio
import faulthandler
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import setproctitle

from snap import ipc
from snap.ipc import Channel, PeerGoneError, SnapError, StateLostError

from .ledger import Ledger
from .ops import Model, Wrong

MODES: Final = ("block", "adaptive", "spin", "asyncio", "loan")
WAITS: Final = {"block": ipc.BLOCK, "adaptive": ipc.ADAPTIVE, "spin": ipc.SPIN, "loan": ipc.ADAPTIVE}
STUCK: Final = 3
WRONG: Final = 4
FAILED: Final = 5
LOST: Final = 6
GONE: Final = 7
POOL: Final = 4 << 20
"""Who sends a whole window before looking at answers needs room for it on both ways."""

SIZES: Final = {mode: {"slots": 256, "up_bytes": POOL, "down_bytes": POOL} for mode in MODES} | {
    "asyncio": {"slots": 64, "up_bytes": 128 << 10, "down_bytes": 128 << 10}
}
_AGAIN: Final = 5.0
"""Seconds more for an answer when time ran out: this process may have been stopped itself meanwhile."""


class Stuck(Exception):
    """No answer came, or no room, though long enough was waited for it."""


class Session:
    """Which operations are under way; no I/O but the ledger's."""

    def __init__(self, model: Model, ledger: Ledger, window: int, chance: random.Random) -> None:
        self._model, self._ledger, self._window, self._chance = model, ledger, window, chance
        self.sent = self.received = 0

    @property
    def waiting(self) -> int:
        return self.sent - self.received

    def burst(self) -> list[bytes]:
        """What to send now: some of what the window allows. It is noted as sent."""
        room = self._window - self.waiting
        count = self._chance.randint(1, room) if room > 0 else 0
        if count == 0:
            return []
        first = self.sent + 1
        messages = [self._model.message(number) for number in range(first, first + count)]
        self._ledger.sent(first, self.sent + count)
        self.sent += count
        return messages

    def take(self, answers: list[bytes]) -> None:
        """Raises Wrong."""
        checked = [self._model.check_answer(answer) for answer in answers]
        self._ledger.received(self.received + 1, checked)
        self.received += len(answers)


class Way(Protocol):
    """How to send and receive. Raise Stuck."""

    def send(self, messages: list[bytes]) -> None: ...
    def receive(self, most: int) -> list[bytes]: ...


class Bursts:
    """Bursts, waiting as `wait` says."""

    def __init__(self, channel: Channel, wait: int, patience: float) -> None:
        self._channel, self._wait, self._patience = channel, wait, patience

    def send(self, messages: list[bytes]) -> None:
        sent = self._channel.send_many(messages, timeout=self._patience, wait=self._wait)
        sent += self._channel.send_many(messages[sent:], timeout=_AGAIN) if sent < len(messages) else 0
        if sent < len(messages):
            raise Stuck(f"no room to send {len(messages) - sent} of {len(messages)}")

    def receive(self, most: int) -> list[bytes]:
        answers = self._channel.recv_many(most, timeout=self._patience, wait=self._wait)
        answers = answers or self._channel.recv_many(most, timeout=_AGAIN)
        if not answers:
            raise Stuck("no answer")
        return answers


class Loans:
    """Every payload is written and read in place; payloads are given back in any order."""

    def __init__(self, channel: Channel, wait: int, patience: float, chance: random.Random) -> None:
        self._channel, self._wait, self._patience, self._chance = channel, wait, patience, chance

    def send(self, messages: list[bytes]) -> None:
        try:
            for message in messages:
                loan = self._channel.loan(len(message), self._patience, self._wait)
                loan.view[:] = message
                self._channel.send_loan(loan, 0, self._patience, self._wait)
        except ipc.DeadlineError as error:
            raise Stuck(f"no room to send: {error}") from error

    def receive(self, most: int) -> list[bytes]:
        try:
            payloads = [self._receive(self._patience)]
        except ipc.DeadlineError:
            try:
                payloads = [self._receive(_AGAIN)]
            except ipc.DeadlineError as error:
                raise Stuck("no answer") from error
        while len(payloads) < most:
            try:
                payloads.append(self._receive(0))
            except ipc.DeadlineError:
                break
        answers = [bytes(payload) for payload in payloads]
        self._chance.shuffle(payloads)
        for payload in payloads:
            payload.release()
        return answers

    def _receive(self, timeout: float) -> ipc.Payload:
        return self._channel.receive(timeout, self._wait)


def drive(session: Session, way: Way, ending: Callable[[], bool]) -> None:
    while not ending():
        way.send(session.burst())
        session.take(way.receive(session.waiting))
    while session.waiting:
        session.take(way.receive(session.waiting))


async def adrive(session: Session, channel: Channel, patience: float, ending: Callable[[], bool]) -> None:
    """The same in an event loop; answers are received while sending waits for room."""
    room, work, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def send() -> None:
        while not ending():
            room.clear()
            messages = session.burst()
            work.set()
            sent = await channel.asend_many(messages, timeout=patience)
            if sent < len(messages) and await channel.asend_many(messages[sent:], timeout=_AGAIN) == 0:
                raise Stuck(f"no room to send {len(messages) - sent} of {len(messages)}")
            await room.wait()
        done.set()
        work.set()

    async def receive() -> None:
        while session.waiting or not done.is_set():
            if session.waiting:
                most = session.waiting
                answers = await channel.arecv_many(most, patience) or await channel.arecv_many(most, _AGAIN)
                if not answers:
                    raise Stuck("no answer")
                session.take(answers)
                room.set()
            else:
                work.clear()
                await work.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        group.create_task(receive())


def connect(directory: Path, name: str, patience: float) -> ipc.Client:
    """The kernel may be dead or stopped just now."""
    end = time.monotonic() + patience
    while True:
        try:
            return ipc.connect(directory, name, timeout=patience)
        except (ipc.UnreachableError, ipc.DeadlineError):
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def open_channel(directory: Path, number: str, mode: str, patience: float) -> tuple[ipc.Client, Channel]:
    """Until it is open nothing is promised: what the death of the kernel or module breaks is tried again."""
    end = time.monotonic() + patience
    while True:
        client = connect(directory, f"torture {number}", patience)
        try:
            return client, client.open("tally", **SIZES[mode], timeout=patience, wait=patience)
        except (ipc.UnreachableError, ipc.PeerGoneError, ipc.DeadlineError, ipc.NotRunningError):
            client.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def way(channel: Channel, mode: str, patience: float, chance: random.Random) -> Way:
    if mode == "loan":
        return Loans(channel, WAITS[mode], patience, chance)
    return Bursts(channel, WAITS[mode], patience)


def main(arguments: list[str]) -> int:
    directory, number, seed, path, mode, window, patience = arguments
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    setproctitle.setproctitle(f"torture: client {number}")
    ended = threading.Event()
    threading.Thread(target=_await_end, args=(ended,), daemon=True).start()
    ledger = Ledger(Path(path))
    session = Session(Model(int(seed), int(number)), ledger, int(window), random.Random(f"{seed} {number}"))
    client: ipc.Client | None = None
    try:
        client, channel = open_channel(Path(directory), number, mode, float(patience))
        if mode == "asyncio":
            asyncio.run(adrive(session, channel, float(patience), ended.is_set))
        else:
            drive(session, way(channel, mode, float(patience), random.Random(number)), ended.is_set)
        ledger.ended()
        channel.close()
    except (SnapError, Stuck, Wrong, BaseExceptionGroup) as error:
        return _say(session, ledger, error)
    finally:
        if client is not None:
            client.close()
    return 0


def _await_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def _say(session: Session, ledger: Ledger, error: BaseException) -> int:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = f"{type(error).__name__}: {error} (sent {session.sent}, received {session.received})"
    print(text, file=sys.stderr, flush=True)
    if isinstance(error, StateLostError):
        ledger.lost()
        return LOST
    if isinstance(error, PeerGoneError):
        return GONE
    if isinstance(error, Stuck):
        faulthandler.dump_traceback(all_threads=True)
        return STUCK
    return WRONG if isinstance(error, Wrong) else FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
