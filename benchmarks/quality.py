"""How good a run of a given length is on MNIST, and how long it takes: `python benchmarks/quality.py --data-dir data`.

Claim (two cores of an AMD EPYC with AVX512-BF16, torch 2.15, medians of 3 seeds): `python train.py` with no flags ends
above 30 dB and below MSE 0.0012 with all 512 codes used, in less than 3 minutes and 2 GB; 28.0 dB takes less than 40 s,
and MSE 0.00414 less than 10 s; either way of learning the codebook.

Each row is a whole `python train.py --steps N` in two threads, with the schedule of its own length, once per seed.
Seconds are those of summary.json: training, pictures and all measurements, from the first step on. Memory is the
process's peak.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parent.parent
TARGETS = {  # steps of the run: what it is to reach
    400: {"test_mse": 0.00414, "seconds": 15},
    1500: {"test_psnr": 28.0, "seconds": 60},
    10_000: {"test_psnr": 29.0, "test_mse": 0.00147, "codes_used": 500, "seconds": 360, "memory": 2},
}
LARGER_IS_BETTER = ("test_psnr", "codes_used")


def measure(flags: list[str]) -> dict:
    """Train in a new process and return its summary, with its peak memory in GB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", "--out-dir", folder, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"train.py {' '.join(flags)} failed with exit code {process.returncode}")
        summary = json.loads(Path(folder, "summary.json").read_text())
    return summary | {"memory": usage.ru_maxrss * (1024 if sys.platform != "darwin" else 1) / 1e9}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--repeats", type=int, default=3, help="seeds per row")
    args = parser.parse_args()
    cpu = torch.cpu.get_capabilities().get("cpu_name", "CPU of unknown name")
    print(f"{cpu}, 2 threads, torch {torch.__version__}, medians of {args.repeats} seeds (lowest to highest)")
    print(
        "| codebook learns by | steps | seconds | test MSE | PSNR dB | SSIM | codes used | perplexity | GB | targets |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for way, flag in (("loss", "--no-ema"), ("EMA", "--ema")):
        for steps, targets in TARGETS.items():
            flags = [flag, "--dataset", "mnist", "--data-dir", args.data_dir, "--steps", str(steps)]
            runs = [measure([*flags, "--seed", str(seed)]) for seed in range(args.repeats)]
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


if __name__ == "__main__":
    main()
