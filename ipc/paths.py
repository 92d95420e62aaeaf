"""Where a kernel's files are: the runtime directory and the names in it, and the directory of configuration."""

from __future__ import annotations

import os
from pathlib import Path

BOOTSTRAP = "bootstrap.sock"
CONTROL = "control.sock"
EVENTS = "events.sock"
LOCK = "kernel.lock"
AUDIT = "audit.jsonl"
LOGS = "log"
SEMAPHORES = "semaphores"
KERNEL_LOG = "kernel.log"


def runtime_dir(given: str | os.PathLike[str] | None = None) -> Path:
    """The runtime directory: the one given, `SNAP_RUNTIME_DIR`, `/run/snap-kernel` for root, a folder of
    `XDG_RUNTIME_DIR`, or a private folder of the temporary directory, in this order."""
    chosen = given or os.environ.get("SNAP_RUNTIME_DIR")
    if chosen:
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/run/snap-kernel")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "snap-kernel" if base else Path(f"/tmp/snap-kernel-{os.geteuid()}")


def config_dir() -> Path:
    """Where operators put the configuration of modules: `SNAP_CONFIG_DIR`, `/etc/snap-kernel` for root, a folder of
    `XDG_CONFIG_HOME` or of `~/.config`, in this order. Modules are told the same by their kernel."""
    if chosen := os.environ.get("SNAP_CONFIG_DIR"):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/etc/snap-kernel")
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "snap-kernel"
