"""The capability table: who holds which right on what. No I/O and no clock: times come in as `now`.

A *capability* is (object, rights, badge, owner, parent, expiry). Its holder names it by a *handle* of the holder's own
table (`handles.py`). Everything derived from a capability is its descendant and goes when it goes. Asking for more than
one holds is a DeniedError, never silently less.

Memory is bounded: a principal holds at most `quota` capabilities that it obtained itself and as many that others gave
it. The two are counted apart, so that nobody can use up another's quota by giving.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, NoReturn

import msgspec

from snap.dataplane.errors import DeniedError, HandleError, NotFoundError, QuotaError, SnapError, UsageError
from snap.ipc.protocol import CapView

from .audit import AuditRecord
from .handles import MAX_HANDLES, Principal

RIGHTS: Final = {
    "service": frozenset({"connect", "send", "recv", "copy", "move", "delegate", "inspect"}),
    "channel": frozenset({"send", "recv", "inspect"}),
    "module": frozenset({"start", "stop", "inspect"}),
    "kernel": frozenset({"operate", "inspect"}),
}
"""The rights that each kind of object knows; an object is written `kind:name`, or `kernel`."""

MAX_DEPTH: Final = 16
"""Derivations between a minted capability and its furthest descendant."""

DEFAULT_QUOTA: Final = 256


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """`expires` is in the table's time, None: never. `given`: it came from another principal."""

    id: int
    handle: int
    object: str
    rights: frozenset[str]
    badge: str
    owner: str
    parent: int | None
    expires: float | None
    rule: str
    depth: int
    given: bool

    def expired(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now

    def view(self) -> CapView:
        return CapView(
            id=self.id,
            handle=self.handle,
            object=self.object,
            rights=sorted(self.rights),
            badge=self.badge,
            owner=self.owner,
            parent=self.parent,
            expires=self.expires,
            rule=self.rule,
        )


class CapabilityTable:
    """All capabilities of a kernel. Every change and every refusal is told to `audit`."""

    def __init__(self, audit: Callable[[AuditRecord], None]) -> None:
        self._audit = audit
        self._principals: dict[str, Principal] = {}
        self._caps: dict[int, Capability] = {}
        self._children: dict[int, dict[int, None]] = {}
        self._expiries: list[tuple[float, int]] = []
        self._last_generation = 0
        self._last_id = 0
        self._recorded: msgspec.Raw | None = None

    def __len__(self) -> int:
        return len(self._caps)

    # -- principals -----------------------------------------------------------------------------------------

    @property
    def owners(self) -> list[str]:
        return list(self._principals)

    def add_owner(self, owner: str, badge: str, pid: int | None = None, quota: int = DEFAULT_QUOTA) -> None:
        """Give `owner` an empty table; `badge` is how providers see it. Raises UsageError when it has one."""
        if owner in self._principals:
            raise UsageError(f"{owner} already has a table of capabilities")
        if not 1 <= quota <= MAX_HANDLES // 2:
            raise UsageError(f"a quota of {quota} handles is not within 1 to {MAX_HANDLES // 2}")
        self._recorded = None
        self._principals[owner] = Principal(owner, badge, pid, quota, self._next_generation)

    def drop_owner(self, owner: str, reason: str = "its owner is gone") -> list[Capability]:
        """Revoke all that `owner` holds with everything derived from it, and forget `owner`."""
        principal = self._principal(owner)
        revoked: list[Capability] = []
        for cap_id in principal.ids():
            if cap_id in self._caps:
                revoked += self._remove(cap_id, reason)
        self._recorded = None
        del self._principals[owner]
        return revoked

    # -- the kernel's own acts ------------------------------------------------------------------------------

    def mint(
        self,
        owner: str,
        object: str,
        rights: Iterable[str],
        *,
        rule: str,
        now: float,
        lifetime: float | None = None,
        parent: int | None = None,
    ) -> Capability:
        """A capability out of nothing, or on an object made through the one with id `parent`, with which it goes.

        `lifetime` is in seconds. Raises NotFoundError (no such owner or parent), UsageError (rights that `object` does
        not know), QuotaError, and DeniedError when `parent` does not hold those rights for that long.
        """
        principal = self._principal(owner)
        wanted = _known(object, rights)
        above = None if parent is None else self.get(parent)
        if above is None:
            expires = None if lifetime is None else now + _positive(lifetime)
            return self._insert("mint", principal, object, wanted, expires, rule, None, given=False)
        return self._derive("mint", above, principal, wanted, now, lifetime, object=object, rule=rule)

    def revoke_id(self, cap_id: int, reason: str) -> list[Capability]:
        """Revoke the capability with this id and its descendants. Raises NotFoundError."""
        self.get(cap_id)
        return self._remove(cap_id, reason)

    def handle_time(self, now: float) -> list[Capability]:
        """Revoke what has expired by `now`, the descendants of each before itself."""
        revoked: list[Capability] = []
        while self._expiries and self._expiries[0][0] <= now:
            _, cap_id = heapq.heappop(self._expiries)
            if cap_id in self._caps:
                revoked += self._remove(cap_id, "expired")
        return revoked

    def next_expiry(self) -> float | None:
        """When `handle_time` next has something to do."""
        while self._expiries and self._expiries[0][1] not in self._caps:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    # -- what a principal asks for --------------------------------------------------------------------------

    def check(self, owner: str, handle: int, right: str, now: float) -> Capability:
        """The capability behind `handle`. Raises HandleError, or DeniedError when it lacks `right`."""
        return self._use("check", owner, handle, now, right)

    def attenuate(
        self, owner: str, handle: int, rights: Iterable[str], now: float, lifetime: float | None = None
    ) -> Capability:
        """A second handle with fewer rights or (seconds) less time. Raises HandleError, DeniedError, QuotaError, and
        UsageError for rights that do not exist.

        One that takes nothing away is a copy, and needs that right.
        """
        cap = self._use("attenuate", owner, handle, now)
        wanted = _known(cap.object, rights)
        if wanted == cap.rights and lifetime is None and "copy" not in wanted:
            self._deny("attenuate", DeniedError("this takes nothing away: it is a copy"), owner, cap, wanted)
        return self._derive("attenuate", cap, self._principals[owner], wanted, now, lifetime)

    def copy(self, owner: str, handle: int, now: float) -> Capability:
        """A second handle with the same rights. Raises HandleError, DeniedError (needs `copy`), QuotaError."""
        cap = self._use("copy", owner, handle, now, "copy")
        return self._derive("copy", cap, self._principals[owner], cap.rights, now)

    def delegate(
        self, owner: str, handle: int, to: str, now: float, rights: Iterable[str] | None = None
    ) -> Capability:
        """A copy with `rights` (default: all) for the principal `to`; revoking the original revokes it.

        Raises HandleError, DeniedError (needs `delegate`), NotFoundError (no principal `to`), QuotaError (of `to`).
        """
        cap = self._use("delegate", owner, handle, now, "delegate")
        wanted = cap.rights if rights is None else _known(cap.object, rights)
        return self._derive("delegate", cap, self._receiver("delegate", cap, to), wanted, now)

    def move(self, owner: str, handle: int, to: str, now: float) -> Capability:
        """Hand the capability itself to `to`: its handle ends here, its id and descendants stay.

        Raises HandleError, DeniedError (needs `move`), NotFoundError (no principal `to`), QuotaError (of `to`).
        """
        cap = self._use("move", owner, handle, now, "move")
        receiver = self._receiver("move", cap, to)
        self._require_room("move", receiver, True, cap, cap.rights)
        self._principals[owner].remove(cap.handle, cap.given)
        moved = msgspec.structs.replace(
            cap, handle=receiver.insert(cap.id, True), owner=to, badge=receiver.badge, given=True
        )
        self._caps[cap.id] = moved
        self._recorded = None
        self._record("move", moved, f"from {owner}")
        return moved

    def revoke(self, owner: str, handle: int, *, itself: bool = True) -> list[Capability]:
        """Revoke all that was derived from `handle`, and the capability itself unless told otherwise. HandleError.

        In the list descendants come before what they were derived from. An expired capability can still be revoked.
        """
        cap = self._find("revoke", owner, handle)
        if itself:
            return self._remove(cap.id, f"revoked by {owner}")
        return [
            gone
            for child in self.children(cap.id)
            for gone in self._remove(child, f"{cap.id} revoked what was derived from it")
        ]

    # -- looking --------------------------------------------------------------------------------------------

    def get(self, cap_id: int) -> Capability:
        """Raises NotFoundError."""
        cap = self._caps.get(cap_id)
        if cap is None:
            raise NotFoundError(f"no capability has the id {cap_id}", "see `snapctl cap list`")
        return cap

    def inspect(self, cap_id: int) -> CapView:
        """Raises NotFoundError."""
        return self.get(cap_id).view()

    def children(self, cap_id: int) -> list[int]:
        """The ids derived directly from `cap_id`, oldest first."""
        return list(self._children.get(cap_id, ()))

    def views(self, owner: str | None = None) -> list[CapView]:
        """All capabilities by id, or those of `owner` (none when it has no table)."""
        if owner is None:
            return [cap.view() for _, cap in sorted(self._caps.items())]
        principal = self._principals.get(owner)
        return [self._caps[cap_id].view() for cap_id in sorted(principal.ids())] if principal else []

    # -- outliving the kernel -------------------------------------------------------------------------------

    def record(self) -> msgspec.Raw:
        """Encoded once per change: the table can be large, and is asked for with every round of the loop."""
        if self._recorded is None:
            record = {
                "id": self._last_id,
                "generation": self._last_generation,
                "owners": [principal.record() for principal in self._principals.values()],
                "caps": list(self._caps.values()),
            }
            self._recorded = msgspec.Raw(msgspec.msgpack.encode(record))
        return self._recorded

    def restore(self, record: dict[str, Any]) -> None:
        """Into an empty table; its clock goes on, so that what expires does so on time."""
        self._recorded = None
        self._last_id, self._last_generation = record["id"], record["generation"]
        for each in record["owners"]:
            principal = Principal.restored(each, self._next_generation)
            self._principals[principal.name] = principal
        for each in record["caps"]:
            cap = msgspec.convert(each, Capability)
            self._caps[cap.id] = cap
            self._principals[cap.owner].held[cap.given] += 1
            if cap.parent is not None:
                self._children.setdefault(cap.parent, {})[cap.id] = None
            if cap.expires is not None:
                heapq.heappush(self._expiries, (cap.expires, cap.id))

    # -- inside ---------------------------------------------------------------------------------------------

    def _next_generation(self) -> int:
        self._last_generation += 1
        return self._last_generation

    def _principal(self, owner: str) -> Principal:
        principal = self._principals.get(owner)
        if principal is None:
            raise NotFoundError(f"no principal is named {owner}", "see `snapctl cap list`")
        return principal

    def _find(self, action: str, owner: str, handle: int) -> Capability:
        cap_id = self._principal(owner).find(handle)
        if cap_id is None:
            message = f"handle {handle} names no capability of {owner}: revoked, expired, or never given"
            self._deny(action, HandleError(message, "look the service up again"), owner)
        return self._caps[cap_id]

    def _use(self, action: str, owner: str, handle: int, now: float, right: str | None = None) -> Capability:
        cap = self._find(action, owner, handle)
        if cap.expired(now):
            error = HandleError(f"handle {handle} on {cap.object} has expired", "look the service up again")
            self._deny(action, error, owner, cap)
        if right is not None and right not in cap.rights:
            have = ", ".join(sorted(cap.rights))
            denied = DeniedError(
                f"handle {handle} on {cap.object} lacks the right {right}", f"it has: {have}"
            )
            self._deny(action, denied, owner, cap, {right})
        return cap

    def _receiver(self, action: str, cap: Capability, to: str) -> Principal:
        receiver = self._principals.get(to)
        if receiver is None:
            self._deny(action, NotFoundError(f"no principal is named {to}"), cap.owner, cap)
        if to == cap.owner:
            self._deny(action, DeniedError(f"{to} already holds it", "use copy"), cap.owner, cap)
        return receiver

    def _require_room(
        self, action: str, receiver: Principal, given: bool, source: Capability | None, rights: Iterable[str]
    ) -> None:
        if receiver.held[given] >= receiver.quota:
            what = "from others" if given else "of its own"
            error = QuotaError(
                f"{receiver.name} holds {receiver.quota} capabilities {what}", "revoke some first"
            )
            self._deny(action, error, source.owner if source else receiver.name, source, rights)

    def _derive(
        self,
        action: str,
        parent: Capability,
        receiver: Principal,
        rights: frozenset[str],
        now: float,
        lifetime: float | None = None,
        *,
        object: str | None = None,
        rule: str | None = None,
    ) -> Capability:
        """A child of `parent`. The one place where authority is handed down, so the one that checks what is asked."""
        expires = parent.expires if lifetime is None else now + _positive(lifetime)
        refusal = None
        if more := rights - parent.rights:
            have = ", ".join(sorted(parent.rights))
            refusal = DeniedError(
                f"{parent.object}: cannot pass on {', '.join(sorted(more))}", f"it has: {have}"
            )
        elif parent.expires is not None and (expires is None or expires > parent.expires):
            left = parent.expires - now
            refusal = DeniedError(
                f"{parent.object}: cannot outlive what it derives from", f"{left:g} s are left"
            )
        elif parent.depth >= MAX_DEPTH:
            refusal = DeniedError(
                f"{parent.object}: already derived {MAX_DEPTH} times", "derive from an earlier one"
            )
        if refusal is not None:
            self._deny(action, refusal, parent.owner, parent, rights)
        given = receiver.name != parent.owner
        return self._insert(
            action,
            receiver,
            object or parent.object,
            rights,
            expires,
            rule or parent.rule,
            parent,
            given=given,
        )

    def _insert(
        self,
        action: str,
        receiver: Principal,
        object: str,
        rights: frozenset[str],
        expires: float | None,
        rule: str,
        parent: Capability | None,
        *,
        given: bool,
    ) -> Capability:
        self._require_room(action, receiver, given, parent, rights)
        self._last_id += 1
        cap = Capability(
            id=self._last_id,
            handle=receiver.insert(self._last_id, given),
            object=object,
            rights=rights,
            badge=receiver.badge,
            owner=receiver.name,
            parent=parent.id if parent else None,
            expires=expires,
            rule=rule,
            depth=parent.depth + 1 if parent else 0,
            given=given,
        )
        self._caps[cap.id] = cap
        self._recorded = None
        if parent is not None:
            self._children.setdefault(parent.id, {})[cap.id] = None
        if expires is not None:
            self._remember_expiry(expires, cap.id)
        self._record(action, cap, f"from {parent.owner}" if parent and given else "")
        return cap

    def _remember_expiry(self, expires: float, cap_id: int) -> None:
        heapq.heappush(self._expiries, (expires, cap_id))
        if len(self._expiries) > 2 * len(self._caps) + 64:
            # Revoked before they expired: without this a principal could grow the heap without holding anything.
            self._expiries = [entry for entry in self._expiries if entry[1] in self._caps]
            heapq.heapify(self._expiries)

    def _remove(self, cap_id: int, reason: str) -> list[Capability]:
        """Take out a capability and all below it; descendants first."""
        order = [cap_id]
        for above in order:
            order += self.children(above)
        revoked = [self._forget(each) for each in reversed(order)]
        for cap in revoked:
            self._record("revoke", cap, reason if cap.id == cap_id else f"{reason} (derived from {cap_id})")
        return revoked

    def _forget(self, cap_id: int) -> Capability:
        cap = self._caps.pop(cap_id)
        self._recorded = None
        if cap.parent is not None:
            siblings = self._children[cap.parent]
            del siblings[cap_id]
            if not siblings:
                del self._children[cap.parent]
        self._principals[cap.owner].remove(cap.handle, cap.given)
        return cap

    def _record(self, action: str, cap: Capability, reason: str) -> None:
        self._tell(action, "ok", cap.owner, cap, cap.rights, reason)

    def _deny(
        self,
        action: str,
        error: SnapError,
        owner: str,
        cap: Capability | None = None,
        rights: Iterable[str] = (),
    ) -> NoReturn:
        self._tell(action, "denied", owner, cap, rights, error.message)
        raise error

    def _tell(
        self,
        action: str,
        outcome: Literal["ok", "denied"],
        owner: str,
        cap: Capability | None,
        rights: Iterable[str],
        reason: str,
    ) -> None:
        principal = self._principals[owner]
        self._audit(
            AuditRecord(
                action=action,
                outcome=outcome,
                cap=cap.id if cap else None,
                parent=cap.parent if cap else None,
                object=cap.object if cap else "",
                rights=sorted(rights),
                owner=owner,
                badge=principal.badge,
                pid=principal.pid,
                rule=cap.rule if cap else "",
                reason=reason,
            )
        )


def _known(object: str, rights: Iterable[str]) -> frozenset[str]:
    kind = object.partition(":")[0]
    wanted = frozenset(rights)
    known = RIGHTS.get(kind)
    if known is None:
        raise UsageError(f"{object!r} is no kind of object", f"there are: {', '.join(RIGHTS)}")
    if not wanted:
        raise UsageError(f"{object}: no rights named", f"name some of {', '.join(sorted(known))}")
    if unknown := wanted - known:
        raise UsageError(
            f"{object}: {min(unknown)[:32]!r} is no right", f"there are: {', '.join(sorted(known))}"
        )
    return wanted


def _positive(lifetime: float) -> float:
    if not (math.isfinite(lifetime) and lifetime > 0):
        raise UsageError(f"a lifetime of {lifetime} s", "give a positive number of seconds")
    return lifetime
