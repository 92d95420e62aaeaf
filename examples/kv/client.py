"""The client of the store: GET reads the server's memory, SET and DELETE ask the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Self

from snap.ipc import DeadlineError
from snap.modules.pony import BusyError, ClosedByPeerError, NoMatchError, Pony, RegionError

from .errors import REFUSALS, NoAnswerError, StoreGoneError, TooLargeError, TornError
from .layout import ANSWER, DELETE, REQUEST, SET, SLOT, Layout, Record, decode

TRIES: Final = 16
"""A try fails when the entry's cell was used again between its pointer and its bytes, which the grace makes rare."""


class KeyValue:
    """A store, for one thread at a time. Errors of every call: StoreGoneError, and those of the own channel."""

    def __init__(self, pony: Pony, name: str = "kv", timeout: float = 1.0) -> None:
        """`timeout`: seconds for each answer. Raises NoPeerError, NoAnswerError."""
        self._timeout = timeout
        self._number = 0
        self._peer = pony.connect(name, timeout)
        with self._answering("connect"):
            self._layout = Layout.unpack(self._peer.recv(timeout).data)

    def get(self, key: bytes) -> bytes | None:
        """Its value; None when there is none. The server takes no part. Raises TornError."""
        record = self.find(key)
        return None if record is None else record.value

    def find(self, key: bytes) -> Record | None:
        """`get`, with the version."""
        layout, hash = self._layout, self._layout.hash(key)
        for _ in range(TRIES):
            try:
                cell = self._peer.scan_and_read(
                    layout.handle,
                    hash,
                    layout.cell,
                    entries=layout.slots,
                    stride=SLOT,
                    offset=layout.bucket(hash),
                    timeout=self._timeout,
                )
            except NoMatchError:
                return None
            except (ClosedByPeerError, RegionError) as error:
                raise StoreGoneError("get: the server is gone", "start it, and connect again") from error
            records = decode(cell, hash)
            if records is not None:
                return records.get(key)
        raise TornError(f"get: the entry was replaced {TRIES} times while it was read", "try again")

    def set(self, key: bytes, value: bytes) -> int:
        """The entry's version. Raises TooLargeError, BucketFullError, StoreFullError, NoAnswerError."""
        if len(key) + len(value) > self._layout.cell:
            raise TooLargeError(f"set: {len(key)} and {len(value)} bytes, a cell has {self._layout.cell}")
        return self._ask(SET, "set", key, value)

    def delete(self, key: bytes) -> bool:
        """Whether there was one. Raises NoAnswerError."""
        return len(key) <= self._layout.cell and self._ask(DELETE, "delete", key) > 0

    def close(self) -> None:
        """Idempotent."""
        self._peer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, code: int, what: str, key: bytes, value: bytes = b"") -> int:
        self._number += 1
        end = time.monotonic() + self._timeout
        with self._answering(what):
            self._peer.send(REQUEST.pack(self._number, code, len(key)) + key + value, timeout=self._timeout)
            number = 0
            # Answers that came too late for their request come before ours.
            while number != self._number:
                message = self._peer.recv(max(0.0, end - time.monotonic()))
                number, refused, version = ANSWER.unpack_from(message.data)
        if refused:
            raise REFUSALS[refused - 1](message.data[ANSWER.size :].decode())
        return int(version)

    @contextmanager
    def _answering(self, what: str) -> Iterator[None]:
        try:
            yield
        except (DeadlineError, BusyError) as error:
            message = f"{what}: the server has not answered within {self._timeout} s"
            raise NoAnswerError(message, "it may still be done") from error
        except ClosedByPeerError as error:
            raise StoreGoneError(f"{what}: the server is gone", "start it, and connect again") from error
