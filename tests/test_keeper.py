"""The keeper: what it holds outlives kernels, and nothing outlives it; real processes, sockets and descriptors."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from snap.kernel import keeper
from snap.kernel.store import KeeperStore

PATIENCE = 20.0

KERNEL = """
import asyncio, os, sys, time
from pathlib import Path
from snap.kernel.store import KeeperStore

async def main(directory):
    store = KeeperStore(Path(directory), float(sys.argv[2]), sys.argv[4:])
    found = store.take()
    with open(directory + "/lives", "a") as lives:
        print(os.getpid(), *sorted(found), file=lives)
    if not found:
        read, write = os.pipe()
        store.put("pipe", [read, write])
        store.put("other", [read])
        store.remove("other")
    await asyncio.sleep(float(sys.argv[3]))
    os._exit(1)

asyncio.run(main(sys.argv[1]))
"""


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not what():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(what: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def lives(directory: Path) -> list[list[str]]:
    path = directory / "lives"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def kernel(directory: Path, grace: float, life: float, respawn: bool = False) -> subprocess.Popen[bytes]:
    script = directory / "kernel.py"
    script.write_text(KERNEL)
    argv = [sys.executable, str(script), str(directory), str(grace)]
    again = [*argv, "0"] if respawn else []
    return subprocess.Popen([*argv, str(life), *again])


def test_what_is_put_comes_back_in_order_to_whoever_takes_it(tmp_path: Path) -> None:
    async def test() -> None:
        first = KeeperStore(tmp_path)
        pairs = {f"name.{n}": os.pipe() for n in range(100)}
        for name, fds in pairs.items():
            first.put(name, fds)
        first.put("name.1", [pairs["name.0"][1]])
        first.remove("name.2")
        first.remove("never.there")
        found = first.take()
        assert sorted(found) == sorted(set(pairs) - {"name.2"})
        os.write(found["name.1"][0], b"again")
        assert os.read(pairs["name.0"][0], 10) == b"again"
        os.write(found["name.7"][1], b"order")
        assert os.read(pairs["name.7"][0], 10) == b"order"
        assert not any(os.get_inheritable(fd) for fds in found.values() for fd in fds)
        pid = first.pid
        first.close()
        assert pid is not None and not alive(pid)
        assert not (tmp_path / keeper.SOCKET).exists()
        for fds in (*found.values(), *pairs.values()):
            keeper.close(fds)

    run(test)


def test_a_killed_keeper_is_replaced_and_the_new_one_has_everything(tmp_path: Path) -> None:
    async def test() -> None:
        said: list[str] = []
        store = KeeperStore(tmp_path, report=lambda kind, data: said.append(kind))
        read, write = os.pipe()
        store.put("pipe", [read, write])
        first = store.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: "keeper.started" in said)
        assert said == ["keeper.lost", "keeper.started"]
        assert store.pid != first
        found = store.take()
        assert list(found) == ["pipe"]
        os.write(found["pipe"][1], b"here")
        assert os.read(read, 10) == b"here"
        store.close()
        keeper.close([read, write, *found["pipe"]])

    run(test)


def test_a_stopped_keeper_is_replaced_by_the_put_that_it_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snap.kernel.store.PATIENCE", 0.2)

    async def test() -> None:
        store = KeeperStore(tmp_path)
        read, write = os.pipe()
        store.put("first", [read])
        await until((tmp_path / keeper.SOCKET).exists)
        first = store.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        for number in range(2000):
            store.put(f"name.{number}", [write])
            if store.pid != first:
                break
        assert not alive(first)
        await until(lambda: store.pid is not None)
        assert set(store.take()) >= {"first", "name.0", f"name.{number}"}
        store.close()

    # The descriptors that `take` gave are many: a process of their own ends with them.
    child = os.fork()
    if not child:
        try:
            run(test)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_killed_kernels_descriptors_wait_for_the_next_one(tmp_path: Path) -> None:
    first = kernel(tmp_path, 20, 60)
    wait(lambda: lives(tmp_path))
    first.kill()
    first.wait()
    second = kernel(tmp_path, 20, 60)
    wait(lambda: len(lives(tmp_path)) == 2)
    assert lives(tmp_path)[1] == [str(second.pid), "pipe"]

    async def bye() -> None:
        store = KeeperStore(tmp_path)
        pid = store.pid
        store.close()
        await until(lambda: pid is not None and not alive(pid))

    second.kill()  # first: a kernel that outlived its keeper would start a new one
    second.wait()
    run(bye)


def test_without_a_new_kernel_everything_ends_after_the_grace(tmp_path: Path) -> None:
    async def test() -> None:
        store = KeeperStore(tmp_path, 0.3)
        pid = store.pid
        assert pid is not None
        ours, theirs = socket.socketpair()
        store.put("link", [theirs.fileno()])
        theirs.close()
        store.detach()
        ours.settimeout(PATIENCE)
        assert ours.recv(1) == b""
        ours.close()
        await until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)
        said = [json.loads(line)["event"] for line in (tmp_path / keeper.LOG).read_text().splitlines()]
        assert said == ["keeper.gave_up"]
        assert not (tmp_path / keeper.SOCKET).exists()

    run(test)


def test_a_killed_kernel_is_started_again_and_after_five_deaths_no_more(tmp_path: Path) -> None:
    first = kernel(tmp_path, 5, 60, respawn=True)
    wait(lambda: lives(tmp_path))
    first.kill()
    first.wait()
    wait(lambda: len(lives(tmp_path)) == 1 + keeper.RESPAWNS)
    assert all(each[1:] == ["pipe"] for each in lives(tmp_path)[1:])
    assert len({each[0] for each in lives(tmp_path)}) == 1 + keeper.RESPAWNS
    log = tmp_path / keeper.LOG
    wait(lambda: log.exists() and "gave_up" in log.read_text())
    said = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert said == ["keeper.respawn_failed", "keeper.gave_up"]
    assert len(lives(tmp_path)) == 1 + keeper.RESPAWNS


def test_a_stranger_who_only_connects_does_not_keep_the_keeper_alive(tmp_path: Path) -> None:
    async def test() -> None:
        store = KeeperStore(tmp_path, 0.3)
        pid = store.pid
        assert pid is not None
        await until((tmp_path / keeper.SOCKET).exists)
        assert (tmp_path / keeper.SOCKET).stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(str(tmp_path / keeper.SOCKET))
            stranger.send(b"")
            store.detach()
            await until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)

    run(test)


def test_a_kernel_that_prepares_beside_another_keeps_the_keeper_when_either_dies(tmp_path: Path) -> None:
    async def test() -> None:
        old = KeeperStore(tmp_path, 0.2)
        read, write = os.pipe()
        old.put("pipe", [read, write])
        await until((tmp_path / keeper.SOCKET).exists)
        new = KeeperStore(tmp_path, 0.2)
        assert new.pid == old.pid
        keeper.close(new.take()["pipe"])
        old.put("late", [read])
        old.detach()
        await asyncio.sleep(0.6)
        found = new.take()
        assert sorted(found) == ["late", "pipe"]
        pid = new.pid
        new.close()
        keeper.close([read, write, *found["late"], *found["pipe"]])
        assert pid is not None
        await until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)

    run(test)
