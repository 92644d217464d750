"""Settings from the command line, the environment or a file, all declared in one dataclass.

The fields are typer options, and pydantic-settings reads them from the other sources. That library is imported only
when the command runs, so that --help stays instant.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, get_args, get_type_hints

import typer
from typer.models import ParameterInfo

from dami.cli.base import err, fail, user_errors

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T")

PREFIX = "DAMI_"
OTHER_VARIABLES = {"CONFIG", "CPU_ISA", "CUDA"}  # other variables that begin with the prefix
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar=f"{PREFIX}CONFIG",
        exists=True,
        dir_okay=False,
        help="A TOML file of settings, such as max_model_len = 4096.",
    ),
]


@dataclasses.dataclass(frozen=True)
class Several:
    """Marks a field with several values. `separator` splits a text into values; None if a text is one value."""

    separator: str | None = ","


@dataclasses.dataclass(frozen=True)
class Given(Generic[T]):
    """The settings of a run.

    Attributes:
        settings: the settings in effect.
        names: for each field, where the user set it: --port, DAMI_PORT or serve.toml: port.
    """

    settings: T
    names: Mapping[str, str]


def options_of(
    kind: type[T], extra: str, packages: Sequence[str]
) -> Callable[[Callable[[Given[T]], None]], Callable[..., None]]:
    """Turns a function that takes settings into a command. `kind` is a dataclass whose fields are typer options.

    The command needs the `packages` of an extra, which include pydantic-settings.

    The command line takes precedence over environment variables (DAMI_MAX_MODEL_LEN), these over the file of --config,
    and the file over defaults.
    """
    hints = get_type_hints(kind, include_extras=True)

    def decorate(command: Callable[[Given[T]], None]) -> Callable[..., None]:
        def called(context: typer.Context, config: Path | None, **values: object) -> None:
            missing = next((package for package in packages if find_spec(package) is None), None)
            if missing is not None:
                from dami_kernels.installation import needs

                raise fail(needs(f"dami {context.info_name}", missing, extra))
            with user_errors():
                given = find(kind, context, config, values)
            command(given)

        parameters = [_parameter("context", typer.Context, inspect.Parameter.empty)]
        parameters += [_parameter(each.name, *_for_typer(hints[each.name], each.default)) for each in _fields(kind)]
        parameters.append(_parameter("config", ConfigOption, None))
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__annotations__ = {}
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def find(kind: type[T], context: typer.Context, config: Path | None, values: Mapping[str, object]) -> Given[T]:
    """Returns the settings in effect, with the precedence that `options_of` describes.

    Args:
        kind: class of the settings.
        context: knows which values the user gave.
        config: the file, if there is one.
        values: values from the command line, including defaults.

    Raises:
        ValueError: if a setting is unknown or has a wrong value.
    """
    import pydantic
    from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, TomlConfigSettingsSource

    class Sources(BaseSettings, env_prefix=PREFIX, extra="forbid", toml_file=config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            *_: object,
            **__: object,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    on_line = {name: value for name, value in values.items() if _on_command_line(context, name)}
    names = {each.name: f"{config}: {each.name}" for each in _fields(kind)}
    names |= _in_environment(names)
    names |= {each.name: max(each.opts, key=len) for each in context.command.params if each.name in on_line}
    hints = get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {each.name: (_for_pydantic(hints[each.name]), each.default) for each in _fields(kind)}
    try:
        found = pydantic.create_model(kind.__name__, __base__=Sources, **fields)(**on_line)
    except pydantic.ValidationError as error:
        raise ValueError("; ".join(_told(error, names, config))) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{config} cannot be read: {error}") from error
    return Given(kind(**{each.name: getattr(found, each.name) for each in _fields(kind)}), names)


def _fields(kind: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


def _parameter(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _for_typer(hint: object, default: object) -> tuple[object, object]:
    """Returns a field's annotation and default for typer, which reads unions only through a parser."""
    _, info = _info(hint)
    if getattr(info, "parser", None) is None:
        return hint, default
    return Annotated[Any, info], default if default is None else str(default)


def _for_pydantic(hint: object) -> object:
    """Returns a field's annotation for pydantic, with typer's bounds and with texts read as on the command line."""
    from pydantic import BeforeValidator, Field
    from pydantic_settings import NoDecode

    kind, info = _info(hint)
    low, high, parser = (getattr(info, name, None) for name in ("min", "max", "parser"))
    several = next((each for each in get_args(hint) if isinstance(each, Several)), None)

    def read(value: Any) -> Any:
        if several is not None and isinstance(value, str):
            return value.split(several.separator) if several.separator else [value]
        if parser is None or value is None:
            return value
        try:
            return parser(str(value))
        except typer.BadParameter as error:
            raise ValueError(str(error)) from error

    bounds = Field(ge=low, le=high) if low is not None or high is not None else Field()
    return Annotated[kind, NoDecode, bounds, BeforeValidator(read)]


def _info(hint: object) -> tuple[Any, ParameterInfo]:
    kind, *metadata = get_args(hint)
    return kind, next(each for each in metadata if isinstance(each, ParameterInfo))


def _on_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _in_environment(known: Iterable[str]) -> dict[str, str]:
    """Returns the environment variable of each setting. Raises ValueError if one seems to be a misspelt setting."""
    found, ignored = {}, []
    for variable in sorted(os.environ):
        if not variable.upper().startswith(PREFIX):
            continue
        name = variable[len(PREFIX) :].lower()
        if name in known:
            found[name] = variable
        elif name.upper() not in OTHER_VARIABLES:
            if near := get_close_matches(name, known, 1, 0.7):
                raise ValueError(f"there is no setting {variable}: is {PREFIX}{near[0].upper()} meant?")
            ignored.append(variable)
    if ignored:
        err.print(f"not used, for they are no settings: {', '.join(ignored)}", style="yellow", soft_wrap=True)
    return found


def _told(error: ValidationError, names: Mapping[str, str], config: Path | None) -> Iterator[str]:
    """Yields what is wrong with each value, and where the value came from."""
    for each in error.errors(include_url=False):
        name = str(each["loc"][0])
        if each["type"] == "extra_forbidden":
            near = get_close_matches(name, names, 1, 0)
            yield f"{config}: there is no setting {name}: is {near[0]} meant?"
            continue
        problem = each["msg"].removeprefix("Value error, ")
        got = "" if each["type"] == "value_error" else f", got {each['input']!r}"  # a parser's message includes it
        yield f"{names[name]}: {problem}{got}"
