"""`snapctl channel`: the channels that the kernel brokered."""

from __future__ import annotations

import time

import click

from ._base import Group, Settings, call


@click.group(cls=Group)
def channel() -> None:
    """Channels: list."""


@channel.command("list")
@click.pass_obj
def list_(settings: Settings) -> None:
    """List every channel, who holds it, and how full it is."""
    from snap.ipc.protocol import ChannelView

    from ..output import age, show_list, size

    show_list(
        settings.output,
        "Channel",
        call(settings, "channel.list", list[ChannelView]),
        {
            "ID": lambda view: view.id,
            "SERVICE": lambda view: view.service,
            "MODULE": lambda view: view.module,
            "CLIENT": lambda view: view.client,
            "STATE": lambda view: view.state,
            "GEN": lambda view: view.generation,
            "CAP": lambda view: view.cap,
            "UP": lambda view: f"{view.depth_up}/{view.slots}",
            "DOWN": lambda view: f"{view.depth_down}/{view.slots}",
            "POOLS": lambda view: f"{size(view.up_bytes)} + {size(view.down_bytes)}",
            "AGE": lambda view: age(time.time() - view.since),
            "READ-ONLY": lambda view: view.read_only,
        },
        lambda view: view.id,
    )
