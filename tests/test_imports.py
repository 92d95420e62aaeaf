"""The rooms: who may import whom, and what the kernel may not know. Read from the source, so that no path is missed."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "dataplane": set(),
    "ipc": {"dataplane"},
    "kernel": {"ipc", "dataplane"},
    "modules": {"ipc", "dataplane"},
    "cli": {"ipc"},
}
# What operates one shipped module is a program that uses what this module has for applications.
PONY = "snap.modules.pony"
OF_A_MODULE = {"cli/commands/pony.py": PONY, "cli/pony": PONY, "cli/bench": PONY, "cli/demo": PONY}
HEAVY = ["zmq", "numpy", "posix_ipc", "msgspec", "asyncio", "click", "rich", "structlog"]


def violations(room: str, path: Path, source: str) -> list[str]:
    """Imports in `source` (the file `path`, relative to the rooms' parent) that `room` may not make."""
    allowed = ALLOWED[room] | {room}
    module = next((name for place, name in OF_A_MODULE.items() if path.is_relative_to(place)), None)
    return [
        f"{path}:{line}: imports {target}"
        for line, target in imports(path, ast.parse(source))
        if target.split(".")[0] == "snap"
        and [*target.split("."), ""][1] not in allowed
        and (module is None or not f"{target}.".startswith(f"{module}."))
    ]


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every module that is imported anywhere in a file, relative imports resolved, and by `import_module` of a text."""
    package = ["snap", *path.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{name.name}") for name in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def shipped_modules() -> set[str]:
    return {
        tomllib.loads(path.read_text())["module"]["name"] for path in (ROOT / "modules").glob("*/module.toml")
    }


def names_in(source: str, names: set[str]) -> list[str]:
    """String literals of `source`, docstrings aside, that are, or begin a dotted path with, one of `names`."""
    tree = ast.parse(source)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in prose
        and names.intersection(node.value.replace(":", ".").replace("/", ".").split("."))
    ]


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


# -- the rooms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    found = [
        violation
        for path in python_files(room)
        for violation in violations(room, path.relative_to(ROOT), path.read_text())
    ]
    assert python_files(room)
    assert not found


def test_the_kernel_names_no_module() -> None:
    modules = shipped_modules()
    assert "echo" in modules
    assert {
        path.name: found for path in python_files("kernel") if (found := names_in(path.read_text(), modules))
    } == {}


def test_examples_and_the_shipped_modules_import_only_what_others_can() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        rooms = {
            target.split(".")[1]
            for _, target in imports(Path("x.py"), ast.parse(path.read_text()))
            if "snap." in target
        }
        assert rooms <= {"ipc", "modules"}, path


def test_what_an_application_imports_loads_neither_zeromq_nor_numpy_nor_the_control_plane() -> None:
    assert (
        loaded_by("from snap.ipc import connect") & {"zmq", "numpy", "snap.ipc.control", "snap.kernel"}
        == set()
    )


def test_the_errors_load_nothing_heavy_at_all() -> None:
    assert loaded_by("from snap.ipc import SnapError, paths") & {*HEAVY, "snap.dataplane._native"} == set()


def test_every_public_name_of_ipc_is_there() -> None:
    import snap.ipc

    assert {name for name in snap.ipc.__all__ if not hasattr(snap.ipc, name)} == set()
    assert set(snap.ipc.__all__) <= set(dir(snap.ipc))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = snap.ipc.nothing_of_the_kind


def loaded_by(statement: str) -> set[str]:
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


# -- the checker itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "file", "source"),
    [
        ("kernel", "kernel/x.py", "import snap.modules.echo"),
        ("kernel", "kernel/x.py", "from snap import modules"),
        ("kernel", "kernel/x.py", "from ..modules import manifest"),
        ("kernel", "kernel/deep/x.py", "from ... import cli"),
        ("modules", "modules/echo/engine.py", "from snap.kernel.policy import Policy"),
        (
            "modules",
            "modules/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from snap.kernel import link",
        ),
        ("ipc", "ipc/x.py", "def f():\n    from snap.kernel import link"),
        ("ipc", "ipc/x.py", "import importlib\nimportlib.import_module('snap.cli.main')"),
        ("dataplane", "dataplane/x.py", "from snap.ipc import protocol"),
        ("cli", "cli/commands/x.py", "from ...kernel import daemon"),
        ("cli", "cli/commands/x.py", "from snap.modules.pony import Pony"),
        ("cli", "cli/commands/pony.py", "from snap.modules.echo import engine"),
        ("kernel", "kernel/x.py", "import snap"),
    ],
)
def test_a_planted_violation_is_found(room: str, file: str, source: str) -> None:
    assert violations(room, Path(file), source)


@pytest.mark.parametrize(
    ("room", "file", "source"),
    [
        (
            "kernel",
            "kernel/x.py",
            "from . import link\nfrom .policy import Policy\nfrom snap.ipc import protocol",
        ),
        ("modules", "modules/echo/engine.py", "from snap.modules import Engine\nfrom ..engine import Engine"),
        ("cli", "cli/commands/pony.py", "from snap.modules.pony import Pony"),
        ("cli", "cli/commands/x.py", "from .._base import say\nfrom ..demo import plan\nimport snapshot"),
    ],
)
def test_what_is_allowed_is_not_called_a_violation(room: str, file: str, source: str) -> None:
    assert not violations(room, Path(file), source)


def test_a_planted_name_of_a_module_is_found_but_not_in_prose() -> None:
    assert names_in("if module == 'echo': pass", {"echo"}) == ["echo"]
    assert names_in("path = 'snap.modules.echo'", {"echo"}) == ["snap.modules.echo"]
    assert names_in("who = 'module:echo'", {"echo"}) == ["module:echo"]
    assert names_in("def f():\n    'echo'\n    return 'echoes'", {"echo"}) == []
