"""The kernel's side of systemd: readiness, watchdog, and descriptors either way.

Without systemd every call does nothing.

The protocols are the documented ones of sd_notify(3) and sd_listen_fds(3); both are a few lines over a
socket and three environment variables, so no library stands between.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from snap.dataplane.errors import ResourceError

_FIRST_FD = 3
_UNIT_HINT = "the socket unit needs ListenSequentialPacket= and its own FileDescriptorName="


def notify(*states: str, fds: Sequence[int] = ()) -> bool:
    """Send assignments such as ``READY=1`` or ``WATCHDOG=1``, all in one datagram, with descriptors.

    Returns False when nobody supervises this process. Raises ResourceError when NOTIFY_SOCKET
    is set but cannot be written to.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address[0] not in "/@":
        raise ResourceError(
            f"NOTIFY_SOCKET is {address!r}: neither a path nor an abstract name", "unset it outside systemd"
        )
    target = f"\0{address[1:]}" if address[0] == "@" else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(target)
            socket.send_fds(sock, ["\n".join(states).encode()], fds)
        except OSError as error:
            raise ResourceError(
                f"cannot notify the service manager on {address}: {error.strerror}",
                "unset NOTIFY_SOCKET when no service manager runs this kernel",
            ) from error
    return True


def watchdog_interval() -> float | None:
    """Seconds between two ``WATCHDOG=1``: half of WatchdogSec. None when none is asked of us."""
    pid = os.environ.get("WATCHDOG_PID")
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if (pid and pid != str(os.getpid())) or not microseconds.isdecimal() or int(microseconds) == 0:
        return None
    return int(microseconds) / 2e6


def passed() -> list[tuple[str, int]]:
    """The descriptors that a service manager gave this process, each with its FileDescriptorName or FDNAME.

    They become close-on-exec, and the variables are removed: no child may take them for its own. Raises
    ResourceError when one is not there.
    """
    pid, count, names = (os.environ.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal() or not int(count):
        return []
    found = []
    for index, name in enumerate((names or "unknown").split(":")[: int(count)]):
        fd = _FIRST_FD + index
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            raise ResourceError(
                f"activated descriptor {fd} ({name!r}): {error.strerror}", _UNIT_HINT
            ) from error
        found.append((name, fd))
    if len(found) != int(count):
        raise ResourceError(f"LISTEN_FDS={count}, but LISTEN_FDNAMES has {len(found)} names", _UNIT_HINT)
    return found


def activated_sockets(descriptors: Iterable[tuple[str, int]] | None = None) -> dict[str, socket.socket]:
    """The listening SEQPACKET sockets among `descriptors` (default: `passed()`), by name.

    Raises ResourceError when a descriptor is anything else: the unit is wrong, and the kernel must not start.
    """
    found: dict[str, socket.socket] = {}
    with ExitStack() as undo:
        for name, fd in passed() if descriptors is None else descriptors:
            if name in found:
                raise ResourceError(f"two activated sockets are named {name!r}", _UNIT_HINT)
            found[name] = undo.enter_context(_adopt(fd, name))
        undo.pop_all()
    return found


def _adopt(fd: int, name: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ResourceError(f"activated descriptor {fd} ({name!r}): {error.strerror}", _UNIT_HINT) from error
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET or not listening:
        sock.close()
        raise ResourceError(
            f"activated socket {name!r} (descriptor {fd}) is not a listening SEQPACKET Unix socket",
            _UNIT_HINT,
        )
    return sock
