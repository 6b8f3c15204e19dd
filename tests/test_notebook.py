"""The notebook is committed with its outputs, and runs from top to bottom."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

PATH = ROOT / "notebooks" / "vqvae.ipynb"


def test_notebook_holds_outputs_of_one_run():
    """All cells were run in order, those that do more than define functions show something, and the file is small."""
    cells = [cell for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert PATH.stat().st_size < 1e6
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs or isinstance(ast.parse(cell.source).body[-1], ast.FunctionDef) for cell in cells)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)


def test_notebook_imports_what_exists():
    """Every name that the notebook takes from the project is there; a whole run of it is slow."""
    cells = [cell.source for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code"]
    imports = [node for cell in cells for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in imports} >= {"model", "prior", "quantizer", "harness.data"}
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


def set_up(monkeypatch, tmp_path, repository):
    """Run the first cell as Colab would, and return its commands, of which git clone is pretended."""
    commands = []

    def run(command, check):
        commands.append(command)
        if command[0] == "git":
            (tmp_path / "vqvae" / "notebooks").mkdir(parents=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", run)
    cell = next(cell for cell in nbformat.read(PATH, as_version=4).cells if cell.cell_type == "code")
    exec(cell.source.replace("/content", str(tmp_path)).replace("https://github.com/OWNER/NAME", repository), {})
    return commands


def test_notebook_sets_itself_up_in_colab(monkeypatch, tmp_path):
    """It clones, installs the requirements, and goes to the notebook's folder; a second time it does not clone."""
    clone, install = set_up(monkeypatch, tmp_path, "https://example.org/vqvae")
    assert clone[:2] == ["git", "clone"] and clone[-2:] == ["https://example.org/vqvae", str(tmp_path / "vqvae")]
    assert install[:4] == [sys.executable, "-m", "pip", "install"]
    assert (
        install[-2:] == ["-r", str(tmp_path / "vqvae" / "requirements.txt")] and (ROOT / "requirements.txt").is_file()
    )
    assert Path.cwd() == tmp_path / "vqvae" / "notebooks"
    assert set_up(monkeypatch, tmp_path, "https://example.org/vqvae") == [install]


def test_notebook_asks_colab_users_for_the_address(monkeypatch, tmp_path):
    """The repository's address is a placeholder until the user sets it."""
    with pytest.raises(ValueError, match="set REPOSITORY"):
        set_up(monkeypatch, tmp_path, "https://github.com/OWNER/NAME")


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom():
    here = {"metadata": {"path": PATH.parent}}
    NotebookClient(nbformat.read(PATH, as_version=4), timeout=600, kernel_name="python3", resources=here).execute()
