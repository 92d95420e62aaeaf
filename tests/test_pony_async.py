"""Pony Express under asyncio, and in an application's own loop."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from snap.dataplane.errors import DeadlineError
from snap.ipc import AsyncClient, aconnect, connect
from snap.modules.pony import AsyncPony, BusyError, ClosedByPeerError, NoPeerError, Pony, Right

from .conftest import OWNER_MAY_ALL, KernelProcess

SOON = 20.0
ARENA = 1 << 20


@pytest.fixture
def started(kernel: Callable[..., KernelProcess]) -> KernelProcess:
    return kernel(policy=OWNER_MAY_ALL + "[modules.pony]\nautostart = true\n")


def play(started: KernelProcess, part: Callable[[AsyncPony, AsyncPony], Coroutine[Any, Any, None]]) -> None:
    """Two applications in one event loop; `far` is bound."""

    async def main() -> None:
        near_client: AsyncClient
        async with (
            await aconnect(runtime_dir=started.directory) as near_client,
            await aconnect(runtime_dir=started.directory) as far_client,
            await AsyncPony.open(near_client, ARENA) as near,
            await AsyncPony.open(far_client, ARENA) as far,
        ):
            far.pony.bind("far")
            await part(near, far)

    asyncio.run(main())


def test_many_tasks_wait_for_many_things_at_once(started: KernelProcess) -> None:
    async def part(near: AsyncPony, far: AsyncPony) -> None:
        async def serve() -> None:
            peers = [await far.accept(SOON) for _ in range(5)]
            await asyncio.gather(*(echo(peer) for peer in peers))

        async def echo(peer: Any) -> None:
            for _ in range(50):
                message = await far.recv(peer, SOON)
                await far.send(peer, message.data, message.stream)

        async def ask(number: int) -> list[bytes]:
            peer = await near.connect("far")
            answers = []
            for turn in range(50):
                await near.send(peer, b"%d/%d" % (number, turn))
                answers.append((await near.recv(peer, SOON)).data)
            return answers

        server = asyncio.create_task(serve())
        said = await asyncio.gather(*(ask(number) for number in range(5)))
        assert said == [[b"%d/%d" % (number, turn) for turn in range(50)] for number in range(5)]
        await server
        with pytest.raises(NoPeerError):
            await near.connect("nobody")

    play(started, part)


def test_operations_are_awaited_together_and_given_up_alone(started: KernelProcess) -> None:
    async def part(near: AsyncPony, far: AsyncPony) -> None:
        place = far.pony.place(4096)
        place.array("<u8")[:] = range(512)
        handle = far.pony.register(place, Right.READ | Right.ATOMIC).handle
        out = await near.connect("far")
        back = await far.accept(SOON)
        reads = [out.begin_read(handle, offset * 8, 8) for offset in range(100)]
        await asyncio.gather(*map(near.result, reads))
        assert [int.from_bytes(read.data, "little") for read in reads] == list(range(100))
        with pytest.raises(DeadlineError):
            await near.recv(out, 0.01)
        posted = out.begin_receive_into(near.pony.place(64))
        waiting = asyncio.create_task(near.result(posted))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await far.result(back.begin_send_from(far.pony.place(64)), SOON)
        assert await near.result(posted, SOON) == 64
        back.close()
        with pytest.raises(ClosedByPeerError):
            await near.recv(out, SOON)

    play(started, part)


def test_a_sender_waits_for_room_and_others_go_on(started: KernelProcess) -> None:
    async def part(near: AsyncPony, far: AsyncPony) -> None:
        out = await near.connect("far")
        back = await far.accept(SOON)

        async def send() -> None:
            for number in range(1000):
                await near.send(out, b"%d" % number + b"." * 4000, timeout=SOON)

        sender = asyncio.create_task(send())
        for number in range(1000):
            assert (await far.recv(back, SOON)).data.rstrip(b".") == b"%d" % number
        await sender
        with pytest.raises(BusyError):
            for _ in range(5000):
                await near.send(out, bytes(4096), timeout=0)

    play(started, part)


def test_an_engine_that_is_killed_is_a_longer_wait(started: KernelProcess) -> None:
    async def part(near: AsyncPony, far: AsyncPony) -> None:
        handle = far.pony.register(far.pony.place(64), Right.ATOMIC).handle
        out = await near.connect("far")
        with started.control() as operator:
            os.kill(operator.call("module.show", name="pony")["pid"], signal.SIGKILL)
        adds = [out.begin_fetch_add(handle, 0, 1) for _ in range(20)]
        assert sorted(await asyncio.gather(*(near.result(add, 30) for add in adds))) == list(range(20))

    play(started, part)


def test_an_application_waits_in_a_loop_of_its_own(started: KernelProcess) -> None:
    with connect(runtime_dir=started.directory) as client, Pony.open(client, ARENA) as pony:
        pony.bind("self")
        out = pony.connect("self")
        back = pony.accept(SOON)
        got = 0
        for number in range(100):
            out.send(b"%d" % number)
            while not back.pending:
                if pony.arm():
                    assert select.select([pony], [], [], SOON)[0] == [pony]
                pony.poll()
            assert back.take().data == b"%d" % number
            got += 1
        assert got == 100
