"""Two kernels with a module `pony` each, on loopback: set up as operators do it, and upgraded and killed while applications
of both talk."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snap.ipc import connect
from snap.modules.pony import NoPeerError, Pony, Right, identity

from .conftest import OWNER_MAY_ALL, KernelProcess
from .waiting import until

SOON = 30.0
ARENA = 4 << 20
POLICY = OWNER_MAY_ALL + "[modules.pony]\nautostart = true\n"


def free_port() -> int:
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        port: int = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        return port


class Hosts:
    """`alpha` and `beta`, and an application on each: `near` on alpha."""

    def __init__(
        self, kernel: Callable[..., KernelProcess], folder: Path, patch: pytest.MonkeyPatch, options: str
    ) -> None:
        names = ("alpha", "beta")
        ports = {name: free_port() for name in names}
        for name, other in (names, names[::-1]):
            home = folder / name
            made = identity.make(home, name)
            (home / "pony.toml").write_text(
                f'name = "{name}"\nlisten = "127.0.0.1"\ntcp_port = {ports[name]}\nudp_port = {ports[name]}\n'
                f'{options}\n[peers.{other}]\naddress = "127.0.0.1:{ports[other]}"\n'
            )
            (folder / other / "peers").mkdir(parents=True, exist_ok=True)
            (folder / other / "peers" / f"{name}.pem").write_text(made.certificate.read_text())
        self.kernels = []
        for name in names:
            patch.setenv("SNAP_CONFIG_DIR", str(folder / name))
            self.kernels.append(kernel(policy=POLICY))
        self.clients = [connect(runtime_dir=each.directory) for each in self.kernels]
        self.near, self.far = (Pony.open(client, ARENA) for client in self.clients)
        self.far.bind("store")
        self.out = self.near.connect("beta/store", timeout=SOON)
        self.back = self.far.accept(SOON)

        self.shared = "shared_memory" not in options

    def flows(self) -> list[dict[str, Any]]:
        """That of alpha, that of beta."""
        found = []
        for client in self.clients:
            with client.open("pony-control", timeout=SOON) as channel:
                channel.send(b'{"list": "flows"}', timeout=SOON)
                found += json.loads(channel.recv(timeout=SOON)).get("items", [{"port": "none"}])
        return found

    def ports(self) -> set[str]:
        return {flow["port"] for flow in self.flows()}

    def close(self) -> None:
        for each in (self.near, self.far, *self.clients):
            each.close()


HOWS = {
    "sealed": "shared_memory = false",
    "clear": 'shared_memory = false\nencryption = "off"',
    "wire": "",
}


@pytest.fixture(params=HOWS)
def hosts(
    kernel: Callable[..., KernelProcess],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Hosts]:
    made = Hosts(kernel, tmp_path, monkeypatch, HOWS[request.param])
    try:
        yield made
    finally:
        made.close()


def upgrade(it: KernelProcess) -> None:
    with it.control() as operator:
        view = operator.call("module.upgrade", timeout=60, name="pony", source=None, bake=0.0)
    assert view["outcome"] == "committed", view


def kill(it: KernelProcess) -> None:
    with it.control() as operator:
        before = operator.call("module.show", name="pony")["pid"]
        os.kill(before, signal.SIGKILL)
        until(lambda: operator.call("module.show", name="pony")["pid"] not in (None, before))


def test_upgrades_and_crashes_on_both_hosts_lose_double_and_reorder_nothing(hosts: Hosts) -> None:
    words = hosts.far.place(64)
    handle = hosts.far.register(words, Right.READ | Right.ATOMIC).handle
    rng = np.random.default_rng(5)
    source, target = hosts.near.place(1 << 20), hosts.far.place(1 << 20)
    near, far = hosts.kernels
    added = 0
    for turn, (event, host) in enumerate([(upgrade, near), (upgrade, far), (kill, near), (kill, far)]):
        source.array()[:] = rng.integers(0, 256, source.size)
        for number in range(30):
            hosts.out.send(b"%d/%d" % (turn, number))
        send, receive = hosts.out.begin_send_from(source), hosts.back.begin_receive_into(target)
        adds = [hosts.out.begin_fetch_add(handle, 0, 1) for _ in range(30)]
        event(host)
        assert [hosts.back.recv(SOON).data for _ in range(30)] == [b"%d/%d" % (turn, n) for n in range(30)]
        assert receive.result(SOON) == source.size == send.result(SOON)
        assert bytes(target.view) == bytes(source.view)
        assert sorted(add.result(SOON) for add in adds) == list(range(added, added + 30))
        added += 30
    assert words.array("<u8")[0] == added


def test_hosts_of_one_machine_have_a_wire_if_they_want_one_and_another_one_after_a_crash(
    hosts: Hosts,
) -> None:
    ports = {"shared memory"} if hosts.shared else {"udp"}
    until(lambda: hosts.ports() == ports)
    for number, it in enumerate(hosts.kernels):
        before = [flow["epoch"] for flow in hosts.flows()]
        kill(it)
        hosts.out.send(b"%d" % number)
        hosts.back.send(b"%d" % number)
        assert hosts.back.recv(SOON).data == hosts.out.recv(SOON).data == b"%d" % number
        until(lambda: hosts.ports() == ports)
        assert [flow["epoch"] for flow in hosts.flows()][number] > before[number]


def test_hosts_that_are_not_known_or_do_not_answer_are_said(hosts: Hosts) -> None:
    with pytest.raises(NoPeerError):
        hosts.near.connect("gamma/store", timeout=SOON)
    with pytest.raises(NoPeerError):
        hosts.near.connect("beta/nobody", timeout=SOON)
    # Known at beta only by what alpha set up: the way back needs no set-up of its own.
    hosts.near.bind("back")
    hosts.far.connect("alpha/back", timeout=SOON).send(b"found")
    assert hosts.near.accept(SOON).recv(SOON).data == b"found"
