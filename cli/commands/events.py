"""`snapctl events`: what happened, and what happens."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import click

from ._base import Settings, call, control

if TYPE_CHECKING:
    from snap.ipc.protocol import EventView

PAGE = 256


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option("--since", type=click.IntRange(min=0), default=0, metavar="SEQ", help="Only after this number.")
@click.option("--kind", metavar="PATTERN", help="Only kinds like this, for instance 'module.*'.")
@click.pass_obj
def events(settings: Settings, follow: bool, since: int, kind: str | None) -> None:
    """Print the events that the kernel remembers; with --follow, those to come as well.

    With -o json one object per line when following, else one list.
    """

    from ..output import as_data, print_json

    wanted = kind or "*"
    if not follow:
        found = _past(settings, since, wanted)
        if settings.output == "json":
            print_json("EventList", {"items": [as_data(event) for event in found]})
            return
        for event in found:
            _print(settings.output, event)
        return
    with control(settings) as client:
        for event in client.events([wanted], since):
            _print(settings.output, event)


def _past(settings: Settings, since: int, wanted: str) -> list[EventView]:
    """Everything remembered after `since`, page by page."""
    from snap.ipc.protocol import EventView

    found: list[EventView] = []
    while page := call(settings, "events.since", list[EventView], seq=since, limit=PAGE):
        found += (event for event in page if fnmatchcase(event.kind, wanted))
        since = page[-1].seq
    return found


def _print(output: str, event: EventView) -> None:
    from ..output import as_data, plain, print_json, rfc3339

    if output == "json":
        print_json("Event", as_data(event), one_line=True)
    elif output == "name":
        click.echo(event.seq)
    else:
        data = " ".join(f"{key}={value}" for key, value in event.data.items())
        click.echo(
            plain(f"{event.seq:>6}  {rfc3339(event.time)}  {event.kind:<20} {event.subject}  {data}".rstrip())
        )
