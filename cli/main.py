"""The command `snapctl`: the table of commands, and how every failure becomes a message, a hint and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import click

from .commands._base import Group, Settings, add_common_options, say

PROGRAM: Final = "snapctl"
COMPLETE_VARIABLE: Final = "_SNAPCTL_COMPLETE"

# 128 + the signal, as shells report a program that the signal ended.
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

EXIT_CODES: Final = {
    0: "done",
    1: "failed",
    2: "wrong usage: option, argument, manifest or policy file",
    3: "not running",
    4: "no such object",
    5: "denied by policy, rights or quota",
    6: "busy: somebody else is at it",
    7: "the deadline passed",
    8: "rolled back to the old version",
    9: "no kernel answers",
    INTERRUPTED: "interrupted by Ctrl-C",
    BROKEN_PIPE: "the reader of the output went away",
}

# What to do next, for an error that does not say it itself.
_HINTS: Final = {
    1: "`snapctl doctor` checks this machine; the kernel's own words are in kernel.log of its runtime directory",
    2: "see `snapctl COMMAND --help`",
    3: "start it: `snapctl module start NAME`",
    4: "`snapctl module list`, `cap list` and `channel list` show what there is",
    5: "`snapctl cap why WHO SERVICE` says which rule decided",
    6: "try again when the other operation is done",
    7: "give it longer with --timeout, or look with `snapctl status`",
    8: "the old version serves on; `snapctl module logs NAME` says why the new one did not",
    9: "start a kernel with `snapctl up`, or name its directory with --runtime-dir",
}

COMMANDS: Final = {
    "up": ("snap.cli.commands.up:up", "Start the kernel."),
    "down": ("snap.cli.commands.down:down", "Stop the kernel and all modules."),
    "status": ("snap.cli.commands.status:status", "Tell how the kernel and its modules are."),
    "module": (
        "snap.cli.commands.module:module",
        "Modules: list, show, start, stop, restart, logs, new, check.",
    ),
    "upgrade": (
        "snap.cli.commands.upgrade:upgrade",
        "Upgrade a module or the kernel while its clients go on.",
    ),
    "rollback": (
        "snap.cli.commands.rollback:rollback",
        "Put a module back to the version before.",
    ),
    "cap": ("snap.cli.commands.cap:cap", "Capabilities: list, inspect, why, grant, revoke."),
    "channel": ("snap.cli.commands.channel:channel", "Channels: list."),
    "pony": (
        "snap.cli.commands.pony:pony",
        "Pony Express: flows, peers, regions, key, ping, perf.",
    ),
    "events": ("snap.cli.commands.events:events", "Print what happened, and follow what happens."),
    "doctor": ("snap.cli.commands.doctor:doctor", "Tell what this machine allows, and what follows."),
    "bench": ("snap.cli.commands.bench:bench", "Measure Snap beside its peers on this machine."),
    "demo": (
        "snap.cli.commands.demo:demo",
        "Send a directory tree through a module, and do it all to it midway.",
    ),
    "version": ("snap.cli.commands.version:version", "Print the versions of snapctl and the kernel."),
    "completion": ("snap.cli.commands.completion:completion", "Print the completion script of a shell."),
}

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {text}" for code, text in EXIT_CODES.items())


class _Root(Group):
    def invoke(self, ctx: click.Context) -> Any:
        """As click's, but a reader that went away is not click's to report: it would exit 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise click.exceptions.Exit(BROKEN_PIPE) from None


@click.group(
    cls=_Root,
    lazy=COMMANDS,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def root() -> None:
    """Operate Snap: the kernel, its modules, capabilities and channels.

    Data goes to standard output, everything else to standard error.
    """


add_common_options(root)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    settings = Settings()
    try:
        result = root.main(
            args=None if arguments is None else list(arguments),
            prog_name=PROGRAM,
            complete_var=COMPLETE_VARIABLE,
            standalone_mode=False,
            obj=settings,
        )
    except click.ClickException as error:
        error.show()
        return _json_error(settings, "usage", error.format_message(), _HINTS[2], 2)
    except (click.Abort, KeyboardInterrupt):
        say("")
        return INTERRUPTED
    except Exception as error:
        return _report(settings, error)
    return result if isinstance(result, int) else 0


def _report(settings: Settings, error: Exception) -> int:
    """Tell the operator what failed and what to do next. An error that is no known kind is a bug: it is re-raised."""
    from snap.ipc import SnapError

    from .output import plain

    if isinstance(error, SnapError):
        code, name, message, hint = (
            error.exit_code,
            error.code,
            error.message,
            error.hint or _HINTS[error.exit_code],
        )
    elif isinstance(error, ImportError):
        code, name, message = 1, "failed", f"this installation is incomplete: {error}"
        hint = "install it again: `pip install .` builds the native half, which needs cargo"
    elif isinstance(error, OSError):
        code, name, message, hint = 1, "failed", str(error), _HINTS[1]
    else:
        raise error
    say(f"{PROGRAM}: {plain(message)}")
    say(f"hint: {plain(hint)}")
    return _json_error(settings, name, message, hint, code)


def _json_error(settings: Settings, name: str, message: str, hint: str, code: int) -> int:
    if settings.output == "json":
        from .output import print_json

        error = {"code": name, "message": message, "hint": hint, "exit_code": code}
        print_json("Error", error, one_line=True, err=True)
    return code


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run, flush, exit. A pipe whose reader is gone is no reason to print anything."""
    code = run(arguments)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        # The interpreter flushes once more on its way out and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    sys.exit(code)
