"""Helpers of the benchmarks: where and when they ran, whole training runs, and timing a function."""

import argparse
import datetime
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository, which scripts import after this file

from harness.storage import writable_folder

import torch

ROOT = Path(__file__).parent.parent


def heading(*more: str, threads: str = "2 threads") -> str:
    """Return the line above a table: processor, threads, versions, date."""
    cpu = torch.cpu.get_capabilities().get("cpu_name", "CPU of unknown name")
    return ", ".join([cpu, threads, f"torch {torch.__version__}", *more, datetime.date.today().isoformat()])


def output_folder(text: str) -> Path:
    """Make a folder for the figures, so that a long measurement does not fail at its end; an argparse type."""
    try:
        return writable_folder(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output_file(text: str) -> Path:
    """Make the folder of a file for the figures; an argparse type."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    return output_folder(path.parent) / path.name


def write_json(path: Path, machine: str, args: argparse.Namespace, measured):
    content = {"machine": machine, "arguments": vars(args), "measured": measured}
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def read_json(path: str | Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def run(script: str, *flags) -> dict:
    """Run a script of the repository in two threads, by default on the CPU; return its peak memory, in GB."""
    command = [sys.executable, __file__, ROOT / script, "--device=cpu", *map(str, flags)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    exit_if_failed(process.returncode, f"{script} {' '.join(map(str, flags))}")
    return json.loads(process.stdout.splitlines()[-1])


def exit_if_failed(code: int, command: str):
    """End if a command ended with an exit code that is not 0; of a user's mistake, 2, it has said enough itself."""
    if code:
        sys.exit(2 if code == 2 else f"{command} failed with exit code {code}")


def train(*flags) -> dict:
    """Return what the summary of a whole run of train.py says, its arguments aside, and its peak memory, in GB."""
    with tempfile.TemporaryDirectory() as folder:
        memory = run("train.py", "--out-dir", folder, *flags)
        summary = read_json(f"{folder}/summary.json")
        del summary["arguments"]
        return summary | memory


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also count the memory of the parent process
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def median_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Return the median of the seconds that a function takes after a first call."""
    function()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":  # what `run` starts: a script with its flags, and then its peak memory
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    print(json.dumps({"memory": peak_memory() / 1e9, "gpu_memory": torch.cuda.max_memory_reserved() / 1e9}))
