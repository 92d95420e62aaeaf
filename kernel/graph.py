"""The manifests of all modules as one graph, checked before anything starts. No I/O.

A problem concerns single modules: they and those that need them are refused, the others start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from snap.ipc.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Plan:
    """`order`: the modules that may start, providers before those who require them. `problems`: why each other module
    is refused. `providers`: the module of each service of the modules in `order`."""

    order: list[str]
    problems: dict[str, list[str]]
    providers: dict[str, str]

    def requirements(self, manifest: Manifest) -> list[str]:
        """The modules that one in `order` needs running, each once, in the order of its `manifest`."""
        return list(dict.fromkeys(self.providers[service] for service in manifest.requires.services))


def check(manifests: Mapping[str, Manifest], denial: Callable[[str, str], str | None]) -> Plan:
    """`denial(module, service)` says why policy keeps `module` from using `service`, None when it does not."""
    offers = _offers(manifests)
    problems: dict[str, list[str]] = {}
    for service, modules in offers.items():
        if len(modules) > 1:
            for module in modules:
                others = " and ".join(other for other in modules if other != module)
                _add(problems, module, f"provides {service!r}, as does {others}: keep one of them")
    for module, manifest in sorted(manifests.items()):
        for service in manifest.requires.services:
            if service not in offers:
                _add(problems, module, f"requires {service!r}, which no module provides")
            elif reason := denial(module, service):
                _add(problems, module, f"requires {service!r}, which policy denies: {reason}")
    needs = _needs(manifests, offers)
    for cycle in _cycles(needs):
        path = " → ".join([*cycle, cycle[0]])
        for module in cycle:
            _add(problems, module, f"requires itself in a circle: {path}")
    order = _order(needs)
    _refuse_dependants(order, needs, problems)
    return Plan(
        order=[module for module in order if module not in problems],
        problems=problems,
        providers={service: names[0] for service, names in offers.items() if names[0] not in problems},
    )


def _offers(manifests: Mapping[str, Manifest]) -> dict[str, list[str]]:
    offers: dict[str, list[str]] = {}
    for module, manifest in sorted(manifests.items()):
        for service in manifest.provides:
            offers.setdefault(service, []).append(module)
    return offers


def _needs(manifests: Mapping[str, Manifest], offers: Mapping[str, list[str]]) -> dict[str, dict[str, str]]:
    """For each module the modules that it needs, each with one service for which it does."""
    return {
        module: {
            provider: service
            for service in reversed(manifest.requires.services)
            for provider in offers.get(service, ())
        }
        for module, manifest in sorted(manifests.items())
    }


def _cycles(needs: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """One shortest cycle through each module that is on any, every cycle once, starting at its least name."""
    found: dict[frozenset[str], list[str]] = {}
    for module in needs:
        cycle = _way_back(module, needs)
        if cycle:
            start = cycle.index(min(cycle))
            found.setdefault(frozenset(cycle), cycle[start:] + cycle[:start])
    return list(found.values())


def _way_back(module: str, needs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The shortest path from `module` along what it needs back to it, without the return; empty when there is none."""
    came_from: dict[str, str] = {}
    queue = [module]
    for here in queue:
        for there in needs[here]:
            if there == module:
                path = [here]
                while path[-1] != module:
                    path.append(came_from[path[-1]])
                return path[::-1]
            if there not in came_from:
                came_from[there] = here
                queue.append(there)
    return []


def _order(needs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """All modules, providers first; those on cycles, and behind them, last."""
    order: dict[str, None] = {}
    waiting = list(needs)
    while waiting:
        free = [module for module in waiting if all(provider in order for provider in needs[module])]
        if not free:
            break
        order.update(dict.fromkeys(free))
        waiting = [module for module in waiting if module not in order]
    return [*order, *waiting]


def _refuse_dependants(
    order: list[str], needs: Mapping[str, Mapping[str, str]], problems: dict[str, list[str]]
) -> None:
    """Refuse those who need a refused module too; one round does but for those behind a cycle."""
    spreading = True
    while spreading:
        spreading = False
        for module in order:
            if module in problems:
                continue
            for provider, service in needs[module].items():
                if provider in problems:
                    _add(problems, module, f"requires {service!r}, whose provider {provider} is refused")
                    spreading = True


def _add(problems: dict[str, list[str]], module: str, reason: str) -> None:
    problems.setdefault(module, []).append(reason)
