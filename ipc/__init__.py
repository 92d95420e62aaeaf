"""What both ends of a connection share, and what an application imports:

    from snap.ipc import connect

    with connect() as client, client.open("echo") as channel:
        channel.send(b"hello")
        print(channel.recv(timeout=1.0))

Everything but the errors is imported on first use, so that the kernel and `snapctl` pay only for what they need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from snap.dataplane.errors import (
    BusyError,
    ChannelError,
    ClosedError,
    DeadlineError,
    DeniedError,
    FaultedError,
    FullError,
    HandleError,
    ManifestError,
    MessageSizeError,
    NotFoundError,
    NotRunningError,
    PeerGoneError,
    PolicyError,
    ProtocolError,
    QuotaError,
    ReleasedError,
    ResourceError,
    RevokedError,
    RolledBackError,
    SchemaError,
    SnapError,
    StateDamagedError,
    StateError,
    StateFullError,
    StateLostError,
    UnreachableError,
    UsageError,
)

if TYPE_CHECKING:
    from snap.dataplane._native import ADAPTIVE, BLOCK, SPIN, Loan, Payload

    from .channel import Channel
    from .client import AsyncClient, Client, Service, aconnect, connect, open_channel

__all__ = [
    "ADAPTIVE",
    "BLOCK",
    "SPIN",
    "AsyncClient",
    "BusyError",
    "Channel",
    "ChannelError",
    "Client",
    "ClosedError",
    "DeadlineError",
    "DeniedError",
    "FaultedError",
    "FullError",
    "HandleError",
    "Loan",
    "ManifestError",
    "MessageSizeError",
    "NotFoundError",
    "NotRunningError",
    "Payload",
    "PeerGoneError",
    "PolicyError",
    "ProtocolError",
    "QuotaError",
    "ReleasedError",
    "ResourceError",
    "RevokedError",
    "RolledBackError",
    "SchemaError",
    "Service",
    "SnapError",
    "StateDamagedError",
    "StateError",
    "StateFullError",
    "StateLostError",
    "UnreachableError",
    "UsageError",
    "aconnect",
    "connect",
    "open_channel",
]

_NATIVE: Final = "snap.dataplane._native"
_CLIENT: Final = "snap.ipc.client"
_LAZY: Final = {
    "ADAPTIVE": _NATIVE,
    "BLOCK": _NATIVE,
    "SPIN": _NATIVE,
    "Loan": _NATIVE,
    "Payload": _NATIVE,
    "Channel": "snap.ipc.channel",
    "AsyncClient": _CLIENT,
    "Client": _CLIENT,
    "Service": _CLIENT,
    "aconnect": _CLIENT,
    "connect": _CLIENT,
    "open_channel": _CLIENT,
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
