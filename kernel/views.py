"""What the kernel tells of a module."""

from __future__ import annotations

from snap.ipc.discovery import Found
from snap.ipc.protocol import EngineView, ModuleView

from . import supervision
from .incarnation import DESCRIPTORS
from .runner import Runner


def module(runner: Runner, log_lines: int = 10, upgrade: int | None = None) -> ModuleView:
    machine, manifest, current = runner.machine, runner.found.manifest, runner.current
    standby = "" if runner.standby is None else "ready" if runner.standby.ready else "starting"
    return ModuleView(
        name=runner.name,
        version=manifest.module.version,
        state=machine.state,
        cause=machine.cause,
        pid=machine.pid,
        generation=machine.generation,
        restarts=machine.restarts,
        faults=machine.faults,
        since=runner.since,
        path=str(runner.origin.path),
        provides=list(manifest.provides),
        requires=list(manifest.requires.services),
        engines=[EngineView(name=name) for name in manifest.engines]
        if current is None
        else current.engine_views(),
        log_tail=list(runner.log.tail)[-log_lines:] if log_lines else [],
        sandbox=_sandbox(runner),
        memory_bytes=None if current is None else current.resident(),
        standby=standby,
        upgrade=upgrade,
        state_bytes=runner.states.bytes,
    )


def refused(found: Found, why: str) -> ModuleView:
    """Of a module that this kernel does not run."""
    manifest = found.manifest
    return ModuleView(
        name=manifest.name,
        version=manifest.module.version,
        state=supervision.FAILED,
        cause=f"refused: {why}",
        pid=None,
        generation=0,
        restarts=0,
        faults=0,
        since=0.0,
        path=str(found.path),
        provides=list(manifest.provides),
        requires=list(manifest.requires.services),
    )


def _sandbox(runner: Runner) -> list[dict[str, str]]:
    """What confines the process, layer by layer."""
    resources = runner.found.manifest.resources
    state = "applied" if runner.machine.pid else "at start"
    layers = [
        {"layer": "process", "requested": "session of its own, inherits only its link", "state": state},
        {"layer": "descriptors", "requested": str(resources.descriptors or DESCRIPTORS), "state": state},
        {"layer": "core dumps", "requested": "none", "state": state},
    ]
    if resources.memory is not None:
        unavailable = "unavailable: this release does not use cgroups"
        layers.append({"layer": "memory", "requested": resources.memory, "state": unavailable})
    return layers
