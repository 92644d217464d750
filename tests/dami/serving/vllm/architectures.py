"""Writes the table of docs/vllm.md: what vLLM does with a tiny random pair of every family.

python -m tests.dami.serving.vllm.architectures         # all families
python -m tests.dami.serving.vllm.architectures glm4    # some of them again; the other lines stay
python -m tests.dami.serving.vllm.architectures new     # those that have no line yet
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tests.dami.serving.vllm import pairs
from tests.dami.serving.vllm.engines import look_here
from tests.dami.serving.vllm.test_families import VLLM_S_OWN, found, wanted

PAGE = Path(__file__).parents[4] / "docs" / "vllm.md"
BEGIN = "<!-- architectures: python -m tests.dami.serving.vllm.architectures -->\n"
END = "<!-- end of architectures -->"
TABLED = sorted(pairs.FAMILIES.keys() - {"qwen3_next"})  # whose kernels need other values: see test_delta_net.py
HEAD = ("| class | two ends, `pair` | packed, `int8` |", "|---|---|---|")


def class_of(family: str) -> str:
    """The class of a family's models in transformers."""
    kind = type(pairs.FAMILIES[family]())
    text = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    return (MODEL_FOR_CAUSAL_LM_MAPPING if text else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)[kind].__name__


def verdict(directory: Path, family: str) -> str:
    """A line of the table."""
    ends = pairs.write_ends(family, directory)
    name = class_of(family)
    packed = [pairs.pack(ends, format) for format in ("pair", "int8")]
    expected = [wanted(family, pair) for pair in packed]
    return f"| {name} | {result(family, expected[0], *ends)} | {result(family, expected[1], packed[1])} |"


def result(family: str, expected: list[list[int]], *pair: Path) -> str:
    """Whether a pair answers as merged models do, or why it does not."""
    try:
        return f"right{'¹' * (family in VLLM_S_OWN)}" if found(family, *pair) == expected else "wrong"
    except Exception as error:
        return f"refused: {said(error)}"


def said(error: BaseException) -> str:
    """The first two lines of the first error, which was raised where a pair is loaded."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return " ".join(str(error).split("\n")[:2]).replace("|", "¦")


def listed() -> dict[str, str]:
    """The lines of the table by class."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return {line.split(" ")[1]: line for line in table.splitlines() if re.match(r"\| [A-Z]", line)}


def write(families: list[str]) -> None:
    lines = listed() if families else {}
    if families == ["new"]:
        families = [family for family in TABLED if class_of(family) not in lines]
    for family in families or TABLED:
        with TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):
            line = verdict(Path(directory), family)
        print(line, flush=True)
        lines[line.split(" ")[1]] = line
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        table = "\n".join([*HEAD, *(lines[name] for name in sorted(lines))])
        PAGE.write_text(f"{before}{BEGIN}{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    os.environ.update(pairs.ENVIRONMENT)
    look_here()
    write(sys.argv[1:])
