"""Seconds of training to a test MSE on MNIST: `python benchmarks/time_to_quality.py --data-dir data --peers DIR`.

Aims: that `python train.py` is where the best of four public implementations stands after 150 s of training in less
than a fifteenth of that time, and at 28.0 dB in less than 40 s. How far they are met stands in README.md.

The others are imported from PEERS/<owner>, clones of ritheshkumar95/pytorch-vqvae, MishaLaskin/vqvae and
airalcorn2/vqvae-pytorch (with and without moving averages), each with its author's architecture, loss, optimiser, batch
size and scaling of pixels, K = 512; MishaLaskin's and airalcorn2's, whose images have three channels, get the grey one
three times, and the mean of what they make is measured. Where batch normalisation makes a difference between train and
eval mode, the better of the two is measured. All are fed batches from memory, in the same order, in two threads on the
CPU, one model of one seed after another. Ours are whole runs of train.py of several lengths and seeds, of each length
the one of median test MSE. Seconds are those from the first step to the last, for ours with all that the run does in
between; "in all" counts what comes after it as well: measuring all test images, the last pictures.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import heading, train, write_json

from data import batch_indices, load_dataset

CLONES = ("ritheshkumar95", "MishaLaskin", "airalcorn2")
STEPS = (200, 300, 400, 500, 550, 600, 1000, 1500, 2000, 3000, 5000)


def imported(folder: Path, module: str):
    """Import a module from a clone, whose modules may have the names of another's."""
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def ritheshkumar95(peers: Path, variance: float):
    model = imported(peers / "ritheshkumar95", "modules").VectorQuantizedVAE(1, 256, 512)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)

    def step(images):
        x = images / 127.5 - 1
        x_recon, z_e, z_q = model(x)
        loss = F.mse_loss(x_recon, x) + F.mse_loss(z_q, z_e.detach()) + F.mse_loss(z_e, z_q.detach())
        return loss, x_recon / 2 + 0.5

    return model, optimizer, 128, step


def mishalaskin(peers: Path, variance: float):
    model = imported(peers / "MishaLaskin", "models.vqvae").VQVAE(128, 32, 2, 512, 64, 0.25)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, amsgrad=True)

    def step(images):
        x = (images / 127.5 - 1).expand(-1, 3, -1, -1)
        embedding_loss, x_recon, _ = model(x)
        return F.mse_loss(x_recon, x) / variance + embedding_loss, x_recon.mean(1, keepdim=True) / 2 + 0.5

    return model, optimizer, 32, step


def airalcorn2(peers: Path, variance: float, ema: bool):
    model = imported(peers / "airalcorn2", "vqvae").VQVAE(3, 128, 2, 2, 32, 64, 512, ema, 0.99, 1e-5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    def step(images):
        x = (images / 255 - 0.5).expand(-1, 3, -1, -1)
        out = model(x)
        loss = F.mse_loss(out["x_recon"], x) / variance + 0.25 * out["commitment_loss"]
        return loss if ema else loss + out["dictionary_loss"], out["x_recon"].mean(1, keepdim=True) + 0.5

    return model, optimizer, 32, step


PEERS = {
    "ritheshkumar95/pytorch-vqvae": ritheshkumar95,
    "MishaLaskin/vqvae": mishalaskin,
    "airalcorn2/vqvae-pytorch": lambda *args: airalcorn2(*args, ema=False),
    "airalcorn2/vqvae-pytorch, EMA": lambda *args: airalcorn2(*args, ema=True),
}


def train_peer(make, peers: Path, data, seconds: float) -> dict:
    torch.manual_seed(0)
    variance = (data.train_images / 255).var().item()
    model, optimizer, batch_size, step = make(peers, variance)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        loss, _ = step(data.train_images[batch_indices(len(data.train_images), batch_size, 0, steps)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    model.eval()
    measured = measure(step, data.test_images)
    for module in model.modules():
        module.training = isinstance(module, torch.nn.BatchNorm2d)
    measured = min(measured, measure(step, data.test_images), key=lambda figures: figures["test_mse"])
    return measured | {"training_seconds": seconds, "steps": steps, "images_per_second": steps * batch_size / seconds}


@torch.no_grad()
def measure(step, test_images: torch.Tensor) -> dict:
    errors = []
    for images in test_images.split(250):
        errors.append((step(images)[1].clamp(0, 1) - images / 255).square().mean((1, 2, 3)))
    errors = torch.cat(errors)
    return {"test_mse": errors.mean().item(), "test_psnr": (-10 * errors.log10()).mean().item()}


def train_ours(steps: int, data_dir: str, repeats: int) -> dict:
    """Return the summary of the run of median test MSE."""
    flags = ["--dataset", "mnist", "--data-dir", data_dir, "--steps", steps]
    runs = [train(*flags, "--seed", seed) for seed in range(repeats)]
    return sorted(runs, key=lambda run: run["test_mse"])[repeats // 2]


def commit(clone: Path) -> str:
    done = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], stdout=subprocess.PIPE, text=True)
    return done.stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--peers", required=True, type=Path, help="folder that holds clones, each named by its owner")
    parser.add_argument("--seconds", type=float, default=150, help="of training of each of the others")
    parser.add_argument("--repeats", type=int, default=3, help="seeds of each of our runs")
    parser.add_argument("--out", type=Path, default=Path("results", "time_to_quality.json"))
    args = parser.parse_args()
    missing = [name for name in CLONES if not (args.peers / name).is_dir()]
    if missing:
        parser.error(f"--peers {args.peers} holds no {', '.join(missing)}; clone the repositories there")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one of the others takes a GPU where there is one
    torch.set_num_threads(2)
    data = load_dataset("mnist", args.data_dir)
    machine = heading()
    print(machine)
    print("| | steps | seconds | in all | images/s | test MSE | PSNR dB |")
    print("|---|---|---|---|---|---|---|")
    row = "| {name} | {steps:,} | {training_seconds:.1f} | {in_all} | {images_per_second:,.0f} | {test_mse:.5f} | "
    row += "{test_psnr:.2f} |"
    results = []
    for name, make in PEERS.items():
        results.append({"name": name} | train_peer(make, args.peers, data, args.seconds))
        print(row.format(**results[-1], in_all=""), flush=True)
    best = min(results, key=lambda result: result["test_mse"])
    goals = {f"below the MSE of {best['name']}": ("test_mse", best["test_mse"]), "at 28 dB": ("test_psnr", 28.0)}
    for steps in STEPS:
        run = train_ours(steps, args.data_dir, args.repeats)
        results.append({"name": "this"} | {k: v for k, v in run.items() if k != "arguments"})
        reached = [name for name, (key, goal) in goals.items() if (run[key] < goal) == (key == "test_mse")]
        shares = (f"1/{args.seconds / run[clock]:.1f}" for clock in ("training_seconds", "seconds"))
        share = "{} of the others' time ({} in all)".format(*shares)
        shown = row.format(**results[-1], in_all=f"{run['seconds']:.1f}")
        print(shown, *(f"first {name}, {share}" for name in reached), flush=True)
        goals = {name: goal for name, goal in goals.items() if name not in reached}
        if not goals:
            break
    commits = {name: commit(args.peers / name) for name in CLONES}
    write_json(args.out, machine, args, {"commits": commits, "results": results})


if __name__ == "__main__":
    main()
