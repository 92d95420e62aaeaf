"""What two hosts agree on, without sockets: messages of strangers, choices, keys, set-ups that cross. And `pony.toml`."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snap.dataplane.errors import UsageError
from snap.modules.pony import config
from snap.modules.pony.setup import (
    FEATURES,
    LARGEST_MTU,
    MOST,
    Go,
    Hello,
    Meeting,
    Message,
    Reader,
    Reason,
    Refusal,
    SetupError,
    Turn,
    agree,
    check,
    encode,
)


def hello(name: str = "alpha", to: str = "beta", **change: Any) -> Hello:
    made = Hello(
        name=name,
        to=to,
        versions=[1, 2],
        mtu=1472,
        flow=7 if name == "alpha" else 9,
        port=4747,
        encrypt=True,
        secret=("bb" if name == "beta" else "aa") * 32,
        features=list(FEATURES),
    )
    return msgspec.structs.replace(made, **change)


# -- messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message", [hello(), hello(wire="ab" * 32), Refusal(Reason.VERSION, "none"), Go(), Go(wire=True)]
)
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_messages_survive_however_they_are_cut(message: Message, step: int) -> None:
    data, reader = encode(message), Reader()
    got = [reader.feed(data[start : start + step]) for start in range(0, len(data), step)]
    assert got[-1] == message and not any(got[:-1])


@given(st.lists(st.binary(max_size=2000), max_size=6))
def test_garbage_is_a_message_or_a_set_up_error_and_never_more_than_a_line(parts: list[bytes]) -> None:
    reader = Reader()
    try:
        for part in parts:
            assert isinstance(reader.feed(part), Hello | Refusal | Go | None)
            assert len(reader._rest) <= MOST
    except SetupError as error:
        assert error.reason is Reason.PROTOCOL


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_JSON = _SCALARS | st.lists(_SCALARS, max_size=3)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from([*json.loads(encode(hello())), "more"]), _JSON))
def test_a_greeting_with_anything_in_it_is_agreed_with_or_refused(change: dict[str, Any]) -> None:
    line = json.dumps(json.loads(encode(hello())) | change, allow_nan=True).encode() + b"\n"
    own = hello("beta", "alpha")
    try:
        message = Reader().feed(line)
        assert message is not None
        agreed = agree(own, check(own, message, "alpha"), "10.0.0.1")
    except SetupError as error:
        assert error.message.startswith(error.reason)
    else:
        assert agreed.host == "alpha" and agreed.version in (1, 2) and 0 < agreed.mtu <= LARGEST_MTU


def test_what_a_newer_release_says_besides_is_passed_over() -> None:
    line = json.dumps(json.loads(encode(hello())) | {"colour": "blue"}).encode() + b"\n"
    assert Reader().feed(line) == hello()


# -- what follows from two greetings ------------------------------------------------------------------------------

_SIDES = st.fixed_dictionaries(
    {
        "versions": st.lists(st.integers(0, 4), max_size=4),
        "mtu": st.integers(508, 65535),
        "encrypt": st.booleans(),
        "features": st.sampled_from([[], list(FEATURES), ["later", *FEATURES]]),
    }
)


def _concluded(own: Hello, theirs: Hello) -> Any:
    try:
        return agree(own, theirs, "10.0.0.1")
    except SetupError as error:
        return error.reason


@given(_SIDES, _SIDES)
def test_both_sides_conclude_the_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    one, other = hello(**first), hello("beta", "alpha", **second)
    at_one, at_other = _concluded(one, other), _concluded(other, one)
    if isinstance(at_one, Reason):
        assert at_one is at_other
        return
    assert (at_one.version, at_one.mtu) == (at_other.version, at_other.mtu)
    assert at_one.version == max(set(one.versions) & set(other.versions))
    assert at_one.mtu == min(one.mtu, other.mtu, LARGEST_MTU)
    assert (at_one.remote, at_other.remote) == (other.flow, one.flow)
    assert (at_one.keys is not None) == (at_other.keys is not None) == (one.encrypt or other.encrypt)
    if at_one.keys is not None:
        assert at_one.keys.send == at_other.keys.receive != at_one.keys.receive == at_other.keys.send


def test_keys_depend_on_either_secret_the_names_and_the_version() -> None:
    def key(theirs: Hello, **change: Any) -> bytes:
        keys = agree(hello(**change), theirs, "10.0.0.1").keys
        assert keys is not None
        return keys.send

    beta = hello("beta", "alpha")
    other = msgspec.structs.replace(beta, secret="cc" * 32)
    found = {
        key(beta), key(beta, secret="dd" * 32), key(other), key(beta, versions=[1]), key(beta, name="gamma")
    }  # fmt: skip
    assert len(found) == 5


@pytest.mark.parametrize(
    ("told", "seen", "address"),
    [
        ("", "10.0.0.1", "10.0.0.1:4747"),
        ("10.9.9.9", "10.0.0.1", "10.9.9.9:4747"),
        ("", "fe80::1", "[fe80::1]:4747"),
        ("fe80::2", "10.0.0.1", None),
        ("host.example", "10.0.0.1", None),
    ],
)
def test_udp_goes_to_the_address_told_or_else_seen(told: str, seen: str, address: str | None) -> None:
    theirs = hello("beta", "alpha", address=told)
    if address is not None:
        assert agree(hello(), theirs, seen).address == address
    else:
        with pytest.raises(SetupError):
            agree(hello(), theirs, seen)


# -- two set-ups at once ------------------------------------------------------------------------------------------


class Crossing(RuleBasedStateMachine):
    """Both sides dial whenever they like, and each step of every set-up happens at any time: what was attached last at one
    side is what was attached last at the other, as soon as nothing is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.meetings = {"a": Meeting("a", "b"), "b": Meeting("b", "a")}
        self.attached = {"a": 0, "b": 0}
        self.ways: list[dict[str, Any]] = []
        self.count = 0

    @rule(who=st.sampled_from("ab"))
    def dial(self, who: str) -> None:
        turn = self.meetings[who].dial()
        if turn is not None:
            self.count += 1
            self.ways.append({"n": self.count, "who": who, "turn": turn, "at": "dialed"})

    @precondition(lambda self: self.ways)
    @rule(data=st.data())
    def go_on(self, data: Any) -> None:
        way = data.draw(st.sampled_from(self.ways))
        getattr(self, way["at"])(way)

    def dialed(self, way: dict[str, Any]) -> None:
        if self.meetings[way["who"]].offer(way["turn"]):
            way["at"] = "greeted"
        else:
            self.over(way)

    def greeted(self, way: dict[str, Any]) -> None:
        way["answer"] = self.meetings[self.other(way)].hear()
        way["at"] = "refused" if way["answer"] is None else "answered"

    def refused(self, way: dict[str, Any]) -> None:
        self.over(way)

    def answered(self, way: dict[str, Any]) -> None:
        """The dialer attaches and says go, or lets go."""
        if self.meetings[way["who"]].holds(way["turn"]):
            self.attached[way["who"]] = way["n"]
            way["at"] = "going"
            self.meetings[way["who"]].end(way["turn"])
        else:
            way["at"] = "let_go"

    def going(self, way: dict[str, Any]) -> None:
        if self.meetings[self.other(way)].holds(way["answer"]):
            self.attached[self.other(way)] = way["n"]
        self.over(way)

    def let_go(self, way: dict[str, Any]) -> None:
        self.over(way)

    def over(self, way: dict[str, Any]) -> None:
        self.ways.remove(way)
        self.meetings[way["who"]].end(way["turn"])
        if isinstance(way.get("answer"), Turn):
            self.meetings[self.other(way)].end(way["answer"])

    def other(self, way: dict[str, Any]) -> str:
        return "b" if way["who"] == "a" else "a"

    @invariant()
    def both_have_the_same_when_nothing_is_under_way(self) -> None:
        if not self.ways:
            assert self.attached["a"] == self.attached["b"]
            assert not self.meetings["a"].busy and not self.meetings["b"].busy

    def teardown(self) -> None:
        while self.ways:
            getattr(self, self.ways[0]["at"])(self.ways[0])
            self.both_have_the_same_when_nothing_is_under_way()


TestCrossing = Crossing.TestCase


# -- pony.toml --------------------------------------------------------------------------------------------------


def configured(folder: Path, text: str) -> config.Config | None:
    (folder / config.FILE).write_text(text)
    return config.load(folder)


def test_without_the_file_there_is_no_configuration(tmp_path: Path) -> None:
    assert config.load(tmp_path) is None


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    found = configured(tmp_path, "")
    assert found is not None
    assert (found.name, found.listen, found.tcp_port, found.udp_port) == (
        socket.gethostname()[:63], "0.0.0.0", 4747, 4747
    )  # fmt: skip
    assert found.encryption == "required" and not found.dns and found.address_of("beta") is None


def test_peers_have_addresses_and_others_are_looked_up_if_that_is_wanted(tmp_path: Path) -> None:
    text = 'name = "alpha"\ndns = true\nlisten = "::"\n[peers.beta]\naddress = "[fe80::1]:99"\n'
    found = configured(tmp_path, text)
    assert found is not None and found.family == socket.AF_INET6
    assert found.address_of("beta") == ("fe80::1", 99)
    assert found.address_of("gamma.example") == ("gamma.example", config.PORT)


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("beta", ("beta", 4747)),
        ("10.0.0.2:1", ("10.0.0.2", 1)),
        ("fe80::1", ("fe80::1", 4747)),
        ("[fe80::1]", ("fe80::1", 4747)),
        ("beta:0", None),
        ("beta:x", None),
        (":1", None),
        ("[fe80::1", None),
        ("[fe80::1]x", None),
        ("beta:99999", None),
    ],
)
def test_addresses_of_peers(address: str, where: tuple[str, int] | None) -> None:
    if where is not None:
        assert config.split(address) == where
    else:
        with pytest.raises(ValueError):
            config.split(address)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nmae = 'x'", "nmae"),
        ("name = '../x'", "name"),
        ("listen = 'everywhere'", "listen: 'everywhere' is no address"),
        ("advertise = '::1'", "not of the family"),
        ("encryption = 'maybe'", "encryption"),
        ("versions = [3]", "versions"),
        ("versions = []", "versions"),
        ("paths = 0", "paths"),
        ("tcp_port = 70000", "tcp_port"),
        ("[peers.beta]\naddress = 'x:y'", "peers.beta.address"),
        ("[peers.'a/b']\naddress = 'x'", "peers"),
        ("name = 'me'\n[peers.me]\naddress = 'x'", "this host itself"),
        ("][", "not valid TOML"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        configured(tmp_path, text)
    assert said in str(error.value) and str(tmp_path) in str(error.value)
