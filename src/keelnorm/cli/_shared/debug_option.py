"""`--debug`: the traceback of what a command says in one line."""

from __future__ import annotations

import sys
import traceback

from typer.core import TyperGroup

OPTION = "--debug"


class Commands(TyperGroup):
    """The commands; with `--debug`, wherever it stands among the words, an error is followed by its traceback."""

    # The types are those of whichever click typer brings along.
    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        """Put `--debug` first, where the option is."""
        end = args.index("--") if "--" in args else len(args)
        words = [word for word in args[:end] if word != OPTION]
        return super().parse_args(ctx, [OPTION] * (len(words) < end) + words + args[end:])

    def invoke(self, ctx):  # type: ignore[no-untyped-def]
        """Run the command that is named."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params.get("debug") and error.__context__ is not None:
                traceback.print_exception(_whole(error.__context__), file=sys.stderr)
            raise


def _whole(error: BaseException) -> BaseException:
    """The error with all that led to it, which `raise ... from None` hides."""
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__, link = False, link.__cause__ or link.__context__
    return error
