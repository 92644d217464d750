"""Writes `dami_kernels` as a kernel of the Hugging Face hub: python -m tools.hub_kernels DIRECTORY

The directory is a project of kernel-builder (build.toml, flake.nix, CARD.md and the sources in torch-ext/) and has what
kernel-builder makes of one without compiled code: a build per backend, which the package `kernels` loads. The rules are
those of https://huggingface.co/docs/kernels/kernel-requirements:

- modules import each other relatively and otherwise only torch, Triton and the standard library;
- operators have a namespace of their own for each build, which `_ops.py` knows;
- the tables of launch parameters are package data.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dami_kernels"
NAMESPACE = "dami"  # of the operators in the package
TEMPLATES = Path(__file__).parent / "hub"
PROJECT = ("build.toml", "flake.nix", "CARD.md")
BACKENDS = ("cpu", "cuda")  # as build.toml says
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
# Of functions that hub kernels never reach: the package's metadata does not exist there.
UNREACHED = {"installation.py": {"packaging"}}

Edit = tuple[ast.expr | ast.stmt, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("directory", type=Path, help="where to write; what is there is replaced")
    directory = parser.parse_args().directory
    write(directory)
    print(f"Written to {directory}. Load it with kernels.get_local_kernel({str(directory)!r}).")


def write(directory: Path, package: Path = ROOT / PACKAGE) -> None:
    """Writes the project and its builds, from the sources of the package.

    Raises:
        ValueError: `directory` holds something else, or a module does what the rules forbid.
    """
    if directory.exists() and any(directory.iterdir()) and not (directory / "build.toml").exists():
        raise ValueError(f"directory must be empty or hold an earlier project of kernel-builder, got {directory}")
    contents = dict(files(package))
    shutil.rmtree(directory, ignore_errors=True)
    sources = directory / "torch-ext" / PACKAGE
    for name, data in contents.items():
        path = sources / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name in PROJECT:
        shutil.copy(TEMPLATES / name, directory)
    shutil.copy(ROOT / "LICENSE", directory)
    for backend in BACKENDS:
        build(sources, directory / "build" / f"torch-{backend}", backend)


def files(package: Path) -> Iterator[tuple[str, bytes]]:
    """The sources of the kernel by their path in it."""
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package).as_posix()
        if path.suffix == ".json":
            yield name, path.read_bytes()
        elif path.suffix == ".py" and name == "native.py":
            yield name, (TEMPLATES / name).read_bytes()
        elif path.suffix == ".py":
            yield name, converted(path.read_text(encoding="utf-8"), name).encode()


def build(sources: Path, variant: Path, backend: str) -> None:
    """What kernel-builder makes of sources without compiled code: a copy, its namespace and its metadata."""
    shutil.copytree(sources, variant)
    text = b"".join(path.read_bytes() for path in sorted(sources.rglob("*")) if path.is_file())
    name = f"_{PACKAGE}_{backend}_{hashlib.sha1(text).hexdigest()[:7]}"
    ops = (TEMPLATES / "_ops.py").read_text(encoding="utf-8").replace("@id@", name)
    (variant / "_ops.py").write_text(ops, encoding="utf-8")
    digests = {
        path.relative_to(variant).as_posix(): b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "id": name,
        "name": PACKAGE.replace("_", "-"),
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def converted(source: str, name: str) -> str:
    """A module of the package as one of the kernel; `name` is its path in the package."""
    dots = "." * (name.count("/") + 1)
    edits = list(edits_of(ast.parse(source), dots))
    uses = {word for word in ("ops", "add_op_namespace_prefix") if any(word in new for _, new in edits)}
    for node, new in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
        source = replaced(source, node, new)
    if uses:
        source = with_import(source, f"from {dots}_ops import {', '.join(sorted(uses))}")
    check(source, name)
    return source


def edits_of(tree: ast.AST, dots: str) -> Iterator[Edit]:
    """What to write in place of nodes that name the package or its operators."""
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), level=0) if module.partition(".")[0] == PACKAGE:
                names = ", ".join(ast.unparse(alias) for alias in node.names)
                yield node, f"from {dots}{module.partition('.')[2]} import {names}"
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module))]) if (
                module.startswith(f"{PACKAGE}.")
            ):
                yield node, f'importlib.import_module("{dots}{module.partition(".")[2]}", __package__)'
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr="ops"), attr=attr):
                if attr == NAMESPACE:
                    yield node, "ops"
            case ast.Call(func=ast.Attribute(attr="Library"), args=[ast.Constant(value=str(library)), *_]):
                if library == NAMESPACE:
                    yield node.args[0], "ops.name"
            case ast.JoinedStr(values=[ast.Constant(value=str(text)), *rest]) if text.startswith(f"{NAMESPACE}::"):
                short = ast.JoinedStr([ast.Constant(text.removeprefix(f"{NAMESPACE}::")), *rest])
                yield node, f"add_op_namespace_prefix({ast.unparse(short)})"
            case ast.Constant(value=str(text)) if text.startswith(f"{NAMESPACE}::") and node not in inside:
                yield node, f"add_op_namespace_prefix({text.removeprefix(f'{NAMESPACE}::')!r})"


def replaced(source: str, node: ast.expr | ast.stmt, new: str) -> str:
    """A source with something else in place of a node. Columns count bytes."""
    lines = source.encode().splitlines(keepends=True)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    return (before + new.encode() + after).decode()


def with_import(source: str, line: str) -> str:
    """A source with one more import, after its last at the top."""
    last = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)][-1]
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: last.end_lineno], f"{line}\n", *lines[last.end_lineno :]])


def check(source: str, name: str) -> None:
    """Raises ValueError if a module imports what a kernel may not, or names the package or its operators."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        else:
            modules = []
        foreign = {module.partition(".")[0] for module in modules} - ALLOWED - UNREACHED.get(name, set())
        if foreign:
            raise ValueError(
                f"{name}:{node.lineno} must import only torch, Triton and the standard library, got {foreign}"
            )
    for word in (f"import {PACKAGE}", f"from {PACKAGE}", f'"{PACKAGE}.', f"torch.ops.{NAMESPACE}", f'"{NAMESPACE}::'):
        if word in source:
            raise ValueError(
                f"{name} must name the package or its operators in a way that can be converted, got {word!r}"
            )


if __name__ == "__main__":
    main()
