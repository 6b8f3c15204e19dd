"""Seconds of training to a test MSE on MNIST: `python benchmarks/time_to_quality.py --data-dir data --peers DIR`.

Aims: `python train.py` reaches the test MSE that the best of three public repositories has after 150 s of training in
less than a fifteenth of that time, and 28.0 dB in less than 17 s. benchmarks/README.md says which aims are met.

The others are imported from PEERS/<owner>, clones of ritheshkumar95/pytorch-vqvae, MishaLaskin/vqvae and
airalcorn2/vqvae-pytorch (with and without moving averages), each with its author's architecture, loss, optimiser, batch
size, precision and scaling of pixels, K = 512. MishaLaskin's and airalcorn2's expect three channels, so they get the
grey channel three times, and the mean of their output channels is measured. If batch normalisation makes train and eval
mode differ, the better result counts. All get batches from memory, in the order of our seed, in two threads, one model
and seed after another. A run counts as collapsed if its error is above half of the mean image's error. Ours are whole
runs of train.py of several lengths, in its default precision and in the peers' precision, float32. Figures are medians
over seeds. Seconds are training time from the first step to the last, for ours with everything that a run does in
between. "Of the whole run" also counts what comes after: measuring all test images and drawing the last pictures.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from machine import heading, output_file, train, write_json

from harness.cli import number, user_errors
from harness.data import batch_indices, load_dataset
from harness.machine import pick_device

import torch
import torch.nn.functional as F

CLONES = ("ritheshkumar95", "MishaLaskin", "airalcorn2")
STEPS = (100, 150, 200, 250, 300, 400, 600, 800, 1000, 1500, 2000, 3000, 5000)
FIGURES = ("steps", "training_seconds", "seconds", "images_per_second", "test_mse", "test_psnr")


def import_from_clone(folder: Path, module: str):
    """Import a module from a clone; its modules may have the same names as another clone's."""
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def ritheshkumar95(peers: Path, variance: float):
    model = import_from_clone(peers / "ritheshkumar95", "modules").VectorQuantizedVAE(1, 256, 512)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)

    def step(images):
        x = images / 127.5 - 1
        x_recon, z_e, z_q = model(x)
        loss = F.mse_loss(x_recon, x) + F.mse_loss(z_q, z_e.detach()) + F.mse_loss(z_e, z_q.detach())
        return loss, x_recon / 2 + 0.5

    return model, optimizer, 128, step


def mishalaskin(peers: Path, variance: float):
    model = import_from_clone(peers / "MishaLaskin", "models.vqvae").VQVAE(128, 32, 2, 512, 64, 0.25)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, amsgrad=True)

    def step(images):
        x = (images / 127.5 - 1).expand(-1, 3, -1, -1)
        embedding_loss, x_recon, _ = model(x)
        return F.mse_loss(x_recon, x) / variance + embedding_loss, x_recon.mean(1, keepdim=True) / 2 + 0.5

    return model, optimizer, 32, step


def airalcorn2(peers: Path, variance: float, ema: bool):
    model = import_from_clone(peers / "airalcorn2", "vqvae").VQVAE(3, 128, 2, 2, 32, 64, 512, ema, 0.99, 1e-5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    def step(images):
        x = (images / 255 - 0.5).expand(-1, 3, -1, -1)
        out = model(x)
        loss = F.mse_loss(out["x_recon"], x) / variance + 0.25 * out["commitment_loss"]
        x_recon = out["x_recon"].mean(1, keepdim=True) if images.shape[1] == 1 else out["x_recon"]
        return loss if ema else loss + out["dictionary_loss"], x_recon + 0.5

    return model, optimizer, 32, step


PEERS = {
    "ritheshkumar95/pytorch-vqvae": ritheshkumar95,
    "MishaLaskin/vqvae": mishalaskin,
    "airalcorn2/vqvae-pytorch": lambda *args: airalcorn2(*args, ema=False),
    "airalcorn2/vqvae-pytorch, EMA": lambda *args: airalcorn2(*args, ema=True),
}


def train_peer(
    make, peers: Path, data, moments: list[float], device: str, seed: int = 0
) -> Iterator[tuple[torch.nn.Module, dict]]:
    """Train a peer; yield it and its metrics at each of the `moments`, in seconds of training without measuring."""
    torch.manual_seed(seed)
    variance = (data.train_images / 255).var().item()
    model, optimizer, batch_size, step = make(peers, variance)
    model.to(device)
    train_images, test_images = data.train_images.to(device), data.test_images.to(device)
    steps, seconds = 0, 0.0
    for moment in moments:
        model.train()
        began = time.perf_counter() - seconds
        while time.perf_counter() - began < moment:
            indices = batch_indices(len(train_images), batch_size, seed, steps)
            loss, _ = step(train_images[indices.to(device, non_blocking=True)])  # as in ours, the host does not wait
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if device == "cuda" and steps % 100 == 0:
                torch.cuda.synchronize()  # so that the clock measures finished steps
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        model.eval()
        measured = measure(step, test_images)
        for module in model.modules():
            module.training = isinstance(module, torch.nn.BatchNorm2d)
        measured = min(measured, measure(step, test_images), key=lambda figures: figures["test_mse"])
        images = steps * batch_size
        measured |= {"training_seconds": seconds, "steps": steps, "images": images}
        yield model.eval(), measured | {"images_per_second": images / seconds}


@torch.no_grad()
def measure(step, test_images: torch.Tensor) -> dict:
    errors = []
    for images in test_images.split(250):
        errors.append((step(images)[1].clamp(0, 1) - images / 255).square().mean((1, 2, 3)))
    errors = torch.cat(errors)
    return {"test_mse": errors.mean().item(), "test_psnr": (-10 * errors.log10()).mean().item()}


def train_ours(steps: int, precision: str, args: argparse.Namespace) -> list[dict]:
    flags = ["--device", args.device, "--dataset", "mnist", "--data-dir", args.data_dir, "--steps", steps]
    return [train(*flags, "--precision", precision, "--seed", seed) for seed in range(args.repeats)]


def medians(name: str, runs: list[dict], collapsed: float) -> dict:
    """Return the medians over seeds, how many of them have an error above `collapsed`, and the runs."""
    row = {figure: statistics.median(run[figure] for run in runs) for figure in FIGURES if figure in runs[0]}
    return {"name": name, "collapsed": sum(run["test_mse"] > collapsed for run in runs), **row, "runs": runs}


def print_row(row: dict):
    whole = f"{row['seconds']:.1f}" if "seconds" in row else ""
    collapsed = f"{row['collapsed']} of {len(row['runs'])}" if row["collapsed"] else ""
    print(
        f"| {row['name']} | {row['steps']:,.0f} | {row['training_seconds']:.1f} | {whole} | "
        f"{row['images_per_second']:,.0f} | {row['test_mse']:.5f} | {row['test_psnr']:.2f} | {collapsed} |",
        flush=True,
    )


def commit(clone: Path) -> str:
    command = ["git", "--git-dir", clone / ".git", "rev-parse", "HEAD"]  # not that of a repository around it
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:  # git is not installed
        return "unknown"
    return done.stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--peers", required=True, type=Path, help="folder that holds clones, each named by its owner")
    seconds = number(float, 0, above=True)
    parser.add_argument("--seconds", type=seconds, default=150, help="of training of each of the others")
    parser.add_argument("--repeats", type=number(int, 1), default=3, help="seeds of each row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=output_file, default="results/time_to_quality.json")
    args = parser.parse_args()
    missing = [name for name in CLONES if not (args.peers / name).is_dir()]
    if missing:
        parser.error(f"--peers {args.peers} holds no {', '.join(missing)}; clone the repositories there")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one peer uses a GPU if there is one
    torch.set_num_threads(2)
    with user_errors():
        pick_device(args.device)
        data = load_dataset("mnist", args.data_dir)
    commits = {name: commit(args.peers / name) for name in CLONES}
    on = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    machine = heading(on, *(f"{name} at {known[:7]}" for name, known in commits.items()))
    print(machine)
    print("| | steps | seconds | of the whole run | images/s | test MSE | PSNR dB | collapsed |")
    print("|---|---|---|---|---|---|---|---|")
    mean = data.test_images.float().mean(0) / 255
    collapsed = (data.test_images / 255 - mean).square().mean().item() / 2
    peers, ours = [], []
    measured = {"commits": commits, "peers": peers, "this": ours}
    for name, make in PEERS.items():
        runs = []
        for seed in range(args.repeats):
            ((_, figures),) = train_peer(make, args.peers, data, [args.seconds], args.device, seed)
            runs.append(figures)
        peers.append(medians(name, runs, collapsed))
        print_row(peers[-1])
        write_json(args.out, machine, args, measured)
    best = min(peers, key=lambda peer: peer["test_mse"])
    goals = {
        f"below the MSE of {best['name']}": lambda run: run["test_mse"] < best["test_mse"],
        "28 dB": lambda run: run["test_psnr"] >= 28,
    }
    for precision in ("auto", "float32"):
        rows = []
        for steps in STEPS:
            rows.append(medians(f"this, {precision}", train_ours(steps, precision, args), collapsed))
            ours.append(rows[-1])
            print_row(rows[-1])
            write_json(args.out, machine, args, measured)
            if all(reached(rows[-1]) for reached in goals.values()):
                break
        for goal, reached in goals.items():
            first = next((row for row in rows if reached(row)), None)
            if first is None:
                print(f"{precision}, {goal}: not reached")
                continue
            seconds, whole = first["training_seconds"], first["seconds"]
            print(f"{precision}, {goal}: {first['steps']:,} steps in {seconds:.1f} s, the whole run {whole:.1f} s,")
            print(f"1/{args.seconds / seconds:.1f} and 1/{args.seconds / whole:.1f} of the others' time")


if __name__ == "__main__":
    main()
