"""How much of the machine training uses: `python benchmarks/machine_limit.py --data-dir data`.

Aims: that a step of train.py does at least 60% of the arithmetic per second that a large convolution of the same
precision reaches in the same run, and that all else (input, pictures, metrics, checkpoints) takes less than 3% of the
time. How far it is from them, and why, stands in benchmarks/README.md.

A step's FLOPs, forward and backward, are counted by PyTorch: those of convolutions and matrix products, of which the
lookup is one, in float32 also where the network is in bfloat16. They are divided by the median time of a step of a run
of train.py with its defaults. The ceilings are the best of three 3x3 convolutions, forward and backward, and a product
of two matrices of 4,096 x 4,096. Then the same run with --compile: how many steps pay for the compiling. All in two
threads.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import heading, median_seconds, write_json
from torch.utils.flop_counter import FlopCounterMode

import train
from model import VQVAE
from process import pick_device, user_errors

train_loop = train.train_loop


def flops_of_a_step(batch_size: int = 32) -> int:
    model = VQVAE(1, (28, 28), kmeans_start=False)  # which would be counted with the first step
    with FlopCounterMode(display=False) as counter:
        x_recon, (level,) = model(torch.rand(batch_size, 1, 28, 28))
        (x_recon.sum() + level.codebook_loss + level.commitment_loss).backward()
    return counter.get_total_flops()


def convolution(width: int, size: int, dtype: torch.dtype):
    """Return a 3x3 convolution, forward and backward, on 32 images, and its FLOPs."""
    x = torch.randn(32, width, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, gradient = torch.randn(width, width, 3, 3, dtype=dtype, requires_grad=True), torch.ones_like(x)
    flops = 3 * 2 * 9 * width * x.numel()  # forward, and backward to the input and to the weight
    return lambda: F.conv2d(x, weight, padding=1).backward(gradient), flops


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    a, b = torch.randn(2, 4096, 4096, dtype=dtype)
    convolutions = [convolution(width, size, dtype) for width, size in ((64, 56), (128, 28), (256, 28))]
    rates = [flops / median_seconds(function) for function, flops in convolutions]
    return {"product": 2 * 4096**3 / median_seconds(lambda: a @ b), "convolution": max(rates)}


def train_timed(args: argparse.Namespace, *flags) -> dict[str, float]:
    """Run train.py; return the median seconds of a step, those of the longest, and the share that is no step."""
    taken = []

    def timed_loop(*arguments):
        *others, update, log, save = arguments

        def timed(batch):
            began = time.perf_counter()
            sums = update(batch)
            taken.append(time.perf_counter() - began)
            return sums

        train_loop(*others, timed, log, save)

    train.train_loop = timed_loop
    with tempfile.TemporaryDirectory() as folder:
        run = ["--dataset", "mnist", "--data-dir", args.data_dir, "--out-dir", folder, "--steps", str(args.steps)]
        train.main(train.parse_args([*run, "--device", "cpu", *flags]))
        seconds = json.loads(Path(folder, "summary.json").read_text())["seconds"]
    step = statistics.median(taken)
    return {"seconds_of_a_step": step, "longest": max(taken), "no_step": 1 - sum(taken) / seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=10_000, help="of each run; fewer make pictures a larger share")
    parser.add_argument("--out", type=Path, default=Path("results", "machine_limit.json"))
    args = parser.parse_args()
    with user_errors():
        pick_device("cpu", compile=True)
    torch.set_num_threads(2)
    flops, rows = flops_of_a_step(), []
    for precision in ("bfloat16", "float32"):
        row = {"precision": precision, **ceilings(getattr(torch, precision))}
        row |= train_timed(args, "--precision", precision)
        rows.append(row | {"step": flops / row["seconds_of_a_step"]})
    compiled = train_timed(args, "--compile")
    machine = heading(f"a step of 32 images: {flops / 1e9:.2f} GFLOP")
    print(machine)
    print("| precision | steps/s | GFLOP/s | of a convolution's | of a matrix product's | time that is no step |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["precision"], f"{1 / row['seconds_of_a_step']:.1f}", f"{row['step'] / 1e9:.0f}"]
        cells += [f"{row['step'] / row[of]:.0%} of {row[of] / 1e9:.0f}" for of in ("convolution", "product")]
        print("|", " | ".join(cells), f"| {row['no_step']:.1%} |")
    eager = min(rows, key=lambda row: row["seconds_of_a_step"])
    step, more = compiled["seconds_of_a_step"], compiled["longest"]  # in which it is compiled
    slower, saved = step / eager["seconds_of_a_step"], eager["seconds_of_a_step"] - step
    pays = f"pays after {more / saved:,.0f} steps" if saved > 0 else "never pays"
    print(f"--compile takes {more:.0f} s, makes a step take {slower:.2f} times as long, and so {pays}")
    write_json(args.out, machine, args, {"flops_of_a_step": flops, "rows": rows, "compiled": compiled})


if __name__ == "__main__":
    main()
