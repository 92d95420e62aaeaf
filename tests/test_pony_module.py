"""The control side of Pony in a module's process, under a real kernel: its sockets, and what operators ask."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane.errors import NotRunningError, ResourceError, SnapError, UsageError
from snap.ipc.manifest import load
from snap.modules.pony import config, identity
from snap.modules.pony.module import PonyModule
from snap.modules.pony.service import ControlEngine
from snap.modules.testing import EngineHarness
from tests.conftest import OWNER_MAY_ALL, KernelProcess
from tests.pony_rig import FakeEngine
from tests.waiting import LIMIT, until

SHIPPED = Path(sys.modules[PonyModule.__module__].__file__ or "").parent
POLICY = OWNER_MAY_ALL.replace("[modules.echo]\nautostart = true\n", "")

# The shipped module but for its engines' names; its native engine is given nothing, and each process writes down the
# ports that it has.
MANIFEST = """
[module]
name = "netpony"
version = "1"
entry = "main:Main"
[engines.pony]
class = "native:pony"
state = "256MiB"
[engines.control]
class = "main:Control"
[provides.netpony]
engine = "pony"
[provides.netpony-control]
engine = "control"
"""
CODE = """
from snap.ipc.paths import config_dir
from snap.modules.pony.module import PonyModule
from snap.modules.pony.service import ControlEngine

class Control(ControlEngine):
    pass

class Main(PonyModule):
    def on_start(self):
        super().on_start()
        ports = [each.getsockname()[1] for each in (self.listener, *self.sockets)]
        with (config_dir() / "ports").open("a") as file:
            print(*ports, file=file)

    def descriptors(self, engine):
        return []
"""


def configure(
    folder: Path, text: str = 'name = "alpha"\nlisten = "127.0.0.1"\ntcp_port = 0\nudp_port = 0\n'
) -> Path:
    identity.make(folder, "alpha")
    (folder / config.FILE).write_text(text)
    return folder


def ask(kernel: KernelProcess, service: str, what: str) -> dict[str, Any]:
    with kernel.connect() as client, client.open(service, timeout=LIMIT) as channel:
        channel.send(json.dumps({"list": what}).encode())
        answer: dict[str, Any] = json.loads(channel.recv(timeout=LIMIT))
        return answer


def test_sockets_outlive_upgrades_restarts_and_crashes(
    kernel: Callable[..., KernelProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etc = configure(tmp_path / "etc")
    monkeypatch.setenv("SNAP_CONFIG_DIR", str(etc))
    package = tmp_path / "modules" / "netpony"
    package.mkdir(parents=True)
    (package / "module.toml").write_text(MANIFEST)
    (package / "main.py").write_text(textwrap.dedent(CODE))
    (etc / "peers").mkdir()
    pem = identity.make(tmp_path / "other", "beta").certificate.read_text()
    (etc / "peers" / "beta.pem").write_text(pem)

    def ports() -> list[str]:
        return (etc / "ports").read_text().splitlines()

    started = kernel(POLICY + "[modules.netpony]\nautostart = true\n", modules=package.parent)
    row = {"host": "beta", "address": "", "state": "idle", "since": 0.0, "error": ""}
    found = ask(started, "netpony-control", "peers")["items"][0]
    assert {key: found[key] for key in row} == row
    with started.control() as operator:
        (package / "module.toml").write_text(MANIFEST.replace('version = "1"', 'version = "2"'))
        view = operator.call("module.upgrade", timeout=60, name="netpony", source=None, bake=0.0)
        assert view["outcome"] == "committed", view
        assert len(ports()) == 2
        os.kill(operator.call("module.show", name="netpony")["pid"], signal.SIGKILL)
        until(lambda: len(ports()) == 3)
        assert ask(started, "netpony-control", "peers")["items"] == [found]
    assert len(set(ports())) == 1
    tcp, *udp = ports()[0].split()
    assert len({tcp, *udp}) >= 5 and "0" not in udp


def test_the_shipped_module_stays_local_without_a_configuration(
    kernel: Callable[..., KernelProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAP_CONFIG_DIR", str(tmp_path / "none"))
    started = kernel(POLICY + "[modules.pony]\nautostart = true\n")
    assert ask(started, "pony-control", "peers") == {"items": []}
    with started.control() as operator:
        pid = operator.call("module.show", name="pony")["pid"]
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]  # noqa: PTH115
    sockets = {f"socket:[{line.split()[9]}]" for line in Path("/proc/net/udp").read_text().splitlines()[1:]}
    assert not sockets.intersection(links)


# -- without a kernel -------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a module whose engine is played; everything that it opens is closed at the end."""
    monkeypatch.setenv("SNAP_CONFIG_DIR", str(tmp_path))
    made: list[PonyModule] = []

    def make(kept: dict[str, int] | None = None) -> PonyModule:
        module = PonyModule(load(SHIPPED), sys, kept=kept)
        engine = FakeEngine()
        module.ask = lambda name, request: json.dumps(engine(json.loads(request))).encode()
        module.__dict__["engine"], module.__dict__["told"] = engine, {}
        monkeypatch.setattr(
            module, "keep", lambda name, fd: module.__dict__["told"].__setitem__(name, fd), raising=True
        )
        made.append(module)
        return module

    yield make
    for each in made:
        if each.control is not None:
            each.control.close()
        for sock in (each.listener, *each.sockets):
            if sock is not None:
                sock.close()


def test_what_was_kept_is_used_as_long_as_it_is_what_the_file_says(module: Any, tmp_path: Path) -> None:
    configure(tmp_path)
    first = module()
    first.on_start()
    kept = dict(first.told)
    assert set(kept) == {"tcp", "udp.0", "udp.1", "udp.2", "udp.3"}
    assert first.descriptors("pony") == [kept[f"udp.{index}"] for index in range(4)]
    second = module(kept)
    second.on_start()
    assert second.told == {}
    assert [each.getsockname() for each in second.sockets] == [each.getsockname() for each in first.sockets]
    (tmp_path / config.FILE).write_text('listen = "127.0.0.2"\ntcp_port = 0\nudp_port = 0\npaths = 2\n')
    third = module(kept)
    third.on_start()
    assert {name for name, fd in third.told.items() if fd is not None} == {"tcp", "udp.0", "udp.1"}
    assert {name for name, fd in third.told.items() if fd is None} == {"udp.2", "udp.3"}
    assert third.sockets[0].getsockname()[0] == "127.0.0.2"


def test_a_port_that_is_taken_and_a_missing_key_are_said(module: Any, tmp_path: Path) -> None:
    configure(tmp_path)
    first = module()
    first.on_start()
    port = first.sockets[0].getsockname()[1]
    (tmp_path / config.FILE).write_text(f'listen = "127.0.0.1"\ntcp_port = 0\nudp_port = {port}\n')
    with pytest.raises(ResourceError, match=f"cannot bind .* port {port}"):
        module().on_start()
    (tmp_path / identity.KEY).unlink()
    with pytest.raises(UsageError, match="snapctl pony key"):
        module().on_start()


def test_who_wants_another_host_is_told_that_there_is_no_configuration(module: Any) -> None:
    local = module()
    local.on_start()
    local.on_said("pony", b'{"want": "beta"}')
    assert "keeps to itself" in local.engine.refused["beta"][0]
    local.on_said("pony", b'{"something": "else"}')
    local.engine.running = False
    local.on_said("pony", b'{"want": "beta"}')
    assert len(local.engine.refused) == 1


def test_what_the_engine_wants_is_dialed(module: Any, tmp_path: Path) -> None:
    configure(tmp_path)
    made = module()
    made.on_start()
    made.on_said("pony", b'{"want": "beta"}')
    assert "no certificate" in made.engine.refused["beta"][0]


def test_operators_are_answered_or_told_why_not(module: Any, tmp_path: Path) -> None:
    configure(tmp_path, 'listen = "127.0.0.1"\ntcp_port = 0\nudp_port = 0\n[peers.beta]\naddress = "x"\n')
    made = module()
    made.on_start()
    made.control.want("beta")
    made.control.want("made\nup")  # of which nothing is kept
    engine = ControlEngine()
    engine.module = made
    with EngineHarness(engine) as harness:
        client = harness.attach().client

        def answer(request: bytes) -> Any:
            client.send(request)
            harness.run()
            return json.loads(client.recv(timeout=0))

        assert answer(b'{"list": "regions"}') == {"items": []}
        (peer,) = answer(b'{"list": "peers"}')["items"]
        assert (peer["host"], peer["state"]) == ("beta", "failed") and "no certificate" in peer["error"]
        made.engine.attached["gamma"] = []
        assert answer(b'{"list": "flows"}') == {"items": [{"host": "gamma"}]}
        for nonsense in (b"", b"[]", b'{"list": 1}', b'{"list": "keys"}', b"\xff", b"[" * 3000):
            assert answer(nonsense) == {"error": "the request is not understood"}
        made.engine.running = False
        assert "runs elsewhere" in answer(b'{"list": "flows"}')["error"]
        assert len(answer(b'{"list": "peers"}')["items"]) == 1


def test_errors_of_the_engine_are_errors_of_snap() -> None:
    module = PonyModule(load(SHIPPED), sys)
    with pytest.raises(NotRunningError):
        module.ask_engine({"do": "flows"})
    assert issubclass(NotRunningError, SnapError)
