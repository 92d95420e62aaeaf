"""What a module leaves when its kernel dies, and how the next kernel goes on with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from snap.dataplane import _native
from snap.ipc import protocol
from snap.ipc.segment import Segment

from . import packages
from .gatepage import GatePage
from .incarnation import Incarnation
from .takeover import Take

if TYPE_CHECKING:
    from .runner import Runner

REPORT_DEADLINE: Final = 10.0
_ORDERS: Final[protocol.Decoder[Any]] = protocol.Decoder(protocol.ToModule)


class Heritage:
    """Of one module. `held` is told the channels (generations by id) that an adopted process has."""

    def __init__(self, runner: Runner, held: Callable[[Runner, Incarnation, dict[int, int]], None]) -> None:
        self._runner, self._held = runner, held
        self._asked: dict[Incarnation, asyncio.TimerHandle] = {}

    def record(self) -> dict[str, Any]:
        runner = self._runner
        return {
            "found": packages.record(runner.found),
            "origin": packages.record(runner.origin),
            "machine": runner.machine.record(),
            "states": runner.states.record(),
            "kept": list(runner.kept.fds),
            "processes": [each.record() for each in runner.incarnations if each.process is not None],
            "current": None if runner.current is None else runner.current.generation,
            "standby": None if runner.standby is None else runner.standby.generation,
            "since": runner.since,
        }

    def restore(self, record: dict[str, Any], take: Take) -> list[Incarnation]:
        """Go on where an earlier kernel was, before anything is asked of the runner. `take(name)` gives descriptors
        that were stored. Returns the module's processes; see `settle`.

        Raises KeyError for what is not there, and SnapError.
        """
        runner = self._runner
        if record["processes"] or record["states"]["seats"]:
            runner.gate.close()
            runner.gate = GatePage(take(f"gate.{runner.name}")[0])
        runner.found, runner.origin = packages.restored(record["found"]), packages.restored(record["origin"])
        runner.states.restore(record["states"], take)
        runner.kept.restore(record["kept"], take)
        found = [self._restored(each, take) for each in record["processes"]]
        for incarnation in found:
            if incarnation.generation == record["current"]:
                runner.current = incarnation
            elif incarnation.generation == record["standby"]:
                runner.standby = incarnation
        runner.resume(record["machine"], record["since"])
        return found

    def settle(self, incarnation: Incarnation, fds_of: Callable[[Any], list[int]]) -> None:
        """Of a restored process: one that nobody knows any more goes. Others get what may not have been sent, but for
        what comes of their report; `fds_of` gives the descriptors of a message."""
        if incarnation not in self._runner.incarnations:
            incarnation.kill()
            return
        for data in incarnation.unsent:
            message = _ORDERS.decode(data)
            match message:
                case protocol.Configure():
                    incarnation.kill()  # it knows nothing yet: another one is as good
                    return
                case (
                    protocol.Attach()
                    | protocol.Detach()
                    | protocol.Report()
                    | protocol.Check()
                    | protocol.Yield()
                ):
                    pass
                case protocol.Prepare(engine=engine):
                    incarnation.unprepared.add(engine)
                case _:
                    incarnation.send(message, fds_of(message))
        self._ask(incarnation)

    def heard(self, incarnation: Incarnation, holding: protocol.Holding) -> None:
        """What it holds is compared with what was recorded."""
        deadline = self._asked.pop(incarnation, None)
        if deadline is None:
            return
        deadline.cancel()
        runner = self._runner
        if (holding.name, holding.generation) != (runner.name, incarnation.generation):
            said = f"{holding.name!r} generation {holding.generation}"
            runner.misbehaved(incarnation, f"it says that it is {said}")
            return
        ended = [engine for engine, stage in holding.engines.items() if stage == "ended"]
        if ended and (runner.follower is None or not runner.follower.retires(incarnation)):
            runner.misbehaved(incarnation, f"engine {ended[0]} has ended in it")
            return
        for engine, stage in holding.engines.items():
            if engine in incarnation.engines and engine in runner.states.seats:
                self._correct(incarnation, engine, stage)
        self._held(runner, incarnation, holding.channels)
        if runner.follower is not None:
            runner.follower.on_report(incarnation)
        if incarnation is runner.current and incarnation.serves:
            runner.serving()

    def close(self) -> None:
        for timer in self._asked.values():
            timer.cancel()

    def _ask(self, incarnation: Incarnation) -> None:
        """One that does not answer in time is killed."""
        loop = asyncio.get_running_loop()
        reason = f"did not say within {REPORT_DEADLINE:g} s what it holds"
        self._asked[incarnation] = loop.call_later(
            REPORT_DEADLINE, self._runner.misbehaved, incarnation, reason
        )
        incarnation.send(protocol.Report())

    def _correct(self, incarnation: Incarnation, engine: str, stage: str) -> None:
        runner = self._runner
        if stage == "running":
            if engine not in incarnation.running:
                runner.took(incarnation, engine)
        elif stage == "loading" and engine in incarnation.unprepared:
            runner.prepare(incarnation, engine)
        else:
            incarnation.running.discard(engine)
            incarnation.prepared.discard(engine)
            if stage == "prepared":
                incarnation.prepared.add(engine)

    def _restored(self, record: dict[str, Any], take: Take) -> Incarnation:
        runner, generation = self._runner, record["generation"]
        link, pidfd, log, page = take(f"process.{runner.name}.{generation}")
        segment = Segment.adopt(page, _native.StatsPage.BYTES)
        incarnation = Incarnation(generation, packages.restored(record["found"]), runner.log, segment)
        incarnation.error, incarnation.faults = record["error"], record["faults"]
        incarnation.unsent = record["unsent"]
        incarnation.prepared, incarnation.running = set(record["prepared"]), set(record["running"])
        if record["schemas"] is not None:
            incarnation.schemas = msgspec.convert(record["schemas"], dict[str, protocol.StateSchema])
        runner.alive.add(incarnation)
        incarnation.adopt([link, pidfd, log], record["pid"], runner.ears, runner.outbox)
        return incarnation
