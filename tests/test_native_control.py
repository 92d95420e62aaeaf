"""A module's class and its native engine: descriptors, requests, and what the engine says."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane.errors import NotRunningError
from snap.ipc.manifest import from_builtins
from snap.ipc.protocol import Broken, Loaded, Message, Refused, Started
from snap.modules import Module, host
from snap.modules.host import Host
from tests.host_rig import Kernel, manifest, package
from tests.waiting import LIMIT


def module(ask: Any = None) -> Module:
    made = Module(from_builtins(manifest("echo", "native:echo")), sys)
    made.ask = ask
    return made


def test_without_a_host_no_engine_answers() -> None:
    with pytest.raises(NotRunningError, match="'echo' does not run here"):
        module().request("echo", b"?")
    assert module(lambda engine, request: request + engine.encode()).request("x", b"?") == b"?x"
    assert list(module().descriptors("echo")) == []


def test_descriptors_go_to_the_engine_which_may_want_none(tmp_path: Path) -> None:
    """The echo engine refuses what it has no use for: that shows that it got it."""
    code = """
    import os
    from snap.modules import Module
    class M(Module):
        def on_start(self): self.fd = os.memfd_create("for the engine")
        def descriptors(self, engine):
            assert engine == "echo"
            return [self.fd]
    """
    kernel = Kernel()
    try:
        path = package(tmp_path, "given", code)
        kernel.configure(path, manifest("given", "native:echo", entry="engine:M"))
        kernel.hear(Started)
        kernel.hear(Loaded)
        kernel.prepare()
        while not isinstance(answer := kernel.hear(Message), Refused):
            pass  # reports of its progress
        assert "wants no descriptors" in answer.message
    finally:
        kernel.close()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def descriptors(self, engine): raise OSError('no port')", "no port"),
        ("def on_start(self): self.request('echo', b'?')", "does not run here"),
    ],
)
def test_what_a_hook_raises_is_why_the_module_does_not_start(tmp_path: Path, body: str, said: str) -> None:
    kernel = Kernel()
    try:
        path = package(tmp_path, "bad", f"from snap.modules import Module\nclass M(Module):\n    {body}\n")
        kernel.configure(path, manifest("bad", "native:echo", entry="engine:M"))
        kernel.hear(Started)
        broken = kernel.hear(Broken)
        assert broken.stage == "start" and said in broken.error
    finally:
        kernel.close()


class Hearing(Module):
    heard: list[tuple[str, bytes]]
    go: threading.Event
    done: threading.Event

    def on_said(self, engine: str, said: bytes) -> None:
        assert self.go.wait(LIMIT)
        self.heard.append((engine, said))
        if said == b"last":
            self.done.set()
        if said == b"bad":
            raise ValueError("not understood")


@pytest.fixture
def hearing(monkeypatch: pytest.MonkeyPatch) -> Any:
    served = Host.__new__(Host)
    served._said, served._said_to, served.seats = host.SimpleQueue(), False, {}
    module = Hearing(from_builtins(manifest("echo", "native:echo")), sys)
    module.heard, module.go, module.done = [], threading.Event(), threading.Event()
    served._module = module
    return served


def test_what_an_engine_says_waits_for_its_module_in_order_and_holds_nobody_up(hearing: Any) -> None:
    for said in (b"first", b"second", b"last"):
        hearing.said("echo", said)  # returns, though nobody listens yet
    hearing._module.go.set()
    assert hearing._module.done.wait(LIMIT)
    assert hearing._module.heard == [("echo", b"first"), ("echo", b"second"), ("echo", b"last")]


def test_a_hook_that_raises_ends_the_module(hearing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    posted = threading.Event()
    failed: list[Any] = []
    monkeypatch.setattr(Host, "post", lambda self, action: (action(), posted.set()))
    monkeypatch.setattr(Host, "fail", lambda self, broken: failed.append(broken))
    hearing._module.go.set()
    hearing.said("echo", b"bad")
    assert posted.wait(LIMIT)
    assert failed[0].stage == "run" and "not understood" in failed[0].error


def test_an_engine_that_is_not_there_yet_answers_nobody(hearing: Any) -> None:
    with pytest.raises(NotRunningError, match="not loaded yet"):
        hearing._ask("echo", b"?")
