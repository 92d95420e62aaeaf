"""The bootstrap socket: applications connect here, are told who they are, and get descriptors."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from snap.dataplane.errors import ProtocolError, QuotaError
from snap.ipc import protocol, seqpacket

from .audit import AuditLog, AuditRecord
from .desk import Desk
from .events import Events
from .link import Connection
from .policy import Identity
from .principals import Principal
from .record import Outbox
from .store import Store
from .takeover import Take

BACKLOG: Final = 128
ACCEPTS: Final = 16
PER_UID: Final = 256
HELLO_DEADLINE: Final = 10.0
PAUSE: Final = 0.5
_DECODER: Final[protocol.Decoder[Any]] = protocol.Decoder(protocol.FromPrincipal)
_ANSWERS: Final[protocol.Decoder[Any]] = protocol.Decoder(protocol.ToPrincipal)


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, for its owner alone. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.bind(os.fspath(path))
        path.chmod(0o600)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


class Application:
    """One connection: says Hello, then makes requests; anything else ends it."""

    def __init__(self, server: Bootstrap, sock: socket.socket, identity: Identity, number: int) -> None:
        self.identity, self.number = identity, number
        self._server = server
        self._adopted = False
        self._principal: Principal | None = None
        server.store.put(f"app.{number}", [sock.fileno()])
        self._connection = Connection(
            sock, self._on_message, self._on_bad, self._on_closed, outbox=server.outbox
        )
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(HELLO_DEADLINE, self.close, "it did not say Hello in time")

    def close(self, reason: str) -> None:
        self._connection.close(reason)

    def record(self) -> list[Any]:
        who = self.identity
        owner = None if self._principal is None else self._principal.id
        return [self.number, who.uid, who.gid, who.pid, owner, self._connection.unsent]

    def adopt(self, principal: dict[str, Any] | None) -> None:
        """Its connection was an earlier kernel's, which knew it as `principal` (None: it had not said Hello)."""
        if principal is not None:
            self._deadline.cancel()
            self._principal = self._server.desk.readmit(principal, self._connection.send, self.close)
        self._adopted = True

    def announce(self, unsent: list[bytes], fds_of: Callable[[Any], list[int]]) -> None:
        """First what the earlier kernel had for it and perhaps did not send, then that it may ask again."""
        for data in unsent:
            message = _ANSWERS.decode(data)
            self._connection.send(message, fds_of(message))
        self._connection.send(protocol.Adopted(kernel_pid=os.getpid()))

    def refuse(self, error: QuotaError | ProtocolError, seq: int = 0) -> None:
        """Say why, then close."""
        self._server.note(self.identity, error.message)
        failure = protocol.Failure(seq=seq, code=error.code, message=error.message, hint=error.hint)
        self._connection.send(failure)
        self.close(f"{error.code}: {error.message}")

    def _on_message(self, data: bytes, fds: list[int]) -> None:
        seqpacket.close_all(fds)
        try:
            if len(data) > protocol.MAX_REQUEST:
                raise ProtocolError(f"request of {len(data)} bytes exceeds {protocol.MAX_REQUEST}")
            message = _DECODER.decode(data)
            if self._principal is None:
                self._hello(message)
            elif isinstance(message, protocol.Hello) and self._adopted:
                self._welcome(message.seq)
            elif isinstance(message, protocol.Hello):
                raise ProtocolError("Hello was said already")
            else:
                self._server.desk.request(self._principal, message)
        except ProtocolError as error:
            self.refuse(error)

    def _hello(self, message: Any) -> None:
        if not isinstance(message, protocol.Hello):
            raise ProtocolError(f"{type(message).__name__} before Hello")
        if message.version != protocol.PROTOCOL_VERSION:
            raise ProtocolError(
                f"protocol version {message.version}; this kernel speaks {protocol.PROTOCOL_VERSION}",
                "use the snap.ipc of this kernel's release",
            )
        self._deadline.cancel()
        who = self.identity
        name, badge = f"app:{who.pid}.{self.number}", f"uid:{who.uid}/pid:{who.pid}"
        self._principal = self._server.desk.admit(
            name, badge, who, self._connection.send, self.close, message.name
        )
        self._welcome(message.seq)

    def _welcome(self, seq: int) -> None:
        assert self._principal is not None
        self._connection.send(protocol.Welcome(seq=seq, principal=self._principal.id, kernel_pid=os.getpid()))

    def _on_bad(self, error: ProtocolError) -> None:
        self.refuse(error)

    def _on_closed(self, reason: str) -> None:
        self._deadline.cancel()
        self._server.store.remove(f"app.{self.number}")
        self._server.forget(self)
        if self._principal is not None:
            self._server.desk.dismiss(self._principal, reason)


class Bootstrap:
    """Accepts applications on `sock`, fairly: a bounded number per wake-up, and per uid."""

    def __init__(
        self,
        sock: socket.socket,
        desk: Desk,
        audit: AuditLog,
        events: Events,
        store: Store,
        outbox: Outbox,
    ) -> None:
        self.desk, self.store, self.outbox = desk, store, outbox
        self._sock, self._audit, self._events = sock, audit, events
        self._applications: set[Application] = set()
        self._per_uid: Counter[int] = Counter()
        self._last = 0
        self._announcements: list[tuple[Application, list[bytes]]] = []
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._loop.add_reader(sock, self._acceptable)

    def close(self) -> None:
        """Idempotent."""
        if self._sock.fileno() < 0:
            return
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for application in list(self._applications):
            application.close("the kernel stops")

    def forget(self, application: Application) -> None:
        self._applications.discard(application)
        self._per_uid[application.identity.uid] -= 1
        if not self._per_uid[application.identity.uid]:
            del self._per_uid[application.identity.uid]

    def record(self) -> dict[str, Any]:
        return {"last": self._last, "connections": [each.record() for each in self._applications]}

    def restore(self, record: dict[str, Any], take: Take, principals: dict[str, dict[str, Any]]) -> None:
        """Go on with the connections of an earlier kernel, whose records of `principals` are by name."""
        self._last = record["last"]
        self._announcements = []
        for number, uid, gid, pid, owner, unsent in record["connections"]:
            sock = socket.socket(fileno=take(f"app.{number}")[0])
            application = self._admit(sock, Identity(uid, gid, pid), number)
            application.adopt(None if owner is None else principals.pop(owner))
            self._announcements.append((application, unsent))

    def announce(self, fds_of: Callable[[Any], list[int]]) -> None:
        """When all is restored. `fds_of` gives the descriptors that go with a message."""
        for application, unsent in self._announcements:
            application.announce(unsent, fds_of)
        self._announcements = []

    def note(self, identity: Identity, reason: str) -> None:
        """A connection was refused or misused."""
        badge = f"uid:{identity.uid}/pid:{identity.pid}"
        self._audit.write(
            AuditRecord(action="bootstrap", outcome="denied", badge=badge, pid=identity.pid, reason=reason)
        )
        self._events.emit("bootstrap.refused", badge, reason=reason)

    def _acceptable(self) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._rest(error)
                return
            self._accept(sock)

    def _accept(self, sock: socket.socket) -> None:
        try:
            who = seqpacket.peer_credentials(sock)
        except OSError:
            sock.close()
            return
        self._last += 1
        application = self._admit(sock, Identity(who.uid, who.gid, who.pid), self._last)
        if self._per_uid[who.uid] > PER_UID:
            application.refuse(
                QuotaError(f"uid {who.uid} has {PER_UID} connections", "share a connection, or close some")
            )

    def _admit(self, sock: socket.socket, who: Identity, number: int) -> Application:
        self._per_uid[who.uid] += 1
        application = Application(self, sock, who, number)
        self._applications.add(application)
        return application

    def _rest(self, error: OSError) -> None:
        """Out of descriptors: those who wait stay in the socket's backlog; all others go on."""
        self._events.emit("bootstrap.exhausted", "kernel", error=error.strerror)
        self._loop.remove_reader(self._sock)
        self._pause = self._loop.call_later(PAUSE, self._resume)

    def _resume(self) -> None:
        self._pause = None
        with suppress(ValueError):
            self._loop.add_reader(self._sock, self._acceptable)
