"""The notebook is committed with its outputs, and runs from top to bottom."""

import ast
import importlib

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "notebooks" / "vqvae.ipynb"


def test_notebook_holds_outputs_of_one_run():
    """All cells were run in order, and the file is small."""
    cells = [cell for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert PATH.stat().st_size < 1e6
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)


def test_notebook_imports_what_exists():
    """Every name that the notebook takes from the project is there; a whole run of it is slow."""
    cells = [cell.source for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code"]
    imports = [node for cell in cells for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in imports} >= {"model", "prior", "quantizer", "harness.data"}
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads that wait for each other beside other tests take longer
    here = {"metadata": {"path": PATH.parent}}
    NotebookClient(nbformat.read(PATH, as_version=4), timeout=1800, kernel_name="python3", resources=here).execute()
