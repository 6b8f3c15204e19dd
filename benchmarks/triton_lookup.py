"""The nearest codes by one Triton kernel, beside the plain lookup: `python benchmarks/triton_lookup.py`, on a GPU.

The kernel keeps each vector's smallest distance in registers and never writes the N x K distances, which the plain
lookup writes in chunks. Their speeds have not been compared yet, so training uses the plain one. If this script shows
that the kernel is faster, call it from `nearest_code` in quantizer.py for tensors on a GPU. Both prepare the codes in
the same way, in float32; ties go to the lowest index. Tests compare them in Triton's interpreter, which needs no GPU.
"""

import argparse

from machine import heading, median_seconds, output_file, write_json

from harness.cli import fail, number, user_errors
from harness.machine import pick_device

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    fail("Triton is not installed; it comes with PyTorch's builds for CUDA", code=2)

from quantizer import center, nearest_code

TILES = {"ROWS": 64, "CODES": 64, "DIMS": 32}  # vectors, codes, and dimensions of a product at a time


@triton.jit
def least_distance(
    z, codebook, half_square, indices, n, size, dim, ROWS: tl.constexpr, CODES: tl.constexpr, DIMS: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    least, nearest = tl.full((ROWS,), float("inf"), tl.float32), tl.zeros((ROWS,), tl.int64)
    for first in range(0, size, CODES):
        code = (first + tl.arange(0, CODES)).to(tl.int64)
        products = tl.zeros((ROWS, CODES), tl.float32)
        for low in range(0, dim, DIMS):
            d = low + tl.arange(0, DIMS)
            there = (row[:, None] < n) & (d[None, :] < dim)
            vectors = tl.load(z + row[:, None] * dim + d[None, :], there, 0.0)
            there = (code[None, :] < size) & (d[:, None] < dim)
            codes = tl.load(codebook + code[None, :] * dim + d[:, None], there, 0.0)
            products = tl.dot(vectors, codes, products, input_precision="ieee")  # TF32 would take the wrong codes
        distances = tl.load(half_square + code, code < size, float("inf"))[None, :] - products
        value, place = tl.min(distances, 1, return_indices=True)  # the lowest of a tie
        nearest = tl.where(value < least, first + place, nearest)
        least = tl.minimum(value, least)
    tl.store(indices + row, nearest, row < n)


def nearest_code_triton(z: Tensor, codebook: Tensor) -> Tensor:
    """Return what `quantizer.nearest_code` returns: (N,) int64 for z (N, D) and codebook (K, D)."""
    z, codebook = center(z, codebook)
    half_square = codebook.square().sum(1) / 2
    z, codebook = z.contiguous(), codebook.contiguous()
    indices = torch.empty(len(z), dtype=torch.int64, device=z.device)
    if len(z):
        programs = (triton.cdiv(len(z), TILES["ROWS"]),)
        least_distance[programs](z, codebook, half_square, indices, len(z), *codebook.shape, **TILES)
    return indices


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    positive = number(int, 1)
    parser.add_argument("--vectors", type=positive, nargs="+", default=[1568, 65_536], help="N")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[512, 8192, 65_536, 262_144], help="K")
    parser.add_argument("--dims", type=positive, nargs="+", default=[8, 64], help="D")
    parser.add_argument("--out", type=output_file, default="results/triton_lookup.json")
    args = parser.parse_args()
    with user_errors():
        device, _ = pick_device("cuda")
    versions = f"CUDA {torch.version.cuda}", f"triton {triton.__version__}"
    machine = heading(torch.cuda.get_device_name(), *versions, threads=f"{torch.get_num_threads()} threads")
    print(machine)
    print("| N | K | D | plain, ms | kernel, ms | plain / kernel | indices that differ |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for n, size, dim in [(n, size, dim) for n in args.vectors for size in args.sizes for dim in args.dims]:
        z, codebook = torch.randn(n, dim, device=device), torch.randn(size, dim, device=device)

        def seconds(lookup):
            return median_seconds(lambda: (lookup(z, codebook), torch.cuda.synchronize()), repeats=200)  # noqa: B023

        row = {"n": n, "size": size, "dim": dim, "plain": seconds(nearest_code), "kernel": seconds(nearest_code_triton)}
        row["differ"] = int((nearest_code(z, codebook) != nearest_code_triton(z, codebook)).sum())
        times = f"{row['plain'] * 1e3:.3f} | {row['kernel'] * 1e3:.3f} | {row['plain'] / row['kernel']:.2f}"
        print(f"| {n:,} | {size:,} | {dim} | {times} | {row['differ']} |", flush=True)
        rows.append(row)
    write_json(args.out, machine, args, rows)


if __name__ == "__main__":
    main()
