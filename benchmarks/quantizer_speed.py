"""Forward and backward of the quantizer against two others: `python benchmarks/quantizer_speed.py`.

Claim: `VectorQuantizer` takes the least time and memory of three, for N vectors, K codes of D dimensions, with either
way of learning. The others are `VectorQuantize` of vector-quantize-pytorch (the version that requirements-dev.txt pins,
Euclidean distance, straight-through gradient, with moving averages or a learnable codebook) and the textbook layer: all
N x K distances, then one-hot vectors. All three are in train mode; with moving averages, the cost includes the codebook
update. K-means and revival are off.

Each case runs in its own process with two threads: a warm-up, then the median of the repeats. Fast cases repeat for at
least 2 s, slow ones stop after 10 s. Memory is the peak of the process minus its peak before the first call. A case is
skipped if the N x K values that a layer writes would not fit in memory. At each size, the lookup's indices are compared
with the nearest codes in float64.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import exit_if_failed, heading, output_file, peak_memory, write_json

from harness.cli import number

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = {"this": 0, "vector-quantize-pytorch": 6, "textbook": 4}  # N x K matrices of float32 that each holds at once


class Textbook(nn.Module):
    """Distances to all codes, one-hot vectors, and their product with the codebook."""

    def __init__(self, codebook_size: int, code_dim: int, ema: bool):
        super().__init__()
        self.codebook, self.ema = nn.Parameter(torch.randn(codebook_size, code_dim), requires_grad=not ema), ema
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", self.codebook.detach().clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        distances = z.square().sum(1, keepdim=True) + self.codebook.square().sum(1) - 2 * z @ self.codebook.T
        one_hot = F.one_hot(distances.argmin(1), len(self.codebook)).to(z.dtype)
        z_q = one_hot @ self.codebook
        loss = 0.25 * F.mse_loss(z, z_q.detach())
        if self.ema:
            with torch.no_grad():
                self.counts.lerp_(one_hot.sum(0), 0.01)
                self.sums.lerp_(one_hot.T @ z, 0.01)
                self.codebook.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])
        else:
            loss = loss + F.mse_loss(z_q, z.detach())
        return z + (z_q - z).detach(), loss


def make(layer: str, size: int, dim: int, ema: bool):
    """Return a function from vectors (N, D) to their codes and the loss."""
    if layer == "textbook":
        return Textbook(size, dim, ema)
    if layer == "this":
        from quantizer import VectorQuantizer

        vq = VectorQuantizer(size, dim, ema=ema, kmeans_start=False, revive_below=0)
        nn.init.normal_(vq.codebook)

        def call(z):
            out = vq(z)
            return out.z_q, out.codebook_loss + 0.25 * out.commitment_loss

        return call
    from vector_quantize_pytorch import VectorQuantize

    vq = VectorQuantize(dim, size, decay=0.99, ema_update=ema, learnable_codebook=not ema, rotation_trick=False)

    def call(z):
        z_q, _, loss = vq(z[None])
        return z_q[0], loss.sum()

    return call


def measure(layer: str, n: int, size: int, dim: int, ema: bool, repeats: int) -> dict:
    """Return the seconds of a forward and backward, and the MB that they take."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    call, z, weights = make(layer, size, dim, ema), torch.randn(n, dim, requires_grad=True), torch.randn(n, dim)
    with contextlib.suppress(OSError):  # the imports' peak may have been higher than what is held now
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, taken = peak_memory(), []
    while len(taken) <= repeats or sum(taken) < 2:
        z.grad = None
        began = time.perf_counter()
        z_q, loss = call(z)
        ((z_q * weights).sum() + loss).backward()
        taken.append(time.perf_counter() - began)
        if len(taken) > 1 and sum(taken) > 10:
            break
    measured = {"seconds": statistics.median(taken[1:]), "megabytes": (peak_memory() - before) / 1e6}
    if layer == "this" and not ema:  # with moving averages vectors and codes would be the same
        measured["differing"] = differing(z.detach(), torch.randn(size, dim))
    return measured


def differing(z: Tensor, codebook: Tensor) -> int:
    """Return how many indices of the lookup differ from the nearest codes in float64."""
    from quantizer import nearest_code

    exact, different = codebook.double(), 0
    for vectors, indices in zip(z.split(256), nearest_code(z, codebook).split(256)):
        nearest = torch.addmm(exact.square().sum(1), vectors.double(), exact.T, alpha=-2).argmin(1)
        different += int((nearest != indices).sum())
    return different


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    positive = number(int, 1)
    parser.add_argument("--vectors", type=positive, nargs="+", default=[6272, 65_536], help="N")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[512, 8192, 65_536], help="K")
    parser.add_argument("--dims", type=positive, nargs="+", default=[8, 64], help="D")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # the case that this child process measures
    parser.add_argument("--out", type=output_file, default="results/quantizer_speed.json")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(**json.loads(args.case), repeats=args.repeats)))
        return
    if importlib.util.find_spec("vector_quantize_pytorch") is None:
        parser.error("vector-quantize-pytorch is not installed; install requirements-dev.txt")
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    library = f"vector-quantize-pytorch {importlib.metadata.version('vector-quantize-pytorch')}"
    machine = heading(library)
    print(f"{machine}; in brackets: seconds and memory relative to this one")
    print("| N | K | D | learns by | this | vector-quantize-pytorch | textbook |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for n, size, dim in [(n, size, dim) for n in args.vectors for size in args.sizes for dim in args.dims]:
        for ema in (False, True):
            case, measured = {"n": n, "size": size, "dim": dim, "ema": ema}, {}
            for layer in LAYERS:
                if LAYERS[layer] * 4 * n * size > there:
                    continue
                command = [sys.executable, __file__, f"--repeats={args.repeats}", f"--out={args.out}"]
                command += ["--case", json.dumps({"layer": layer} | case)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode != -signal.SIGKILL:  # the out-of-memory killer
                    exit_if_failed(done.returncode, f"{layer}, {case}")
                    measured[layer] = json.loads(done.stdout.splitlines()[-1])
            cells = [cell(measured.get(layer), measured.get("this")) for layer in LAYERS]
            print(f"| {n:,} | {size:,} | {dim} | {'EMA' if ema else 'loss'} | {' | '.join(cells)} |", flush=True)
            rows += [case | {"layer": layer} | result for layer, result in measured.items()]
            write_json(args.out, machine, args, rows)
    compared = [row for row in rows if "differing" in row]
    different, all_indices = sum(row["differing"] for row in compared), sum(row["n"] for row in compared)
    print(f"{different} of {all_indices:,} indices differ from the nearest codes in float64")


def cell(result: dict | None, ours: dict | None) -> str:
    if result is None:
        return "does not fit"
    text = "{seconds:.4f} s, {megabytes:,.0f} MB".format(**result)
    if ours is None or result is ours:
        return text
    memory = result["megabytes"] / max(ours["megabytes"], 1)
    return f"{text} ({result['seconds'] / ours['seconds']:.1f}, {memory:.1f})"


if __name__ == "__main__":
    main()
