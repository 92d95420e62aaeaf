"""snapctl as a process, and a kernel that is a ROUTER socket with a script: every answer can be had, wrong ones too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq

from snap.ipc import protocol
from snap.ipc.protocol import Response

SNAPCTL = (sys.executable, "-m", "snap.cli")
FAILED = Response(key="", ok=False, code="failed", message="a script without an answer")


class PlayedKernel:
    """Answers requests from `answers`: a result, a `Response`, or a function of the arguments; keeps what was asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.answers: dict[str, Any] = {}
        self.asked: list[protocol.Request] = []
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(f"ipc://{directory}/control.sock")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._router.poll(50):
                continue
            *route, payload = self._router.recv_multipart()
            request = msgspec.msgpack.decode(payload, type=protocol.Request)
            self.asked.append(request)
            answer = self.answers.get(request.op, FAILED)
            if callable(answer):
                answer = answer(request.args)
            if answer is None:
                continue
            if not isinstance(answer, Response):
                answer = Response(key=request.key, ok=True, result=msgspec.to_builtins(answer))
            answer = msgspec.structs.replace(answer, key=request.key)
            self._router.send_multipart([*route, msgspec.msgpack.encode(answer)])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._router.close(0)
        self._context.term()


def snapctl(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SNAPCTL, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def data(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*SNAPCTL, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def read_lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().rstrip("\n") for _ in range(count)]


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err.strip()


def complete(words: str, directory: Path) -> list[str]:
    done = snapctl(
        _SNAPCTL_COMPLETE="bash_complete",
        COMP_WORDS=f"snapctl {words}",
        COMP_CWORD=str(len(f"snapctl {words}".split(" ")) - 1),
        SNAP_RUNTIME_DIR=str(directory),
    )
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]
