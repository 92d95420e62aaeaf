"""Imports the package that a module is, from the directory of its manifest."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from snap.dataplane.errors import ManifestError

_SHIPPED = Path(__file__).parent

T = TypeVar("T")


def load_package(path: Path, name: str) -> ModuleType:
    """Import the directory `path` as the package of module `name`.

    A shipped module keeps its dotted name. Any other is imported under its own name (`-` becomes `_`), without its
    neighbours in the directory becoming importable. Raises ManifestError when that name is taken by a package that
    Python already uses, and whatever the code raises.
    """
    path = path.resolve()
    if path.parent == _SHIPPED.resolve():
        return importlib.import_module(f"{__package__}.{path.name}")
    package = name.replace("-", "_")
    loaded = sys.modules.get(package)
    if loaded is not None and str(path) in getattr(loaded, "__path__", ()):
        return loaded
    if loaded is not None or package in sys.stdlib_module_names:
        raise ManifestError(
            f"module {name!r} cannot be imported: Python already has a package {package!r}",
            "rename the module",
        )
    return _execute(_spec(package, path))


def load_class(package: ModuleType, target: str, base: type[T]) -> type[T]:
    """The class that FILE:CLASS names in `package`. Raises ManifestError unless it is a subclass of `base`."""
    file, _, name = target.partition(":")
    found = getattr(importlib.import_module(f"{package.__name__}.{file}"), name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ManifestError(
            f"{target!r} is not a subclass of {base.__name__}", f"define class {name}({base.__name__})"
        )
    return found


def _spec(package: str, path: Path) -> ModuleSpec:
    init = path / "__init__.py"
    if init.exists():
        spec = importlib.util.spec_from_file_location(package, init, submodule_search_locations=[str(path)])
        assert spec is not None
        return spec
    spec = ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(path)]
    return spec


def _execute(spec: ModuleSpec) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if spec.loader is not None:
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[spec.name]
            raise
    return module
