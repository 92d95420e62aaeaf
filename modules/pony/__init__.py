"""Pony Express: messages and one-sided operations between applications."""

from .aio import AsyncPony
from .client import Pony, Region, Right
from .commands import BURST, INDIRECTION, INLINE_READ, SMALL
from .connection import Connection, Message, Operation
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
    "AsyncPony",
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
