"""The module's own class: sockets that outlive its processes, and the control side of its engine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any, Final

from snap.dataplane.errors import ResourceError, SnapError
from snap.ipc.paths import config_dir
from snap.modules import Module

from . import config, identity
from .config import Config
from .control import Control

ENGINE: Final = "pony"
_BACKLOG: Final = 64


class PonyModule(Module):
    """Without a `pony.toml` it opens nothing, and tells who wants to reach another host so."""

    control: Control | None = None
    listener: socket.socket | None = None

    def on_start(self) -> None:
        self.sockets: list[socket.socket] = []
        directory = config_dir()
        found = config.load(directory)
        if found is None:
            return
        who = identity.load(directory)
        self.listener = self._socket("tcp", found, socket.SOCK_STREAM, found.tcp_port)
        self.listener.listen(_BACKLOG)
        for index in range(found.paths):
            port = found.udp_port if index == 0 else 0
            self.sockets.append(self._socket(f"udp.{index}", found, socket.SOCK_DGRAM, port))
        for index in range(found.paths, config.MOST_PATHS):
            if self.kept(f"udp.{index}") is not None:
                self.keep(f"udp.{index}", None)
        port = self.sockets[0].getsockname()[1]
        self.control = Control(found, who, self.ask_engine, self.listener, port)

    def descriptors(self, engine: str) -> list[int]:
        return [each.fileno() for each in self.sockets]

    def on_said(self, engine: str, said: bytes) -> None:
        host = json.loads(said).get("want")
        if not isinstance(host, str):
            return
        if self.control is not None:
            self.control.want(host)
        else:
            why = f"this host keeps to itself: there is no {config_dir() / config.FILE}"
            # By now another process may have the engine: it is told there.
            with contextlib.suppress(SnapError):
                self.ask_engine({"do": "refuse", "host": host, "why": why})

    def ask_engine(self, request: dict[str, Any]) -> dict[str, Any]:
        """Raises NotRunningError where the engine does not run, and what it raises."""
        answer: dict[str, Any] = json.loads(self.request(ENGINE, json.dumps(request).encode()))
        return answer

    def _socket(self, name: str, found: Config, kind: socket.SocketKind, port: int) -> socket.socket:
        """The one that an earlier generation kept, if it is bound as the configuration says; else a new one, which is
        kept. Raises ResourceError."""
        fd = self.kept(name)
        if fd is not None:
            kept = socket.socket(fileno=os.dup(fd))
            address, bound = kept.getsockname()[:2]
            if kept.family == found.family and address == found.listen and port in (0, bound):
                return kept
            kept.close()
        made = socket.socket(found.family, kind | socket.SOCK_CLOEXEC)
        try:
            if kind == socket.SOCK_STREAM:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if found.family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((found.listen, port))
        except OSError as error:
            made.close()
            raise ResourceError(
                f"cannot bind {kind.name[5:].lower()} {found.listen} port {port}: {error.strerror}",
                f"choose other ports in {config_dir() / config.FILE}",
            ) from error
        self.keep(name, made.fileno())
        return made
