"""What operators ask in vain, twice, or without the right to: a named error, and nothing for the others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from snap.dataplane.errors import DeniedError, SnapError, UsageError
from snap.ipc import paths, protocol
from snap.kernel.control import Control
from tests.kernel_rig import Rig, run, served, write_module


@asynccontextmanager
async def controlled(tmp_path: Path, rules: dict[str, Any] | None = None) -> AsyncIterator[tuple[Rig, Any]]:
    """A kernel with its control plane, and `ask(bytes or Request) -> Response`."""
    async with served(tmp_path, rules) as rig:
        kernel = rig.kernel
        control = Control(rig.directory, rig.operators, kernel.answers, kernel.events, kernel.outbox)
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(f"ipc://{rig.directory / paths.CONTROL}")

            async def ask(message: bytes | protocol.Request) -> protocol.Response:
                await dealer.send(message if isinstance(message, bytes) else protocol.encode(message))
                async with asyncio.timeout(10):
                    return protocol.Decoder[protocol.Response](protocol.Response).decode(await dealer.recv())

            try:
                yield rig, ask
            finally:
                await control.close()


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"", "protocol"),
        (b"\xc1\xc1", "protocol"),
        (msgspec.msgpack.encode({"key": "k"}), "protocol"),
        (msgspec.msgpack.encode({"key": 1, "op": "kernel.status"}), "protocol"),
        (protocol.Request(key="k", op="kernel.explode"), "usage"),
        (protocol.Request(key="k", op="module.show"), "usage"),
        (protocol.Request(key="k", op="module.show", args={"name": 7}), "usage"),
        (protocol.Request(key="k", op="module.show", args={"name": "mine", "extra": 1}), "usage"),
        (protocol.Request(key="k", op="module.show", args={"name": "no-such"}), "not_found"),
        (protocol.Request(key="k", op="module.start", args={"name": "../../etc"}), "not_found"),
        (protocol.Request(key="k", op="cap.revoke", args={"id": 999}), "not_found"),
        (protocol.Request(key="k", op="cap.inspect", args={"id": -1}), "not_found"),
        (protocol.Request(key="k", op="cap.why", args={"who": "the king", "service": "mine"}), "usage"),
        (
            protocol.Request(
                key="k", op="cap.grant", args={"owner": "nobody", "service": "mine", "rights": ["send"]}
            ),
            "not_found",
        ),
    ],
)
def test_a_bad_request_of_an_operator_is_answered_by_name(
    tmp_path: Path, message: bytes | protocol.Request, code: str
) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (_, ask):
            answer = await ask(message)
            assert (answer.ok, answer.code) == (False, code)
            assert (await ask(protocol.Request(key="s", op="kernel.status"))).ok

    run(test())


def test_an_operator_is_who_the_operating_system_says(tmp_path: Path) -> None:
    rules = {"operator": [{"who": f"uid:{os.getuid() + 1}", "rights": ["operate", "inspect"]}]}

    async def test() -> None:
        async with controlled(tmp_path, rules) as (rig, ask):
            answer = await ask(protocol.Request(key="k", op="kernel.status"))
            assert answer.code == "denied"
            assert f"uid:{os.getuid()}" in answer.message
            assert rig.audited("no [[operator]]")

    run(test())


def test_who_may_look_may_not_act(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (rig, ask):
            rules = msgspec.structs.replace(rig.kernel.policy.rules, operator=[])
            assert (await ask(protocol.Request(key="k", op="kernel.status"))).ok
            rig.kernel.policy = type(rig.kernel.policy)("test", rules)
            assert (
                await ask(protocol.Request(key="k", op="module.stop", args={"name": "mine"}))
            ).code == "denied"
            with pytest.raises(DeniedError):
                await rig.operators.perform(None, "kernel.status", {}, 1.0)
            with pytest.raises(UsageError):
                await rig.operators.perform(None, "nothing", {}, 1.0)

    run(test())


def test_a_repeated_key_gets_the_first_answer_and_is_done_once(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "second")

    async def test() -> None:
        async with controlled(tmp_path) as (rig, ask):
            write = protocol.Request(key="once", op="module.restart", args={"name": "second"})
            first, second = await ask(write), await ask(write)
            assert first.ok
            assert first == second
            assert rig.kernel.module_view("second").generation == 1

    run(test())


def test_one_request_that_waits_holds_up_no_other(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "slow", "import time; time.sleep(3600)")

    async def test() -> None:
        async with controlled(tmp_path) as (rig, ask):
            rig.kernel.runner("slow").restart()
            slow = protocol.Request(key="s", op="module.restart", args={"name": "slow"}, timeout=2.0)
            waiting = asyncio.create_task(rig.operators.perform(rig.me, slow.op, slow.args, 2.0))
            assert (await ask(protocol.Request(key="q", op="module.list"))).ok
            assert not waiting.done()
            with pytest.raises(SnapError):
                await waiting

    run(test())
