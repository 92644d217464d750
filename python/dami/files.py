"""Directories and files that are written completely or not at all. Nothing here needs torch: bad paths fail fast."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

MARK = ".incomplete"  # in a directory that is being written: only one that has it is an interrupted run's


@contextmanager
def written_whole(
    directory: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = (), resume: bool = False
) -> Iterator[Path]:
    """A directory to write to, which takes its name at the end of the block, or is removed if that fails.

    Until then it is called DIRECTORY.partial. One that an interrupted run has left is removed first. A directory that
    is replaced stays until the end, and a link to it stays a link. If several processes hold a model, all of them enter
    the block, and the first one creates, renames or removes the directory.

    Args:
        directory: it must not exist, or be empty.
        overwrite: replaces a directory with something in it.
        inputs: files and directories that the block reads.
        resume: keeps DIRECTORY.partial if the block fails, and begins with what such a block has left.

    Raises:
        ValueError: replacing the directory would remove an input, or a part of one.
        OSError: the directory cannot be written or replaced; FileExistsError: there is one with something in it.
    """
    check_new(directory, overwrite, inputs)
    name, directory = str(directory), Path(os.path.realpath(directory))
    partial = _partial(directory)
    distributed: Any = sys.modules.get("torch.distributed")  # where it is not imported there is one process
    several = distributed is not None and distributed.is_available() and distributed.is_initialized()
    first = not several or distributed.get_rank() == 0
    if several:
        distributed.barrier()  # all have looked
    if first:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=resume)
        (partial / MARK).touch()
    if several:
        distributed.barrier()
    try:
        with _naming(name):
            yield partial
    except BaseException:
        if first and not resume:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if first:
        for file in partial.rglob("*.safetensors"):  # which safetensors lets nobody but the owner read
            file.chmod((partial / MARK).stat().st_mode)
        (partial / MARK).unlink()
        _rename(partial, directory)
    if several:
        distributed.barrier()


def _partial(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.partial")


def _rename(partial: Path, directory: Path) -> None:
    """Gives `partial` the name of a directory, which is removed last, when nothing else can fail."""
    if not directory.exists():
        partial.rename(directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{directory.name}.replaced-", dir=directory.parent))
    old = aside / directory.name
    try:
        directory.rename(old)
        partial.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def check_new(directory: str | Path, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> None:
    """Raises what `written_whole` raises before it writes."""
    name, directory = str(directory), Path(os.path.realpath(directory))
    if directory.exists():
        if not directory.is_dir():
            raise FileExistsError(f"{name} exists already and is no directory: name another")
        if not overwrite and any(directory.iterdir()):
            raise FileExistsError(f"{name} exists already: name another directory, or overwrite it")
        if os.path.ismount(directory):
            raise OSError(f"{name} is a mount point, which cannot be replaced: name a directory inside it")
        if Path.cwd().is_relative_to(directory):
            raise OSError(f"{name} is or holds the current directory, which cannot be replaced: name one inside it")
        if any(directory.iterdir()):
            for each in inputs:
                if _shares_files(directory, Path(each).expanduser()):
                    raise ValueError(f"{name} must not be overwritten: {each}, which is read, would be lost with it")
    partial = _partial(directory)
    if partial.exists() and (not partial.is_dir() or any(partial.iterdir())) and not (partial / MARK).exists():
        raise FileExistsError(f"{partial} exists already, and no interrupted run has left it: name another directory")
    check_directory(directory.parent)


def _shares_files(directory: Path, read: Path) -> bool:
    """Whether a directory lies in what is read, or some of that, links followed, in the directory."""
    if not read.exists():
        return False
    paths = [Path(os.path.realpath(each)) for each in (read, *read.rglob("*"))]
    return directory.is_relative_to(paths[0]) or any(path.is_relative_to(directory) for path in paths)


def check_directory(directory: str | Path) -> None:
    """Raises an OSError unless a directory can be written to, or made."""
    real = Path(os.path.realpath(directory))
    nearest = next(path for path in (real, *real.parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{directory} cannot be a directory: {nearest} is none")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(f"{directory} cannot be written, since {nearest} cannot: {error.strerror}") from error


@contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file to, which takes its name at the end of the block.

    The old file stays until then, and after an error.
    """
    real = Path(os.path.realpath(path))
    beside = real.with_name(f".partial-{real.name}")
    try:
        with _naming(str(path)):
            yield beside
            beside.replace(real)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes a file in UTF-8, completely or not at all."""
    with written_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Names the path in errors that do not: of a full disk, and of safetensors, whose errors are no OSError."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, error.strerror, path) from error
        raise
    except SafetensorError as error:
        raise OSError(f"{path} was not written: {error}") from error
