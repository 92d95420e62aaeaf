"""What is sent: a directory tree, cut into chunks. Names are bytes: a file system promises no encoding."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from .frames import FIRST, LAST

CHUNK_BYTES: Final = 64 * 1024
# Beside the standard library in the same folder, and not of it.
NOT_STANDARD: Final = frozenset({b"site-packages", b"dist-packages", b"__pycache__"})


class Chunk(NamedTuple):
    """`size` bytes from `offset` of file number `file`; `flags` as in `frames`."""

    file: int
    offset: int
    size: int
    flags: int


@dataclass
class Plan:
    """`chunks` in the order in which they are sent; the last one carries nothing, so that an empty tree has one."""

    root: bytes
    files: list[bytes] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def scan(root: Path, without: frozenset[bytes] = frozenset()) -> Plan:
    """Plan every regular file below `root`, except in folders named in `without`.

    Symbolic links and special files are counted in `skipped`, what cannot be opened or listed is named in
    `unreadable` with the reason. Raises OSError when `root` itself cannot be listed.
    """
    plan = Plan(os.fsencode(root))
    with os.scandir(plan.root):
        pass
    for path, mode in _walk(plan, plan.root, without):
        if stat.S_ISLNK(mode):
            plan.skipped["symbolic links"] += 1
        elif not stat.S_ISREG(mode):
            plan.skipped["special files"] += 1
        else:
            _add(plan, path)
    plan.chunks.append(Chunk(-1, 0, 0, 0))
    return plan


def open_file(plan: Plan, file: int) -> int:
    """A descriptor of file number `file`. Raises OSError."""
    return os.open(
        plan.root + b"/" + plan.files[file], os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    )


def shown(name: bytes) -> str:
    """A name for people and JSON, whatever bytes it is made of."""
    return name.decode("utf-8", "backslashreplace")


def _walk(plan: Plan, folder: bytes, without: frozenset[bytes]) -> Iterator[tuple[bytes, int]]:
    def report(error: OSError) -> None:
        plan.unreadable.append(f"{shown(error.filename)}: {error.strerror}")

    for where, folders, names in os.walk(folder, onerror=report):
        entered = []
        for name in sorted(folders + names):
            path = where + b"/" + name
            try:
                mode = os.lstat(path).st_mode
            except OSError as error:
                report(error)
                continue
            if not stat.S_ISDIR(mode):
                yield path, mode
            elif name not in without:
                entered.append(name)
        folders[:] = entered


def _add(plan: Plan, path: bytes) -> None:
    number = len(plan.files)
    plan.files.append(os.path.relpath(path, plan.root))
    try:
        fd = open_file(plan, number)
    except OSError as error:
        plan.files.pop()
        plan.unreadable.append(f"{shown(path)}: {error.strerror}")
        return
    try:
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    plan.bytes += size
    for offset in range(0, max(size, 1), CHUNK_BYTES):
        flags = (FIRST if offset == 0 else 0) | (LAST if offset + CHUNK_BYTES >= size else 0)
        plan.chunks.append(Chunk(number, offset, min(CHUNK_BYTES, size - offset), flags))
