"""Plays a plan against a world, waits until all is well after each event, and judges what came of it."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from snap import ipc
from snap.ipc import BusyError, DeadlineError, NotFoundError, SnapError, UnreachableError
from snap.kernel.keeper import RESPAWN_WINDOW, RESPAWNS

from . import ops, versions
from .client import LOST
from .events import BAKE, Event
from .report import Happened, Result
from .world import HANGING, KEEPER, LOOK, PATIENCE, Violation, World

_LONG: Final = 8.0
"""Seconds to find a victim that is about to appear."""


class Driver:
    """`say` gets a line for each event."""

    def __init__(self, world: World, clients: int, say: Callable[[str], None]) -> None:
        self.world, self.clients, self.say = world, clients, say
        self.result = Result()
        self._kernel_deaths: list[float] = []

    def play(self, plan: Sequence[Event], until: float) -> None:
        """Raises Violation. Events that begin after `until` (time.monotonic) are left out."""
        world = self.world
        world.start_kernel()
        for _ in range(self.clients):
            world.start_client()
        world.settle()
        for event in plan:
            if time.monotonic() > until:
                self.say(f"out of time: {len(plan) - event.index} events left out")
                break
            if event.needs_keeper and not KEEPER:
                self.say(f"{event}: left out, for this kernel has no keeper")
                continue
            time.sleep(event.pause)
            if event.kills_kernel:
                self._pace()
            begin = time.monotonic_ns()
            outcome = getattr(self, f"_{event.kind}")(event) or "done"
            self._clear_faults()
            while len(world.clients) < self.clients:
                world.start_client()
            acted = time.monotonic_ns()
            world.settle()
            end = time.monotonic_ns()
            self.result.happened.append(Happened(event.kind, outcome, begin, end))
            took, well = (acted - begin) / 1e9, (end - acted) / 1e9
            self.say(f"{event}: {outcome} ({took:.2f} s, well again after {well:.2f} s)")
        self._judge()

    # -- events ---------------------------------------------------------------------------------------------

    def _upgrade(self, event: Event) -> str:
        view = self._finish(self._begin(event.version))
        self._demand(view["outcome"] == "committed", event, view)
        self._demand(self.world.settle()["version"] == event.version, event, view)
        self._note(view)
        return "committed"

    def _failing(self, event: Event) -> str:
        """The version before goes on serving, and the report says why."""
        version = versions.ALL[event.version]
        before = self.world.module()
        if version.name == "unknown_schema" and before["version"] == "two":
            self._finish(self._begin("one"))
            before = self.world.settle()
        try:
            view = self._finish(self._begin(event.version))
        except SnapError as error:
            outcome, reason = "refused", f"{error.code}: {error}"
        else:
            outcome, reason = view["outcome"], view["reason"]
        said = f"{version.name} was {outcome}: {reason!r}"
        self._demand(outcome in version.outcomes, event, said)
        self._demand(bool(reason) and re.search(version.reason, reason) is not None, event, said)
        after = self.world.settle()
        self._demand(after["version"] == before["version"], event, said)
        return outcome

    def _rollback(self, event: Event) -> str:
        try:
            view = self._finish(self._number(self.world.call("module.rollback", name="tally", wait=False)))
        except NotFoundError:
            return "nothing to roll back to"
        self._demand(view["outcome"] == "committed", event, view)
        self._note(view)
        return "committed"

    def _concurrent(self, event: Event) -> str:
        first = self._begin(event.version)
        try:
            second = self._begin(event.other)
        except BusyError:
            second = 0
        views = [self._finish(number) for number in (first, second) if number]
        self._demand(all(view["outcome"] == "committed" for view in views), event, views)
        overlap = len(views) == 2 and views[1]["started"] < views[0]["finished"]
        self._demand(not overlap, event, views)
        return "the second was refused" if not second else "one after the other"

    def _fault(self, event: Event) -> str:
        """At a named point of an upgrade, or of a rollback of one."""
        if event.victim == "rollback":
            with suppress(SnapError):
                self._finish(self._begin(event.version))
            self.world.settle()
        (self.world.faults / event.point).write_text(event.action)
        with self._waking(event.seconds):
            return self._try(event.version if event.victim == "upgrade" else "")

    def _disturbed(self, event: Event) -> str:
        """At a random instant of an upgrade."""
        before = self.world.module()["pid"]
        try:
            number = self._begin(event.version)
        except (UnreachableError, DeadlineError, BusyError) as error:
            return type(error).__name__
        time.sleep(event.after)
        self._hit(event, before)
        return str(self._finish(number, lost=True)["outcome"])

    def _kill_module(self, event: Event) -> None:
        if pid := self.world.module()["pid"]:
            self.world.send(pid, signal.SIGKILL)

    def _stop_module(self, event: Event) -> None:
        self._pause(self.world.module()["pid"], event.seconds)

    def _kill_kernel(self, event: Event) -> None:
        for pid in self.world.processes("kernel"):
            self.world.send(pid, signal.SIGKILL)

    def _stop_kernel(self, event: Event) -> None:
        for pid in self.world.processes("kernel"):
            self._pause(pid, event.seconds)

    def _upgrade_kernel(self, event: Event) -> str:
        before = self.world.processes("kernel")
        generation = self.world.module()["generation"]
        view = self._finish(self._number(self.world.call("kernel.upgrade", source=None, timeout=PATIENCE)))
        self._demand(view["outcome"] == "committed", event, view)
        self.world.settle()
        self._demand(self.world.processes("kernel") != before, event, view)
        self._demand(self.world.module()["generation"] == generation, event, view)
        return "committed"

    def _kill_keeper(self, event: Event) -> None:
        """The kernel finds it gone, and starts another."""
        before = self.world.processes("keeper")
        for pid in before:
            self.world.send(pid, signal.SIGKILL)
        self.world.until("another keeper", lambda: set(self.world.processes("keeper")) - set(before) != set())

    def _kill_both(self, event: Event) -> None:
        """The documented end: modules end by themselves, clients are told, and another kernel begins with nothing."""
        both = self.world.processes("kernel") + self.world.processes("keeper")
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: neither starts the other again
            for pid in both:
                self.world.send(pid, number)
        self.world.begin_anew()

    def _corrupt(self, event: Event) -> str:
        """A version that writes over a row and dies. What its last poll had touched is undone anyway; else all clients are
        told that the state is lost, at the latest because of the process after the next, which checks what it takes
        over, and the module goes on with a blank one. Nobody gets a wrong answer."""
        try:
            view = self._finish(self._begin("corrupts_a_table"))
        except SnapError as error:
            return error.code
        self._demand(view["outcome"] in versions.ALL["corrupts_a_table"].outcomes, event, view)
        generation = self.world.module()["generation"]
        self._kill_module(event)
        self.world.until("a fresh process", lambda: self._serves_after(generation))
        if not self.world.any_client_ends():
            return f"{view['outcome']} and nothing lost"
        self.world.lose_clients(LOST)
        return f"{view['outcome']} and state lost"

    def _serves_after(self, generation: int) -> bool:
        view = self.world.module()
        return view["state"] == "ready" and view["generation"] > generation

    def _kill_client(self, event: Event) -> None:
        self.world.kill_client(self.world.clients[event.client % len(self.world.clients)])

    def _stop_client(self, event: Event) -> None:
        self._pause(self.world.clients[event.client % len(self.world.clients)].process.pid, event.seconds)

    def _leave_client(self, event: Event) -> None:
        self.world.end_client(self.world.clients[event.client % len(self.world.clients)])

    # -- how ------------------------------------------------------------------------------------------------

    def _begin(self, version: str) -> int:
        """Start an upgrade; its number. Raises SnapError when it is refused."""
        source = str(self.world.versions[version])
        return self._number(
            self.world.call(
                "module.upgrade", name="tally", source=source, bake=BAKE, rollback=True, wait=False
            )
        )

    def _number(self, view: dict[str, Any]) -> int:
        return int(view["id"])

    def _finish(self, number: int, lost: bool = False) -> dict[str, Any]:
        """Wait for its end. `lost`: a kernel that died before it had noted the upgrade knows nothing of it."""
        end = time.monotonic() + HANGING
        while True:
            try:
                view: dict[str, Any] = self.world.ask("upgrade.show", id=number)
            except NotFoundError:
                if lost:
                    return {"outcome": "forgotten"}
                raise
            if view["phase"] == "done":
                return view
            if time.monotonic() > end:
                raise Violation(self.world.diagnosis(f"upgrade {number} does not end: {view}"))
            time.sleep(LOOK)

    def _try(self, version: str) -> str:
        """An upgrade (or a rollback) that may break in any way, but must end."""
        try:
            if version:
                number = self._begin(version)
            else:
                number = self._number(self.world.call("module.rollback", name="tally", wait=False))
        except SnapError as error:
            return error.code
        return str(self._finish(number, lost=True)["outcome"])

    def _hit(self, event: Event, before: int) -> None:
        world = self.world
        if event.victim == "client":
            pid = world.clients[event.index % len(world.clients)].process.pid
        elif event.victim == "kernel":
            pid = next(iter(world.processes("kernel")), 0)
        elif event.victim == "old":
            pid = before
        else:
            end = time.monotonic() + _LONG
            while not (others := [pid for pid in world.processes("module") if pid != before]):
                if event.victim == "module" or time.monotonic() > end:
                    others = [before]
                    break
                time.sleep(LOOK)
            pid = others[-1]
        if event.action == "stop":
            self._pause(pid, event.seconds)
        elif event.victim == "client":
            world.kill_client(world.clients[event.index % len(world.clients)])
        elif pid:
            world.send(pid, signal.SIGKILL)

    def _pause(self, pid: int, seconds: float) -> None:
        begin = time.monotonic_ns()
        if pid and self.world.send(pid, signal.SIGSTOP):
            time.sleep(seconds)
            self.world.send(pid, signal.SIGCONT)
            for client in self.world.clients:
                if client.process.pid == pid:
                    client.stops.append((begin, time.monotonic_ns()))

    @contextmanager
    def _waking(self, seconds: float) -> Iterator[None]:
        """Whoever stops at a fault point goes on after `seconds`."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK):
                if seconds and (found := self.world.stopped()):
                    over.wait(seconds)
                    for pid in found:
                        self.world.send(pid, signal.SIGCONT)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _pace(self) -> None:
        """The keeper gives a kernel up that dies again and again."""
        now = time.monotonic()
        self._kernel_deaths = [then for then in self._kernel_deaths if then > now - RESPAWN_WINDOW]
        if len(self._kernel_deaths) >= RESPAWNS - 1:
            time.sleep(self._kernel_deaths[0] + RESPAWN_WINDOW - now)
        self._kernel_deaths.append(time.monotonic())

    def _clear_faults(self) -> None:
        for file in self.world.faults.iterdir():
            file.unlink(missing_ok=True)

    # -- judging --------------------------------------------------------------------------------------------

    def _demand(self, holds: bool, event: Event, what: object) -> None:
        if not holds:
            raise Violation(self.world.diagnosis(f"{event}: {what}"))

    def _note(self, view: dict[str, Any]) -> None:
        self.result.blackouts_ns += [
            engine["blackout_ns"] for engine in view["engines"] if engine["blackout_ns"] >= 0
        ]

    def _judge(self) -> None:
        """Everybody leaves; the state must be the model's; nothing may be left. Raises Violation."""
        world = self.world
        for client in list(world.clients):
            world.end_client(client)
        self._compare_state()
        world.stop_kernel()
        if left := world.leftovers() or world.socket_files():
            raise Violation(world.diagnosis(f"left behind: {left}"))
        self.result.operations = world.operations
        self.result.sessions = len(world.sessions)
        self.result.waits = world.waits

    def _compare_state(self) -> None:
        digest: Counter[int] = Counter()
        cells: dict[int, tuple[int, int]] = {}
        with ipc.open_channel("tally", self.world.runtime, "torture auditor", PATIENCE) as channel:
            for session, model, killed in self.world.sessions:
                channel.send(ops.dump_request(model.client))
                answer = channel.recv(PATIENCE)
                if killed:
                    self._catch_up(session.sent, model, answer)
                try:
                    model.check_dump(answer)
                except ops.Wrong as error:
                    raise Violation(self.world.diagnosis(str(error))) from error
                cell = model.client % ops.CELLS
                digest[cell] += model.state.total
                cells[cell] = ops.DUMPED.unpack_from(answer)[-2:]
        if wrong := {cell: total for cell, (_, total) in cells.items() if total != digest[cell]}:
            raise Violation(self.world.diagnosis(f"sums of the digest: {wrong}, not {digest}"))

    def _catch_up(self, sent: int, model: ops.Model, answer: bytes) -> None:
        """Of what a killed client sent without noting an answer, the engine may have done a first part."""
        done = ops.DUMPED.unpack_from(answer)[3]
        if not model.state.ops <= done <= sent:
            raise Violation(
                f"client {model.client} got answers to {model.state.ops} and sent {sent} operations; {done} were done"
            )
        while model.state.ops < done:
            model.step()
