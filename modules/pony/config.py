"""`pony.toml`: how this host is called, where it listens, and who its peers are. Without the file, Pony is local only.

    name = "alpha"               # default: the system's name
    listen = "0.0.0.0"           # or an address of one interface, or "::"
    encryption = "required"      # or "off": in clear, unless the peer requires it

    [peers.beta]
    address = "10.0.0.2"         # port 4747, or "10.0.0.2:5000"

Beside it: `pony.key` and `pony.pem` of this host (`snapctl pony key` makes them), and `peers/NAME.pem` of each peer.
"""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from snap.dataplane.errors import UsageError
from snap.ipc import tomlfile
from snap.ipc.tomlfile import Table

FILE: Final = "pony.toml"
PORT: Final = 4747
VERSIONS: Final = (1, 2)
MOST_PATHS: Final = 64
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9.-]{0,62}\Z"
_HINT: Final = "docs/pony.md lists the keys of pony.toml"

HostName = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class Peer(Table, frozen=True):
    """`address` is HOST or HOST:PORT; an IPv6 address with a port is in brackets."""

    address: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class Config(Table, frozen=True):
    """Port 0: any that is free. `paths`: source ports of UDP, over which the network spreads what is sent. `advertise`:
    where peers send UDP to; default: the address that they see this host at. `dns`: a peer without an address here is
    looked up by its name. `shared_memory`: instead of UDP, with hosts of this machine that want it too."""

    name: HostName = msgspec.field(default_factory=lambda: socket.gethostname()[:63])
    listen: str = "0.0.0.0"
    tcp_port: Port = PORT
    udp_port: Port = PORT
    advertise: str = ""
    paths: Annotated[int, msgspec.Meta(ge=1, le=MOST_PATHS)] = 4
    encryption: Literal["required", "off"] = "required"
    algorithm: Literal["swift", "timely"] = "swift"
    versions: Annotated[list[Literal[1, 2]], msgspec.Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: list(VERSIONS)
    )
    dns: bool = False
    shared_memory: bool = True
    peers: dict[HostName, Peer] = msgspec.field(default_factory=dict)

    @property
    def family(self) -> socket.AddressFamily:
        """All that this host says to others is of the family of its `listen`."""
        return socket.AF_INET6 if ":" in self.listen else socket.AF_INET

    def address_of(self, host: str) -> tuple[str, int] | None:
        """Where to connect to `host`: a name or an address, and a port. None: nowhere."""
        if (peer := self.peers.get(host)) is not None:
            return split(peer.address)
        return (host, PORT) if self.dns else None


def load(directory: Path) -> Config | None:
    """The configuration in `directory`; None when there is none. Raises UsageError naming file, key and reason."""
    file = directory / FILE
    if not file.exists():
        return None
    config = tomlfile.convert(tomlfile.read(file, UsageError), Config, str(file), UsageError, _HINT)
    for key, value in (("listen", config.listen), ("advertise", config.advertise or config.listen)):
        try:
            found = ipaddress.ip_address(value)
        except ValueError:
            raise UsageError(f"{file}: {key}: {value!r} is no address", _HINT) from None
        if (found.version == 6) != (config.family == socket.AF_INET6):
            raise UsageError(f"{file}: {key}: {value!r} is not of the family of `listen`", _HINT)
    for host, peer in config.peers.items():
        try:
            split(peer.address)
        except ValueError as error:
            raise UsageError(f"{file}: peers.{host}.address: {error}", _HINT) from None
    if config.name in config.peers:
        raise UsageError(f"{file}: peers.{config.name}: that is this host itself", _HINT)
    return config


def split(address: str) -> tuple[str, int]:
    """HOST, HOST:PORT or [IPV6]:PORT as host and port. Raises ValueError."""
    host, port = address, ""
    if address.startswith("["):
        host, closed, port = address[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise ValueError(f"{address!r} is not of the form [IPV6]:PORT")
        port = port[1:]
    elif address.count(":") == 1:
        host, _, port = address.partition(":")
    if not host or (port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536)):
        raise ValueError(f"{address!r} is not of the form HOST:PORT")
    return host, int(port or PORT)
