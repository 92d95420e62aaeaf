"""Segments: one conformance suite for both back ends, and the attacks that tell them apart."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import posix_ipc
import pytest

from snap.dataplane import _native
from snap.dataplane.errors import (
    ClosedError,
    ProtocolError,
    ResourceError,
    UsageError,
)
from snap.ipc import seqpacket
from snap.ipc.segment import NAME_PREFIX, Segment, reclaim

PAGE = mmap.PAGESIZE
LIMIT = 20.0


@pytest.fixture(params=["memfd", "posix"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.contextmanager
def mapped(fd: int, size: int = PAGE) -> Iterator[mmap.mmap]:
    memory = mmap.mmap(fd, size)
    try:
        yield memory
    finally:
        memory.close()


@contextlib.contextmanager
def other_process(
    program: str, *arguments: object
) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """Run `program` with a SEQPACKET socket `sock`; yields our end of it."""
    ours, theirs = seqpacket.pair()
    prologue = f"import os, socket, sys; sock = socket.socket(fileno={theirs.fileno()})\n"
    command = [sys.executable, "-c", prologue + textwrap.dedent(program), *map(str, arguments)]
    with ours, theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        ours.settimeout(LIMIT)
        try:
            yield ours, process
        finally:
            process.kill()
            process.wait()


def in_shm() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("snap-anonymous-")}


# -- what both do -------------------------------------------------------------------------------------------


def test_a_segment_has_the_size_asked_for_and_is_zeroed(backend: str) -> None:
    with Segment.create(3 * PAGE + 5, backend) as segment:
        assert os.fstat(segment.fd).st_size == segment.size == 3 * PAGE + 5
        assert os.pread(segment.fd, 4 * PAGE, 0) == bytes(3 * PAGE + 5)


def test_a_segment_is_not_inherited_and_belongs_to_its_owner_alone(backend: str) -> None:
    with Segment.create(PAGE, backend) as segment:
        assert not os.get_inheritable(segment.fd)
        assert backend == "memfd" or os.fstat(segment.fd).st_mode & 0o777 == 0o600


def test_a_closed_segment_gives_no_descriptor(backend: str) -> None:
    segment = Segment.create(PAGE, backend)
    segment.close()
    segment.close()
    with pytest.raises(ClosedError):
        _ = segment.fd


@pytest.mark.parametrize("size", [0, -1, 1 << 62])
def test_a_size_that_cannot_be_is_refused(backend: str, size: int) -> None:
    with pytest.raises(UsageError, match="cannot be made"):
        Segment.create(size, backend)


def test_an_unknown_back_end_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'sysv'"):
        Segment.create(PAGE, "sysv")


def test_another_process_maps_the_same_memory_both_ways(backend: str) -> None:
    program = """
        import mmap
        from snap.ipc import seqpacket
        from snap.ipc.segment import Segment
        _, fds = seqpacket.recv(sock)
        segment = Segment.adopt(fds[0], int(sys.argv[1]))
        memory = mmap.mmap(segment.fd, segment.size)
        memory[:5] = memory[:5][::-1]
        sock.send(segment.backend.encode())
    """
    with (
        Segment.create(PAGE, backend) as segment,
        mapped(segment.fd) as memory,
        other_process(program, PAGE) as (sock, _),
    ):
        memory[:5] = b"hello"
        seqpacket.send(sock, b"take", [segment.fd])
        assert sock.recv(64).decode() == backend
        assert memory[:5] == b"olleh"


def test_adopting_a_descriptor_that_holds_less_than_promised_is_refused(backend: str) -> None:
    with Segment.create(PAGE, backend) as segment:
        with pytest.raises(ProtocolError, match=f"{PAGE} bytes where {2 * PAGE}"):
            Segment.adopt(segment.fd, 2 * PAGE)
        assert os.fstat(segment.fd).st_size == PAGE, "the descriptor is still the caller's"


def test_adopting_what_is_no_shared_memory_is_refused() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(ProtocolError, match="no shared memory"):
            Segment.adopt(reader, PAGE)
    finally:
        os.close(reader)
        os.close(writer)


def test_nothing_is_left_when_the_holder_is_killed(backend: str) -> None:
    program = """
        from snap.ipc.segment import Segment
        held = [Segment.create(4096, sys.argv[1]) for _ in range(20)]
        sock.send(b"made")
        sock.recv(1)
    """
    before = in_shm()
    with other_process(program, backend) as (sock, process):
        assert sock.recv(64) == b"made"
        process.send_signal(signal.SIGKILL)
        assert process.wait(LIMIT) == -signal.SIGKILL
        assert in_shm() <= before


def test_out_of_descriptors_is_an_error_with_a_hint_and_leaves_nothing(backend: str) -> None:
    before = in_shm()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        Segment.create(PAGE, backend).close()
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, hard))
        with pytest.raises(ResourceError, match=r"ulimit -n"):
            for _ in range(10):
                stack.enter_context(Segment.create(PAGE, backend))
    assert in_shm() <= before


# -- full /dev/shm ------------------------------------------------------------------------------------------

in_small_shm = """
    import ctypes, subprocess
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() or libc.unshare(0x00020000):  # CLONE_NEWNS
        sock.send(b"not allowed"); sys.exit()
    libc.mount(None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        sock.send(b"not allowed"); sys.exit()
    from snap.dataplane.errors import ResourceError
    from snap.ipc.segment import Segment
    def attempt(backend, size):
        try:
            Segment.create(size, backend).close()
        except ResourceError as error:
            return str(error)
        return "made"
"""


@pytest.mark.root
def test_a_full_dev_shm_refuses_posix_segments_when_they_are_made_and_does_not_concern_memfd() -> None:
    program = (
        textwrap.dedent(in_small_shm)
        + """
answers = [attempt("posix", 40960), attempt("posix", 81920), attempt("memfd", 81920), str(os.listdir("/dev/shm"))]
sock.send("|".join(answers).encode())
"""
    )
    with other_process(program) as (sock, _):
        answer = sock.recv(4096).decode()
    if answer == "not allowed":
        pytest.skip("needs root and mount namespaces")
    small, large, memfd, left = answer.split("|")
    assert (small, memfd, left) == ("made", "made", "[]")
    assert os.strerror(errno.ENOSPC) in large and "/dev/shm" in large


def test_more_than_dev_shm_can_ever_hold_is_refused_with_a_hint() -> None:
    total = os.statvfs("/dev/shm")
    if not 0 < total.f_blocks * total.f_frsize < 1 << 40:
        pytest.skip("/dev/shm has no limit here")
    before = in_shm()
    with pytest.raises(ResourceError, match="/dev/shm"):
        Segment.create(total.f_blocks * total.f_frsize + PAGE, "posix")
    assert in_shm() <= before


# -- shrinking ----------------------------------------------------------------------------------------------


def test_a_memfd_can_be_neither_shrunk_nor_grown() -> None:
    with Segment.create(2 * PAGE, "memfd") as segment:
        assert {"shrink", "grow"} <= segment.seals()
        for size in (PAGE, 3 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(segment.fd, size)


@pytest.mark.parametrize("victim", ["up", "ring"])
def test_a_posix_segment_that_is_shrunk_faults_its_channel_and_crashes_nobody(victim: str) -> None:
    program = """
        from snap.dataplane import _native
        from snap.dataplane.errors import FaultedError
        from snap.ipc import seqpacket
        size, slots = 1 << 20, 64
        _, fds = seqpacket.recv(sock)
        ring, up, down, *bells = fds
        _native.ChannelControl(ring, slots, tuple(bells)).init(1, 1)
        ends = (ring, up, down, slots, size, size, tuple(bells), 1)
        client, server = (_native.Endpoint(role, *ends) for role in (_native.CLIENT, _native.SERVER))
        client.send(b"x" * 100_000)
        sock.send(b"sent")
        sock.recv(1)
        try:
            for _ in range(1000):
                server.recv(10.0)
                client.send(b"x" * 100_000)
        except FaultedError as error:
            sock.send(f"faulted: {error}".encode())
    """
    size = 1 << 20
    with contextlib.ExitStack() as stack:
        sizes = {"ring": _native.ring_bytes(64), "up": size, "down": size}
        made = {what: stack.enter_context(Segment.create(bytes_, "posix")) for what, bytes_ in sizes.items()}
        bells = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        stack.callback(seqpacket.close_all, bells)
        sock, process = stack.enter_context(other_process(program))
        seqpacket.send(sock, b"take", [*(segment.fd for segment in made.values()), *bells])
        assert sock.recv(64) == b"sent"
        os.ftruncate(made[victim].fd, 0)
        sock.send(b"!")
        assert sock.recv(1024).startswith(b"faulted: ")
        assert process.wait(LIMIT) == 0


# -- writing what was given to read -------------------------------------------------------------------------

attack = """
    import mmap
    from snap.ipc import seqpacket
    _, fds = seqpacket.recv(sock)
    try:
        again = os.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR)
        mmap.mmap(again, 4096)[:4] = b"evil"
    except OSError as error:
        sock.send(f"refused {error.errno}".encode())
    else:
        sock.send(b"written")
"""


def attacked(segment: Segment) -> str:
    """What a process of our uid achieves that was given a read-only descriptor."""
    read_only = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with other_process(attack) as (sock, _):
            seqpacket.send(sock, b"read", [read_only])
            return sock.recv(64).decode()
    finally:
        os.close(read_only)


def test_after_its_seal_a_memfd_is_read_only_even_for_the_same_uid_while_the_writer_goes_on() -> None:
    with Segment.create(PAGE, "memfd") as segment, mapped(segment.fd) as memory:
        memory[:4] = b"good"
        segment.seal_future_write()
        assert attacked(segment) == f"refused {errno.EPERM}"
        assert segment.read_only_holds()[0]
        with pytest.raises(PermissionError):
            os.pwrite(segment.fd, b"evil", 0)
        memory[4:8] = b"more"
        assert os.pread(segment.fd, 8, 0) == b"goodmore"


def test_without_the_seal_a_read_only_descriptor_is_no_protection_and_both_back_ends_say_so(
    backend: str,
) -> None:
    with Segment.create(PAGE, backend) as segment:
        assert attacked(segment) == "written"
        holds, reason = segment.read_only_holds()
        assert not holds
        assert "/proc" in reason


def test_a_posix_segment_says_why_it_cannot_be_sealed() -> None:
    with (
        Segment.create(PAGE, "posix") as segment,
        pytest.raises(UsageError, match="POSIX shared memory cannot"),
    ):
        segment.seal_future_write()


# -- leftovers ----------------------------------------------------------------------------------------------


def leave(name: str) -> Path:
    """What a process killed between naming and unlinking leaves."""
    posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, mode=0o600, size=PAGE).close_fd()
    return Path("/dev/shm") / name


def test_a_segment_caught_between_naming_and_unlinking_is_reclaimed() -> None:
    left = leave(f"{NAME_PREFIX}{os.getpid()}")
    assert left.name in reclaim()
    assert not left.exists()


def test_reclaiming_does_not_touch_what_is_not_named_by_snap() -> None:
    other = leave(f"other-snap-{os.getpid()}")
    try:
        assert other.name not in reclaim()
        assert other.exists()
    finally:
        other.unlink()


def test_a_refusal_while_sealing_names_the_reason() -> None:
    with Segment.create(PAGE, "memfd") as segment:
        fcntl.fcntl(segment.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        with pytest.raises(UsageError, match="not permitted"):
            segment.seal_future_write()
