"""Colour images against airalcorn2's EMA model at equal time: `python benchmarks/colour.py --data DIR --peers DIR`.

Claim: on 50,000 images of 32x32 RGB, with K = 512 and 8x8 codes, `python train.py --dataset DIR --steps N` uses at
least 500 codes at a perplexity of at least 380, and its held-out MSE is more than 25% below that of
airalcorn2/vqvae-pytorch (with moving averages) after as many seconds on the same images, for N of 2,000, 4,000 and
7,500.

Ours are whole runs of train.py, timed from the first step on, with all pictures and measurements. The peer is imported
from PEERS/airalcorn2, a clone of its repository. It keeps its author's architecture, loss, optimiser and batch size and
gets the same images from memory; the time to measure it does not count. All run in two threads.
"""

import argparse
from pathlib import Path

from machine import heading, output_file, train, write_json

from harness.cli import number, user_errors
from harness.data import load_dataset

import torch
from time_to_quality import PEERS, train_peer

from quantizer import perplexity


@torch.no_grad()
def codes(model, test_images: torch.Tensor) -> dict:
    """Return the codes used and the perplexity of the peer, as evaluate.py computes them."""
    indices = [model.quantize(images / 255 - 0.5)[3].flatten() for images in test_images.split(250)]
    counts = torch.bincount(torch.cat(indices), minlength=512)
    return {"codes_used": int((counts > 0).sum()), "perplexity": perplexity(counts).item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data", required=True, help="folder of 32x32 RGB images")
    parser.add_argument("--peers", required=True, type=Path, help="folder that holds clones, each named by its owner")
    parser.add_argument("--steps", type=number(int, 1), nargs="+", default=[2000, 4000, 7500], help="of our runs")
    parser.add_argument("--out", type=output_file, default="results/colour.json")
    args = parser.parse_args()
    if not (args.peers / "airalcorn2").is_dir():
        parser.error(f"--peers {args.peers} holds no airalcorn2; clone the repository there")
    torch.set_num_threads(2)
    with user_errors():
        data = load_dataset(args.data)
    ours = [train("--dataset", args.data, "--steps", steps) for steps in sorted(args.steps)]
    moments = [run["seconds"] for run in ours]
    trained = train_peer(PEERS["airalcorn2/vqvae-pytorch, EMA"], args.peers, data, moments, "cpu")
    peers = [{"seconds": s} | figures | codes(model, data.test_images) for s, (model, figures) in zip(moments, trained)]
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
