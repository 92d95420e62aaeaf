"""The SDK for module authors (`Module`, `Engine`, `ServerChannel`) and one package per shipped module."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine, ServerChannel
    from .module import Module

__all__ = ["Engine", "Module", "ServerChannel"]

_HOMES = {"Engine": ".engine", "Module": ".module", "ServerChannel": ".engine"}


def __getattr__(name: str) -> Any:
    # On demand: the command line reads the templates in here and must not pay for the native half.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
