"""The command line, `dami`. Torch is imported where a command needs it, so that --help is instant."""

from __future__ import annotations

import json
import math
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dami import __version__, sources
from dami.files import check_directory, check_new, written_whole
from dami.prompts import Prompt, as_prompt

FORMATS = ("pair", "int8", "int4", "w8d4", "lowrank")  # dami_kernels.formats.names(), which needs torch
CHECKOUT = Path(__file__).resolve().parents[2]
ClickException: Any = typer.BadParameter.__mro__[2]  # typer brings its own click, or takes the installed one

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class OneLineErrors(typer.core.TyperGroup):
    """Tells a mistake of the user in one line, and exits with 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **extra) or 0  # type: ignore[misc]
            sys.stdout.flush()
        except ClickException as error:
            code = fail(error.format_message()).exit_code
        except OSError as error:
            code = fail(error).exit_code
            with suppress(OSError):  # what could not be written, to a full disk say, is not tried again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except typer.Abort:
            code = 130
        if standalone_mode:
            sys.exit(code)
        return code


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    rich_markup_mode=None,  # whose tables cut the names of options in a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Two checkpoints, one batch, a reasoning intensity λ per query: 0 is the instruct end, 1 the thinking end.",
)


def fail(message: object) -> typer.Exit:
    """Tells what is wrong with the input; what comes back is to be raised."""
    with suppress(OSError):
        typer.echo(f"dami: error: {message}", err=True)
    return typer.Exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Tells what dami and transformers say of bad input, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise fail(error) from error


def finite(text: str) -> float:
    """Reads a λ."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(f"must be a finite number such as 0.5, got {text!r}")
    return value + 0.0  # no -0.0


def number_or_name(text: str) -> float | str:
    """Reads a λ, or the name of a preset, or "auto"."""
    return text if text.isidentifier() and text.lower() not in ("nan", "inf", "infinity") else finite(text)


def positive(text: str) -> float:
    """Reads a temperature."""
    value = finite(text)
    if value <= 0:
        raise typer.BadParameter(f"must be above 0, got {text!r}; --greedy takes the likeliest token")
    return value


def format_name(text: str) -> str:
    """Reads how a pair is kept."""
    if text not in FORMATS:
        raise typer.BadParameter(f"must be one of {', '.join(FORMATS)}, got {text!r}")
    return text


def template(text: str) -> str | float:
    """Reads a chat template's name, or the λ from which on the thinking end's is taken."""
    if text in ("instruct", "thinking"):
        return text
    try:
        return finite(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"must be instruct, thinking or a finite number, got {text!r}") from error


PairOption = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--pair", metavar="INSTRUCT THINKING", help="Two directories or hub names. Default: the shipped pair."
    ),
]
EndsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PAIR | INSTRUCT THINKING]", help="A packed pair or two checkpoints. Default: the shipped pair."
    ),
]
TaskArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[TASK]",
        help="A file of questions (.jsonl), or a dataset of reasoning-gym. Default: the shipped pair's questions.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", parser=format_name, metavar="NAME", help=f"How the pair is kept: {', '.join(FORMATS)}."),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="auto|NAME",
        help="Of what is computed: bfloat16, float16 or float32. Default: the checkpoints'; of a GGUF file float32.",
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the sampling.")]
VerifierOption = Annotated[
    str | None,
    typer.Option(help="Of a file's questions that name none: math (math-verify), word (the last) or contains."),
]
RowsOption = Annotated[int, typer.Option(min=1, help="Rows of a batch, which holds all λ of a question.")]
MaxTokensOption = Annotated[int | None, typer.Option(min=1, help="Tokens of an answer, at most.")]


def load(
    pair: Sequence[str] | None,
    format: str | None = None,
    dtype: str = "auto",
    invariant: bool = False,
    intensities: Sequence[float | str] = (),
    device: str | None = None,
) -> tuple[Any, Any]:
    """Loads a packed pair or two checkpoints, onto the GPU if there is one and no other device is named.

    Progress goes to stderr. What is wrong with them, or with the λ that they are to be asked at, is told before torch
    is imported if files on disk show it.
    """
    if pair is None or not err.is_terminal:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise fail(f"--dtype must be auto, bfloat16, float16 or float32, got {dtype!r}")
    if pair is not None and len(pair) > 2:
        raise fail(f"a pair is one packed directory or two checkpoints, got {len(pair)}")
    ends = [*(pair or map(str, sources.example_pair()))]
    with user_errors():
        sources.check_pair(ends, format, intensities)
    outside = [lam for lam in intensities if not isinstance(lam, str) and not 0 <= lam <= 1]
    if outside:
        told = ", ".join(f"{lam:g}" for lam in outside)
        err.print(f"λ = {told} lies beyond the two ends: far from them answers are nonsense", style="yellow")
    with err.status("loading torch and transformers"):
        import torch

        from dami.checkpoints import load_pair
    with user_errors():
        try:
            device = device or ("cuda" if torch.cuda.is_available() else None)
            options: dict[str, Any] = {"format": format, "device_map": device, "dtype": dtype, "invariant": invariant}
            return load_pair(*ends, **options)
        except OSError as error:  # the hub's do not say which
            raise OSError(f"cannot load {' and '.join(ends)}: {' '.join(str(error).split())}") from error


def progress_bars() -> Any:
    """Bars on stderr, which a file or a pipe gets nothing of: not even the empty line at their end."""
    from rich.progress import Progress

    return Progress(console=err, transient=True, disable=not err.is_terminal)


def read_task(task: str | None, pair: Sequence[str] | None, verifier: str | None, count: int | None, seed: int) -> Any:
    """The questions, by default those of the shipped pair."""
    from dami.evaluation.tasks import load_task

    if task is None and pair is not None:
        raise fail(
            "a task is needed for a pair of your own: a file of questions (.jsonl), or a dataset of reasoning-gym"
        )
    with user_errors():
        return load_task(task or str(sources.QUESTIONS), count, seed, **({"verifier": verifier} if verifier else {}))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context, show_version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    if show_version:
        typer.echo(f"dami {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Directory of the picture and the numbers.")
    ] = Path("demo-output"),
    pair: PairOption = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions of the sweep, each asked at 11 λ.")] = 120,
    seed: SeedOption = 0,
) -> None:
    """See the idea work.

    A batch at three λ, the curve of accuracy and tokens, and the price against merged copies.
    """
    with user_errors():
        check_directory(output)
    model, tokenizer = load(pair)
    from dami.demo import run

    with user_errors():
        run(model, tokenizer, pair, output, questions, seed, out)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; or see --file; or on stdin.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", exists=True, dir_okay=False, readable=True, help="Prompts, one a line."),
    ] = None,
    intensity: Annotated[
        list[str] | None,
        typer.Option(
            "--intensity",
            "-l",
            parser=number_or_name,
            metavar="λ|NAME",
            help="A number, a preset (low, medium, high) or auto. May be given several times. Default: 0, 0.5 and 1.",
        ),
    ] = None,
    pair: PairOption = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    stream: Annotated[bool, typer.Option("--stream", help="Show tokens as they come.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line for every answer.")] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(
            parser=template,
            metavar="NAME|λ",
            help="instruct or thinking; or the λ from which on it is thinking's. Default: the pair's.",
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give prompts as they are, without the chat template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens at most, thought included.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead of sampling.")] = False,
    temperature: Annotated[
        float | None, typer.Option(parser=positive, metavar="NUMBER", help="Of the sampling.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Of the sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Of the sampling.")] = None,
    seed: SeedOption = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows of a batch at most; a prompt takes one for each λ.")
    ] = 64,
) -> None:
    """Answer prompts at several λ at once, side by side.

    A line of a file or of stdin is a prompt; one that starts with { is a JSON object with "prompt" or "messages".
    """
    if stream and as_json:
        raise fail("--stream and --json exclude each other")
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    options = {name: value for name, value in options.items() if value is not None}
    sampling = options.keys() - {"max_new_tokens"}
    if greedy and sampling:
        raise fail(f"--greedy excludes --{', --'.join(sorted(sampling)).replace('_', '-')}")
    if greedy or sampling:
        options["do_sample"] = not greedy
    if raw and chat_template is not None:
        raise fail("--raw excludes --chat-template")
    put_through = None if raw else "default" if chat_template is None else chat_template
    asked = read_prompts(prompts or [], file)
    lams: list[Any] = intensity or [0.0, 0.5, 1.0]
    model, tokenizer = load(pair, format, dtype, intensities=lams)

    import torch

    from dami import terminal
    from dami.chat import ask

    torch.manual_seed(seed)
    if stream:
        for prompt in asked:
            with user_errors():
                terminal.stream(model, tokenizer, prompt, lams, put_through, out, **options)
        return
    step = max(1, batch_size // len(lams))
    for start in range(0, len(asked), step):
        rows = [(prompt, lam) for prompt in asked[start : start + step] for lam in lams]
        with user_errors(), err.status(f"{len(rows)} rows in one batch"):
            answers = ask(
                model, tokenizer, [prompt for prompt, _ in rows], [lam for _, lam in rows], put_through, **options
            )
        for place in range(0, len(answers), len(lams)):
            if as_json:
                for answer in answers[place : place + len(lams)]:
                    typer.echo(json.dumps(asdict(answer), ensure_ascii=False))
            else:
                out.print(terminal.side_by_side(answers[place : place + len(lams)], out))


def read_prompts(prompts: list[str], file: Path | None) -> list[Prompt]:
    """Prompts from the command line, or else a file, or else stdin."""
    if prompts and file:
        raise fail("prompts come as arguments or with --file, got both")
    if prompts:
        with user_errors():
            return [as_prompt(prompt) for prompt in prompts]
    source = str(file) if file else "stdin"
    if file is None and sys.stdin.isatty():
        raise fail("no prompts: give them as arguments, with --file or on stdin")
    with user_errors():
        try:
            text = (file.read_bytes() if file else sys.stdin.buffer.read()).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} must be text in UTF-8: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise fail(f"no prompts: {source} is empty")
    return [read_prompt(line.removesuffix("\r"), f"{source}, line {number}") for number, line in lines]


def read_prompt(line: str, place: str) -> Prompt:
    """A line of text, or a JSON object's "prompt" (or "question") or "messages"."""
    if not line.lstrip().startswith("{"):
        return line
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise fail(f"{place} starts with {{ but is not JSON: {error}") from error
    for key in ("prompt", "question", "messages"):
        if key in record:
            try:
                return as_prompt(record[key])
            except ValueError as error:
                raise fail(f"{place}: {error}") from error
    raise fail(f'{place} must have "prompt" or "messages", got {list(record)}')


@app.command()
def describe(
    ends: EndsArgument = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Show every parameter of a pair, how it is kept, and the sum.

    The sum is the bytes of all, against merged copies.
    """
    model, _ = load(ends, format, dtype)
    import dami
    from dami.terminal import parameters

    out.print(parameters(dami.describe(model), out))


OutputOption = Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Directory to write.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a directory that exists.")]


@app.command()
def pack(
    output: OutputOption,
    ends: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INSTRUCT THINKING]", help="Directories or hub names of both ends. Default: the shipped pair."
        ),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", parser=format_name, metavar="NAME", help="How the pair is kept.")
    ] = "int4",
    overwrite: OverwriteOption = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Let checkpoints run code.")] = False,
) -> None:
    """Pack two checkpoints into one directory.

    Tensor by tensor, never both models in memory; to load, or to share.
    """
    instruct, thinking = ends if ends and len(ends) == 2 else sources.example_pair()
    if ends and len(ends) != 2:
        raise fail(f"two checkpoints are packed, an instruct and a thinking one, got {len(ends)}")
    with user_errors():
        sources.check_pair([str(instruct), str(thinking)], format)
        check_new(output, overwrite, [instruct, thinking])
    with err.status("loading torch and transformers"):
        import dami
        from dami.terminal import size
    with user_errors():
        dami.pack(instruct, thinking, output, format, overwrite=overwrite, trust_remote_code=trust_remote_code)
    total = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    out.print(f"{output}: {size(total)}. Load it with dami.load_pair({str(output)!r}).")


@app.command()
def merge(
    output: OutputOption,
    intensity: Annotated[float, typer.Option("--intensity", "-l", parser=finite, metavar="λ", help="Of the copy.")],
    ends: EndsArgument = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write an ordinary checkpoint of a pair at one λ.

    Where one λ is enough, it is the faster choice.
    """
    inputs = ends or [str(end) for end in sources.example_pair()]
    with user_errors():
        check_new(output, overwrite, inputs)
    model, tokenizer = load(ends, intensities=[intensity], device="cpu")  # each weight is read once
    from dami.sharing import write_merged

    with user_errors(), written_whole(output, overwrite, inputs) as partial:
        write_merged(model, partial, tokenizer, intensity)
    out.print(f"{output}: an ordinary checkpoint at λ={intensity:g}.")


@app.command()
def serve(
    ends: EndsArgument = None,
    host: Annotated[str, typer.Option(help="Where to listen. Another address than this lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Requests must bring it; may be given several times. Default: DAMI_API_KEY, if it is set."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which clients call the server, beside localhost; may be given several times. "
            "Default: any, but only localhost while there is no API key and --host is local.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--served-model-name", help="Default: the instruct end's.")] = None,
    default_intensity: Annotated[
        Any,
        typer.Option(
            parser=number_or_name, metavar="λ|NAME", help="Of requests that name none: a number, a preset or auto."
        ),
    ] = "0.5",
    intensity_range: Annotated[
        tuple[float, float], typer.Option(metavar="LOWEST HIGHEST", help="λ that requests may ask for.")
    ] = (-1.0, 2.0),
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    chat_template: Annotated[
        str | None,
        typer.Option(
            parser=template,
            metavar="NAME|λ",
            help="instruct or thinking; or the λ from which on it is thinking's. Default: the pair's.",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer. Default: as many as fit.")
    ] = None,
    kv_memory: Annotated[float, typer.Option(min=0.0, help="GiB of the KV cache.")] = 1.0,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 512,
    max_batch_rows: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 64,
    max_requests: Annotated[int, typer.Option(min=1, help="Sequences at once, waiting ones included.")] = 4096,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1 << 20,
    read_timeout: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="For a request's headers, and again for its body.")
    ] = 30,
    prefix_cache: Annotated[
        bool, typer.Option(help="Let requests of one λ share the KV cache of equal prompt beginnings.")
    ] = True,
    invariant: Annotated[
        bool, typer.Option("--invariant", help="Make an answer's bits independent of other requests, at some cost.")
    ] = False,
    target_latency: Annotated[
        float | None,
        typer.Option(
            parser=finite,
            metavar="SECONDS",
            help="Let requests with auto or max_intensity think less under load, so that answers take no longer.",
        ),
    ] = None,
    intensity_floor: Annotated[
        float, typer.Option(parser=finite, metavar="λ", help="How far --target-latency may go down.")
    ] = 0.0,
    frontier: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="By dami evaluate. Default: its estimator's."),
    ] = None,
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that requests have to end after SIGTERM; then they are cut off.")
    ] = 25,
) -> None:
    """Serve a pair over HTTP, as OpenAI does, each request at its own λ."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        from dami_kernels.installation import needs

        raise fail(needs("dami serve", str(error.name), "serve")) from error
    if not intensity_range[0] <= intensity_range[1] or not all(map(math.isfinite, intensity_range)):
        raise fail(f"--intensity-range must be two finite numbers, the lower first, got {intensity_range}")
    from dami.serving.controller import IntensityController
    from dami.serving.gate import LOOPBACK, check_key
    from dami.serving.playground import read_frontier

    local = host in LOOPBACK
    keys = api_key if api_key is not None else [os.environ["DAMI_API_KEY"]] if "DAMI_API_KEY" in os.environ else []
    with user_errors():
        for key in keys:
            check_key(key, "DAMI_API_KEY" if api_key is None else "--api-key")
        check_port(host, port)
        given = read_frontier(frontier) if frontier else None
        if target_latency is not None:  # what it refuses is told now
            IntensityController(target_latency, max_batch_rows, intensity_floor)
    model, tokenizer = load(ends, format, dtype, invariant, [default_intensity])
    from dami.dial import patch_of
    from dami.serving.engine import Engine, Limits
    from dami.serving.listening import run
    from dami.serving.server import Settings, create_app

    controller = None
    with user_errors():
        known = dict(patch_of(model).frontier) if given is None else given
        if target_latency is not None:
            tokens = {point["intensity"]: point["tokens"][0] for point in known.get("points", [])}
            controller = IntensityController(target_latency, max_batch_rows, intensity_floor, tokens=tokens)
        limits = Limits(kv_memory, max_model_len, max_batch_tokens, max_batch_rows, max_requests, prefix_cache)
        settings = Settings(
            name or (Path(ends[0]).name if ends and Path(ends[0]).exists() else ends[0] if ends else "shipped"),
            default_intensity,
            intensity_range,
            "default" if chat_template is None else chat_template,
            tuple(keys),
            (*LOOPBACK, *(allowed_host or ())) if allowed_host or (local and not keys) else (),
            max_body,
            read_timeout,
            known,
        )
        served = create_app(Engine(model, limits, controller), tokenizer, settings)
    if not local and not keys:
        err.print(f"anyone who reaches {host} may use this server: see --api-key", style="yellow")
    try:
        with user_errors():
            code = run(served, host, port, drain)
    except SystemExit as stopped:  # uvicorn's, which has told why
        raise fail(f"the server did not start on {host} port {port}") from stopped
    raise typer.Exit(code)


def check_port(host: str, port: int) -> None:
    """Raises OSError if a server cannot listen there: now, not after the model has been loaded."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
                trial.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error


@app.command()
def evaluate(
    task: TaskArgument = None,
    pair: PairOption = None,
    format: FormatOption = "pair",
    dtype: DtypeOption = "auto",
    intensity: Annotated[
        list[float] | None,
        typer.Option("--intensity", "-l", parser=finite, metavar="LAMBDA", help="λ to ask at; 0 to 1 in tenths."),
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="How many. Default: all of a file, 100 else.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to a question at one λ.")] = 1,
    verifier: VerifierOption = None,
    rows: RowsOption = 64,
    max_tokens: MaxTokensOption = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Directory.")] = Path("evaluation"),
    seed: SeedOption = 0,
) -> None:
    """Ask every question at every λ, and report the frontier.

    The report is a picture, numbers, and all answers as a page. A run that was interrupted goes on where it ended.
    """
    from rich.live import Live
    from rich.text import Text

    from dami.evaluation.tasks import TO_EVALUATE, check_distinct, check_enough

    lams = intensity or [tenth / 10 for tenth in range(11)]
    with user_errors():
        check_directory(output)
        check_distinct(lams)
    asked = read_task(task, pair, verifier, questions, seed)
    with user_errors():
        check_enough(asked, TO_EVALUATE)
    model, tokenizer = load(pair, format, dtype, intensities=lams)
    from dami.chat import numbers_of
    from dami.dial import patch_of
    from dami.evaluation.frontier import Frontier
    from dami.evaluation.report import write_report
    from dami.evaluation.sweeps import Record, sweep
    from dami.terminal import point_table

    options: dict[str, Any] = {"do_sample": False} if greedy else {}
    if max_tokens:
        options["max_new_tokens"] = max_tokens
    records: list[Record] = []
    total = len(asked.questions) * samples * len(lams)

    with user_errors(), Live(console=err, transient=True) as live:

        def show(news: list[Record]) -> None:
            records.extend(news)
            live.update(point_table(Frontier.of(records).points, Text(f"{len(records)} of {total} answers", "dim")))

        sweep(
            model, tokenizer, asked, lams,
            path=output / "records.jsonl", samples=samples, rows=rows, seed=seed, on_batch=show, **options,
        )  # fmt: skip
        about = {"pair": " and ".join(pair) if pair else "the shipped pair", "format": format, "samples": samples}
        prompts = [question.question for question in asked.questions]
        chosen: list[float] | None = None
        if patch_of(model).estimator is not None:
            pieces = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
            chosen = [lam for some in pieces for lam in numbers_of(model, tokenizer, some, ["auto"] * len(some))]
        frontier = write_report(asked, records, output, about, chosen)
    out.print(point_table(frontier.points))
    out.print(
        f"Page, picture, numbers: {output / 'report.html'}, frontier.svg, frontier.json", style="dim", soft_wrap=True
    )


@app.command("train-estimator")
def train_estimator(
    output: OutputOption,
    task: TaskArgument = None,
    pair: PairOption = None,
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    intensity: Annotated[
        list[float] | None,
        typer.Option("--intensity", "-l", parser=finite, metavar="LAMBDA", help="λ to ask at; 0 to 1 in fifths."),
    ] = None,
    router: Annotated[bool, typer.Option("--router", help="Choose between the two ends only.")] = False,
    trial: Annotated[int, typer.Option(min=0, help="Tokens of a trial answer to read too.")] = 0,
    price: Annotated[
        float, typer.Option(min=0, help="Accuracy that as many tokens as the thinking end takes must bring.")
    ] = 0.2,
    questions: Annotated[int | None, typer.Option(min=1, help="How many. Default: all of a file, 100 else.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to a question at one λ.")] = 2,
    verifier: VerifierOption = None,
    rows: RowsOption = 64,
    max_tokens: MaxTokensOption = None,
    seed: SeedOption = 0,
) -> None:
    """Learn from answers which λ a prompt deserves.

    Questions like those to come are answered at several λ, and what was learned is measured on some that were held out.
    dami.attach(model, OUTPUT) then lets intensity="auto" choose. Named `intensity` inside a packed pair or a thinking
    end, OUTPUT is loaded with it. A run that was interrupted goes on where it ended.
    """
    from rich.table import Table

    from dami.evaluation.tasks import TO_TRAIN, check_distinct, check_enough

    if router and intensity:
        raise fail("--router asks at the two ends: leave --intensity out")
    lams = [0.0, 1.0] if router else intensity or [fifth / 5 for fifth in range(6)]
    asked = read_task(task, pair, verifier, questions, seed)
    with user_errors():
        check_directory(output)
        check_distinct(lams)
        check_enough(asked, TO_TRAIN)
    model, tokenizer = load(pair, format, dtype, intensities=lams)
    from dami.estimators.training import train_estimator

    with user_errors(), progress_bars() as progress:
        bar = progress.add_task("answers", total=len(asked.questions) * samples * len(lams))
        trained = train_estimator(
            model, tokenizer, asked, output, lams, samples=samples, trial=trial, price=price, rows=rows, seed=seed,
            on_batch=lambda news: progress.advance(bar, len(news)),
            **({"max_new_tokens": max_tokens} if max_tokens else {}),
        )  # fmt: skip
    table = Table("price", "accuracy", "tokens", "best static λ with as many", "gain")
    for each, outcome in trained.outcomes.items():
        cells = map(str, (outcome.accuracy, outcome.tokens, outcome.static, outcome.gain))
        table.add_row(f"{each:g}", *cells, style="bold" if each == price else None)
    out.print(table)
    presets = ", ".join(f"{name} λ={lam:g}" for name, lam in trained.stored.presets.items())
    out.print(f"{output}: an estimator at price {price:g}; {presets}.", style="dim", soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time the operators against plain PyTorch.

    This needs a checkout. Arguments go to `python -m benchmarks`.
    """
    if not (CHECKOUT / "benchmarks" / "__main__.py").exists():
        raise fail("benchmarks are not part of the installed package: run `make bench` in a checkout of the repository")
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", *context.args], cwd=CHECKOUT))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """See what runs here, why, and whether it is right.

    What is installed, which kernels run here, and what to do about problems: for a bug report.
    """
    with user_errors(), err.status("running every operator"):
        from dami.doctor import examine

        report = examine()
    typer.echo(json.dumps(asdict(report), indent=1, ensure_ascii=False) if as_json else str(report))
    if report.problems:
        raise typer.Exit(1)


@app.command()
def study(
    task: TaskArgument = None,
    pair: PairOption = None,
    format: FormatOption = "pair",
    dtype: DtypeOption = "auto",
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="permuted|CHECKPOINT",
            help="Another way from the instruct end: to the thinking end with its neurons and heads permuted, or to a "
            "checkpoint. May be given several times.",
        ),
    ] = None,
    intensity: Annotated[
        list[float] | None,
        typer.Option(
            "--intensity", "-l", parser=finite, metavar="LAMBDA", help="λ of the path; −0.2 to 1.2 in tenths."
        ),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    verifier: VerifierOption = None,
    rows: RowsOption = 256,
    max_tokens: MaxTokensOption = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", file_okay=False, help="Directory.")] = Path("study"),
    seed: SeedOption = 0,
) -> None:
    """Study the path between the ends, and each part alone.

    States, loss and accuracy along the path, against controls; and each part of the model by itself at λ = 1.
    A run that was interrupted goes on where it ended.
    """
    from dami.evaluation.tasks import TO_STUDY, check_distinct, check_enough

    asked = read_task(task, pair, verifier, questions, seed)
    with user_errors():
        check_directory(output)
        check_enough(asked, TO_STUDY)
        if intensity:
            check_distinct(intensity, (0.0, 1.0))
        for each in set(control or ()) - {"permuted"}:
            sources.local(each)
    model, tokenizer = load(pair, format, dtype, intensities=intensity or ())
    from dami.evaluation import study as studies
    from dami.evaluation.study_report import write_report

    options: dict[str, Any] = {"do_sample": sample}
    if max_tokens:
        options["max_new_tokens"] = max_tokens
    with user_errors(), progress_bars() as bars:
        shown: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                shown[stage] = bars.add_task(stage, total=total)
            bars.update(shown[stage], completed=done)

        found = studies.study(
            model, tokenizer, asked, output, controls=control or (), intensities=intensity or studies.PATH, rows=rows,
            seed=seed, progress=progress, **options,
        )  # fmt: skip
    about = {
        "pair": " and ".join(pair) if pair else "the shipped pair",
        "format": format,
        "answers": "sampled" if sample else "greedy",
        **studies.circumstances(model, CHECKOUT),
        "command": shlex.join(["dami", *sys.argv[1:]]),
    }
    write_report(found, output, about)
    out.print(f"Page, pictures, numbers: {output / 'report.html'}, path.svg, study.json", style="dim", soft_wrap=True)
