"""The kernel: all parts put together, in the order in which they come up and go down."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from snap.dataplane.errors import NotFoundError, NotRunningError, ResourceError, SnapError
from snap.ipc import paths
from snap.ipc.discovery import Found, Problem, discover
from snap.ipc.protocol import KernelView, ModuleView
from snap.ipc.segment import reclaim

from . import bootstrap, graph, operations, packages, supervision, views
from .answers import Answers
from .audit import AuditLog, AuditRecord
from .broker import Broker
from .capability import CapabilityTable
from .desk import Desk
from .events import Events
from .hooks import Hooks
from .incarnation import Incarnation
from .policy import Identity, Policy
from .principals import Principal
from .record import Outbox, Record
from .runner import Runner
from .semaphores import Semaphores
from .store import NoStore, Store
from .supervision import Limits, Supervision
from .takeover import LISTENER, Adoption, RecordedStore
from .upgrades import Upgrades

HOST: Final = (sys.executable, "-P", "-m", "snap.modules.host")
HEARTBEAT_PERIOD: Final = 1.0
VERSION: Final = "0.1.0"


@dataclass(frozen=True)
class Settings:
    """`host` is the command that becomes a module's process; `limits` is how patient supervision is."""

    runtime_dir: Path
    policy: Policy
    module_path: Sequence[Path] = ()
    foreground: bool = False
    log_level: str = "info"
    host: Sequence[str] = HOST
    limits: Limits = field(default_factory=Limits)


class Kernel:
    """Make it inside a running event loop, holding the lock of its runtime directory; `close` it after `stop`."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        store: Store | None = None,
        adoption: Adoption | None = None,
    ) -> None:
        """`listener` is the bootstrap socket; `store` holds descriptors beyond this process, `adoption` what an earlier
        kernel left there. Raises SnapError, OSError."""
        directory = settings.runtime_dir
        self.outbox = Outbox()
        self.store: Store = RecordedStore(store or NoStore(), self.outbox)
        self._adoption = adoption
        self._unrecorded = False
        self.settings, self.policy, self.uid = settings, settings.policy, os.geteuid()
        self.started = time.time()
        self.runners: dict[str, Runner] = {}
        self.refused: dict[str, tuple[Found, str]] = {}
        self.stopping = asyncio.Event()
        (directory / paths.LOGS).mkdir(mode=0o700, exist_ok=True)
        self.events = Events(directory / paths.KERNEL_LOG, settings.foreground, settings.log_level)
        if adoption is not None:
            self.events.restore(adoption.data["events"])
        self.audit = AuditLog(directory / paths.AUDIT)
        self.table = CapabilityTable(self.audit.write)
        if adoption is not None:
            self.table.restore(adoption.data["table"])
        self.broker = Broker(self.table, self.events, settings.policy.backend, self.provider, self.store)
        self.desk = Desk(
            self.table, settings.policy, self.uid, self.audit, self.events, self.broker, self.provider
        )
        for name in reclaim():
            self.events.emit("segment.reclaimed", f"segment:{name}")
        self._principals: dict[Incarnation, Principal] = {}
        self.semaphores = Semaphores(directory / paths.SEMAPHORES)
        self.plan = self._load_modules()
        self.upgrades = Upgrades(self)
        self.answers = Answers()
        self._bootstrap = bootstrap.Bootstrap(
            listener, self.desk, self.audit, self.events, self.store, self.outbox
        )
        self._record = adoption.record if adoption is not None else Record.create(self.store)
        if adoption is not None:
            self._adopt(adoption)
        self._begin_record(listener)
        self._heartbeats = asyncio.get_running_loop().create_task(self._watch_heartbeats())
        self.events.emit("kernel.started", "kernel", pid=os.getpid(), version=VERSION)
        if adoption is not None:
            adoption.confirm()
        self.upgrades.tidy()
        self._reclaim_semaphores()
        self.outbox.flush()

    @property
    def copies(self) -> Sequence[int]:
        """Descriptors of the record."""
        return self._record.fds

    # -- modules ----------------------------------------------------------------------------------------------

    def provider(self, service: str) -> Runner | None:
        return self.runners.get(self.plan.providers.get(service, ""))

    def runner(self, name: str) -> Runner:
        """Raises NotFoundError; NotRunningError with the reason for a module that was refused."""
        runner = self.runners.get(name)
        if runner is not None:
            return runner
        if name in self.refused:
            raise NotRunningError(
                f"module {name!r} is refused: {self.refused[name][1]}", "change its manifest or the policy"
            )
        raise NotFoundError(f"there is no module {name!r}", "see `snapctl module list`")

    def autostart(self) -> None:
        """Start what is to run from the beginning; what an earlier kernel had is as that left it."""
        known = {} if self._adoption is None else self._adoption.data["modules"]
        for name in self.plan.order:
            if name not in known and self.policy.module(name).autostart:
                self.runners[name].start()

    def start(self, name: str) -> None:
        """Start a module after what it requires and is stopped."""
        for needed in self.plan.requirements(self.runners[name].found.manifest):
            if self.runners[needed].machine.state == supervision.STOPPED:
                self.start(needed)
        self.runners[name].start()

    async def stop(self) -> None:
        """Applications first, then modules in reverse order of what they require; nobody gets for ever."""
        self.events.emit("kernel.stopping", "kernel")
        self.upgrades.close()
        self._bootstrap.close()
        requires = {
            name: set(self.plan.requirements(runner.found.manifest)) for name, runner in self.runners.items()
        }
        for wave in supervision.stop_order(requires, list(self.runners)):
            await asyncio.gather(*(self._stop_module(self.runners[name]) for name in wave))

    async def _stop_module(self, runner: Runner) -> None:
        patience = self.settings.limits.grace + 5.0
        try:
            await runner.operations.run(
                operations.STOP, lambda: runner.stop("the kernel stops"), patience, wait=True
            )
        except SnapError as error:
            self.events.emit("module.stop_failed", f"module:{runner.name}", error=str(error))

    def close(self) -> None:
        self._heartbeats.cancel()
        for runner in self.runners.values():
            runner.close()
        self._reclaim_semaphores()
        self.desk.close()
        self.events.emit("kernel.stopped", "kernel")
        self.outbox.close()
        self._record.close()
        self.events.close()
        self.audit.close()

    # -- views ------------------------------------------------------------------------------------------------

    def module_views(self, log_lines: int = 3) -> list[ModuleView]:
        found = [self.runner_view(runner, log_lines) for runner in self.runners.values()]
        found += [views.refused(each, why) for each, why in self.refused.values()]
        return sorted(found, key=lambda view: view.name)

    def runner_view(self, runner: Runner, log_lines: int = 10) -> ModuleView:
        return views.module(runner, log_lines, self.upgrades.running_of(runner))

    def module_view(self, name: str) -> ModuleView:
        """Raises NotFoundError."""
        if name in self.refused:
            return views.refused(*self.refused[name])
        return self.runner_view(self.runner(name), log_lines=20)

    def view(self) -> KernelView:
        return KernelView(
            pid=os.getpid(),
            version=VERSION,
            runtime_dir=str(self.settings.runtime_dir),
            started=self.started,
            uid=self.uid,
            policy=self.policy.source,
            modules=self.module_views(),
            channels=len(self.broker.channels),
            principals=len(self.desk.principals),
            capabilities=len(self.table),
            events=dict(self.events.totals),
        )

    # -- inside -----------------------------------------------------------------------------------------------

    def _reclaim_semaphores(self) -> None:
        """Those that an earlier kernel made, and that no module has."""
        used = [seat.semaphore for runner in self.runners.values() for seat in runner.states.seats.values()]
        for number in self.semaphores.reclaim(used):
            self.events.emit("semaphore.reclaimed", f"semaphore:{number}")

    def _begin_record(self, listener: socket.socket) -> None:
        self._record.parts.update(
            events=self.events.record,
            table=self.table.record,
            principals=self.desk.record,
            channels=self.broker.record,
            modules=lambda: {name: runner.heritage.record() for name, runner in self.runners.items()},
            members=lambda: [
                [each.generation, who.id.partition("#")[0].removeprefix("module:"), who.id]
                for each, who in self._principals.items()
            ],
            applications=self._bootstrap.record,
            upgrades=self.upgrades.record,
            answers=self.answers.record,
        )
        self.store.put(LISTENER, [listener.fileno()])
        self.outbox.commit = self._commit
        self.events.listeners.append(lambda _: self.outbox.touch())

    def _commit(self) -> None:
        """Without memory for it the kernel goes on; its death would then be noticed."""
        try:
            self._record.write()
            self._unrecorded = False
        except ResourceError as error:
            if not self._unrecorded:
                self._unrecorded = True
                self.events.emit("kernel.record_failed", "kernel", error=error.message)

    def _adopt(self, adoption: Adoption) -> None:
        """Go on where the earlier kernel was, with all that still lives."""
        data, take = adoption.data, adoption.take
        principals = {each["id"]: each for each in data["principals"]}
        members = {(name, generation): owner for generation, name, owner in data["members"]}
        processes: list[tuple[Runner, Incarnation]] = []
        for name, record in data["modules"].items():
            for incarnation in self.runners[name].heritage.restore(record, take):
                processes.append((self.runners[name], incarnation))
                owner = members.get((name, incarnation.generation))
                if owner is not None:
                    self._principals[incarnation] = self.desk.readmit(
                        principals.pop(owner),
                        incarnation.send,
                        partial(self.runners[name].misbehaved, incarnation),
                    )
        self._bootstrap.restore(data["applications"], take, principals)
        self.broker.restore(data["channels"], take, self.runners, self.desk.principals)
        for owner in set(self.table.owners) - set(self.desk.principals):
            self.desk.forget(owner, "it went while no kernel ran")
        left = adoption.close()
        self.events.emit(
            "kernel.adopted",
            "kernel",
            modules=len(data["modules"]),
            processes=len(processes),
            channels=len(self.broker.channels),
            principals=len(self.desk.principals),
            left=left,
        )
        by_name: dict[str, dict[int, Incarnation]] = {name: {} for name in data["modules"]}
        for runner, incarnation in processes:
            by_name[runner.name][incarnation.generation] = incarnation
        self.upgrades.restore(data["upgrades"], by_name)
        self.answers.restore(data.get("answers", []))
        for runner, incarnation in processes:
            runner.heritage.settle(incarnation, self.broker.fds_of)
        self._bootstrap.announce(self.broker.fds_of)
        self.desk.schedule_expiry()
        for runner in self.runners.values():
            self._on_changed(runner)

    def _load_modules(self) -> graph.Plan:
        discovery = discover(self.settings.module_path)
        for problem in discovery.problems:
            self._report(problem)
        found = dict(discovery.found)
        if self._adoption is not None:
            # What runs is what counts; its directory may have changed or gone since.
            for name, record in self._adoption.data["modules"].items():
                origin, running = packages.restored(record["origin"]), packages.restored(record["found"])
                found[name] = Found(running.manifest, origin.path, origin.source)
        plan = graph.check({name: each.manifest for name, each in found.items()}, self.denial)
        for name, reasons in plan.problems.items():
            self.refused[name] = (found[name], "; ".join(reasons))
            self.events.emit("module.refused", f"module:{name}", reason=self.refused[name][1])
        hooks = Hooks(
            spawned=self._on_spawned,
            died=self._on_died,
            fell=lambda *what: self.upgrades.recoveries.fell(*what),
            attach=self.broker.attach,
            request=self._on_request,
            news=self.broker.news,
            lost=self.broker.state_lost,
            ended=self.broker.provider_ended,
            changed=self._on_changed,
            bad=self._on_bad,
            held=self.broker.held,
        )
        try:
            for name in plan.order:
                self.runners[name] = self._new_runner(found[name], hooks)
        except BaseException:
            for runner in self.runners.values():
                runner.close()
            raise
        return plan

    def _new_runner(self, found: Found, hooks: Hooks) -> Runner:
        name, manifest = found.manifest.name, found.manifest
        machine = Supervision(name, manifest.restart.policy, self.settings.limits)
        machine.missing = frozenset(manifest.requires.services)
        known = self._adoption is not None and name in self._adoption.data["modules"]
        kept = found if known else packages.keep(found, self.settings.runtime_dir / packages.DIRECTORY)
        runner = Runner(
            kept,
            self.settings.host,
            machine,
            self.events,
            self.settings.runtime_dir,
            hooks,
            self.store,
            self.semaphores,
            self.outbox,
        )
        runner.origin = found
        return runner

    def _report(self, problem: Problem) -> None:
        self.events.emit("manifest.refused", str(problem.path), source=problem.source, error=problem.message)

    def denial(self, module: str, service: str) -> str | None:
        """Why `module` may not connect to `service`; None: it may."""
        decision = self.policy.decide(self._identity(module, 0), service, self.uid)
        return None if decision.allowed and "connect" in decision.rights else decision.reason

    def _identity(self, module: str, pid: int) -> Identity:
        return Identity(self.uid, os.getegid(), pid, module)

    def _on_spawned(self, runner: Runner, incarnation: Incarnation) -> None:
        """A process of a module is a principal as long as it lives, and starts with what it requires. While there are
        two of them, the later one is known by its generation too; the badge that services see is the module's."""
        badge = name = f"module:{runner.name}"
        if name in self.desk.principals:
            name = f"{name}#{incarnation.generation}"
        assert incarnation.pid is not None
        principal = self._principals[incarnation] = self.desk.admit(
            name,
            badge,
            self._identity(runner.name, incarnation.pid),
            incarnation.send,
            lambda reason: runner.misbehaved(incarnation, reason),
        )
        for service in incarnation.found.manifest.requires.services:
            with suppress(SnapError):  # refused and audited already
                self.desk.find(principal, service)
        self.desk.schedule_expiry()

    def _on_request(self, runner: Runner, incarnation: Incarnation, message: Any) -> None:
        principal = self._principals.get(incarnation)
        if principal is not None:
            self.desk.request(principal, message)

    def _on_died(self, runner: Runner, incarnation: Incarnation, reason: str) -> None:
        principal = self._principals.pop(incarnation, None)
        if principal is not None:
            self.desk.dismiss(principal, reason)

    def _on_changed(self, runner: Runner) -> None:
        self.upgrades.recoveries.changed(runner)
        for other in self.runners.values():
            required = other.found.manifest.requires.services
            if required:
                other.require(frozenset(service for service in required if not self._is_ready(service)))
        if runner.ready:
            for service in runner.found.manifest.provides:
                self.broker.service_ready(service)

    def _is_ready(self, service: str) -> bool:
        runner = self.provider(service)
        return runner is not None and runner.ready

    def _on_bad(self, runner: Runner, incarnation: Incarnation, reason: str) -> None:
        name = f"module:{runner.name}"
        self.audit.write(
            AuditRecord(
                action="link", outcome="denied", owner=name, badge=name, pid=incarnation.pid, reason=reason
            )
        )

    async def _watch_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_PERIOD)
            for runner in self.runners.values():
                runner.watch_heartbeats()
