"""The SDK for module authors (`Module`, `Engine`, `Schema`, ...) and one package per shipped module."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine
    from .migration import migrate
    from .module import Module
    from .schema import Array, Schema, Slab, Table
    from .serving import ServerChannel

__all__ = ["Array", "Engine", "Module", "Schema", "ServerChannel", "Slab", "Table", "migrate"]

_HOMES = {
    "Array": ".schema",
    "Engine": ".engine",
    "Module": ".module",
    "Schema": ".schema",
    "ServerChannel": ".serving",
    "Slab": ".schema",
    "Table": ".schema",
    "migrate": ".migration",
}


def __getattr__(name: str) -> Any:
    # On demand: the command line reads the templates in here and must not pay for the native half.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
