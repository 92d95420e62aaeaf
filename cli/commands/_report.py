"""What an upgrade was, in words: for the report, the history, and whoever has to be told how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from snap.ipc.protocol import UpgradeView


def title(view: UpgradeView) -> str:
    """`upgrade 7 of echo`, for the middle of a sentence."""
    if view.kind == "kernel":
        return f"upgrade {view.id} of the kernel"
    return f"{view.kind} {view.id} of {view.module}"


def outcome(view: UpgradeView) -> str:
    return view.outcome.replace("_", " ") or "running"


def succeeded(view: UpgradeView, wanted: str = "") -> bool:
    """A rollback (`wanted`) of an upgrade that is under way ends that one, and was to."""
    if wanted == "rollback" and view.kind == "upgrade":
        return view.outcome in ("rolled_back", "aborted")
    return view.outcome in ("committed", "recovered")


def blackout_ns(view: UpgradeView) -> int:
    """The longest of its engines' blackouts; -1 when none flipped."""
    return max((engine.blackout_ns for engine in view.engines), default=-1)


def took(view: UpgradeView) -> str:
    return "-" if view.finished is None else f"{max(0.0, view.finished - view.started):.1f} s"


def failure(view: UpgradeView) -> str:
    """Why the version before serves on, in one sentence."""
    how = {
        "rolled_back": "was rolled back",
        "aborted": "was given up before any engine moved",
        "given_up": "ended with nobody who serves",
    }.get(view.outcome, f"ended as {view.outcome!r}")
    return f"{title(view)} to {view.to_version} {how}: {view.reason or 'the kernel gives no reason'}"


def show_report(output: str, view: UpgradeView) -> None:
    from ..output import show_one

    show_one(output, "Upgrade", view, _page, lambda view: view.id)


def _page(view: UpgradeView) -> None:
    from ..output import field, print_table, rfc3339, span, state

    field(view.kind if view.kind != "kernel" else "upgrade", f"{view.id} of {view.module or 'the kernel'}")
    click.echo(f"{'outcome:':>12} {state(outcome(view))}")
    if view.reason:
        field("reason", view.reason)
    of_kernel = view.kind == "kernel"
    number = "pid" if of_kernel else "generation"
    field("from", f"{view.from_version}, {number} {view.from_generation}, {view.from_path}")
    field("to", f"{view.to_version}, {number} {view.to_generation}, {view.to_path}")
    field("started", rfc3339(view.started))
    if not view.outcome:
        field("phase", view.phase)
    field("took", took(view))
    if view.kind != "recovery":
        field("brownout", f"{view.brownout_seconds:.3f} s")
        field("bake", f"{view.bake_seconds:g} s")
    field(
        "clients", "none waited" if view.client_gap_ns < 0 else f"waited at most {span(view.client_gap_ns)}"
    )
    if not view.engines:
        return
    click.echo()
    print_table(
        ("ENGINE", "STAGE", "BLACKOUT", "ROWS MIGRATED", "ROUNDS", "IN THE BLACKOUT"),
        [
            (
                engine.name,
                engine.stage,
                span(engine.blackout_ns),
                str(engine.migrated),
                str(engine.rounds),
                str(engine.converted),
            )
            for engine in view.engines
        ],
    )
