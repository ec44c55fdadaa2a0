"""The `repkern` command. Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted by Ctrl-C."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from repkern.cli.eval import evaluate
from repkern.cli.export import export
from repkern.cli.info import info
from repkern.cli.models import models
from repkern.cli.predict import predict
from repkern.cli.quantize import quantize
from repkern.cli.quickstart import quickstart
from repkern.cli.recipes import recipes
from repkern.cli.reparameterize import reparameterize
from repkern.cli.repopt import repopt
from repkern.cli.search import app as search_app
from repkern.cli.train import train

__all__ = ["app", "main"]

_HELP = """
Train convolutional networks with rich blocks, deploy them as plain convolutions.

See it work on real images, in about two minutes:  [bold cyan]repkern quickstart[/]
"""
_EPILOG = "Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted by Ctrl-C."

app = typer.Typer(
    name="repkern",
    help=_HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from repkern import __version__

        typer.echo(f"repkern {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


app.command()(quickstart)
app.command()(train)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(recipes)
app.command()(repopt)
app.add_typer(search_app, name="search")
app.command()(reparameterize)
app.command()(export)
app.command()(quantize)
app.command()(models)
app.command()(info)

if importlib.util.find_spec("repkern.cli.bench") is not None:
    from repkern.cli.bench import app as bench_app

    app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of the `repkern` script and of `python -m repkern`."""
    app(prog_name="repkern")


if __name__ == "__main__":
    main()
