"""Two engines of Pony Express in one process, as if on two hosts: real engines, real sockets on loopback, no kernel."""

from __future__ import annotations

import itertools
import json
import os
import socket
from typing import Any, Self

from snap.dataplane import _native
from snap.dataplane.errors import NotRunningError
from snap.modules.pony import Pony
from snap.modules.pony.wires import Wire
from snap.modules.rigs import ChannelPair, memory
from tests.waiting import until

STATE = 256 << 20
ARENA = 4 << 20


class Host:
    """One engine with its sockets and state; applications come with `open`."""

    def __init__(self, name: str, paths: int = 2) -> None:
        self.name = name
        self.sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(paths)]
        for each in self.sockets:
            each.bind(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self.sockets[0].getsockname())
        schema, version, oldest, objects = _native.engine_schema("pony")
        self._fd = memory("state", STATE)
        _native.State.format(self._fd, "pony", schema, version, oldest, objects)
        self._generation = 0
        self._channels: list[ChannelPair] = []
        self._numbers = itertools.count(1)
        self.worker = self._start()
        until(self._runs, "the engine runs")

    def _start(self) -> _native.Worker:
        self._generation += 1
        state = _native.State(self._fd, True)
        return _native.Worker(
            self.name,
            "pony",
            state,
            -1,
            self._generation,
            channels=[(pair.client.id, pair.serve_again(), pair.client.id) for pair in self._channels],
            fds=[each.fileno() for each in self.sockets],
        )

    def _runs(self) -> bool:
        try:
            return bool(self.ask("regions"))
        except NotRunningError:
            return False

    def open(self, arena: int = ARENA) -> Pony:
        pair = ChannelPair(id=next(self._numbers), arena_bytes=arena)
        self._channels.append(pair)
        self.worker.attach(pair.client.id, pair.server, pair.client.id)
        return Pony(pair.client)

    def ask(self, do: str, **more: Any) -> Any:
        return json.loads(self.worker.control(json.dumps({"do": do, **more}).encode()))

    def restart(self) -> None:
        """The engine dies between two polls, and a new one takes over."""
        self.worker.stop(5.0)
        self.worker = self._start()
        until(self._runs, "the engine runs")

    def flow(self, host: str) -> dict[str, Any]:
        found: dict[str, Any] = next(flow for flow in self.ask("flows")["flows"] if flow["host"] == host)
        return found

    def close(self) -> None:
        self.worker.stop(5.0)
        for pair in self._channels:
            pair.close()
        for each in self.sockets:
            each.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def join(
    one: Host,
    two: Host,
    *,
    version: int = 2,
    mtu: int = 1472,
    sealed: bool = False,
    wire: Wire | None = None,
    **more: Any,
) -> None:
    """Set up the flows of two hosts, as their control code would; `wire` stays the caller's."""
    numbers = [host.ask("reserve", host=peer.name)["flow"] for host, peer in ((one, two), (two, one))]
    keys = [os.urandom(32).hex() for _ in range(2)]
    ends = (wire, wire.other()) if wire else (None, None)
    for host, peer, remote, (send, receive), own in (
        (one, two, numbers[1], keys, ends[0]),
        (two, one, numbers[0], keys[::-1], ends[1]),
    ):
        host.ask(
            "attach",
            host=peer.name,
            remote=remote,
            address=peer.address,
            version=version,
            mtu=mtu,
            algorithm=more.get("algorithm", "swift"),
            keys={"send": send, "receive": receive} if sealed else None,
            wire=own.request() if own else None,
        )
