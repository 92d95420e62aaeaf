"""Waiting for what other threads and processes do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

LIMIT = 20.0
"""Longer than anything here takes; only a wrong program meets it."""

T = TypeVar("T")


def until(ready: Callable[[], T], what: str = "what was waited for") -> T:
    """Ask until the answer is true."""
    end = time.monotonic() + LIMIT
    while not (answer := ready()):
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.002)
    return answer


def run(coroutine: Any) -> Any:
    """Its result, under asyncio."""

    async def bounded() -> Any:
        async with asyncio.timeout(LIMIT):
            return await coroutine

    return asyncio.run(bounded())


class Background:
    """A call in another thread, with its result or exception."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,))
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except BaseException as error:
            self.error = error

    def finish(self) -> Any:
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the call never returned"
        if self.error is not None:
            raise self.error.with_traceback(None)
        return self.result
