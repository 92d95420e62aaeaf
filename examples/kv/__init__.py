"""A key-value store whose GETs need no work of its server."""

from .client import KeyValue
from .layout import (
    BucketFullError,
    KeyValueError,
    Layout,
    NoAnswerError,
    Record,
    StoreFullError,
    StoreGoneError,
    TooLargeError,
    TornError,
)

__all__ = [
    "BucketFullError",
    "KeyValue",
    "KeyValueError",
    "Layout",
    "NoAnswerError",
    "Record",
    "StoreFullError",
    "StoreGoneError",
    "TooLargeError",
    "TornError",
]
