"""The audit log: what was granted, refused and revoked, one JSON object per line, only ever appended."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

import msgspec

from snap.dataplane.errors import ResourceError

_BLOCK: Final = 16 * 1024


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One decision. `cap` and `parent` are ids of capabilities, `owner` the principal whose capability it is (or who
    was refused), `pid` that principal's process, `rule` what allowed it in the first place."""

    action: str
    outcome: Literal["ok", "denied"]
    cap: int | None = None
    parent: int | None = None
    object: str = ""
    rights: list[str] = []
    owner: str = ""
    badge: str = ""
    pid: int | None = None
    rule: str = ""
    reason: str = ""


class AuditLog:
    """Appends records to a file that only its owner may read.

    `write` never raises and never blocks on anything but the disk: what cannot be written is counted, and the first
    line that can be written again is preceded by one that says how many were lost.
    """

    def __init__(self, path: Path, clock: Callable[[], int] = time.time_ns) -> None:
        """`clock` gives Unix nanoseconds. Raises ResourceError when `path` cannot be opened as a regular file."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise ResourceError(f"cannot open the audit log {path}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise ResourceError(f"cannot open the audit log {path}: not a regular file", "move it away")
        os.fchmod(self._fd, 0o600)
        self._clock = clock
        self._encoder = msgspec.json.Encoder()
        self.lost = 0
        """Records that could not be written and were not yet reported in the log."""

    def write(self, record: AuditRecord) -> None:
        if self.lost and not self._append({"action": "audit.lost", "outcome": "lost", "count": self.lost}):
            self.lost += 1
            return
        self.lost = 0
        if not self._append(msgspec.structs.asdict(record)):
            self.lost = 1

    def tail(self, lines: int) -> list[str]:
        """The last `lines` lines, oldest first; reads no more of the file than they need."""
        if lines <= 0:
            return []
        end = os.fstat(self._fd).st_size
        data = b""
        while end > 0 and data.count(b"\n") <= lines:
            start = max(0, end - _BLOCK)
            data = os.pread(self._fd, end - start, start) + data
            end = start
        return [line.decode("utf-8", "replace") for line in data.split(b"\n") if line][-lines:]

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, fields: dict[str, object]) -> bool:
        line = self._encoder.encode({"time": _rfc3339(self._clock()), **fields}) + b"\n"
        try:
            # A crash or a full disk can leave half a line; ours must not be joined to it.
            if self._torn():
                line = b"\n" + line
            return os.write(self._fd, line) == len(line)
        except OSError:
            return False

    def _torn(self) -> bool:
        size = os.fstat(self._fd).st_size
        return size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"


def _rfc3339(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09}Z"
