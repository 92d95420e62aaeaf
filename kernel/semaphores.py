"""The semaphores of a kernel: System V ones, for these are given back when their holder dies, whatever kills it.

They outlive every process, so each is noted before it is made: a file in the runtime directory whose name is its key.
What is left when kernel, keeper and modules die at once is found there, and removed by the next kernel.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import sysv_ipc  # type: ignore[import-not-found]

from snap.dataplane.errors import ResourceError

_MODE = 0o600
_FREE = 1


class Semaphores:
    def __init__(self, directory: Path) -> None:
        """`directory` has a file for each; it is made with the first one."""
        self._directory = directory
        self._keys: dict[int, int] = {}
        for path in self._notes():
            number = _number(int(path.name, 16))
            if number is not None:
                self._keys[number] = int(path.name, 16)

    def make(self) -> int:
        """The id of one that is free. Raises ResourceError."""
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            while True:
                key = secrets.randbelow(0x7FFF_FFFF) + 1
                note = self._note(key)
                try:
                    note.touch(_MODE, exist_ok=False)
                except FileExistsError:
                    continue
                try:
                    made = sysv_ipc.Semaphore(key, sysv_ipc.IPC_CREX, mode=_MODE, initial_value=_FREE)
                except sysv_ipc.ExistentialError:
                    note.unlink()  # somebody else has this key
                except BaseException:
                    note.unlink()
                    raise
                else:
                    break
        except OSError as error:
            raise ResourceError(
                f"cannot make a semaphore: {error.strerror or error}", "raise kernel.sem, or see `ipcs -s`"
            ) from error
        number: int = made.id
        self._keys[number] = key
        return number

    def remove(self, number: int) -> None:
        """Whoever waits for it is told; one that is gone already is fine."""
        with suppress(sysv_ipc.ExistentialError):
            sysv_ipc.remove_semaphore(number)
        key = self._keys.pop(number, None)
        if key is not None:
            self._note(key).unlink(missing_ok=True)

    def reclaim(self, used: Collection[int]) -> list[int]:
        """Remove those that are not in `used` and that nobody holds or waits for, and the notes of those that are gone;
        the ids of the removed."""
        left = []
        for number in set(self._keys) - set(used):
            if _is_idle(self._keys[number]):
                self.remove(number)
                left.append(number)
        for path in self._notes():
            if int(path.name, 16) not in self._keys.values():
                path.unlink(missing_ok=True)
        return sorted(left)

    def _notes(self) -> list[Path]:
        return [path for path in self._directory.glob("*") if _is_key(path.name)]

    def _note(self, key: int) -> Path:
        return self._directory / f"{key:08x}"


def _is_key(name: str) -> bool:
    return len(name) == 8 and not set(name) - set("0123456789abcdef")


def _number(key: int) -> int | None:
    """The id of our semaphore with this key."""
    found = _open(key)
    return None if found is None else int(found.id)


def _is_idle(key: int) -> bool:
    found = _open(key)
    try:
        return found is None or (found.value == _FREE and found.waiting_for_nonzero == 0)
    except sysv_ipc.ExistentialError:
        return True


def _open(key: int) -> sysv_ipc.Semaphore | None:
    try:
        found = sysv_ipc.Semaphore(key)
        return found if found.uid == os.geteuid() and found.mode & 0o777 == _MODE else None
    except (sysv_ipc.ExistentialError, sysv_ipc.PermissionsError):
        return None
