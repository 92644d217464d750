"""`dami serve`."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from dami.callers import CALLERS, DEFAULT
from dami.cli.base import app, err, fail, load, user_errors
from dami.cli.options import DtypeOption, EndsArgument, FormatOption, finite, number_or_name, template

HostOption = Annotated[str, typer.Option(help="The address to listen on. Any but the default lets other machines in.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on. 0 takes a free one.")]
ApiKeyOption = Annotated[
    list[str] | None,
    typer.Option(help="A key that requests must bring. Repeatable. Default: DAMI_API_KEY, if set."),
]
AllowedHostOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A host name that clients may use besides localhost. Repeatable. "
        "Default: any name; but only localhost if --host is local and there is no API key.",
    ),
]
NameOption = Annotated[
    str | None, typer.Option("--served-model-name", help="The model's name in the API. Default: the instruct end's.")
]
DefaultIntensityOption = Annotated[
    Any,
    typer.Option(
        parser=number_or_name, metavar="λ|NAME", help="For requests that name no λ: a number, a preset or auto."
    ),
]
IntensityRangeOption = Annotated[
    tuple[float, float], typer.Option(metavar="LOWEST HIGHEST", help="The range of λ that requests may ask for.")
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        parser=template,
        metavar="NAME|λ",
        help="The chat template: instruct, thinking, or the λ from which to use thinking's. Default: the pair's own.",
    ),
]
MaxModelLenOption = Annotated[
    int | None, typer.Option(min=2, help="The most tokens of prompt and answer together. Default: as many as fit.")
]
KvMemoryOption = Annotated[float, typer.Option(min=0.0, help="Size of the KV cache in GiB.")]
MaxBatchTokensOption = Annotated[int, typer.Option(min=1, help="The most tokens in a step.")]
MaxBatchRowsOption = Annotated[int, typer.Option(min=1, help="The most sequences in a step.")]
MaxRequestsOption = Annotated[
    int, typer.Option(min=1, help="The most sequences at once, waiting ones included. One request may take a quarter.")
]
MaxBodyOption = Annotated[int, typer.Option(min=1, help="The most bytes in a request.")]
ReadTimeoutOption = Annotated[
    int, typer.Option(min=1, metavar="SECONDS", help="Time for a request's headers, and again for its body.")
]
PrefixCacheOption = Annotated[bool, typer.Option(help="Share the KV cache of equal prompt beginnings at one λ.")]
InvariantOption = Annotated[
    bool, typer.Option("--invariant", help="Make answers bitwise independent of other requests. Costs some speed.")
]
TargetLatencyOption = Annotated[
    float | None,
    typer.Option(
        parser=finite,
        metavar="SECONDS",
        help="Under load, lower the λ of requests with auto or max_intensity to keep answers this quick.",
    ),
]
IntensityFloorOption = Annotated[
    float, typer.Option(parser=finite, metavar="λ", help="The lowest λ that --target-latency may grant.")
]
FrontierOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="A frontier.json of dami evaluate. Default: the one stored with the estimator.",
    ),
]
DrainOption = Annotated[
    int, typer.Option(min=0, help="Seconds that running requests have after SIGTERM before they are cut off.")
]


@app.command()
def serve(
    ends: EndsArgument = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    api_key: ApiKeyOption = None,
    allowed_host: AllowedHostOption = None,
    name: NameOption = None,
    default_intensity: DefaultIntensityOption = str(DEFAULT),
    intensity_range: IntensityRangeOption = (-1.0, 2.0),
    format: FormatOption = None,
    dtype: DtypeOption = "auto",
    chat_template: ChatTemplateOption = None,
    max_model_len: MaxModelLenOption = None,
    kv_memory: KvMemoryOption = 1.0,
    max_batch_tokens: MaxBatchTokensOption = 512,
    max_batch_rows: MaxBatchRowsOption = 64,
    max_requests: MaxRequestsOption = 4096,
    max_body: MaxBodyOption = 1 << 20,
    read_timeout: ReadTimeoutOption = 30,
    prefix_cache: PrefixCacheOption = True,
    invariant: InvariantOption = False,
    target_latency: TargetLatencyOption = None,
    intensity_floor: IntensityFloorOption = 0.0,
    frontier: FrontierOption = None,
    drain: DrainOption = 25,
) -> None:
    """Serve a pair over OpenAI's API, each request at its own λ."""
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
    from dami.serving.gate import LOOPBACK
    from dami.serving.playground import read_frontier

    local = host in LOOPBACK
    with user_errors():
        keys = keys_of(api_key)
        check_port(host, port)
        given = read_frontier(frontier) if frontier else None
        if target_latency is not None:  # what it refuses is told now
            IntensityController(target_latency, max_batch_rows, intensity_floor)
    model, tokenizer = load(ends, format, dtype, invariant, [default_intensity], caller=CALLERS["dami serve"])
    from dami.dial.patch import patch_of
    from dami.serving.app import create_app
    from dami.serving.engine import Engine, Limits
    from dami.serving.listening import run
    from dami.serving.service import Settings

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
            keys,
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


def keys_of(given: list[str] | None) -> tuple[str, ...]:
    """The API keys of the command line, or else the one of the environment; ValueError if one is no key."""
    from dami.serving.gate import check_key

    name, keys = "--api-key", given
    if keys is None:
        name, keys = "DAMI_API_KEY", [os.environ["DAMI_API_KEY"]] if "DAMI_API_KEY" in os.environ else []
    for key in keys:
        check_key(key, name)
    return tuple(keys)


def check_port(host: str, port: int) -> None:
    """Raises OSError if a server cannot listen there: now, not after the model has been loaded."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
                trial.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from error
