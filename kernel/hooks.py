"""Who hears from a `Runner`: the kernel, and the upgrade that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .incarnation import Incarnation

if TYPE_CHECKING:
    from .runner import Runner


@dataclass(frozen=True)
class Hooks:
    """What a runner tells the kernel. `spawned` and `died` frame the life of a process; `attach` asks for the
    module's channels for a process that has loaded; `fell` follows `died` for one that served, and was not to end;
    `request` gets what a module asks as a principal, `news`
    what it reports of its channels; `lost` engines that go on without their state; `ended` when nobody will
    serve the channels any more; `changed` every change of state; `bad` what could not be decoded; `held` the channels
    (generations by id) that a process has which an earlier kernel started."""

    spawned: Callable[[Runner, Incarnation], None]
    died: Callable[[Runner, Incarnation, str], None]
    fell: Callable[[Runner, Incarnation, str], None]
    attach: Callable[[Runner, Incarnation], None]
    request: Callable[[Runner, Incarnation, Any], None]
    news: Callable[[Runner, Incarnation, Any], None]
    lost: Callable[[Runner, str, str], None]
    ended: Callable[[Runner, str], None]
    changed: Callable[[Runner], None]
    bad: Callable[[Runner, Incarnation, str], None]
    held: Callable[[Runner, Incarnation, dict[int, int]], None]


class Follower(Protocol):
    """The upgrade that runs: told about all processes, its own ones included."""

    @property
    def incarnations(self) -> list[Incarnation]:
        """Processes besides the current one."""

    def on_message(self, incarnation: Incarnation, message: Any) -> None: ...

    def on_exit(self, incarnation: Incarnation, reason: str) -> bool:
        """True: it sees to everything, were it the current one."""

    def on_report(self, incarnation: Incarnation) -> None:
        """After the kernel's death: `running` and `prepared` are what it says."""

    def retires(self, incarnation: Incarnation) -> bool:
        """Whether engines may have ended in it without anything being wrong."""
