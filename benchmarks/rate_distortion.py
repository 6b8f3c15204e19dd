"""Rate (nats per image) against distortion (test MSE): `python benchmarks/rate_distortion.py --data-dir data`.

For each codebook size, this trains a VQ-VAE on MNIST and a prior over its codes, with train.py and train_prior.py in
two threads, and prints the test MSE and the nats per test image (without its class). Finer codes lower the MSE but cost
more nats, so neither number means anything alone. For comparison, the plot shows the Keras example of a VQ-VAE with a
PixelCNN (keras.io/examples/generative/vq_vae; K = 128, D = 16), by the losses that it prints: MSE 0.0042 and 1.034 nats
per code, with 7x7 codes.

The priors are trained for 1,200 of their 3,000 default steps, so that the nats are somewhat above what can be
reached.
"""

import argparse
from pathlib import Path

from machine import heading, output_folder, read_json, run, write_json

from harness.cli import number

from matplotlib.figure import Figure

KERAS = {"nats": 1.034 * 49, "mse": 0.0042}


def measure(folder: Path, size: int, args: argparse.Namespace) -> dict:
    data = ["--dataset", "mnist", "--data-dir", args.data_dir]
    run("train.py", "--out-dir", folder, *data, "--codebook-size", size, "--steps", args.steps)
    run("train_prior.py", "--run", folder, "--steps", args.prior_steps)
    vqvae, prior = (read_json(folder / name) for name in ("summary.json", "prior_summary.json"))
    row = {"codebook_size": size, "mse": vqvae["test_mse"], "psnr": vqvae["test_psnr"]}
    return row | {"nats_per_code": prior["test_nats_per_code"], "nats": prior["test_nats_per_image"]}


def plot(path: Path, rows: list[dict]):
    figure = Figure(figsize=(7, 4.5), dpi=110, layout="constrained")
    ax = figure.subplots()
    ax.plot([row["nats"] for row in rows], [row["mse"] for row in rows], marker="o", label="this repository")
    for row in rows:
        ax.annotate(
            f"K = {row['codebook_size']}",
            (row["nats"], row["mse"]),
            xytext=(-6, -12),
            textcoords="offset points",
            ha="right",
        )
    ax.plot(KERAS["nats"], KERAS["mse"], "s", color="tab:red", label="Keras example, K = 128")
    ax.set(title="MNIST: rate against distortion", yscale="log")
    ax.set(xlabel="nats per test image, by the prior", ylabel="test MSE, pixels in [0, 1]")
    ax.margins(x=0.16, y=0.12)  # room for the labels
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--data-dir", default="data")
    positive = number(int, 1)
    sizes = [10, 12, 16, 32, 64, 128, 512]
    parser.add_argument("--sizes", type=positive, nargs="+", default=sizes, help="of the codebook")
    parser.add_argument("--steps", type=positive, default=7500, help="of each VQ-VAE")
    parser.add_argument("--prior-steps", type=positive, default=1200, help="of each prior")
    parser.add_argument("--out-dir", type=output_folder, default="results/rate_distortion")
    args = parser.parse_args()
    machine = heading(f"{args.steps:,} steps and {args.prior_steps:,} of the prior")
    print(machine)
    print("| K | test MSE | PSNR dB | nats per code | nats per image |")
    print("|---|---|---|---|---|")
    path = args.out_dir / "rate_distortion.json"
    line = "| {codebook_size} | {mse:.5f} | {psnr:.2f} | {nats_per_code:.3f} | {nats:.1f} |"
    rows = []
    for size in sorted(args.sizes):
        rows.append(measure(args.out_dir / str(size), size, args))
        print(line.format(**rows[-1]), flush=True)
        write_json(path, machine, args, rows)
        plot(path.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
