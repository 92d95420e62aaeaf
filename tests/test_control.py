"""The operator's client: requests, repeated ones, events without gaps, kernels that are slow, dead, or back again."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from snap.ipc import DeadlineError, NotFoundError, SnapError, UnreachableError, UsageError, protocol
from snap.ipc.control import ControlClient

LIMIT = 20.0
Start = Callable[..., Any]


# -- with a real kernel -------------------------------------------------------------------------------------


def test_a_request_is_answered_with_builtins_and_a_refusal_is_its_error(kernel: Start) -> None:
    one = kernel()
    with one.control() as control:
        status = control.call("kernel.status")
        assert (status["pid"], status["runtime_dir"]) == (one.pid, str(one.directory))
        with pytest.raises(NotFoundError):
            control.call("module.show", name="nothing")
        with pytest.raises(UsageError):
            control.call("no.such.thing")
        with pytest.raises(SnapError):
            control.call("module.show", wrong=1)
        assert control.call("kernel.status")["pid"] == one.pid


def test_the_same_key_gets_the_first_answer_again(kernel: Start) -> None:
    one = kernel()
    with one.control() as control:
        first = control.call("module.restart", key="once", name="echo", wait=True)
        assert control.call("module.restart", key="once", name="echo", wait=True) == first
        assert control.call("module.show", name="echo")["generation"] == first["generation"]
        again = control.call("module.restart", key="twice", name="echo", wait=True)
        assert again["generation"] == first["generation"] + 1


def test_a_stopped_kernel_is_a_deadline_and_the_next_request_is_answered(kernel: Start) -> None:
    one = kernel()
    with one.control() as control:
        one.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineError, match=r"kernel\.status within"):
                control.call("kernel.status", timeout=0.1)
        finally:
            one.process.send_signal(signal.SIGCONT)
        assert control.call("kernel.status")["pid"] == one.pid


def test_a_kernel_that_dies_under_a_request_is_unreachable_and_its_successor_is_found(kernel: Start) -> None:
    one = kernel()
    with one.control(timeout=LIMIT * 10) as control:
        assert control.call("kernel.status")["pid"] == one.pid
        one.process.send_signal(signal.SIGSTOP)
        killer = threading.Timer(0.2, os.kill, (one.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(UnreachableError):
            control.call("kernel.status")
        killer.join()
        one.process.wait()
        two = kernel(directory=one.directory)
        assert control.call("kernel.status")["pid"] == two.pid


def test_events_come_from_the_past_and_then_live_each_once_and_in_order(kernel: Start) -> None:
    one = kernel()
    with one.control() as control, one.control() as other:
        stream = control.events(since=0)
        past = list(itertools.islice(stream, 3))
        assert [event.seq for event in past] == [1, 2, 3]
        other.call("module.restart", name="echo", wait=True)
        seen = list(itertools.takewhile(lambda event: event.kind != "module.stopping", stream))
        rest = list(itertools.islice(stream, 3))
        numbers = [event.seq for event in (*past, *seen)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert [event.seq for event in rest] == [len(numbers) + 2, len(numbers) + 3, len(numbers) + 4]


def test_events_from_now_on_leave_the_past_out_and_kinds_leave_others_out(kernel: Start) -> None:
    one = kernel()
    with one.control() as control, one.control() as other:
        other.call("module.show", name="echo")
        newest = other.call("events.since", seq=0, limit=1000)[-1]["seq"]
        stream = control.events(kinds=["module.*"])
        restarted = threading.Timer(0.1, other.call, ("module.restart",), {"name": "echo", "wait": True})
        restarted.start()
        event = next(stream)
        restarted.join()
        assert event.seq > newest
        assert event.kind.startswith("module.")


def test_following_events_ends_with_an_error_when_the_kernel_goes(kernel: Start) -> None:
    one = kernel()
    with one.control() as control:
        stream = control.events(since=0)
        next(stream)
        one.stop()
        with pytest.raises(UnreachableError):
            for _ in stream:
                pass


# -- with a kernel that misbehaves --------------------------------------------------------------------------


@contextmanager
def odd_control(directory: Path, answers: Callable[[bytes], list[bytes]]) -> Iterator[None]:
    """A ROUTER that answers each request as `answers` says."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    router.bind(f"ipc://{directory / 'control.sock'}")
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if router.poll(20):
                identity, data = router.recv_multipart()
                for answer in answers(data):
                    router.send_multipart([identity, answer])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        context.destroy(linger=0)


def test_an_answer_to_another_request_is_not_taken_for_this_one(tmp_path: Path) -> None:
    decoder: protocol.Decoder[protocol.Request] = protocol.Decoder(protocol.Request)

    def answers(data: bytes) -> list[bytes]:
        key = decoder.decode(data).key
        return [
            protocol.encode(protocol.Response(key="another", ok=True, result="wrong")),
            protocol.encode(protocol.Response(key=key, ok=True, result="right")),
        ]

    with odd_control(tmp_path, answers), ControlClient(tmp_path, LIMIT) as control:
        assert control.call("kernel.status") == "right"


def test_an_answer_that_cannot_be_decoded_is_a_protocol_error_and_the_next_one_counts(tmp_path: Path) -> None:
    decoder: protocol.Decoder[protocol.Request] = protocol.Decoder(protocol.Request)
    replies = iter([b"\xc1", None])

    def answers(data: bytes) -> list[bytes]:
        request = decoder.decode(data)
        return [next(replies) or protocol.encode(protocol.Response(key=request.key, ok=True, result=1))]

    with odd_control(tmp_path, answers), ControlClient(tmp_path, LIMIT) as control:
        with pytest.raises(SnapError, match="cannot be decoded"):
            control.call("kernel.status")
        assert control.call("kernel.status") == 1


def test_arguments_that_cannot_be_sent_are_refused_by_name(tmp_path: Path) -> None:
    with ControlClient(tmp_path) as control, pytest.raises(UsageError, match=r"module\.show"):
        control.call("module.show", name=object())


def test_a_listener_that_hangs_up_is_asked_twice_and_then_given_up(tmp_path: Path) -> None:
    """What is no kernel at all: it takes connections and closes them."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen()
        stop = threading.Event()

        def serve() -> None:
            listener.settimeout(0.02)
            while not stop.is_set():
                try:
                    listener.accept()[0].close()
                except TimeoutError:
                    continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with ControlClient(tmp_path) as control, pytest.raises(SnapError):
                control.call("kernel.status", timeout=2.0)
        finally:
            stop.set()
            thread.join()
