"""A channel without a kernel, poked and shared with other processes."""

from __future__ import annotations

import contextlib
import mmap
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from snap.dataplane import _native

OFF_STATE = 64
TAIL_UP = 4096
SLOTS_AREA = 8192
MODES = (_native.SPIN, _native.ADAPTIVE, _native.BLOCK)
Pairs = Callable[..., Any]


def poke(pair: Any, offset: int, value: int) -> None:
    """Write a word of the ring segment, as anyone with the descriptor can."""
    with mmap.mmap(pair.ring.fd, pair.ring.size) as memory:
        struct.pack_into("<Q", memory, offset, value)


def ends(pair: Any) -> str:
    """Python source that makes the arguments of an endpoint in a child that inherited the descriptors."""
    bells = (pair.server.fileno(), pair.client.fileno())
    sizes = (pair.up.size, pair.down.size)
    return repr((pair.ring.fd, pair.up.fd, pair.down.fd, 64, *sizes, bells, 1))


@contextlib.contextmanager
def child(pair: Any, role: int, body: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `end`, an endpoint of the pair's channel, and runs `body`."""
    prelude = (
        "import os, signal, sys, time\n"
        "from snap.dataplane import _native\n"
        f"end = _native.Endpoint({role}, *{ends(pair)})\n"
        "print('ready', flush=True)\n"
    )
    fds = (pair.ring.fd, pair.up.fd, pair.down.fd, pair.server.fileno(), pair.client.fileno())
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + body],
        pass_fds=fds,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


def with_rights(pair: Any, rights: int) -> tuple[Any, Any]:
    bells = (pair.server.fileno(), pair.client.fileno())
    geometry = (pair.ring.fd, pair.up.fd, pair.down.fd, 64, pair.up.size, pair.down.size, bells, 1, -1, -1)
    return tuple(_native.Endpoint(role, *geometry, rights) for role in (_native.CLIENT, _native.SERVER))  # type: ignore[return-value]
