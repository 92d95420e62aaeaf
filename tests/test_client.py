"""The application's client and the operator's, against real kernels, and against none."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snap.ipc import (
    DeadlineError,
    DeniedError,
    HandleError,
    NotFoundError,
    PeerGoneError,
    ResourceError,
    RevokedError,
    UnreachableError,
    aconnect,
    connect,
    open_channel,
    seqpacket,
)
from snap.ipc.client import Client
from snap.ipc.control import ControlClient
from tests.waiting import LIMIT, run, until

Start = Callable[..., Any]
ROOT = Path(__file__).parent.parent


# -- with a real kernel -------------------------------------------------------------------------------------


def test_the_example_of_fifteen_lines_runs(kernel: Start) -> None:
    one = kernel()
    environment = {**os.environ, "SNAP_RUNTIME_DIR": str(one.directory)}
    command = [sys.executable, ROOT / "examples" / "hello.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "hello, snap\n1048576 bytes that begin with b'large'\n"


def test_a_channel_carries_messages_both_ways_and_is_gone_from_the_kernel_when_closed(kernel: Start) -> None:
    one = kernel()
    with one.connect() as client, one.control() as control:
        assert client.principal.startswith(f"app:{os.getpid()}.")
        with client.open("echo") as channel:
            messages = [b"%d" % number for number in range(1000)]
            received: list[bytes] = []
            for start in range(0, 1000, 50):
                channel.send_many(messages[start : start + 50], timeout=LIMIT)
                while len(received) < start + 50:
                    received += channel.recv_many(50, timeout=LIMIT)
            assert received == messages
            (view,) = control.call("channel.list")
            assert (view["id"], view["client"]) == (channel.id, client.principal)
            assert "up: sealed" in view["read_only"]
        assert control.call("channel.list") == []
        assert "channel.faulted" not in control.call("kernel.status")["events"]


def test_one_client_serves_many_threads_at_once(kernel: Start) -> None:
    one = kernel()
    failures: list[BaseException] = []

    def work(client: Client, number: int) -> None:
        try:
            for turn in range(5):
                with client.open("echo") as channel:
                    channel.send(b"%d/%d" % (number, turn), timeout=LIMIT)
                    assert channel.recv(timeout=LIMIT) == b"%d/%d" % (number, turn)
        except BaseException as error:
            failures.append(error)

    with one.connect() as client:
        threads = [threading.Thread(target=work, args=(client, number)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
    assert failures == []


def test_a_service_that_nobody_provides_is_not_found_and_one_that_policy_denies_is_denied(
    kernel: Start,
) -> None:
    one = kernel(policy="version = 1\n")
    with one.connect() as client:
        with pytest.raises((NotFoundError, DeniedError)):
            client.lookup("nothing")
        with pytest.raises(DeniedError):
            client.open("echo")
        assert client.capabilities() == []


def test_rights_can_be_given_up_but_not_taken(kernel: Start) -> None:
    one = kernel()
    with one.connect() as client:
        whole = client.lookup("echo")
        part = client.attenuate(whole, ["connect", "recv"])
        assert part.rights == {"connect", "recv"}
        with pytest.raises(DeniedError):
            client.attenuate(part, ["connect", "send"])
        with pytest.raises(DeniedError):
            client.copy(part)
        with client.open(part) as channel, pytest.raises(DeniedError):
            channel.send(b"may I?")
        assert {cap.handle for cap in client.capabilities()} == {whole.handle, part.handle}


def test_a_delegated_capability_is_used_by_another_principal_and_ends_with_its_giver(kernel: Start) -> None:
    one = kernel()
    with one.connect("giver") as giver, one.connect("taker") as taker:
        own = giver.lookup("echo")
        giver.delegate(own, taker.principal, ["connect", "send", "recv"])
        (given,) = taker.capabilities()
        service = type(own)("echo", given.handle, frozenset(given.rights))
        with taker.open(service) as channel:
            channel.send(b"lent")
            assert channel.recv(timeout=LIMIT) == b"lent"
            giver.revoke(own, itself=False)
            with pytest.raises(RevokedError):
                while True:
                    channel.recv(timeout=LIMIT)
            with pytest.raises((DeniedError, HandleError)):
                channel.reopen()
        assert giver.open(own).closed is False


def test_a_forged_handle_opens_nothing(kernel: Start) -> None:
    one = kernel()
    with one.connect() as client:
        own = client.lookup("echo")
        with pytest.raises(HandleError):
            client.open(type(own)("echo", own.handle + 1, own.rights))


def test_leaving_the_kernel_ends_the_channels_that_were_opened_through_it(kernel: Start) -> None:
    one = kernel()
    with one.connect() as client:
        channel = client.open("echo")
    with pytest.raises((RevokedError, PeerGoneError)):
        channel.recv(timeout=LIMIT)
    channel.close()
    with pytest.raises(UnreachableError, match="closed"):
        client.lookup("echo")


def test_the_shortcut_holds_its_own_connection_and_ends_it(kernel: Start) -> None:
    one = kernel()
    with one.control() as control:
        with open_channel("echo", one.directory) as channel:
            channel.send(b"short")
            assert channel.recv(timeout=LIMIT) == b"short"
        until(lambda: control.call("kernel.status")["principals"] == 1)


def test_the_shortcut_reopens_by_connecting_anew_even_to_another_kernel(kernel: Start) -> None:
    one = kernel()
    with open_channel("echo", one.directory) as channel:
        one.stop()
        with pytest.raises(PeerGoneError):
            channel.recv(timeout=LIMIT)
        kernel(directory=one.directory)
        with channel.reopen(LIMIT) as again:
            again.send(b"again")
            assert again.recv(timeout=LIMIT) == b"again"


def test_a_client_out_of_descriptors_fails_that_open_alone_and_leaves_no_channel(kernel: Start) -> None:
    one = kernel()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with one.connect() as client, one.control() as control:
        service = client.lookup("echo")
        taken: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.dup(0))
            seqpacket.close_all([taken.pop() for _ in range(2)])
            with pytest.raises(ResourceError, match="ulimit -n"):
                client.open(service)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            seqpacket.close_all(taken)
        with client.open(service) as channel:
            assert [view["id"] for view in until(lambda: control.call("channel.list"))] == [channel.id]


def test_after_its_module_was_killed_a_channel_goes_on_with_the_next_process(kernel: Start) -> None:
    one = kernel()
    with one.connect() as client, one.control() as control, client.open("echo") as channel:
        channel.send(b"before")
        assert channel.recv(timeout=LIMIT) == b"before"
        os.kill(control.call("module.show", name="echo")["pid"], signal.SIGKILL)
        channel.send(b"after")
        assert channel.recv(timeout=LIMIT) == b"after"


def test_a_stopped_kernel_delays_only_requests_and_a_channel_that_came_too_late_is_given_back(
    kernel: Start,
) -> None:
    one = kernel()
    with one.connect() as client, one.control() as control, client.open("echo") as channel:
        service = client.lookup("echo")
        one.process.send_signal(signal.SIGSTOP)
        try:
            for number in range(1000):
                channel.send(b"%d" % number, timeout=LIMIT)
                assert channel.recv(timeout=LIMIT) == b"%d" % number
            with pytest.raises(DeadlineError, match="no answer to Open"):
                client.open(service, timeout=0.1)
        finally:
            one.process.send_signal(signal.SIGCONT)
        assert client.lookup("echo").name == "echo"
        until(lambda: client.capabilities() and len(control.call("channel.list")) == 1)


def test_a_client_of_a_killed_kernel_carries_on_with_the_next_one(kernel: Start) -> None:
    one = kernel()
    with one.connect() as client:
        client.lookup("echo")
        one.kill()
        with pytest.raises(DeadlineError, match="no answer to Lookup"):
            client.lookup("echo", timeout=0.2)
        kernel(directory=one.directory)
        assert client.lookup("echo").rights


def test_the_same_under_asyncio(kernel: Start) -> None:
    one = kernel()

    async def main() -> None:
        async with await aconnect(one.directory, "async") as client:
            service = await client.alookup("echo")
            channels = await asyncio.gather(*(client.aopen(service) for _ in range(4)))
            for number, channel in enumerate(channels):
                await channel.asend(b"%d" % number)
            assert [await channel.arecv() for channel in channels] == [b"0", b"1", b"2", b"3"]
            again = await channels[0].areopen()
            await again.asend(b"again")
            assert await again.arecv() == b"again"
            with pytest.raises(NotFoundError):
                await client.alookup("nothing")
            held = {cap.object: cap.handle for cap in await client.acapabilities()}
            assert held["service:echo"] == service.handle
            for channel in (*channels, again):
                channel.close()

    run(main())


def test_an_open_that_is_cancelled_leaves_no_channel_behind(kernel: Start) -> None:
    one = kernel()

    async def main() -> None:
        async with await aconnect(one.directory) as client:
            service = await client.alookup("echo")
            for hops in range(6):
                opening = asyncio.ensure_future(client.aopen(service))
                for _ in range(hops):
                    await asyncio.sleep(0.001)
                if opening.done():
                    opening.result().close()
                    continue
                opening.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await opening
            await client.acapabilities()
            with one.control() as control:
                await asyncio.to_thread(until, lambda: not control.call("channel.list"))

    run(main())


# -- without a kernel ---------------------------------------------------------------------------------------


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """A runtime directory whose sockets nobody listens on."""
    for name, kind in (
        ("bootstrap.sock", socket.SOCK_SEQPACKET),
        ("control.sock", socket.SOCK_STREAM),
        ("events.sock", socket.SOCK_STREAM),
    ):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.bind(str(tmp_path / name))
    return tmp_path


def test_nobody_at_the_sockets_is_unreachable_with_a_hint(stale: Path, tmp_path_factory: Any) -> None:
    for directory in (stale, tmp_path_factory.mktemp("empty"), stale / "missing", Path("/" + "x" * 200)):
        with pytest.raises(UnreachableError, match="snapctl up"):
            connect(directory)
        with ControlClient(directory, timeout=LIMIT * 10) as control:
            with pytest.raises(UnreachableError, match="snapctl up"):
                control.call("kernel.status")
            with pytest.raises(UnreachableError, match="snapctl up"):
                next(control.events())
