"""What the commands on model files share: their arguments, how they show progress, and how they fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from repkern.cli._console import INTERRUPTED, WRONG_USE, console, fail, terminated_like_ctrl_c, warn

if TYPE_CHECKING:
    from repkern.nn.verify import Difference

__all__ = ["AsJson", "Block", "Classes", "ModelName", "Source", "check_names", "check_paths", "difference", "working"]

# Optional[...] because typer evaluates the annotations.
Source = Annotated[
    Path, typer.Argument(metavar="IN", exists=True, dir_okay=False, help="A checkpoint: .safetensors or .pth.")
]
ModelName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--model", metavar="NAME", help="The network in IN; files of repkern know it themselves."),
]
Block = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="KIND", help="Its kind of blocks.", show_default="the one that fits"),
]
Classes = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=0, help="Outputs of its last layer.", show_default="as many as the file has"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def check_paths(source: Path, destination: Path, suffixes: tuple[str, ...]) -> None:
    """Leave with 2 for a file that cannot be written, before anything long begins."""
    if destination.suffix not in suffixes:
        fail(f"OUT must end in {' or '.join(suffixes)}, got {str(destination)!r}", WRONG_USE)
    try:
        _check_destination(source, destination)
    except (OSError, ValueError) as problem:  # a name that is too long, or cannot be
        fail(f"OUT cannot be written: {problem}", WRONG_USE)


def _check_destination(source: Path, destination: Path) -> None:
    if not destination.parent.is_dir():
        fail(f"the folder {destination.parent} does not exist", WRONG_USE)
    if not os.access(destination.parent, os.W_OK):
        fail(f"the folder {destination.parent} cannot be written to", WRONG_USE)
    if destination.is_dir():
        fail(f"OUT must be a file, {destination} is a folder", WRONG_USE)
    if destination.exists() and destination.samefile(source):
        fail(f"IN and OUT are the same file {source}: the training form would be lost", WRONG_USE)


def check_names(source: Path, model: str | None, block: str | None) -> None:
    """Leave with 2 for a network or block that does not exist, and for a file that needs a network's name."""
    from repkern.models import default_block
    from repkern.models.saving import read_description
    from repkern.nn.kinds import check_kind

    try:
        if model is not None:
            default_block(model)
        if block is not None:
            check_kind(block, {})
    except ValueError as problem:
        fail(str(problem), WRONG_USE)
    try:
        described = read_description(source)
    except (ValueError, OSError) as problem:
        fail(str(problem))
    if described is None and model is None:
        fail(
            f"{source} does not say which network it holds: add --model NAME; `repkern models` lists the names",
            WRONG_USE,
        )


@contextlib.contextmanager
def working(as_json: bool, *, lines: bool = True) -> Iterator[Callable[[str], None]]:
    """Yields `say(step)`: a spinner on a terminal, `lines` in a pipe, nothing on stdout with --json.

    What goes wrong inside becomes exit code 1, Ctrl-C and a polite kill 130.
    """
    to = Console(stderr=True, highlight=False) if as_json else console()
    with contextlib.ExitStack() as stack:
        try:
            with terminated_like_ctrl_c():
                yield _speaker(to, lines and not as_json, stack)
        except KeyboardInterrupt:
            stack.close()
            warn("interrupted; nothing was written")
            raise typer.Exit(INTERRUPTED) from None
        except typer.Exit:
            raise
        except (ValueError, OSError, ImportError, RuntimeError) as problem:
            stack.close()
            fail(str(problem))


def _speaker(to: Console, lines: bool, stack: contextlib.ExitStack) -> Callable[[str], None]:
    if to.is_terminal:
        status = stack.enter_context(to.status(""))
        return lambda step: status.update(f"{step} ...")
    if lines:
        return lambda step: to.print(f"{step} ...", markup=False, soft_wrap=True)
    return lambda step: None


def difference(found: Difference) -> str:
    """Absolute, relative and bound: "2.1e-07, 1.3e-06 of the largest value (bound 4.0e-06)"."""
    return f"{found.absolute:.1e}, {found.relative:.1e} of the largest value (bound {found.bound:.1e})"
