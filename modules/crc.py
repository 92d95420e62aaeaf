"""CRC-32C of many short rows at once."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

_POLYNOMIAL: Final = 0x82F63B78


def _table() -> npt.NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


_TABLE: Final = _table()


def crc32c(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """The checksum of each row of a two-dimensional array of bytes."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in np.ascontiguousarray(rows.T):
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    return ~crc
