"""Pony Express under asyncio: the same connections and operations, waited for in the event loop.

    async with await AsyncPony.open(client, arena=1 << 20) as pony:
        peer = await pony.connect("beta/store")
        await pony.send(peer, b"hello")
        reads = [peer.begin_read(handle, offset, 64) for offset in range(0, 4096, 64)]
        await asyncio.gather(*map(pony.result, reads))

What is begun (`begin_...`) is begun at once and waits for nothing; whoever gives up waiting for it leaves it under way.
Any number of tasks of one event loop use an `AsyncPony` together.
"""

# ruff: noqa: ASYNC109 (deadlines are written as in the blocking forms, and come out as the same error)

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

from typing_extensions import Buffer

from snap.dataplane.errors import DeadlineError

from .client import Pony
from .commands import SERVICE
from .connection import Connection, Message, Operation
from .errors import BusyError

if TYPE_CHECKING:
    from snap.ipc import AsyncClient

# Seconds between two attempts to send to somebody who has no room.
_PAUSE: Final = 0.0005


class AsyncPony:
    """`pony` is what it drives: places, regions and everything else that does not wait is used there."""

    def __init__(self, pony: Pony) -> None:
        self.pony = pony

    @classmethod
    async def open(cls, client: AsyncClient, arena: int = 0, timeout: float = 10.0) -> Self:
        """`arena`: bytes of memory to share with peers. Raises what `AsyncClient.open` raises."""
        return cls(Pony(await client.aopen(SERVICE, arena_bytes=arena, timeout=timeout)))

    async def until(self, condition: Callable[[], bool], timeout: float | None = None) -> None:
        """Take in what comes until `condition` holds. Raises DeadlineError."""
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    if self.pony.poll():
                        # What came may be what another task waits for.
                        self.pony.channel.wake_waiters()
                    else:
                        await self.pony.channel.wait_rung()
        except TimeoutError:
            raise DeadlineError(f"not within {timeout} s") from None

    async def result(self, operation: Operation, timeout: float | None = None) -> int:
        """As `Operation.result`."""
        await self.until(lambda: operation.done, timeout)
        return operation.outcome()

    async def connect(self, name: str, timeout: float | None = 10.0) -> Connection:
        """Raises NoPeerError."""
        operation = self.pony.begin_connect(name)
        await self.until(lambda: operation.done, timeout)
        return self.pony.connection_of(operation, name)

    async def accept(self, timeout: float | None = None) -> Connection:
        """The next connection that somebody made to a name of ours."""
        await self.until(self.pony.waited_for, timeout)
        return self.pony.accept(0)

    async def recv(self, connection: Connection, timeout: float | None = None) -> Message:
        """The next small message. Raises DeadlineError, ClosedByPeerError when there will be none."""
        await self.until(lambda: connection.pending, timeout)
        return connection.take()

    async def send(
        self, connection: Connection, data: Buffer, stream: int = 0, timeout: float | None = 10.0
    ) -> None:
        """As `Connection.send`; while the peer has no room, other tasks run."""
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while True:
            try:
                await self.result(connection.begin_send(data, stream))
                return
            except BusyError:
                if end is not None and loop.time() + _PAUSE > end:
                    raise
            await asyncio.sleep(_PAUSE)

    def close(self) -> None:
        self.pony.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
