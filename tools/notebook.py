"""Executes notebooks and stores their outputs, without what differs from run to run: python -m tools.notebook FILE…"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, record_timing=False, coalesce_streams=True).execute(cwd=str(path.parent))
        notebook.metadata.get("language_info", {}).pop("version", None)
        for cell in notebook.cells:
            if cell.cell_type == "code":  # progress bars and warnings of other packages go to stderr
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
