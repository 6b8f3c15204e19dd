"""The notebook is committed with its outputs, and runs from top to bottom."""

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "notebooks" / "vqvae.ipynb"


def test_notebook_is_small_and_holds_the_outputs_of_one_run_in_order():
    cells = [cell for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert PATH.stat().st_size < 1e6
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads that wait for each other beside other tests take longer
    here = {"metadata": {"path": PATH.parent}}
    NotebookClient(nbformat.read(PATH, as_version=4), timeout=1800, kernel_name="python3", resources=here).execute()
