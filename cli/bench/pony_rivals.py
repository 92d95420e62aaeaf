"""What Pony is measured against: TCP, and calls of a server that reads for its clients."""

from __future__ import annotations

import array
import fcntl
import importlib.util
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, Final

from .pony_hosts import busy

SMALL: Final = 64
LARGE: Final = 1 << 20
CONGESTION: Final = b"cubic"
_LONG: Final = 60.0
_SIOCETHTOOL: Final = 0x8946
_GET_STRINGS: Final = 0x1B
_SET_FEATURES: Final = 0x3B
_FEATURE_NAMES: Final = 4
_NAME: Final = 32
"""Commands, a set of strings, and the bytes of one, of <linux/ethtool.h>."""

_OFFLOADS: Final = frozenset(
    {"tx-tcp-segmentation", "tx-udp-segmentation", "tx-generic-segmentation", "rx-gro"}
)
_REQUEST: Final = struct.Struct("<II")
_METHOD: Final = "/snap.bench/read"


class Rivals:
    """The duties of an application with TCP and RPC: units as in `pony_app`."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._region = os.urandom(1 << 20)

    # -- TCP ----------------------------------------------------------------------------------------------------

    def tcp_listen(self, address: str) -> int:
        """The port."""
        self._listener = socket.create_server((address, 0), backlog=1024)
        # Accepted sockets inherit it.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION)
        port: int = self._listener.getsockname()[1]
        return port

    def tcp_connect(self, address: str, port: int, count: int) -> None:
        for _ in range(count):
            sock = socket.socket()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION)
            sock.connect((address, port))
            self._add(sock)

    def tcp_accept(self, count: int) -> None:
        for _ in range(count):
            self._add(self._listener.accept()[0])

    def tcp_close(self) -> None:
        while self._sockets:
            self._sockets.pop().close()

    def tcp_echo(self, count: int, spin: bool) -> None:
        sock = self._one(spin)
        for _ in range(count):
            sock.sendall(_receive(sock))

    def tcp_trips(self, count: int, spin: bool) -> list[int]:
        from .pony_app import timed

        sock, data = self._one(spin), bytes(SMALL)

        def trip() -> None:
            sock.sendall(data)
            _receive(sock)

        return timed(count, trip)

    def tcp_send(self, count: int) -> None:
        """As many bytes as `count` large messages have, over all connections alike."""
        share, data = count * LARGE // len(self._sockets), memoryview(bytes(LARGE))
        if len(self._sockets) == 1:
            self._one(False)
            for _ in range(count):
                self._sockets[0].sendall(data)
            return
        self._share(share, select.EPOLLOUT, lambda sock, left: sock.send(data[: min(left, LARGE)]))

    def tcp_take(self, count: int) -> dict[str, float]:
        """Until they have come; bytes, seconds, and CPU seconds of the whole machine, from the first on."""
        share, buffer = count * LARGE // len(self._sockets), memoryview(bytearray(LARGE))
        if len(self._sockets) == 1:
            self._one(False)
        first = self._sockets[0]
        first.setblocking(True)
        first.recv(1, socket.MSG_PEEK)
        begin, before = time.monotonic(), busy()
        if len(self._sockets) == 1:
            left = share
            while left:
                left -= first.recv_into(buffer[: min(left, LARGE)])
        else:
            self._share(share, select.EPOLLIN, lambda sock, left: sock.recv_into(buffer[: min(left, LARGE)]))
        return {
            "bytes": share * len(self._sockets),
            "seconds": time.monotonic() - begin,
            "cpu": busy() - before,
        }

    def _share(self, share: int, event: int, move: Callable[[socket.socket, int], int]) -> None:
        """Move `share` bytes on each connection, whichever is ready."""
        left = {sock.fileno(): share for sock in self._sockets}
        sockets = {sock.fileno(): sock for sock in self._sockets}
        with select.epoll() as ready:
            for number, sock in sockets.items():
                sock.setblocking(False)
                ready.register(number, event)
            while left:
                for number, _ in ready.poll(_LONG):
                    left[number] -= move(sockets[number], left[number])
                    if not left[number]:
                        ready.unregister(number)
                        del left[number]

    def _add(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets.append(sock)

    def _one(self, spin: bool) -> socket.socket:
        self._sockets[0].setblocking(not spin)
        return self._sockets[0]

    # -- calls ----------------------------------------------------------------------------------------------------

    def rpc_serve(self, path: str, kind: str) -> None:
        """Serve reads of a region at that Unix socket: `kind` is grpc or socket."""
        if kind == "grpc":
            self._serve_grpc(path)
            return
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(path)
        listener.listen()
        threading.Thread(target=self._serve_socket, args=(listener,), daemon=True).start()

    def rpc_cpu(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()

    def rpc_reads(self, path: str, kind: str, seconds: float) -> dict[str, float]:
        """One read after the other."""
        call = (_grpc_caller if kind == "grpc" else _socket_caller)(path)
        call(_REQUEST.pack(0, SMALL))
        operations, begin = 0, time.monotonic()
        while (now := time.monotonic()) < begin + seconds:
            call(_REQUEST.pack(operations * SMALL % len(self._region), SMALL))
            operations += 1
        return {"operations": operations, "seconds": now - begin}

    def _read(self, request: bytes, _: object = None) -> bytes:
        offset, size = _REQUEST.unpack(request)
        return self._region[offset : offset + size]

    def _serve_socket(self, listener: socket.socket) -> None:
        while True:
            with listener.accept()[0] as sock:
                while request := sock.recv(_REQUEST.size):
                    sock.send(self._read(request))

    def _serve_grpc(self, path: str) -> None:
        import grpc  # type: ignore[import-not-found,import-untyped,unused-ignore]

        service, method = _METHOD[1:].split("/")
        handler = grpc.unary_unary_rpc_method_handler(self._read)
        self._server = grpc.server(futures.ThreadPoolExecutor(1))
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    # -- the link -----------------------------------------------------------------------------------------------

    def offload(self, device: str, on: bool) -> None:
        """Switch segmentation and coalescing of `device`, as `ethtool -K` does. Raises OSError."""
        names = struct.pack("III", _GET_STRINGS, _FEATURE_NAMES, 0) + bytes(256 * _NAME)
        answer = _ethtool(device, names)
        known, found = struct.unpack_from("I", answer, 8)[0], answer[12:]
        count = -(-known // 32)
        words = [0] * (2 * count)
        for bit in range(known):
            if found[bit * _NAME : (bit + 1) * _NAME].rstrip(b"\0").decode() in _OFFLOADS:
                words[bit // 32 * 2] |= 1 << bit % 32
                words[bit // 32 * 2 + 1] |= on << bit % 32
        _ethtool(device, struct.pack(f"II{2 * count}I", _SET_FEATURES, count, *words))


def _ethtool(device: str, request: bytes) -> bytes:
    """What the system leaves in place of the request."""
    buffer = array.array("B", request)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        order = struct.pack("16sP16x", device.encode(), buffer.buffer_info()[0])
        fcntl.ioctl(sock, _SIOCETHTOOL, order)
    return buffer.tobytes()


def rpc_kinds() -> dict[str, str]:
    """The kinds of calls that can be measured, and what they are called."""
    found = {"socket": "Unix socket RPC"}
    if importlib.util.find_spec("grpc") is not None:
        found["grpc"] = "gRPC unary"
    return found


def _socket_caller(path: str) -> Callable[[bytes], bytes]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)

    def call(request: bytes) -> bytes:
        sock.send(request)
        return sock.recv(SMALL)

    return call


def _grpc_caller(path: str) -> Callable[[bytes], Any]:
    import grpc

    call: Callable[[bytes], Any] = grpc.insecure_channel(f"unix:{path}").unary_unary(_METHOD)
    return call


def _receive(sock: socket.socket) -> bytes:
    """A small message. On a non-blocking socket it spins."""
    data = b""
    while len(data) < SMALL:
        try:
            data += sock.recv(SMALL - len(data))
        except BlockingIOError:
            continue
    return data
