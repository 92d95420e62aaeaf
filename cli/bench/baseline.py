"""What most systems do at an upgrade: stop, serialise everything, start, restore, serve.

    python -m snap.cli.bench.baseline SOCKET STATE_FD ENTRIES BULK

A server on a Unix socket. It restores from the inherited STATE_FD unless that is empty; on SIGTERM it stores there
and exits.
"""

from __future__ import annotations

import ctypes
import pickle
import signal
import socket
import sys
from pathlib import Path
from typing import Final, NoReturn

_PR_SET_PDEATHSIG: Final = 1


class _StopError(Exception):
    pass


def _stop(*_: object) -> NoReturn:
    raise _StopError


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    path, file, entries, bulk = (
        sys.argv[1],
        Path("/proc/self/fd") / sys.argv[2],
        int(sys.argv[3]),
        int(sys.argv[4]),
    )
    if file.stat().st_size:
        rows, data = pickle.loads(file.read_bytes())
    else:
        rows, data = {number: number for number in range(entries)}, bytearray(b"\1" * bulk)
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGTERM, _stop)
        try:
            while True:
                _serve(listener.accept()[0], rows)
        except _StopError:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    file.write_bytes(pickle.dumps((rows, data), protocol=5))


def _serve(client: socket.socket, rows: dict[int, int]) -> None:
    with client:
        while message := client.recv(8):
            number = int.from_bytes(message, "little")
            rows[number % max(1, len(rows))] = number
            client.sendall(message)


if __name__ == "__main__":
    main()
