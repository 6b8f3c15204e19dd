"""Put one fault at a time into a copy of the project and see whether the tests notice: `python tests/mutate.py`.

Run by hand, not by pytest. Each fault changes one line of a module; the test files named beside the module then run
until one fails. `--only run.py` takes the faults of one module, `--count` says how many of each are drawn. A fault
that survives is a promise without a test, or changes nothing that anyone can see.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {  # the fast test files that fit each module
    "quantizer.py": "quantizer",
    "model.py": "model",
    "prior.py": "prior sample",
    "muon.py": "muon",
    "train.py": "train",
    "train_prior.py": "train_prior forged",
    "sample.py": "sample",
    "evaluate.py": "evaluate",
    "reconstruct.py": "reconstruct",
    "harness/cli.py": "cli",
    "harness/data.py": "data folder",
    "harness/figures.py": "figures",
    "harness/folder.py": "folder data",
    "harness/machine.py": "machine",
    "harness/run.py": "run forged",
    "harness/storage.py": "storage forged",
}
SWAPS = [(" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > "), (" == ", " != "), (" + ", " - ")]
SWAPS += [(" - ", " + "), (" * ", " / "), (" and ", " or "), (" not ", " "), ("True", "False"), ("False", "True")]
SWAPS += [(" / ", " * "), ("min(", "max("), ("max(", "min("), (" is None", " is not None"), ("[0]", "[-1]")]
SWAPS += [("return ", "return None and "), (" if ", " if not "), ("1 - ", "2 - "), ("dim=0", "dim=-1"), ("[1:]", "[:]")]


def faults(text: str) -> list[tuple[int, str]]:
    """Return (index of a line, changed line) of each fault: an operator or constant swapped, or a call left out."""
    tree, lines, found = ast.parse(text), text.splitlines(), []
    for node in ast.walk(tree):
        function = isinstance(node, ast.FunctionDef)
        for statement in node.body if function or isinstance(node, ast.If | ast.For | ast.With | ast.Try) else ():
            at = statement.lineno - 1
            if statement.lineno != statement.end_lineno or isinstance(statement, ast.FunctionDef | ast.ClassDef):
                continue
            call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            if call or isinstance(statement, ast.Raise | ast.AugAssign):
                indent = " " * statement.col_offset
                found.append((at, f"{indent}pass"))
            if isinstance(statement, ast.Assign | ast.Return | ast.AugAssign | ast.Expr) and not is_text(statement):
                found += [(at, lines[at].replace(old, new, 1)) for old, new in SWAPS if old in lines[at]]
        if isinstance(node, ast.If | ast.While) and node.test.lineno == node.test.end_lineno:
            at = node.test.lineno - 1
            found += [(at, lines[at].replace(old, new, 1)) for old, new in SWAPS if old in lines[at]]
    return [fault for fault in dict.fromkeys(found) if compiles(lines, *fault)]


def is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def compiles(lines: list[str], at: int, changed: str) -> bool:
    try:
        ast.parse("\n".join([*lines[:at], changed, *lines[at + 1 :]]))
    except SyntaxError:
        return False
    return True


def noticed(module: str, folder: Path, text: str) -> bool:
    """Return whether a test fails, or does not end in time, with this text in a module."""
    whole = (folder / module).read_text(encoding="utf-8")
    tests = [f"tests/test_{name}.py" for name in TESTS[module].split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    (folder / module).write_text(text, encoding="utf-8")
    try:
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=200).returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        (folder / module).write_text(whole, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Count the faults that the tests notice.")
    parser.add_argument("--only", default="", help="part of a module's name")
    parser.add_argument("--count", type=int, default=10, help="faults per module, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "project")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "data", "__pycache__"))
        total = survived = 0
        for module in (module for module in TESTS if args.only in module):
            whole = (folder / module).read_text(encoding="utf-8")
            if noticed(module, folder, whole):
                print(f"{module}: its tests fail as it is", flush=True)
                continue
            every = faults(whole)
            for at, changed in sorted(random.Random(args.seed).sample(every, min(args.count, len(every)))):
                lines = whole.splitlines()
                total += 1
                if not noticed(module, folder, "\n".join([*lines[:at], changed, *lines[at + 1 :], ""])):
                    survived += 1
                    print(f"{module}:{at + 1} survives: {changed.strip()}", flush=True)
            print(f"{module}: {min(args.count, len(every))} of {len(every)} faults tried", flush=True)
    print(f"noticed {total - survived} of {total}")


if __name__ == "__main__":
    main()
