"""Random bytes in every segment that a process of the same uid can open, while traffic runs: no crash, no hang."""

from __future__ import annotations

import mmap
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from snap.dataplane import _native
from snap.dataplane.errors import FaultedError
from snap.ipc import direct

Pairs = Callable[..., Any]
SECONDS = 3.0
LIMIT = 30.0

# Each peer restarts its conversation with whatever error it got, and reports what it met. Only errors of the tree in
# `errors.py` are expected; anything else is a traceback and an exit code.
TALK = """
import collections, json, sys, time
import numpy as np
from snap.dataplane import _native
from snap.dataplane.errors import ChannelError, DeadlineError, DeniedError
met = collections.Counter()
end = _native.Endpoint({role}, *{ends})
print("ready", flush=True)
finish = time.monotonic() + {seconds}
turn = 0
while time.monotonic() < finish:
    turn += 1
    try:
        if turn % 3 == 0:
            with end.loan(5000, timeout=0.01) as loan:
                loan.view[:5] = b"hello"
                end.send_loan(loan, timeout=0.01)
        elif turn % 3 == 1:
            end.send_many([b"x" * (turn % 1009)] * 8, timeout=0.01)
        else:
            end.send(b"y" * (turn % 9000), timeout=0.01)
        if turn % 2:
            assert len(end.recv_many(64, timeout=0.01, wait=turn % 3)) <= 64
        else:
            with end.receive(timeout=0.01) as payload:
                int(np.frombuffer(payload, dtype=np.uint8).sum())
        end.arm_recv(), end.arm_send(), end.stats, end.room()
        met["fine"] += 1
    except (ChannelError, DeadlineError) as error:
        met[type(error).__name__] += 1
        if not isinstance(error, DeadlineError) and turn % 50 == 0:
            # The same segments again, as whoever reopens finds them: refused, or on from there.
            try:
                end = _native.Endpoint({role}, *{ends})
            except ChannelError as refused:
                met["refused: " + str(refused)] += 1
        time.sleep(0.0005)
end.close()
print(json.dumps(met), flush=True)
"""

# Finds the segments as any process of the same uid can: through /proc.
SCRIBBLE = """
import mmap, os, random, struct, time
chance = random.Random({seed})
maps = []
for pid in {pids}:
    for fd in os.listdir(f"/proc/{{pid}}/fd"):
        try:
            if "snap" not in os.readlink(f"/proc/{{pid}}/fd/{{fd}}"):
                continue
            opened = os.open(f"/proc/{{pid}}/fd/{{fd}}", os.O_RDWR)
            maps.append(mmap.mmap(opened, os.fstat(opened).st_size))
        except OSError:
            continue
print(f"scribbling on {{len(maps)}} segments", flush=True)
finish = time.monotonic() + {seconds}
while time.monotonic() < finish:
    for _ in range(200):
        memory = chance.choice(maps)
        # Every other write hits where the control words are, the others anywhere.
        size = min(len(memory), 16384 if chance.random() < 0.5 else len(memory))
        at = chance.randrange(size // 8) * 8
        memory[at:at + 8] = chance.randrange(80).to_bytes(8, "little") if chance.random() < 0.5 else chance.randbytes(8)
    time.sleep(0.0005)
    if chance.random() < 0.05:
        # A sound header and state now and then, or the first wild one would end the show.
        for memory in maps:
            struct.pack_into("<8sIIQQ", memory, 0, b"SNAPCHN1", 1, 64, 1, 1)
            struct.pack_into("<Q", memory, 64, 1)
"""


def source(template: str, **values: Any) -> list[str]:
    return [sys.executable, "-c", template.format(**values)]


@contextmanager
def running(command: list[str], fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, pass_fds=fds, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LIMIT)[0], "it said nothing"
    text = process.stdout.readline()
    assert text, process.communicate()[1]
    return text.strip()


def talkers(stack: ExitStack, pair: Any) -> list[subprocess.Popen[str]]:
    bells = (pair.server.fileno(), pair.client.fileno())
    fds = (pair.ring.fd, pair.up.fd, pair.down.fd)
    ends = repr((*fds, 64, pair.up.size, pair.down.size, bells, 1))
    processes = [
        stack.enter_context(
            running(source(TALK, role=role, ends=ends, seconds=SECONDS + 0.5), (*fds, *bells))
        )
        for role in (_native.SERVER, _native.CLIENT)
    ]
    assert [line(process) for process in processes] == ["ready", "ready"]
    return processes


@pytest.mark.parametrize("backend", ["memfd", "posix"])
def test_random_bytes_in_every_segment_crash_and_hang_nobody(channel_pair: Pairs, backend: str) -> None:
    seed = int(os.environ.get("SNAP_SEED", random.SystemRandom().getrandbits(32)))
    print(f"SNAP_SEED={seed}")
    with ExitStack() as stack:
        victims = talkers(stack, channel_pair(backend=backend, up_bytes=1 << 16, down_bytes=1 << 16))
        # This channel is not scribbled on: its segments are in this process, not in the victims.
        client, server = channel_pair()
        worker = direct.echo(server)
        stack.callback(worker.stop)
        pids = [process.pid for process in victims]
        scribbler = stack.enter_context(running(source(SCRIBBLE, seed=seed, pids=pids, seconds=SECONDS)))
        assert line(scribbler) == "scribbling on 6 segments"
        answered = 0
        finish = time.monotonic() + SECONDS
        while time.monotonic() < finish:
            client.send(b"%d" % answered, timeout=LIMIT)
            assert client.recv(timeout=LIMIT) == b"%d" % answered
            answered += 1
            time.sleep(0.001)
        for process in (*victims, scribbler):
            out, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, err
            assert not err
            print(out)
        assert answered > 0
        assert [news for news in worker.take_news() if news[0] != "took"] == []


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, b"SNAPCHN2", "magic"),
        (8, struct.pack("<I", 1), "version"),
        (12, struct.pack("<I", 128), "geometry"),
        (24, struct.pack("<I", 9), "generation"),
    ],
)
def test_a_wrong_header_is_refused_by_name_at_both_ends(
    channel_pair: Pairs, offset: int, value: bytes, reason: str
) -> None:
    pair = channel_pair()
    with mmap.mmap(pair.ring.fd, pair.ring.size) as memory:
        memory[offset : offset + len(value)] = value
    bells = (pair.server.fileno(), pair.client.fileno())
    for role in (_native.CLIENT, _native.SERVER):
        with pytest.raises(FaultedError, match=reason):
            _native.Endpoint(role, pair.ring.fd, -1, -1, 64, 0, 0, bells, 1)


def test_an_engine_in_python_survives_its_client_and_serves_the_next(channel_pair: Pairs) -> None:
    seed = int(os.environ.get("SNAP_SEED", random.SystemRandom().getrandbits(32)))
    print(f"SNAP_SEED={seed}")
    chance = random.Random(seed)
    poller = _native.Poller()
    for _ in range(40):
        bad, good = channel_pair(), channel_pair()
        poller.add(bad.server)
        poller.add(good.server)
        with mmap.mmap(bad.ring.fd, bad.ring.size) as memory:
            for _ in range(200):
                at = chance.choice((64, 4096, 4160, 4352, 4608, 8192 + 64 * chance.randrange(64)))
                memory[at : at + 8] = chance.choice(
                    (chance.randrange(70).to_bytes(8, "little"), chance.randbytes(8))
                )
                poller.wait(timeout=0)
                try:
                    bad.server.send_many(bad.server.recv_many(64, timeout=0), timeout=0)
                except FaultedError as error:
                    assert error.message
                    break
                except Exception as error:
                    assert type(error).__module__ == "snap.dataplane.errors", error
        good.client.send(b"next")
        assert poller.wait(timeout=LIMIT)
        assert good.server.recv(timeout=0) == b"next"
        poller.remove(bad.server)
        poller.remove(good.server)
    poller.close()
