"""The notebooks run from top to bottom, hold no output and define nothing."""

import ast
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_all_are_found():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_holds_no_output(path):
    for cell in code_cells(path):
        assert not cell["outputs"]
        assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_defines_nothing(path):
    # The first code cell has shell lines for Colab, which Python does not parse.
    for cell in code_cells(path)[1:]:
        tree = ast.parse("".join(cell["source"]))
        definitions = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, definitions) for node in ast.walk(tree))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.name.startswith("01") else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_notebook_runs(path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        # Where Jupyter would start it; the first cell goes up to the root.
        resources={"metadata": {"path": str(path.parent)}},
    )
    # One device, unlike the other tests, as a reader has it.
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    client.execute(
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": search, "MPLBACKEND": "agg"}
    )
