"""What happens to a module while it serves: it is upgraded, killed, loses its kernel, is rolled back."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from snap import ipc
from snap.ipc.control import ControlClient
from snap.ipc.protocol import EventView, KernelView, ModuleView, UpgradeView

MODULE: Final = "relay"
# How long the stream is left alone before and after each event, and how long a new version is looked at.
QUIET_SECONDS: Final = 0.5
AFTER_SECONDS: Final = 0.3
BAKE_SECONDS: Final = 1.0
ASK_SECONDS: Final = 2.0
LOOK_EVERY: Final = 0.02
PATIENCE_SECONDS: Final = 30.0

T = TypeVar("T")


@dataclass(frozen=True)
class Happened:
    """`engine_ns` without a poll, as the engines themselves measured; None where no engine stopped."""

    event: str
    what: str
    engine_ns: int | None = None
    client_ns: int | None = None


def relay(runtime_dir: Path, newer: Path) -> dict[str, Act]:
    """What the demo can have happen to the relay, by its names."""
    victim = Victim(runtime_dir, MODULE, newer)
    return {
        "upgrade": victim.upgrade,
        "kill": victim.kill,
        "kernel": victim.kill_kernel,
        "rollback": victim.roll_back,
    }


def write_newer(folder: Path) -> Path:
    """A copy of the shipped relay below `folder`, that says of itself that it is a later version."""
    spec = find_spec(f"snap.modules.{MODULE}")
    assert spec is not None and spec.submodule_search_locations, "the relay is shipped"
    target = folder / MODULE
    shutil.copytree(spec.submodule_search_locations[0], target, ignore=shutil.ignore_patterns("__pycache__"))
    manifest = target / "module.toml"
    lines = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    manifest.write_text(
        "".join('version = "demo"\n' if line.startswith("version") else line for line in lines),
        encoding="utf-8",
    )
    return target


Act = Callable[["Script", str], Happened]
"""Has something happen, by the name that it is told, and says what."""


class Script(threading.Thread):
    """Plays `events`, names and acts, one after the other on a thread of its own; `mark` is told what happens from now
    on ("": nothing).

    `playing` says what it is at. Leave it by `stop()`, which returns soon, whatever it waits for.
    """

    def __init__(
        self,
        runtimes: Sequence[Path],
        events: Sequence[tuple[str, Act]],
        mark: Callable[[str], None],
    ) -> None:
        """`runtimes`: the runtime directories of the kernels that are asked."""
        super().__init__(name="script")
        self._runtimes = runtimes
        self.controls: dict[Path, ControlClient] = {}
        self._events = events
        self._mark = mark
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self.playing = ""
        self.happened: list[Happened] = []

    @property
    def over(self) -> bool:
        return not self.is_alive()

    def check(self) -> None:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        try:
            with ExitStack() as stack:
                for runtime in self._runtimes:
                    control = ControlClient(runtime, timeout=ASK_SECONDS)
                    self.controls[runtime] = stack.enter_context(control)
                self._play()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error

    def _play(self) -> None:
        self._say("")
        for event, act in self._events:
            self._pause(QUIET_SECONDS)
            self._say(event)
            self.happened.append(act(self, event))
            self._pause(AFTER_SECONDS)
            self._say("")
        if self._events:
            self._pause(QUIET_SECONDS)

    def _say(self, event: str) -> None:
        self.playing = event
        self._mark(event)

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise _Stopped

    def until(self, look: Callable[[], T], good: Callable[[T], bool], what: str) -> T:
        """Look until it is `good`, through a kernel that is away for a while. Raises DeadlineError."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            try:
                if good(view := look()):
                    return view
            except (ipc.UnreachableError, ipc.DeadlineError):
                pass
            self._pause(LOOK_EVERY)
        raise ipc.DeadlineError(
            f"it is not so that {what}, after {PATIENCE_SECONDS:.0f} s", "run with --keep, and read the logs"
        )


class _Stopped(Exception):
    """Nobody waits for the rest of the script."""


@dataclass(frozen=True)
class Victim:
    """A module of a running kernel, and what can happen to it: each method but the last is an `Act`."""

    runtime_dir: Path
    module: str
    newer: Path | None = None
    """Where its next version is; none: the one that runs, once more."""

    def upgrade(self, script: Script, event: str) -> Happened:
        ask = self._ask(script)
        source = None if self.newer is None else str(self.newer)
        view = ask.control.call(
            "module.upgrade",
            name=self.module,
            source=source,
            bake=BAKE_SECONDS,
            rollback=True,
            wait=False,
        )
        return self._moved(script, event, ask, view)

    def roll_back(self, script: Script, event: str) -> Happened:
        ask = self._ask(script)
        view = ask.control.call("module.rollback", name=self.module, wait=False)
        return self._moved(script, event, ask, view)

    def kill(self, script: Script, event: str) -> Happened:
        ask = self._ask(script)
        before = ask.show()
        assert before.pid is not None, "it serves"
        killed_ns = time.monotonic_ns()
        os.kill(before.pid, signal.SIGKILL)
        after = script.until(
            ask.show,
            lambda view: view.state == "ready" and view.pid not in (None, before.pid),
            "the killed module serves again",
        )
        return Happened(
            event,
            f"pid {before.pid} → {after.pid}, generation {before.generation} → {after.generation}",
            ask.first_poll_ns(after.generation) - killed_ns,
        )

    def kill_kernel(self, script: Script, event: str) -> Happened:
        ask = self._ask(script)
        before = ask.kernel()
        os.kill(before.pid, signal.SIGKILL)
        after = script.until(ask.kernel, lambda view: view.pid != before.pid, "another kernel answers")
        if (was := _runs(before)) != (now := _runs(after)):
            raise ipc.SnapError(f"before the kernel's death ran {was}, after it {now}")
        return Happened(event, f"pid {before.pid} → {after.pid}, the same modules run on")

    def _moved(self, script: Script, event: str, ask: _Ask, ordered: Any) -> Happened:
        number = ordered["id"]
        view = script.until(
            lambda: ask.upgrade(number), lambda view: bool(view.outcome), f"the {event} is over"
        )
        if view.outcome != "committed":
            raise ipc.RolledBackError(f"the {event} ended as {view.outcome}: {view.reason}")
        versions = f"{view.from_version} → {view.to_version}, " if self.newer else ""
        return Happened(
            event,
            f"{versions}generation {view.from_generation} → {view.to_generation}",
            max((engine.blackout_ns for engine in view.engines), default=-1),
            view.client_gap_ns,
        )

    def _ask(self, script: Script) -> _Ask:
        return _Ask(script.controls[self.runtime_dir], self.module)


@dataclass(frozen=True)
class _Ask:
    control: ControlClient
    name: str

    def upgrade(self, number: int) -> UpgradeView:
        return msgspec.convert(self.control.call("upgrade.show", id=number), UpgradeView)

    def show(self) -> ModuleView:
        return msgspec.convert(self.control.call("module.show", name=self.name), ModuleView)

    def kernel(self) -> KernelView:
        return msgspec.convert(self.control.call("kernel.status"), KernelView)

    def first_poll_ns(self, generation: int) -> int:
        """When the last of the module's engines polled first in `generation`, by CLOCK_MONOTONIC."""
        last = 0
        found: list[int] = []
        while page := msgspec.convert(self.control.call("events.since", seq=last), list[EventView]):
            last = page[-1].seq
            found += [
                event.data["first_poll_ns"]
                for event in page
                if (event.kind, event.subject) == ("engine.took", f"module:{self.name}")
                and event.data["generation"] == generation
            ]
        return max(found)


def _runs(kernel: KernelView) -> dict[str, tuple[int | None, int]]:
    """Process and generation of each module."""
    return {module.name: (module.pid, module.generation) for module in kernel.modules}
