"""The process at the other end: `python -m snap.cli.bench.peer NAME FD` serves what the measuring process asks
for."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sys
from contextlib import ExitStack

from snap.ipc import seqpacket

from .contenders import contenders
from .scenarios import SCENARIOS

_PR_SET_PDEATHSIG = 1


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(name: str, fd: int) -> None:
    # A spinning receiver would not notice that the measuring process was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(fileno=fd))
        way = contenders()[name].accept(sock, stack)
        while data := seqpacket.recv(sock)[0]:
            order = json.loads(data)
            os.sched_setaffinity(0, {order["cpu"]})
            seqpacket.send(sock, b"go")
            before = cpu_seconds()
            if not way.serves_itself:
                SCENARIOS[order["scenario"]].serve(way, order["count"])
            seqpacket.send(sock, json.dumps({"cpu": cpu_seconds() - before}).encode())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
