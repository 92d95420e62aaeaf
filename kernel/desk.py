"""Where principals, applications and modules alike, come with requests. A request names handles, never objects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from snap.dataplane.errors import DeniedError, NotFoundError, ProtocolError, QuotaError, SnapError
from snap.ipc import protocol
from snap.ipc.protocol import CapView

from .audit import AuditLog, AuditRecord
from .broker import Broker
from .capability import Capability, CapabilityTable
from .events import Events
from .policy import Identity, Policy
from .principals import Principal, Send, TokenBucket
from .runner import Runner

FLOOD: Final = 100
"""Requests beyond its rate that a principal may make before it is disconnected."""


class Desk:
    """Knows every principal; answers requests; sees to it that what expires ends."""

    def __init__(
        self,
        table: CapabilityTable,
        policy: Policy,
        uid: int,
        audit: AuditLog,
        events: Events,
        broker: Broker,
        provider: Callable[[str], Runner | None],
    ) -> None:
        self.principals: dict[str, Principal] = {}
        self._table, self._policy, self._uid = table, policy, uid
        self._audit, self._events, self._broker, self._provider = audit, events, broker, provider
        self._loop = asyncio.get_running_loop()
        self._expiry: asyncio.TimerHandle | None = None

    def admit(
        self,
        name: str,
        badge: str,
        identity: Identity,
        send: Send,
        drop: Callable[[str], None],
        label: str = "",
    ) -> Principal:
        """`label` is what it calls itself. Raises UsageError when there is a principal of that name."""
        self._table.add_owner(name, badge, identity.pid)
        quota = self._policy.quota
        bucket = TokenBucket(quota.requests_per_second, self._loop.time())
        principal = Principal(name, badge, identity, quota, bucket, send, drop)
        self.principals[name] = principal
        self._events.emit("principal.joined", name, badge=badge, label=label[:64])
        return principal

    def record(self) -> list[dict[str, Any]]:
        return [principal.record() for principal in self.principals.values()]

    def readmit(self, record: dict[str, Any], send: Send, drop: Callable[[str], None]) -> Principal:
        """One that an earlier kernel admitted, and whose table was restored."""
        uid, gid, pid, module = record["identity"]
        quota = self._policy.quota
        bucket = TokenBucket(quota.requests_per_second, self._loop.time())
        identity = Identity(uid, gid, pid, module)
        principal = Principal(record["id"], record["badge"], identity, quota, bucket, send, drop)
        principal.services, principal.heard = record["services"], set()
        self.principals[principal.id] = principal
        return principal

    def forget(self, owner: str, reason: str) -> None:
        """A principal of an earlier kernel that is not there any more: what it held goes."""
        self._broker.revoked(self._table.drop_owner(owner, reason))
        self._events.emit("principal.left", owner, reason=reason)

    def dismiss(self, principal: Principal, reason: str) -> None:
        """It is gone: everything that it held goes, with everything derived from that."""
        if self.principals.pop(principal.id, None) is None:
            return
        self._broker.principal_gone(principal, reason)
        self._broker.revoked(self._table.drop_owner(principal.id))
        self._events.emit("principal.left", principal.id, reason=reason)

    def request(self, principal: Principal, message: Any) -> None:
        """Answer one decoded request. Never raises what a principal can cause."""
        if not principal.hears(message.seq):
            return
        if not principal.bucket.take(self._loop.time()):
            self._refuse(principal, message.seq)
            return
        try:
            answer = self._answer(principal, message)
            if answer is not None:
                principal.send(answer, ())
        except SnapError as error:
            principal.fail(message.seq, error.code, error.message, error.hint)
        self.schedule_expiry()

    def find(self, principal: Principal, service: str) -> Capability:
        """The capability on `service` that policy gives `principal`: the one it has, or a new one.

        Raises DeniedError (audited), QuotaError.
        """
        known = principal.services.get(service)
        if known is not None and (cap := self._alive(known, principal.id)) is not None:
            return cap
        decision = self._policy.decide(principal.identity, service, self._uid)
        if not decision.allowed:
            self.deny(principal, "lookup", f"service:{service}", decision.reason)
            raise DeniedError(decision.reason, "`snapctl cap why` explains; the policy file decides")
        cap = self._table.mint(
            principal.id,
            f"service:{service}",
            decision.rights,
            rule=decision.rule,
            now=self._loop.time(),
            lifetime=decision.expires,
        )
        if len(principal.services) >= 256:
            principal.services.clear()
        principal.services[service] = cap.id
        return cap

    def deny(self, principal: Principal, action: str, object: str, reason: str) -> None:
        """Note a refusal that the table of capabilities did not see."""
        self._audit.write(
            AuditRecord(
                action=action,
                outcome="denied",
                object=object,
                owner=principal.id,
                badge=principal.badge,
                pid=principal.identity.pid,
                reason=reason,
            )
        )
        self._events.emit("cap.refused", principal.id, object=object, reason=reason)

    def revoke(self, gone: list[Capability], reason: str) -> None:
        """End what hung on capabilities that are no more, and tell it to whoever listens."""
        for cap in gone:
            self._events.emit(
                "cap.revoked", f"cap:{cap.id}", object=cap.object, owner=cap.owner, reason=reason
            )
        self._broker.revoked(gone, reason=reason)

    def schedule_expiry(self) -> None:
        """Have the next expiry happen on time; called after whatever may mint."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        when = self._table.next_expiry()
        if when is not None:
            # A day ahead at most: the loop's timers do not take much more.
            self._expiry = self._loop.call_at(min(when, self._loop.time() + 86400), self._expire)

    def close(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()

    # -- inside -----------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        self.revoke(self._table.handle_time(self._loop.time()), "expired")
        self.schedule_expiry()

    def _refuse(self, principal: Principal, seq: int) -> None:
        principal.refused += 1
        rate = principal.quota.requests_per_second
        principal.fail(seq, QuotaError.code, f"more than {rate} requests a second", "slow down")
        if principal.refused == 1:
            self._events.emit("principal.flood_refused", principal.id, rate=rate)
        if principal.refused > FLOOD:
            self.deny(principal, "request", "kernel", "flood of requests")
            principal.drop("it flooded the kernel with requests")

    def _answer(self, principal: Principal, message: Any) -> Any:
        now, table, owner = self._loop.time(), self._table, principal.id
        match message:
            case protocol.Lookup(service=service):
                return self._lookup(principal, message.seq, service)
            case protocol.Open():
                self._broker.open(principal, message)
                return None
            case protocol.Mapped():
                self._broker.mapped(principal, message)
                return None
            case protocol.CloseChannel(channel=number):
                self._broker.close_own(principal, number)
                return protocol.Done(seq=message.seq)
            case protocol.ListCaps():
                return protocol.Caps(seq=message.seq, caps=[unix_time(view) for view in table.views(owner)])
            case protocol.Attenuate(handle=handle, rights=rights, expires=expires):
                cap = table.attenuate(owner, handle, rights, now, expires)
            case protocol.Copy(handle=handle):
                cap = table.copy(owner, handle, now)
            case protocol.Delegate(handle=handle, to=to, rights=rights, move=True):
                if rights is not None:
                    raise ProtocolError("a move takes all rights along", "attenuate first, then move")
                table.move(owner, handle, to, now)
                return protocol.Done(seq=message.seq)
            case protocol.Delegate(handle=handle, to=to, rights=rights):
                table.delegate(owner, handle, to, now, rights)
                return protocol.Done(seq=message.seq)
            case protocol.Revoke(handle=handle, itself=itself):
                self.revoke(table.revoke(owner, handle, itself=itself), f"revoked by {owner}")
                return protocol.Done(seq=message.seq)
            case _:
                raise ProtocolError(f"{type(message).__name__} is out of place here")
        return protocol.Done(seq=message.seq, handle=cap.handle)

    def _lookup(self, principal: Principal, seq: int, service: str) -> Any:
        runner = self._provider(service)
        if runner is None and self._policy.decide(principal.identity, service, self._uid).allowed:
            raise NotFoundError(f"no module provides the service {service!r}", "see `snapctl module list`")
        cap = self.find(principal, service)
        ready = runner is not None and runner.ready
        return protocol.Found(seq=seq, handle=cap.handle, rights=sorted(cap.rights), ready=ready)

    def _alive(self, cap_id: int, owner: str) -> Capability | None:
        try:
            cap = self._table.get(cap_id)
        except SnapError:
            return None
        return cap if cap.owner == owner and not cap.expired(self._loop.time()) else None


def unix_time(view: CapView) -> CapView:
    """The table's clock is the loop's; people read Unix seconds."""
    if view.expires is None:
        return view
    return msgspec.structs.replace(
        view, expires=view.expires - asyncio.get_running_loop().time() + time.time()
    )
