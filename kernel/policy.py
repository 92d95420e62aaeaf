"""The policy file: who may connect to what, who operates the kernel, how much each may use. What it does not allow is
denied. A policy is immutable: a changed file is a new `Policy`."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol, TypeVar

import msgspec

from snap.dataplane.errors import PolicyError, UsageError
from snap.ipc import tomlfile
from snap.ipc.tomlfile import Size, Table

DEFAULT: Final = Path(__file__).with_name("default_policy.toml")
_HINT: Final = f"{DEFAULT} is a complete example"

Who = Annotated[
    str, msgspec.Meta(pattern=r"^(owner|any|[ug]id:[0-9]{1,10}|module:[a-z0-9_*?\[\]!-]{1,64})\Z")
]
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
ServiceRight = Literal["connect", "send", "recv", "copy", "move", "delegate", "inspect"]
OperatorRight = Literal["operate", "inspect"]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Allow(Table, frozen=True):
    """`expires`: seconds for which a capability given by this rule lasts; None: until it is revoked."""

    who: Who
    service: Pattern
    rights: Annotated[list[ServiceRight], msgspec.Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["connect", "send", "recv"]
    )
    expires: Seconds | None = None


class Operator(Table, frozen=True):
    who: Who
    rights: Annotated[list[OperatorRight], msgspec.Meta(min_length=1)]


class Quota(Table, frozen=True):
    """What each principal may use: open channels, bytes of segments, requests a second."""

    channels: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    bytes: Size = "256MiB"
    requests_per_second: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 2000

    @property
    def segment_bytes(self) -> int:
        return tomlfile.size_bytes(self.bytes)


class ModuleSettings(Table, frozen=True):
    autostart: bool = False


class Segments(Table, frozen=True):
    backend: Literal["memfd", "posix"] = "memfd"


class Rules(Table, frozen=True):
    """The file itself. `modules` is keyed by a module's name or a pattern; the exact name wins, then the first one."""

    version: Literal[1]
    segments: Segments = Segments()
    allow: list[Allow] = msgspec.field(default_factory=list)
    operator: list[Operator] = msgspec.field(default_factory=list)
    quota: Quota = Quota()
    modules: dict[Pattern, ModuleSettings] = msgspec.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks, as the operating system says it. A module (`module` is its name) is not judged by its uid."""

    uid: int
    gid: int
    pid: int
    module: str | None = None

    def __str__(self) -> str:
        return f"module:{self.module}" if self.module is not None else f"uid:{self.uid}"


@dataclass(frozen=True, slots=True)
class Decision:
    """`rule` names the rule that allows, and is empty where none does; `expires` is in seconds from the grant."""

    allowed: bool
    rights: frozenset[str]
    rule: str
    expires: float | None
    reason: str


class _Rule(Protocol):
    @property
    def who(self) -> str: ...


R = TypeVar("R", bound=_Rule)


@dataclass(frozen=True, slots=True)
class Policy:
    """`source` is the file's name, for messages and rule texts."""

    source: str
    rules: Rules

    @property
    def quota(self) -> Quota:
        return self.rules.quota

    @property
    def backend(self) -> str:
        """The back end of segments: memfd or posix."""
        return self.rules.segments.backend

    def module(self, name: str) -> ModuleSettings:
        """The settings of module `name`, defaults where the file has none."""
        exact = self.rules.modules.get(name)
        if exact is not None:
            return exact
        matching = (
            settings for pattern, settings in self.rules.modules.items() if fnmatchcase(name, pattern)
        )
        return next(matching, ModuleSettings())

    def decide(self, who: Identity, service: str, kernel_uid: int) -> Decision:
        """What `who` gets on `service`: what the first rule that matches both says."""
        for number, rule in _matching(self.rules.allow, who, kernel_uid):
            if fnmatchcase(service, rule.service):
                return self._granted("allow", number, rule.rights, rule.expires, f"{who} may use {service}")
        return _refused(f"no [[allow]] of {self.source} lets {who} use {service}")

    def decide_operator(self, who: Identity, kernel_uid: int) -> Decision:
        """What `who` may do to the kernel itself."""
        for number, rule in _matching(self.rules.operator, who, kernel_uid):
            return self._granted("operator", number, rule.rights, None, f"{who} is an operator")
        return _refused(f"no [[operator]] of {self.source} matches {who}")

    def why(self, who: Identity, service: str, kernel_uid: int, right: str | None = None) -> Decision:
        """As `decide`; with `right`, whether that one is among what is given."""
        decision = self.decide(who, service, kernel_uid)
        if right is None or not decision.allowed or right in decision.rights:
            return decision
        given = ", ".join(sorted(decision.rights))
        reason = f"{decision.rule} decides for {who} on {service}, and gives {given} but not {right}"
        return Decision(False, decision.rights, decision.rule, decision.expires, reason)

    def _granted(
        self, table: str, number: int, rights: Sequence[str], expires: float | None, reason: str
    ) -> Decision:
        rule = f"{self.source} [[{table}]] #{number}"
        return Decision(True, frozenset(rights), rule, expires, f"{reason} by {rule}")


def load(path: str | os.PathLike[str] | None = None) -> Policy:
    """The policy in the file at `path`, or the shipped one. Raises PolicyError naming file, key and reason."""
    file = DEFAULT if path is None else Path(path)
    tables = tomlfile.read(file, PolicyError)
    if path is not None and file.stat().st_mode & stat.S_IWOTH:
        raise PolicyError(f"{file}: everybody may write to it", f"chmod o-w {file}")
    return parse(tables, str(file), file.name)


def parse(data: dict[str, object], source: str, name: str | None = None) -> Policy:
    """The policy of parsed TOML. Raises PolicyError naming `source`, key and reason; `name` is for rule texts."""
    return Policy(name or source, tomlfile.convert(data, Rules, source, PolicyError, _HINT))


def identity(text: str) -> Identity:
    """Who `text` is: `module:NAME`, or `uid:N`, `gid:N` and `pid:N` joined by `/` as in a badge. Raises UsageError."""
    if text.startswith("module:") and text != "module:":
        return Identity(-1, -1, 0, text.removeprefix("module:"))
    parts = dict(part.partition(":")[::2] for part in text.split("/"))
    if not parts.keys() <= {"uid", "gid", "pid"} or not all(
        number.isascii() and number.isdigit() for number in parts.values()
    ):
        raise UsageError(f"{text!r} names nobody", 'write "module:NAME", "uid:1000" or "uid:1000/gid:1000"')
    return Identity(int(parts.get("uid", -1)), int(parts.get("gid", -1)), int(parts.get("pid", 0)))


def _refused(reason: str) -> Decision:
    return Decision(False, frozenset(), "", None, f"{reason}: denied by default")


def _matching(rules: Sequence[R], who: Identity, kernel_uid: int) -> list[tuple[int, R]]:
    """The rules for `who`, with their number in the file from 1."""
    return [(number, rule) for number, rule in enumerate(rules, 1) if _is(rule.who, who, kernel_uid)]


def _is(pattern: str, who: Identity, kernel_uid: int) -> bool:
    kind, _, value = pattern.partition(":")
    if kind == "any":
        return True
    if kind == "module":
        return who.module is not None and fnmatchcase(who.module, value)
    if who.module is not None:
        # A module often runs under the kernel's uid; its rights are its own all the same.
        return False
    if kind == "owner":
        return who.uid == kernel_uid
    return int(value) == (who.uid if kind == "uid" else who.gid)
