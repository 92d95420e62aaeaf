"""The operator's side of the control plane: requests over ZeroMQ, and the kernel's events.

A kernel that is not there is told apart from one that is slow: before anything is sent, and whenever the connection
breaks, a plain connect asks the operating system whether anybody listens.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from snap.dataplane.errors import DeadlineError, UnreachableError, UsageError, from_code

from . import paths
from .protocol import MAX_CONTROL, Decoder, EventView, Request, Response, encode

_PAGE: Final = 256
_IDLE_MS: Final = 1000
_RESPONSE: Final[Decoder[Response]] = Decoder(Response, MAX_CONTROL)
_EVENT: Final[Decoder[EventView]] = Decoder(EventView)


class ControlClient:
    """An operator's connection to the kernel of a runtime directory. Any thread may use it, one call at a time."""

    def __init__(self, runtime_dir: str | os.PathLike[str] | None = None, timeout: float = 10.0) -> None:
        self.directory: Final = paths.runtime_dir(runtime_dir)
        self.timeout: Final = timeout
        self._context = zmq.Context()
        self._lock = threading.Lock()
        self._line: _Line | None = None

    def call(self, op: str, timeout: float | None = None, key: str | None = None, **args: Any) -> Any:
        """Have the kernel do `op` and return its result as builtins; `timeout` in seconds (default: the client's).

        `key` makes it idempotent (default: a fresh one): when the connection breaks on the way, the request is
        repeated once, with the same key. Raises the error that the kernel answers with, UnreachableError at once when
        no kernel listens, DeadlineError when it does not answer in time.
        """
        seconds = self.timeout if timeout is None else timeout
        request = Request(key=key or uuid.uuid4().hex, op=op, args=args, timeout=seconds)
        try:
            data = encode(request)
        except TypeError as error:
            raise UsageError(f"arguments of {op} cannot be sent: {error}") from error
        with self._lock:
            response = self._exchange(request.key, op, data, seconds)
        if not response.ok:
            raise from_code(response.code, response.message, response.hint)
        return response.result

    def events(self, kinds: Iterable[str] | None = None, since: int | None = None) -> Iterator[EventView]:
        """What happens, for ever, in order, each once: after event number `since`, or from now on.

        `kinds` are patterns ("module.*"); all by default. Raises UnreachableError when the kernel goes.
        """
        wanted = None if kinds is None else tuple(kinds)
        for event in self._all_events(since):
            if wanted is None or any(fnmatchcase(event.kind, pattern) for pattern in wanted):
                yield event

    def close(self) -> None:
        """Idempotent. What the kernel was asked goes on there."""
        with self._lock:
            self._hang_up()
        self._context.destroy(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _exchange(self, key: str, op: str, data: bytes, seconds: float) -> Response:
        end = time.monotonic() + seconds
        path = self.directory / paths.CONTROL
        probe(path)
        if self._line is None:
            self._line = _Line(self._context, path)
        line = self._line
        line.forget()
        try:
            line.send(data)
            repeated = False
            while True:
                response, lost = line.receive(key, end)
                if response is not None:
                    return response
                if not lost:
                    raise DeadlineError(
                        f"no answer to {op} within {seconds} s", "repeat it with a longer --timeout"
                    )
                probe(path)
                if repeated:
                    raise UnreachableError(f"the kernel hung up twice on {op}")
                line.send(data)
                repeated = True
        except BaseException:
            # A fresh connection next time: nothing of this request is left in it.
            self._hang_up()
            raise

    def _hang_up(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _all_events(self, since: int | None) -> Iterator[EventView]:
        path = self.directory / paths.EVENTS
        probe(path)
        with self._context.socket(zmq.SUB) as live:
            live.linger = 0
            live.subscribe(b"event.")
            live.connect(f"ipc://{path}")
            last = self._newest() if since is None else since
            for event in self._missed(last):
                last = event.seq
                yield event
            while True:
                # When nothing comes, ask: the subscription may have begun later than the last event, or the kernel
                # may have gone, and neither would ever be heard of here.
                if not live.poll(_IDLE_MS):
                    missed, newest = self._missed(last), None
                else:
                    newest = _EVENT.decode(live.recv_multipart()[-1])
                    missed = self._missed(last) if newest.seq > last + 1 else iter(())
                for event in missed:
                    last = event.seq
                    yield event
                if newest is not None and newest.seq > last:
                    last = newest.seq
                    yield newest

    def _missed(self, last: int) -> Iterator[EventView]:
        """What the kernel remembers after event `last`."""
        while page := self.call("events.since", seq=last, limit=_PAGE):
            for event in msgspec.convert(page, list[EventView]):
                last = event.seq
                yield event

    def _newest(self) -> int:
        return max((event.seq for event in self._missed(0)), default=0)


class _Line:
    """One DEALER connection, and the monitor that says when it breaks."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
        self._path = path
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._monitor.linger = 0
        self._socket.connect(f"ipc://{path}")
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def send(self, data: bytes) -> None:
        self._socket.send(data)

    def forget(self) -> None:
        """What broke before a request is no news for it."""
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)

    def receive(self, key: str, end: float) -> tuple[Response | None, bool]:
        """The response to `key`, or whether the connection broke; neither when it has not come until `end`."""
        while (left := end - time.monotonic()) > 0:
            ready = dict(self._poller.poll(min(int(left * 1000) + 1, _IDLE_MS)))
            if not ready:
                # A break while the connection was still being made is never reported.
                probe(self._path)
            if self._socket in ready:
                response = _RESPONSE.decode(self._socket.recv_multipart()[-1])
                if response.key == key:
                    return response, False
            elif self._monitor in ready:
                recv_monitor_message(self._monitor)
                return None, True
        return None, False

    def close(self) -> None:
        self._poller.unregister(self._monitor)
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


def probe(path: Path) -> None:
    """Raises UnreachableError unless somebody listens on the stream socket `path`: a socket file may be stale."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.connect(os.fspath(path))
        except OSError as error:
            # A full backlog: there is a kernel, if a slow one.
            if error.errno != errno.EAGAIN:
                raise UnreachableError(
                    f"no kernel answers on {path}: {error.strerror or error}", "start one with `snapctl up`"
                ) from error
