"""Private names of other packages: each is missed by name when it has moved, and stands in one file."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dami
import pytest
import torch
from dami import upstream
from dami.loading import quantizer
from dami.upstream import Moved

from dami_kernels.upstream import Place
from tests.dami.families import pair
from tests.moving import break_place, ways

ROOT = Path(dami.__file__).parents[2]
GROUPS = {
    group: places for group, places in upstream.RELIED_ON.items() if group != "lm-evaluation-harness"
}  # which has an environment of its own
BROKEN = [
    pytest.param(group, place, way, id=f"{place.path} {way} {place.does}")
    for group, places in GROUPS.items()
    for place in places
    for way in ways(place)
]


@pytest.mark.parametrize("group", GROUPS)
def test_these_versions_fit(group: str) -> None:
    with torch.no_grad(), torch.device("meta"):  # wherever it is first asked for
        upstream.check.__wrapped__(group)


@pytest.mark.parametrize(("group", "place", "way"), BROKEN)
def test_what_has_moved_is_named_with_its_version(
    group: str, place: Place, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = break_place(monkeypatch, place, way)
    monkeypatch.setitem(upstream.RELIED_ON, group, (place,))  # others may need it too
    with pytest.raises(Moved) as raised:
        upstream.check.__wrapped__(group)
    head, line = str(raised.value).splitlines()
    package = place.path.split(":")[0].split(".")[0]
    assert head == f"{group} does not fit what is installed:"
    assert line.startswith(f"  {package} {version(package)} {said}")
    assert line.endswith(f" (dami {dami.__version__} was tested with {upstream.TESTED[package]})")


def _load_again(module: str) -> Any:
    return runpy.run_path(str(importlib.import_module(module).__file__))


def _patch() -> Any:
    return dami.patch_model(*pair("llama"))


def _split() -> None:
    model = SimpleNamespace(config=SimpleNamespace(distributed_config={"tp_size": 2}))
    quantizer.PairQuantizer._process_model_before_weight_loading(SimpleNamespace(), model)  # type: ignore[arg-type]


USES: dict[str, Callable[[Any], Any]] = {
    "a patched model": lambda model: _patch(),
    "the loading of a packed pair": lambda model: _load_again("dami.loading.quantizer"),
    "an offloaded pair": lambda model: upstream.execution_device(model),
    "tensor parallelism of a pair": lambda model: _split(),
    "compiled decoding": lambda model: model.generate(torch.ones(1, 2, dtype=torch.int64), compile=True),
    "a prompt at another intensity": lambda model: model.generate(
        torch.ones(1, 2, dtype=torch.int64), prompt_intensity=0.5, max_new_tokens=1
    ),
    "continuous batching of a pair": lambda model: model.init_continuous_batching(),
    "an alignment of neurons": lambda model: upstream.compute_experts_one_by_one(model.config),
    "PEFT adapters on a pair": lambda model: setattr(model, "peft_config", {}),
}


@pytest.mark.parametrize("group", USES)
def test_a_group_is_checked_before_it_is_used(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _patch()
    monkeypatch.setitem(upstream.RELIED_ON, group, (Place("transformers:no_such_name"),))
    upstream.check.cache_clear()
    with pytest.raises(Moved, match=f"^{group} does not fit .*\n  transformers .* has no transformers:no_such_name"):
        USES[group](model)


def test_what_all_of_dami_needs_is_checked_when_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    said = break_place(monkeypatch, Place("torch.utils._pytree:tree_map"), "gone")
    with pytest.raises(Moved, match=said):
        _load_again("dami.upstream")


def test_every_group_is_tested() -> None:
    assert {"dami", *USES} == GROUPS.keys()


# The files that may name what is private elsewhere, by the folder that they speak for.
SPEAK_FOR = {"python/dami": "python/dami/upstream.py", "dami_kernels": "dami_kernels/upstream.py"}
FILES = [
    pytest.param(file, speaker, id=str(file.relative_to(ROOT)))
    for folder, speaker in SPEAK_FOR.items()
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file.relative_to(ROOT).as_posix() not in SPEAK_FOR.values()
]
PRIVATE = re.compile(r"_[A-Za-z]\w*")
LOOKS = {"getattr", "setattr", "hasattr", "delattr"}


@pytest.mark.parametrize(("file", "speaker"), FILES)
def test_private_names_of_others_stand_in_one_file(file: Path, speaker: str) -> None:
    """Elsewhere no file names one, but in a class that inherits it, which then is stated there."""
    stated = (ROOT / speaker).read_text(encoding="utf-8")
    if "vllm" in file.parts:
        stated += (file.parent / "support.py").read_text(encoding="utf-8")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = set(_defined(tree))
    for name, line, inherited in _private(tree):
        assert name in own or (inherited and re.search(rf"\b{name}\b", stated)), f"{file}:{line}: {name}"


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            yield node.attr


def _private(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Every private name that is not this file's by its place: the name, its line, and whether an object of this file
    asks itself for it."""
    for node in ast.walk(tree):
        found: list[tuple[str, bool]] = []
        if isinstance(node, ast.Attribute):
            found = [(node.attr, _is_own(node.value))]
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("dami"):
            found = [(part, False) for part in (*str(node.module).split("."), *(each.name for each in node.names))]
        elif isinstance(node, ast.Import):
            found = [(part, False) for each in node.names for part in each.name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in LOOKS:
            found = [(node.args[1].value, False)] if isinstance(node.args[1], ast.Constant) else []
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            of_object = re.search(r"^vars\(|__dict__", ast.unparse(node.comparators[0]))
            found = [(node.left.value, False)] if of_object and isinstance(node.left, ast.Constant) else []
        yield from ((name, node.lineno, inherited) for name, inherited in found if PRIVATE.fullmatch(str(name)))


def _is_own(owner: ast.expr) -> bool:
    return ast.unparse(owner) in ("self", "cls", "super()")
