"""The control plane's shell: ZeroMQ ROUTER for requests, PUB for events.

Who asks is what the operating system says of the peer (libzmq attaches it to every frame of an `ipc://` connection);
where it says nothing, nothing is allowed. Requests are answered concurrently, each by its deadline.
"""

from __future__ import annotations

import asyncio
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

import zmq
import zmq.asyncio

from snap.dataplane.errors import BusyError, DeadlineError, ProtocolError, ResourceError, SnapError
from snap.ipc import paths, protocol
from snap.ipc.protocol import EventView, Request, Response

from .answers import Answers, Ticket
from .events import Events
from .operators import Operators
from .policy import Identity
from .record import Outbox

IN_FLIGHT: Final = 256
LONGEST: Final = 3600.0
LINGER_MS: Final = 300
_PEER: Final = re.compile(r"[^:]*:(\d+):(\d+):(\d+)")
_DECODER: Final[protocol.Decoder[Request]] = protocol.Decoder(Request)


class Control:
    """Serves `control.sock` and `events.sock` in `directory` until `close`."""

    def __init__(
        self, directory: Path, operators: Operators, answers: Answers, events: Events, outbox: Outbox
    ) -> None:
        """Nothing leaves before `outbox` has recorded what it tells of. Raises ResourceError when a socket
        cannot be bound."""
        self._operators, self._answers = operators, answers
        self._events, self._outbox = events, outbox
        self._unsent: list[EventView] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._paths = [directory / paths.CONTROL, directory / paths.EVENTS]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._router = zmq.asyncio.Socket(self._context, zmq.ROUTER)
        self._publisher = self._context.socket(zmq.PUB)
        try:
            for sock, path in zip((self._router, self._publisher), self._paths, strict=True):
                sock.setsockopt(zmq.LINGER, LINGER_MS)
                sock.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_MESSAGE)
                sock.bind(f"ipc://{path}")
                path.chmod(0o600)
        except (zmq.ZMQError, OSError) as error:
            self._context.destroy(0)
            raise ResourceError(
                f"cannot serve operators in {directory}: {error}",
                "use a shorter --runtime-dir, on a local disk",
            ) from error
        events.listeners.append(self._publish)
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def close(self) -> None:
        self._events.listeners.remove(self._publish)
        self._outbox.flush()
        tasks = [self._serving, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._router.close()
        self._publisher.close()
        self._context.term()
        for path in self._paths:
            with suppress(FileNotFoundError):
                path.unlink()

    def _publish(self, event: EventView) -> None:
        self._unsent.append(event)
        self._outbox.add(self._release)

    def _release(self) -> None:
        unsent, self._unsent = self._unsent, []
        for event in unsent:
            with suppress(zmq.ZMQError, ProtocolError):
                self._publisher.send_multipart(
                    [f"event.{event.kind}".encode(), protocol.encode(event)], zmq.DONTWAIT
                )

    async def _serve(self) -> None:
        while True:
            frames = await self._router.recv_multipart(copy=False)
            task = asyncio.get_running_loop().create_task(self._handle(frames))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _handle(self, frames: list[zmq.Frame]) -> None:
        *envelope, body = frames
        answer = await self._answer(_identity(body), body.bytes)
        self._outbox.flush()
        with suppress(zmq.ZMQError):
            # The peer may have left, or may not read: neither holds up anyone.
            await self._router.send_multipart([*(frame.bytes for frame in envelope), answer], zmq.DONTWAIT)

    async def _answer(self, who: Identity | None, data: bytes) -> bytes:
        try:
            request = _DECODER.decode(data)
        except ProtocolError as error:
            self._events.emit("control.refused", _badge(who), error=error.message)
            return _failure("", error)
        if len(self._tasks) > IN_FLIGHT:
            return _failure(
                request.key, BusyError(f"{IN_FLIGHT} requests are being answered", "try again soon")
            )
        if who is None or not self._operators.changes(request.op):
            return await self._perform(who, request, Ticket())
        # Two callers with one key share one answer, which outlives either of them.
        ticket = self._answers.ticket(who.uid, request.key)
        if ticket.answer is not None:
            return ticket.answer
        if ticket.answering is None:
            ticket.answering = asyncio.ensure_future(self._perform(who, request, ticket))
        return await asyncio.shield(ticket.answering)

    async def _perform(self, who: Identity | None, request: Request, ticket: Ticket) -> bytes:
        ticket.answer = await self._answer_of(who, request, ticket)
        return ticket.answer

    async def _answer_of(self, who: Identity | None, request: Request, ticket: Ticket) -> bytes:
        timeout = min(request.timeout, LONGEST) if math.isfinite(request.timeout) else LONGEST
        try:
            async with asyncio.timeout(timeout):
                result = await self._operators.perform(who, request.op, request.args, timeout, ticket)
            return protocol.encode(Response(key=request.key, ok=True, result=result), protocol.MAX_CONTROL)
        except TimeoutError as error:
            late = DeadlineError(
                f"{request.op} is not done after {timeout:g} s", "give it a longer --timeout"
            )
            return _failure(request.key, error if isinstance(error, SnapError) else late)
        except SnapError as error:
            return _failure(request.key, error)
        except Exception as error:
            # A fault of ours must not leave an operator without an answer, nor end the kernel.
            self._events.emit("control.fault", request.op[:64], error=repr(error))
            return _failure(
                request.key, SnapError(f"the kernel failed at {request.op}: {error!r}", "report this")
            )


def _identity(frame: zmq.Frame) -> Identity | None:
    """Who sent it: `localhost:UID:GID:PID`, from SO_PEERCRED. None when libzmq does not say."""
    try:
        match = _PEER.fullmatch(str(frame.get("Peer-Address")))
    except zmq.ZMQError:
        return None
    if match is None:
        return None
    uid, gid, pid = (int(number) for number in match.groups())
    return Identity(uid, gid, pid)


def _badge(who: Identity | None) -> str:
    return f"uid:{who.uid}/pid:{who.pid}" if who else "unknown"


def _failure(key: str, error: SnapError) -> bytes:
    response = Response(
        key=key[:256], ok=False, code=error.code, message=error.message[:4000], hint=error.hint[:1000]
    )
    return protocol.encode(response)
