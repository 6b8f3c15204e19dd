"""The cost of an image along four axes, one at a time: `python benchmarks/scaling.py`.

Claim: the cost of an image grows slower than the codebook, shrinks with the batch, and grows at most about as
fast as the pixels. It also shows what several processes cost on cores that one process could use alone.

Each point is a run of train.py on scikit-learn's digits, on the CPU, in two threads; on the last axis, the processes
share them. Microseconds per image are the median between lines 8 and 13 of the log's 14: by then, codes are being
revived (not yet at 224x224 pixels, where intervals are single steps). Points are measured in turns; each gets the
median of its repeats. The other axes stay at K = 512, batches of 32, 28x28 pixels and one process.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import ROOT, exit_if_failed, heading, output_folder, write_json

from harness.cli import number

from matplotlib.figure import Figure

AXES = {
    "codebook size K": ("--codebook-size", [64, 512, 4096, 32_768]),
    "images per step": ("--batch-size", [8, 32, 128, 512]),
    "image size": ("--image-size", [28, 56, 112, 224]),
    "processes": ("--nproc-per-node", [1, 2]),
}
DEFAULTS = {"--codebook-size": 512, "--batch-size": 32, "--image-size": 28, "--nproc-per-node": 1}
LINES = 14  # of the log


def microseconds_per_image(flag: str, value: int) -> float:
    point = DEFAULTS | {flag: value}
    batch_size, size, processes = (point[name] for name in ("--batch-size", "--image-size", "--nproc-per-node"))
    every = max(1, 3200 * 28**2 // (batch_size * size**2))  # steps between lines of the log
    with tempfile.TemporaryDirectory() as folder:
        steps = LINES * every
        flags = ["--dataset=digits", f"--out-dir={folder}", f"--steps={steps}", f"--save-every={steps}"]
        flags += [f"--log-every={every}", "--downsample=4", "--device=cpu"]
        flags += [f"{name}={setting}" for name, setting in point.items() if name != "--nproc-per-node"]
        start = [sys.executable, "-u"]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(2 // processes), "PYTHONUNBUFFERED": "1"}
        command = [*start, ROOT / "train.py", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            times = [time.perf_counter() for line in process.stdout if line.startswith("step ")]
        exit_if_failed(process.returncode, f"train.py {' '.join(flags)}")
    between = [b - a for a, b in zip(times[LINES // 2 : -2], times[LINES // 2 + 1 : -1])]
    return 1e6 * statistics.median(between) / (every * batch_size)


def plot(path: Path, measured: dict[str, dict[int, float]]):
    figure = Figure(figsize=(11, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(measured), sharey=True)
    for ax, (name, points) in zip(axes, measured.items()):
        ax.plot(points.keys(), points.values(), marker="o")
        ax.set(xlabel=name, xscale="log", yscale="log")
        ax.set_xticks(list(points), labels=[f"{value:,}" for value in points])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds per image")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=number(int, 1), default=3, help="runs of each point")
    parser.add_argument("--out-dir", type=output_folder, default="results")
    args = parser.parse_args()
    machine = heading()
    print(machine)
    points = [(flag, value) for flag, values in AXES.values() for value in values if value != DEFAULTS[flag]]
    default = next(iter(DEFAULTS.items()))  # a point of all axes
    costs = {point: [] for point in [default, *points]}
    for _ in range(args.repeats):
        for point in costs:
            costs[point].append(microseconds_per_image(*point))
    measured = {}
    for name, (flag, values) in AXES.items():
        measured[name] = {value: statistics.median(costs.get((flag, value), costs[default])) for value in values}
        shown = ", ".join(f"{value:,}: {cost:,.0f}" for value, cost in measured[name].items())
        print(f"microseconds per image by {name}: {shown}")
    spread = max(max(taken) / min(taken) for taken in costs.values())
    print(f"a point's highest cost is at most {spread:.2f} times its lowest")
    runs = {f"{flag}={value}": taken for (flag, value), taken in costs.items()}
    write_json(args.out_dir / "scaling.json", machine, args, {"medians": measured, "runs": runs})
    plot(args.out_dir / "scaling.png", measured)


if __name__ == "__main__":
    main()
