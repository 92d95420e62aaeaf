"""The server of the store: `python -m examples.kv.server`. It writes; clients read without it."""

from __future__ import annotations

import argparse
import struct
from contextlib import suppress
from dataclasses import fields
from select import select

from snap.ipc import DeadlineError, SnapError, connect
from snap.modules.pony import Connection, Pony, PonyError

from .errors import REFUSALS, KeyValueError
from .layout import ANSWER, DELETE, REQUEST, SET, Layout
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
    except (struct.error, PonyError):
        # It is gone, sends what nobody understands, or does not take its answers.
        peer.close()
        return False


def serve(pony: Pony, store: Store) -> None:
    """For ever: greet each peer with the layout, then do what it asks."""
    peers: list[Connection] = []
    channel = pony.channel
    while True:
        seen = channel.stats["received"]
        with suppress(DeadlineError):
            while True:
                peers.append(pony.accept(timeout=0))
                with suppress(PonyError):
                    peers[-1].send(store.layout.pack())
        peers = [peer for peer in peers if answer_all(store, peer)]
        # What came while a peer was answered may be for one before it. When nothing came, wait for all at once; a
        # channel is paused while Pony's engine is replaced.
        if channel.stats["received"] == seen and (channel.arm_recv() or channel.state == "paused"):
            select([channel], [], [])
            channel.drain_bell()


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
