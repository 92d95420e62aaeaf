"""What operators ask of one module, one thing at a time, each with a deadline; modules do not wait for each other.

An operation changes what the module should be, then waits until it is. A second one of the same kind joins the first;
one of another kind takes its place at once, so that nobody has to sit out a start that hangs before they may stop it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from snap.dataplane.errors import BusyError, DeadlineError, NotRunningError

from . import supervision

START: Final = "start"
STOP: Final = "stop"
RESTART: Final = "restart"
_DOWN: Final = (supervision.STOPPED, supervision.FAILED)
_NOT_UP: Final = (*_DOWN, supervision.BACKOFF)


@dataclass
class _Operation:
    kind: str
    done: asyncio.Future[None]


class Operations:
    """The operations of the module `name`. `state` gives its state and cause; `settle` is called when it changes."""

    def __init__(self, name: str, state: Callable[[], tuple[str, str]]) -> None:
        self._name, self._state = name, state
        self._current: _Operation | None = None

    async def run(self, kind: str, begin: Callable[[], None], within: float, wait: bool) -> None:
        """Wait at most `within` seconds, if at all. Raises BusyError when another operation took its place,
        DeadlineError, NotRunningError with the cause when the module did not come up."""
        current = self._current
        if current is None or current.kind != kind:
            current = self._begin(kind, begin)
        if wait:
            await self._wait(current, within)

    async def resume(self, kind: str, within: float, wait: bool) -> None:
        """`run` what an earlier kernel began."""
        if self._current is not None and self._current.kind != kind:
            raise self._replaced(kind, self._current.kind)
        await self.run(kind, lambda: None, within, wait)

    def settle(self) -> None:
        current = self._current
        state, cause = self._state()
        if current is None:
            return
        if current.kind == STOP:
            if state in _DOWN:
                self._end(None)
        elif state == supervision.READY:
            self._end(None)
        elif state in _NOT_UP:
            self._end(
                NotRunningError(
                    f"module {self._name!r} did not come up: {cause}",
                    f"see `snapctl module logs {self._name}`",
                )
            )

    def _begin(self, kind: str, begin: Callable[[], None]) -> _Operation:
        if self._current is not None:
            self._end(self._replaced(self._current.kind, kind))
        current = self._current = _Operation(kind, asyncio.get_running_loop().create_future())
        current.done.add_done_callback(lambda done: done.exception())  # nobody has to wait for it
        begin()
        self.settle()  # there may have been nothing to do
        return current

    async def _wait(self, current: _Operation, within: float) -> None:
        try:
            async with asyncio.timeout(within):
                await asyncio.shield(current.done)
        except TimeoutError as error:
            raise DeadlineError(
                f"{current.kind} of module {self._name!r} is not done after {within:g} s",
                "it goes on: see `snapctl module show`",
            ) from error

    def _replaced(self, kind: str, other: str) -> BusyError:
        return BusyError(f"{kind} of module {self._name!r} was replaced by a {other}")

    def _end(self, error: Exception | None) -> None:
        assert self._current is not None
        done, self._current = self._current.done, None
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
