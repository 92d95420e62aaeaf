"""Whether what was written equals what was sent, file by file, by SHA-256."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from .plan import Plan, open_file, shown


def differences(plan: Plan, written: Path, on_progress: Callable[[int], None]) -> list[str]:
    """Every file that differs, is missing, or was never sent, in words. `on_progress(files compared)`."""
    found = []
    expected = set()
    for number, name in enumerate(plan.files):
        copy = written / os.fsdecode(name)
        expected.add(copy)
        try:
            if _digest(open_file(plan, number)) != _digest(os.open(copy, os.O_RDONLY | os.O_CLOEXEC)):
                found.append(f"{shown(name)}: checksums differ")
        except OSError as error:
            found.append(f"{shown(name)}: {error.strerror}")
        on_progress(number + 1)
    extra = {path for path in written.rglob("*") if path.is_file()} - expected
    return found + [
        f"{shown(os.fsencode(path.relative_to(written)))}: was never sent" for path in sorted(extra)
    ]


def _digest(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
