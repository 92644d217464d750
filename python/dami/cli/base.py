"""The command line, `dami`. Commands import torch only when they need it, so that --help is instant."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dami import sources
from dami.callers import CALLERS, Caller
from dami.version import __version__

if TYPE_CHECKING:
    from rich.progress import Progress

CHECKOUT = Path(__file__).resolve().parents[3]
ClickException: Any = typer.BadParameter.__mro__[2]  # typer either bundles click or uses the installed one

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class OneLineErrors(typer.core.TyperGroup):
    """Reports a user's mistake in one line, and exits with status 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **extra) or 0  # type: ignore[misc]
            sys.stdout.flush()
        except ClickException as error:
            code = fail(error.format_message()).exit_code
        except OSError as error:
            code = fail(error).exit_code
            with suppress(OSError):  # so that output that failed, on a full disk for example, is not retried at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except typer.Abort:
            code = 130
        if standalone_mode:
            sys.exit(code)
        return code


app = typer.Typer(
    cls=OneLineErrors,
    rich_markup_mode=None,  # its tables cut off option names in a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Two checkpoints, one batch, a reasoning intensity λ per query: 0 is the instruct end, 1 the thinking end.",
)


def fail(message: object) -> typer.Exit:
    """Reports what is wrong with the input, and returns the exception to raise."""
    with suppress(OSError):
        typer.echo(f"dami: error: {message}", err=True)
    return typer.Exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Reports the errors that dami and transformers raise for bad input, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise fail(error) from error


@contextmanager
def resumable() -> Iterator[None]:
    """Says, where a run is interrupted by the keyboard, that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(OSError):
            typer.echo("dami: interrupted; the same command goes on where it stopped", err=True)
        raise


def load(
    pair: Sequence[str] | None,
    format: str | None = None,
    dtype: str = "auto",
    invariant: bool = False,
    intensities: Sequence[float | str] = (),
    device: str | None = None,
    caller: Caller = CALLERS["dami generate"],
    checkpoints: Mapping[str, Any] | None = None,
    asks: bool = True,
) -> tuple[Any, Any]:
    """Loads a packed pair or two checkpoints, onto the GPU if there is one and no other device is named.

    `checkpoints` are their options, as `load_pair` takes them. A command that asks the model needs a tokenizer.
    Progress goes to stderr. Errors in the pair or in the requested λ are reported before torch is imported, as far as
    the files on disk show them.
    """
    if pair is None or not err.is_terminal:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise fail(f"--dtype must be auto, bfloat16, float16 or float32, got {dtype!r}")
    if pair is not None and len(pair) > 2:
        raise fail(f"a pair is one packed directory or two checkpoints, got {len(pair)}")
    ends = [*(pair or map(str, sources.example_pair()))]
    own = checkpoints or {}
    with user_errors():
        sources.check_pair(ends, format, intensities, caller, sources.per_end(dict(own), len(ends) == 2))
    outside = [lam for lam in intensities if not isinstance(lam, str) and not 0 <= lam <= 1]
    if outside:
        told = ", ".join(f"{lam:g}" for lam in outside)
        err.print(f"λ = {told} lies beyond the two ends: far from them answers are nonsense", style="yellow")
    with err.status("loading torch and transformers"):
        import torch

        from dami.loading.load import load_pair
    with user_errors():
        try:
            device = device or ("cuda" if torch.cuda.is_available() else None)
            options = {"format": format, "device_map": device, "dtype": dtype, "invariant": invariant, **own}
            model, tokenizer = load_pair(*ends, **options)
        except OSError as error:  # the hub's errors don't name the checkpoint
            raise OSError(f"cannot load {' and '.join(ends)}: {' '.join(str(error).split())}") from error
    if asks and tokenizer is None:
        raise fail(f"a tokenizer is needed, and {' and '.join(ends)} have none: put its files into {ends[0]}")
    return model, tokenizer


def progress_bars() -> Progress:
    """Returns progress bars on stderr that write nothing to a file or a pipe, not even an empty line at the end."""
    from rich.progress import Progress

    return Progress(console=err, transient=True, disable=not err.is_terminal)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context, show_version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if show_version:
        typer.echo(f"dami {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
