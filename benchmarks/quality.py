"""How good a run of a given length is on MNIST, and how long it takes: `python benchmarks/quality.py --data-dir data`.

Aims (two cores with AVX512-BF16, medians of 3 seeds): `python train.py` with no flags ends at 31.0 dB or more with all
512 codes used, in less than 3 minutes and 2 GB; 28.0 dB takes less than 17 s, and MSE 0.00414 less than 5 s of
training. With --ema the aims are the same; benchmarks/README.md says which are missed.

Each row is a whole `python train.py --steps N` in two threads, with the schedule of its own length, once per seed.
Seconds are those of summary.json: training, pictures and all measurements, from the first step on. Memory is the
process's peak.
"""

import argparse
from statistics import median

from machine import heading, output_file, train, write_json

from harness.cli import number

TARGETS = {  # steps of the run: what it is to reach
    200: {"test_mse": 0.00414, "training_seconds": 5},
    800: {"test_psnr": 28.0, "seconds": 17},
    7500: {"test_psnr": 31.0, "codes_used": 512, "seconds": 180, "memory": 2},
}
LARGER_IS_BETTER = ("test_psnr", "codes_used")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--repeats", type=number(int, 1), default=3, help="seeds per row")
    parser.add_argument("--out", type=output_file, default="results/quality.json")
    args = parser.parse_args()
    machine = heading(f"medians of {args.repeats} seeds (lowest to highest)")
    print(machine)
    print(
        "| codebook learns by | steps | seconds | test MSE | PSNR dB | SSIM | codes used | perplexity | GB | targets |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    measured = []
    for way, flag in (("loss", "--no-ema"), ("EMA", "--ema")):
        for steps, targets in TARGETS.items():
            flags = [flag, "--dataset", "mnist", "--data-dir", args.data_dir, "--steps", str(steps)]
            runs = [train(*flags, "--seed", seed) for seed in range(args.repeats)]
            measured += runs
            numbers = [name for name, value in runs[0].items() if isinstance(value, int | float)]
            middle = {name: median(run[name] for run in runs) for name in numbers}
            met = all(
                middle[name] >= target if name in LARGER_IS_BETTER else middle[name] <= target
                for name, target in targets.items()
            )
            lowest, highest = min(run["seconds"] for run in runs), max(run["seconds"] for run in runs)
            row = "| {way} | {steps:,} | {seconds:.1f} ({lowest:.1f} to {highest:.1f}) | {test_mse:.5f} | "
            row += "{test_psnr:.2f} | {test_ssim:.4f} | {codes_used:.0f} | {perplexity:.0f} | {memory:.2f} | {met} |"
            shown = middle | {"steps": steps, "way": way, "lowest": lowest, "highest": highest}
            print(row.format(**shown, met="met" if met else "not met"), flush=True)
            write_json(args.out, machine, args, measured)


if __name__ == "__main__":
    main()
