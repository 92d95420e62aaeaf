"""`snapctl down`: stop the kernel, and return when its process is really gone."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from ._base import Settings, call, control, say

STOP_TIMEOUT: Final = 20.0
KILL_TIMEOUT: Final = 5.0
ASK_TIMEOUT: Final = 5.0
KEEPER: Final = "keeper.sock"


@click.command()
@click.option(
    "--force",
    is_flag=True,
    help="Kill a kernel that does not answer or does not end in time, and what would start it again.",
)
@click.pass_obj
def down(settings: Settings, force: bool) -> None:
    """Stop the kernel and all modules, and wait until they are gone."""
    from snap.ipc import DeadlineError, UnreachableError

    seconds = settings.seconds(STOP_TIMEOUT)
    try:
        pid, pidfd = _ask(settings)
    except UnreachableError:
        if force and _kill_keeper(settings.directory()):
            say("the keeper of a kernel that died was killed: its modules end by themselves when they notice")
        raise
    except DeadlineError:
        if not force:
            raise
        pid, pidfd = _holder(settings.directory())
        seconds = 0
    try:
        if not _gone(pidfd, seconds):
            if not force:
                raise DeadlineError(
                    f"the kernel, pid {pid}, is still there after {seconds:g} s",
                    "`snapctl down --force` kills it",
                )
            # The keeper would start the next kernel, and this one another keeper.
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            _kill_keeper(settings.directory())
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not _gone(pidfd, KILL_TIMEOUT):
                raise DeadlineError(
                    f"the kernel, pid {pid}, does not die", "it hangs in a system call: see /proc/PID/stack"
                )
            say("killed: its modules end by themselves when they notice")
    finally:
        os.close(pidfd)
    if settings.output == "json":
        from ..output import print_json

        print_json("KernelStopped", {"pid": pid})
    elif settings.output == "name":
        click.echo(pid)
    else:
        click.echo(f"kernel {pid} is gone")


def _ask(settings: Settings) -> tuple[int, int]:
    """Ask the kernel to stop; its pid, and a pidfd taken before, so that both are of the kernel that was asked."""
    from snap.ipc import UnreachableError
    from snap.ipc.protocol import KernelView

    asking = Settings(settings.runtime_dir, timeout=min(ASK_TIMEOUT, settings.seconds()))
    pid = call(asking, "kernel.status", KernelView).pid
    pidfd = os.pidfd_open(pid)
    try:
        # A kernel that goes before its answer has left is doing as it was told: the pidfd says so.
        with control(asking) as client, suppress(UnreachableError):
            client.call("kernel.stop")
    except BaseException:
        os.close(pidfd)
        raise
    return pid, pidfd


def _gone(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _holder(directory: Path) -> tuple[int, int]:
    """The process that listens on the control socket, as the operating system names it, and a pidfd of it.

    Raises UnreachableError when nobody listens.
    """
    from snap.ipc import UnreachableError
    from snap.ipc.paths import CONTROL

    try:
        return _listener(directory / CONTROL, socket.SOCK_STREAM)
    except OSError as error:
        raise UnreachableError(f"no kernel listens on {directory}: {error.strerror or error}") from error


def _kill_keeper(directory: Path) -> bool:
    """End the process that would keep the modules alive and start the next kernel; False when there is none."""
    try:
        _, pidfd = _listener(directory / KEEPER, socket.SOCK_SEQPACKET)
    except OSError:
        return False
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return _gone(pidfd, KILL_TIMEOUT)
    finally:
        os.close(pidfd)


def _listener(path: Path, kind: socket.SocketKind) -> tuple[int, int]:
    """The process that listens there, as the operating system names it, and a pidfd of it. Raises OSError."""
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(ASK_TIMEOUT)
        probe.connect(str(path))
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, os.pidfd_open(pid)
