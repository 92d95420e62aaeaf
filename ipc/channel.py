"""`Channel`: the application's end of a channel.

Sending and receiving are direct calls into the dataplane's `Endpoint`; this class adds what only Python needs:
the context manager, who the channel belongs to, `reopen`, NumPy records, and the asyncio forms (named with an `a`).
"""

# ruff: noqa: ASYNC109 (deadlines are written as in the blocking forms, and come out as the same error)

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from typing_extensions import Buffer

from snap.dataplane._native import ADAPTIVE, RIGHT_RECV, RIGHT_SEND, Endpoint, Loan, Payload
from snap.dataplane.errors import ClosedError, DeadlineError, FullError, NotRunningError, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import numpy as np
    import numpy.typing as npt

_RIGHT_BITS: Final = {"send": RIGHT_SEND, "recv": RIGHT_RECV}

T = TypeVar("T")
Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Channel(Endpoint):
    """A connected channel to a service. Made by `Client.open`, not by calling the class.

    One thread at a time may send and one may receive; they may be different ones. Errors of every call: RevokedError,
    PeerGoneError, FaultedError, ClosedError. Once one is raised the channel stays that way: see `reopen`.
    """

    id: int
    service: str
    rights: frozenset[str]
    generation: int
    _reopen: Callable[[float], Channel] | None = None
    _areopen: Callable[[float], Awaitable[Channel]] | None = None
    _on_close: Callable[[], None] | None = None
    _waiters: list[Waiter]

    @classmethod
    def make(
        cls,
        *endpoint: Any,
        arena: tuple[int, int] = (-1, 0),
        id: int = 0,
        service: str = "",
        rights: frozenset[str] = frozenset({"send", "recv"}),
    ) -> Self:
        """Build from the first nine arguments of `Endpoint` and the descriptor and size of the arena, holding this
        end to `rights`. Raises as it does."""
        bits = sum(bit for right, bit in _RIGHT_BITS.items() if right in rights)
        arguments = (*endpoint, -1, -1, bits, *arena)
        channel = cls(*arguments)
        channel.id, channel.service, channel.rights, channel.generation = id, service, rights, endpoint[8]
        channel._waiters = []
        return channel

    def owned_by(
        self,
        on_close: Callable[[], None],
        reopen: Callable[[float], Channel] | None = None,
        areopen: Callable[[float], Awaitable[Channel]] | None = None,
    ) -> Self:
        """Say what `close` has to tell and how to get another channel like this one; for who opened it."""
        self._on_close, self._reopen, self._areopen = on_close, reopen, areopen
        return self

    def close(self) -> None:
        """Tell the kernel, and unmap; idempotent. Loans and payloads that are held keep their memory mapped."""
        on_close, self._on_close = self._on_close, None
        try:
            # First: to the provider this is then a client that left, not one that broke.
            if on_close is not None:
                on_close()
        finally:
            super().close()
            self._wake_all()

    def reopen(self, timeout: float = 10.0) -> Channel:
        """Close this channel and open a new one by the same capability, waiting until the service is ready again.

        A mapped channel cannot be pointed elsewhere, so the *returned* channel is the one to go on with. What was sent
        and not answered may or may not have been seen by the service: that is the caller's protocol to know.
        Raises DeadlineError after `timeout` seconds, DeniedError or HandleError when the capability is no longer good,
        UnreachableError when the kernel has gone, NotRunningError for a channel that no client opened.
        """
        if self._reopen is None:
            raise NotRunningError(
                "no client opened this channel", "use `await channel.areopen()` under asyncio"
            )
        self.close()
        return self._reopen(timeout)

    async def areopen(self, timeout: float = 10.0) -> Channel:
        """`reopen`, for channels of an `AsyncClient`."""
        if self._areopen is None:
            raise NotRunningError("no asyncio client opened this channel", "use `channel.reopen()`")
        self.close()
        return await self._areopen(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Channel {self.id} to {self.service!r} {self.state}>"

    # -- NumPy records ----------------------------------------------------------------------------------------

    def send_array(
        self, records: npt.NDArray[Any], tag: int = 0, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> int:
        """Send each element of `records` (any dtype without Python objects) as a message of its own, in one burst.

        Returns how many went: all, unless `timeout` seconds passed. Raises UsageError for a dtype that has no bytes of
        its own.
        """
        import numpy as np

        size = _record_size(records.dtype)
        packed = np.ascontiguousarray(records).reshape(-1).view(np.uint8).data
        return self.send_packed(packed, size, tag, timeout, wait)

    def recv_array(
        self, dtype: npt.DTypeLike, limit: int, timeout: float | None = None, wait: int = ADAPTIVE
    ) -> npt.NDArray[Any]:
        """Receive 1 to `limit` messages as an array of `dtype`; an empty one when `timeout` seconds passed.

        Raises MessageSizeError when the next message is not one record long, UsageError for a dtype that holds Python
        objects: their bytes would be pointers that the peer chose.
        """
        import numpy as np

        records = np.empty(limit, dtype)
        size = _record_size(records.dtype)
        count = self.recv_packed(records.view(np.uint8).data, size, timeout, wait) if limit else 0
        return records[:count]

    # -- asyncio ----------------------------------------------------------------------------------------------

    async def arecv(self, timeout: float | None = None) -> bytes:
        """`recv`: waits in the event loop. Raises DeadlineError after `timeout` seconds."""
        async with _deadline(timeout, "no message"):
            while (message := self.try_recv()) is None:
                await self._wait(self.arm_recv)
            return message

    async def arecv_many(self, limit: int, timeout: float | None = None) -> list[bytes]:
        """`recv_many`: 1 to `limit` messages; none when `timeout` seconds passed."""
        try:
            async with _deadline(timeout, "no message"):
                while not (messages := self.recv_many(limit, timeout=0)) and limit:
                    await self._wait(self.arm_recv)
                return messages
        except DeadlineError:
            return []

    async def areceive(self, timeout: float | None = None) -> Payload:
        """`receive`: the next message in place. Raises DeadlineError after `timeout` seconds."""
        async with _deadline(timeout, "no message"):
            return await self._retry(lambda: self.receive(timeout=0), DeadlineError, self.arm_recv)

    async def asend(self, data: Buffer, tag: int = 0, timeout: float | None = None) -> None:
        """`send`: waits for room in the event loop. Raises DeadlineError after `timeout` seconds."""
        async with _deadline(timeout, "no room to send"):
            await self._retry(lambda: self.send(data, tag, 0), FullError, self.arm_send)

    async def asend_many(self, messages: Sequence[bytes], tag: int = 0, timeout: float | None = None) -> int:
        """`send_many`: returns how many went, which is all of them unless `timeout` seconds passed."""
        sent = 0
        try:
            async with _deadline(timeout, "no room to send"):
                while (sent := sent + self.send_many(messages[sent:], tag, 0)) < len(messages):
                    await self._wait(self.arm_send)
        except DeadlineError:
            pass  # the count says it
        return sent

    async def asend_array(self, records: npt.NDArray[Any], tag: int = 0, timeout: float | None = None) -> int:
        """`send_array`: returns how many went, which is all of them unless `timeout` seconds passed."""
        flat, sent = records.reshape(-1), 0
        try:
            async with _deadline(timeout, "no room to send"):
                while (sent := sent + self.send_array(flat[sent:], tag, 0)) < len(flat):
                    await self._wait(self.arm_send)
        except DeadlineError:
            pass  # the count says it
        return sent

    async def arecv_array(
        self, dtype: npt.DTypeLike, limit: int, timeout: float | None = None
    ) -> npt.NDArray[Any]:
        """`recv_array`: 1 to `limit` records; none when `timeout` seconds passed."""
        records = self.recv_array(dtype, limit, 0)
        try:
            async with _deadline(timeout, "no message"):
                while limit and not len(records):
                    await self._wait(self.arm_recv)
                    records = self.recv_array(dtype, limit, 0)
        except DeadlineError:
            pass  # an empty array says it
        return records

    async def aloan(self, size: int, timeout: float | None = None) -> Loan:
        """`loan`: waits for pool memory in the event loop. Raises DeadlineError after `timeout` seconds."""
        async with _deadline(timeout, "no pool memory"):
            return await self._retry(lambda: self.loan(size, 0), FullError, self.arm_send)

    async def asend_loan(self, loan: Loan, tag: int = 0, timeout: float | None = None) -> None:
        """`send_loan`; the loan is still the caller's when it raises DeadlineError."""
        async with _deadline(timeout, "no room to send"):
            await self._retry(lambda: self.send_loan(loan, tag, 0), FullError, self.arm_send)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[bytes]:
        """Messages until this end is closed; every other end of the channel raises."""
        while True:
            try:
                message = await self.arecv()
            except ClosedError:
                return
            yield message

    async def _retry(self, attempt: Callable[[], T], not_yet: type[Exception], arm: Callable[[], bool]) -> T:
        while True:
            try:
                return attempt()
            except not_yet:
                await self._wait(arm)

    async def _wait(self, arm: Callable[[], bool]) -> None:
        """Wait for this end's bell, having armed it with the reader in place: no ring in between is lost.

        Returns for any ring, also for others' and for changes of state: the caller looks again. The reader is in the
        loop only while somebody waits, so that a forgotten channel keeps nothing alive.
        """
        loop = asyncio.get_running_loop()
        fd = self.fileno()
        waiter: Waiter = (loop, loop.create_future())
        if not any(other is loop for other, _ in self._waiters):
            loop.add_reader(fd, self._rung)
        self._waiters.append(waiter)
        try:
            # A paused channel does not give what it holds; the kernel rings when it goes on.
            if arm() or self.state == "paused":
                await waiter[1]
        finally:
            self._waiters.remove(waiter)
            if not any(other is loop for other, _ in self._waiters):
                loop.remove_reader(fd)

    def _rung(self) -> None:
        # Before the waiters look: what is rung after this line wakes them again.
        self.drain_bell()
        self._wake_all()

    def _wake_all(self) -> None:
        # The bell is one, and other loops may wait for it as well: whoever hears it tells all.
        for loop, future in list(self._waiters):
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@asynccontextmanager
async def _deadline(seconds: float | None, what: str) -> AsyncIterator[None]:
    if seconds is None:
        yield
        return
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineError(f"{what} within {seconds} s") from None


def _record_size(dtype: np.dtype[Any]) -> int:
    if dtype.hasobject or not dtype.itemsize:
        raise UsageError(f"records of {dtype} cannot be sent", "use a dtype of numbers and fixed-size bytes")
    return dtype.itemsize
