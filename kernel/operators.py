"""What operators can ask for: one method per operation, its arguments typed, its right named."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final

import msgspec

from snap.dataplane.errors import DeniedError, NotFoundError, UsageError
from snap.ipc.protocol import CapView, ChannelView, EventView, KernelView, ModuleView, UpgradeView

from . import operations, policy
from .answers import Ticket
from .audit import AuditRecord
from .desk import unix_time
from .kernel import Kernel
from .policy import Identity
from .succession import Succession


class Args(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments."""


class Name(Args, frozen=True):
    name: str


class Change(Args, frozen=True):
    name: str
    wait: bool = True


class Logs(Args, frozen=True):
    name: str
    lines: int = 50


class Owner(Args, frozen=True):
    owner: str | None = None


class Cap(Args, frozen=True):
    id: int


class Why(Args, frozen=True):
    who: str
    service: str
    right: str | None = None


class Grant(Args, frozen=True):
    owner: str
    service: str
    rights: list[str]
    expires: float | None = None


class Since(Args, frozen=True):
    seq: int = 0
    limit: int = 1000


class Lines(Args, frozen=True):
    lines: int = 50


class Upgrade(Args, frozen=True):
    """`source`: a directory, a version, or None for the module's own directory as it is now; `bake` in seconds."""

    name: str
    source: str | None = None
    bake: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 30.0
    rollback: bool = True
    wait: bool = True


class Source(Args, frozen=True):
    """`source`: an interpreter, or the directory of an environment; None: what is installed now."""

    source: str | None = None


class History(Args, frozen=True):
    name: str | None = None


@dataclass(frozen=True)
class Call:
    """`who` asks and waits `within` seconds; `ticket` tells what was begun for the same request already."""

    who: Identity
    within: float
    ticket: Ticket


@dataclass(frozen=True)
class _Operation:
    right: str
    args: type[Args]
    run: Callable[[Call, Any], Awaitable[Any]]


class Operators:
    """Checks and carries out operations on a kernel."""

    def __init__(self, kernel: Kernel, succession: Succession | None = None) -> None:
        """`succession` upgrades the kernel itself."""
        self._kernel, self._succession = kernel, succession
        look, act = "inspect", "operate"
        self._operations: Final = {
            "kernel.status": _Operation(look, Args, self._status),
            "kernel.stop": _Operation(act, Args, self._stop),
            "kernel.upgrade": _Operation(act, Source, self._upgrade_kernel),
            "module.list": _Operation(look, Args, self._modules),
            "module.show": _Operation(look, Name, self._module),
            "module.start": _Operation(act, Change, self._start_module),
            "module.stop": _Operation(act, Change, self._stop_module),
            "module.restart": _Operation(act, Change, self._restart_module),
            "module.upgrade": _Operation(act, Upgrade, self._upgrade),
            "module.rollback": _Operation(act, Change, self._rollback),
            "upgrade.show": _Operation(look, Cap, self._upgrade_show),
            "upgrade.history": _Operation(look, History, self._upgrade_history),
            "module.logs": _Operation(look, Logs, self._logs),
            "cap.list": _Operation(look, Owner, self._caps),
            "cap.inspect": _Operation(look, Cap, self._cap),
            "cap.why": _Operation(look, Why, self._why),
            "cap.grant": _Operation(act, Grant, self._grant),
            "cap.revoke": _Operation(act, Cap, self._revoke),
            "channel.list": _Operation(look, Args, self._channels),
            "events.since": _Operation(look, Since, self._since),
            "audit.tail": _Operation(look, Lines, self._audit_tail),
        }

    def changes(self, op: str) -> bool:
        """Whether `op` changes anything: then a repeated key must not do it twice."""
        operation = self._operations.get(op)
        return operation is not None and operation.right == "operate"

    async def perform(
        self, who: Identity | None, op: str, args: dict[str, Any], within: float, ticket: Ticket | None = None
    ) -> Any:
        """Raises SnapError: DeniedError, UsageError, and what the operation itself raises."""
        operation = self._operations.get(op)
        if operation is None:
            raise UsageError(
                f"there is no operation {op[:64]!r}", "this kernel may be older than your snapctl"
            )
        if who is None:
            raise DeniedError("libzmq does not say who asks", "use a libzmq with SO_PEERCRED on ipc://")
        self._authorize(who, op, operation.right)
        try:
            typed = msgspec.convert(args, operation.args)
        except msgspec.ValidationError as error:
            raise UsageError(f"{op}: {error}") from error
        return await operation.run(Call(who, within, ticket or Ticket()), typed)

    def _authorize(self, who: Identity, op: str, right: str) -> None:
        decision = self._kernel.policy.decide_operator(who, self._kernel.uid)
        allowed = decision.allowed and right in decision.rights
        reason = (
            decision.reason if allowed or not decision.allowed else f"{decision.rule} does not give {right}"
        )
        if right == "operate" or not allowed:
            record = AuditRecord(
                action=op,
                outcome="ok" if allowed else "denied",
                object="kernel",
                rights=[right],
                owner=f"operator:{who.uid}",
                badge=f"uid:{who.uid}/pid:{who.pid}",
                pid=who.pid,
                rule=decision.rule,
                reason=reason,
            )
            self._kernel.audit.write(record)
        if not allowed:
            raise DeniedError(f"{op}: {reason}", "the [[operator]] rules of the policy decide")

    # -- kernel -----------------------------------------------------------------------------------------------

    async def _status(self, call: Call, args: Args) -> KernelView:
        return self._kernel.view()

    async def _stop(self, call: Call, args: Args) -> dict[str, Any]:
        # Not before this answer is on its way.
        asyncio.get_running_loop().call_later(0.05, self._kernel.stopping.set)
        return {}

    async def _upgrade_kernel(self, call: Call, args: Source) -> UpgradeView:
        if self._succession is None:
            raise UsageError("this kernel cannot be upgraded", "it is not run by `snap-kernel`")
        return self._succession.begin(args.source)

    # -- modules ----------------------------------------------------------------------------------------------

    async def _modules(self, call: Call, args: Args) -> list[ModuleView]:
        return self._kernel.module_views()

    async def _module(self, call: Call, args: Name) -> ModuleView:
        return self._kernel.module_view(args.name)

    async def _start_module(self, call: Call, args: Change) -> ModuleView:
        return await self._change(operations.START, args, call, lambda: self._kernel.start(args.name))

    async def _stop_module(self, call: Call, args: Change) -> ModuleView:
        return await self._change(operations.STOP, args, call, self._kernel.runner(args.name).stop)

    async def _restart_module(self, call: Call, args: Change) -> ModuleView:
        return await self._change(operations.RESTART, args, call, self._kernel.runner(args.name).restart)

    async def _change(self, kind: str, args: Change, call: Call, begin: Callable[[], None]) -> ModuleView:
        runner = self._kernel.runner(args.name)
        if call.ticket.begun is None:
            self._kernel.upgrades.interrupt(runner, kind)
            call.ticket.begun = 0
            await runner.operations.run(kind, begin, call.within, args.wait)
        else:
            await runner.operations.resume(kind, call.within, args.wait)
        return self._kernel.runner_view(runner)

    async def _upgrade(self, call: Call, args: Upgrade) -> UpgradeView:
        begin = partial(self._kernel.upgrades.begin, args.name, args.source, args.bake, args.rollback)
        return await self._follow(call, begin, args.wait)

    async def _rollback(self, call: Call, args: Change) -> UpgradeView:
        return await self._follow(call, partial(self._kernel.upgrades.roll_back, args.name), args.wait)

    async def _follow(self, call: Call, begin: Callable[[], int], wait: bool) -> UpgradeView:
        upgrades = self._kernel.upgrades
        if call.ticket.begun is None:
            call.ticket.begun = begin()
        number = call.ticket.begun
        return await upgrades.result(number, call.within) if wait else upgrades.view(number)

    async def _upgrade_show(self, call: Call, args: Cap) -> UpgradeView:
        return self._kernel.upgrades.view(args.id)

    async def _upgrade_history(self, call: Call, args: History) -> list[UpgradeView]:
        return self._kernel.upgrades.views(args.name)

    async def _logs(self, call: Call, args: Logs) -> dict[str, list[str]]:
        tail = list(self._kernel.runner(args.name).log.tail)
        return {"lines": tail[-args.lines :] if args.lines > 0 else []}

    # -- capabilities and channels ----------------------------------------------------------------------------

    async def _caps(self, call: Call, args: Owner) -> list[CapView]:
        return [unix_time(view) for view in self._kernel.table.views(args.owner)]

    async def _cap(self, call: Call, args: Cap) -> dict[str, Any]:
        table = self._kernel.table
        view: dict[str, Any] = msgspec.to_builtins(unix_time(table.inspect(args.id)))
        return {**view, "children": table.children(args.id)}

    async def _why(self, call: Call, args: Why) -> dict[str, Any]:
        kernel = self._kernel
        principal = kernel.desk.principals.get(args.who)
        asker = principal.identity if principal else policy.identity(args.who)
        decision = kernel.policy.why(asker, args.service, kernel.uid, args.right)
        return {"allowed": decision.allowed, "rule": decision.rule, "reason": decision.reason}

    async def _grant(self, call: Call, args: Grant) -> CapView:
        kernel = self._kernel
        if args.service not in kernel.plan.providers:
            raise NotFoundError(
                f"no module provides the service {args.service!r}", "see `snapctl module list`"
            )
        cap = kernel.table.mint(
            args.owner,
            f"service:{args.service}",
            args.rights,
            rule=f"granted by operator:{call.who.uid}",
            now=asyncio.get_running_loop().time(),
            lifetime=args.expires,
        )
        kernel.desk.schedule_expiry()
        kernel.events.emit("cap.granted", f"cap:{cap.id}", object=cap.object, owner=cap.owner)
        return unix_time(cap.view())

    async def _revoke(self, call: Call, args: Cap) -> dict[str, list[int]]:
        reason = f"revoked by operator:{call.who.uid}"
        gone = self._kernel.table.revoke_id(args.id, reason)
        self._kernel.desk.revoke(gone, reason)
        return {"revoked": [cap.id for cap in gone]}

    async def _channels(self, call: Call, args: Args) -> list[ChannelView]:
        return [channel.view() for channel in self._kernel.broker.channels.values()]

    # -- what happened ----------------------------------------------------------------------------------------

    async def _since(self, call: Call, args: Since) -> list[EventView]:
        return self._kernel.events.since(max(0, args.seq), max(0, args.limit))

    async def _audit_tail(self, call: Call, args: Lines) -> dict[str, list[str]]:
        return {"lines": self._kernel.audit.tail(min(args.lines, 10_000))}
