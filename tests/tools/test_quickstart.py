"""The notebook of the documentation: its cells run, and print what is stored in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"


def test_its_cells_print_what_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", plt.close)
    plt.switch_backend("Agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, object] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] != "code":
            continue
        capsys.readouterr()
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        printed = capsys.readouterr().out
        assert cell["outputs"], f"cell {number} has not been executed"
        stored = [output for output in cell["outputs"] if output["output_type"] == "stream"]
        wanted = "".join(line for output in stored for line in output["text"])
        if "measured" in cell["metadata"]:  # which the last bit of a sum may change
            printed, wanted = (re.sub(r"[ \d]+", "#", text) for text in (printed, wanted))
        assert printed == wanted, f"cell {number}"
