"""The service manager as the keeper of descriptors: sd_notify(3) and FileDescriptorStoreMax= of systemd.service(5).

Each descriptor is stored under a name of its own, `NAME~INDEX~COUNT`: systemd gives back what bears one name in no
promised order. In NAME, what systemd does not allow or means something here is written as `%XX` (UTF-8).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final
from urllib.parse import quote, unquote

from snap.dataplane.errors import SnapError
from snap.ipc.seqpacket import close_all

from . import sdnotify

VARIABLE: Final = "FDSTORE"
_LONGEST: Final = 255
_STORED: Final = re.compile(r"([^~]+)~(\d+)~(\d+)")


def wanted() -> bool:
    """Whether a service manager (systemd 254 or newer) offers to keep descriptors."""
    return bool(os.environ.get("NOTIFY_SOCKET")) and _limit() > 0


def split(passed: Iterable[tuple[str, int]]) -> tuple[dict[str, list[int]], list[tuple[str, int]]]:
    """What was stored, whole and in order, and the other descriptors that the manager passed.

    A name of which something is missing (its kernel died while it was stored) is closed and left out.
    """
    parts: dict[str, dict[int, int]] = {}
    counts: dict[str, int] = {}
    rest: list[tuple[str, int]] = []
    for label, fd in passed:
        match = _STORED.fullmatch(label)
        if match is None:
            rest.append((label, fd))
            continue
        name, index, count = unquote(match[1]), int(match[2]), int(match[3])
        close_all([old for old in (parts.setdefault(name, {}).pop(index, None),) if old is not None])
        parts[name][index] = fd
        counts[name] = count
    stored: dict[str, list[int]] = {}
    for name, fds in parts.items():
        if sorted(fds) == list(range(counts[name])):
            stored[name] = [fds[index] for index in sorted(fds)]
        else:
            close_all(list(fds.values()))
    return stored, rest


class SystemdStore:
    """A `Store`. That it cannot store something it reports by `report(kind, data)`, once."""

    def __init__(
        self,
        stored: dict[str, list[int]],
        report: Callable[[str, dict[str, object]], None] = lambda kind, data: None,
    ) -> None:
        """`stored` is what `split` found; the descriptors are the store's until they are taken."""
        self._stored, self.report = stored, report
        self.fresh = not stored
        self.held = {name: tuple(fds) for name, fds in stored.items()}
        self._most = _limit()
        self._full = False

    def put(self, name: str, fds: Sequence[int]) -> None:
        self.remove(name)
        self.held[name] = tuple(fds)
        if sum(map(len, self.held.values())) > self._most:
            self._fail(f"more than {self._most} descriptors: raise FileDescriptorStoreMax=")
        for index, fd in enumerate(fds):
            label = _label(name, index, len(fds))
            if len(label) > _LONGEST:
                self._fail(f"the name {name[:64]!r} is too long for systemd")
                return
            # Without FDPOLL=0 systemd drops what reports a hang-up: a process that ended while no kernel was there.
            self._tell(["FDSTORE=1", "FDPOLL=0", f"FDNAME={label}"], [fd])

    def remove(self, name: str) -> None:
        fds = self.held.pop(name, ())
        for index in range(len(fds)):
            self._tell(["FDSTOREREMOVE=1", f"FDNAME={_label(name, index, len(fds))}"])

    def take(self) -> dict[str, list[int]]:
        found, self._stored = self._stored, {}
        return found

    def settle(self) -> None:
        """All is taken over."""

    def detach(self) -> None:
        """Leave it to the kernel that comes next. Idempotent."""
        self.held.clear()

    def close(self) -> None:
        """Nothing is to outlive this kernel. Idempotent."""
        for name in list(self.held):
            self.remove(name)
        for fds in self.take().values():
            close_all(fds)

    def _tell(self, states: list[str], fds: Sequence[int] = ()) -> None:
        try:
            sdnotify.notify(*states, fds=fds)
        except SnapError as error:
            self._fail(error.message)

    def _fail(self, reason: str) -> None:
        if not self._full:
            self._full = True
            self.report("store.exhausted", {"error": reason})


def _limit() -> int:
    text = os.environ.get(VARIABLE, "")
    return int(text) if text.isdecimal() else 0


def _label(name: str, index: int, count: int) -> str:
    # quote() leaves letters, digits and "_.-~" alone.
    return f"{quote(name, safe='').replace('~', '%7E')}~{index}~{count}"
