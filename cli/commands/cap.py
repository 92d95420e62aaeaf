"""`snapctl cap`: who may do what, why, and how to change it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from ._base import Group, Settings, call, complete_cap, complete_owner, complete_service, say

if TYPE_CHECKING:
    from snap.ipc.protocol import CapView

RIGHTS = ("connect", "send", "recv", "copy", "move", "delegate", "inspect")


@click.group(cls=Group)
def cap() -> None:
    """Capabilities: list, inspect, why, grant, revoke."""


@cap.command("list")
@click.option("--owner", help="Only those of this principal.", shell_complete=complete_owner)
@click.pass_obj
def list_(settings: Settings, owner: str | None) -> None:
    """List capabilities."""
    from snap.ipc.protocol import CapView

    from ..output import show_list

    arguments: dict[str, Any] = {} if owner is None else {"owner": owner}
    show_list(
        settings.output,
        "Capability",
        call(settings, "cap.list", list[CapView], **arguments),
        {
            "ID": lambda view: view.id,
            "OWNER": lambda view: view.owner,
            "HANDLE": lambda view: view.handle,
            "OBJECT": lambda view: view.object,
            "RIGHTS": lambda view: ",".join(view.rights),
            "PARENT": lambda view: "-" if view.parent is None else view.parent,
            "EXPIRES": _expiry,
            "RULE": lambda view: view.rule,
        },
        lambda view: view.id,
    )


def _expiry(view: CapView) -> str:
    from ..output import age

    return "never" if view.expires is None else f"in {age(view.expires - time.time())}"


@cap.command()
@click.argument("cap_id", metavar="ID", type=int, shell_complete=complete_cap)
@click.pass_obj
def inspect(settings: Settings, cap_id: int) -> None:
    """Show one capability, where it came from and what was derived from it."""
    import msgspec

    from snap.ipc.protocol import CapView

    from ..output import as_data, print_json, show_one

    answer = call(settings, "cap.inspect", dict[str, Any], id=cap_id)
    children = answer.pop("children", [])
    view = msgspec.convert(answer, CapView)
    if settings.output == "json":
        print_json("Capability", {**as_data(view), "children": children})
    else:
        show_one(
            settings.output, "Capability", view, lambda view: _page(view, children), lambda view: view.id
        )


def _page(view: CapView, children: list[int]) -> None:
    from ..output import field

    field("id", view.id)
    field("object", view.object)
    field("rights", ", ".join(view.rights))
    field("owner", f"{view.owner}, handle {view.handle}")
    field("badge", view.badge)
    field("parent", "none: minted" if view.parent is None else view.parent)
    field("derived", ", ".join(map(str, children)) or "nothing")
    field("expires", _expiry(view))
    field("rule", view.rule)


@cap.command()
@click.argument("who", shell_complete=complete_owner)
@click.argument("service", shell_complete=complete_service)
@click.argument("right", required=False, type=click.Choice(RIGHTS))
@click.pass_obj
@click.pass_context
def why(context: click.Context, settings: Settings, who: str, service: str, right: str | None) -> None:
    """Say whether WHO may use SERVICE, and which rule decides. Exits 5 when not.

    WHO is a principal (app:PID.N, module:NAME) or a kind of one (uid:N).
    """
    from ..output import field, print_json, state

    arguments: dict[str, Any] = {"who": who, "service": service}
    if right is not None:
        arguments["right"] = right
    answer = call(settings, "cap.why", dict[str, Any], **arguments)
    verdict = "allowed" if answer["allowed"] else "denied"
    if settings.output == "json":
        print_json("Decision", {**arguments, **answer})
    elif settings.output == "name":
        click.echo(verdict)
    else:
        click.echo(f"{state(verdict)}: {who} to {service}")
        field("rule", answer["rule"] or "none")
        field("reason", answer["reason"])
    context.exit(0 if answer["allowed"] else 5)


@cap.command()
@click.argument("owner", shell_complete=complete_owner)
@click.argument("service", shell_complete=complete_service)
@click.option(
    "--right",
    "rights",
    multiple=True,
    type=click.Choice(RIGHTS),
    help="May be repeated.  [default: connect, send, recv]",
)
@click.option(
    "--expires", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Until then only."
)
@click.pass_obj
def grant(
    settings: Settings, owner: str, service: str, rights: tuple[str, ...], expires: float | None
) -> None:
    """Give OWNER (a principal: app:PID.N or module:NAME) a capability on SERVICE."""
    from snap.ipc.protocol import CapView

    from ..output import show_one

    view = call(
        settings,
        "cap.grant",
        CapView,
        owner=owner,
        service=service,
        rights=list(rights or RIGHTS[:3]),
        **({} if expires is None else {"expires": expires}),
    )
    show_one(settings.output, "Capability", view, lambda view: _page(view, []), lambda view: view.id)


@cap.command()
@click.argument("cap_id", metavar="ID", type=int, shell_complete=complete_cap)
@click.pass_obj
def revoke(settings: Settings, cap_id: int) -> None:
    """Take a capability away, and everything derived from it; its channels stop at the next burst."""
    from ..output import print_json

    revoked = call(settings, "cap.revoke", dict[str, list[int]], id=cap_id)["revoked"]
    if settings.output == "json":
        print_json("Revocation", {"revoked": revoked})
        return
    for number in revoked:
        click.echo(number)
    say(f"{len(revoked)} revoked")
