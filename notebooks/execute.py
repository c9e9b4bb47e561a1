"""Runs notebooks from top to bottom and fails on the first error; the files stay without outputs.

python notebooks/execute.py notebooks/tour.ipynb
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    for name in sys.argv[1:]:
        notebook = nbformat.read(name, as_version=4)
        stored = [c for c in notebook.cells if c.get("outputs")]
        if stored:
            raise SystemExit(
                f"{name} is stored with outputs; clear them (jupyter nbconvert --clear-output --inplace)"
            )
        with tempfile.TemporaryDirectory() as folder:
            os.environ.setdefault(
                "QLAB_SKIP_INSTALL", "1"
            )  # the cell that installs is for hosted notebooks
            client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
            client.execute()
        cells = sum(c.cell_type == "code" for c in notebook.cells)
        print(f"{Path(name).name}: {cells} cells run")


if __name__ == "__main__":
    main()
