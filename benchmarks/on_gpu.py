"""Measure everything about a GPU in one run: `python benchmarks/on_gpu.py --data-dir data --peers peers`.

Within 8 minutes on one CUDA GPU and without a network: tests/test_cuda.py; steps per second, eager and compiled, and
the memory that they take; seconds to 28.0 dB on MNIST; images per second beside three public repositories (clones in
--peers, see time_to_quality.py; without the flag they are left out); the nearest codes by plain PyTorch and by the
Triton kernel; a codebook of 262,144 codes. Each part is a process of its own, until the 8 minutes are over. In the end
there is one table and one JSON, also when parts fail: the table then says which, and why.

`--tiny` only checks that everything runs: with small sizes, also without a GPU. Its numbers mean nothing.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import ROOT, median_seconds, read_json, run, train, write_json

from harness.cli import user_errors
from harness.data import load_dataset
from harness.machine import pick_device
from harness.storage import load_checkpoint

import torch

from evaluate import evaluate
from model import load_model
from quantizer import nearest_code

MINUTES = 8
PEER_SECONDS = 10  # of training of each of the others
LADDER = (500, 600, 700, 800, 1000, 1500, 2000, 3000)  # lengths of runs to try until one reaches 28 dB
SIZES = [(n, size, dim) for n in (1568, 65_536) for size, dim in ((512, 8), (8192, 8), (65_536, 64))]
TINY_SIZES = [(n, size, 4) for n in (8, 16) for size in (16, 32, 64)]


def tests(args) -> dict:
    """Run the tests that only a GPU can pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line for line in done.stdout.splitlines() if " in " in line] or ["no output"]
    if done.returncode or (args.device == "cuda" and "passed" not in lines[-1]):
        raise RuntimeError(lines[-1])
    return {"tests/test_cuda.py": lines[-1]}


def training(args) -> dict:
    """Time default steps, eager and compiled."""
    measured, few, many = {}, *((10, 20) if args.tiny else (500, 2500))
    for flag in ("--no-compile",) if args.tiny else ("--no-compile", "--compile"):
        # The difference leaves out the start and the compilation, of which the first run fills the cache.
        runs = [train_here(args, "--steps", steps, "--save-every", 10**6, flag) for steps in (few, few, many)]
        rate = (many - few) / (runs[2]["training_seconds"] - runs[1]["training_seconds"])
        measured |= {f"steps/s, {flag}": rate, f"GB of the GPU, {flag}": runs[2]["gpu_memory"]}
    return measured


def quality(args) -> dict:
    """Train runs of growing length until one reaches 28.0 dB."""
    for steps in (10, 20) if args.tiny else LADDER:
        summary = train_here(args, "--steps", steps)
        if summary["test_psnr"] >= 28:
            return {"seconds to 28.0 dB": summary["training_seconds"], "steps of that run": steps}
    return {"seconds to 28.0 dB": f"not reached: {summary['test_psnr']:.2f} dB after {steps:,} steps"}


def peers(args) -> dict:
    """Time the training of the peers, with their authors' settings."""
    if args.peers is None:
        return {"images/s of the others": "left out, since --peers was not given"}
    from time_to_quality import PEERS, train_peer

    data, measured = dataset(args), {}
    for name, make in PEERS.items():
        ((_, figures),) = train_peer(make, args.peers, data, [1 if args.tiny else PEER_SECONDS], args.device)
        measured |= {f"images/s, {name}": figures["images_per_second"]}
    return measured | {"images/s, this": train_here(args, "--steps", 20 if args.tiny else 2000)["images_per_second"]}


def lookup(args) -> dict:
    """Time both lookups for N vectors and K codes of D dimensions."""
    ways, measured = {"plain": nearest_code}, {}
    if args.device == "cuda":
        from triton_lookup import nearest_code_triton

        ways["Triton"] = nearest_code_triton
    for n, size, dim in TINY_SIZES if args.tiny else SIZES:
        z, codebook = torch.randn(n, dim, device=args.device), torch.randn(size, dim, device=args.device)
        for way, nearest in ways.items():

            def call(nearest=nearest, z=z, codebook=codebook):
                nearest(z, codebook)
                if args.device == "cuda":
                    torch.cuda.synchronize()

            measured[f"lookup, N {n:,}, K {size:,}, D {dim}, {way}, ms"] = median_seconds(call) * 1e3
    return measured


def large_codebook(args) -> dict:
    """Train with a codebook far larger than anyone needs for MNIST; count the codes that the training images use."""
    size, steps = (1024, 20) if args.tiny else (262_144, 500)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--codebook-size", size, "--steps", steps, "--out-dir", folder]
        memory = run("train.py", *flags_here(args), *flags)["gpu_memory"]
        seconds = read_json(f"{folder}/summary.json")["training_seconds"]
        model = load_model(load_checkpoint(folder), args.device)
    used = evaluate(model, dataset(args).train_images)[0]["codes_used"]
    measured = {"steps/s": steps / seconds, "codes used": used, "GB of the GPU": memory}
    return {f"{name}, K {size:,}": value for name, value in measured.items()}


PARTS = {part.__name__: part for part in (tests, training, quality, peers, lookup, large_codebook)}


def dataset(args):
    return load_dataset("digits" if args.tiny else "mnist", args.data_dir)


def flags_here(args) -> list:
    small = ("--dataset", "digits", "--width", 8, "--codebook-size", 16) if args.tiny else ("--dataset", "mnist")
    return ["--device", args.device, "--data-dir", args.data_dir, *small]


def train_here(args, *flags) -> dict:
    """Return the summary of a run of train.py on the device."""
    return train(*flags_here(args), *flags)


def measure(part: str, seconds: float) -> dict:
    """Run one part in a process of its own; return what it measured, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "measured.json")
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--out", out]
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, errors = process.communicate(timeout=max(1, seconds))
        except subprocess.TimeoutExpired:
            return {f"{part} FAILED": "no time was left for it"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the trainings that it started
            process.wait()
        if process.returncode:
            lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
            return {f"{part} FAILED": lines[-1]}
        return read_json(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--peers", type=Path, help="folder of clones, see time_to_quality.py")
    parser.add_argument("--tiny", action="store_true", help="only see whether everything runs, with or without a GPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the part that this child process measures
    parser.add_argument("--out", type=Path, default=Path("results", "on_gpu.json"))
    args = parser.parse_args()
    with user_errors():
        args.device = pick_device("auto" if args.tiny else "cuda")[0].type
        if not args.tiny:
            dataset(args)  # fail now if it is missing
    if args.part:
        args.out.write_text(json.dumps(PARTS[args.part](args)), encoding="utf-8")
        return

    name = torch.cuda.get_device_name() if args.device == "cuda" else f"no GPU, {args.device}"
    machine = f"{name}, torch {torch.__version__}, {datetime.date.today().isoformat()}"
    ends, measured = time.monotonic() + 60 * MINUTES, {}
    for part in PARTS:
        print(f"{part} ...", flush=True)
        measured |= measure(part, ends - time.monotonic())
        write_json(args.out, machine, args, measured)
    print(f"\n{machine}\n\n| | |\n|---|---|")
    for label, value in measured.items():
        print(f"| {label} | {value if isinstance(value, str) else format(value, ',.4g')} |")
    sys.exit(any(label.endswith("FAILED") for label in measured))


if __name__ == "__main__":
    main()
