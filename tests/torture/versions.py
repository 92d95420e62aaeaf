"""The module under torture, in versions that work and in versions that fail, each at another phase."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MODULE: Final = "tally"
_SOURCE: Final = Path(__file__).parent / MODULE
_MANIFEST: Final = """\
[module]
name = "tally"
version = "{version}"
state_version = {state_version}
standby = {standby}
{about}
[provides.tally]
engine = "main"
[engines.main]
class = "engine:Tally"
wait = "{wait}"
budget = {budget}
state = "16MiB"
{more}
"""
_ONE: Final = """\
from .base import Base, schema

class Tally(Base):
    schema = schema()
    number = {number}
"""
_TWO: Final = """\
from snap.modules import migrate
from snap.modules.schema import Table
from .base import Base, schema

class Tally(Base):
    schema = schema(
        version=2,
        row={"count": "u8", "sum": "u4", "twice": "u4"},
        marks=Table("u4", {"mark": "u1"}, 16),
    )
    number = 20

    @migrate("rows", 1, 2)
    def double(self, old, new):
        new["twice"] = old["sum"] * 2

    def read(self, row):
        count, total = super().read(row)
        if int(row["twice"]) != total * 2 & 0xFFFFFFFF:
            raise ValueError(f"a row was not migrated: {row}")
        return count, total

    def write(self, count, total):
        return count, total, total * 2 & 0xFFFFFFFF
"""


@dataclass(frozen=True)
class Version:
    """`code` is engine.py. `outcomes`: how an upgrade to it ends when nothing else happens, `refused` being an error of
    the request; `reason`: a pattern of what it must say. `loses_state`: its clients may be told so."""

    name: str
    code: str
    number: int = 10
    state_version: int = 1
    outcomes: tuple[str, ...] = ("aborted",)
    reason: str = ""
    about: str = ""
    more: str = ""
    wait: str = "adaptive"
    budget: int = 64
    loses_state: bool = False
    slow: bool = False
    """It fails only after seconds of patience."""


def _one(body: str, number: int = 90, before: str = "") -> str:
    return before + _ONE.format(number=number) + textwrap.indent(textwrap.dedent(body), "    ")


_FAILS_TO_MIGRATE: Final = """\
from snap.modules import migrate
from .base import Base, schema
import time

class Tally(Base):
    schema = schema(version=3, row={{"count": "u8", "sum": "u8"}})
    number = 91

    @migrate("rows", 1, 3)
    def one(self, old, new):
        {body}

    @migrate("rows", 2, 3)
    def two(self, old, new):
        {body}
"""
_ENTRY: Final = 'entry = "main:Main"'
_DIES: Final = "import os, signal, time\n"

GOOD: Final = (
    Version("one", _ONE.format(number=10), 10, outcomes=("committed",)),
    Version("one_again", _ONE.format(number=11), 11, outcomes=("committed",), wait="blocking", budget=7),
    Version("two", _TWO, 20, 2, outcomes=("committed",)),
)
BAD: Final = (
    Version("does_not_import", _one("raise ImportError('no such thing')"), reason="no such thing"),
    Version("hangs_in_import", _one("time.sleep(3600)", before=_DIES), reason="progress", slow=True),
    Version("hangs_in_on_start", _one(""), about=_ENTRY, reason="progress", slow=True),
    Version("is_no_python", "def poll(:\n", reason="(?i)syntax|import"),
    Version(
        "asks_for_more",
        _one(""),
        more='[requires]\nservices = ["vault"]',
        outcomes=("refused",),
        reason="vault",
    ),
    Version(
        "newer_schema",
        "from snap.modules.schema import Schema, Table\nfrom .base import Base\n\n"
        "class Tally(Base):\n    schema = Schema(version=9, oldest=9, rows=Table('u4', 'u8', 16))\n",
        state_version=9,
        reason="(?i)version|schema",
    ),
    Version(
        "unknown_schema",
        _ONE.format(number=93).replace("schema()", 'schema(row={"count": "u8", "sum": "u8"})'),
        reason="(?i)version|schema",
    ),
    Version(
        "lies_about_its_version", _one(""), state_version=2, outcomes=("aborted", "refused"), reason="version"
    ),
    Version("raises_in_on_start", _one(""), about=_ENTRY, reason="cannot start"),
    Version(
        "is_never_healthy", _one(""), about=_ENTRY, outcomes=("aborted", "rolled_back"), reason="feeling ill"
    ),
    Version(
        "raises_in_migration",
        _FAILS_TO_MIGRATE.format(body='raise ZeroDivisionError("nobody can convert this")'),
        state_version=3,
        reason="nobody can convert this",
    ),
    Version(
        "hangs_in_migration", _FAILS_TO_MIGRATE.format(body="time.sleep(3600)"), state_version=3, slow=True
    ),
    Version(
        "cannot_restore",
        _one("def restore(self, version, state):\n    raise ValueError('what is this')"),
        outcomes=("rolled_back", "aborted"),
        reason="what is this",
    ),
    Version(
        "raises_in_first_poll",
        _one("def poll(self, budget):\n    super().poll(budget)\n    raise RuntimeError('not like this')"),
        outcomes=("rolled_back", "aborted"),
        reason="not like this",
    ),
    Version(
        "dies_in_first_poll",
        _one("def poll(self, budget):\n    super().poll(budget)\n    os.kill(os.getpid(), 9)", before=_DIES),
        outcomes=("rolled_back", "aborted"),
    ),
    Version(
        "dies_in_bake",
        _one(
            """
            since = None
            def wake_after(self):
                return 0.05
            def poll(self, budget):
                self.since = self.since or time.monotonic()
                done = super().poll(budget)
                if time.monotonic() > self.since + 0.1:
                    os.kill(os.getpid(), 9)
                return done
            """,
            before=_DIES,
        ),
        outcomes=("rolled_back", "aborted"),
    ),
    Version(
        "hangs_in_poll",
        _one("def poll(self, budget):\n    super().poll(budget)\n    time.sleep(3600)", before=_DIES),
        outcomes=("rolled_back", "aborted"),
        slow=True,
    ),
    Version(
        "corrupts_a_table",
        _one(
            """
            polls = 0
            def poll(self, budget):
                slots = self.state.rows.slots
                before = slots.copy()
                done = super().poll(budget)
                self.polls += 1
                # Not what this poll has touched: that would be undone.
                old = np.flatnonzero((slots["state"] == 1) & (slots == before))
                if self.polls >= 3 and len(old):
                    live = int(old[0])
                    # A wild store: past the undo log and the checksums.
                    ctypes.memset(slots.ctypes.data + live * slots.itemsize + 8, 0xA5, slots.itemsize - 8)
                    os.kill(os.getpid(), 9)
                return done
            """,
            before=_DIES + "import ctypes\nimport numpy as np\n",
        ),
        outcomes=("rolled_back", "aborted"),
        loses_state=True,
    ),
)
ALL: Final = {version.name: version for version in (*GOOD, *BAD)}

_MAINS: Final = {
    "hangs_in_on_start": "def on_start(self):\n    import time\n    time.sleep(3600)",
    "raises_in_on_start": "def on_start(self):\n    raise RuntimeError('cannot start')",
    "is_never_healthy": "def health(self):\n    return 'feeling ill'",
}
_VAULT: Final = """\
[module]
name = "vault"
version = "1"
[provides.vault]
engine = "main"
[engines.main]
class = "native:echo"
wait = "blocking"
"""


def write_all(directory: Path, standby: bool = False) -> dict[str, Path]:
    """Every version in a folder of its own below `directory`; paths by name."""
    return {name: write(version, directory / name, standby) for name, version in ALL.items()}


def write(version: Version, directory: Path, standby: bool = False) -> Path:
    """The package of `version`, as `directory`/tally."""
    package = directory / MODULE
    shutil.copytree(_SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "engine.py").write_text(version.code)
    if version.name in _MAINS:
        body = textwrap.indent(_MAINS[version.name], "    ")
        (package / "main.py").write_text(f"from snap.modules import Module\n\nclass Main(Module):\n{body}\n")
    manifest = _MANIFEST.format(
        version=version.name,
        state_version=version.state_version,
        standby=str(standby).lower(),
        about=version.about,
        more=version.more,
        wait=version.wait,
        budget=version.budget,
    )
    (package / "module.toml").write_text(manifest)
    return package


def write_vault(directory: Path) -> None:
    """A module that nobody may connect to, for the version that wants to."""
    package = directory / "vault"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "module.toml").write_text(_VAULT)
