"""The group of all commands: it says in one line why a command failed, with `--debug` its traceback too."""

from __future__ import annotations

import sys
import traceback

import typer
from typer.core import TyperGroup

from keelnorm.cli._shared.failures import CommandError

OPTION = "--debug"


class Commands(TyperGroup):
    """The commands. `--debug` is accepted anywhere in the command line."""

    # The types are those of whichever click typer brings along.
    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        """Move `--debug` to the front, where the option is declared."""
        end = args.index("--") if "--" in args else len(args)
        words = [word for word in args[:end] if word != OPTION]
        return super().parse_args(ctx, [OPTION] * (len(words) < end) + words + args[end:])

    def invoke(self, ctx):  # type: ignore[no-untyped-def]
        """Run the command that is named, and end it in one line when it fails."""
        try:
            return super().invoke(ctx)
        except CommandError as error:
            typer.echo(str(error), err=True)
            _show_traceback(ctx, error)
            raise typer.Exit(error.status) from None
        except Exception as error:
            if error.__context__ is not None:
                _show_traceback(ctx, error.__context__)
            raise


def _show_traceback(ctx, error: BaseException) -> None:  # type: ignore[no-untyped-def]
    if ctx.params.get("debug"):
        traceback.print_exception(_whole(error), file=sys.stderr)


def _whole(error: BaseException) -> BaseException:
    """The error with all that led to it, which `raise ... from None` hides."""
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__, link = False, link.__cause__ or link.__context__
    return error
