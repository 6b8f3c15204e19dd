"""Colour images against airalcorn2's EMA model at equal time: `python benchmarks/colour.py --data DIR --peers DIR`.

Claim: on 10,000 images of 32x32 RGB, with K = 512, D = 64 and 8x8 codes, `python train.py --dataset DIR --steps N` uses
at least 500 codes at a perplexity of at least 380, and its held-out MSE is more than 25% below that of
airalcorn2/vqvae-pytorch (with moving averages) after as many seconds on the same images, for N of 2,000 and 4,000; for
10,000, where both near what 512 codes can hold, it is less than that.

Ours are whole runs of train.py, timed from the first step on, with all pictures and measurements. The other is imported
from PEERS/airalcorn2, a clone of its repository; it has its author's architecture, loss, optimiser and batch size, is
fed the same images from memory, and the pauses in which it is measured do not count. All run in two threads.
"""

import argparse
import importlib.util
import time
from pathlib import Path

import torch
from machine import heading, train, write_json

from data import batch_indices, load_dataset
from quantizer import perplexity


def train_peer(repository: Path, data, moments: list[float]) -> list[dict]:
    """Train airalcorn2's model as its train_vqvae.py does, and measure it after each of some seconds."""
    spec = importlib.util.spec_from_file_location("airalcorn2", repository / "vqvae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = module.VQVAE(3, 128, 2, 2, 32, 64, 512, use_ema=True, decay=0.99, epsilon=1e-5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    variance = (data.train_images / 255).var()
    steps, seconds, measured = 0, 0.0, []
    for moment in moments:
        began = time.perf_counter() - seconds
        while time.perf_counter() - began < moment:
            x = data.train_images[batch_indices(len(data.train_images), 32, 0, steps)] / 255 - 0.5
            out = model(x)
            loss = torch.nn.functional.mse_loss(out["x_recon"], x) / variance + 0.25 * out["commitment_loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        seconds = time.perf_counter() - began
        measured.append({"steps": steps, "seconds": seconds, **measure(model, data.test_images)})
    return measured


@torch.no_grad()
def measure(model, test_images: torch.Tensor) -> dict:
    """Return what evaluate.py would."""
    model.eval()
    errors, counts = [], 0
    for images in test_images.split(250):
        x = images / 255
        z_q, _, _, indices = model.quantize(x - 0.5)
        errors.append(((model.decoder(z_q) + 0.5).clamp(0, 1) - x).square().mean((1, 2, 3)))
        counts = counts + torch.bincount(indices.flatten(), minlength=512)
    model.train()
    errors = torch.cat(errors)
    measured = {"test_mse": errors.mean().item(), "test_psnr": (-10 * errors.log10()).mean().item()}
    return measured | {"codes_used": int((counts > 0).sum()), "perplexity": perplexity(counts).item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data", required=True, help="folder of 32x32 RGB images")
    parser.add_argument("--peers", required=True, type=Path, help="folder that holds clones, each named by its owner")
    parser.add_argument("--steps", type=int, nargs="+", default=[2000, 4000, 10_000], help="lengths of our runs")
    parser.add_argument("--out", type=Path, default=Path("results", "colour.json"))
    args = parser.parse_args()
    torch.set_num_threads(2)
    data = load_dataset(args.data)
    ours = [train("--dataset", args.data, "--steps", steps) for steps in sorted(args.steps)]
    peers = train_peer(args.peers / "airalcorn2", data, [run["seconds"] for run in ours])
    machine = heading(f"{len(data.train_images):,} images")
    print(machine)
    print("| | steps | seconds | held-out MSE | PSNR dB | codes used | perplexity | MSE lower by |")
    print("|---|---|---|---|---|---|---|---|")
    row = "| {name} | {steps:,} | {seconds:.0f} | {test_mse:.5f} | {test_psnr:.2f} | {codes_used} | {perplexity:.0f} |"
    for our, peer in zip(ours, peers):
        print(row.format(name="this", **our), f"{1 - our['test_mse'] / peer['test_mse']:.0%} |")
        print(row.format(name="airalcorn2, EMA", **peer), "|")
    write_json(args.out, machine, args, {"this": ours, "airalcorn2, EMA": peers})


if __name__ == "__main__":
    main()
