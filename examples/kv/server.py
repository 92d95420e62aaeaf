"""The server of the store: `python -m examples.kv.server`. It writes; clients read without it."""

from __future__ import annotations

import argparse
import struct
from contextlib import suppress
from dataclasses import fields
from select import select

from snap.ipc import DeadlineError, SnapError, connect
from snap.modules.pony import ClosedByPeerError, Connection, Pony, PonyError

from .layout import ANSWER, DELETE, REFUSALS, REQUEST, SET, KeyValueError, Layout
from .store import Store, arena_bytes


def answer(store: Store, request: bytes) -> bytes:
    """Do it. Raises struct.error for what is no request."""
    number, what, length = REQUEST.unpack_from(request)
    key, value = request[REQUEST.size :][:length], request[REQUEST.size + length :]
    try:
        if what == SET:
            return ANSWER.pack(number, 0, store.set(key, value))
        if what == DELETE:
            return ANSWER.pack(number, 0, store.delete(key))
    except KeyValueError as refusal:
        return ANSWER.pack(number, 1 + REFUSALS.index(type(refusal)), 0) + str(refusal).encode()
    raise struct.error(f"no request has the number {what}")


def answer_all(store: Store, peer: Connection) -> bool:
    """Whether the peer may ask again."""
    try:
        while True:
            peer.send(answer(store, peer.recv(timeout=0).data))
    except DeadlineError:
        return True
    except ClosedByPeerError:
        return False
    except (struct.error, PonyError):
        # It sends what nobody understands, or does not take its answers.
        peer.close()
        return False


def serve(pony: Pony, store: Store) -> None:
    """For ever: greet each peer with the layout, then do what it asks."""
    peers: list[Connection] = []
    while True:
        with suppress(DeadlineError):
            while True:
                peer = pony.accept(timeout=0)
                with suppress(PonyError):
                    peer.send(store.layout.pack())
                    peers.append(peer)
        peers = [peer for peer in peers if answer_all(store, peer)]
        # `recv` waits for one peer; this is for whatever comes next, from any.
        if pony.channel.arm_recv():
            select([pony.channel], [], [])
            pony.channel.drain_bell()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="kv")
    sizes = [field for field in fields(Layout) if field.name != "handle"]
    for size in sizes:
        parser.add_argument(f"--{size.name}", type=int, default=size.default)
    options = parser.parse_args()
    try:
        layout = Layout(**{size.name: getattr(options, size.name) for size in sizes})
        with connect(name="kv") as client, Pony.open(client, arena_bytes(layout)) as pony:
            store = Store(pony, layout)
            pony.bind(options.name)
            print(f"{options.name} is ready", flush=True)
            serve(pony, store)
    except SnapError as error:
        raise SystemExit(f"kv: {error}") from error
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
