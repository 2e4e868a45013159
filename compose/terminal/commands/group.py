"""The classes of commands: one message and an exit code for an error, plain help, old spellings."""

from __future__ import annotations

import traceback
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from compose.errors import UserError
from compose.terminal.live.messages import message_and_code
from compose.terminal.live.stopping import exit_code, resuming_command
from compose.terminal.meant import fix_of_option, refuse_command
from compose.terminal.renamed import with_new_names
from compose.units import printable


def with_plain_help(parameters: list[Any]) -> list[Any]:
    """The parameters of a command; help shows no type beside a flag or an argument."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) or parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: ""
    return parameters


class Command(TyperCommand):
    """A command that also reads the old spellings of its options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments, old spellings as the new ones."""
        return super().parse_args(ctx, with_new_names(args, options_of(self)))

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters and `--help`."""
        return with_plain_help(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters and `--help`."""
        return with_plain_help(super().get_params(ctx))


class Commands(Group):
    """All commands. An error of any of them becomes one message and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the command; one that does not exist becomes one message."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            self._refuse_usage(error)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 1 for what failed, 2 for the user's mistakes, 130 and 143 for signals.

        With `--debug` the traceback of an error is shown, too.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            how = resuming_command()
            typer.secho(f"interrupted: to continue, run the same command again: {how}", err=True)
            raise typer.Exit(exit_code(stop)) from None
        except BrokenPipeError:  # who reads our output has had enough
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("click", "typer"):
                self._refuse_usage(error)
                raise  # --help, or the end of a command
            if ctx.params.get("debug"):
                traceback.print_exc()
            text, code = message_and_code(error)
            typer.secho(f"error: {printable(text)}", err=True, fg=None)
            raise typer.Exit(code) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was named. UserError, with the one that was meant, if there is none."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            refuse_command(args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def _refuse_usage(self, error: Any) -> None:
        """Show one message where the arguments of a command are wrong, and exit with 2; let any
        other exception pass."""
        context = getattr(error, "ctx", None)
        if context is None or type(error).__name__ == "NoArgsIsHelpError":
            return
        command = context.command_path
        fix = f"`{command} --help` explains its arguments"
        option = getattr(error, "option_name", None)
        if option is not None and hasattr(error, "possibilities"):
            shown = {name: sub for name, sub in self.commands.items() if not sub.hidden}
            others = {name: options_of(sub) for name, sub in shown.items()}
            fix = fix_of_option(option, error.possibilities or (), others) or fix
            error.possibilities = None
        refusal = UserError(f"{command}: {error.format_message()}", fix=fix)
        typer.secho(f"error: {printable(str(refusal))}", err=True, fg=None)
        raise typer.Exit(refusal.exit_code) from None


def options_of(command: Any) -> list[str]:
    """All options of a command, as they are typed."""
    return [
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("-")
    ]
