"""The group of commands: whatever ends one of them becomes one message and an exit code."""

from __future__ import annotations

import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from compose.errors import ComposeError, StepError
from compose.extras import missing_extra
from compose.terminal.live.stopping import exit_code, resuming_command
from compose.terminal.meant import refuse_command, with_commands
from compose.units import printable


class Commands(TyperGroup):
    """Commands whose errors become one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 1 for what failed, 2 for the user's mistakes, 130 and 143 for signals.

        With `--debug` the traceback of an error is shown, too.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            how = resuming_command()
            typer.secho(f"interrupted: the same command goes on from here: {how}", err=True)
            raise typer.Exit(exit_code(stop)) from None
        except BrokenPipeError:  # who reads our output has had enough
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("click", "typer"):
                self._name_commands(ctx, error)
                raise  # --help, an option that does not exist
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

    def _name_commands(self, ctx: Any, error: Any) -> None:
        """Add the commands that have it to the refusal of an option, instead of near options."""
        option = getattr(error, "option_name", None)
        options = {
            name: [word for parameter in command.params for word in parameter.opts]
            for name, command in self.commands.items()
        }
        if option is not None and (sentence := with_commands(option, options)):
            error.message, error.possibilities = f"{error.message}. {sentence}", None


def message_and_code(error: Exception) -> tuple[str, int]:
    """The message and the exit code of what ended a command."""
    missing = missing_extra(error) if isinstance(error, ModuleNotFoundError) else None
    cause = missing or error
    if isinstance(cause, ComposeError):
        return str(cause), cause.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", StepError.exit_code
    why = f"{type(error).__name__}: {error}"
    return f"{why}\n  fix: this is a mistake of ours; `gateskip --debug ...` shows where", 1
