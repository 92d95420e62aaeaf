"""What the store refuses, and what a client meets."""

from __future__ import annotations

from typing import Final

from snap.ipc import DeadlineError, SnapError


class KeyValueError(SnapError):
    """Base of the others."""

    code = "kv"


class BucketFullError(KeyValueError):
    """All slots of the key's bucket have other hashes. Nothing was changed."""


class StoreFullError(KeyValueError):
    """There are as many entries as the store holds. Nothing was changed."""


class TooLargeError(KeyValueError):
    """Key and value do not fit into a cell, with other keys of the same hash. Nothing was changed."""


class TornError(KeyValueError):
    """Each try of a GET met an entry that was being replaced."""


class StoreGoneError(KeyValueError):
    """The server ended, and its memory with it."""


class NoAnswerError(KeyValueError, DeadlineError):
    """The server did not answer in time. What it was asked may still be done."""


REFUSALS: Final[tuple[type[KeyValueError], ...]] = (BucketFullError, StoreFullError, TooLargeError)
