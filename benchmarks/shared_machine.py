"""Images per second of one training, and of two side by side on the same cores: `python benchmarks/shared_machine.py`.

Question: what do the 20,000 spins that harness/__init__.py sets cost one training, and how much faster are two?

OpenMP's threads spin while they wait between PyTorch's operations. On a shared machine, a spinning thread can take the
core from the thread that it waits for. GOMP_SPINCOUNT sets how often a thread checks before it sleeps: 300,000 times by
default, or 100 if one training has more threads than cores. Each figure comes from runs of train.py on scikit-learn's
digits, on the CPU, stopped after --seconds. Points are measured in turns; each gets the median of its repeats.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from machine import ROOT, heading, output_file, write_json

from harness.cli import number

BATCH_SIZE, EVERY = 32, 2  # images per step, steps between lines of the log
WARM_UP = 10  # seconds, for the imports and the start of the codebook


def images_per_second(spin_count: int, threads: int, args: argparse.Namespace) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": str(spin_count)}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dataset=digits", f"--out-dir={folder}", "--steps=1000000", "--save-every=1000000"]
        flags += [f"--log-every={EVERY}", f"--batch-size={BATCH_SIZE}", "--device=cpu", f"--precision={args.precision}"]
        command = [sys.executable, "-u", ROOT / "train.py", *flags]
        times, began = [], time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout:
                now = time.perf_counter()
                times += [now] if line.startswith("step ") and now - began > WARM_UP else []
                if now - began > args.seconds and len(times) > 1:
                    break
            process.kill()
    if len(times) < 2:
        sys.exit("train.py ended early")
    return EVERY * BATCH_SIZE * (len(times) - 1) / (times[-1] - times[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--spin-counts", type=number(int, 0), nargs="+", default=[300_000, 20_000, 1000, 0])
    parser.add_argument("--threads", type=number(int, 1), nargs="+", default=[1, 2, 8], help="of each training")
    parser.add_argument("--precision", default="auto", help="as train.py takes it")
    seconds = number(float, WARM_UP, above=True)
    parser.add_argument("--seconds", type=seconds, default=25, help=f"of a run; the first {WARM_UP} are not counted")
    parser.add_argument("--repeats", type=number(int, 1), default=3, help="runs of each point")
    parser.add_argument("--out", type=output_file, default="results/shared_machine.json")
    args = parser.parse_args()
    machine = heading(threads="threads as listed")
    print(machine)
    points = [(threads, spin_count) for threads in args.threads for spin_count in args.spin_counts]
    alone, shared = {point: [] for point in points}, {point: [] for point in points}
    for _ in range(args.repeats):
        for threads, spin_count in points:
            for count, measured in ((1, alone), (2, shared)):
                with ThreadPoolExecutor(count) as pool:
                    rates = list(pool.map(lambda _: images_per_second(spin_count, threads, args), range(count)))  # noqa: B023
                measured[threads, spin_count].append(rates)
    print("| threads | spin count | alone, images/s | two side by side | their sum / alone |")
    print("|---|---|---|---|---|")
    for threads, spin_count in points:
        one = statistics.median(rate for (rate,) in alone[threads, spin_count])
        two = sorted(shared[threads, spin_count], key=sum)[args.repeats // 2]
        both = " + ".join(f"{rate:,.0f}" for rate in two)
        print(f"| {threads} | {spin_count} | {one:,.0f} | {both} | {sum(two) / one:.0%} |", flush=True)
    rows = [{"threads": p[0], "spin_count": p[1], "alone": alone[p], "shared": shared[p]} for p in points]
    write_json(args.out, machine, args, rows)


if __name__ == "__main__":
    main()
