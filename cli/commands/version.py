"""`snapctl version`: what is installed, and what runs."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

from ._base import Settings, call

if TYPE_CHECKING:
    from collections.abc import Mapping

DISTRIBUTION = "snap-kernel"
PATIENCE = 1.0


@click.command()
@click.pass_obj
def version(settings: Settings) -> None:
    """Print the versions of snapctl and, when one answers, of the kernel."""
    from snap.ipc.protocol import PROTOCOL_VERSION

    from ..output import field, print_json

    found: Mapping[str, Any] = {
        "snapctl": installed(),
        "kernel": _running(settings),
        "protocol": PROTOCOL_VERSION,
        "python": platform.python_version(),
    }
    if settings.output == "json":
        print_json("Version", dict(found))
    elif settings.output == "name":
        click.echo(found["snapctl"])
    else:
        for name, value in found.items():
            field(name, "not running" if value is None else value)


def installed() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "from a source tree"


def _running(settings: Settings) -> str | None:
    from snap.ipc import SnapError
    from snap.ipc.protocol import KernelView

    try:
        return call(settings, "kernel.status", KernelView, default_timeout=PATIENCE).version
    except SnapError:
        return None
