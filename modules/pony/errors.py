"""How operations end, and the exceptions that say so."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from snap.dataplane.errors import SnapError


class Status(IntEnum):
    """In a completion; the same numbers as in `dataplane/src/pony/command.rs`."""

    OK = 0
    BAD = 1
    NO_CONNECTION = 2
    NO_REGION = 3
    REVOKED = 4
    OUT_OF_RANGE = 5
    DENIED = 6
    TOO_LONG = 7
    NO_PEER = 8
    UNREACHABLE = 9
    CLOSED = 10
    FULL = 11
    NO_MATCH = 12
    TAKEN = 13
    MISALIGNED = 14


class PonyError(SnapError):
    """An operation did not succeed; `status` says how. `done`: operations of a burst that were done before."""

    code = "pony"
    status: Status = Status.BAD
    done: int = 0


class NoPeerError(PonyError):
    code = "pony_no_peer"


class RegionError(PonyError):
    """The region is not there, was revoked, or does not go that far."""

    code = "pony_region"


class RightError(PonyError):
    """The region does not allow that, or not to us."""

    code = "pony_right"


class TooLongError(PonyError):
    code = "pony_too_long"


class ClosedByPeerError(PonyError):
    code = "pony_closed"


class BusyError(PonyError):
    """More is under way than the engine allows."""

    code = "pony_full"


class NoMatchError(PonyError):
    """A scan found no entry."""

    code = "pony_no_match"


_ERRORS: Final[dict[Status, tuple[type[PonyError], str, str]]] = {
    Status.BAD: (
        PonyError,
        "the engine does not understand the operation",
        "use the client of the same release",
    ),
    Status.NO_CONNECTION: (PonyError, "there is no such connection", "it was closed at this end"),
    Status.NO_REGION: (RegionError, "the peer has no such region", "ask it for the handle"),
    Status.REVOKED: (RegionError, "the region was released by its owner", "ask it for another"),
    Status.OUT_OF_RANGE: (RegionError, "outside of the region, or of the arena", "check offset and length"),
    Status.DENIED: (
        RightError,
        "the region does not allow that to this connection",
        "its owner gives rights",
    ),
    Status.TOO_LONG: (TooLongError, "longer than there is a place for", "post a longer place, or send less"),
    Status.NO_PEER: (NoPeerError, "nobody is bound to that name", "start the peer first"),
    Status.UNREACHABLE: (NoPeerError, "the host cannot be reached", "see `snapctl pony peers`"),
    Status.CLOSED: (ClosedByPeerError, "the peer closed the connection, or is gone", "connect again"),
    Status.FULL: (BusyError, "too much is under way", "wait for completions first"),
    Status.NO_MATCH: (NoMatchError, "no entry matches", ""),
    Status.TAKEN: (PonyError, "somebody is bound to that name", "choose another"),
    Status.MISALIGNED: (PonyError, "an atomic operation needs an offset that is a multiple of 8", ""),
}


def failure(number: int, what: str, done: int = 0) -> PonyError:
    """The exception for a completion's status."""
    status = Status(number) if number in Status._value2member_map_ else Status.BAD
    kind, message, hint = _ERRORS[status]
    error = kind(f"{what}: {message}", hint)
    error.status, error.done = status, done
    return error
