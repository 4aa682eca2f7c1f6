"""The command line `swaa-flex`: one module per command, thin over the library."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from .. import recipes as named
from .._version import __version__
from ..errors import SWAAError
from . import demo, distill, doctor, eval, finetune, layers, recommend, run, show

_RESUMED = {
    "eval": "The same command goes on where this one was.",
    "recommend": "The same command goes on where this one was.",
    "distill": "The same command goes on where this one was.",
    "finetune": "The same command goes on from the last checkpoint (--save-steps).",
    "layers": "With --out, the same command goes on with the losses that are measured; --method lazy starts over.",
    "merge": "Nothing is written; the same command starts over.",
    "demo": "The same command starts over.",
}
"""How commands that take long go on after they were interrupted."""


def main() -> None:
    """The entry point of `swaa-flex`."""
    app(prog_name="swaa-flex")


class _Commands(TyperGroup):
    """Says in one red line what went wrong on purpose; anything else is a bug and keeps its traceback."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        # Where people add it is at the end of the line that failed, behind the command; behind `run` it may be the
        # program's.
        command = next((arg for arg in args if not arg.startswith("-")), None)
        if "--debug" in args and command != "run":
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of a pipe has seen enough, which typer treats as such
        except KeyboardInterrupt as error:
            command = ctx.invoked_subcommand or ""
            if command == "run":
                raise  # it is the program's
            if int(os.environ.get("RANK", 0)) == 0:
                typer.echo(f"\nInterrupted. {_RESUMED.get(command, '')}".rstrip(), err=True)
            raise typer.Exit(130) from error
        except (SWAAError, ImportError, OSError) as error:
            if ctx.params["debug"]:
                raise
            what, *where = str(error).splitlines() or [type(error).__name__]
            console = Console(stderr=True, highlight=False)
            console.print(Text(f"Error: {what}", style="bold red"), soft_wrap=True)
            console.print(*(Text(line) for line in where), sep="\n", end="\n" if where else "", soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # with --debug, and for a bug, the traceback as Python prints it
)

# In the order of the help: a command is a function in a module of its own.
app.command("demo")(demo.demo)
app.command("show")(show.show)
app.command("doctor")(doctor.doctor)
app.command("eval")(eval.eval_)
app.command("layers")(layers.layers)
app.command("recommend")(recommend.recommend)
app.command("distill")(distill.distill)
app.command("finetune")(finetune.finetune)
app.command("merge")(finetune.merge)
app.command("run", context_settings={"allow_interspersed_args": False})(run.run)


@app.command("recipes")
def recipes() -> None:
    """List the recipes: the named configurations, and what each is for."""
    widest = max(map(len, named.names()))
    for name in named.names():
        typer.echo(f"{name:{widest}}  {named.describe(name)}")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"swaa-flex {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sliding-window attention for models trained with full attention.

    Start with a picture of what a recipe lets a prompt see, or of your own mask:

      [bold]swaa-flex show balanced --len 20000[/]
      [bold]swaa-flex show "causal & (window(64) | sinks(8))" --len 256[/]

    Every command explains itself: [bold]swaa-flex show --help[/].
    """
