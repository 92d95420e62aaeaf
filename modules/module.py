"""`Module`: what runs in a module's process. Most modules need no subclass: the manifest names their engines."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from snap.dataplane.errors import NotRunningError
from snap.ipc.manifest import Manifest

from .engine import Engine
from .loading import load_class

if TYPE_CHECKING:
    from snap.ipc.client import Channel

    from .link import Link


class Module:
    """One module in its process. Subclass it (and name it as `entry` in the manifest) to build engines by hand, or to
    do something once before they poll. Neither hook may assume the main thread: that one serves the kernel."""

    def __init__(
        self, manifest: Manifest, package: ModuleType, generation: int = 0, link: Link | None = None
    ) -> None:
        self.manifest = manifest
        self.package = package
        self.generation = generation
        self.running: dict[str, Engine] = {}
        """The Python engines, by their name in the manifest; there when `on_start` runs."""
        self._link = link

    @property
    def name(self) -> str:
        return self.manifest.module.name

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
        """Runs once, after the engines are built and before they poll."""

    def on_stop(self) -> None:
        """Runs once, after the engines stopped, within the kernel's grace period."""

    def connect(self, service: str, timeout: float = 10.0) -> Channel:
        """A channel to `service`, which the manifest requires, waiting up to `timeout` seconds until it is ready.

        From `on_start` or any engine's thread. Raises DeniedError when policy does not allow it, NotFoundError when
        nobody provides it, DeadlineError, and UnreachableError when the kernel has gone.
        """
        if self._link is None:
            raise NotRunningError(
                "this module runs without a kernel", "in tests, give the engine a channel_pair()"
            )
        raise NotImplementedError
