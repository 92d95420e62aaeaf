"""Hosts of Pony for tests: real sockets and TLS on loopback, and an engine that writes down what it is told."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

from snap.dataplane.errors import NotRunningError
from snap.modules.pony import identity
from snap.modules.pony.config import Config, Peer
from snap.modules.pony.control import Control


class FakeEngine:
    """Answers as the native engine does."""

    def __init__(self) -> None:
        self.running = True
        self.flows: dict[str, int] = {}
        self.attached: dict[str, list[dict[str, Any]]] = {}
        self.refused: dict[str, list[str]] = {}
        self.segments: list[tuple[int, int]] = []
        """Of each wire that it was given: side, and inode of the segment."""

        self.hold: threading.Event | None = None
        """When there, the first to reserve waits for it."""

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        if not self.running:
            raise NotRunningError("it runs elsewhere")
        do, host = request["do"], request.get("host", "")
        if do == "reserve":
            if (hold := self.hold) is not None:
                self.hold = None
                assert hold.wait(20)
            return {"flow": self.flows.setdefault(host, 100 + len(self.flows))}
        if do == "attach":
            if (wire := request["wire"]) is not None:
                self.segments.append((wire["side"], os.fstat(wire["fds"][0]).st_ino))
            self.attached.setdefault(host, []).append(request)
        elif do == "refuse":
            self.refused.setdefault(host, []).append(request["why"])
        return {"flows": [{"host": host} for host in self.attached], "regions": []}


class Side:
    """One host on loopback."""

    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        self.name, self.folder, self.options = name, folder / name, options
        self.engine = FakeEngine()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.udp_port = 40_000 + len(name)
        self.control: Control | None = None
        identity.make(self.folder, name)

    def knows(self, other: Side, name: str = "", certificate: Path | None = None) -> None:
        name = name or other.name
        folder = self.folder / identity.PEERS
        folder.mkdir(exist_ok=True)
        source = certificate or other.folder / identity.CERTIFICATE
        (folder / f"{name}.pem").write_text(source.read_text())
        peers = self.options.setdefault("peers", {})
        peers[name] = Peer(address=f"127.0.0.1:{other.port}")

    def start(self, deadline: float = 20.0) -> Control:
        config = Config(name=self.name, listen="127.0.0.1", **self.options)
        who = identity.load(self.folder)
        self.control = Control(config, who, self.engine, self.listener, self.udp_port, deadline)
        return self.control

    def close(self) -> None:
        if self.control is not None:
            self.control.close()
        self.listener.close()
