"""Every error that Snap raises, in one tree.

A class is a kind of failure that a program may want to tell apart; `code` is its name on the wire and in
JSON, `exit_code` what `snapctl` exits with, `hint` what the reader can do next. The Rust half raises the same
classes. `snap.ipc` re-exports them: applications import them from there.
"""

from __future__ import annotations

from typing import ClassVar


class SnapError(Exception):
    """Base of every error of Snap. `str()` gives the message, followed by the hint when there is one."""

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(SnapError):
    """The request itself is malformed: wrong type, unknown operation, value out of range."""

    code = "usage"
    exit_code = 2


class ManifestError(UsageError):
    """A `module.toml` or the graph of manifests is invalid; the message names file, key and reason."""

    code = "manifest"


class PolicyError(UsageError):
    """The policy file is invalid; the message names file, key and reason."""

    code = "policy"


class NotRunningError(SnapError):
    """The object exists but is not running (a stopped module, a kernel that is down)."""

    code = "not_running"
    exit_code = 3


class NotFoundError(SnapError):
    """No object has that name or handle."""

    code = "not_found"
    exit_code = 4


class HandleError(NotFoundError):
    """A capability handle that is forged, foreign, stale or already revoked."""

    code = "bad_handle"


class DeniedError(SnapError):
    """Policy or the rights of the capability do not allow the request."""

    code = "denied"
    exit_code = 5


class QuotaError(DeniedError):
    """The caller used up its own quota (channels, bytes, descriptors, requests per second)."""

    code = "quota"


class BusyError(SnapError):
    """Somebody else is doing something that excludes this request."""

    code = "busy"
    exit_code = 6


class DeadlineError(SnapError, TimeoutError):
    """The deadline passed before the request completed. Nothing was lost; it may be repeated."""

    code = "timeout"
    exit_code = 7


class UnreachableError(SnapError, ConnectionError):
    """No kernel answers on this runtime directory."""

    code = "unreachable"
    exit_code = 9


class ProtocolError(SnapError):
    """A control message could not be decoded, is oversized, or is out of place."""

    code = "protocol"


class ResourceError(SnapError):
    """The machine is out of something: descriptors, shared memory, processes."""

    code = "resources"


class StateError(SnapError):
    """Base of what can be wrong with an engine's state segment."""

    code = "state"


class StateDamagedError(StateError):
    """The state fails its checks (magic, checksums, bounds); it is kept for inspection and not adopted."""

    code = "state_damaged"


class SchemaError(StateError):
    """The state is of a schema that this code does not know, or newer than it, or older than it can read."""

    code = "schema"


class StateFullError(StateError):
    """A table, slab or the undo log of one poll has no room left; the poll can be taken back."""

    code = "state_full"


class RolledBackError(SnapError):
    """An upgrade failed; the generation before it serves, and nothing was lost."""

    code = "rolled_back"
    exit_code = 8


class ChannelError(SnapError):
    """Base of what can happen to an established channel."""

    code = "channel"


class FullError(ChannelError):
    """The ring or the payload pool is full and the call was not to wait."""

    code = "full"


class MessageSizeError(ChannelError, ValueError):
    """The message is larger than the channel's payload pool can ever hold, or not of the asked size."""

    code = "message_size"


class ClosedError(ChannelError):
    """This end of the channel was closed by its own program."""

    code = "closed"


class RevokedError(ChannelError):
    """The capability behind the channel was revoked or expired. Reopening needs a new grant."""

    code = "revoked"


class PeerGoneError(ChannelError, ConnectionError):
    """The process at the other end died or left. `Channel.reopen()` gets a fresh channel when it is back."""

    code = "peer_gone"


class FaultedError(ChannelError):
    """The other end wrote something that fails its checks; the message names what. The channel is closed for good."""

    code = "faulted"


class StateLostError(ChannelError):
    """The engine behind the channel had to start without its state: what was under way is lost. Reopen the
    channel."""

    code = "state_lost"


class ReleasedError(ChannelError, ValueError):
    """A loan or a received payload was used after it was sent or released."""

    code = "released"


def _all(cls: type[SnapError]) -> dict[str, type[SnapError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_all(sub))
    return found


_BY_CODE = _all(SnapError)


def from_code(code: str, message: str, hint: str = "") -> SnapError:
    """Rebuild an error that crossed a process boundary; an unknown code becomes a plain `SnapError`."""
    return _BY_CODE.get(code, SnapError)(message, hint)
