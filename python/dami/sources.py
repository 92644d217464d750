"""What the files of a pair's checkpoints tell without loading them, and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from dami.callers import AUTO, CALLERS, Caller

T = TypeVar("T")

QUANT_METHOD = "dami"  # quant_method of a packed pair
TWO_ENDS = "dami-pair"  # quant_method of a checkpoint that is to be loaded with its thinking end
ADAPTER = "adapter_config.json"
FOLDER, SETTINGS = "intensity", "intensity.json"  # of an estimator and presets: the folder in a pair, the file in that
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
OPTIONS = (*DOWNLOAD, "subfolder", "trust_remote_code")  # of a checkpoint
THINKING = "thinking_"  # before the name of an option for the thinking end alone
End = Literal["instruct", "thinking"]
ENDS: tuple[End, End] = ("instruct", "thinking")
QUESTIONS = Path(__file__).parent / "data" / "pair" / "questions.jsonl"  # held out from the pair that ships


def example_pair() -> tuple[Path, Path]:
    """Returns the directories of the pair that ships with dami: the instruct end and the thinking end."""
    pair = QUESTIONS.parent
    return pair / "instruct", pair / "thinking"


def check_choice(name: str, end: str | None) -> None:
    """Raises ValueError unless `end` names an end of a pair, or none."""
    if end not in (None, *ENDS):
        raise ValueError(f"{name} must be 'instruct' or 'thinking', got {end!r}")


def per_end(options: dict[str, Any], two: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the options of checkpoints out of `options`, and returns those of the instruct end and of the thinking end.

    `revision` and the other `OPTIONS` hold for both ends, `thinking_revision` and so on for the thinking end instead.
    `revision` may also be a pair of both.

    Args:
        options: arguments by name; those of checkpoints are removed.
        two: whether there are two ends rather than a packed pair.

    Raises:
        TypeError: `revision` is neither one nor two, or an option for the thinking end is given for a packed pair.
    """
    first = {name: options.pop(name) for name in OPTIONS if name in options}
    own = {name: options.pop(THINKING + name) for name in OPTIONS if THINKING + name in options}
    if own and not two:
        raise TypeError(f"{THINKING}{next(iter(own))} is for two checkpoints, got a packed pair: leave it out")
    revision = first.get("revision")
    if not isinstance(revision, (tuple, list)):
        return first, {**first, **own}
    if len(revision) != 2 or not two:
        raise TypeError(f"revision must be one, or a pair for a pair of checkpoints, got {revision!r}")
    return {**first, "revision": revision[0]}, {**first, "revision": revision[1], **own}


def local(source: str | Path, subfolder: str | None = None) -> Path | None:
    """The directory or the GGUF file of a checkpoint on disk; None if `source` can only be a name on the hub.

    Raises:
        OSError: `source` is no name on the hub, and there is no such checkpoint on disk, or not in its subfolder.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir():
        path /= subfolder or ""
        if not any((path / name).exists() for name in ("config.json", ADAPTER)):
            raise OSError(f"{path if subfolder else source} is no checkpoint: it has no config.json")
        return path
    if path.is_absolute() or str(source).startswith((".", "~")) or path.suffix == ".gguf" or len(path.parts) > 2:
        raise OSError(f"there is no checkpoint {source}")
    return None


def read_object(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: it holds anything else.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must be a JSON object, got {found!r:.80}")
    return found


def packed_format(path: Path) -> str | None:
    """The format of a packed pair, None if `path` is an ordinary checkpoint.

    Raises:
        ValueError: its config.json is damaged.
    """
    file = path / "config.json"
    if not file.exists():
        return None
    quantization = quantization_in(file)
    return quantization.get("format") if quantization.get("quant_method") == QUANT_METHOD else None


def quantization_in(file: Path) -> dict[str, Any]:
    """The `quantization_config` in a checkpoint's config.json; {} without one. Raises ValueError if it is no object."""
    found = read_object(file).get("quantization_config") or {}
    if not isinstance(found, dict):
        raise ValueError(f"{file} must have an object as quantization_config, got {found!r:.80}")
    return found


def check_packed(path: Path, format: str | None) -> None:
    """Raises ValueError unless `path` is a packed pair, in this format if it is not None."""
    packed = packed_format(path)
    if packed is None:
        raise ValueError(f"thinking must be given: {path} is a checkpoint, not a packed pair of two")
    if format not in (None, packed):
        raise ValueError(f"format must be None or {packed!r}, in which {path} is packed, got {format!r}")


def check_end(path: Path) -> None:
    """Raises ValueError if `path` is a packed pair, where one end of a pair is wanted."""
    if packed_format(path) is not None:
        raise ValueError(f"{path} is a packed pair, not one end of a pair: load it alone")


def check_estimator(estimator: T | None) -> T:
    """The estimator; ValueError if there is none."""
    if estimator is None:
        raise ValueError('intensity="auto" needs an estimator: attach one with dami.attach(model, estimator)')
    return estimator


def check_pair(
    ends: Sequence[str],
    format: str | None,
    intensities: Iterable[float | str] = (),
    caller: Caller = CALLERS["dami generate"],
    options: Sequence[Mapping[str, Any]] = ({}, {}),
) -> None:
    """Raises the errors of loading a pair and asking it at these λ, as far as the files on disk show them.

    Args:
        ends: a packed pair, or an instruct and a thinking end, as `load_pair` takes them.
        format: likewise.
        intensities: numbers, names of presets, "auto".
        caller: who was given them.
        options: the options of each end, of which `subfolder` matters here.
    """
    names = {each for each in intensities if isinstance(each, str)}
    if AUTO in names:
        caller.check("auto")
    paths = [local(end, own.get("subfolder")) for end, own in zip(ends, options, strict=False)]
    for end, path in zip(ends, paths, strict=True):
        if path is None and len(ends) == 1 and "/" not in end:
            raise OSError(f"there is no packed pair {end}: name its directory, or OWNER/NAME on the hub")
        if path is not None and len(ends) == 1:
            check_packed(path, format)
        elif path is not None:
            check_end(path)
    where = paths[-1]
    if where is None or not names:
        return
    presets, has_estimator = stored_names(where)
    for name in names - {AUTO}:
        caller.preset(name, presets)
    if AUTO in names:
        check_estimator(has_estimator or None)


def stored_names(pair: Path) -> tuple[list[str], bool]:
    """The names of the presets that a packed pair or a thinking end holds, and whether it has an estimator.

    Raises:
        ValueError: its file cannot be read.
    """
    file = pair / FOLDER / SETTINGS
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return list(known.get("presets", ())), known.get("estimator") is not None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} must hold an estimator's settings and presets: {error!r}") from error
