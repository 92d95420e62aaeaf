"""The process of a module: `python -m snap.modules.host`, with its link to the kernel in `SNAP_LINK_FD`.

The main thread serves the link and does nothing that can take long. Importing and building the module run on a thread
of their own, and so do making an engine ready and each engine itself: a module that hangs anywhere still answers its
kernel, and still ends when the kernel has gone for good.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Final, NoReturn

import setproctitle
import sysv_ipc  # type: ignore[import-not-found]

from snap.dataplane.errors import NotRunningError, ProtocolError, SnapError, UnreachableError, UsageError
from snap.ipc import faults, seqpacket
from snap.ipc.manifest import Manifest, from_builtins
from snap.ipc.protocol import (
    Attach,
    Broken,
    Check,
    Configure,
    Detach,
    Health,
    Holding,
    Loaded,
    Prepare,
    Report,
    Started,
    Stop,
    Yield,
)

from .link import Link
from .loading import load_class, load_package
from .module import Module
from .preparing import EngineCode, check_version
from .seats import Seat

LINK_FD: Final = "SNAP_LINK_FD"
_STANDARD: Final = 3
_SWITCH: Final = 0.0005
"""Seconds."""

_KERNEL_GONE_GRACE: Final = 2.0
_TRACEBACK: Final = 16_384
"""Characters of a traceback that fit a message whatever they are; its end says most."""


class Host:
    """Serves one module's link until it ends; `run` never returns."""

    def __init__(self, link: Link, order: Configure, gate_fd: int, stats_fd: int, kept: list[int]) -> None:
        self.link = link
        self.order = order
        self.gate_fd = gate_fd
        self.stats_fd = stats_fd
        self.seats: dict[str, Seat] = {}
        self.selector = selectors.DefaultSelector()
        self._kept = dict(zip(order.kept, kept, strict=True))
        self._module: Module | None = None
        self._posted: deque[Callable[[], None]] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._checking: threading.Thread | None = None
        self._stopped = False
        self._said: SimpleQueue[tuple[str, bytes]] = SimpleQueue()
        self._said_to = False

    def run(self) -> NoReturn:
        self.selector.register(self.link, selectors.EVENT_READ, self._serve_link)
        self.selector.register(self._bell, selectors.EVENT_READ, self._serve_posted)
        threading.Thread(target=self._load, name="load", daemon=True).start()
        try:
            while True:
                for key, _ in self.selector.select():
                    key.data()
        except UnreachableError:
            # The kernel, and whoever keeps things for the next one, have gone: nobody else will tidy up.
            self._stop(_KERNEL_GONE_GRACE, tidy=True)
        except SnapError as error:
            print(f"module {self.order.name!r}: {type(error).__name__}: {error}", file=sys.stderr)
            self._stop(_KERNEL_GONE_GRACE, code=1)

    def post(self, action: Callable[[], None]) -> None:
        """From any thread: run `action` on the main one."""
        self._posted.append(action)
        os.eventfd_write(self._bell, 1)

    # -- on the loading thread ------------------------------------------------------------------------------

    def _load(self) -> None:
        stage = "import"
        try:
            manifest = from_builtins(self.order.manifest, f"manifest of {self.order.name}")
            package = load_package(Path(self.order.path), self.order.name)
            module = _module_class(package, manifest)(
                manifest, package, self.order.generation, self.link, self._kept
            )
            module.ask = self._ask
            stage = "start"
            module.running = module.engines()
            for name, engine in module.running.items():
                engine.module, engine.name = module, name
            codes = {
                name: EngineCode(module.name, name, table, module.running.get(name))
                for name, table in manifest.engines.items()
            }
            for name, code in codes.items():
                if code.table.native is None and code.engine is None:
                    raise UsageError(
                        f"engines() of module {self.order.name!r} built no {name!r}",
                        "return one per manifest entry",
                    )
            stage = "load"
            check_version(manifest, codes)
            stage = "start"
            module.on_start()
            fds = {
                name: list(module.descriptors(name))
                for name, code in codes.items()
                if code.table.native is not None
            }
        except BaseException as error:
            broken = broken_by(stage, error)
            self.post(lambda: self.fail(broken))
        else:
            self.post(lambda: self._loaded(module, codes, fds))

    # -- on threads of the module ----------------------------------------------------------------------------

    def _ask(self, engine: str, request: bytes) -> bytes:
        seat = self.seats.get(engine)
        if seat is None:
            raise NotRunningError(
                f"engine {engine!r} does not run here", "it is not loaded yet, or no engine"
            )
        return seat.ask(request)

    def _listen(self) -> None:
        while True:
            engine, said = self._said.get()
            assert self._module is not None
            try:
                self._module.on_said(engine, said)
            except BaseException as error:
                broken = broken_by("run", error)
                self.post(partial(self.fail, broken))
                return

    # -- on the main thread ---------------------------------------------------------------------------------

    def said(self, engine: str, said: bytes) -> None:
        """A native engine says something: its module hears it on a thread of its own, for it may wait there."""
        if not self._said_to:
            self._said_to = True
            threading.Thread(target=self._listen, name="said", daemon=True).start()
        self._said.put((engine, said))

    def _serve_posted(self) -> None:
        os.eventfd_read(self._bell)
        while self._posted:
            self._posted.popleft()()

    def _loaded(self, module: Module, codes: dict[str, EngineCode], fds: dict[str, list[int]]) -> None:
        self._module = module
        self.seats = {
            name: Seat(self, code, index, fds.get(name, []))
            for index, (name, code) in enumerate(codes.items())
        }
        faults.reach("module.loaded")
        self.link.send(Loaded(schemas={name: code.state_schema() for name, code in codes.items()}))

    def _serve_link(self) -> None:
        received = self.link.receive()
        if received is None:
            return
        message, fds = received
        try:
            self._obey(message, fds)
        finally:
            seqpacket.close_all(fds)

    def _obey(self, message: object, fds: list[int]) -> None:
        if isinstance(message, Attach):
            seat = self.seats.get(message.engine)
            if seat is None:
                self.link.refuse(message.seq, f"module {self.order.name!r} runs no engine {message.engine!r}")
            else:
                seat.attach(message, fds)
        elif isinstance(message, Detach):
            for seat in self.seats.values():
                seat.detach(message.channel)
        elif isinstance(message, Prepare):
            self._seat(message.engine).prepare(message, fds)
        elif isinstance(message, Yield):
            self._seat(message.engine).hand_over(message.retire)
        elif isinstance(message, Check):
            self._check(message.seq)
        elif isinstance(message, Report):
            self._report(message.seq)
        elif isinstance(message, Stop):
            self._stop(message.grace)
        else:
            raise ProtocolError(f"{type(message).__name__} is out of place on a module's link")

    def _seat(self, engine: str) -> Seat:
        seat = self.seats.get(engine)
        if seat is None:
            raise ProtocolError(f"module {self.order.name!r} has loaded no engine {engine!r}")
        return seat

    def _report(self, seq: int) -> None:
        names = self.order.manifest["engines"]
        engines = {name: self.seats[name].stage if name in self.seats else "loading" for name in names}
        channels = {
            order.channel: order.generation for seat in self.seats.values() for order in seat.orders()
        }
        self.link.send(
            Holding(
                seq=seq,
                name=self.order.name,
                generation=self.order.generation,
                pid=os.getpid(),
                engines=engines,
                channels=channels,
            )
        )
        self.link.repeat()

    def _check(self, seq: int) -> None:
        if self._checking is not None and self._checking.is_alive():
            self.link.send(Health(seq=seq, reason="the last health() has not returned yet"))
            return
        # On a thread: it is the author's, and may wait.
        self._checking = threading.Thread(target=self._examine, args=(seq,), name="health", daemon=True)
        self._checking.start()

    def _examine(self, seq: int) -> None:
        try:
            reason = "it has not loaded yet" if self._module is None else self._module.health()
        except Exception as error:
            reason = f"health(): {_in_a_line(error)}"
        with contextlib.suppress(UnreachableError):
            self.link.send(Health(seq=seq, reason=reason))

    def fail(self, broken: Broken) -> NoReturn:
        """The module cannot go on: say why, and end."""
        print(broken.traceback or broken.error, file=sys.stderr)
        with contextlib.suppress(UnreachableError):
            self.link.send(broken)
        _exit(1)

    def _stop(self, grace: float, code: int = 0, tidy: bool = False) -> NoReturn:
        # On a thread: neither an engine nor on_stop may outlast the grace period.
        thread = threading.Thread(target=self._wind_down, args=(grace, tidy), name="stop", daemon=True)
        thread.start()
        thread.join(grace)
        if not self._stopped:
            print(f"module {self.order.name!r} did not stop within {grace} s", file=sys.stderr)
        if tidy:
            for seat in self.seats.values():
                _remove(seat.semaphore)
        _exit(code if self._stopped else 1)

    def _wind_down(self, grace: float, last: bool) -> None:
        for seat in self.seats.values():
            seat.stop(grace, last)
        if self._module is not None:
            self._module.on_stop()
        self._stopped = True


def broken_by(stage: str, error: BaseException) -> Broken:
    return Broken(stage=stage, error=_in_a_line(error), traceback=traceback.format_exc()[-_TRACEBACK:])


def _remove(semaphore: int) -> None:
    if semaphore >= 0:
        with contextlib.suppress(sysv_ipc.ExistentialError, sysv_ipc.PermissionsError):
            sysv_ipc.remove_semaphore(semaphore)


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
    # A busy engine lets the main thread have its turn after this, and not only after ten times as long.
    sys.setswitchinterval(_SWITCH)
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
    if not isinstance(order, Configure) or len(fds) != 2 + len(order.kept):
        raise ProtocolError(
            f"first comes {type(order).__name__} with {len(fds)} descriptors, not Configure with all of its own"
        )
    setproctitle.setproctitle(f"snap: module {order.name}")
    link.send(Started(pid=os.getpid()))
    return Host(link, order, fds[0], fds[1], fds[2:])


if __name__ == "__main__":
    main()
