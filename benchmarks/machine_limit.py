"""How much of the machine training uses: `python benchmarks/machine_limit.py --data-dir data`.

Aims: a step of train.py reaches at least 60% of the FLOP/s of a large convolution in the same precision, measured in
the same run; everything else (input, pictures, metrics, checkpoints) takes less than 3% of the time.
benchmarks/README.md says how far it is from these aims, and why.

PyTorch counts a step's FLOPs, forward and backward: those of the convolutions and the matrix products, including the
lookup, which is in float32 even if the network is in bfloat16. They are divided by the mean time of a step of train.py
with its defaults, from when `Run.steps` yields a batch until the loop asks for the next one. The first steps, which
initialise the codebook, and steps that log or save are left out. The ceilings are the best of three 3x3 convolutions,
forward and backward, and a product of two 4,096 x 4,096 matrices. torch.profiler then shows what takes the time of a
step, and short runs with and without --compile, in turns, show after how many steps compiling pays off. All in two
threads.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

from machine import heading, median_seconds, output_file, read_json, write_json

from harness.cli import number, user_errors
from harness.machine import pick_device
from harness.run import Run

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train
from model import VQVAE

FIRST = 20  # steps that initialise the codebook and compile
PROFILED = 50
STEPS = Run.steps


def flops_of_a_step(batch_size: int, code_dim: int = 64) -> int:
    model = VQVAE(1, (28, 28), code_dim=code_dim, kmeans_start=False)  # k-means is not part of a normal step
    with FlopCounterMode(display=False) as counter:
        x_recon, (level,) = model(torch.rand(batch_size, 1, 28, 28))
        (x_recon.sum() + level.codebook_loss + level.commitment_loss).backward()
    return counter.get_total_flops()


def convolution(width: int, size: int, dtype: torch.dtype):
    """Return a 3x3 convolution, forward and backward, on 32 images, and its FLOPs."""
    x = torch.randn(32, width, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, gradient = torch.randn(width, width, 3, 3, dtype=dtype, requires_grad=True), torch.ones_like(x)
    flops = 3 * 2 * 9 * width * x.numel()  # forward, and backward to the input and to the weight
    return lambda: torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), gradient), flops


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    a, b = torch.randn(2, 4096, 4096, dtype=dtype)
    convolutions = [convolution(width, size, dtype) for width, size in ((64, 56), (128, 28), (256, 28))]
    rates = [flops / median_seconds(function) for function, flops in convolutions]
    return {"product": 2 * 4096**3 / median_seconds(lambda: a @ b), "convolution": max(rates)}


def run(args: argparse.Namespace, steps: int, in_step: Callable, *flags) -> float:
    """Run train.py with each step inside the context `in_step(run)`; return the seconds of the run."""

    def steps_in_context(run: Run, images) -> Iterator:
        for batch in STEPS(run, images):
            with in_step(run):
                yield batch  # the loop makes its step, and comes back

    with tempfile.TemporaryDirectory() as folder, patch.object(Run, "steps", steps_in_context):
        where = ["--dataset", "mnist", "--data-dir", args.data_dir, "--out-dir", folder, "--device", "cpu"]
        train.main(train.parse_args([*where, "--steps", str(steps), *flags]))
        return read_json(f"{folder}/summary.json")["seconds"]


def timed(args: argparse.Namespace, steps: int, *flags) -> dict[str, float]:
    """Return the mean and the longest time of a step, in seconds, and the share of the run spent outside steps."""
    taken = {}  # by the number of the step

    @contextlib.contextmanager
    def in_step(run):
        began = time.perf_counter()
        yield
        if not run.logs_at(run.step):
            taken[run.step] = time.perf_counter() - began

    seconds = run(args, steps, in_step, *flags)
    mean = statistics.mean(value for step, value in taken.items() if step > FIRST)
    in_steps = sum(taken.values()) + (steps - len(taken)) * mean  # steps that log or save count with the mean time
    return {"seconds_of_a_step": mean, "longest": max(taken.values()), "no_step": 1 - in_steps / seconds}


def profiled(args: argparse.Namespace, *flags) -> dict[str, float]:
    """Return the operations that take the most time in steps and their input, each with its share of that time."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    @contextlib.contextmanager
    def in_step(run):
        if run.step == FIRST + 1:
            profiler.start()
        with torch.profiler.record_function("outside of operations"):  # Python, mostly
            yield
        if run.step == FIRST + PROFILED:
            profiler.stop()

    run(args, FIRST + PROFILED + 1, in_step, *flags)  # the last step measures and draws
    operations = sorted(profiler.key_averages(), key=lambda operation: -operation.self_cpu_time_total)
    total = sum(operation.self_cpu_time_total for operation in operations)
    return {operation.key: operation.self_cpu_time_total / total for operation in operations[:12]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    steps, defaults = number(int, FIRST + 2), train.parse_args([])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=steps, default=defaults.steps, help="with fewer, pictures take a larger share")
    parser.add_argument("--compiled-steps", type=steps, default=500, help="of each run with and without --compile")
    parser.add_argument("--repeats", type=number(int, 1), default=3, help="of the runs with and without --compile")
    parser.add_argument("--out", type=output_file, default="results/machine_limit.json")
    args = parser.parse_args()
    with user_errors():
        pick_device("cpu", compile=True)
    torch.set_num_threads(2)
    flops, rows = flops_of_a_step(defaults.batch_size, defaults.code_dim), []
    for precision in ("bfloat16", "float32"):
        flag = f"--precision={precision}"
        row = {"precision": precision, **ceilings(getattr(torch, precision))}
        row |= timed(args, args.steps, flag) | {"operations": profiled(args, flag)}
        rows.append(row | {"step": flops / row["seconds_of_a_step"]})
    ways = {"eager": [], "compiled": []}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that nothing compiled earlier is reused
        for _ in range(args.repeats):
            for way, flag in zip(ways, ("--no-compile", "--compile")):
                ways[way].append(timed(args, args.compiled_steps, flag))
    machine = heading(f"a step of {defaults.batch_size} images: {flops / 1e9:.2f} GFLOP")
    print(machine)
    print("| precision | steps/s | GFLOP/s | of a convolution's | of a matrix product's | time outside of steps |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["precision"], f"{1 / row['seconds_of_a_step']:.1f}", f"{row['step'] / 1e9:.0f}"]
        cells += [f"{row['step'] / row[top]:.0%} of {row[top] / 1e9:.0f}" for top in ("convolution", "product")]
        print("|", " | ".join(cells), f"| {row['no_step']:.1%} |")
    for row in rows:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in row["operations"].items())
        print(f"a step in {row['precision']}: {shares}")
    slower = [b["seconds_of_a_step"] / a["seconds_of_a_step"] for a, b in zip(*ways.values())]
    eager, compiled = (statistics.median(run["seconds_of_a_step"] for run in runs) for runs in ways.values())
    more = max(run["longest"] for run in ways["compiled"])  # in which it is compiled
    pays = f"pays after {more / (eager - compiled):,.0f} steps" if compiled < eager else "never pays"
    spread = f"{min(slower):.2f} to {max(slower):.2f}"
    print(f"--compile takes {more:.0f} s, makes a step take {spread} times as long, and so {pays}")
    write_json(args.out, machine, args, {"flops_of_a_step": flops, "rows": rows, **ways})


if __name__ == "__main__":
    main()
