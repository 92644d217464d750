"""What is written whole or not at all, and what is never written over."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from dami.files import MARK, check_directory, write_text, written_file, written_whole
from safetensors import SafetensorError


def fill(directory: Path, text: str = "old") -> Path:
    directory.mkdir(parents=True)
    (directory / "file").write_text(text)
    return directory


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("output", ["new", "deep/new", "empty", "full", "to-empty", "to-full", "to-nothing", "./new/"])
def test_a_directory_takes_its_name_when_all_is_written(output: str, tmp_path: Path) -> None:
    Path("empty").mkdir()
    fill(Path("full"))
    for target in ("empty", "full", "nothing"):
        Path(f"to-{target}").symlink_to(target)
    before = {path: path.is_symlink() for path in tmp_path.iterdir()}
    with written_whole(output, overwrite=True) as partial:
        (partial / "file").write_text("new")
        assert not Path(output).exists() or names(Path(output)) == (["file"] if "full" in output else [])
    assert (Path(output) / "file").read_text() == "new"
    assert names(Path(output)) == ["file"]
    assert all(path.is_symlink() == link for path, link in before.items())
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in before} <= {"new", "deep", "nothing"}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_after_an_error_all_is_as_before(error: BaseException, tmp_path: Path) -> None:
    fill(Path("full"))
    before = names(tmp_path)
    with pytest.raises(type(error)), written_whole("full", overwrite=True) as partial:  # noqa: PT012
        (partial / "file").write_text("new")
        raise error
    assert names(tmp_path) == before
    assert Path("full/file").read_text() == "old"


def test_the_old_directory_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(Path("full"))
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "full.partial":
            raise OSError(errno.EIO, "broken")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="broken"), written_whole("full", overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert names(tmp_path) == ["full", "full.partial", "full.partial/file", "full/file"]
    assert [Path(each, "file").read_text() for each in ("full", "full.partial")] == ["old", "new"]


def test_only_what_an_interrupted_run_has_left_is_removed() -> None:
    fill(Path("a.partial"))
    with pytest.raises(FileExistsError, match=r"a.partial exists already, and no interrupted run has left it"):  # noqa: SIM117
        with written_whole("a"):
            pass
    assert Path("a.partial/file").read_text() == "old"
    Path("a.partial", MARK).touch()
    with written_whole("a") as partial:
        assert names(partial) == [MARK]
    assert names(Path()) == ["a"]


@pytest.mark.parametrize(
    ("output", "inputs", "lost"),
    [
        ("a", ["a/i", "a/t"], "a/i"),  # the output holds the inputs
        ("a/i", ["a/i", "a/t"], "a/i"),  # it is one
        ("a/t/intensity", ["a/i", "a/t"], "a/t"),  # it is a part of one
        ("a/t", ["a/i", "a/t/file"], "a/t/file"),  # a GGUF file
        ("link", ["a/i", "a/t"], "a/i"),
        ("a", ["b", "to-i"], "to-i"),
        ("weights", ["b", "a/i"], "b"),  # files of an input are links into it
    ],
)
def test_an_input_is_never_lost(output: str, inputs: list[str], lost: str, tmp_path: Path) -> None:
    for each in ("a/i", "a/t", "a/t/intensity", "b", "weights"):
        fill(Path(each)) if not Path(each).exists() else None
    Path("link").symlink_to("a")
    Path("to-i").symlink_to("a/i")
    Path("b/model.safetensors").symlink_to("../weights/file")
    before = names(tmp_path)
    with pytest.raises(ValueError, match=f"^{output} must not be overwritten: {lost}, which is read, would be lost"):  # noqa: SIM117
        with written_whole(output, True, inputs):
            raise AssertionError
    assert names(tmp_path) == before


def test_a_directory_inside_an_input_can_be_made() -> None:
    fill(Path("a"))
    with written_whole("a/packed", False, ["a", "not/there"]) as partial:
        (partial / "file").write_text("new")
    assert names(Path("a")) == ["file", "packed", "packed/file"]


@pytest.mark.parametrize(
    ("output", "overwrite", "error", "message"),
    [
        ("full", False, FileExistsError, "full exists already: name another directory, or overwrite it"),
        ("full/file", True, FileExistsError, "full/file exists already and is no directory: name another"),
        ("full/file/a", False, NotADirectoryError, "cannot be a directory: .*full/file is none"),
        (".", True, OSError, "^. is or holds the current directory, which cannot be replaced"),
        ("..", True, OSError, "^.. is or holds the current directory, which cannot be replaced"),
        ("/", True, OSError, "/ is a mount point, which cannot be replaced: name a directory inside it"),
        ("/proc", True, OSError, "/proc is a mount point"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_done(
    output: str, overwrite: bool, error: type[Exception], message: str, tmp_path: Path
) -> None:
    fill(Path("full"))
    with pytest.raises(error, match=message):  # noqa: SIM117
        with written_whole(output, overwrite):
            raise AssertionError
    assert names(tmp_path) == ["full", "full/file"]


def test_a_directory_that_belongs_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for check in (check_directory, lambda path: written_whole(path).__enter__()):
        with pytest.raises(OSError, match=r"cannot be written, since .* cannot: Permission denied"):
            check("a/b")


@pytest.mark.parametrize("write", [lambda path: path.write_text("new"), lambda path: path.write_bytes(b"new")])
def test_a_file_takes_its_name_when_it_is_written(write: Callable[[Path], object], tmp_path: Path) -> None:
    Path("file.txt").write_text("old")
    Path("link.txt").symlink_to("file.txt")
    with written_file("link.txt") as beside:
        assert beside.suffix == ".txt"
        write(beside)
        assert Path("link.txt").read_text() == "old"
    assert Path("file.txt").read_text() == "new"
    assert Path("link.txt").is_symlink()
    with pytest.raises(KeyboardInterrupt), written_file("file.txt") as beside:  # noqa: PT012
        beside.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["file.txt", "link.txt"]
    assert Path("file.txt").read_text() == "new"


def test_a_full_disk_is_told_with_the_path() -> None:
    """Python's error of a write names no file, and safetensors' is no OSError."""
    full = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=r"No space left on device: 'a'"), written_file("a"):
        os.write(full, b"x")
    os.close(full)
    with pytest.raises(OSError, match=r"a was not written: .*os error 28"), written_whole("a"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert names(Path()) == []
    write_text("a", "λ")
    assert Path("a").read_bytes() == "λ".encode()
