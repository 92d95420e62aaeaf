"""`snapctl completion`: the script that makes a shell complete commands, and the kernel's names."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    bash: eval "$(snapctl completion bash)"      in ~/.bashrc
    zsh:  eval "$(snapctl completion zsh)"       in ~/.zshrc
    fish: snapctl completion fish > ~/.config/fish/completions/snapctl.fish
    """
    from click.shell_completion import get_completion_class

    from ..main import COMPLETE_VARIABLE, PROGRAM

    script = get_completion_class(shell)
    assert script is not None, f"click knows {shell}"
    click.echo(script(context.find_root().command, {}, PROGRAM, COMPLETE_VARIABLE).source())
