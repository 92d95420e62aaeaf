"""The systemd units, and the kernel's half of the protocols behind them, over real sockets."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from snap.dataplane.errors import ResourceError
from snap.ipc import connect, paths
from snap.ipc.control import ControlClient
from snap.kernel import sdnotify, sdstore

UNITS = Path(__file__).resolve().parent.parent / "systemd"
VARIABLES = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "FDSTORE",
)

REPORT = """
import os, sys
from snap.dataplane.errors import ResourceError
from snap.kernel import sdnotify
try:
    found = sdnotify.activated_sockets()
except ResourceError as error:
    sys.exit(f"refused: {error}")
left = [name for name in os.environ if name.startswith("LISTEN_")]
print({name: (s.getsockname(), s.get_inheritable()) for name, s in found.items()}, left)
"""


@pytest.fixture(autouse=True)
def no_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A service manager's notification socket, at a path."""
    with notification_socket(str(tmp_path / "notify"), monkeypatch) as sock:
        yield sock


def notification_socket(address: str, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(f"\0{address[1:]}" if address[0] == "@" else address)
    sock.settimeout(30)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    return sock


def seqpacket(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(str(path))
    sock.listen()
    return sock


def activate(
    argv: list[str],
    sockets: list[socket.socket],
    names: str,
    out: IO[str] | int,
    err: IO[str] | int,
    count: int | None = None,
) -> subprocess.Popen[str]:
    """Start `argv` as a service manager would: descriptors from 3 on, LISTEN_PID its own pid."""
    fds = " ".join(str(sock.fileno()) for sock in sockets)
    count = len(sockets) if count is None else count
    # The high copies keep an already low source from being overwritten by an earlier redirection.
    script = (
        f'n=60; for fd in {fds}; do eval "exec $n<&$fd"; n=$((n+1)); done; '
        f'n=60; to=3; for fd in {fds}; do eval "exec $to<&$n $n<&-"; n=$((n+1)); to=$((to+1)); done; '
        f'export LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES={names}; exec "$@"'
    )
    return subprocess.Popen(
        ["bash", "-c", script, "activate", *argv],
        pass_fds=[sock.fileno() for sock in sockets],
        text=True,
        stdout=out,
        stderr=err,
    )


def report(sockets: list[socket.socket], names: str, count: int | None = None) -> tuple[int, str, str]:
    argv = [sys.executable, "-c", REPORT]
    child = activate(argv, sockets, names, subprocess.PIPE, subprocess.PIPE, count)
    out, err = child.communicate(timeout=60)
    return child.returncode, out, err


def systemd_version() -> int:
    told = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, timeout=60)
    return int(told.stdout.split()[1])


def test_units_pass_systemd_analyze_verify_once_the_daemon_is_installed(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    for unit in UNITS.iterdir():
        # verify insists that programs exist; a development tree has it elsewhere.
        text = re.sub("/usr/bin/snap(-kernel|ctl)", sys.executable, unit.read_text())
        if systemd_version() < 254:  # it does by itself what newer ones have to be told
            text = text.replace("FileDescriptorStorePreserve=restart\n", "")
        (tmp_path / unit.name).write_text(text)
    names = sorted(unit.name for unit in UNITS.iterdir())
    assert names == ["snap-kernel.service", "snap-kernel.socket"]
    done = subprocess.run(
        ["systemd-analyze", "verify", *names], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_units_name_the_files_that_the_program_uses() -> None:
    service = (UNITS / "snap-kernel.service").read_text()
    listener = (UNITS / "snap-kernel.socket").read_text()
    assert f"ListenSequentialPacket=%t/snap-kernel/{paths.BOOTSTRAP}\n" in listener
    assert "FileDescriptorName=bootstrap\n" in listener
    assert re.search(
        r"^ExecStart=/usr/bin/snap-kernel .*--runtime-dir %t/snap-kernel$", service, re.MULTILINE
    )
    assert "RuntimeDirectory=snap-kernel\n" in service


def test_notify_without_a_service_manager_does_nothing() -> None:
    assert sdnotify.notify("READY=1") is False


def test_notify_sends_all_states_in_one_datagram(manager: socket.socket) -> None:
    assert sdnotify.notify("READY=1", "STATUS=two modules ready")
    assert manager.recv(4096) == b"READY=1\nSTATUS=two modules ready"


def test_notify_reaches_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with notification_socket(f"@snap-test-{os.getpid()}", monkeypatch) as sock:
        assert sdnotify.notify("WATCHDOG=1")
        assert sock.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["/nonexistent/notify", "@nobody-listens-here", "relative"])
def test_notify_names_a_service_manager_that_cannot_be_reached(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with pytest.raises(ResourceError, match=re.escape(address)):
        sdnotify.notify("READY=1")


def test_watchdog_interval_is_half_of_what_the_unit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert sdnotify.watchdog_interval() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert sdnotify.watchdog_interval() == 15.0


@pytest.mark.parametrize(
    ("usec", "pid"), [(None, None), ("0", None), ("", None), ("soon", None), ("-5", None), ("30000000", "1")]
)
def test_no_watchdog_is_served_that_was_not_asked_of_this_process(
    usec: str | None, pid: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert sdnotify.watchdog_interval() is None


def test_activated_sockets_are_found_by_name_and_not_inherited_further(tmp_path: Path) -> None:
    with seqpacket(tmp_path / "a") as a, seqpacket(tmp_path / "b") as b:
        code, out, err = report([a, b], "bootstrap:other")
    expected = {"bootstrap": (str(tmp_path / "a"), False), "other": (str(tmp_path / "b"), False)}
    assert (code, out, err) == (0, f"{expected} []\n", "")


def test_sockets_meant_for_another_process_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert sdnotify.activated_sockets() == {}
    assert "LISTEN_FDS" not in os.environ


def make_stream(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen()
    return sock


def make_deaf(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(str(path))
    return sock


@pytest.mark.parametrize("make", [make_stream, make_deaf])
def test_a_socket_of_another_type_is_refused_by_name(
    make: Callable[[Path], socket.socket], tmp_path: Path
) -> None:
    with make(tmp_path / "s") as sock:
        code, out, err = report([sock], "bootstrap")
    assert (code, out) == (1, "")
    assert "'bootstrap' (descriptor 3) is not a listening SEQPACKET" in err
    assert "ListenSequentialPacket=" in err


def test_two_sockets_of_one_name_are_refused(tmp_path: Path) -> None:
    with seqpacket(tmp_path / "a") as a, seqpacket(tmp_path / "b") as b:
        code, _, err = report([a, b], "bootstrap:bootstrap")
    assert code == 1
    assert "two activated sockets are named 'bootstrap'" in err


@pytest.mark.parametrize(
    ("names", "complaint"), [("bootstrap:more", "Bad file descriptor"), ("bootstrap", "has 1 names")]
)
def test_a_count_beyond_what_was_passed_is_refused(names: str, complaint: str, tmp_path: Path) -> None:
    with seqpacket(tmp_path / "a") as a:
        code, _, err = report([a], names, count=2)
    assert code == 1
    assert complaint in err


def test_kernel_reports_ready_serves_the_activated_socket_and_stops_on_sigterm(
    tmp_path: Path, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    bootstrap = tmp_path / paths.BOOTSTRAP
    log = tmp_path / "out"
    argv = [sys.executable, "-m", "snap.kernel", "--foreground", "--runtime-dir", str(tmp_path)]
    with seqpacket(bootstrap) as listener, log.open("w") as out:
        inode = bootstrap.stat().st_ino
        child = activate(argv, [listener], "bootstrap", out, out)
        try:
            seen = ""
            while "READY=1" not in seen:
                seen += manager.recv(4096).decode() + "\n"
            assert bootstrap.stat().st_ino == inode, "the kernel replaced the socket that it was given"
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(str(bootstrap))
                client.send(b"not a message")
                assert select.select([client], [], [], 30)[0], "nobody answers on the activated socket"
            while "WATCHDOG=1" not in seen:
                seen += manager.recv(4096).decode() + "\n"
            child.send_signal(signal.SIGTERM)
            while "STOPPING=1" not in seen:
                seen += manager.recv(4096).decode() + "\n"
            assert child.wait(timeout=30) == 0, log.read_text()
        except TimeoutError:
            pytest.fail(f"the kernel said only {seen!r}; its log:\n{log.read_text()}")
        finally:
            child.kill()
            child.wait()


# -- the descriptor store ---------------------------------------------------------------------------------------


class Manager:
    """Plays the descriptor store of a service manager: real datagrams, real descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.stored: list[tuple[str, int]] = []
        self.said: list[str] = []

    def hear(self) -> None:
        """Take in what was said by now."""
        while select.select([self.sock], [], [], 0)[0]:
            data, fds, _, _ = socket.recv_fds(self.sock, 4096, 8)
            lines = data.decode().splitlines()
            said = dict(line.split("=", 1) for line in lines)
            self.said += lines
            if "FDSTORE" in said:
                assert said["FDPOLL"] == "0" and len(said["FDNAME"]) <= 255
                assert not set(said["FDNAME"]) & {":", "\n"} and said["FDNAME"].isascii()
                # systemd puts the newest first.
                self.stored[:0] = [(said["FDNAME"], fd) for fd in fds]
            elif "FDSTOREREMOVE" in said:
                assert not fds
                for name, fd in self.stored:
                    if name == said["FDNAME"]:
                        os.close(fd)
                self.stored = [(name, fd) for name, fd in self.stored if name != said["FDNAME"]]

    def close(self) -> None:
        for _, fd in self.stored:
            os.close(fd)
        self.stored.clear()


@pytest.fixture
def keeping(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    monkeypatch.setenv("FDSTORE", "100")
    keeping = Manager(manager)
    yield keeping
    keeping.close()
    manager.close()


NAMES = ["kernel", "state.a-b.main.12", "keep.m.any: name/\u00fc~1~2\n%41", "channel.18446744073709551615"]


def test_what_is_stored_comes_back_in_order_under_any_name(keeping: Manager) -> None:
    assert sdstore.wanted()
    store = sdstore.SystemdStore({})
    pipes = {name: os.pipe() for name in NAMES}
    for name, fds in pipes.items():
        store.put(name, fds)
    keeping.hear()
    found, rest = sdstore.split([("bootstrap", -1), *((name, os.dup(fd)) for name, fd in keeping.stored)])
    assert rest == [("bootstrap", -1)]
    assert sorted(found) == sorted(NAMES)
    for name, (read, write) in pipes.items():
        os.write(found[name][1], name.encode())
        assert os.read(read, 100) == name.encode()
        os.close(read)
        os.close(write)
    after = sdstore.SystemdStore(found)
    assert after.take() == found and after.take() == {}
    after.remove("kernel")
    after.put(NAMES[1], [found[NAMES[1]][0]])
    keeping.hear()
    assert {name.partition("~")[0] for name, _ in keeping.stored}.isdisjoint({"kernel"})
    again, _ = sdstore.split([(name, os.dup(fd)) for name, fd in keeping.stored])
    assert {name: len(fds) for name, fds in again.items()} == {NAMES[1]: 1, NAMES[2]: 2, NAMES[3]: 2}
    for fds in (*found.values(), *again.values()):
        for fd in fds:
            os.close(fd)
    after.close()
    keeping.hear()
    assert keeping.stored == []


def test_what_was_stored_by_half_is_closed_and_left_out(keeping: Manager) -> None:
    store = sdstore.SystemdStore({})
    read, write = os.pipe()
    store.put("whole", [read])
    store.put("torn", [read, write])
    keeping.hear()
    passed = [(name, os.dup(fd)) for name, fd in keeping.stored if name != "torn~0~2"]
    found, _ = sdstore.split(passed)
    assert list(found) == ["whole"]
    torn = next(fd for name, fd in passed if name == "torn~1~2")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(torn)
    for fd in (read, write, *found["whole"]):
        os.close(fd)


def test_a_store_that_is_full_is_reported_once(keeping: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDSTORE", "2")
    said: list[tuple[str, object]] = []
    store = sdstore.SystemdStore({}, lambda kind, data: said.append((kind, data["error"])))
    read, write = os.pipe()
    for name in ("a", "b", "c"):
        store.put(name, [read, write])
    assert said == [("store.exhausted", "more than 2 descriptors: raise FileDescriptorStoreMax=")]
    os.close(read)
    os.close(write)


def test_a_manager_that_keeps_nothing_is_not_asked_to(manager: socket.socket) -> None:
    assert not sdstore.wanted()
    manager.close()


LAUNCH = """
import fcntl, os, sys
names, fds, argv = sys.argv[1], [int(fd) for fd in sys.argv[2].split(",")], sys.argv[3:]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1000) for fd in fds]
for index, fd in enumerate(high):
    os.dup2(fd, 3 + index)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
os.execv(argv[0], argv)
"""
ECHO = """version = 1
[[allow]]
who = "any"
service = "*"
rights = ["connect", "send", "recv"]
[[operator]]
who = "owner"
rights = ["operate", "inspect"]
[modules.echo]
autostart = true
"""


class Service:
    """A unit as systemd runs it: its kernel is started again with what the manager keeps."""

    def __init__(self, directory: Path, keeping: Manager, listener: socket.socket) -> None:
        self.directory, self.keeping, self.listener = directory, keeping, listener
        (directory / "policy.toml").write_text(ECHO)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it says that it is ready."""
        passed = [("bootstrap", self.listener.fileno()), *self.keeping.stored]
        fds = [fd for _, fd in passed]
        argv = [sys.executable, "-c", LAUNCH, ":".join(name for name, _ in passed), ",".join(map(str, fds))]
        argv += [sys.executable, "-m", "snap.kernel", "--runtime-dir", str(self.directory)]
        argv += ["--policy", str(self.directory / "policy.toml")]
        with (self.directory / "out").open("ab") as out:
            self.process = subprocess.Popen(argv, stdout=out, stderr=out, pass_fds=fds)
        self.until("READY=1")

    def until(self, said: str) -> None:
        self.keeping.said.clear()
        end = time.monotonic() + 30
        while said not in self.keeping.said:
            assert time.monotonic() < end, (self.directory / "out").read_text()
            self.keeping.hear()
            time.sleep(0.01)

    def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.keeping.hear()
        return code


def test_modules_and_channels_outlive_restart_and_death_and_end_at_a_stop(
    tmp_path: Path, keeping: Manager
) -> None:
    with seqpacket(tmp_path / paths.BOOTSTRAP) as listener:
        service = Service(tmp_path, keeping, listener)
        service.start()
        try:
            with connect(tmp_path) as client, client.open("echo", timeout=30) as channel:
                with ControlClient(tmp_path, 30) as control:
                    (module,) = [view for view in control.call("module.list") if view["name"] == "echo"]
                for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
                    assert service.end(number) == code
                    channel.send(b"nobody is there")
                    assert channel.recv(timeout=30) == b"nobody is there"
                    service.start()
                    channel.send(b"somebody is there")
                    assert channel.recv(timeout=30) == b"somebody is there"
                    assert client.lookup("echo").rights
                    with ControlClient(tmp_path, 30) as control:
                        again = control.call("module.show", name="echo")
                    assert (again["pid"], again["restarts"]) == (module["pid"], 0)
            assert not (tmp_path / "keeper.sock").exists()
            assert service.end(signal.SIGTERM) == 0
            watched = os.pidfd_open(module["pid"])
            keeping.close()
            assert select.select([watched], [], [], 30)[0], "the module outlived the stop"
            os.close(watched)
        finally:
            if service.process is not None:
                service.process.kill()
                service.process.wait()
