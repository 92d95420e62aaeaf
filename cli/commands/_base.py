"""What all commands share: the common options, groups that import on demand, calls to the kernel.

Nothing heavy is imported at the top of this file: `snapctl --help` and completion pay for every import here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from snap.ipc.control import ControlClient

DEFAULT_TIMEOUT: Final = 10.0
COMPLETION_TIMEOUT: Final = 0.4
UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
FORMATS: Final = ("table", "json", "name")
# Ahead of every `python -m` that snapctl executes: -P keeps the working directory out of sys.path.
PYTHON: Final = (sys.executable, "-P", "-m")

T = TypeVar("T")


def duration(text: str) -> float:
    """Seconds of a time like `30s`, `500ms`, `2m`, `1h` or `1.5`: for click, as the type of an option."""
    number = text.rstrip("hms")
    unit = text[len(number) :]
    # isdecimal, for `float` takes "1e3", "nan" and "inf" as well, which nobody means.
    if unit not in UNITS or not number.isascii() or not number.replace(".", "", 1).isdecimal():
        raise click.BadParameter(f"{text!r} is no duration: write it like 30s, 500ms, 2m or 1h.")
    return float(number) * UNITS[unit]


@dataclass
class Settings:
    """The common options, wherever on the command line they were given; None means not given."""

    runtime_dir: Path | None = None
    output: str = "table"
    timeout: float | None = None

    def seconds(self, default: float = DEFAULT_TIMEOUT) -> float:
        return default if self.timeout is None else self.timeout

    def directory(self) -> Path:
        from snap.ipc.paths import runtime_dir

        return runtime_dir(self.runtime_dir)


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None and parameter.name is not None:
        setattr(context.ensure_object(Settings), parameter.name, value)


def common_options() -> list[click.Option]:
    """The options that every command takes, before and after its name."""
    return [
        click.Option(
            ["--runtime-dir"],
            type=click.Path(path_type=Path, file_okay=False),
            help="The kernel's runtime directory.  [default: $SNAP_RUNTIME_DIR or the user's own]",
            callback=_keep,
            expose_value=False,
            is_eager=True,
        ),
        click.Option(
            ["-o", "--output"],
            type=click.Choice(FORMATS),
            help="How to print data.  [default: table]",
            callback=_keep,
            expose_value=False,
            is_eager=True,
        ),
        click.Option(
            ["--timeout"],
            type=click.FloatRange(min=0, min_open=True),
            metavar="SECONDS",
            help="Give up after so long.",
            callback=_keep,
            expose_value=False,
            is_eager=True,
        ),
    ]


def add_common_options(command: click.Command) -> click.Command:
    """Give `command` those common options whose names it does not use itself."""
    taken = {name for parameter in command.params for name in parameter.opts}
    command.params.extend(option for option in common_options() if taken.isdisjoint(option.opts))
    return command


class Group(click.Group):
    """A group whose commands, given or loaded on demand, all take the common options.

    `lazy` maps a command's name to "module:attribute" and its line of help: listing the commands imports none.
    """

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self.lazy]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name in self.lazy:
            module, _, attribute = self.lazy[cmd_name][0].partition(":")
            command = getattr(import_module(module), attribute)
            self.add_command(command, cmd_name)
        return None if command is None else add_common_options(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown name is answered with the nearest one."""
        from difflib import get_close_matches

        near = [] if not args else get_close_matches(args[0], self.list_commands(ctx), n=1)
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if not near or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = {name: command.get_short_help_str(90) for name, command in self.commands.items()}
        rows.update({name: text for name, (_, text) in self.lazy.items()})
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows.items()))


def say(text: str) -> None:
    """Talk to the operator: standard error, so that standard output stays data."""
    click.echo(text, err=True)


@contextmanager
def control(settings: Settings, timeout: float | None = None) -> Iterator[ControlClient]:
    """A connection to the kernel. Raises UnreachableError when none runs on the runtime directory."""
    from snap.ipc.control import ControlClient

    with ControlClient(settings.directory(), timeout=timeout or settings.seconds()) as client:
        yield client


def call(
    settings: Settings,
    op: str,
    view: type[T],
    /,
    *,
    default_timeout: float = DEFAULT_TIMEOUT,
    **arguments: Any,
) -> T:
    """One request to the kernel, its result as a `view`. Raises what the kernel answers, or UnreachableError."""
    seconds = settings.seconds(default_timeout)
    with control(settings, seconds) as client:
        return ask(client, op, view, seconds, **arguments)


def ask(
    client: ControlClient, op: str, view: type[T], /, seconds: float | None = None, **arguments: Any
) -> T:
    """As `call`, over a connection that there is."""
    import msgspec

    from snap.ipc import ProtocolError

    result = client.call(op, timeout=seconds, **arguments)
    try:
        return msgspec.convert(result, view)
    except msgspec.ValidationError as error:
        raise ProtocolError(
            f"the kernel's answer to {op} is not understood: {error}",
            "kernel and snapctl are of different versions: compare with `snapctl version`",
        ) from error


def complete(context: click.Context, op: str, names: Any, incomplete: str) -> list[CompletionItem]:
    """Names for the shell; whatever goes wrong, there are simply none."""
    from click.shell_completion import CompletionItem

    try:
        settings = context.ensure_object(Settings)
        with control(settings, COMPLETION_TIMEOUT) as client:
            found = {str(name) for row in client.call(op, timeout=COMPLETION_TIMEOUT) for name in names(row)}
    except Exception:
        return []
    return [CompletionItem(name) for name in sorted(found) if name.startswith(incomplete)]


def complete_module(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return complete(context, "module.list", lambda row: [row["name"]], incomplete)


def complete_service(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return complete(context, "module.list", lambda row: row["provides"], incomplete)


def complete_cap(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return complete(context, "cap.list", lambda row: [row["id"]], incomplete)


def complete_owner(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return complete(context, "cap.list", lambda row: [row["owner"]], incomplete)
