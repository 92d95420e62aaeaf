"""What a policy allows, and how it says so."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snap.dataplane.errors import PolicyError, UsageError
from snap.kernel import policy
from snap.kernel.policy import Identity

KERNEL = 1000
OWNER = Identity(uid=KERNEL, gid=1000, pid=1)
STRANGER = Identity(uid=2000, gid=2000, pid=2)
RELAY = Identity(uid=KERNEL, gid=1000, pid=3, module="relay")


def parse(text: str) -> policy.Policy:
    return policy.parse(tomllib.loads("version = 1\n" + text), "policy.toml")


def test_an_empty_policy_denies_everybody_everything() -> None:
    rules = parse("")
    for who in (OWNER, STRANGER, RELAY, Identity(0, 0, 1)):
        assert not rules.decide(who, "echo", KERNEL).allowed
        assert not rules.decide_operator(who, KERNEL).allowed


def test_the_shipped_policy_serves_its_owner_alone() -> None:
    rules = policy.load()
    decision = rules.decide(OWNER, "anything", KERNEL)
    assert decision.allowed
    assert decision.rule == "default_policy.toml [[allow]] #1"
    assert decision.rights >= {"connect", "send", "recv"}
    assert rules.decide_operator(OWNER, KERNEL).rights == {"operate", "inspect"}
    assert rules.module("whatever").autostart
    for who in (STRANGER, RELAY):
        assert not rules.decide(who, "anything", KERNEL).allowed
        assert not rules.decide_operator(who, KERNEL).allowed


@pytest.mark.parametrize(
    ("who", "allowed"),
    [
        ("owner", {"OWNER"}),
        ("any", {"OWNER", "STRANGER", "RELAY"}),
        ("uid:2000", {"STRANGER"}),
        ("gid:1000", {"OWNER"}),
        ("module:relay", {"RELAY"}),
        ("module:rel*", {"RELAY"}),
        ("module:other", set()),
    ],
)
def test_a_rule_matches_those_it_names_and_no_module_by_its_uid(who: str, allowed: set[str]) -> None:
    rules = parse(f'[[allow]]\nwho = "{who}"\nservice = "echo"')
    people = {"OWNER": OWNER, "STRANGER": STRANGER, "RELAY": RELAY}
    assert {name for name, one in people.items() if rules.decide(one, "echo", KERNEL).allowed} == allowed


def test_the_first_matching_rule_decides_and_is_named() -> None:
    rules = parse(
        """
        [[allow]]
        who = "uid:1"
        service = "*"
        [[allow]]
        who = "any"
        service = "ech?"
        rights = ["connect"]
        expires = 60
        [[allow]]
        who = "any"
        service = "*"
        """
    )
    decision = rules.decide(STRANGER, "echo", KERNEL)
    assert decision.rule == "policy.toml [[allow]] #2"
    assert (decision.rights, decision.expires) == ({"connect"}, 60.0)
    assert rules.decide(STRANGER, "other", KERNEL).rule == "policy.toml [[allow]] #3"


def test_why_tells_of_a_right_that_the_deciding_rule_does_not_give() -> None:
    rules = parse('[[allow]]\nwho = "any"\nservice = "echo"\nrights = ["connect"]')
    assert rules.why(OWNER, "echo", KERNEL, "connect").allowed
    refused = rules.why(OWNER, "echo", KERNEL, "send")
    assert not refused.allowed
    assert refused.rule == "policy.toml [[allow]] #1"
    assert "gives connect but not send" in refused.reason
    nobody = rules.why(OWNER, "other", KERNEL)
    assert (nobody.allowed, nobody.rule) == (False, "")
    assert "denied by default" in nobody.reason


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[[allow]]\nwho = "everyone"\nservice = "x"', "allow[0].who"),
        ('[[allow]]\nwho = "uid:-1"\nservice = "x"', "allow[0].who"),
        ('[[allow]]\nwho = "any"', "`service`"),
        (
            '[[allow]]\nwho = "any"\nservice = "a"\n[[allow]]\nwho = "any"\nservice = "x"\nrights = ["fly"]',
            "allow[1].rights[0]",
        ),
        ('[[allow]]\nwho = "any"\nservice = "x"\nrights = []', "allow[0].rights"),
        ('[[allow]]\nwho = "any"\nservice = "x"\nexpires = 0', "allow[0].expires"),
        ('[[allow]]\nwho = "any"\nservice = "x"\nexpires = nan', "allow[0].expires"),
        ('[[operator]]\nwho = "any"\nrights = ["connect"]', "operator[0].rights[0]"),
        ("[quota]\nchannels = 0", "quota.channels"),
        ('[quota]\nbytes = "lots"', "quota.bytes"),
        ('[segments]\nbackend = "sysv"', "segments.backend"),
        ('[modules.echo]\nautostart = "yes"', "modules.echo.autostart"),
        ("[modules.echo]\nauto = true", "modules.echo"),
        ("[quotas]\nchannels = 1", "`quotas`"),
    ],
)
def test_a_wrong_policy_is_refused_with_file_and_key(text: str, key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert caught.value.message.startswith("policy.toml: ")
    assert key in caught.value.message


def test_a_policy_without_or_of_another_version_is_refused() -> None:
    with pytest.raises(PolicyError, match="version"):
        policy.parse({}, "p")
    with pytest.raises(PolicyError, match="version"):
        policy.parse({"version": 2}, "p")


def test_a_missing_file_and_one_that_everybody_may_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"absent\.toml: No such file"):
        policy.load(tmp_path / "absent.toml")
    loose = tmp_path / "loose.toml"
    loose.write_text("version = 1\n")
    loose.chmod(0o666)
    with pytest.raises(PolicyError, match="everybody may write"):
        policy.load(loose)
    loose.chmod(0o600)
    assert policy.load(loose).source == "loose.toml"


def test_a_modules_own_settings_win_over_a_pattern() -> None:
    rules = parse('[modules."e*"]\nautostart = true\n[modules.echo]\nautostart = false')
    assert rules.module("edge").autostart
    assert not rules.module("echo").autostart
    assert not rules.module("other").autostart


def test_quotas_and_back_end_are_read_in_their_units() -> None:
    rules = parse('[quota]\nbytes = "4KiB"\nchannels = 2\n[segments]\nbackend = "posix"')
    assert (rules.quota.segment_bytes, rules.quota.channels, rules.backend) == (4096, 2, "posix")
    assert parse("").quota.requests_per_second == 2000


def test_an_identity_is_read_from_a_badge_and_nothing_else() -> None:
    assert policy.identity("uid:7/pid:9") == Identity(7, -1, 9)
    assert policy.identity("uid:7/gid:8") == Identity(7, 8, 0)
    assert policy.identity("module:echo").module == "echo"
    for odd in ("", "root", "uid:", "uid:x", "uid:-1", "uid:²", "name:1", "module:"):
        with pytest.raises(UsageError):
            policy.identity(odd)


rule_text = st.sampled_from(["owner", "uid:1", "uid:2", "gid:1", "module:a", "module:*"])


@given(
    st.lists(st.tuples(rule_text, st.sampled_from(["a", "b*", "*"]))), st.integers(0, 3), st.integers(0, 3)
)
def test_nobody_whom_no_rule_names_is_ever_allowed(rules: list[tuple[str, str]], uid: int, gid: int) -> None:
    allow = [{"who": who, "service": service} for who, service in rules]
    decided = policy.parse({"version": 1, "allow": allow}, "p").decide(Identity(uid, gid, 1), "bee", 3)
    named = [
        number
        for number, (who, service) in enumerate(rules, 1)
        if who in {f"uid:{uid}", f"gid:{gid}", "owner" if uid == 3 else ""} and service != "a"
    ]
    assert decided.allowed == bool(named)
    assert decided.rule == (f"p [[allow]] #{named[0]}" if named else "")
