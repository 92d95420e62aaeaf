"""`snapctl up`: start the kernel as a process of its own, and be sure that it serves."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ._base import PYTHON, Settings, call, say

if TYPE_CHECKING:
    from snap.ipc import SnapError

START_TIMEOUT: Final = 20.0
END_TIMEOUT: Final = 5.0
ASK_EVERY: Final = 0.05
ASK_TIMEOUT: Final = 0.5
LOG_LINES: Final = 20
WORDS: Final = "its last words are above and in kernel.log"


@click.command()
@click.option(
    "--foreground", is_flag=True, help="Become the kernel instead of starting one; for service managers."
)
@click.option(
    "--policy", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Who may do what (TOML)."
)
@click.option(
    "--module-path",
    "module_paths",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    multiple=True,
    help="A directory of modules. May be repeated.",
)
@click.pass_obj
def up(settings: Settings, foreground: bool, policy: Path | None, module_paths: tuple[Path, ...]) -> None:
    """Start the kernel and wait until it answers."""
    directory = settings.directory()
    _refuse_second(settings, directory)
    command = [*PYTHON, "snap.kernel", "--runtime-dir", str(directory)]
    if policy is not None:
        command += ["--policy", str(policy.absolute())]
    for path in module_paths:
        command += ["--module-path", str(path.absolute())]
    if foreground:
        os.execv(command[0], [*command, "--foreground"])
    pid = _start(settings, directory, [*command, "--respawn"])
    if settings.output == "json":
        from ..output import print_json

        print_json("KernelStarted", {"pid": pid, "runtime_dir": str(directory)})
    elif settings.output == "name":
        click.echo(pid)
    else:
        click.echo(f"kernel {pid} runs on {directory}")


def _refuse_second(settings: Settings, directory: Path) -> None:
    """Raises BusyError when a kernel answers on this directory already."""
    from snap.ipc import BusyError, DeadlineError, UnreachableError

    try:
        pid = _answering(settings)
    except UnreachableError:
        return
    except DeadlineError:
        raise BusyError(
            f"a kernel on {directory} holds its socket but does not answer", "end it: `snapctl down --force`"
        ) from None
    raise BusyError(
        f"a kernel, pid {pid}, runs on {directory} already",
        "use it, end it with `snapctl down`, or name another directory with --runtime-dir",
    )


def _answering(settings: Settings) -> int:
    """The pid of the kernel that answers. Raises UnreachableError or DeadlineError."""
    from snap.ipc.protocol import KernelView

    asking = Settings(settings.runtime_dir, timeout=ASK_TIMEOUT)
    return call(asking, "kernel.status", KernelView).pid


def _start(settings: Settings, directory: Path, command: list[str]) -> int:
    """Start `command` in a session of its own and return its pid once it answers. Raises what kept it from it."""
    from snap.ipc.paths import KERNEL_LOG

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = directory / KERNEL_LOG
    seconds = settings.seconds(START_TIMEOUT)
    # A Ctrl-C in the middle of making the process would leave one that nobody knows: it is held until after.
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    with log.open("ab") as sink:
        begin = sink.tell()
        process = subprocess.Popen(
            command, cwd="/", stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        signal.signal(signal.SIGINT, handler)
        if held:
            raise KeyboardInterrupt
        _await(settings, process, seconds)
    except BaseException:
        _end(process)
        raise
    finally:
        if process.returncode is not None:
            _print_log(log, begin)
    # It is to outlive this process: nobody here will wait for it.
    process.returncode = 0
    return process.pid


def _end(process: subprocess.Popen[bytes]) -> None:
    """By its own order, in which it clears away what it made, or by force."""
    process.terminate()
    try:
        process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _await(settings: Settings, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Return when `process` answers as the kernel. Raises what its end says, or DeadlineError after `seconds`."""
    from snap.ipc import DeadlineError, UnreachableError

    deadline = time.monotonic() + seconds
    while process.poll() is None:
        with suppress(UnreachableError, DeadlineError):
            if _answering(settings) == process.pid:
                return
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"the kernel did not answer within {seconds:g} s and was ended",
                f"{WORDS}; try a longer --timeout",
            )
        time.sleep(ASK_EVERY)
    raise _failure(process.returncode)


def _print_log(log: Path, begin: int) -> None:
    """What the kernel wrote since `begin`: its last lines."""
    from ..output import plain

    with log.open("rb") as source:
        source.seek(begin)
        lines = source.read().decode(errors="replace").splitlines()
    for line in lines[-LOG_LINES:]:
        say(f"kernel: {plain(line)}")


def _failure(status: int) -> SnapError:
    """The kernel exits as snapctl does: its status says what kind of failure it was."""
    from snap.ipc import BusyError, DeniedError, SnapError, UsageError

    kinds: dict[int, type[SnapError]] = {
        kind.exit_code: kind for kind in (UsageError, DeniedError, BusyError)
    }
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return kinds.get(status, SnapError)(
        f"the kernel ended {how} before it answered",
        f"{WORDS}; `snapctl doctor` checks this machine",
    )
