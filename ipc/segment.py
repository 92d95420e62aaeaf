"""Segments: shared memory that is known by its descriptor alone, with two back ends behind one interface.

* `memfd` (the default): anonymous, sealed against shrinking and growing, so that its other user cannot make
  our accesses fault; can be sealed against new writable mappings.
* `posix`: an object of `/dev/shm`, unlinked before anyone else learns of it. Can neither be sealed against shrinking
  (the dataplane's SIGBUS guard turns that into a fault of the channel) nor against the same uid writing.

Memory of the `posix` back end is reserved when it is made: `/dev/shm` has a size limit of its own (64 MiB in most
containers), and without a reservation it would run full at somebody's write, as a SIGBUS, instead of here, as a
ResourceError. A memfd has no such limit behind it, so it is not reserved: its pages are charged to whoever
touches them first, which is the application that asked for the channel.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from pathlib import Path
from typing import Final, Literal, Self, get_args

import posix_ipc  # type: ignore[import-not-found]

from snap.dataplane.errors import (
    ClosedError,
    ProtocolError,
    ResourceError,
    UsageError,
)

Backend = Literal["memfd", "posix"]

NAME_PREFIX: Final = "snap-segment-"
_SHM: Final = Path("/dev/shm")
_LARGEST: Final = 1 << 40
_F_SEAL_FUTURE_WRITE: Final = 0x0010  # Linux 5.1; the fcntl module does not name it
_SEALS: Final = {
    "seal": fcntl.F_SEAL_SEAL,
    "shrink": fcntl.F_SEAL_SHRINK,
    "grow": fcntl.F_SEAL_GROW,
    "write": fcntl.F_SEAL_WRITE,
    "future_write": _F_SEAL_FUTURE_WRITE,
}
_HINTS: Final = {
    errno.ENOSPC: 'free or enlarge /dev/shm, ask for less, or set backend = "memfd" in the policy',
    errno.ENOMEM: "free memory, raise the cgroup's limit, or ask for less",
    errno.EMFILE: "close channels, or raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise fs.file-max: the whole machine is out of descriptors",
}
_POSIX_UNSEALABLE: Final = (
    "POSIX shared memory cannot be sealed: mode 0600 keeps other users out, "
    "but a process of the same uid can open it writable again through /proc"
)


class Segment:
    """A piece of shared memory, zeroed when made. Owns its descriptor; use it in `with`, or `close` it."""

    def __init__(self, fd: int, size: int, backend: Backend) -> None:
        self._fd = fd
        self.size = size
        self.backend: Final = backend

    @classmethod
    def create(cls, size: int, backend: str = "memfd") -> Self:
        """Make a zeroed, nameless segment of `size` bytes. Raises UsageError (size, back end), ResourceError when the
        machine is out of memory, room in /dev/shm, or descriptors."""
        if not 0 < size <= _LARGEST:
            raise UsageError(f"a segment of {size} bytes cannot be made", f"sizes are 1 to {_LARGEST}")
        if backend == "posix":
            return cls(_posix(size), size, "posix")
        if backend == "memfd":
            return cls(_memfd(size), size, "memfd")
        raise UsageError(f"unknown segment back end {backend!r}", f"one of {', '.join(get_args(Backend))}")

    @classmethod
    def adopt(cls, fd: int, size: int) -> Self:
        """Take over a received descriptor that should hold at least `size` bytes. Raises ProtocolError when it is no
        shared memory or smaller than promised; the descriptor is then still the caller's to close."""
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            actual = os.fstat(fd).st_size
        except OSError as error:
            raise ProtocolError(f"descriptor {fd} is no shared memory: {error.strerror}") from error
        if size <= 0 or actual < size:
            raise ProtocolError(f"segment of {actual} bytes where {size} were promised")
        return cls(fd, size, "memfd" if seals & fcntl.F_SEAL_SHRINK else "posix")

    @property
    def fd(self) -> int:
        """The descriptor; still the segment's own. Raises ClosedError after `close`."""
        if self._fd < 0:
            raise ClosedError("this segment is closed")
        return self._fd

    def seals(self) -> frozenset[str]:
        """Of "shrink", "grow", "write", "future_write" and "seal" (no more can be added), those that are set."""
        bits = fcntl.fcntl(self.fd, fcntl.F_GET_SEALS)
        return frozenset(name for name, bit in _SEALS.items() if bits & bit)

    def seal_future_write(self) -> None:
        """Refuse every new writable mapping, and write(2), to everyone from now on; existing mappings go on.

        Raises UsageError where the segment cannot be sealed, with the reason.
        """
        if self.backend == "posix":
            raise UsageError(_POSIX_UNSEALABLE, 'use backend = "memfd" where read-only has to hold')
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except OSError as error:
            raise UsageError(f"this segment cannot be sealed: {error.strerror}") from error

    def read_only_holds(self) -> tuple[bool, str]:
        """Whether a process of the same uid that was given this segment to read cannot write it, and why."""
        if self.seals() & {"write", "future_write"}:
            return True, "sealed: nobody can map it for writing any more"
        if self.backend == "posix":
            return False, _POSIX_UNSEALABLE
        return False, "not sealed: a process of the same uid can open it writable again through /proc"

    def close(self) -> None:
        """Close the descriptor; mappings stay valid. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Segment {self.backend} fd={self._fd} size={self.size}>"


def reclaim() -> list[str]:
    """Remove what processes of our own uid left that were killed in the instant between naming a POSIX segment and
    unlinking it. Returns the names removed."""
    return [
        path.name
        for path in sorted(_SHM.iterdir())
        if path.name.startswith(NAME_PREFIX) and _is_ours(path) and _unlink(path.name)
    ]


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _unlink(name: str) -> bool:
    try:
        posix_ipc.unlink_shared_memory(f"/{name}")
    except posix_ipc.ExistentialError:
        return False
    return True


def _memfd(size: int) -> int:
    try:
        fd = os.memfd_create("snap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise _exhausted(size, error) from error
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(fd)
        raise _exhausted(size, error) from error
    return fd


def _posix(size: int) -> int:
    label = f"{NAME_PREFIX}{secrets.token_hex(16)}"
    try:
        fd: int = posix_ipc.SharedMemory(f"/{label}", posix_ipc.O_CREX, mode=0o600, size=0).fd
    except OSError as error:
        raise _exhausted(size, error) from error
    # False when a `reclaim` took the name away first: gone is all we want.
    _unlink(label)
    try:
        # Reserves the memory as well: see the top of this file.
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        raise _exhausted(size, error) from error
    return fd


def _exhausted(size: int, error: OSError) -> ResourceError:
    # posix_ipc raises this one without its errno.
    number = error.errno or errno.EMFILE
    return ResourceError(
        f"cannot make a segment of {size} bytes: {os.strerror(number)}", _HINTS.get(number, "")
    )
