"""Rights and states of a channel, and how its ends fare when the other end, or its process, goes."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path

import pytest

from snap.dataplane import _native
from snap.dataplane.errors import (
    ClosedError,
    DeniedError,
    FaultedError,
    FullError,
    PeerGoneError,
    RevokedError,
    UsageError,
)
from tests.native_rig import MODES, OFF_STATE, SLOTS_AREA, TAIL_UP, Pairs, child, poke, with_rights
from tests.waiting import LIMIT, Background


def test_a_client_that_may_not_send_is_denied_and_not_believed(channel_pair: Pairs) -> None:
    pair = channel_pair()
    client, server = with_rights(pair, _native.RIGHT_RECV)
    with pytest.raises(DeniedError, match="send"):
        client.send(b"x")
    server.send(b"down")
    assert client.recv(timeout=LIMIT) == b"down"
    pair.client.send(b"by a client that ignores its rights")
    with pytest.raises(FaultedError, match="without the right"):
        server.recv(timeout=LIMIT)


def test_nothing_is_sent_to_a_client_that_may_not_receive(channel_pair: Pairs) -> None:
    client, server = with_rights(channel_pair(), _native.RIGHT_SEND)
    client.send(b"up")
    assert server.recv(timeout=LIMIT) == b"up"
    with pytest.raises(DeniedError, match="recv"):
        server.send(b"x")


@pytest.mark.parametrize(
    ("state", "error"),
    [("revoked", RevokedError), ("gone", PeerGoneError), ("moved", PeerGoneError), ("faulted", FaultedError)],
)
def test_a_state_ends_the_next_burst_and_every_wait(
    channel_pair: Pairs, state: str, error: type[Exception]
) -> None:
    pair = channel_pair()
    waits = [
        Background(lambda end=end, wait=wait: end.recv(timeout=LIMIT, wait=wait))  # type: ignore[misc]
        for end, wait in ((pair.client, _native.BLOCK), (pair.server, _native.ADAPTIVE))
    ]
    time.sleep(0.02)
    pair.control.set_state(state, "by the test")
    for wait in waits:
        with pytest.raises(error):
            wait.finish()
    for end in pair:
        for call in (end.check, lambda end=end: end.send(b"x"), end.try_recv, lambda end=end: end.loan(1)):
            with pytest.raises(error):
                call()
        assert end.state == ("gone" if state == "moved" and end.state == "gone" else state)
    assert pair.control.state == state


def test_a_shut_gate_stops_the_server_whatever_a_hostile_client_writes(channel_pair: Pairs) -> None:
    pair = channel_pair()
    pair.client.send_many([b"x"] * 10)
    pair.gate.shut(0)
    for word in (1, 2, 3, 4, 5, 6, 0, 255, 1 << 31):
        poke(pair, OFF_STATE, word)
        with pytest.raises((RevokedError, PeerGoneError)) as caught:
            pair.server.recv(timeout=0)
        assert caught.type is RevokedError or word == 6
        with pytest.raises((RevokedError, PeerGoneError)):
            pair.server.send(b"x")
    assert pair.server.stats["received"] == 0


def test_a_pause_holds_messages_until_it_ends_and_ctrl_c_still_works(channel_pair: Pairs) -> None:
    pair = channel_pair()
    pair.client.send(b"before")
    pair.control.set_state("paused")
    assert pair.server.state == "paused"
    assert pair.server.try_recv() is None
    with pytest.raises(FullError):
        pair.client.send(b"x", timeout=0)
    answer = Background(lambda: pair.server.recv(timeout=LIMIT))
    sent = Background(lambda: pair.client.send(b"after", timeout=LIMIT))
    time.sleep(0.02)
    pair.control.set_state("open")
    assert answer.finish() == b"before"
    sent.finish()
    assert pair.server.recv(timeout=LIMIT) == b"after"


def test_a_fault_names_its_reason_and_is_for_good(channel_pair: Pairs) -> None:
    pair = channel_pair()
    pair.client.send(b"x")
    poke(pair, SLOTS_AREA, 99)
    for _ in range(2):
        with pytest.raises(FaultedError, match="opcode"):
            pair.server.recv(timeout=LIMIT)
    assert pair.server.fault == "unknown opcode in a descriptor"
    with pytest.raises(FaultedError, match="opcode"):
        pair.client.send(b"the other end is told the reason")
    pair.control.set_state("open")
    assert pair.server.state == "faulted"


def test_what_was_sent_before_the_end_is_still_received(channel_pair: Pairs) -> None:
    client, server = channel_pair()
    client.send_many([b"1", b"2"])
    client.close()
    client.close()
    assert client.closed
    assert server.recv_many(10) == [b"1", b"2"]
    with pytest.raises(PeerGoneError):
        server.recv(timeout=LIMIT)
    for call in (client.check, client.try_recv, lambda: client.send(b"x")):
        with pytest.raises(ClosedError):
            call()


@pytest.mark.parametrize("wait", MODES)
def test_a_wait_ends_when_either_end_closes(channel_pair: Pairs, wait: int) -> None:
    client, server = channel_pair()
    other = Background(lambda: server.recv(timeout=LIMIT, wait=wait))
    own = Background(lambda: client.recv(timeout=LIMIT, wait=wait))
    time.sleep(0.02)
    client.close()
    with pytest.raises(PeerGoneError):
        other.finish()
    with pytest.raises(ClosedError):
        own.finish()


def test_the_kernels_hold_tells_depths_and_refuses_nonsense(channel_pair: Pairs) -> None:
    pair = channel_pair()
    pair.client.send_many([b"x"] * 3)
    pair.server.send(b"y" * 100)
    assert pair.control.depth() == (3, 2)
    poke(pair, TAIL_UP, 1 << 50)
    assert pair.control.depth() == (-1, 2)
    with pytest.raises(UsageError):
        pair.control.set_state("asleep")
    with pytest.raises(ValueError, match="gate line"):
        pair.gate.open(_native.GATE_LINES, 1)
    pair.control.close()
    with pytest.raises(ClosedError):
        pair.control.depth()


# -- descriptors and processes ----------------------------------------------------------------------------------


def test_a_thousand_channels_leave_no_descriptor_behind(channel_pair: Pairs) -> None:
    pair = channel_pair()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(1000):
        client, server = with_rights(pair, 3)
        client.stats, server.stats  # noqa: B018
        del client, server
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("wait", MODES)
@pytest.mark.parametrize("paused", [False, True])
def test_ctrl_c_ends_a_wait(channel_pair: Pairs, wait: int, paused: bool) -> None:
    pair = channel_pair()
    if paused:
        pair.client.send(b"held back by the pause")
        pair.control.set_state("paused")
    body = f"""
try:
    print('waiting', flush=True)
    end.recv(wait={wait})
except KeyboardInterrupt:
    print('interrupted', flush=True)
"""
    with child(pair, _native.SERVER, body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIMIT)[0] == "interrupted\n"


def test_a_killed_peer_ends_the_wait_when_the_kernel_says_so(channel_pair: Pairs) -> None:
    pair = channel_pair()
    with child(pair, _native.SERVER, "end.recv()\nend.send(b'up')\ntime.sleep(60)") as process:
        pair.client.send(b"hello")
        assert pair.client.recv(timeout=LIMIT) == b"up"
        answer = Background(lambda: pair.client.recv(timeout=LIMIT, wait=_native.BLOCK))
        process.kill()
        process.wait()
        pair.control.set_state("gone")
        with pytest.raises(PeerGoneError):
            answer.finish()


def test_a_shrunk_segment_is_a_fault_not_a_death(channel_pair: Pairs) -> None:
    pair = channel_pair(backend="posix")
    body = """
payload = end.receive()
end.send(b'taken')
end.recv()  # rings when the pool is gone
sum(payload.view)
try:
    end.send(b'x')
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""
    with child(pair, _native.SERVER, body) as process:
        pair.client.send(b"p" * 20_000)
        assert pair.client.recv(timeout=LIMIT) == b"taken"
        os.ftruncate(pair.up.fd, 0)
        pair.client.send(b"go")
        out, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, err
        assert "FaultedError" in out
        assert "shrunk" in out
