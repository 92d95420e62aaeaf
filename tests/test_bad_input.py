"""What hostile or broken peers say to the kernel: a named error for them, a line in a log, nothing for the others."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snap.dataplane.errors import ProtocolError, ResourceError
from snap.ipc import paths, protocol
from snap.ipc.segment import Segment
from tests.kernel_rig import Application, run, running, served, write_module

HELLO = protocol.encode(protocol.Hello(version=protocol.PROTOCOL_VERSION))


@pytest.mark.parametrize(
    ("first", "named"),
    [
        (b"\xff\xff\xff", "cannot be decoded"),
        (b"\x00", "cannot be decoded"),
        (HELLO[:-1], "cannot be decoded"),
        (HELLO + b"\x00", "cannot be decoded"),
        (msgspec.msgpack.encode({"t": "Nonsense", "seq": 1}), "cannot be decoded"),
        (msgspec.msgpack.encode({"t": "Hello", "version": "one"}), "cannot be decoded"),
        (msgspec.msgpack.encode({"t": "Hello", "version": 1, "more": 1}), "cannot be decoded"),
        (msgspec.msgpack.encode({"t": "Hello", "version": 99}), "version 99"),
        (msgspec.msgpack.encode({"t": "Lookup", "service": "mine"}), "before Hello"),
        (b"\x91" * 4000, "cannot be decoded"),
        (b"x" * 5000, "exceeds"),
        (b"x" * 70_000, "exceeds"),
    ],
)
def test_a_bad_first_message_is_answered_noted_and_ends_the_connection(
    tmp_path: Path, first: bytes, named: str
) -> None:
    async def test() -> None:
        async with served(tmp_path) as rig:
            with Application(rig.directory) as application:
                answer = await application.ask(first)
                assert (answer.code, named in answer.message) == ("protocol", True)
                assert await application.hear() is None
            assert rig.audited(named)
            assert "bootstrap.refused" in rig.kinds()

    run(test())


def test_hello_can_be_said_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as rig:
            with await rig.application() as application:
                answer = await application.ask(HELLO)
                assert answer.code == "protocol"
                await rig.until(lambda: "principal.left" in rig.kinds())

    run(test())


def test_who_says_nothing_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snap.kernel.bootstrap.HELLO_DEADLINE", 0.2)

    async def test() -> None:
        async with served(tmp_path) as rig:
            with Application(rig.directory) as application:
                assert await application.hear() is None

    run(test())


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (protocol.Lookup(seq=9, service="no-such-service"), "not_found"),
        (protocol.Open(seq=9, handle=1), "bad_handle"),
        (protocol.Open(seq=9, handle=-1), "bad_handle"),
        (protocol.Open(seq=9, handle=1 << 62), "bad_handle"),
        (protocol.Mapped(seq=9, channel=1), "not_found"),
        (protocol.CloseChannel(seq=9, channel=1), "not_found"),
        (protocol.CloseChannel(seq=9, channel=1 << 40), "not_found"),
        (protocol.Copy(seq=9, handle=65536 << 3), "bad_handle"),
        (protocol.Attenuate(seq=9, handle=7, rights=["connect"]), "bad_handle"),
        (protocol.Delegate(seq=9, handle=7, to="app:1.1"), "bad_handle"),
        (protocol.Revoke(seq=9, handle=7), "bad_handle"),
    ],
)
def test_forged_and_foreign_names_are_refused_and_the_connection_goes_on(
    tmp_path: Path, request_: protocol.Message, code: str
) -> None:
    async def test() -> None:
        async with served(tmp_path) as rig:
            with await rig.application() as application:
                answer = await application.ask(request_)
                assert (answer.seq, answer.code) == (9, code)
                assert isinstance(await application.ask(protocol.ListCaps(seq=10)), protocol.Caps)

    run(test())


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        ({"slots": 3}, "usage"),
        ({"slots": -64}, "usage"),
        ({"slots": 1 << 20}, "usage"),
        ({"slots": 1 << 62}, "usage"),
        ({"up_bytes": -1}, "usage"),
        ({"up_bytes": 1 << 62}, "usage"),
        ({"down_bytes": 1 << 39}, "quota"),
        ({"wait": float("nan"), "slots": 3}, "usage"),
    ],
)
def test_absurd_wishes_for_a_channel_are_refused_and_leave_nothing(
    tmp_path: Path, wish: dict[str, Any], code: str
) -> None:
    async def test() -> None:
        async with served(tmp_path) as rig:
            with await rig.application() as application:
                handle = (await application.ask(protocol.Lookup(seq=1, service="mine"))).handle
                answer = await application.ask(protocol.Open(seq=2, handle=handle, **wish))
                assert answer.code == code
                name = next(name for name in rig.kernel.desk.principals if name.endswith(".2"))
                assert rig.kernel.desk.principals[name].bytes == 0

    run(test())


def test_more_rights_than_one_has_are_refused_by_name(tmp_path: Path) -> None:
    rules = {"allow": [{"who": "any", "service": "*", "rights": ["connect", "send", "recv"]}]}

    async def test() -> None:
        async with served(tmp_path, rules) as rig:
            with await rig.application() as application:
                handle = (await application.ask(protocol.Lookup(seq=1, service="mine"))).handle
                for ask in (
                    protocol.Attenuate(seq=2, handle=handle, rights=["connect", "delegate"]),
                    protocol.Copy(seq=2, handle=handle),
                    protocol.Delegate(seq=2, handle=handle, to="module:mine"),
                    protocol.Delegate(seq=2, handle=handle, to="module:mine", move=True),
                ):
                    assert (await application.ask(ask)).code == "denied"
            assert rig.audited("delegate")

    run(test())


def test_descriptors_that_nobody_asked_for_are_closed(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as rig:
            with await rig.application() as application:
                before = len(os.listdir("/proc/self/fd"))
                for _ in range(50):
                    await application.ask(protocol.ListCaps(seq=1), [0] * 10)
                assert len(os.listdir("/proc/self/fd")) <= before
                application.say(protocol.ListCaps(seq=1), [0] * (protocol.MAX_FDS + 8))
                assert (await application.hear()).code == "protocol"
            await rig.until(lambda: len(os.listdir("/proc/self/fd")) < before)

    run(test())


def test_a_flood_of_requests_is_refused_and_then_disconnected(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, {"quota": {"requests_per_second": 50}}) as rig:
            with await rig.application() as flooder:
                codes = []
                while (answer := await flooder.ask(protocol.Lookup(seq=1, service="mine"))) is not None:
                    codes.append(getattr(answer, "code", "ok"))
                assert codes.count("ok") >= 50
                assert codes.count("quota") >= 100
            assert rig.audited("flood")
            assert "principal.flood_refused" in rig.kinds()

    run(test())


def test_who_reads_no_answers_is_dropped(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, {"quota": {"requests_per_second": 100_000}}) as rig:
            with await rig.application() as deaf:
                async with asyncio.timeout(20):
                    while "principal.left" not in rig.kinds():
                        try:
                            deaf.say(protocol.ListCaps(seq=1))
                        except (BlockingIOError, ConnectionError):
                            await asyncio.sleep(0.001)
            assert "unread" in rig.event("principal.left").data["reason"]

    run(test())


def test_too_many_connections_of_one_user_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snap.kernel.bootstrap.PER_UID", 3)

    async def test() -> None:
        async with served(tmp_path) as rig:
            with await rig.application(), await rig.application(), Application(rig.directory) as fourth:
                assert (await fourth.hear()).code == "quota"
                assert await fourth.hear() is None
            with await rig.application() as later:
                assert isinstance(await later.ask(protocol.ListCaps(seq=1)), protocol.Caps)

    run(test())


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """None below the highest one in use is free, and none above it is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    fillers = []
    try:
        while True:
            fillers.append(os.dup(0))
    except OSError:
        pass
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)


def test_out_of_descriptors_refuses_the_asker_and_nobody_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as rig:
            with await rig.application() as application:
                handle = (await application.ask(protocol.Lookup(seq=1, service="mine"))).handle
                with no_more_descriptors():
                    answer = await application.ask(protocol.Open(seq=2, handle=handle))
                assert answer.code == "resources"
                assert "resources.exhausted" in rig.kinds()
                assert len(rig.kernel.broker.channels) == 1
                assert isinstance(await application.ask(protocol.Open(seq=2, handle=handle)), protocol.Opened)

    run(test())


def test_out_of_descriptors_a_module_is_started_again_when_there_are_some(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "second")

    async def test() -> None:
        async with served(tmp_path) as rig:
            with no_more_descriptors():
                rig.kernel.start("second")
                view = rig.kernel.module_view("second")
                assert view.state == "backoff"
                assert "Too many open files" in view.cause
            await rig.until(lambda: rig.kernel.module_view("second").state == "ready")

    run(test())


def test_out_of_descriptors_lets_new_connections_wait(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as rig:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as waiting:
                with no_more_descriptors():
                    waiting.connect(os.fspath(rig.directory / paths.BOOTSTRAP))
                    waiting.send(HELLO)
                    await rig.until(lambda: "bootstrap.exhausted" in rig.kinds())
                waiting.setblocking(False)
                async with asyncio.timeout(10):
                    assert b"Welcome" in await asyncio.get_running_loop().sock_recv(waiting, 4096)

    run(test())


def test_a_full_dev_shm_refuses_the_asker_and_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with served(tmp_path, {"segments": {"backend": "posix"}}) as rig:
            create, made = Segment.create, []

            def full(size: int, *args: Any) -> Segment:
                if len(made) == 2:
                    raise ResourceError("cannot make a segment: No space left on device", "free /dev/shm")
                made.append(create(size, *args))
                return made[-1]

            with await rig.application() as application:
                handle = (await application.ask(protocol.Lookup(seq=1, service="mine"))).handle
                monkeypatch.setattr(Segment, "create", full)
                answer = await application.ask(protocol.Open(seq=2, handle=handle, slots=64))
                monkeypatch.undo()
                assert (answer.code, answer.hint) == ("resources", "free /dev/shm")
                assert all(segment._fd < 0 for segment in made)
                assert rig.event("resources.exhausted")

    run(test())


CUT = st.builds(lambda cut, more: HELLO[:cut] + more, st.integers(1, 30), st.binary())


@settings(max_examples=150, deadline=None)
@given(data=st.binary(min_size=1, max_size=300) | CUT)
def test_arbitrary_bytes_are_a_protocol_error_or_a_message(data: bytes) -> None:
    for kinds in (protocol.FromPrincipal, protocol.FromModule, protocol.Request):
        decoder: protocol.Decoder[Any] = protocol.Decoder(kinds)
        try:
            message = decoder.decode(data)
        except ProtocolError as error:
            assert error.message
        else:
            assert isinstance(message, msgspec.Struct)


NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(-2, 3) | st.integers(65535, 65538)
WORDS = st.sampled_from(["mine", "connect", "send", "app:1.1", "module:mine", "", "kernel"]) | st.text(
    max_size=40
)
FLOATS = st.floats() | st.none()
REQUESTS = st.one_of(
    st.builds(protocol.Lookup, seq=NUMBERS, service=WORDS),
    st.builds(
        protocol.Open,
        seq=NUMBERS,
        handle=NUMBERS,
        slots=NUMBERS,
        up_bytes=NUMBERS,
        down_bytes=NUMBERS,
        wait=st.sampled_from([0.0, -1.0, float("nan")]),
    ),
    st.builds(protocol.Mapped, seq=NUMBERS, channel=NUMBERS),
    st.builds(protocol.CloseChannel, seq=NUMBERS, channel=NUMBERS),
    st.builds(protocol.ListCaps, seq=NUMBERS),
    st.builds(
        protocol.Attenuate, seq=NUMBERS, handle=NUMBERS, rights=st.lists(WORDS, max_size=4), expires=FLOATS
    ),
    st.builds(protocol.Copy, seq=NUMBERS, handle=NUMBERS),
    st.builds(protocol.Delegate, seq=NUMBERS, handle=NUMBERS, to=WORDS, move=st.booleans()),
    st.builds(protocol.Revoke, seq=NUMBERS, handle=NUMBERS, itself=st.booleans()),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(REQUESTS, max_size=30))
def test_any_requests_in_any_order_are_each_answered(
    tmp_path: Path, requests: list[protocol.Message]
) -> None:
    if not (tmp_path / "modules").exists():
        write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with running(tmp_path) as rig:
            with await rig.application() as application:
                for request in requests:
                    answer = await application.ask(request)
                    assert answer is not None
                    assert answer.seq == request.seq

    run(test())
