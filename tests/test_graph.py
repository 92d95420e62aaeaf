"""The graph of all manifests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snap.ipc import manifest
from snap.ipc.manifest import Manifest
from snap.kernel import graph


def module(name: str, provides: list[str], requires: list[str]) -> Manifest:
    return manifest.from_builtins(
        {
            "module": {"name": name, "version": "1"},
            "engines": {"e": {"class": "native:echo"}},
            "provides": {service: {"engine": "e"} for service in provides},
            "requires": {"services": requires},
        }
    )


def modules(**edges: str) -> dict[str, Manifest]:
    """Each module provides a service of its own name and requires those named, separated by spaces."""
    return {name: module(name, [name], needs.split()) for name, needs in edges.items()}


def allowed(module: str, service: str) -> None:
    return None


def test_providers_start_before_those_who_require_them() -> None:
    plan = graph.check(modules(a="b c", b="c", c="", d=""), allowed)
    assert plan.problems == {}
    assert plan.order == ["c", "d", "b", "a"]
    assert plan.providers == {"a": "a", "b": "b", "c": "c", "d": "d"}


def test_a_missing_provider_refuses_the_module_and_its_dependants_alone() -> None:
    plan = graph.check(modules(a="b", b="nowhere", c=""), allowed)
    assert plan.order == ["c"]
    assert plan.problems["b"] == ["requires 'nowhere', which no module provides"]
    assert plan.problems["a"] == ["requires 'b', whose provider b is refused"]
    assert plan.providers == {"c": "c"}


def test_two_providers_of_one_service_are_both_refused_by_name() -> None:
    plan = graph.check(
        {"a": module("a", ["s"], []), "b": module("b", ["s", "t"], []), "c": module("c", [], ["t"])}, allowed
    )
    assert plan.order == []
    assert "provides 's', as does b" in plan.problems["a"][0]
    assert "provides 's', as does a" in plan.problems["b"][0]
    assert plan.problems["c"] == ["requires 't', whose provider b is refused"]


def test_a_cycle_is_named_as_a_path_and_refuses_those_behind_it() -> None:
    plan = graph.check(modules(c="a", b="c", a="b", z="y", y="a", free=""), allowed)
    assert plan.order == ["free"]
    for name in "abc":
        assert plan.problems[name] == ["requires itself in a circle: a → b → c → a"]
    assert plan.problems["y"] == ["requires 'a', whose provider a is refused"]
    assert plan.problems["z"] == ["requires 'y', whose provider y is refused"]


def test_a_module_that_requires_its_own_service_is_a_cycle() -> None:
    assert graph.check(modules(a="a"), allowed).problems == {"a": ["requires itself in a circle: a → a"]}


def test_each_of_two_cycles_that_share_a_module_is_named() -> None:
    plan = graph.check(modules(a="b c", b="a", c="a"), allowed)
    assert plan.problems["b"] == ["requires itself in a circle: a → b → a"]
    assert plan.problems["c"] == ["requires itself in a circle: a → c → a"]


def test_what_policy_denies_refuses_the_module_with_the_reason() -> None:
    def denial(module: str, service: str) -> str | None:
        return "no rule" if (module, service) == ("a", "b") else None

    plan = graph.check(modules(a="b", b="", c="b"), denial)
    assert plan.order == ["b", "c"]
    assert plan.problems == {"a": ["requires 'b', which policy denies: no rule"]}


def test_requirements_are_the_modules_behind_the_services_each_once() -> None:
    manifests = {
        "p": module("p", ["s", "t"], []),
        "q": module("q", ["u"], []),
        "r": module("r", [], ["t", "u", "s"]),
    }
    assert graph.check(manifests, allowed).requirements(manifests["r"]) == ["p", "q"]


names = st.sampled_from("abcdef")


@given(st.dictionaries(names, st.tuples(st.sets(names), st.sets(st.sampled_from("abcdefg")))))
def test_whatever_starts_has_all_it_requires_running_and_nothing_is_refused_without_cause(
    edges: dict[str, tuple[set[str], set[str]]],
) -> None:
    manifests = {name: module(name, sorted(gives), sorted(needs)) for name, (gives, needs) in edges.items()}
    plan = graph.check(manifests, allowed)
    assert set(plan.order) | set(plan.problems) == set(manifests)
    assert not set(plan.order) & set(plan.problems)
    running: set[str] = set()
    for name in plan.order:
        assert edges[name][1] <= {service for one in running for service in edges[one][0]}
        assert not any(edges[one][0] & edges[name][0] for one in edges if one != name)
        running.add(name)
    # Nothing refused could have been started after all: each has a clash, or needs something that does not run.
    served = {service for one in running for service in edges[one][0]}
    for name in plan.problems:
        clash = any(edges[one][0] & edges[name][0] for one in edges if one != name)
        assert clash or edges[name][1] - served
