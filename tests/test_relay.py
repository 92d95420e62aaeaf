"""The relay engine, without a daemon."""

from __future__ import annotations

import random

import pytest

from snap.modules.relay.engine import Relay
from snap.modules.testing import ChannelPair, EngineHarness, crash, upgrade


def drain(pair: ChannelPair) -> list[bytes]:
    found: list[bytes] = []
    while burst := pair.client.recv_many(64, timeout=0):
        found += burst
    return found


def test_messages_pass_both_ways_in_order() -> None:
    with EngineHarness(Relay()) as harness:
        left, right = harness.attach(service="relay-in"), harness.attach(service="relay-out")
        there, back = [b"%d" % n for n in range(100)], [b"ack %d" % n for n in range(100)]
        left.client.send_many(there)
        right.client.send_many(back)
        harness.run()
        assert (drain(right), drain(left)) == (there, back)


def test_nothing_is_taken_from_a_client_that_is_alone() -> None:
    with EngineHarness(Relay()) as harness:
        left = harness.attach(service="relay-in")
        left.client.send(b"early")
        assert harness.run() == 0
        right = harness.attach(service="relay-out")
        harness.run()
        assert drain(right) == [b"early"]


def test_a_slow_receiver_loses_nothing() -> None:
    with EngineHarness(Relay()) as harness:
        left, right = (
            harness.attach(service="relay-in", slots=64),
            harness.attach(service="relay-out", slots=64),
        )
        sent = [b"%d" % n for n in range(500)]
        waiting, found = list(sent), []
        while len(found) < len(sent):
            del waiting[: left.client.send_many(waiting, timeout=0)]
            harness.advance(0.001)
            found += right.client.recv_many(7, timeout=0)
        assert found == sent


def test_a_client_that_comes_again_takes_the_place_of_its_forerunner() -> None:
    with EngineHarness(Relay()) as harness:
        left, gone = harness.attach(service="relay-in"), harness.attach(service="relay-out")
        harness.turn()
        harness.detach(gone)
        harness.turn()
        left.client.send(b"later")
        harness.turn()
        right = harness.attach(service="relay-out")
        harness.run()
        assert drain(right) == [b"later"]


def test_a_receiver_whose_pool_cannot_hold_a_message_is_dropped_with_the_reason() -> None:
    with EngineHarness(Relay()) as harness:
        left = harness.attach(service="relay-in")
        right = harness.attach(service="relay-out", down_bytes=4096)
        left.client.send(bytes(100_000))
        harness.run()
        assert list(harness.dropped) == [right.server.id]
        assert "does not fit its pool" in harness.dropped[right.server.id]
        again = harness.attach(service="relay-out")
        left.client.send(b"next")
        harness.run()
        assert drain(again) == [b"next"]


@pytest.mark.parametrize("service", ["relay-in", "relay-out"])
def test_a_client_that_is_revoked_takes_only_its_own_channel_along(service: str) -> None:
    with EngineHarness(Relay()) as harness:
        pairs = {name: harness.attach(service=name) for name in ("relay-in", "relay-out")}
        harness.turn()
        pairs[service].revoke()
        harness.run()
        assert list(harness.dropped) == [pairs[service].server.id]


def test_a_relay_that_dies_at_any_poll_loses_and_repeats_nothing() -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with EngineHarness(Relay()) as harness:
        left = harness.attach(service="relay-in", slots=64)
        right = harness.attach(service="relay-out", slots=64, down_bytes=1 << 16)
        sent = [b"%d " % n + bytes(chance.choice([0, 0, 3000])) for n in range(600)]
        waiting, found = list(sent), []
        while len(found) < len(sent):
            del waiting[: left.client.send_many(waiting, timeout=0)]
            happens = chance.random()
            if happens < 0.3:
                crash(harness)
            elif happens < 0.5:
                upgrade(harness, Relay)
            else:
                harness.turn()
            found += right.client.recv_many(chance.randint(1, 30), timeout=0)
        assert found == sent
