"""Set-ups between hosts: two controls on loopback, with real TLS, each with an engine that writes down what it hears."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane.errors import UsageError
from snap.modules.pony import identity, setup, streams
from tests.pony_rig import Side
from tests.waiting import until


class Both:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sides: list[Side] = []

    def side(self, name: str, **options: Any) -> Side:
        self.sides.append(Side(self.folder, name, **options))
        return self.sides[-1]

    def pair(self, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> list[Side]:
        """alpha and beta, who know each other."""
        alpha, beta = self.side("alpha", **(first or {})), self.side("beta", **(second or {}))
        alpha.knows(beta)
        beta.knows(alpha)
        return [alpha, beta]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Both]:
    made = Both(tmp_path)
    yield made
    for side in made.sides:
        side.close()


def agreed(alpha: Side, beta: Side) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both engines were told last, checked to be the two ends of one pair of flows."""
    until(lambda: alpha.engine.attached.get("beta") and beta.engine.attached.get("alpha"), "both attach")
    until(
        lambda: (
            not any(
                meeting.busy
                for side in (alpha, beta)
                if side.control is not None
                for meeting in side.control._meetings.values()
            )
        ),
        "nothing is under way",
    )
    at_alpha, at_beta = alpha.engine.attached["beta"][-1], beta.engine.attached["alpha"][-1]
    assert at_alpha["remote"] == beta.engine.flows["alpha"]
    assert at_beta["remote"] == alpha.engine.flows["beta"]
    assert at_alpha["address"] == f"127.0.0.1:{beta.udp_port}"
    assert at_beta["address"] == f"127.0.0.1:{alpha.udp_port}"
    assert (at_alpha["version"], at_alpha["mtu"]) == (at_beta["version"], at_beta["mtu"])
    if at_alpha["keys"] is None:
        assert at_beta["keys"] is None
    else:
        assert at_alpha["keys"]["send"] == at_beta["keys"]["receive"] != at_alpha["keys"]["receive"]
        assert at_alpha["keys"]["receive"] == at_beta["keys"]["send"]
        assert len(bytes.fromhex(at_alpha["keys"]["send"])) == setup.KEY_BYTES
    return at_alpha, at_beta


# -- what two hosts agree on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [0, 1])
def test_whoever_wants_it_both_engines_get_the_two_ends_of_one_pair_of_flows(hosts: Both, who: int) -> None:
    alpha, beta = sides = hosts.pair({"algorithm": "timely"})
    for side in sides:
        side.start()
    sides[who].control.want(sides[1 - who].name)  # type: ignore[union-attr]
    at_alpha, at_beta = agreed(alpha, beta)
    assert (at_alpha["version"], at_alpha["mtu"]) == (2, setup.LARGEST_MTU)
    assert (at_alpha["algorithm"], at_beta["algorithm"]) == ("timely", "swift")
    assert at_alpha["keys"] is not None
    for side, other in ((alpha, "beta"), (beta, "alpha")):
        assert side.control is not None and side.control.records[other].state == "connected"
    assert not alpha.engine.refused and not beta.engine.refused


def test_of_mixed_versions_the_highest_common_one_is_taken(hosts: Both) -> None:
    alpha, beta = hosts.pair({"versions": [1]}, {"versions": [2, 1]})
    beta.start()
    alpha.start().want("beta")
    assert agreed(alpha, beta)[0]["version"] == 1


@pytest.mark.parametrize(
    ("first", "second", "keys"),
    [("off", "off", False), ("off", "required", True), ("required", "off", True)],
)
def test_there_is_encryption_if_either_requires_it(hosts: Both, first: str, second: str, keys: bool) -> None:
    alpha, beta = hosts.pair({"encryption": first}, {"encryption": second})
    beta.start()
    alpha.start().want("beta")
    assert (agreed(alpha, beta)[0]["keys"] is not None) == keys


def test_a_later_set_up_replaces_the_earlier_one_with_other_keys(hosts: Both) -> None:
    alpha, beta = hosts.pair()
    for side in (alpha, beta):
        side.start()
    alpha.control.want("beta")  # type: ignore[union-attr]
    first = agreed(alpha, beta)[0]
    beta.control.want("alpha")  # type: ignore[union-attr]
    until(lambda: len(alpha.engine.attached["beta"]) == 2)
    until(lambda: len(beta.engine.attached["alpha"]) == 2)
    second = agreed(alpha, beta)[0]
    assert second["keys"] != first["keys"] and second["remote"] == first["remote"]


@pytest.mark.parametrize("late", ["alpha", "beta"])
def test_both_may_begin_at_once_and_agree(hosts: Both, late: str) -> None:
    """Each dials before it has heard of the other; one of them is held back, just before it greets."""
    alpha, beta = hosts.pair()
    slow = alpha if late == "alpha" else beta
    slow.engine.hold = hold = threading.Event()
    controls = [side.start() for side in (alpha, beta)]
    for control, other in zip(controls, ("beta", "alpha"), strict=True):
        control.want(other)
    other = beta if slow is alpha else alpha
    until(lambda: slow.engine.hold is None, "it is held")
    until(lambda: slow.control._meetings and other.control._meetings)  # type: ignore[union-attr]
    hold.set()
    agreed(alpha, beta)
    assert not alpha.engine.refused and not beta.engine.refused


def test_both_may_begin_at_once_many_times(hosts: Both) -> None:
    alpha, beta = hosts.pair()
    controls = [side.start() for side in (alpha, beta)]
    for _ in range(20):
        for side in (alpha, beta):
            side.engine.attached.clear()
        threads = [
            threading.Thread(target=control.want, args=(name,))
            for control, name in zip(controls, ("beta", "alpha"), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        agreed(alpha, beta)
    assert not alpha.engine.refused and not beta.engine.refused


# -- what keeps two hosts apart ---------------------------------------------------------------------------------


def refusal(side: Side, host: str) -> str:
    """Why those who wait to reach `host` are told that they cannot."""
    return until(lambda: side.engine.refused.get(host), f"{side.name} gives {host} up")[0]


@pytest.mark.parametrize("impostor", ["dials", "listens"])
def test_another_certificate_is_refused_by_both(hosts: Both, impostor: str) -> None:
    alpha, beta = hosts.pair()
    stranger = hosts.side("stranger")
    wronged, other = (beta, alpha) if impostor == "dials" else (alpha, beta)
    wronged.knows(other, certificate=stranger.folder / identity.CERTIFICATE)
    for side in (alpha, beta):
        side.start()
    alpha.control.want("beta")  # type: ignore[union-attr]
    assert refusal(alpha, "beta").startswith("not authenticated")
    assert not alpha.engine.attached and not beta.engine.attached and not beta.engine.flows


def test_a_known_host_that_says_it_is_another_is_refused(hosts: Both) -> None:
    beta = hosts.pair()[1]
    gamma = hosts.side("gamma")
    beta.knows(gamma)
    gamma.knows(beta)
    gamma.name = "alpha"
    beta.start()
    gamma.start().want("beta")
    assert "the certificate is that of gamma, but it says that it is alpha" in refusal(gamma, "beta")
    assert not beta.engine.attached


def test_a_host_of_our_own_name_is_refused(hosts: Both) -> None:
    alpha, beta = hosts.pair()
    beta.knows(alpha, name="beta")
    (beta.folder / identity.PEERS / "alpha.pem").unlink()
    alpha.name = "beta"
    alpha.knows(beta, name="gamma")
    (alpha.folder / identity.PEERS / "beta.pem").unlink()
    beta.start()
    alpha.start().want("gamma")
    assert "both hosts say that they are beta" in refusal(alpha, "gamma")


def test_a_host_that_is_reached_under_another_name_says_so(hosts: Both) -> None:
    alpha, beta = hosts.pair()
    alpha.knows(beta, name="delta")
    (alpha.folder / identity.PEERS / "beta.pem").unlink()
    beta.start()
    alpha.start().want("delta")
    assert "looks for delta, and this is beta" in refusal(alpha, "delta")


def test_without_a_common_version_both_say_so(hosts: Both) -> None:
    alpha, beta = hosts.pair({"versions": [1]}, {"versions": [2]})
    control = beta.start()
    alpha.start().want("beta")
    assert refusal(alpha, "beta").startswith("no common version")
    until(lambda: control.records.get("alpha"))
    assert control.records["alpha"].error.startswith("no common version")


def test_a_side_that_cannot_encrypt_is_refused(hosts: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    alpha, beta = hosts.pair()
    beta.start()
    monkeypatch.setattr(setup, "FEATURES", ())
    alpha.start().want("beta")
    assert refusal(alpha, "beta").startswith("encryption refused")


def test_unknown_hosts_and_those_without_an_address_are_said(hosts: Both) -> None:
    alpha, beta = hosts.pair()
    control = alpha.start()
    control.want("nobody")
    assert "no certificate" in refusal(alpha, "nobody")
    control.want("alpha")
    assert "is this host" in refusal(alpha, "alpha")
    control.config.peers.pop("beta")
    control.want("beta")
    assert "no address" in refusal(alpha, "beta")
    assert beta.control is None


def test_a_host_that_is_not_there_is_said(hosts: Both) -> None:
    alpha, beta = hosts.pair()
    control = alpha.start()
    beta.listener.close()
    control.want("beta")
    assert "cannot connect: 127.0.0.1 port" in refusal(alpha, "beta")
    row = control.records["beta"]
    assert row.state == "failed" and row.since > 0
    until(lambda: not control._meetings["beta"].busy)
    control.want("beta")
    until(lambda: len(alpha.engine.refused["beta"]) == 2)


def test_a_host_that_accepts_and_says_nothing_is_given_up(hosts: Both) -> None:
    alpha, _ = hosts.pair()
    alpha.start(deadline=0.3).want("beta")
    assert refusal(alpha, "beta").startswith("no answer in time")


# -- strangers --------------------------------------------------------------------------------------------------


def speak(side: Side, data: bytes, who: Side | None = None) -> bytes:
    """All that `side` says to somebody who says `data`, in TLS as `who` if that is given, until it hangs up."""
    with contextlib.ExitStack() as stack:
        sock: socket.socket = stack.enter_context(socket.create_connection(("127.0.0.1", side.port), 20))
        if who is not None:
            context = identity.load(who.folder).dialing(side.name)
            sock = stack.enter_context(context.wrap_socket(sock))
        answer = b""
        with contextlib.suppress(OSError):
            sock.sendall(data)
            while said := sock.recv(1 << 16):
                answer += said
        return answer


@pytest.mark.parametrize(
    "data", [b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(1 << 16), b"\x16\x03\x01" + b"\xff" * 9000]
)
def test_strangers_are_dropped_and_others_served(hosts: Both, data: bytes) -> None:
    alpha, beta = hosts.pair()
    beta.start(deadline=0.5)
    speak(beta, data)
    alpha.start().want("beta")
    agreed(alpha, beta)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{}\n", b"not understood"),
        (b"\xff\xfe\n", b"not understood"),
        (b'{"is":"go"}\n', b"something else than a greeting"),
        (b"x" * (setup.MOST + 1), b"more than it should"),
        (b'{"is":"go"}\n{"is":"go"}\n', b"more than it should"),
        (b"[" * 4000 + b"\n", b"not understood"),
        (b'{"is":"hello"', b""),
    ],
)
def test_a_peer_that_talks_nonsense_is_told_so_or_dropped(hosts: Both, data: bytes, said: bytes) -> None:
    alpha, beta = hosts.pair()
    beta.start(deadline=1.0)
    answer = speak(beta, data, alpha)
    assert said in answer
    assert not beta.engine.attached
    alpha.start().want("beta")
    agreed(alpha, beta)


def test_more_strangers_than_there_is_room_for_are_hung_up_on(
    hosts: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snap.modules.pony.control.HALF_OPEN", 2)
    _, beta = hosts.pair()
    beta.start(deadline=3.0)
    silent = [socket.create_connection(("127.0.0.1", beta.port), 20) for _ in range(2)]
    until(lambda: beta.control._guests._value == 0)  # type: ignore[union-attr]
    assert speak(beta, b"") == b""  # at once: nobody listened to it
    assert beta.control._guests._value == 0  # type: ignore[union-attr]
    for each in silent:
        each.close()


def test_only_where_the_engine_runs_are_peers_accepted(hosts: Both) -> None:
    """Two processes share the socket, as a generation that serves and one that waits do."""
    alpha, beta = hosts.pair()
    waiting = Side.__new__(Side)
    waiting.__dict__ |= beta.__dict__ | {"engine": type(beta.engine)(), "listener": beta.listener.dup()}
    waiting.engine.running = False
    hosts.sides.append(waiting)
    waiting.start()
    beta.start()
    control = alpha.start()
    for _ in range(5):
        alpha.engine.attached.clear()
        control.want("beta")
        agreed(alpha, beta)
    assert not waiting.engine.attached


def test_an_engine_that_left_in_the_middle_ends_a_set_up_without_a_word(hosts: Both) -> None:
    alpha, beta = hosts.pair()
    beta.start()
    control = alpha.start()
    alpha.engine.running = False
    control.want("beta")
    until(lambda: not control._meetings["beta"].busy)
    assert not alpha.engine.refused and control.records["beta"].error == ""


# -- identities -------------------------------------------------------------------------------------------------


def test_a_key_is_private_never_replaced_unless_forced_and_its_certificate_pins_it(tmp_path: Path) -> None:
    made = identity.make(tmp_path / "etc", "alpha")
    assert made.key.stat().st_mode & 0o777 == 0o600
    first = made.own
    with pytest.raises(Exception, match="has a key already"):
        identity.make(tmp_path / "etc", "alpha")
    assert made.own == first
    assert identity.make(tmp_path / "etc", "alpha", force=True).own != first
    der = ssl.PEM_cert_to_DER_cert(made.certificate.read_text())
    assert identity.fingerprint(der) == identity.load(tmp_path / "etc").own


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    identity.make(tmp_path, "alpha").key.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        identity.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("pony.key", None, "snapctl pony key"),
        ("pony.pem", "nonsense", "not a certificate"),
        ("peers/beta.pem", "nonsense", "beta.pem: not a certificate"),
        ("peers/beta.pem", b"\xff", "beta.pem: not a certificate"),
        ("peers/beta.pem", "own", "of this host itself as well"),
        ("pony.key", "nonsense", "pony.key: "),
    ],
)
def test_broken_files_of_keys_are_named(tmp_path: Path, file: str, text: Any, said: str) -> None:
    made = identity.make(tmp_path, "alpha")
    (tmp_path / "peers").mkdir()
    path = tmp_path / file
    if text is None:
        path.unlink()
    else:
        path.write_bytes(
            made.certificate.read_bytes()
            if text == "own"
            else text
            if isinstance(text, bytes)
            else text.encode()
        )
    with pytest.raises(UsageError, match=said):
        identity.load(tmp_path)


def test_the_payload_of_a_path_is_that_of_its_interface() -> None:
    assert streams.path_payload(socket.AF_INET, "127.0.0.1") == setup.LARGEST_MTU
