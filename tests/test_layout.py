"""Where code may stand, and what it may import."""

import ast
import re
import sys

import pytest
from conftest import ROOT

TOP = {path.stem for path in ROOT.glob("*.py")}


def imports(path):
    """The first part of each module that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_harness_never_imports_the_top_level():
    files = list(ROOT.glob("harness/*.py"))
    assert len(files) > 5 and "model" in TOP
    assert not any(imports(path) & TOP for path in files)


@pytest.mark.parametrize("name", ["quantizer.py", "prior.py"])
def test_quantizer_and_prior_need_torch_alone(name):
    assert imports(ROOT / name) - sys.stdlib_module_names == {"torch"}


def test_model_imports_the_quantizers_alone():
    assert imports(ROOT / "model.py") & (TOP | {"harness"}) == {"quantizer", "scales"}
    assert imports(ROOT / "scales.py") - sys.stdlib_module_names == {"torch", "quantizer"}


def test_text_files_name_their_encoding():
    """Otherwise it is the locale's, which may not be UTF-8."""
    calls = 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if name == "open" or name.endswith((".read_text", ".write_text")) and name != "storage.read_text":
                binary = any(isinstance(word, ast.Constant) and "b" in str(word.value) for word in call.args[1:])
                assert binary or any(word.arg == "encoding" for word in call.keywords), f"{path}, line {call.lineno}"
                calls += 1
    assert calls > 10


def test_processes_of_tests_have_limits():
    """Tests start them with the helpers of conftest.py, which leave none running."""
    for path in ROOT.glob("tests/test_*.py"):
        assert not re.search(r"subprocess\.(run|Popen|call|check_\w+)\(", path.read_text()), path
