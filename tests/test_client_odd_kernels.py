"""The application's client against a kernel that misbehaves, and over a take-over."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from snap.ipc import (
    DeniedError,
    ProtocolError,
    QuotaError,
    SnapError,
    UnreachableError,
    protocol,
    seqpacket,
)
from snap.ipc.client import AsyncClient, Client
from snap.ipc.requester import AsyncRequester, Conversation, SocketRequester
from snap.ipc.segment import Segment
from tests.waiting import LIMIT, run, until

# -- with a kernel that misbehaves --------------------------------------------------------------------------

Answer = Callable[[Any], tuple[bytes, list[int]] | None]


@contextmanager
def odd_kernel(answer: Answer) -> Iterator[tuple[socket.socket, list[Any]]]:
    """A socket whose other end answers each request as `answer` says (None: hangs up), and what it was sent."""
    ours, theirs = seqpacket.pair()
    theirs.settimeout(LIMIT)
    decoder: protocol.Decoder[Any] = protocol.Decoder(protocol.FromPrincipal)
    heard: list[Any] = []

    def serve() -> None:
        while data := seqpacket.recv(theirs)[0]:
            heard.append(decoder.decode(data))
            reply = answer(heard[-1])
            if reply is None:
                break
            if reply[0]:
                seqpacket.send(theirs, *reply)
            seqpacket.close_all(reply[1])
        theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield ours, heard
    finally:
        if ours.fileno() >= 0:
            ours.shutdown(socket.SHUT_RDWR)
            ours.close()
        thread.join(LIMIT)


def opened(seq: int, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "slots": 64,
        "up_bytes": 4096,
        "down_bytes": 4096,
        "arena_bytes": 0,
        "rights": ["send"],
        "backend": "memfd",
    }
    return protocol.encode(protocol.Opened(seq=seq, channel=7, generation=1, **{**fields, **changes}))


def descriptors(count: int, size: int = 4096) -> list[int]:
    fds = []
    for _ in range(count):
        with Segment.create(size) as segment:
            fds.append(os.dup(segment.fd))
    return fds


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        (lambda seq: opened(seq), 4),
        (lambda seq: opened(seq), 5),
        (lambda seq: opened(seq, slots=63), 5),
        (lambda seq: opened(seq, slots=1 << 30), 5),
        (lambda seq: opened(seq, up_bytes=1 << 40), 5),
    ],
    ids=[
        "too few descriptors",
        "no channel in them",
        "odd slots",
        "absurd slots",
        "less memory than promised",
    ],
)
def test_a_channel_that_is_none_is_a_named_error_given_back_and_leaks_nothing(reply: Any, count: int) -> None:
    def answer(message: Any) -> tuple[bytes, list[int]]:
        if isinstance(message, protocol.Lookup):
            return protocol.encode(protocol.Found(seq=message.seq, handle=1, rights=[], ready=True)), []
        return (reply(message.seq), descriptors(count)) if isinstance(message, protocol.Open) else (b"", [])

    with odd_kernel(answer) as (sock, heard):
        with pytest.raises(SnapError) as raised:
            Client(SocketRequester(sock)).open("echo")
        assert raised.value.code in {"protocol", "faulted", "resources"}
        assert until(
            lambda: [message.channel for message in heard if isinstance(message, protocol.CloseChannel)]
        ) == [7]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (lambda seq: b"\xc1garbage", ProtocolError),
        (lambda seq: b"x" * 60_000, ProtocolError),
        (lambda seq: protocol.encode(protocol.Done(seq=seq)), ProtocolError),
        (lambda seq: opened(seq), ProtocolError),
        (lambda seq: protocol.encode(protocol.Failure(seq=seq, code="denied", message="no")), DeniedError),
        (lambda seq: protocol.encode(protocol.Failure(seq=seq, code="new one", message="no")), SnapError),
        (lambda seq: protocol.encode(protocol.Failure(code="quota", message="too many")), QuotaError),
        (lambda seq: None, UnreachableError),
    ],
    ids=[
        "garbage",
        "a heap of it",
        "wrong kind",
        "descriptors",
        "refusal",
        "unknown error",
        "farewell",
        "hangs up",
    ],
)
@pytest.mark.parametrize("form", ["threads", "asyncio"])
def test_every_odd_answer_is_a_named_error_and_leaks_nothing(
    reply: Any, error: type[Exception], form: str
) -> None:
    def answer(message: Any) -> tuple[bytes, list[int]] | None:
        data = reply(message.seq)
        return None if data is None else (data, descriptors(3))

    async def main(sock: socket.socket) -> None:
        requester = AsyncRequester(sock)
        try:
            done = await requester.request(protocol.Lookup(service="echo"), LIMIT)
            seqpacket.close_all(done.fds)
            raise ProtocolError(f"an answer: {done.message}")
        finally:
            requester.close()

    with odd_kernel(answer) as (sock, _), pytest.raises(error):
        if form == "threads":
            Client(SocketRequester(sock)).lookup("echo")
        else:
            run(main(sock))


def test_answers_out_of_order_find_their_threads() -> None:
    waiting: list[Any] = []

    def answer(message: Any) -> tuple[bytes, list[int]]:
        waiting.append(message)
        if len(waiting) < 2:
            return b"", []
        second, first = waiting
        seqpacket.send(theirs, reply_to(first))
        return reply_to(second), []

    def reply_to(message: Any) -> bytes:
        rights = [message.service]
        return protocol.encode(
            protocol.Found(seq=message.seq, handle=len(message.service), rights=rights, ready=True)
        )

    ours, theirs = seqpacket.pair()
    with ours, theirs:
        decoder: protocol.Decoder[Any] = protocol.Decoder(protocol.FromPrincipal)

        def serve() -> None:
            for _ in range(2):
                data, _fds = answer(decoder.decode(seqpacket.recv(theirs)[0]))
                if data:
                    seqpacket.send(theirs, data)

        server = threading.Thread(target=serve)
        server.start()
        client = Client(SocketRequester(ours))
        found: dict[str, Any] = {}
        threads = [
            threading.Thread(target=lambda name=name: found.update({name: client.lookup(name, LIMIT)}))  # type: ignore[misc]
            for name in ("a", "bb")
        ]
        for thread in (*threads, server):
            if thread is not server:
                thread.start()
        for thread in (*threads, server):
            thread.join(LIMIT)
    assert {name: service.handle for name, service in found.items()} == {"a": 1, "bb": 2}


def test_closing_a_client_ends_the_wait_of_another_thread() -> None:
    with odd_kernel(lambda message: (b"", [])) as (sock, heard):
        requester = SocketRequester(sock)
        client = Client(requester, requester.close)
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                client.lookup("echo", LIMIT * 10)
            except SnapError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: heard)
        client.close()
        thread.join(LIMIT)
        assert [type(error) for error in errors] == [UnreachableError]
        client.close()


def test_a_request_that_is_too_large_is_refused_before_it_is_sent() -> None:
    with odd_kernel(lambda message: None) as (sock, heard):
        with pytest.raises(ProtocolError, match="exceeds"):
            Client(SocketRequester(sock)).lookup("x" * 70_000)
        assert heard == []


# -- after another kernel process took over -----------------------------------------------------------------

ADOPTED = protocol.encode(protocol.Adopted(kernel_pid=1))


def found(seq: int, handle: int = 5) -> bytes:
    return protocol.encode(protocol.Found(seq=seq, handle=handle, rights=["send"], ready=True))


def test_what_had_no_answer_is_asked_again_with_its_number_and_what_had_one_is_not() -> None:
    conversation = Conversation()
    (first, _), (second, data) = (conversation.ask(protocol.Lookup(service=name)) for name in ("a", "b"))
    conversation.feed(found(first), [])
    assert conversation.feed(ADOPTED, []) == (0, [data])
    assert conversation.feed(ADOPTED, []) == (0, [data])
    conversation.feed(found(second), [])
    assert conversation.feed(ADOPTED, []) == (0, [])
    assert [conversation.answer(number) is not None for number in (first, second)] == [True, True]
    assert conversation.feed(ADOPTED, []) == (0, [])


def test_an_answer_that_comes_twice_is_dropped_with_its_descriptors_and_its_channel_stays() -> None:
    conversation = Conversation()
    number, _ = conversation.ask(protocol.Open(handle=1))
    conversation.feed(ADOPTED, [])
    before = len(os.listdir("/proc/self/fd"))
    assert conversation.feed(opened(number), descriptors(5)) == (number, [])
    assert conversation.feed(opened(number), descriptors(5)) == (0, [])
    received = conversation.answer(number)
    assert received is not None
    seqpacket.close_all(received.fds)
    assert conversation.feed(opened(number), descriptors(5)) == (0, [])
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_channel_for_the_same_request_is_given_back() -> None:
    conversation = Conversation()
    number, _ = conversation.ask(protocol.Open(handle=1))
    conversation.feed(ADOPTED, [])
    assert conversation.feed(opened(number), []) == (number, [])
    other = protocol.encode(
        protocol.Opened(
            seq=number,
            channel=8,
            generation=1,
            slots=64,
            up_bytes=1,
            down_bytes=1,
            arena_bytes=0,
            rights=[],
            backend="memfd",
        )
    )
    conversation.answer(number)
    back = protocol.Decoder[Any](protocol.FromPrincipal).decode(conversation.feed(other, [])[1][0])
    assert back == protocol.CloseChannel(channel=8)


def forgetful() -> Answer:
    """Takes the first request and forgets it, as one who dies over it; another says that it is there now."""
    asked: list[Any] = []

    def answer(message: Any) -> tuple[bytes, list[int]]:
        asked.append(message)
        return (ADOPTED if len(asked) == 1 else found(message.seq)), []

    return answer


def test_a_thread_that_waits_over_a_take_over_gets_its_answer() -> None:
    with odd_kernel(forgetful()) as (sock, heard):
        assert Client(SocketRequester(sock)).lookup("echo", LIMIT).handle == 5
    assert [message.seq for message in heard] == [1, 1]


def test_a_coroutine_that_waits_over_a_take_over_gets_its_answer() -> None:
    async def test() -> None:
        with odd_kernel(forgetful()) as (sock, heard):
            client = AsyncClient(AsyncRequester(sock))
            assert (await client.alookup("echo", LIMIT)).handle == 5
            client.close()
        assert [message.seq for message in heard] == [1, 1]

    run(test())
