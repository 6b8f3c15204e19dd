"""Put the faults of faults.txt into a copy of the project, one at a time, and see whether the tests notice.

Run by hand, not by pytest: `python tests/mutate.py`, or `python tests/mutate.py run.py storage.py` for these modules.
The tests named beside a module run, the fastest first, until one fails; with --wide a fault that they do not notice
meets the rest of the plain suite. What survives is a promise without a test, or changes nothing that anyone can see.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_name("faults.txt")
LIMIT = 900  # seconds until tests count as hanging, which is noticed


class FastestFirst:
    """Order tests by the time that each took before, and remember what it takes now."""

    def __init__(self, path: Path):
        self.path, self.seconds = path, json.loads(path.read_text()) if path.exists() else {}

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = report.duration + (0 if report.when == "setup" else self.seconds[report.nodeid])

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus == 0:  # the times of a whole run
            self.path.write_text(json.dumps(self.seconds))


def read_faults() -> Iterator[tuple[str, list[str], str, str]]:
    """Yield the module, the names of its tests, the old text and the new text of each fault."""
    for line in FAULTS.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if " => " not in line:
            module, *tests = line.split()
            continue
        old, new = line.replace("\\n", "\n").split(" => ")
        yield module, tests, old, new.replace("DEL", "")


def failed(folder: Path, tests: list[str], times: Path) -> str:
    """Return the first test that fails in a child of this process, or its exit code if none is named, or ""."""
    log, child = folder.with_name("log"), os.fork()
    if child == 0:  # torch is imported already
        code = 99
        try:
            os.setpgid(0, 0)
            os.chdir(folder)
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
            flags = ["-x", "-q", "-n0", "-pno:cacheprovider", "-rfE", f"--rootdir={folder}"]
            code = pytest.main([*flags, *tests], plugins=[FastestFirst(times)])
        finally:
            os._exit(code)
    last = time.monotonic() + LIMIT
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < last:
        time.sleep(0.1)
    if ended == (0, 0):
        os.killpg(child, signal.SIGKILL)
        ended = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(ended[1])
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "" if code in (0, 5) else (lines or [f"exit code {code}"])[0][:100]


def main():
    parser = argparse.ArgumentParser(description="Count the faults that the tests notice.")
    parser.add_argument("modules", nargs="*", help="ends of the modules' names; by default all")
    parser.add_argument("--wide", action="store_true", help="try what survives on the rest of the plain suite")
    args = parser.parse_args()
    known = {module for module, *_ in read_faults()}
    for name in args.modules:
        if not any(module.endswith(name) for module in known):
            parser.error(f"{FAULTS.name} names no fault in {name}, only in {', '.join(sorted(known))}")
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    import matplotlib.figure  # noqa: F401 - before the forks
    import sklearn.datasets  # noqa: F401
    import sklearn.decomposition  # noqa: F401
    import torchvision  # noqa: F401

    noticed, survived = 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "project")
        left_out = shutil.ignore_patterns(".git", ".venv", "data", "results", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=left_out)
        for module, tests, old, new in read_faults():
            if args.modules and not module.endswith(tuple(args.modules)):
                continue
            path, near = folder / module, [f"tests/test_{test}.py" for test in tests]
            times = Path(name, "-".join(tests))
            if not times.exists() and (reason := failed(folder, near, times)):
                sys.exit(f"{tests} fail as the project is: {reason}")
            whole = path.read_text(encoding="utf-8")
            if whole.count(old) != 1:
                print(f"{module}: {whole.count(old)} places instead of one: {old}", flush=True)
                continue
            path.write_text(whole.replace(old, new), encoding="utf-8")
            reason = failed(folder, near, times)
            if args.wide and not reason:
                reason = failed(folder, [*(f"--ignore={test}" for test in near), "tests"], Path(name, "wide"))
            path.write_text(whole, encoding="utf-8")
            print(f"{module}: {old!r} -> {new!r}: {reason or 'SURVIVES'}", flush=True)
            noticed, survived = noticed + bool(reason), survived + [old] * (not reason)
    print(f"noticed {noticed} of {noticed + len(survived)}")


if __name__ == "__main__":
    main()
