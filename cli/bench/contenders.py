"""The ways of passing messages that are compared: each knows how to set itself up in two processes and to pass bytes.

`offer` runs in the measuring process, `accept` in its peer; both return a `Way`, whose calls are bound
straight to what is measured, with nothing of ours in between.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final

from snap import ipc
from snap.ipc import direct, seqpacket

MIB: Final = 1 << 20
Send = Callable[[bytes], object]
Receive = Callable[[], Any]


@dataclass
class Way:
    """How one end sends and receives. What is None the contender cannot do.

    `loan(size)`/`borrow()` send and receive a payload in place, untouched; `fill(data)` writes it first. An end that
    `serves_itself` echoes on a thread that nobody calls.
    """

    send: Send
    recv: Receive
    send_many: Callable[[list[bytes]], object] | None = None
    recv_many: Callable[[int], list[bytes]] | None = None
    send_packed: Callable[[Any], object] | None = None
    recv_packed: Callable[[Any], int] | None = None
    send_large: Send | None = None
    recv_large: Receive | None = None
    loan: Callable[[int], object] | None = None
    fill: Send | None = None
    borrow: Callable[[], object] | None = None
    endpoint: Any = None
    serves_itself: bool = False


@dataclass(frozen=True)
class Contender:
    """`polls`: it spins while it waits. `missing` says why it cannot run here; empty when it can."""

    name: str
    offer: Callable[[socket.socket, ExitStack], Way]
    accept: Callable[[socket.socket, ExitStack], Way]
    polls: bool = False
    missing: str = ""


# -- Snap ---------------------------------------------------------------------------------------------------


def _snap_way(endpoint: Any, wait: int) -> Way:
    # Sending never waits here; `partial` adds the least that an argument can.
    send, recv = endpoint.send, partial(endpoint.recv, None, wait)

    def loan(size: int) -> None:
        endpoint.send_loan(endpoint.loan(size))

    def fill(data: bytes) -> None:
        lent = endpoint.loan(len(data))
        lent.view[:] = data
        endpoint.send_loan(lent)

    return Way(
        send=send,
        recv=recv,
        send_many=endpoint.send_many,
        recv_many=endpoint.recv_many,
        send_packed=lambda records: endpoint.send_packed(records, 64),
        recv_packed=lambda out: endpoint.recv_packed(out, 64),
        send_large=send,
        recv_large=recv,
        loan=loan,
        fill=fill,
        borrow=lambda: endpoint.receive().release(),
        endpoint=endpoint,
    )


def _snap(name: str, wait: int) -> Contender:
    def offer(sock: socket.socket, stack: ExitStack) -> Way:
        made = direct.offer(sock)
        stack.callback(made.close)
        return _snap_way(made.endpoint, wait)

    def accept(sock: socket.socket, stack: ExitStack) -> Way:
        endpoint = direct.accept(sock)
        stack.callback(endpoint.close)
        return _snap_way(endpoint, wait)

    return Contender(name, offer, accept, polls=wait == ipc.SPIN)


def _nothing(data: bytes = b"") -> None:
    pass


def _snap_engine() -> Contender:
    def offer(sock: socket.socket, stack: ExitStack) -> Way:
        made = direct.offer(sock)
        stack.callback(made.close)
        return _snap_way(made.endpoint, ipc.SPIN)

    def accept(sock: socket.socket, stack: ExitStack) -> Way:
        stack.callback(direct.echo(direct.accept(sock)).stop)
        return Way(send=_nothing, recv=_nothing, serves_itself=True)

    return Contender("Snap, Rust engine", offer, accept, polls=True)


# -- the system's own -----------------------------------------------------------------------------------------


def _exactly(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    got = 0
    while got < size:
        count = sock.recv_into(view[got:])
        if count == 0:
            raise ConnectionError("the peer has gone")
        got += count
    return data


def _unix_way(sock: socket.socket) -> Way:
    return Way(
        send=sock.sendall,
        recv=lambda: sock.recv(64, socket.MSG_WAITALL),
        send_large=sock.sendall,
        recv_large=lambda: _exactly(sock, MIB),
    )


def _pass_socket(sock: socket.socket, stack: ExitStack) -> socket.socket:
    near, far = socket.socketpair()
    with far:
        seqpacket.send(sock, b"socket", [far.fileno()])
    return stack.enter_context(near)


def _take_socket(sock: socket.socket, stack: ExitStack) -> socket.socket:
    _, [fd] = seqpacket.recv(sock)
    return stack.enter_context(socket.socket(fileno=fd))


def _pipe_way(sock: socket.socket) -> Way:
    # What multiprocessing.Pipe() is: a Connection over one end of a socket pair.
    connection = Connection(sock.detach())
    send, recv = connection.send_bytes, connection.recv_bytes
    return Way(send=send, recv=recv, send_large=send, recv_large=recv)


# -- ZeroMQ ---------------------------------------------------------------------------------------------------


def _zmq_way(stack: ExitStack, address: str, bind: bool) -> Way:
    import zmq

    context = stack.enter_context(zmq.Context())
    pair = stack.enter_context(context.socket(zmq.PAIR))
    pair.setsockopt(zmq.LINGER, 0)
    if bind:
        pair.bind(address)
    else:
        pair.connect(address)
    return Way(send=pair.send, recv=pair.recv, send_large=pair.send, recv_large=pair.recv)


def _zmq_offer(sock: socket.socket, stack: ExitStack) -> Way:
    address = f"ipc://@snap-bench-{os.getpid()}-{time.monotonic_ns()}"
    way = _zmq_way(stack, address, bind=True)
    seqpacket.send(sock, address.encode())
    return way


# -- iceoryx2 -------------------------------------------------------------------------------------------------


def _iceoryx_way(name: str, role: int) -> Way:
    # By name: an optional package without types.
    iox2: Any = importlib.import_module("iceoryx2")

    iox2.set_log_level(iox2.LogLevel.Error)
    node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)

    def service(direction: int, size: int) -> Any:
        label = iox2.ServiceName.new(f"{name}/{direction}/{size}")
        builder = node.service_builder(label).publish_subscribe(iox2.Slice[ctypes.c_uint8])
        # Loses nothing: a publisher waits for a slow subscriber, as all the others do.
        return builder.subscriber_max_buffer_size(64).enable_safe_overflow(False).open_or_create()

    ports: dict[int, tuple[Any, Any]] = {}
    for size in (64, MIB):
        publisher = service(role, size).publisher_builder().initial_max_slice_len(size).create()
        ports[size] = publisher, service(1 - role, size).subscriber_builder().create()

    def sender(size: int) -> Send:
        loan, move = ports[size][0].loan_slice_uninit, ctypes.memmove

        def send(data: bytes) -> None:
            sample = loan(size)
            move(sample.payload_ptr, data, size)
            sample.assume_init().send()

        return send

    def receiver(size: int) -> Receive:
        receive, read = ports[size][1].receive, ctypes.string_at

        def recv() -> bytes:
            while (sample := receive()) is None:
                pass
            data: bytes = read(sample.payload_ptr, size)
            sample.delete()
            return data

        return recv

    def loan(size: int) -> None:
        ports[size][0].loan_slice_uninit(size).assume_init().send()

    def borrow() -> None:
        receive = ports[MIB][1].receive
        while (sample := receive()) is None:
            pass
        sample.delete()

    return Way(
        send=sender(64),
        recv=receiver(64),
        send_large=sender(MIB),
        recv_large=receiver(MIB),
        loan=loan,
        fill=sender(MIB),
        borrow=borrow,
    )


def _iceoryx_offer(sock: socket.socket, stack: ExitStack) -> Way:
    name = f"snap-bench-{os.getpid()}-{time.monotonic_ns()}"
    way = _iceoryx_way(name, 0)
    seqpacket.send(sock, name.encode())
    # What is sent before the subscriber exists would be lost.
    seqpacket.recv(sock)
    way.send(b"!" * 64)
    return way


def _iceoryx_accept(sock: socket.socket, stack: ExitStack) -> Way:
    way = _iceoryx_way(seqpacket.recv(sock)[0].decode(), 1)
    seqpacket.send(sock, b"here")
    way.recv()
    return way


# -- the floor ------------------------------------------------------------------------------------------------


def _bare_way(path: str, fd: int, role: int) -> Way:
    spec = importlib.util.spec_from_file_location("bare_ring", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    ring = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ring)
    ring.attach(fd, role)
    os.close(fd)
    return Way(send=ring.send, recv=ring.recv)


def _bare(path: str, why_not: str) -> Contender:
    def offer(sock: socket.socket, stack: ExitStack) -> Way:
        fd = os.memfd_create("bare-ring")
        os.ftruncate(fd, 1 << 20)
        seqpacket.send(sock, path.encode(), [fd])
        return _bare_way(path, fd, 0)

    def accept(sock: socket.socket, stack: ExitStack) -> Way:
        data, [fd] = seqpacket.recv(sock)
        return _bare_way(data.decode(), fd, 1)

    return Contender("bare C ring", offer, accept, polls=True, missing=why_not)


def contenders(bare_ring: str = "", why_not: str = "") -> dict[str, Contender]:
    """All of them by name. `bare_ring`: the compiled floor, or empty and `why_not` there is none."""
    iceoryx = "" if importlib.util.find_spec("iceoryx2") else "pip install iceoryx2"
    found = [
        _snap("Snap, spinning", ipc.SPIN),
        _snap("Snap, adaptive", ipc.ADAPTIVE),
        _snap("Snap, blocking", ipc.BLOCK),
        _snap_engine(),
        Contender(
            "Unix socket",
            lambda sock, stack: _unix_way(_pass_socket(sock, stack)),
            lambda sock, stack: _unix_way(_take_socket(sock, stack)),
        ),
        Contender(
            "Pipe",
            lambda sock, stack: _pipe_way(_pass_socket(sock, stack)),
            lambda sock, stack: _pipe_way(_take_socket(sock, stack)),
        ),
        Contender(
            "ZeroMQ",
            _zmq_offer,
            lambda sock, stack: _zmq_way(stack, seqpacket.recv(sock)[0].decode(), bind=False),
        ),
        Contender("iceoryx2", _iceoryx_offer, _iceoryx_accept, polls=True, missing=iceoryx),
        _bare(bare_ring, why_not),
    ]
    return {contender.name: contender for contender in found}
