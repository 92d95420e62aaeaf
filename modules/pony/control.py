"""Brings flows between hosts about: listens and dials, lets both sides prove who they are, and tells the engine.

The shell around `setup`: threads, sockets and TLS. What is decided is decided there. Every set-up has a deadline as a
whole, a stranger may say no more than one short line, and no more than `HALF_OPEN` set-ups are under way each way.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from snap.dataplane.errors import NotRunningError, SnapError

from . import setup, streams, wires
from .config import Config
from .identity import Identity
from .setup import Agreed, Go, Hello, Meeting, Reason, SetupError, Turn
from .streams import Stream
from .wires import Wire

DEADLINE: Final = 5.0
"""Seconds that a set-up may take."""

HALF_OPEN: Final = 16
_LOOK: Final = 0.05
"""Seconds between two attempts to accept somebody who knocks, while the engine does not run here, say."""

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""A request to the engine, as plain data. Raises NotRunningError where it does not run."""


@dataclass
class Record:
    """What became of the set-ups with a peer, for operators. `since`: Unix seconds, 0 when there was none."""

    state: str = "idle"
    error: str = ""
    since: float = 0.0

    def become(self, state: str, error: str = "") -> None:
        self.state, self.error, self.since = state, error, time.time()


class _Overtaken(Exception):
    """Another set-up with the same peer counts, or another process has the engine."""


class Control:
    """The set-ups of one host. `listener` and `udp_port` are those of its sockets, which stay the caller's."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        ask: Ask,
        listener: socket.socket,
        udp_port: int,
        deadline: float = DEADLINE,
    ) -> None:
        self.config, self.identity = config, identity
        self._ask, self._listener, self._udp_port, self._deadline = ask, listener, udp_port, deadline
        self.records: dict[str, Record] = {}
        self._pins = identity.pins
        self._names = {pin: name for name, pin in self._pins.items()}
        self._context = identity.listening()
        self._lock = threading.Lock()
        self._meetings: dict[str, Meeting] = {}
        self._guests = threading.BoundedSemaphore(HALF_OPEN)
        self._dials = threading.BoundedSemaphore(HALF_OPEN)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._threads: set[threading.Thread] = set()
        # Another process that shares it may be faster to accept.
        listener.setblocking(False)
        self._thread = threading.Thread(target=self._accept, name="pony listens", daemon=True)
        self._thread.start()

    def want(self, host: str) -> None:
        """The engine has somebody who wants to reach `host`. Returns at once; what comes of it the engine is told."""
        if host == self.config.name:
            self._refuse(host, SetupError(Reason.UNKNOWN, f"{host} is this host: leave its name out"))
            return
        if host not in self._pins:
            self._refuse(
                host,
                SetupError(
                    Reason.UNKNOWN, f"{host} has no certificate here", f"put it into peers/{host}.pem"
                ),
            )
            return
        with self._lock:
            turn = self._meeting(host).dial()
        if turn is None:
            return
        if not self._dials.acquire(blocking=False):
            self._end(host, turn)
            return
        self._spawn(self._dial, host, turn)

    def close(self) -> None:
        """No more set-ups; those under way end first."""
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        for thread in list(self._threads):
            thread.join()
        os.close(self._stop_fd)

    # -- who dials --------------------------------------------------------------------------------------------

    def _dial(self, host: str, turn: Turn) -> None:
        record = self._record(host)
        record.become("setting up")
        try:
            with self._judging():
                with self._connected(host) as (stream, address):
                    agreed = self._greet(host, turn, stream, address)
                record.become("connected")
                _log(f"{host}: {_words(agreed)}")
        except _Overtaken:
            record.become("idle")
        except SetupError as error:
            if error.reason is Reason.CROSSED or not self._holds(host, turn):
                record.become("idle")
            else:
                self._refuse(host, error)
        finally:
            self._end(host, turn)
            self._dials.release()

    @contextmanager
    def _connected(self, host: str) -> Iterator[tuple[Stream, str]]:
        """A stream to `host`, which has proved who it is, and its address."""
        where = self.config.address_of(host)
        if where is None:
            raise SetupError(Reason.UNKNOWN, f"{host} has no address", f"add [peers.{host}] to pony.toml")
        end = time.monotonic() + self._deadline
        with streams.connect(host, where, self.config.family, self._deadline) as raw:
            address = raw.getpeername()[0]
            with Stream.over(self.identity.dialing(host), raw, False, end) as stream:
                if stream.pin != self._pins[host]:
                    raise SetupError(
                        Reason.UNAUTHENTICATED, f"who answers for {host} has another certificate"
                    )
                yield stream, address

    def _greet(self, host: str, turn: Turn, stream: Stream, address: str) -> Agreed:
        own = self._hello(host, address)
        with self._lock:
            if not self._meeting(host).offer(turn):
                raise _Overtaken
        # It may have refused us already, and said why.
        with contextlib.suppress(OSError):
            stream.send(own)
        said = stream.receive()
        if said is None:
            raise SetupError(Reason.UNREACHABLE, f"{host} ended the connection")
        theirs = setup.check(own, said, host)
        agreed = setup.agree(own, theirs, address)
        near = theirs.wire and setup.one_machine(own, theirs)
        with wires.taken(theirs.wire) if near else nullcontext() as wire:
            self._attach(agreed, turn, wire)
        stream.send(Go(wire is not None))
        return agreed

    # -- who listens ------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        while True:
            if any(fd == self._stop_fd for fd, _ in poll.poll()):
                return
            if not self._runs():
                # The socket is shared with the process that has the engine: that one accepts.
                time.sleep(_LOOK)
                continue
            try:
                raw, where = self._listener.accept()
            except BlockingIOError:
                continue  # it went away again, or another process was faster
            except OSError:
                time.sleep(_LOOK)  # out of descriptors, say
                continue
            if self._guests.acquire(blocking=False):
                self._spawn(self._serve, raw, where[0])
            else:
                raw.close()

    def _serve(self, raw: socket.socket, address: str) -> None:
        host = ""
        end = time.monotonic() + self._deadline
        try:
            with raw, self._judging(), Stream.over(self._context, raw, True, end) as stream:
                host = self._names.get(stream.pin, "")
                if not host:
                    raise SetupError(Reason.UNAUTHENTICATED, "nobody's certificate that is known here")
                try:
                    with self._judging():
                        self._answer(host, stream, address)
                except SetupError as error:
                    stream.turn_away(error)
                    raise
        except _Overtaken:
            pass
        except SetupError as error:
            if error.reason is not Reason.CROSSED:
                if host:
                    self._record(host).become("failed", error.message)
                _log(f"{host or address}: {error}")
        finally:
            self._guests.release()

    def _answer(self, host: str, stream: Stream, address: str) -> None:
        greeting = stream.receive()
        if greeting is None:
            raise _Overtaken
        with self._lock:
            turn = self._meeting(host).hear()
        if turn is None:
            raise SetupError(Reason.CROSSED, "the set-up from here goes on")
        try:
            own = self._hello(host, address)
            theirs = setup.check(own, greeting, host)
            agreed = setup.agree(own, theirs, address)
            near = setup.one_machine(own, theirs)
            with wires.offered(agreed.mtu) if near else nullcontext() as offer:
                stream.send(msgspec.structs.replace(own, wire=offer.told) if offer else own)
                if offer:
                    offer.serve(stream)
                go = stream.receive()
                if go is None:
                    raise _Overtaken
                if not isinstance(go, Go):
                    raise SetupError(Reason.PROTOCOL, f"{host} did not go on as agreed")
                self._attach(agreed, turn, offer.wire if offer and offer.taken and go.wire else None)
            self._record(host).become("connected")
            _log(f"{host}: {_words(agreed)}")
        finally:
            self._end(host, turn)

    # -- both -------------------------------------------------------------------------------------------------

    def _hello(self, host: str, address: str) -> Hello:
        encrypt = self.config.encryption == "required"
        return Hello(
            name=self.config.name,
            to=host,
            versions=[*self.config.versions],
            mtu=streams.path_payload(self.config.family, address),
            flow=int(self._ask({"do": "reserve", "host": host})["flow"]),
            port=self._udp_port,
            address=self.config.advertise,
            encrypt=encrypt,
            secret=os.urandom(setup.SECRET_BYTES).hex(),
            features=[*setup.FEATURES, *(wires.machine() if self.config.shared_memory else [])],
        )

    def _attach(self, agreed: Agreed, turn: Turn, wire: Wire | None) -> None:
        """Under the lock: what the engine was told last is what counts."""
        keys = agreed.keys
        with self._lock:
            if not self._meeting(agreed.host).holds(turn):
                raise _Overtaken
            self._ask(
                {
                    "do": "attach",
                    "host": agreed.host,
                    "remote": agreed.remote,
                    "address": agreed.address,
                    "version": agreed.version,
                    "mtu": agreed.mtu,
                    "algorithm": self.config.algorithm,
                    "keys": None
                    if keys is None
                    else {"send": keys.send.hex(), "receive": keys.receive.hex()},
                    "wire": None if wire is None else wire.request(),
                }
            )

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """What goes wrong inside, as SetupError."""
        try:
            yield
        except (SetupError, _Overtaken):
            raise
        except NotRunningError:
            raise _Overtaken from None  # another generation has the engine, and its peers will come again
        except SnapError as error:
            raise SetupError(Reason.ENGINE, str(error)) from error
        except TimeoutError:
            raise SetupError(Reason.TIMEOUT, "the other end was silent, or slow") from None
        except ssl.SSLError as error:
            what = error.reason or str(error)
            raise SetupError(Reason.UNAUTHENTICATED, what.lower().replace("_", " ")) from error
        except OSError as error:
            raise SetupError(Reason.UNREACHABLE, error.strerror or str(error)) from error

    def _refuse(self, host: str, error: SetupError) -> None:
        self._record(host).become("failed", error.message)
        _log(f"{host}: {error}")
        with contextlib.suppress(SnapError):
            self._ask({"do": "refuse", "host": host, "why": error.message})

    def _runs(self) -> bool:
        try:
            self._ask({"do": "flows"})
        except NotRunningError:
            return False
        except SnapError:
            pass  # it runs, and will say so again
        return True

    def _record(self, host: str) -> Record:
        """Of names that an application made up nothing is kept."""
        known = host in self._pins or host in self.config.peers
        return self.records.setdefault(host, Record()) if known else Record()

    def _meeting(self, host: str) -> Meeting:
        return self._meetings.setdefault(host, Meeting(self.config.name, host))

    def _holds(self, host: str, turn: Turn) -> bool:
        with self._lock:
            return self._meeting(host).holds(turn)

    def _end(self, host: str, turn: Turn) -> None:
        with self._lock:
            self._meeting(host).end(turn)

    def _spawn(self, work: Callable[..., None], *arguments: Any) -> None:
        def run() -> None:
            try:
                work(*arguments)
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=run, name="pony set-up", daemon=True)
        self._threads.add(thread)
        thread.start()


def _words(agreed: Agreed) -> str:
    keys = "in clear" if agreed.keys is None else "encrypted"
    return f"flow {agreed.remote} at {agreed.address}, version {agreed.version}, {agreed.mtu} bytes, {keys}"


def _log(text: str) -> None:
    """A line of the module's log, whatever names applications and peers use."""
    shown = "".join(each if each.isprintable() else "?" for each in text)
    print(f"pony: {shown}", file=sys.stderr, flush=True)
