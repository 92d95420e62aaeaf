"""`Module`: what runs in a module's process. Most modules need no subclass: the manifest names their engines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import NoReturn

from snap.dataplane.errors import NotRunningError, SnapError
from snap.ipc.channel import Channel
from snap.ipc.client import Client
from snap.ipc.manifest import Manifest
from snap.ipc.protocol import Keep
from snap.ipc.requester import Requester

from .engine import Engine
from .loading import load_class

Ask = Callable[[str, bytes], bytes]


class Module:
    """One module in its process. Subclass it (and name it as `entry` in the manifest) to build engines by hand, or to
    do something once before they poll. Neither hook may assume the main thread: that one serves the kernel."""

    def __init__(
        self,
        manifest: Manifest,
        package: ModuleType,
        generation: int = 0,
        link: Requester | None = None,
        kept: Mapping[str, int] | None = None,
    ) -> None:
        self.manifest = manifest
        self.package = package
        self.generation = generation
        self.running: dict[str, Engine] = {}
        """The Python engines, by their name in the manifest; there when `on_start` runs."""
        self._link = link
        self._client = None if link is None else Client(link)
        self._kept = dict(kept or {})
        self.ask: Ask | None = None
        """What `request` goes through: the host's, or a test's own."""

    @property
    def name(self) -> str:
        return self.manifest.name

    def engines(self) -> dict[str, Engine]:
        """Build the Python engines, by name; by default one of each class that the manifest gives.

        Raises ManifestError for a class that is no Engine, and whatever their constructors raise.
        """
        return {
            name: load_class(self.package, table.class_, Engine)()
            for name, table in self.manifest.engines.items()
            if table.native is None
        }

    def on_start(self) -> None:
        """Runs once, after the engines are built and before they poll: while another generation may still serve."""

    def on_stop(self) -> None:
        """Runs once, after the engines stopped, within the kernel's grace period."""

    def descriptors(self, engine: str) -> Sequence[int]:
        """Descriptors (sockets, say) for the native engine `engine`: asked for once, after `on_start`. They stay the
        module's, and open; the engine gets duplicates whenever it is made."""
        return ()

    def on_said(self, engine: str, said: bytes) -> None:
        """A native engine said something of its own accord. On a thread that does nothing else, so it may wait; what is
        said meanwhile comes afterwards, in order."""

    def request(self, engine: str, request: bytes) -> bytes:
        """Have the native engine `engine` of this process answer between two of its polls. From any thread.

        Raises NotRunningError when it does not run in this process (now, or at all), DeadlineError when it hangs, and
        what the engine raises.
        """
        if self.ask is None:
            raise NotRunningError(f"engine {engine!r} does not run here", "in tests, set `ask` of the Module")
        return self.ask(engine, request)

    def health(self) -> str:
        """What is wrong with this module, in words; empty when it is well. Asked for once a second while an
        upgrade to it proves itself, on a thread of its own: it may look at the engines' attributes, not at
        their state."""
        return ""

    def keep(self, name: str, fd: int | None) -> None:
        """Have the kernel keep `fd` (a port, a socket, a file) for the generations to come, under `name`, or forget
        what it kept (None). From any thread; `fd` stays yours. Raises NotRunningError without a kernel."""
        if self._link is None:
            raise NotRunningError(
                "this module runs without a kernel", "in tests, pass kept={...} to the Module"
            )
        self._link.send(Keep(name=name), [] if fd is None else [fd])

    def kept(self, name: str) -> int | None:
        """The descriptor that an earlier generation kept as `name`, None when there is none. It is this
        process's own, the same at every call."""
        return self._kept.get(name)

    def connect(self, service: str, timeout: float = 10.0) -> Channel:
        """A channel to `service`, which the manifest requires, waiting up to `timeout` seconds until it is ready.

        From `on_start`, an engine's thread, or any of your own. Raises DeniedError when policy does not allow it,
        NotFoundError when nobody provides it, DeadlineError, and UnreachableError when the kernel has gone.
        """
        if self._client is None:
            raise NotRunningError(
                "this module runs without a kernel", "in tests, give the engine a channel_pair()"
            )
        return self._client.open(service, timeout=timeout)

    def connect_soon(
        self, service: str, engine: Engine, use: Callable[[Channel], object], timeout: float = 60.0
    ) -> None:
        """`connect` on a thread of its own, then run `use` with the channel on the thread of `engine`: for an engine,
        which must not wait. What `connect` raises is raised in the engine."""
        threading.Thread(
            target=self._connect_for,
            args=(service, engine, use, timeout),
            name=f"connect {service}",
            daemon=True,
        ).start()

    def _connect_for(
        self, service: str, engine: Engine, use: Callable[[Channel], object], timeout: float
    ) -> None:
        try:
            channel = self.connect(service, timeout)
        except SnapError as error:
            engine.mail(partial(_raise, error))
        else:
            engine.mail(lambda: use(channel))


def _raise(error: SnapError) -> NoReturn:
    raise error
