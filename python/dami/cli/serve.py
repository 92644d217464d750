"""`dami serve`."""

from __future__ import annotations

import gc
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dami.callers import DEFAULT_INTENSITY
from dami.cli.base import app, err, fail, load, user_errors
from dami.cli.checkpoints import CheckpointSettings, TakesPair
from dami.cli.options import (
    ChatTemplateOption,
    DtypeOption,
    EndsArgument,
    FormatOption,
    finite,
    intensity_names,
    number_or_name,
    tail,
)
from dami.cli.settings import Given, Several, options_of

if TYPE_CHECKING:
    from dami.serving.controller import IntensityController
    from dami.serving.engine import Limits
    from dami.serving.settings import ServiceSettings


@dataclass(frozen=True)
class ServeSettings(CheckpointSettings):
    """The settings of `dami serve`."""

    pair: Annotated[EndsArgument, Several()] = None
    host: Annotated[str, typer.Option(help="The address to listen on. Any but the default lets other machines in.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on. 0 takes a free one.")] = 8000
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that requests must bring. Repeatable."), Several(separator=None)
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A host name that clients may use besides localhost. Repeatable. "
            "Default: any name; but only localhost if --host is local and there is no API key.",
        ),
        Several(),
    ] = None
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name in the API. Default: the instruct end's.")
    ] = None
    default_intensity: Annotated[
        float | str,
        typer.Option(
            parser=number_or_name,
            metavar="λ|NAME",
            help="For requests that name no λ: a number, a preset or auto.",
            autocompletion=intensity_names,
        ),
    ] = DEFAULT_INTENSITY
    prompt_intensity: Annotated[
        float | str,
        typer.Option(
            parser=number_or_name,
            metavar="λ|NAME|same",
            help="The λ to read prompts at, once for all λ of their answers. Default: that of the answer.",
            autocompletion=intensity_names,
        ),
    ] = "same"
    prompt_tail: Annotated[
        int | str,
        typer.Option(
            parser=tail,
            metavar="TOKENS|turn",
            help="How much at the end of a prompt is read at the λ of the answer nevertheless: tokens, or all from the "
            "last user message on.",
        ),
    ] = 1
    intensity_range: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOWEST HIGHEST", help="The range of λ that requests may ask for."),
        Several(),
    ] = (-1.0, 2.0)
    format: FormatOption = None
    dtype: DtypeOption = "auto"
    chat_template: ChatTemplateOption = None
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="The most tokens of prompt and answer together. Default: as many as fit.")
    ] = None
    answer_reserve: Annotated[
        int,
        typer.Option(min=0, metavar="TOKENS", help="Tokens of an answer that its thought must leave. 0 leaves none."),
    ] = 0
    kv_memory: Annotated[float, typer.Option(min=0.0, help="Size of the KV cache in GiB.")] = 1.0
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="The most tokens in a step.")] = 512
    max_batch_rows: Annotated[int, typer.Option(min=1, help="The most sequences in a step.")] = 64
    max_requests: Annotated[
        int,
        typer.Option(min=1, help="The most sequences at once, waiting ones included. One request may take a quarter."),
    ] = 4096
    max_body: Annotated[int, typer.Option(min=1, help="The most bytes in a request.")] = 1 << 20
    read_timeout: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="Time for a request's headers, and again for its body.")
    ] = 30
    prefix_cache: Annotated[
        bool, typer.Option(help="Share the KV cache of equal prompt beginnings that are read at one λ.")
    ] = True
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            help="Capture steps as CUDA graphs and replay them. Default: on a GPU, unless --invariant.",
            show_default=False,
        ),
    ] = None
    invariant: Annotated[
        bool,
        typer.Option("--invariant", help="Make answers bitwise independent of other requests. Costs some speed."),
    ] = False
    target_latency: Annotated[
        float | None,
        typer.Option(
            parser=finite,
            metavar="SECONDS",
            help="Under load, lower the λ of requests with auto or max_intensity to keep answers this quick.",
        ),
    ] = None
    intensity_floor: Annotated[
        float, typer.Option(parser=finite, metavar="λ", help="The lowest λ that --target-latency may grant.")
    ] = 0.0
    frontier: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A frontier.json of dami evaluate. Default: the one stored with the estimator.",
        ),
    ] = None
    drain: Annotated[
        int, typer.Option(min=0, help="Seconds that running requests have after SIGTERM before they are cut off.")
    ] = 25

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        from dami.serving.admission import LOOPBACK

        return self.host in LOOPBACK

    @property
    def name(self) -> str:
        """The model's name in the API."""
        if self.served_model_name or not self.pair:
            return self.served_model_name or "shipped"
        return Path(self.pair[0]).name if Path(self.pair[0]).exists() else self.pair[0]

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host names that clients may use; any if empty."""
        from dami.serving.admission import LOOPBACK

        named = self.allowed_host or ()
        return (*LOOPBACK, *named) if named or (self.local and not self.api_key) else ()

    def limits(self) -> Limits:
        """Returns the engine's limits."""
        from dami.serving.engine import Limits

        return Limits(
            self.kv_memory,
            self.max_model_len,
            self.max_batch_tokens,
            self.max_batch_rows,
            self.max_requests,
            self.prefix_cache,
            self.cuda_graphs,
        )

    def controller(self, frontier: Mapping[str, Any]) -> IntensityController | None:
        """Returns the controller that lowers λ under load, or None without a target latency.

        A frontier gives it the mean tokens of answers beforehand.

        Raises:
            ValueError: if the target latency or the lowest λ is out of range.
        """
        from dami.serving.controller import IntensityController

        if self.target_latency is None:
            return None
        tokens = {point["intensity"]: point["tokens"][0] for point in frontier.get("points", [])}
        return IntensityController(self.target_latency, self.max_batch_rows, self.intensity_floor, tokens=tokens)

    def service(self, frontier: dict[str, Any]) -> ServiceSettings:
        """Returns the server's settings, apart from its engine."""
        from dami.serving.settings import ServiceSettings

        return ServiceSettings(
            name=self.name,
            default_intensity=self.default_intensity,
            prompt_intensity=self.prompt_intensity,
            prompt_tail=self.prompt_tail,
            intensity_range=self.intensity_range,
            chat_template="default" if self.chat_template is None else self.chat_template,
            api_keys=tuple(self.api_key or ()),
            allowed_hosts=self.hosts,
            max_body=self.max_body,
            read_timeout=self.read_timeout,
            answer_reserve=self.answer_reserve,
            frontier=frontier,
        )


@app.command(cls=TakesPair)
@options_of(ServeSettings, "serve", ["fastapi", "prometheus_client", "pydantic_settings", "uvicorn"])
def serve(given: Given[ServeSettings]) -> None:
    """Serve a pair over OpenAI's API, each request at its λ.

    Instead of an option such as --max-model-len 4096, you can set DAMI_MAX_MODEL_LEN=4096 in the environment or write
    max_model_len = 4096 into the file of --config. Options come before the environment, and the environment before the
    file.
    """
    settings = given.settings
    with user_errors():
        frontier = check(given)
    model, tokenizer = load(
        settings.pair, settings.format, settings.dtype, settings.invariant, [settings.default_intensity],
        checkpoints=settings.given(),
    )  # fmt: skip
    from dami.dial.patch import patch_of
    from dami.huge_pages import use_huge_pages
    from dami.serving.app import create_app
    from dami.serving.engine import Engine
    from dami.serving.guidance import span_of
    from dami.serving.listening import run
    from dami.serving.reading import default_reading, proposal

    use_huge_pages(model)
    with user_errors():
        reading = default_reading(settings.prompt_intensity, settings.prompt_tail, patch_of(model).presets)
        known = dict(patch_of(model).frontier) if frontier is None else frontier
        engine = Engine(model, settings.limits(), settings.controller(known))
        served = create_app(engine, tokenizer, settings.service(known))
    if (proposed := proposal(engine.least_tail, reading)) is not None:
        err.print(proposed)
    if not span_of(known):
        err.print("a thinking_token_budget cuts thoughts off: λ bends if a frontier (--frontier) shows no valley")
    if engine.cuda_graphs:
        err.print("steps are captured as CUDA graphs and replayed: --no-cuda-graphs turns this off")
    if not settings.local and not settings.api_key:
        err.print(f"anyone who reaches {settings.host} may use this server: see --api-key", style="yellow")
    try:
        with user_errors():
            code = run(served, settings.host, settings.port, settings.drain)
    except SystemExit as stopped:  # from uvicorn, which has logged the reason
        raise fail(f"the server did not start on {settings.host} port {settings.port}") from stopped
    gc.freeze()  # the process ends, and to collect all objects of torch once more would take it seconds
    raise typer.Exit(code)


def check(given: Given[ServeSettings]) -> dict[str, Any] | None:
    """Checks the settings before anything is loaded, and reads the frontier if there is a file.

    Raises:
        ValueError, OSError: if a setting is wrong.
    """
    from dami.serving.admission import check_key
    from dami.serving.playground import read_frontier

    settings, names = given.settings, given.names
    low, high = settings.intensity_range
    if not low <= high or not all(map(math.isfinite, (low, high))):
        raise ValueError(f"{names['intensity_range']} must be two finite numbers, the lower first, got {low}, {high}")
    for key in settings.api_key or ():
        check_key(key, names["api_key"])
    check_port(settings.host, settings.port)
    settings.controller({})
    return read_frontier(settings.frontier) if settings.frontier else None


def check_port(host: str, port: int) -> None:
    """Raises OSError if a server cannot listen at this address, before the model is loaded."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
                trial.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error
