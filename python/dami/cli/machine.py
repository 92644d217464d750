"""`dami bench` and `dami doctor`: measure and check what runs on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from dami.cli.base import CHECKOUT, app, err, fail, out, user_errors


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time the operators against plain PyTorch.

    This needs a checkout. Arguments go to `python -m benchmarks`.
    """
    if not (CHECKOUT / "benchmarks" / "__main__.py").exists():
        raise fail("benchmarks are not part of the installed package: run `make bench` in a checkout of the repository")
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", *context.args], cwd=CHECKOUT))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False) -> None:
    """See what runs here, why, and whether it is right.

    It reports what is installed, which kernels run here and why, and what to do about problems. Attach it to a bug
    report.
    """
    with user_errors(), err.status("running every operator"):
        from dami.doctor import examine

        report = examine()
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1, ensure_ascii=False))
    elif out.is_terminal:
        out.print(report)
    else:  # don't wrap lines in a file
        typer.echo(str(report))
    if report.problems:
        raise typer.Exit(1)
