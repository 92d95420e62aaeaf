"""A module's process against a kernel that the test plays: the link, and what outlives the process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, TypeVar

import sysv_ipc  # type: ignore[import-not-found]

from snap.dataplane import _native
from snap.ipc import seqpacket
from snap.ipc.protocol import (
    Attach,
    Configure,
    Decoder,
    FromModule,
    Loaded,
    Message,
    Prepare,
    Prepared,
    Serving,
    Started,
    Took,
    encode,
)
from snap.modules.testing import ChannelPair

LIMIT = 10.0
T = TypeVar("T")


class Ground:
    """What outlives the processes of a module: gate, statistics, state, and the semaphore of its engine "echo"."""

    def __init__(self, state_bytes: int = 1 << 20) -> None:
        sizes = {
            "gate": _native.Gate.BYTES,
            "stats": _native.StatsPage.BYTES,
            "state": _native.State.MIN_BYTES + state_bytes,
        }
        self.fds = {name: os.memfd_create(name, os.MFD_CLOEXEC) for name in sizes}
        for name, size in sizes.items():
            os.ftruncate(self.fds[name], size)
        self.gate = _native.Gate(self.fds["gate"])
        self.semaphore = sysv_ipc.Semaphore(None, sysv_ipc.IPC_CREX, mode=0o600, initial_value=1)

    def blank(self, size: int = 1 << 20) -> int:
        """Another state segment."""
        name = f"state {len(self.fds)}"
        self.fds[name] = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self.fds[name], _native.State.MIN_BYTES + size)
        return self.fds[name]

    def close(self) -> None:
        self.gate.close()
        with contextlib.suppress(sysv_ipc.ExistentialError):
            self.semaphore.remove()
        for fd in self.fds.values():
            os.close(fd)


class Kernel:
    """The kernel's end of one module's link, played by the test."""

    def __init__(
        self, *, extra_fd: int | None = None, ground: Ground | None = None, faults: Path | None = None
    ) -> None:
        self.ground = ground or Ground()
        self._owns_ground = ground is None
        self.fds = self.ground.fds
        self.came: list[int] = []
        self.sock, theirs = seqpacket.pair()
        self.sock.settimeout(LIMIT)
        self._decoder: Decoder[Message] = Decoder(FromModule)
        inherited = [theirs.fileno()] + ([] if extra_fd is None else [extra_fd])
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "snap.modules.host"],
                env={
                    **os.environ,
                    "SNAP_LINK_FD": str(theirs.fileno()),
                    **({} if faults is None else {"SNAP_FAULT_DIR": str(faults)}),
                },
                pass_fds=inherited,
                stderr=subprocess.PIPE,
                text=True,
            )

    def tell(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        try:
            seqpacket.send(self.sock, encode(message), fds)
        except BrokenPipeError:
            raise AssertionError(f"the process ended: {self.process.communicate()[1]}") from None

    def configure(self, path: Path, manifest: dict[str, Any], generation: int = 1, **kept: int) -> None:
        name = manifest["module"]["name"]
        order = Configure(
            name=name, generation=generation, manifest=manifest, path=str(path), kept=list(kept)
        )
        self.tell(order, (self.fds["gate"], self.fds["stats"], *kept.values()))

    def prepare(self, *fds: int) -> None:
        self.tell(Prepare(engine="echo", semaphore=self.ground.semaphore.id), fds or (self.fds["state"],))

    def prepared(self, *fds: int) -> Prepared:
        self.prepare(*fds)
        while not isinstance(message := self.hear(Message), Prepared):
            pass
        return message

    def hear(self, kind: type[T]) -> T:
        data, self.came = seqpacket.recv(self.sock)
        assert data, f"the module's process ended: {self.process.communicate()[1]}"
        message = self._decoder.decode(data)
        assert isinstance(message, kind), message
        return message

    def serve(self, path: Path, manifest: dict[str, Any]) -> None:
        self.configure(path, manifest)
        assert self.hear(Started).pid == self.process.pid
        self.hear(Loaded)
        self.prepared()
        self.hear(Took)
        self.hear(Serving)

    def attach(self, pair: ChannelPair, engine: str = "echo", **change: Any) -> None:
        order: dict[str, Any] = {
            "seq": 1, "channel": pair.server.id, "generation": 1, "service": "echo", "engine": engine, "badge": "b",
            "rights": ["send", "recv"], "slots": 256, "up_bytes": 1 << 20, "down_bytes": 1 << 20,
            "gate_index": pair.server.id, "arena_bytes": 0,
        }  # fmt: skip
        self.ground.gate.open(pair.server.id, 1)
        self.tell(Attach(**(order | change)), pair.descriptors)

    def ended(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=LIMIT)[1]
        return self.process.returncode, said

    def close(self) -> None:
        self.sock.close()
        if self.process.poll() is None:
            self.process.kill()
        with contextlib.suppress(ValueError):  # what it said was read already
            self.process.communicate()
        if self._owns_ground:
            self.ground.close()


def manifest(name: str, target: str, **more: Any) -> dict[str, Any]:
    return {
        "module": {"name": name, "version": "1", **more},
        "engines": {"echo": {"class": target}},
        "provides": {"echo": {"engine": "echo"}},
    }


def package(folder: Path, name: str, code: str) -> Path:
    path = folder / name
    path.mkdir()
    (path / "engine.py").write_text(textwrap.dedent(code))
    return path
