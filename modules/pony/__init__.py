"""Pony Express: messages and one-sided operations between applications."""

from .client import (
    BURST,
    INDIRECTION,
    INLINE_READ,
    SMALL,
    Connection,
    Message,
    Operation,
    Pony,
    Region,
    Right,
)
from .errors import (
    BusyError,
    ClosedByPeerError,
    NoMatchError,
    NoPeerError,
    PonyError,
    RegionError,
    RightError,
    Status,
    TooLongError,
)
from .places import Place

__all__ = [
    "BURST",
    "INDIRECTION",
    "INLINE_READ",
    "SMALL",
    "BusyError",
    "ClosedByPeerError",
    "Connection",
    "Message",
    "NoMatchError",
    "NoPeerError",
    "Operation",
    "Place",
    "Pony",
    "PonyError",
    "Region",
    "RegionError",
    "Right",
    "RightError",
    "Status",
    "TooLongError",
]
