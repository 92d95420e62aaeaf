"""Semaphores outlive every process: the next kernel on a directory removes those that nobody has any more."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sysv_ipc  # type: ignore[import-not-found]

from snap.dataplane.errors import ResourceError
from snap.kernel.semaphores import Semaphores

from .conftest import descendants
from .test_adoption import System


def exists(number: int) -> bool:
    listed = Path("/proc/sysvipc/sem").read_text().splitlines()[1:]
    return number in {int(line.split()[1]) for line in listed}


@contextmanager
def cleared(directory: Path) -> Iterator[Path]:
    try:
        yield directory
    finally:
        Semaphores(directory).reclaim(())
    assert list(directory.iterdir()) == []


def test_what_a_killed_kernel_made_is_removed_by_the_next_but_for_what_is_used_or_held(
    tmp_path: Path,
) -> None:
    with cleared(tmp_path / "semaphores") as directory:
        first = Semaphores(directory)
        used, held, left = (first.make() for _ in range(3))
        first.remove(first.make())
        holder = sysv_ipc.Semaphore(int(note_of(directory, held), 16))
        holder.acquire()
        second = Semaphores(directory)
        assert second.reclaim([used]) == [left]
        assert (exists(used), exists(held), exists(left)) == (True, True, False)
        assert len(list(directory.iterdir())) == 2
        holder.release()
        assert second.reclaim([]) == sorted([used, held])


def note_of(directory: Path, number: int) -> str:
    for path in directory.iterdir():
        if sysv_ipc.Semaphore(int(path.name, 16)).id == number:
            return path.name
    pytest.fail(f"semaphore {number} is not noted")


def test_notes_of_what_is_gone_and_other_files_harm_nobody(tmp_path: Path) -> None:
    directory = tmp_path / "semaphores"
    gone = Semaphores(directory).make()
    sysv_ipc.remove_semaphore(gone)
    (directory / "README").touch()
    again = Semaphores(directory)
    again.remove(gone)
    assert again.reclaim([]) == []
    assert [path.name for path in directory.iterdir()] == ["README"]


def test_a_semaphore_that_others_may_use_is_not_ours(tmp_path: Path) -> None:
    other = sysv_ipc.Semaphore(None, sysv_ipc.IPC_CREX, mode=0o666, initial_value=1)
    try:
        (tmp_path / f"{other.key:08x}").touch()
        assert Semaphores(tmp_path).reclaim([]) == []
        assert exists(other.id)
        assert list(tmp_path.iterdir()) == []
    finally:
        other.remove()


def test_without_room_for_its_note_none_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="semaphore"):
        Semaphores(tmp_path / "file" / "semaphores").make()


def test_kill_9_of_everything_at_once_leaves_what_the_next_kernel_removes(tmp_path: Path) -> None:
    system = System(tmp_path, respawn=False, grace=20.0)
    kernel = system.start()
    try:
        system.until(lambda: system.ready("echo", "relay"))
        notes = {path.name for path in (system.directory / "semaphores").iterdir()}
        left = [sysv_ipc.Semaphore(int(name, 16)).id for name in notes]
        assert len(left) >= 2
        everybody = [*descendants(kernel), kernel]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # nobody sees another one die
            for pid in everybody:
                os.kill(pid, number)
        system.children[0].wait()
        assert all(exists(number) for number in left)
        system.start()
        system.until(lambda: system.ready("echo", "relay"))
        system.until(lambda: not any(exists(number) for number in left))
    finally:
        system.stop()
    assert list((system.directory / "semaphores").iterdir()) == []
