"""Ledger, Ownership and Worker as Python calls them: polls that count whole or not at all, and who may poll."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sysv_ipc

from snap.dataplane import _native
from snap.dataplane.errors import (
    BusyError,
    DeadlineError,
    FaultedError,
    ResourceError,
    StateDamagedError,
    UsageError,
)
from tests.waiting import LIMIT, until

Pairs = Callable[..., Any]
LOANS = 8192 + 64 * 144
"""Where the records of the server's payloads begin, in a ring segment of 64 slots."""

COUNTS = ("array", "counts", 0, 8, 16, "")


@pytest.fixture
def segment() -> Iterator[int]:
    """A state segment with one array of counters."""
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    os.ftruncate(fd, _native.State.MIN_BYTES)
    _native.State.format(fd, "test", "test", 1, 1, [COUNTS])
    yield fd
    os.close(fd)


@pytest.fixture
def semaphore() -> Iterator[sysv_ipc.Semaphore]:
    made = sysv_ipc.Semaphore(None, sysv_ipc.IPC_CREX, initial_value=1)
    yield made
    with contextlib.suppress(sysv_ipc.ExistentialError):  # the test may have removed it
        made.remove()


class Served:
    """An engine's process in small: a state, a ledger, and the server's end of one pair."""

    def __init__(self, segment: int, pair: Any, line: int = 3, channel: int = 1) -> None:
        self.state = _native.State(segment)
        self.counts = self.state.array("counts")
        self.ledger = _native.Ledger(self.state)
        self.end = pair.server
        self.ledger.join(line, channel, self.end)

    def count(self) -> int:
        return int.from_bytes(self.counts.read(0, 1), "little")

    def serve(self, limit: int = 64) -> None:
        for message in self.end.recv_many(limit, timeout=0):
            self.counts.write(0, (self.count() + 1).to_bytes(8, "little"))
            self.end.send(message.upper(), timeout=0)


def test_nothing_of_a_poll_is_seen_before_its_commit(channel_pair: Pairs, segment: int) -> None:
    pair = channel_pair()
    served = Served(segment, pair)
    assert served.ledger.take(1) == 0
    pair.client.send(b"small")
    pair.client.send(b"l" * 5000)
    served.serve()
    assert served.count() == 2
    assert pair.client.try_recv() is None
    assert pair.client.stats["loans_out"] == 1
    assert served.ledger.commit()
    assert not served.ledger.commit()
    assert pair.client.recv_many(4, timeout=LIMIT) == [b"SMALL", b"L" * 5000]
    assert pair.client.stats["loans_out"] == 0
    assert served.end.stats["loans_out"] == 0


def test_a_poll_taken_back_leaves_state_messages_and_memory_as_they_were(
    channel_pair: Pairs, segment: int
) -> None:
    pair = channel_pair()
    served = Served(segment, pair)
    served.ledger.take(1)
    for number in range(100):
        pair.client.send(b"s" * 2000)
        served.serve()
        before = served.end.stats
        assert before["loans_out"] >= 1
        assert served.ledger.abort() > 0
        assert served.count() == 0
        assert served.end.stats["loans_out"] == 0
        assert served.end.stats["received"] == number
        served.serve()
        served.ledger.commit()
        assert pair.client.recv(timeout=LIMIT) == b"S" * 2000
        served.counts.write(0, bytes(8))
        served.ledger.commit()
        served = again(served, segment, pair)
    assert pair.client.stats["loans_out"] == 0


def again(served: Served, segment: int, pair: Any) -> Served:
    """The next generation, in this process, on the same end."""
    served.ledger.hand_over()
    served.ledger.leave(3)
    successor = Served(segment, pair)
    successor.ledger.take(2)
    return successor


def test_messages_put_back_come_again_and_only_those_of_the_poll_can_be(
    channel_pair: Pairs, segment: int
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pair = channel_pair()
    served = Served(segment, pair)
    served.ledger.take(1)
    sent: list[bytes] = []
    received: list[bytes] = []
    for number in range(300):
        body = b"%d " % number * rng.choice((1, 200, 400))
        sent += [body] * pair.client.send_many([body], timeout=0)
        if rng.random() < 0.5:
            burst = served.end.recv_many(rng.randrange(1, 6), timeout=0)
            with pytest.raises(ValueError, match="so many"):
                served.end.unread(len(burst) + 1)
            back = rng.randrange(len(burst) + 1)
            served.end.unread(back)
            received += burst[: len(burst) - back]
            served.ledger.commit()
            with pytest.raises(ValueError, match="so many"):
                served.end.unread(1)
    while burst := served.end.recv_many(64, timeout=0):
        received += burst
        served.ledger.commit()
    assert received == sent
    assert pair.client.stats["loans_out"] == 0
    with pytest.raises(ValueError, match="so many"):
        pair.client.unread(1)


def test_payloads_and_loans_of_before_a_hand_over_do_nothing_after_it(
    channel_pair: Pairs, segment: int
) -> None:
    pair = channel_pair()
    served = Served(segment, pair)
    served.ledger.take(1)
    pair.client.send(b"p" * 5000)
    payload = served.end.receive(timeout=0)
    loan = served.end.loan(3000)
    served.ledger.commit()
    assert pair.client.stats["loans_out"] == 1
    last = served.ledger.hand_over()
    assert 0 < last <= time.monotonic_ns()
    assert served.state.header["last_poll_ns"] == last
    for call in (lambda: served.end.send(b"x"), lambda: served.end.recv(timeout=0), served.end.try_recv):
        with pytest.raises(BusyError, match="another process"):
            call()
    assert served.end.state == "open"
    served.ledger.take(2)
    served.ledger.commit()
    # Whoever takes over gives back what was held before: nobody reads it any more.
    assert pair.client.stats["loans_out"] == 0
    payload.release()
    loan.release()
    served.ledger.commit()
    pair.client.send(b"q" * 5000)
    served.serve()
    served.ledger.commit()
    assert pair.client.recv(timeout=LIMIT) == b"Q" * 5000
    assert pair.client.stats["loans_out"] == served.end.stats["loans_out"] == 0


def test_a_tampered_channel_faults_at_the_take_and_the_others_are_served(
    channel_pair: Pairs, segment: int
) -> None:
    bad, good = channel_pair(), channel_pair()
    os.pwrite(bad.ring.fd, struct.pack("<QQQ", 1 << 32 | 1, 1, 1), LOANS)
    served = Served(segment, good)
    served.counts.write(0, bytes(8))
    served.state.commit()
    ledger = served.ledger
    ledger.join(4, 2, bad.server)
    good.client.send(b"served")
    # A record of a payload that was never sent counts for nothing; a head that is ahead of what was sent does.
    os.pwrite(bad.ring.fd, struct.pack("<Q", 9), 4096 + 512 + 64)
    ledger.take(1)
    with pytest.raises(FaultedError, match="index"):
        bad.server.check()
    served.serve()
    ledger.commit()
    assert good.client.recv(timeout=LIMIT) == b"SERVED"
    with pytest.raises(FaultedError):
        bad.client.recv(timeout=LIMIT)


def test_a_ledger_refuses_what_it_cannot_serve_with(channel_pair: Pairs, segment: int) -> None:
    pair = channel_pair()
    state = _native.State(segment)
    ledger = _native.Ledger(state)
    with pytest.raises(UsageError, match="server's end"):
        ledger.join(0, 1, pair.client)
    with pytest.raises(UsageError, match="lines"):
        ledger.join(1024, 1, pair.server)
    with pytest.raises(UsageError, match="own source"):
        ledger.take(1, state)
    with pytest.raises(UsageError, match="read-only"):
        _native.Ledger(_native.State(segment, False))
    state.set_phase("retired")
    with pytest.raises(StateDamagedError, match="retired"):
        ledger.take(1)
    assert state.header["adoptions"] == 0


def test_adoptions_are_counted_until_a_poll_has_passed(segment: int) -> None:
    for generation in (1, 2, 3):
        _native.Ledger(_native.State(segment)).take(generation)
    state = _native.State(segment)
    assert (state.header["adoptions"], state.header["generation"]) == (3, 3)
    assert state.header["owner"] == os.getpid()
    ledger = _native.Ledger(state)
    ledger.take(4)
    watcher = _native.State(segment)
    watcher.track(True)
    assert not watcher.tracked()
    ledger.polled()
    assert state.header["adoptions"] == 0
    assert watcher.tracked()


def test_the_longest_wait_is_that_of_a_client_that_really_waited(channel_pair: Pairs) -> None:
    pair = channel_pair()
    pair.server.send(b"there already")
    pair.client.recv(timeout=LIMIT)
    assert pair.control.longest_wait() == 0
    with pytest.raises(DeadlineError):
        pair.client.recv(timeout=0.03)
    assert pair.control.longest_wait() >= 25_000_000
    pair.control.clear_longest_wait()
    assert pair.control.longest_wait() == 0
    with pytest.raises(DeadlineError):
        pair.server.recv(timeout=0.01)
    assert pair.control.longest_wait() == 0
    assert pair.client.arm_recv()
    time.sleep(0.02)
    pair.server.send(b"late")
    assert pair.client.try_recv() == b"late"
    assert pair.control.longest_wait() >= 20_000_000


# -- ownership --------------------------------------------------------------------------------------------------


def test_ownership_is_one_processes_at_a_time_and_comes_back_when_it_dies(
    semaphore: sysv_ipc.Semaphore,
) -> None:
    ours = _native.Ownership(semaphore.id)
    code = (
        "import sys; from snap.dataplane import _native\n"
        f"o = _native.Ownership({semaphore.id}); assert o.acquire(5); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert not ours.acquire(0)
        assert not ours.acquire(0.05)
        holder.send_signal(signal.SIGKILL)
        assert ours.acquire(LIMIT)
    assert ours.held
    assert ours.acquire(0)
    assert semaphore.value == 0
    ours.release()
    ours.release()
    assert not ours.held
    assert semaphore.value == 1


def test_a_wait_for_ownership_can_be_cancelled_and_ends_with_the_semaphore(
    semaphore: sysv_ipc.Semaphore,
) -> None:
    holder, waiter = _native.Ownership(semaphore.id), _native.Ownership(semaphore.id)
    assert holder.acquire()
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(waiter.acquire()))
    thread.start()
    waiter.cancel()
    thread.join(LIMIT)
    assert outcome == [False]

    def wait() -> None:
        try:
            waiter.acquire()
        except ResourceError as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.02)
    semaphore.remove()
    thread.join(LIMIT)
    assert "removed" in str(outcome[1])
    with pytest.raises(ResourceError, match="removed"):
        holder.release()
    assert not holder.held


# -- workers ----------------------------------------------------------------------------------------------------


def echo_state() -> int:
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    os.ftruncate(fd, _native.State.MIN_BYTES)
    name, version, oldest, objects = _native.engine_schema("echo")
    _native.State.format(fd, "echo", name, version, oldest, objects)
    return fd


def news(worker: _native.Worker, kind: str) -> tuple[str, int, Any]:
    def look() -> tuple[str, int, Any] | None:
        select.select([worker.fileno()], [], [], LIMIT)
        return next((item for item in worker.take_news() if item[0] == kind), None)

    found = until(look, kind)
    assert isinstance(found, tuple)
    return found


def server_end(pair: Any) -> _native.Endpoint:
    """Another end of the same channel, as the next process would have it."""
    bell = pair.client.fileno()
    pools = (pair.up.fd, pair.down.fd, 64, 1 << 20, 1 << 20)
    return _native.Endpoint(_native.SERVER, pair.ring.fd, *pools, (pair.server.fileno(), bell), 1)


def test_workers_hand_over_to_each_other_and_their_client_sees_nothing(
    channel_pair: Pairs, semaphore: sysv_ipc.Semaphore
) -> None:
    pair = channel_pair()
    fd = echo_state()
    workers = [
        _native.Worker(f"echo{n}", "echo", _native.State(fd), semaphore.id, n, wait=_native.BLOCK)
        for n in (1, 2)
    ]
    try:
        took = until(
            lambda: [w for w in workers if any(k == "took" for k, _, _ in w.take_news())], "one owns it"
        )
        now, other = took[0], next(w for w in workers if w is not took[0])
        now.attach(1, pair.server, 0)
        other.attach(1, server_end(pair), 0)
        for turn in range(20):
            for size in (10, 5000):
                pair.client.send(b"%d" % turn * size)
            # Both are in this process: the semaphore cannot tell who of them released it last.
            until(lambda: semaphore.waiting_for_nonzero, "the other one waits")
            now.hand_over()
            _, last, _ = news(now, "yielded")
            _, first, more = news(other, "took")
            assert more == {"last_poll_ns": last, "undone": 0}
            assert last <= first
            for size in (10, 5000):
                assert pair.client.recv(timeout=LIMIT) == b"%d" % turn * size
            now, other = other, now
        until(lambda: semaphore.waiting_for_nonzero, "the other one waits")
        now.hand_over(retire=True)
        news(now, "ended")
        news(other, "took")
        pair.client.send(b"the last one")
        assert pair.client.recv(timeout=LIMIT) == b"the last one"
        assert pair.client.stats["loans_out"] == 0
    finally:
        for worker in workers:
            worker.stop()
        os.close(fd)
    assert semaphore.value == 1
    assert pair.client.state == "open"


def test_a_worker_refuses_a_state_that_is_not_to_be_served_with_and_lets_go(
    semaphore: sysv_ipc.Semaphore,
) -> None:
    fd = echo_state()
    state = _native.State(fd)
    state.set_phase("poisoned")
    worker = _native.Worker("echo", "echo", state, semaphore.id, 1)
    code, message = news(worker, "refused")[2]
    assert (code, "poisoned" in message) == ("state_damaged", True)
    until(lambda: not worker.alive, "it ends")
    assert semaphore.value == 1
    worker.stop()
    os.close(fd)


def test_a_workers_migration_is_finished_before_it_takes_over_and_its_failure_refuses(
    semaphore: sysv_ipc.Semaphore,
) -> None:
    old, new = echo_state(), echo_state()
    source, target = _native.State(old), _native.State(new)
    target.set_phase("building")

    def fail() -> None:
        raise StateDamagedError("slot 7 is wrong")

    arguments = ("echo", "echo", target, semaphore.id, 2)
    worker = _native.Worker(*arguments, source=source, finish=fail)
    assert news(worker, "refused")[2] == ("state_damaged", "slot 7 is wrong")
    worker.stop()
    assert (source.phase, target.phase) == ("blank", "building")

    seen: list[str] = []
    worker = _native.Worker(*arguments, source=source, finish=lambda: seen.append(target.phase))
    news(worker, "took")
    assert seen == ["building"]
    assert (source.phase, target.phase) == ("retired", "serving")
    worker.stop()
    os.close(old)
    os.close(new)


def test_a_worker_that_waits_is_told_of_channels_and_can_be_stopped(
    channel_pair: Pairs, semaphore: sysv_ipc.Semaphore
) -> None:
    holder = _native.Ownership(semaphore.id)
    assert holder.acquire()
    pair = channel_pair()
    before = os.pread(pair.ring.fd, 1 << 20, 0)
    fd = echo_state()
    worker = _native.Worker("echo", "echo", _native.State(fd), semaphore.id, 1)
    worker.attach(1, pair.server, 0)
    worker.attach(2, channel_pair().server, 1)
    worker.detach(2)
    assert worker.take_news() == []
    worker.stop(LIMIT)
    assert os.pread(pair.ring.fd, 1 << 20, 0) == before
    assert [item[0] for item in worker.take_news()] == ["ended"]
    holder.release()
    os.close(fd)
