"""All upgrades of all modules: what may begin, in which order, and what became of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from snap.dataplane.errors import (
    BusyError,
    DeadlineError,
    DeniedError,
    ManifestError,
    NotFoundError,
    NotRunningError,
    RolledBackError,
    UsageError,
)
from snap.ipc.discovery import Found
from snap.ipc.manifest import Manifest
from snap.ipc.protocol import UpgradeView

from . import operations, packages
from .incarnation import Incarnation
from .recoveries import Recoveries
from .runner import Runner
from .upgrade import KERNEL_DIED
from .upgrading import Upgrading, Waits

if TYPE_CHECKING:
    from .kernel import Kernel

BY_OPERATOR: Final = "rolled back by an operator"
HISTORY: Final = 256
VERSIONS: Final = 8
"""Earlier versions of a module that can be named."""


class Upgrades:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._packages = kernel.settings.runtime_dir / packages.DIRECTORY
        self._last = 0
        self._running: dict[str, Upgrading] = {}
        self._queued: dict[str, Upgrading] = {}
        self._history: deque[UpgradeView] = deque(maxlen=HISTORY)
        self._versions: dict[str, deque[Found]] = {}
        self.recoveries = Recoveries(self.number, self.note, self._waits)

    # -- beginning --------------------------------------------------------------------------------------------

    def begin(self, name: str, source: str | None, bake: float, rollback: bool) -> int:
        """The id of the upgrade, which begins now or after those of modules that this one requires.

        Raises BusyError, NotRunningError, and what is wrong with the new version: NotFoundError, ManifestError,
        DeniedError, UsageError. The old version serves on then.
        """
        runner = self._upgradable(name)
        found = self._find(runner, source)
        self._check(runner, found.manifest)
        kept = packages.keep(found, self._packages)
        return self._begin(runner, kept, "upgrade", bake, rollback, origin=found)

    def roll_back(self, name: str) -> int:
        """Back to what ran before: out of the upgrade that is under way or waits, or by an upgrade to it. Raises as
        `begin` does."""
        upgrading = self._running.get(name) or self._queued.get(name)
        if upgrading is not None and upgrading.view.kind == "upgrade":
            upgrading.cancel(BY_OPERATOR)
            return upgrading.view.id
        runner = self._upgradable(name)
        versions = self._versions.get(name)
        if not versions:
            raise NotFoundError(f"module {name!r} has had no other version", "see `snapctl upgrade history`")
        return self._begin(runner, versions[-1], "rollback", 0.0, True)

    def interrupt(self, runner: Runner, kind: str) -> None:
        """An operator wants something else of the module. Raises BusyError unless that is to stop it."""
        upgrading = self._running.get(runner.name) or self._queued.get(runner.name)
        if upgrading is None or kind == operations.START:
            return
        if kind != operations.STOP:
            raise BusyError(
                f"upgrade {upgrading.view.id} of module {runner.name!r} is under way",
                f"follow it with `snapctl upgrade show {upgrading.view.id}`, or stop the module",
            )
        upgrading.abandon("the module was stopped")

    def tidy(self) -> None:
        """The kernel has started: what an earlier one copied, and nobody can go back to, goes."""
        for runner in self._kernel.runners.values():
            if self.running_of(runner) is None:
                self._prune(runner)

    def close(self) -> None:
        for upgrading in [*self._queued.values(), *self._running.values()]:
            upgrading.abandon("the kernel stops")

    # -- views ------------------------------------------------------------------------------------------------

    def running_of(self, runner: Runner) -> int | None:
        upgrading = self._running.get(runner.name) or self._queued.get(runner.name)
        return None if upgrading is None else upgrading.view.id

    def views(self, name: str | None = None) -> list[UpgradeView]:
        """The latest last."""
        under_way = [each.view for each in (*self._running.values(), *self._queued.values())]
        found = sorted([*self._history, *under_way], key=lambda view: view.id)
        return [view for view in found if name in (None, view.module)]

    def number(self) -> int:
        """For an upgrade that is none of a module."""
        self._last += 1
        return self._last

    def note(self, view: UpgradeView) -> None:
        """How an upgrade is that is none of a module."""
        for index, known in enumerate(self._history):
            if known.id == view.id:
                self._history[index] = view
                return
        self._history.append(view)

    def view(self, number: int) -> UpgradeView:
        """Raises NotFoundError."""
        for view in self.views():
            if view.id == number:
                return view
        raise NotFoundError(f"there is no upgrade {number}", "see `snapctl upgrade history`")

    async def result(self, number: int, within: float) -> UpgradeView:
        """Wait for its end, at most `within` seconds. Raises RolledBackError with the reason, DeadlineError."""
        upgrading = next(
            (each for each in (*self._running.values(), *self._queued.values()) if each.view.id == number),
            None,
        )
        if upgrading is not None:
            try:
                async with asyncio.timeout(within):
                    await asyncio.shield(upgrading.finished)
            except TimeoutError as error:
                raise DeadlineError(
                    f"upgrade {number} is not done after {within:g} s",
                    f"it goes on: `snapctl upgrade show {number}`",
                ) from error
        view = self.view(number)
        wanted = view.kind == "rollback"
        if view.outcome != "committed" and view.reason != BY_OPERATOR:
            verb = "rollback" if wanted else "upgrade"
            raise RolledBackError(
                f"{verb} of module {view.module!r} failed ({view.outcome}): {view.reason}",
                f"version {view.from_version} serves; see `snapctl module logs {view.module}`",
            )
        return view

    # -- inside -----------------------------------------------------------------------------------------------

    def _upgradable(self, name: str) -> Runner:
        runner = self._kernel.runner(name)
        upgrading = self._running.get(name) or self._queued.get(name)
        if upgrading is not None:
            raise BusyError(
                f"upgrade {upgrading.view.id} of module {name!r} is under way",
                f"follow it with `snapctl upgrade show {upgrading.view.id}`",
            )
        if not runner.ready or runner.current is None:
            raise NotRunningError(
                f"module {name!r} is {runner.machine.state}: there is nothing to take over",
                f"start it with `snapctl module start {name}`",
            )
        return runner

    def _find(self, runner: Runner, source: str | None) -> Found:
        """Raises NotFoundError, ManifestError."""
        if source is None:
            return _there(runner)
        if "/" in source or Path(source).is_dir():
            return packages.load(Path(source).absolute(), runner.name)
        known: list[Found] = [*self._versions.get(runner.name, ()), runner.found]
        with suppress(NotFoundError, ManifestError):
            known.insert(0, _there(runner))
        for found in reversed(known):
            if found.manifest.module.version == source:
                return found
        versions = ", ".join(dict.fromkeys(found.manifest.module.version for found in known))
        raise NotFoundError(
            f"no version {source!r} of module {runner.name!r} is known here",
            f"known: {versions}; or give the directory of the new one",
        )

    def _check(self, runner: Runner, manifest: Manifest) -> None:
        """Raises DeniedError, NotFoundError, UsageError."""
        kernel, name = self._kernel, runner.name
        for service in manifest.requires.services:
            if service not in kernel.plan.providers:
                raise NotFoundError(f"the new version requires {service!r}, which nobody provides")
            reason = kernel.denial(name, service)
            if reason is not None:
                raise DeniedError(f"the new version requires {service!r}: {reason}", "the policy decides")
        for service in manifest.provides:
            if kernel.plan.providers.get(service) != name:
                raise UsageError(
                    f"the new version provides {service!r}, which the running one does not",
                    "a new service comes with a start of the kernel",
                )
        old = runner.found.manifest
        missing = sorted(set(old.provides) - set(manifest.provides))
        if missing:
            raise UsageError(
                f"the new version does not provide {', '.join(missing)} any more", "stop it first"
            )
        if set(manifest.engines) != set(old.engines):
            raise UsageError(
                f"the new version runs engines {sorted(manifest.engines)}, the running one {sorted(old.engines)}",
                "engines are handed over by name: stop the module, and start the new version",
            )

    def _begin(
        self,
        runner: Runner,
        found: Found,
        kind: str,
        bake: float,
        rollback: bool,
        origin: Found | None = None,
    ) -> int:
        self._last += 1
        waits = self._waits(runner)
        upgrading = Upgrading(self._last, runner, found, kind, bake, rollback, waits, self._ended)
        if origin is not None:
            upgrading.origin = origin
        self._queued[runner.name] = upgrading
        runner.emit("upgrade.phase", {"id": self._last, "phase": "queued", "reason": ""})
        self._next()
        return self._last

    def _waits(self, runner: Runner) -> Waits:
        broker = self._kernel.broker
        return Waits(
            lambda: broker.clear_waits(runner),
            lambda: broker.longest_wait(runner),
            lambda: broker.unanswered(runner),
        )

    def _next(self) -> None:
        """Begin what waits for nobody: modules that others require go first."""
        for name, upgrading in list(self._queued.items()):
            needed = self._kernel.plan.requirements(upgrading.runner.found.manifest)
            if name not in self._queued or any(
                other in self._running or other in self._queued for other in needed
            ):
                continue
            if upgrading.runner.ready:
                del self._queued[name]
                self._running[name] = upgrading
                upgrading.begin()
            else:
                state = upgrading.runner.machine.state
                upgrading.abandon(f"the module is {state}: there is nothing to take over")

    def _ended(self, upgrading: Upgrading) -> None:
        runner, view = upgrading.runner, upgrading.view
        self._running.pop(runner.name, None)
        self._queued.pop(runner.name, None)
        self._history.append(view)
        if view.outcome == "committed":
            self._remember(runner, upgrading.origin, upgrading.before)
        self._next()

    def _remember(self, runner: Runner, origin: Found, before: Found) -> None:
        runner.origin = origin
        self._versions.setdefault(runner.name, deque(maxlen=VERSIONS)).append(before)
        self._prune(runner)

    def _prune(self, runner: Runner) -> None:
        needed = [runner.found, *self._versions.get(runner.name, ())]
        packages.prune(self._packages, runner.name, needed)

    # -- outliving the kernel ---------------------------------------------------------------------------------

    def restore(self, record: dict[str, Any], processes: dict[str, dict[int, Incarnation]]) -> None:
        """What was under way goes on; what was queued is given up. `processes`: by module and generation."""
        self._last = record["last"]
        for name, versions in record["versions"].items():
            self._versions[name] = deque((packages.restored(each) for each in versions), maxlen=VERSIONS)
        for each in record["history"]:
            view = msgspec.convert(each, UpgradeView)
            known = record["under_way"].get(view.module)
            if view.outcome or view.kind == "recovery":
                self._history.append(view)
            elif known is not None and view.phase != "queued":
                runner = self._kernel.runners[view.module]
                self._running[view.module] = Upgrading.restored(
                    known, view, runner, processes[view.module], self._waits(runner), self._ended
                )
            else:
                self._history.append(self._interrupted(view))
        self.recoveries.restore(record.get("recoveries", {}), {view.id: view for view in self._history})

    def _interrupted(self, view: UpgradeView) -> UpgradeView:
        """Of one that had not begun; or of the kernel's own, which its heir corrects if it took over."""
        runner = self._kernel.runners.get(view.module)
        outcome = "aborted" if view.phase in ("queued", "brownout") else "rolled_back"
        reason = KERNEL_DIED
        view = msgspec.structs.replace(
            view, phase="done", outcome=outcome, reason=reason, finished=time.time()
        )
        if runner is not None:
            runner.emit("upgrade.done", {"id": view.id, "outcome": outcome, "reason": reason})
        return view

    def record(self) -> dict[str, Any]:
        return {
            "last": self._last,
            "recoveries": self.recoveries.record(),
            "under_way": {name: upgrading.record() for name, upgrading in self._running.items()},
            "history": [msgspec.to_builtins(view) for view in self.views()],
            "versions": {
                name: [packages.record(found) for found in versions]
                for name, versions in self._versions.items()
            },
        }


def _there(runner: Runner) -> Found:
    """What the module's directory holds now. Raises NotFoundError, ManifestError."""
    found = packages.load(runner.origin.path, runner.name)
    source = runner.origin.source
    return Found(found.manifest, found.path, source) if source == packages.SHIPPED else found
