"""The process of a module: `python -m snap.modules.host`, with its link to the kernel in `SNAP_LINK_FD`.

The main thread serves the link and does nothing that can take long. Importing, building and starting the module
run on a thread of their own, and so does each engine: a module that hangs in its import or in a poll still answers
its kernel, and still ends when the kernel has gone.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final, NoReturn

import setproctitle

from snap.dataplane import _native
from snap.dataplane.errors import (
    NotFoundError,
    ProtocolError,
    ResourceError,
    SnapError,
    UnreachableError,
    UsageError,
)
from snap.ipc import seqpacket
from snap.ipc.manifest import EngineTable, Manifest, from_builtins
from snap.ipc.protocol import (
    Attach,
    Attached,
    Broken,
    Configure,
    Detach,
    Dropped,
    Failure,
    Serving,
    Started,
    Stop,
)

from .engine import Engine, ServerChannel
from .link import Link
from .loading import load_class, load_package
from .module import Module
from .worker import PythonWorker, Runner

LINK_FD: Final = "SNAP_LINK_FD"
_STANDARD: Final = 3
_WAITS: Final = {"spin": _native.SPIN, "adaptive": _native.ADAPTIVE, "blocking": _native.BLOCK}
_KERNEL_GONE_GRACE: Final = 2.0
_TRACEBACK: Final = 16_384
"""Characters of a traceback that fit a message whatever they are; its end says most."""


class Host:
    """Serves one module's link until it ends; `run` never returns."""

    def __init__(self, link: Link, order: Configure, gate_fd: int, stats_fd: int) -> None:
        self.link = link
        self.order = order
        self.workers: dict[str, Runner] = {}
        self._gate_fd, self._stats_fd = gate_fd, stats_fd
        self._module: Module | None = None
        self._served: dict[int, str] = {}
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = False

    def run(self) -> NoReturn:
        self._selector.register(self.link, selectors.EVENT_READ, self._serve_link)
        self._selector.register(self._bell, selectors.EVENT_READ, self._serve_posted)
        threading.Thread(target=self._start, name="start", daemon=True).start()
        try:
            while True:
                for key, _ in self._selector.select():
                    key.data()
        except UnreachableError:
            self._stop(_KERNEL_GONE_GRACE)
        except SnapError as error:
            print(f"module {self.order.name!r}: {type(error).__name__}: {error}", file=sys.stderr)
            self._stop(_KERNEL_GONE_GRACE, code=1)

    # -- on the starting thread -----------------------------------------------------------------------------

    def _start(self) -> None:
        stage = "import"
        try:
            manifest = from_builtins(self.order.manifest, f"manifest of {self.order.name}")
            package = load_package(Path(self.order.path), self.order.name)
            module = _module_class(package, manifest)(manifest, package, self.order.generation, self.link)
            stage = "start"
            module.running = module.engines()
            for name, engine in module.running.items():
                engine.module, engine.name = module, name
            module.on_start()
            workers = {
                name: self._worker(index, name, table, module.running.get(name))
                for index, (name, table) in enumerate(manifest.engines.items())
            }
        except BaseException as error:
            broken = Broken(
                stage=stage, error=_in_a_line(error), traceback=traceback.format_exc()[-_TRACEBACK:]
            )
            self._post(lambda: self._break(broken))
        else:
            self._post(lambda: self._serve(module, workers))

    def _worker(self, index: int, name: str, table: EngineTable, engine: Engine | None) -> Runner:
        if table.native is not None:
            return _native.Worker(name, table.native, self._stats_fd, index, table.budget, _WAITS[table.wait])
        if engine is None:
            raise UsageError(
                f"engines() of module {self.order.name!r} built no {name!r}", "return one per manifest entry"
            )
        stats = _native.StatsPage(self._stats_fd, True)
        return PythonWorker(name, engine, stats, index, table.budget, _WAITS[table.wait])

    def _post(self, action: Callable[[], None]) -> None:
        self._posted.append(action)
        os.eventfd_write(self._bell, 1)

    # -- on the main thread ---------------------------------------------------------------------------------

    def _serve_posted(self) -> None:
        os.eventfd_read(self._bell)
        while self._posted:
            self._posted.popleft()()

    def _serve(self, module: Module, workers: dict[str, Runner]) -> None:
        self._module, self.workers = module, workers
        for name, worker in workers.items():
            self._selector.register(
                worker.fileno(),
                selectors.EVENT_READ,
                lambda name=name, worker=worker: self._serve_news(name, worker),
            )
        self.link.send(Serving(engines=list(workers)))

    def _serve_news(self, name: str, worker: Runner) -> None:
        faults = worker.take_faults()
        for channel, reason in faults:
            if self._served.pop(channel, None) is not None:
                self.link.send(Dropped(channel=channel, reason=reason))
        if not worker.alive:
            # A Python engine leaves a traceback; a Rust engine's panic comes as the last fault, of no channel.
            crash = (
                worker.crash if isinstance(worker, PythonWorker) else faults[-1][1] if faults else "it ended"
            )
            last = crash.strip().rpartition("\n")[2]
            self._break(Broken(stage="run", error=f"engine {name}: {last}", traceback=crash[-_TRACEBACK:]))

    def _serve_link(self) -> None:
        received = self.link.receive()
        if received is None:
            return
        message, fds = received
        try:
            if isinstance(message, Attach):
                self._attach(message, fds)
            elif isinstance(message, Detach):
                self._detach(message.channel)
            elif isinstance(message, Stop):
                self._stop(message.grace)
            else:
                raise ProtocolError(f"{type(message).__name__} is out of place on a module's link")
        finally:
            seqpacket.close_all(fds)

    def _attach(self, order: Attach, fds: list[int]) -> None:
        try:
            worker = self.workers.get(order.engine)
            if worker is None:
                raise NotFoundError(f"module {self.order.name!r} runs no engine {order.engine!r}")
            worker.attach(order.channel, server_channel(order, fds, self._gate_fd))
        except SnapError as error:
            self.link.send(Failure(seq=order.seq, code=error.code, message=error.message, hint=error.hint))
        except ValueError as error:
            self.link.send(Failure(seq=order.seq, code=UsageError.code, message=str(error)))
        else:
            self._served[order.channel] = order.engine
            self.link.send(Attached(seq=order.seq, channel=order.channel))

    def _detach(self, channel: int) -> None:
        engine = self._served.pop(channel, None)
        # Unknown: the engine dropped it while the order was under way.
        if engine is not None:
            self.workers[engine].detach(channel)

    def _break(self, broken: Broken) -> NoReturn:
        print(broken.traceback or broken.error, file=sys.stderr)
        self.link.send(broken)
        _exit(1)

    def _stop(self, grace: float, code: int = 0) -> NoReturn:
        # On a thread: neither an engine nor on_stop may outlast the grace period.
        thread = threading.Thread(target=self._wind_down, args=(grace,), name="stop", daemon=True)
        thread.start()
        thread.join(grace)
        if not self._stopped:
            print(f"module {self.order.name!r} did not stop within {grace} s", file=sys.stderr)
        _exit(code if self._stopped else 1)

    def _wind_down(self, grace: float) -> None:
        for worker in self.workers.values():
            worker.stop(grace)
        if self._module is not None:
            self._module.on_stop()
        self._stopped = True


def server_channel(order: Attach, fds: list[int], gate_fd: int) -> ServerChannel:
    """Map the engine's end of the channel that `order` describes; the descriptors stay the caller's.

    Raises ResourceError when there was no room for them, ProtocolError for another number than five, and what
    `Endpoint` raises.
    """
    if not fds:
        raise ResourceError(
            "the module is out of descriptors", "raise resources.descriptors in its module.toml"
        )
    if len(fds) != 5:
        raise ProtocolError(f"Attach came with {len(fds)} descriptors instead of 5")
    ring, up, down, server_bell, client_bell = fds
    return ServerChannel.make(
        _native.SERVER,
        ring,
        up,
        down,
        order.slots,
        order.up_bytes,
        order.down_bytes,
        (server_bell, client_bell),
        order.generation,
        gate_fd,
        order.gate_index,
        id=order.channel,
        service=order.service,
        badge=order.badge,
        rights=frozenset(order.rights),
    )


def _module_class(package: ModuleType, manifest: Manifest) -> type[Module]:
    entry = manifest.module.entry
    return Module if entry is None else load_class(package, entry, Module)


def _in_a_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def _exit(code: int) -> NoReturn:
    """End now: a stray thread of the module's own must not keep its process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def close_others(keep: int) -> None:
    """Close every descriptor that was inherited, but standard ones and `keep`."""
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if fd >= _STANDARD and fd != keep:
            try:
                os.close(fd)
            except OSError:
                continue  # the listing's own descriptor


def main() -> NoReturn:
    given = os.environ.pop(LINK_FD, "")
    if not given.isdigit():
        sys.exit(
            f"{LINK_FD} names no descriptor: snap-kernel starts modules; try `snapctl module start NAME`"
        )
    fd = int(given)
    close_others(fd)
    # Ctrl-C at a terminal reaches the whole process group; the kernel alone decides who stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        os.set_inheritable(fd, False)
        host = configured(Link(socket.socket(fileno=fd)))
    except (SnapError, OSError) as error:
        sys.exit(f"snap: module: {type(error).__name__}: {error}")
    host.run()


def configured(link: Link) -> Host:
    """Read the first order, take the module's name, and say that the process has started.

    Raises ProtocolError for any other first message, UnreachableError when the kernel has gone.
    """
    received = link.receive()
    order, fds = received or (None, [])
    if not isinstance(order, Configure) or len(fds) != 2:
        raise ProtocolError(
            f"first comes {type(order).__name__} with {len(fds)} descriptors, not Configure with 2"
        )
    setproctitle.setproctitle(f"snap: module {order.name}")
    link.send(Started(pid=os.getpid()))
    return Host(link, order, *fds)


if __name__ == "__main__":
    main()
