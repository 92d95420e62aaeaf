"""The capability table, by example and against a model that is too simple to be wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from snap.dataplane.errors import DeniedError, HandleError, NotFoundError, QuotaError, SnapError, UsageError
from snap.kernel.audit import AuditRecord
from snap.kernel.capability import MAX_DEPTH, Capability, CapabilityTable

ALL = {"connect", "send", "recv", "copy", "move", "delegate", "inspect"}
A, B, C = "app:1.1", "app:2.1", "module:m"


class Fixture:
    def __init__(self, quota: int = 8) -> None:
        self.log: list[AuditRecord] = []
        self.table = CapabilityTable(self.log.append)
        for pid, owner in enumerate((A, B, C), 1):
            self.table.add_owner(owner, f"badge-of-{owner}", pid, quota)

    def mint(self, owner: str = A, rights: set[str] = ALL, **options: Any) -> Capability:
        options = {"rule": "policy #1", "now": 0.0, **options}
        return self.table.mint(owner, "service:echo", rights, **options)


@pytest.fixture
def kit() -> Fixture:
    return Fixture()


def test_a_minted_capability_is_found_by_its_handle_and_shown(kit: Fixture) -> None:
    cap = kit.mint(rights={"connect", "send"}, now=5.0, lifetime=10.0)
    assert kit.table.check(A, cap.handle, "send", 14.9) == cap
    view = kit.table.inspect(cap.id)
    assert (view.owner, view.badge, view.object) == (A, f"badge-of-{A}", "service:echo")
    assert (view.rights, view.expires, view.parent, view.rule) == (
        ["connect", "send"],
        15.0,
        None,
        "policy #1",
    )
    assert kit.table.views(A) == [view]
    assert kit.table.views(B) == kit.table.views("app:9.9") == []


def test_a_right_that_was_not_given_is_denied_and_audited(kit: Fixture) -> None:
    cap = kit.mint(rights={"recv"})
    with pytest.raises(DeniedError, match="lacks the right send"):
        kit.table.check(A, cap.handle, "send", 0.0)
    record = kit.log[-1]
    assert (record.action, record.outcome, record.cap, record.owner) == ("check", "denied", cap.id, A)
    assert (record.rights, record.badge, record.pid, record.rule) == (
        ["send"],
        f"badge-of-{A}",
        1,
        "policy #1",
    )


@pytest.mark.parametrize("handle", [0, -1, 1, 1 << 16, 1 << 62, -(1 << 40)])
def test_a_forged_handle_names_nothing(kit: Fixture, handle: int) -> None:
    cap = kit.mint()
    assert handle != cap.handle or kit.table.revoke(A, handle)
    with pytest.raises(HandleError):
        kit.table.check(A, handle, "send", 0.0)
    assert kit.log[-1].outcome == "denied"


def test_the_handle_of_one_principal_is_nothing_to_another(kit: Fixture) -> None:
    cap = kit.mint(A)
    with pytest.raises(HandleError):
        kit.table.check(B, cap.handle, "send", 0.0)
    with pytest.raises(HandleError):
        kit.table.revoke(B, cap.handle)
    assert kit.table.check(A, cap.handle, "send", 0.0) == cap


def test_a_stale_handle_does_not_name_what_took_its_slot(kit: Fixture) -> None:
    old = kit.mint()
    kit.table.revoke(A, old.handle)
    new = kit.mint()
    assert new.handle != old.handle
    with pytest.raises(HandleError):
        kit.table.check(A, old.handle, "send", 0.0)


def test_attenuating_to_more_rights_is_denied_and_changes_nothing(kit: Fixture) -> None:
    cap = kit.mint(rights={"send", "recv"})
    with pytest.raises(DeniedError, match="cannot pass on connect"):
        kit.table.attenuate(A, cap.handle, {"send", "connect"}, 0.0)
    assert len(kit.table) == 1
    assert kit.log[-1].outcome == "denied"


def test_attenuating_to_a_longer_life_is_denied(kit: Fixture) -> None:
    cap = kit.mint(lifetime=10.0)
    with pytest.raises(DeniedError, match="cannot outlive"):
        kit.table.attenuate(A, cap.handle, {"send"}, 5.0, lifetime=6.0)
    assert kit.table.attenuate(A, cap.handle, {"send"}, 5.0, lifetime=5.0).expires == 10.0
    assert kit.table.attenuate(A, cap.handle, {"send"}, 5.0).expires == 10.0


@pytest.mark.parametrize("lifetime", [0.0, -1.0, float("nan"), float("inf")])
def test_a_lifetime_that_is_none_is_refused(kit: Fixture, lifetime: float) -> None:
    cap = kit.mint()
    with pytest.raises(UsageError, match="lifetime"):
        kit.table.attenuate(A, cap.handle, {"send"}, 0.0, lifetime=lifetime)


def test_attenuation_is_no_way_around_the_right_to_copy(kit: Fixture) -> None:
    cap = kit.mint(rights={"send", "recv"})
    with pytest.raises(DeniedError, match="it is a copy"):
        kit.table.attenuate(A, cap.handle, {"send", "recv"}, 0.0)
    assert kit.table.attenuate(A, cap.handle, {"recv"}, 0.0).rights == {"recv"}


def test_copy_move_and_delegate_each_need_their_own_right(kit: Fixture) -> None:
    for missing in ("copy", "move", "delegate"):
        cap = kit.mint(rights=ALL - {missing})
        act = {
            "copy": lambda handle: kit.table.copy(A, handle, 0.0),
            "move": lambda handle: kit.table.move(A, handle, B, 0.0),
            "delegate": lambda handle: kit.table.delegate(A, handle, B, 0.0),
        }
        with pytest.raises(DeniedError, match=f"lacks the right {missing}"):
            act[missing](cap.handle)
        for other in sorted({"copy", "delegate", "move"} - {missing}):
            act[other](cap.handle)


def test_moving_takes_the_handle_away_and_keeps_descendants(kit: Fixture) -> None:
    cap = kit.mint()
    child = kit.table.attenuate(A, cap.handle, {"send"}, 0.0)
    moved = kit.table.move(A, cap.handle, B, 0.0)
    assert (moved.id, moved.owner, moved.badge) == (cap.id, B, f"badge-of-{B}")
    with pytest.raises(HandleError):
        kit.table.check(A, cap.handle, "send", 0.0)
    assert kit.table.check(B, moved.handle, "send", 0.0) == moved
    assert [gone.id for gone in kit.table.revoke(B, moved.handle)] == [child.id, cap.id]


def test_delegating_to_nobody_or_to_oneself_is_refused(kit: Fixture) -> None:
    cap = kit.mint()
    with pytest.raises(NotFoundError):
        kit.table.delegate(A, cap.handle, "app:9.9", 0.0)
    with pytest.raises(DeniedError, match="already holds"):
        kit.table.delegate(A, cap.handle, A, 0.0)
    assert [record.outcome for record in kit.log[-2:]] == ["denied", "denied"]


def test_revoking_takes_all_descendants_wherever_they_are_before_itself(kit: Fixture) -> None:
    root = kit.mint()
    given = kit.table.delegate(A, root.handle, B, 0.0)
    further = kit.table.delegate(B, given.handle, C, 0.0, {"send"})
    other = kit.mint(B)
    before = len(kit.log)
    assert [cap.id for cap in kit.table.revoke(A, root.handle)] == [further.id, given.id, root.id]
    assert [view.id for view in kit.table.views()] == [other.id]
    assert [(record.action, record.cap) for record in kit.log[before:]] == [
        ("revoke", further.id),
        ("revoke", given.id),
        ("revoke", root.id),
    ]
    assert f"derived from {root.id}" in kit.log[before].reason


def test_revoking_only_what_was_derived_keeps_the_capability(kit: Fixture) -> None:
    root = kit.mint()
    child = kit.table.delegate(A, root.handle, B, 0.0)
    assert kit.table.children(root.id) == [child.id]
    assert [cap.id for cap in kit.table.revoke(A, root.handle, itself=False)] == [child.id]
    assert kit.table.check(A, root.handle, "send", 0.0) == root
    assert kit.table.children(root.id) == []


def test_an_object_made_through_a_capability_goes_with_it(kit: Fixture) -> None:
    service = kit.mint(rights={"connect", "send"}, lifetime=9.0)
    channel = kit.table.mint(A, "channel:1", {"send"}, rule="open", now=0.0, parent=service.id)
    assert (channel.parent, channel.expires, channel.rule) == (service.id, 9.0, "open")
    with pytest.raises(DeniedError, match="cannot pass on recv"):
        kit.table.mint(A, "channel:2", {"recv"}, rule="open", now=0.0, parent=service.id)
    assert [cap.object for cap in kit.table.revoke_id(service.id, "operator:0")] == [
        "channel:1",
        "service:echo",
    ]
    with pytest.raises(NotFoundError):
        kit.table.revoke_id(service.id, "operator:0")


def test_expiry_denies_at_once_and_is_cleared_away_by_time(kit: Fixture) -> None:
    lasting = kit.mint()
    cap = kit.mint(lifetime=10.0)
    child = kit.table.delegate(A, cap.handle, B, 1.0)
    assert kit.table.next_expiry() == 10.0
    assert kit.table.handle_time(9.9) == []
    with pytest.raises(HandleError, match="expired"):
        kit.table.check(A, cap.handle, "send", 10.0)
    assert {gone.id for gone in kit.table.handle_time(10.0)} == {cap.id, child.id}
    assert kit.log[-1].reason.startswith("expired")
    assert kit.table.next_expiry() is None
    assert [view.id for view in kit.table.views()] == [lasting.id]


def test_dropping_an_owner_revokes_what_it_held_and_gave(kit: Fixture) -> None:
    root = kit.mint()
    kit.table.copy(A, root.handle, 0.0)
    given = kit.table.delegate(A, root.handle, B, 0.0)
    own = kit.mint(B)
    assert len(kit.table.drop_owner(A)) == 3
    assert A not in kit.table.owners
    with pytest.raises(HandleError):
        kit.table.check(B, given.handle, "send", 0.0)
    assert kit.table.check(B, own.handle, "send", 0.0) == own
    with pytest.raises(NotFoundError):
        kit.mint(A)


def test_derivation_ends_at_a_bounded_depth() -> None:
    kit = Fixture(quota=2 * MAX_DEPTH)
    cap = kit.mint()
    for _ in range(MAX_DEPTH):
        cap = kit.table.copy(A, cap.handle, 0.0)
    with pytest.raises(DeniedError, match=f"already derived {MAX_DEPTH} times"):
        kit.table.copy(A, cap.handle, 0.0)


def test_a_full_quota_hurts_only_its_owner_and_no_gift_fills_it() -> None:
    kit = Fixture(quota=3)
    caps = [kit.mint(A) for _ in range(3)]
    with pytest.raises(QuotaError):
        kit.mint(A)
    for _ in range(3):
        kit.table.delegate(A, caps[0].handle, B, 0.0)
    with pytest.raises(QuotaError, match=B):
        kit.table.delegate(A, caps[0].handle, B, 0.0)
    with pytest.raises(QuotaError, match=B):
        kit.table.move(A, caps[1].handle, B, 0.0)
    assert kit.table.check(A, caps[1].handle, "send", 0.0) == caps[1]
    for _ in range(3):
        kit.mint(B)
    kit.table.revoke(A, caps[2].handle)
    assert kit.mint(A).owner == A


def test_rights_that_an_object_does_not_know_are_refused(kit: Fixture) -> None:
    for wrong in ({"fly"}, set(), {"operate"}):
        with pytest.raises(UsageError):
            kit.mint(rights=wrong)
    with pytest.raises(UsageError, match="no kind of object"):
        kit.table.mint(A, "socket:1", {"send"}, rule="", now=0.0)
    cap = kit.mint()
    with pytest.raises(UsageError, match="no right"):
        kit.table.delegate(A, cap.handle, B, 0.0, {"x" * 10_000})
    assert len(kit.table) == 1


def test_an_owner_has_one_table(kit: Fixture) -> None:
    with pytest.raises(UsageError):
        kit.table.add_owner(A, "again")


def test_revoking_what_would_have_expired_later_leaves_nothing_behind(kit: Fixture) -> None:
    for _ in range(2000):
        kit.table.revoke(A, kit.mint(lifetime=1e6).handle)
    assert len(kit.table._expiries) + len(kit.table._children) + len(kit.table) < 100
    assert kit.table.next_expiry() is None
    assert len(kit.table._principals[A]._slots) == 1


@dataclass
class Held:
    """What the model knows of a live capability."""

    owner: str
    handle: int
    rights: frozenset[str]
    parent: int | None
    expires: float
    given: bool


QUOTA = 4
NEVER = float("inf")
owners = st.sampled_from([A, B, C])
rights = st.sets(st.sampled_from(["connect", "send", "copy", "move", "delegate"]), min_size=1).map(frozenset)
lifetimes = st.none() | st.integers(1, 9).map(float)


class AgainstModel(RuleBasedStateMachine):
    """Every act is predicted from the model: allowed with exactly these effects, or refused without any."""

    @initialize()
    def start(self) -> None:
        kit = Fixture(QUOTA)
        self.table, self.log = kit.table, kit.log
        self.now = 0.0
        self.live: dict[int, Held] = {}
        self.issued: list[tuple[str, int]] = []

    # -- the model ------------------------------------------------------------------------------------------

    def below(self, root: int) -> set[int]:
        found = {root}
        while more := {i for i, held in self.live.items() if held.parent in found} - found:
            found |= more
        return found

    def depth(self, cap: int) -> int:
        parent = self.live[cap].parent
        return 0 if parent is None else 1 + self.depth(parent)

    def holder(self, owner: str, handle: int) -> int | None:
        return next(
            (i for i, held in self.live.items() if (held.owner, held.handle) == (owner, handle)), None
        )

    def usable(self, owner: str, handle: int, *needed: str) -> int | None:
        cap = self.holder(owner, handle)
        if cap is None or self.live[cap].expires <= self.now or not self.live[cap].rights.issuperset(needed):
            return None
        return cap

    def room(self, owner: str, given: bool) -> bool:
        return sum(h.owner == owner and h.given == given for h in self.live.values()) < QUOTA

    def adopt(self, cap: Capability) -> None:
        expires = NEVER if cap.expires is None else cap.expires
        self.live[cap.id] = Held(cap.owner, cap.handle, cap.rights, cap.parent, expires, cap.given)
        self.issued.append((cap.owner, cap.handle))

    def removed(self, gone: list[Capability], expected: set[int]) -> None:
        assert {cap.id for cap in gone} == expected
        assert len(gone) == len(expected)
        for earlier, later in itertools.combinations(gone, 2):
            assert later.parent != earlier.id
        for cap_id in expected:
            del self.live[cap_id]

    def refused(self, act: Any, *arguments: Any) -> None:
        before = len(self.log)
        with pytest.raises(SnapError):
            act(*arguments)
        assert [record.outcome for record in self.log[before:]] == ["denied"]

    def pick(self, data: st.DataObject) -> tuple[str, int]:
        """Someone with a handle: often their own, else one of another or a past one, or any number."""
        own = [(held.owner, held.handle) for held in self.live.values()]
        kinds = [st.tuples(owners, st.integers(-2, 1 << 20))]
        if self.issued:
            kinds.append(st.tuples(owners, st.sampled_from([handle for _, handle in self.issued])))
        if own:
            kinds += [st.sampled_from(own)] * 3
        return data.draw(st.one_of(kinds))

    # -- acts -----------------------------------------------------------------------------------------------

    @rule(owner=owners, wanted=rights, lifetime=lifetimes)
    def mint(self, owner: str, wanted: frozenset[str], lifetime: float | None) -> None:
        arguments = {"rule": "r", "now": self.now, "lifetime": lifetime}
        if self.room(owner, False):
            cap = self.table.mint(owner, "service:s", wanted, **arguments)
            assert (cap.owner, cap.rights) == (owner, wanted)
            self.adopt(cap)
        else:
            self.refused(lambda: self.table.mint(owner, "service:s", wanted, **arguments))

    @rule(data=st.data(), wanted=rights, lifetime=lifetimes)
    def attenuate(self, data: st.DataObject, wanted: frozenset[str], lifetime: float | None) -> None:
        owner, handle = self.pick(data)
        cap = self.usable(owner, handle)
        held = self.live.get(cap) if cap is not None else None
        if (
            held is not None
            and wanted <= held.rights
            and (lifetime is None or self.now + lifetime <= held.expires)
            and (wanted != held.rights or lifetime is not None or "copy" in wanted)
            and self.room(owner, False)
            and self.depth(cap) < MAX_DEPTH
        ):
            derived = self.table.attenuate(owner, handle, wanted, self.now, lifetime)
            assert (derived.owner, derived.parent, derived.rights) == (owner, cap, wanted)
            self.adopt(derived)
        else:
            self.refused(self.table.attenuate, owner, handle, wanted, self.now, lifetime)

    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        owner, handle = self.pick(data)
        cap = self.usable(owner, handle, "copy")
        if cap is not None and self.room(owner, False) and self.depth(cap) < MAX_DEPTH:
            derived = self.table.copy(owner, handle, self.now)
            assert (derived.owner, derived.parent, derived.rights) == (owner, cap, self.live[cap].rights)
            self.adopt(derived)
        else:
            self.refused(self.table.copy, owner, handle, self.now)

    @rule(data=st.data(), to=owners, wanted=st.none() | rights)
    def delegate(self, data: st.DataObject, to: str, wanted: frozenset[str] | None) -> None:
        owner, handle = self.pick(data)
        cap = self.usable(owner, handle, "delegate", *(wanted or ()))
        if cap is not None and to != owner and self.room(to, True) and self.depth(cap) < MAX_DEPTH:
            derived = self.table.delegate(owner, handle, to, self.now, wanted)
            assert (derived.owner, derived.parent) == (to, cap)
            assert derived.rights == (wanted or self.live[cap].rights)
            self.adopt(derived)
        else:
            self.refused(self.table.delegate, owner, handle, to, self.now, wanted)

    @rule(data=st.data(), to=owners)
    def move(self, data: st.DataObject, to: str) -> None:
        owner, handle = self.pick(data)
        cap = self.usable(owner, handle, "move")
        if cap is not None and to != owner and self.room(to, True):
            moved = self.table.move(owner, handle, to, self.now)
            assert (moved.id, moved.owner, moved.rights) == (cap, to, self.live[cap].rights)
            assert moved.parent == self.live[cap].parent
            self.adopt(moved)
        else:
            self.refused(self.table.move, owner, handle, to, self.now)

    @rule(data=st.data(), itself=st.booleans())
    def revoke(self, data: st.DataObject, itself: bool) -> None:
        owner, handle = self.pick(data)
        cap = self.holder(owner, handle)
        if cap is None:
            self.refused(lambda: self.table.revoke(owner, handle, itself=itself))
        else:
            gone = self.table.revoke(owner, handle, itself=itself)
            self.removed(gone, self.below(cap) if itself else self.below(cap) - {cap})

    @rule(seconds=st.integers(0, 5))
    def let_time_pass(self, seconds: int) -> None:
        self.now += seconds

    @precondition(lambda self: self.live)
    @rule()
    def clear_expired(self) -> None:
        expired = {i for i, held in self.live.items() if held.expires <= self.now}
        self.removed(self.table.handle_time(self.now), expired)
        next_one = min((held.expires for held in self.live.values()), default=NEVER)
        assert self.table.next_expiry() == (None if next_one == NEVER else next_one)

    @rule(owner=owners)
    def leave_and_return(self, owner: str) -> None:
        held = [i for i, held in self.live.items() if held.owner == owner]
        self.removed(self.table.drop_owner(owner), set().union(*map(self.below, held)))
        self.table.add_owner(owner, f"badge-of-{owner}", 1, QUOTA)

    # -- what always holds ----------------------------------------------------------------------------------

    @invariant()
    def the_table_holds_exactly_what_the_model_holds(self) -> None:
        shown = {view.id: view for view in self.table.views()}
        assert shown.keys() == self.live.keys()
        for cap_id, held in self.live.items():
            view = shown[cap_id]
            assert (view.owner, view.handle, view.parent) == (held.owner, held.handle, held.parent)
            assert view.badge == f"badge-of-{held.owner}"
            assert set(view.rights) == held.rights

    @invariant()
    def nothing_has_more_than_what_it_came_from(self) -> None:
        for held in self.live.values():
            if held.parent is not None:
                assert held.parent in self.live
                assert held.rights <= self.live[held.parent].rights
                assert held.expires <= self.live[held.parent].expires

    @invariant()
    def a_handle_works_for_its_holder_alone_with_its_rights_alone(self) -> None:
        for (_, handle), owner, right in itertools.product(self.issued, (A, B, C), ("send", "connect")):
            if self.usable(owner, handle, right) is None:
                self.refused(self.table.check, owner, handle, right, self.now)
            else:
                assert right in self.table.check(owner, handle, right, self.now).rights


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
