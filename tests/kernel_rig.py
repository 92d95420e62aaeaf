"""A kernel inside the test's own event loop, its modules and sockets real."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from snap.ipc import aconnect, paths, protocol, seqpacket
from snap.kernel import bootstrap, operations, policy
from snap.kernel.kernel import HOST, Kernel, Settings
from snap.kernel.operators import Operators
from snap.kernel.policy import Identity
from snap.kernel.supervision import Limits

PATIENCE = 60.0
LIMITS = Limits(
    start_timeout=PATIENCE,
    grace=1,
    backoff_first=0.05,
    backoff_most=0.2,
    crashes=4,
    window=PATIENCE,
    heartbeat=PATIENCE,
)
"""A busy machine makes nobody hang."""

HASTY = replace(LIMITS, start_timeout=3, heartbeat=1.5)
"""For tests that wait until a hang is found."""


MANIFEST = """\
[module]
name = "{name}"
version = "1"
[provides.{name}]
engine = "main"
[engines.main]
class = "engine:Main"
wait = "blocking"
{more}
"""

ECHO = """\
from snap.modules import Engine

class Main(Engine):
    def poll(self, budget):
        done = 0
        for channel in self.channels:
            messages = channel.recv_many(budget, timeout=0)
            channel.send_many(messages)
            done += len(messages)
        return done
"""

ALLOW_ALL = {
    "version": 1,
    "allow": [
        {"who": "any", "service": "*", "rights": ["connect", "send", "recv", "copy", "move", "delegate"]}
    ],
    "operator": [{"who": "owner", "rights": ["operate", "inspect"]}],
}


def write_module(
    base: Path, name: str, code: str = ECHO, more: str = "", manifest: str | None = None
) -> None:
    """A module `name` in the directory `base`, with `code` as its engine.py."""
    package = base / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "engine.py").write_text(code)
    (package / "module.toml").write_text(manifest or MANIFEST.format(name=name, more=more))


class Rig:
    """A running kernel and what tests do to it."""

    def __init__(self, kernel: Kernel, directory: Path) -> None:
        self.kernel = kernel
        self.directory = directory
        self.operators = Operators(kernel)

    @property
    def me(self) -> Identity:
        return Identity(self.kernel.uid, 0, 1)

    async def operate(self, op: str, within: float = PATIENCE, **args: Any) -> Any:
        return msgspec.to_builtins(await self.operators.perform(self.me, op, args, within))

    async def up(self, name: str) -> None:
        """Start a module and wait until it is ready, whoever may do that."""
        begin = self.kernel.runner(name).operations.run
        await begin(operations.START, lambda: self.kernel.start(name), PATIENCE, wait=True)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.kernel.events.since(0, 10_000)]

    def event(self, kind: str) -> Any:
        return next(event for event in self.kernel.events.since(0, 10_000) if event.kind == kind)

    def audited(self, text: str) -> bool:
        return any(text in json.loads(line)["reason"] for line in self.kernel.audit.tail(1000))

    async def until(self, what: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not what():
                await asyncio.sleep(0.01)

    async def application(self) -> Application:
        application = Application(self.directory)
        await application.ask(protocol.Hello(version=protocol.PROTOCOL_VERSION))
        return application


class Application:
    """A bare connection to the bootstrap socket, for saying what the client library never would."""

    _decoder: protocol.Decoder[Any] = protocol.Decoder(protocol.ToPrincipal)

    def __init__(self, directory: Path) -> None:
        self.sock = seqpacket.connect(directory / paths.BOOTSTRAP)
        self.sock.setblocking(False)
        self.fds: list[int] = []

    def say(self, data: bytes | msgspec.Struct, fds: Sequence[int] = ()) -> None:
        seqpacket.send(self.sock, data if isinstance(data, bytes) else protocol.encode(data), fds)

    async def hear(self) -> Any:
        """The next message, None at the end; its descriptors become `fds`."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    data, fds = seqpacket.recv(self.sock)
                except BlockingIOError:
                    await asyncio.sleep(0.005)
                    continue
                except ConnectionError:
                    return None
                seqpacket.close_all(self.fds)
                self.fds = fds
                return self._decoder.decode(data) if data else None

    async def ask(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> Any:
        """Say it and hear the answer; None when the kernel has hung up."""
        try:
            self.say(message, fds)
        except ConnectionError:
            return None
        return await self.hear()

    def close(self) -> None:
        seqpacket.close_all(self.fds)
        self.fds = []
        self.sock.close()

    def __enter__(self) -> Application:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@asynccontextmanager
async def running(
    base: Path,
    rules: dict[str, Any] | None = None,
    limits: Limits = LIMITS,
    host: Sequence[str] = HOST,
    start: Sequence[str] = (),
) -> AsyncIterator[Rig]:
    """A kernel on `base`/run with the modules in `base`/modules; `start` names those to have ready."""
    directory = base / "run"
    directory.mkdir(exist_ok=True, mode=0o700)
    (base / "modules").mkdir(exist_ok=True)
    settings = Settings(
        runtime_dir=directory,
        policy=policy.parse({**ALLOW_ALL, **(rules or {})}, "test"),
        module_path=[base / "modules"],
        host=host,
        limits=limits,
    )
    socket_path = directory / paths.BOOTSTRAP
    with bootstrap.listen(socket_path) as listener:
        kernel = Kernel(settings, listener)
        try:
            rig = Rig(kernel, directory)
            for name in start:
                await rig.up(name)
            yield rig
        finally:
            await kernel.stop()
            kernel.close()
            socket_path.unlink()


@asynccontextmanager
async def served(tmp_path: Path, rules: dict[str, Any] | None = None) -> AsyncIterator[Rig]:
    """A kernel with a module `mine`; a client that talks to it before must be able to talk to it after."""
    if not (tmp_path / "modules" / "mine").exists():
        write_module(tmp_path / "modules", "mine")
    async with running(tmp_path, rules, start=["mine"]) as rig, await aconnect(rig.directory) as bystander:
        channel = await bystander.aopen("mine", slots=64, up_bytes=4096, down_bytes=4096)
        await channel.asend(b"before")
        assert await channel.arecv(timeout=10) == b"before"
        yield rig
        await channel.asend(b"after")
        assert await channel.arecv(timeout=10) == b"after"
        assert (await bystander.alookup("mine")).ready
        channel.close()


def run(test: Awaitable[None]) -> None:
    """Run one test; what its kernel could not catch is an error of the test."""
    faults: list[dict[str, Any]] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        await test

    asyncio.run(guarded())
    assert not faults


def fake_host(base: Path, code: str) -> list[str]:
    """The command of a process that has the module's link as the socket `link`, and does `code` with it."""
    script = base / "fake_host.py"
    script.write_text(
        "import os, socket, time, sys\n"
        "from snap.ipc import protocol, seqpacket\n"
        "link = socket.socket(fileno=int(os.environ['SNAP_LINK_FD']))\n"
        "configure, fds = seqpacket.recv(link)\n"
        "def say(message): seqpacket.send(link, protocol.encode(message))\n"
        "say(protocol.Started(pid=os.getpid()))\n" + code
    )
    return [sys.executable, str(script)]


SERVES = (
    "schema = protocol.StateSchema(name='fake', version=1, oldest=1)\n"
    "say(protocol.Loaded(schemas={'main': schema}))\n"
    "seqpacket.recv(link)\n"  # Prepare
    "say(protocol.Took(engine='main', last_poll_ns=0, first_poll_ns=1))\n"
    "say(protocol.Serving(engines=['main']))\n"
)
"""What a `fake_host` says when the one engine `main` of a module runs."""
