"""One generation of an engine hands over to the next, however it ends: real processes on shared state."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from snap.ipc.protocol import (
    Detach,
    Stop,
    Yield,
    Yielded,
)
from snap.modules.testing import ChannelPair

# Answers each message with the number of times that it was seen, and the number of all messages; both kept in state.
from tests.handover_rig import COUNTING, COUNTING_2, asking, attach, took, total, wait_for_more
from tests.host_rig import LIMIT, Ground, package


def test_generations_hand_over_back_and_forth_and_the_client_notices_nothing(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as pair:
        first, second = kernels(path), kernels(path)
        attach(first, pair)
        first.prepared()
        took(first)
        with asking(pair) as client:
            attach(second, pair)
            second.prepared()
            for turn in range(20):
                giving, taking = (first, second) if turn % 2 == 0 else (second, first)
                wait_for_more(client)
                giving.tell(Yield(engine="echo"))
                given, taken = giving.hear(Yielded), took(taking)
                assert taken.last_poll_ns == given.last_poll_ns < taken.first_poll_ns
                assert taken.undone == 0
            wait_for_more(client)
        assert total(ground) == client.asked


@pytest.mark.parametrize("standby", [True, False], ids=["with a standby", "without"])
def test_a_generation_killed_at_any_instant_loses_and_repeats_nothing(
    ground: Ground, kernels: Any, tmp_path: Path, standby: bool
) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as pair:
        serving = kernels(path)
        attach(serving, pair)
        serving.prepared()
        took(serving)
        with asking(pair) as client:
            for _ in range(5):
                after = kernels(path)
                attach(after, pair)
                if standby:
                    after.prepared()
                time.sleep(chance.random() * 0.02)
                serving.process.kill()
                if not standby:
                    after.prepared()
                took(after)
                wait_for_more(client)
                serving = after
        assert total(ground) == client.asked


@pytest.mark.parametrize("point", ["module.took", "module.yield", "module.yielded", "module.commit"])
def test_a_death_at_a_step_of_the_hand_over_loses_and_repeats_nothing(
    ground: Ground, kernels: Any, tmp_path: Path, point: str
) -> None:
    path = package(tmp_path, "count", COUNTING)
    faults = tmp_path / "faults"
    faults.mkdir()
    with ChannelPair(id=1) as pair:
        first, second = kernels(path, faults=faults), kernels(path, faults=faults)
        attach(first, pair)
        first.prepared()
        took(first)
        with asking(pair) as client:
            attach(second, pair)
            second.prepared()
            wait_for_more(client)
            (tmp_path / "fault").write_text("kill")
            (tmp_path / "fault").rename(faults / point)
            if point != "module.commit":
                first.tell(Yield(engine="echo"))
            dying, other = (second, first) if point == "module.took" else (first, second)
            assert dying.process.wait(LIMIT) == -signal.SIGKILL
            if point == "module.took":
                other.hear(Yielded)
            took(other)
            wait_for_more(client)
        assert total(ground) == client.asked


def test_a_schema_change_is_migrated_while_the_old_one_serves_and_back(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    old, new = package(tmp_path, "count", COUNTING), tmp_path / "new"
    new.mkdir()
    new = package(new, "count", COUNTING_2)
    with ChannelPair(id=1) as pair:
        first, second = kernels(old), kernels(new, state_version=2)
        attach(first, pair)
        first.prepared()
        took(first)
        with asking(pair) as client:
            wait_for_more(client, 200)
            attach(second, pair)
            ready = second.prepared(ground.blank(128 << 20), ground.fds["state"])
            assert ready.migrated >= 200
            wait_for_more(client)
            first.tell(Yield(engine="echo", retire=True))
            given, taken = first.hear(Yielded), took(second)
            assert taken.last_poll_ns == given.last_poll_ns
            wait_for_more(client)
            third = kernels(old)
            attach(third, pair)
            third.prepared(ground.blank(128 << 20), ground.fds["state 3"])
            second.tell(Yield(engine="echo", retire=True))
            second.hear(Yielded)
            took(third)
            wait_for_more(client)
        assert total(ground, "state 4") == client.asked


def test_messages_sent_while_nobody_owns_the_engine_are_answered_by_the_next(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as pair:
        first = kernels(path)
        attach(first, pair)
        first.prepared()
        took(first)
        first.tell(Stop(grace=LIMIT))
        assert first.ended() == (0, "")
        pair.client.send_many([b"a", b"b", b"a"], timeout=LIMIT)
        second = kernels(path)
        attach(second, pair)
        second.prepared()
        took(second)
        answers: list[bytes] = []
        while len(answers) < 3:
            answers += pair.client.recv_many(3, timeout=LIMIT)
        assert answers == [b"a 1 1", b"b 1 2", b"a 2 3"]


def test_a_channel_that_is_detached_from_a_waiting_generation_is_not_served_by_it(
    ground: Ground, kernels: Any, tmp_path: Path
) -> None:
    path = package(tmp_path, "count", COUNTING)
    with ChannelPair(id=1) as leaving, ChannelPair(id=2) as staying:
        first, second = kernels(path), kernels(path)
        for kernel in (first, second):
            attach(kernel, leaving, staying)
            kernel.prepared()
            if kernel is first:
                took(first)
        for kernel in (first, second):
            kernel.tell(Detach(channel=1, reason="closed"))
        first.tell(Yield(engine="echo"))
        first.hear(Yielded)
        took(second)
        leaving.client.send(b"x", timeout=0)
        staying.client.send(b"y", timeout=LIMIT)
        assert staying.client.recv(timeout=LIMIT) == b"y 1 1"
        assert leaving.client.try_recv() is None


def test_a_native_engine_hands_over_in_the_same_way(ground: Ground, kernels: Any) -> None:
    from snap.modules.echo.engine import PyEcho

    path = Path(__import__(PyEcho.__module__, fromlist=["x"]).__file__).parent
    with ChannelPair(id=1) as pair:
        first, second = kernels(path, "native:echo"), kernels(path, "native:echo")
        for kernel in (first, second):
            attach(kernel, pair)
            kernel.prepared()
            if kernel is first:
                took(first)
        for turn in range(6):
            message = b"%d" % turn
            pair.client.send(message, timeout=LIMIT)
            giving, taking = (first, second) if turn % 2 == 0 else (second, first)
            giving.tell(Yield(engine="echo"))
            given, taken = giving.hear(Yielded), took(taking)
            assert taken.last_poll_ns == given.last_poll_ns < taken.first_poll_ns
            assert pair.client.recv(timeout=LIMIT) == message
