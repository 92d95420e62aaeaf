"""What happened: the last events in a ring, totals per kind for ever, and whoever wants to hear of each one.

Every event is also a line of JSON in the kernel's log. Files here are bounded: a full one becomes `.1`, once.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final, TextIO

import structlog

from snap.ipc.protocol import EventView

RING: Final = 4096
LOG_BYTES: Final = 4 * 1024 * 1024
_WARNINGS: Final = (
    "failed",
    "backoff",
    "broken",
    "misbehaved",
    "killed",
    "refused",
    "timeout",
    "fault",
    "exhausted",
)
_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class BoundedFile:
    """An append-only text file of at most `limit` bytes, and its predecessor. A full disk loses lines, nothing else."""

    def __init__(self, path: Path, limit: int = LOG_BYTES) -> None:
        self._path, self._limit = path, limit
        self._file = self._open()

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")
        try:
            if self._file.tell() + len(data) > self._limit:
                self._rotate()
            self._file.write(data)
        except OSError:
            return 0
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        with suppress(FileNotFoundError):  # somebody tidied up
            self._path.rename(self._path.with_name(self._path.name + ".1"))
        self._file.close()
        self._file = self._open()

    def _open(self) -> io.FileIO:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return io.FileIO(os.open(self._path, flags, 0o600), "ab")


class _Tee:
    """What structlog writes to: the kernel's log, and standard error when the kernel is in the foreground."""

    def __init__(self, file: BoundedFile, stderr: TextIO | None) -> None:
        self._file, self._stderr = file, stderr

    def write(self, text: str) -> None:
        self._file.write(text)
        if self._stderr is not None:
            self._stderr.write(text)

    def flush(self) -> None:
        if self._stderr is not None:
            self._stderr.flush()


class Events:
    """Emit with `emit`; `listeners` are called with each event, and must neither raise nor block."""

    def __init__(self, log: Path | None = None, foreground: bool = False, level: str = "info") -> None:
        self.totals: Counter[str] = Counter()
        self.listeners: list[Callable[[EventView], None]] = []
        self._ring: deque[EventView] = deque(maxlen=RING)
        self._seq = 0
        self._file = BoundedFile(log) if log is not None else None
        self._log: Any = None
        if self._file is not None:
            self._log = structlog.wrap_logger(
                structlog.WriteLogger(_Tee(self._file, sys.stderr if foreground else None)),  # type: ignore[arg-type]
                processors=[
                    structlog.processors.add_log_level,
                    structlog.processors.TimeStamper(fmt="iso"),
                    structlog.processors.JSONRenderer(),
                ],
                wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
            )

    def emit(self, kind: str, subject: str, **data: Any) -> None:
        self._seq += 1
        event = EventView(seq=self._seq, time=time.time(), kind=kind, subject=subject, data=data)
        self._ring.append(event)
        self.totals[kind] += 1
        if self._log is not None:
            write = self._log.warning if kind.endswith(_WARNINGS) else self._log.info
            write(
                kind,
                subject=subject,
                **{f"{key}_" if key in ("event", "subject") else key: value for key, value in data.items()},
            )
        for listener in self.listeners:
            listener(event)

    def since(self, seq: int, limit: int) -> list[EventView]:
        """Events after `seq` that the ring still holds, oldest first, at most `limit`."""
        if not self._ring:
            return []
        skip = max(0, seq + 1 - self._ring[0].seq)
        return list(islice(self._ring, skip, skip + limit))

    def record(self) -> dict[str, Any]:
        return {"seq": self._seq, "totals": dict(self.totals)}

    def restore(self, record: dict[str, Any]) -> None:
        """Numbers go on where the earlier kernel was: none is used twice, none is left out."""
        self._seq += record["seq"]
        self.totals.update(record["totals"])

    def close(self) -> None:
        self.listeners.clear()
        if self._file is not None:
            self._file.close()
