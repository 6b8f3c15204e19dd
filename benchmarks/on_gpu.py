"""Measure everything about a GPU in one run: `python benchmarks/on_gpu.py --data-dir data --peers peers`.

Within 8 minutes on one CUDA GPU and without a network: tests/test_cuda.py; steps per second by default, in float32 and
compiled, and the memory that they take; seconds to 28.0 dB on MNIST; images per second beside three public repositories
(clones in --peers, see time_to_quality.py; without the flag they are left out); the nearest codes by plain PyTorch and
by the Triton kernel; a codebook of 262,144 codes. Each part is a process of its own, until the 8 minutes are over. In
the end there is one table and one JSON, also when parts fail: the table then says which, and why, and what they had
measured.

`--tiny` only checks that everything runs: with small sizes, also without a GPU. Its numbers mean nothing.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from machine import ROOT, heading, median_seconds, output_file, read_json, run, train, write_json

from harness.cli import user_errors
from harness.data import load_dataset
from harness.machine import pick_device
from harness.run import format_number
from harness.storage import load_checkpoint, write_whole

import machine_limit
import torch
from time_to_quality import CLONES, PEERS, commit, train_peer

import train as script
from evaluate import evaluate
from model import load_model
from quantizer import nearest_code

MINUTES = 8
PART_SECONDS = 180  # of one part, so that it leaves time for the others
PEER_SECONDS = 10  # of training of each of the others, after 2 s in which CUDA's libraries are loaded
LADDER = (500, 600, 700, 800, 1000, 1500, 2000, 3000)  # lengths of runs to try until one reaches 28 dB
SIZES = [(n, size, dim) for n in (1568, 65_536) for size, dim in ((512, 8), (8192, 8), (65_536, 64))]
TINY_SIZES = [(n, size, 4) for n in (8, 16) for size in (16, 32, 64)]


# Parts: each yields named figures as soon as it has measured them.


def tests(args) -> Iterator[dict]:
    """Run the tests that only a GPU can pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines() or ["no output"]
    if done.returncode or (args.device == "cuda" and "passed" not in lines[-1]):
        print(done.stdout, file=sys.stderr)
        raise RuntimeError("; ".join([lines[-1], *(line for line in lines if line.startswith(("FAILED", "ERROR")))]))
    yield {"tests/test_cuda.py": lines[-1]}


def training(args) -> Iterator[dict]:
    """Time the second half of a run's steps; the first half warms up and compiles."""
    steps, times, batch_size = 20 if args.tiny else 2000, {}, script.parse_args([]).batch_size

    @contextlib.contextmanager
    def in_step(run):
        if run.step in (1, steps // 2, steps):
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[run.step] = time.perf_counter()
        yield

    ways = {"default": (), "float32": ("--precision=float32",), "compiled": ("--compile",)}
    for way in list(ways)[: 1 if args.tiny else 3]:
        if args.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # else the memory of the run before would count
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(sys.stderr):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # empty, so that nothing compiled earlier is reused
            flags = [*flags_here(args), "--save-every", 10**6, *ways[way]]
            machine_limit.run(args, steps, in_step, *map(str, flags))
        rate = (steps - steps // 2) / (times[steps] - times[steps // 2])
        yield {f"steps/s, {way}": rate, f"images/s, this, {way}": rate * batch_size}
        yield {f"s lost before steady steps, {way}": times[steps // 2] - times[1] - (steps // 2 - 1) / rate}
        if args.device == "cuda":
            yield {f"GB of the GPU, {way}": torch.cuda.max_memory_reserved() / 1e9}


def quality(args) -> Iterator[dict]:
    """Train runs of growing length until one reaches 28.0 dB."""
    for steps in (10, 20) if args.tiny else LADDER:
        summary = train_here(args, "--steps", steps)
        if summary["test_psnr"] >= 28:
            yield {"seconds to 28.0 dB": summary["training_seconds"], "steps of that run": steps}
            return
    yield {"seconds to 28.0 dB": f"not reached: {summary['test_psnr']:.2f} dB after {steps:,} steps"}


def peers(args) -> Iterator[dict]:
    """Time the training of the peers, with their authors' settings."""
    if args.peers is None:
        yield {"images/s of the others": "left out, since --peers was not given"}
        return
    data, moments = dataset(args), [0.5, 1] if args.tiny else [2, 2 + PEER_SECONDS]
    for name, make in PEERS.items():
        (_, first), (_, last) = train_peer(make, args.peers, data, moments, args.device)
        images, seconds = (last[figure] - first[figure] for figure in ("images", "training_seconds"))
        yield {f"images/s, {name}, float32": images / seconds}


def lookup(args) -> Iterator[dict]:
    """Time both lookups for N vectors and K codes of D dimensions."""
    ways = {"plain": nearest_code}
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

            repeats = 5 if args.tiny else 200
            median_seconds(call, repeats)  # a GPU that was idle runs at a low clock at first
            seconds = median_seconds(call, repeats)
            yield {f"lookup, N {n:,}, K {size:,}, D {dim}, {way}, ms": seconds * 1e3}


def large_codebook(args) -> Iterator[dict]:
    """Train with a codebook far larger than anyone needs for MNIST; count the codes that the training images use."""
    size, steps = (1024, 20) if args.tiny else (262_144, 500)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--codebook-size", size, "--steps", steps, "--out-dir", folder]
        memory = run("train.py", *flags_here(args), *flags)["gpu_memory"]
        seconds = read_json(f"{folder}/summary.json")["training_seconds"]
        yield {f"steps/s with the start, K {size:,}": steps / seconds, f"GB of the GPU, K {size:,}": memory}
        model = load_model(load_checkpoint(folder), args.device)
    yield {f"codes used, K {size:,}": evaluate(model, dataset(args).train_images)[0]["codes_used"]}


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
        options = {"text": True, "start_new_session": True, "env": os.environ | {"OMP_NUM_THREADS": "2"}}
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, **options)
        try:
            _, errors = process.communicate(timeout=max(1, seconds))
            reason = " / ".join(errors.strip().splitlines()[-2:]) or f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            errors, reason = "", f"stopped after {max(1, seconds):.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the trainings that it started
            process.wait()
        measured = read_json(out) if out.exists() else {}
        if process.returncode:
            print(errors, end="", file=sys.stderr)
            measured |= {f"{part} FAILED": reason}
        return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--peers", type=Path, help="folder of clones, see time_to_quality.py")
    parser.add_argument("--tiny", action="store_true", help="only see whether everything runs, with or without a GPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the part that this child process measures
    parser.add_argument("--out", type=output_file, default="results/on_gpu.json")
    args = parser.parse_args()
    with user_errors():
        args.device = pick_device("auto" if args.tiny else "cuda")[0].type
        if not args.tiny:
            dataset(args)  # fail now if it is missing
    if args.part:
        measured = {}
        for figures in PARTS[args.part](args):
            measured |= figures
            write_whole(args.out, json.dumps(measured))  # kept if the part fails later
        return
    missing = [name for name in CLONES if args.peers and not (args.peers / name).is_dir()]
    if missing:
        parser.error(f"--peers {args.peers} holds no {', '.join(missing)}; clone the repositories there")

    name = torch.cuda.get_device_name() if args.device == "cuda" else f"no GPU, {args.device}"
    commits = [f"{clone} at {commit(args.peers / clone)[:7]}" for clone in CLONES] if args.peers else []
    machine = heading(name, f"CUDA {torch.version.cuda}", *commits)
    ends, measured = time.monotonic() + 60 * MINUTES, {}
    for part in PARTS:
        print(f"{part} ...", flush=True)
        measured |= measure(part, min(PART_SECONDS, ends - time.monotonic()))
        write_json(args.out, machine, args, measured)
    print(f"\n{machine}\n\n| | |\n|---|---|")
    for label, value in measured.items():
        print(f"| {label} | {value if isinstance(value, str) else format_number(value)} |")
    sys.exit(any(label.endswith("FAILED") for label in measured))


if __name__ == "__main__":
    main()
