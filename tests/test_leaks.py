"""The detector of leaks finds each kind of leak, and nothing where there is none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parent / "conftest.py"
PLANTED = """
import ctypes, posix_ipc, mmap, os, socket, subprocess, sys
import pytest
from snap.ipc.segment import Segment

kept = []

def test_processes():
    subprocess.Popen(["sleep", "60"])

def test_orphans_processes():
    subprocess.run(["sh", "-c", "sleep 60 & exit"], check=True)

def test_shared_memory():
    posix_ipc.SharedMemory(f"/snap-leak-{os.getpid()}", posix_ipc.O_CREX, mode=0o600, size=4096).close_fd()

def test_semaphores():
    kept.append(ctypes.CDLL(None).semget(0, 1, 0o600))
    assert kept[-1] >= 0

@pytest.mark.parametrize("make", [
    lambda: socket.socket(),
    lambda: open(os.eventfd(0)),
    lambda: Segment.create(4096),
    lambda: Segment.create(1, "posix"),
])
def test_descriptors(make):
    kept.append(make())

def test_mappings():
    with Segment.create(4096) as segment:
        kept.append(mmap.mmap(segment.fd, 4096, trackfd=False) if sys.version_info >= (3, 13) else mapped(segment.fd))

def mapped(fd):
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    return libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, ctypes.c_long(0))

def test_socket_files():
    os.makedirs(os.environ["SNAP_RUNTIME_DIR"], exist_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.environ["SNAP_RUNTIME_DIR"] + "/left.sock")

def test_clean(channel_pair, tmp_path):
    client, server = channel_pair()
    client.send(b"x" * 10_000)
    assert server.recv(timeout=1.0) == b"x" * 10_000
    subprocess.run(["true"], check=True)
    Segment.create(4096, "posix").close()

def test_clean_again():
    process = subprocess.Popen(["sh", "-c", "sleep 0.1 & exit"])
    assert process.wait() == 0

@pytest.fixture(scope="session", autouse=True)
def tidy():
    yield
    for name in os.listdir("/dev/shm"):
        if name == f"snap-leak-{os.getpid()}":
            os.unlink(f"/dev/shm/{name}")
    for identifier in (one for one in kept if isinstance(one, int) and one < 1 << 32):
        ctypes.CDLL(None).semctl(identifier, 0, 0)
"""


def test_every_kind_of_leak_fails_its_test_and_only_that(tmp_path: Path) -> None:
    impatient = re.sub(r"(?m)^LEAVE = .*", "LEAVE = 0.6", CONFTEST.read_text())
    (tmp_path / "conftest.py").write_text(impatient)
    (tmp_path / "test_planted.py").write_text(PLANTED)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(CONFTEST.parent.parent),
        "SNAP_RUNTIME_DIR": str(tmp_path / "run"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", tmp_path],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    # An error is at the teardown of the test that leaked; its name says what the detector has to call it.
    found = re.findall(r"ERROR at teardown of test_(\w+)", done.stdout)
    expected = {
        "processes",
        "orphans_processes",
        "shared_memory",
        "semaphores",
        "descriptors",
        "mappings",
        "socket_files",
    }
    assert set(found) == expected, done.stdout
    assert found.count("descriptors") == 4, done.stdout
    for name in expected:
        kind = name.removeprefix("orphans_")
        assert re.search(rf"teardown of test_{name}(?s:(?!teardown of).)*leaked: \{{'{kind}'", done.stdout), (
            name
        )
    assert "12 passed, 10 errors" in done.stdout
