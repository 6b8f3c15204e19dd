"""Codes from coarse to fine against one grid of codes: `python benchmarks/coarse_to_fine.py --data-dir data`.

Aims, all missed (see README.md): at the same bits per image and after the same seconds of training, scales reach the
test MSE of a single grid; 100 samples of MNIST are drawn at least 3 times as fast as in raster order with KV caches,
and 100 of 64x64 emoji (a 16x16 grid) at least 10 times as fast. --dataset names the emoji's folder.

Both kinds are trained by train.py and train_prior.py with their defaults, in one thread, for the same CPU seconds: two
short runs give the cost of a step. CPU seconds hardly change with what else the machine does. Bits per image are made
equal by the codebook: T codes of K cost T log2(K) bits, so that the 49 codes of a 7x7 grid with K = 512 cost what the
70 codes of the scales 1, 2, 4 and 7 cost with K = 78. The second pair of rows gives the scales the larger codebook, and
the single grid the one that costs as much.

The classifier and the Frechet distance come from generation.py: the share of samples classified as the requested class,
and the distance to the test images in the classifier's features; the distance of training images is shown beside it.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import ROOT, exit_if_failed, heading, output_folder, read_json, write_json

from harness.cli import number
from harness.data import NAMES, dataset_of
from harness.storage import load_checkpoint

import torch
from generation import classify, frechet, train_classifier

import sample as script
from model import VQVAE

TRIALS = {"train.py": (50, 250), "train_prior.py": (5, 45)}  # steps of the two short runs that give a step's cost
FILES = {"train.py": ("--out-dir", "summary.json"), "train_prior.py": ("--run", "prior_summary.json")}


def equal_bits(codebook_size: int, codes: int, other_codes: int) -> int:
    """Return the largest codebook size at which `other_codes` codes take no more bits than `codes` codes do."""
    return math.floor(codebook_size ** (codes / other_codes) + 1e-9)


def cpu_seconds(name: str, *flags) -> float:
    """Run a script of the repository in one thread; return the CPU seconds that it took."""
    before = os.times()
    often = ["--save-every", 10**6, "--log-every", 10**6, "--fresh", "--device", "cpu"]
    command = [sys.executable, ROOT / name, *flags, *often]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, env=environment)
    exit_if_failed(done.returncode, name)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def train_for(seconds: float, name: str, folder: Path, *flags) -> dict:
    """Run a script for so many CPU seconds of training; return its summary."""
    option, summary = FILES[name]
    few, many = TRIALS[name]
    trial = folder / "trial" if name == "train.py" else folder
    # The first of three runs decodes or encodes the images; the others read its cache.
    _, *costs = (cpu_seconds(name, option, trial, *flags, "--steps", steps) for steps in (1, few, many))
    step = (costs[1] - costs[0]) / (many - few)
    steps = max(1, round(seconds / step))
    cpu_seconds(name, option, folder, *flags, "--steps", steps)
    return read_json(folder / summary) | {"ms_per_step": 1000 * step, "training_seconds": steps * step}


def seconds_per_call(functions: list, repeats: int = 5) -> list[float]:
    """Return the median CPU seconds of each function; they take turns."""
    taken = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, times in zip(functions, taken):
            began = time.process_time()
            function()
            times.append(time.process_time() - began)
    return [statistics.median(times[1:]) for times in taken]


def print_table(rows: list[dict], **columns: str):
    """Print rows as a table; a column's format is a str.format field."""
    print("| " + " | ".join(name.replace("_", " ") for name in columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(form.format(row[name]) for name, form in columns.items()) + " |", flush=True)
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--dataset", default="mnist", help="mnist, or a folder of images with classes")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--codebook-size", type=number(int, 1), default=512, help="of the single grid")
    above_zero = number(float, 0, above=True)
    parser.add_argument("--seconds", type=above_zero, default=120, help="CPU seconds of training of each VQ-VAE")
    parser.add_argument("--prior-seconds", type=above_zero, default=600, help="CPU seconds of training of each prior")
    parser.add_argument("--num", type=number(int, 100), default=2000, help="samples behind each line of the table")
    parser.add_argument("--pairs", type=int, choices=(1, 2), default=2, help="1: leaves out the larger codebooks")
    parser.add_argument("--out-dir", type=output_folder, default="results/coarse_to_fine")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lengths = f"{args.seconds:.0f} CPU seconds each", f"priors {args.prior_seconds:.0f}"
    machine = heading(*lengths, threads="1 thread")
    print(machine, "\n", flush=True)

    # The codes: both kinds at the bits of one, and then of the other
    data = ["--dataset", args.dataset, "--data-dir", args.data_dir]
    cpu_seconds("train.py", "--out-dir", args.out_dir / "shape", *data, "--steps", 1)
    shape = load_checkpoint(args.out_dir / "shape")
    if shape["identity"]["class_names"] is None:
        parser.error(f"--dataset {args.dataset} has no classes, which the classifier needs")
    image_size, stride = shape["identity"]["image_shape"][1:], shape["args"]["downsample"]
    models = (VQVAE(1, image_size, 8, 8, 8, 1, stride, scales=scales) for scales in (None, "auto"))
    codes = [sum(map(math.prod, model.grids(image_size))) for model in models]
    size, rows = args.codebook_size, []
    pairs = [(size, equal_bits(size, *codes)), (equal_bits(size, *codes[::-1]), size)][: args.pairs]
    for i, pair in enumerate(pairs):
        for kind, T, K in zip(("one grid", "scales"), codes, pair):
            flags = [*data, "--codebook-size", K, *(["--scales", "auto"] if kind == "scales" else [])]
            folder = args.out_dir / f"{kind.replace(' ', '_')}_{i}"
            summary = train_for(args.seconds, "train.py", folder, *flags)
            rows.append({"codes": kind, "number": T, "K": K, "bits": T * math.log2(K), "folder": folder} | summary)
    columns = {"codes": "{}", "number": "{}", "K": "{:,}", "bits": "{:.0f}", "steps": "{:,}"}
    columns |= {"ms_per_step": "{:.1f}", "test_mse": "{:.5f}", "test_psnr": "{:.2f}", "codes_used": "{}"}
    print_table(rows, **columns)
    write_json(args.out_dir / "coarse_to_fine.json", machine, args, {"codes": rows})

    # The priors, on the first pair. The number of steps limits the speed for few images, arithmetic for many.
    priors, loaded = [], []
    for row in rows[:2]:
        summary = train_for(args.prior_seconds, "train_prior.py", row["folder"])
        priors.append({"prior": "raster" if row["codes"] == "one grid" else "scale by scale"} | summary)
        loaded.append(script.load_run(row["folder"]))
    for num in (1, 100):
        seconds = seconds_per_call([lambda run=run, num=num: script.sample(*run, num) for run in loaded])
        for row, taken in zip(priors, seconds):
            row[f"seconds_for_{num}"] = taken
        print(f"drawing {num} scale by scale: {seconds[0] / seconds[1]:.1f} times as fast as in raster order")

    # What is drawn
    data_dir = args.data_dir if args.dataset in NAMES else None
    source = dataset_of(load_checkpoint(rows[0]["folder"]), rows[0]["folder"], data_dir)
    train_images, test_images = (torch.as_tensor(images[:]) for images in (source.train_images, source.test_images))
    classifier = train_classifier(train_images, source.train_labels)
    real, found = classify(classifier, test_images)
    some = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))[: args.num]
    features, _ = classify(classifier, train_images[some])
    accuracy = (found == source.test_labels).float().mean().item()
    print(f"classifier: {accuracy:.2%} correct on test images; Frechet distance {frechet(features, real):.3f} of the")
    print(f"training images, {len(some):,} of them\n")
    for row, (model, prior) in zip(priors, loaded):
        asked = script.labels_of(prior, args.num)
        features, classes = classify(classifier, script.sample(model, prior, args.num))
        row["class_as_asked"] = (classes == asked).float().mean().item()
        row["frechet_distance"] = frechet(features, real)
    columns = {"prior": "{}", "steps": "{:,}", "ms_per_step": "{:.0f}", "test_bits_per_image": "{:.0f}"}
    columns |= {"class_as_asked": "{:.1%}", "frechet_distance": "{:.3f}"}
    columns |= {"seconds_for_1": "{:.3f}", "seconds_for_100": "{:.2f}"}
    print_table(priors, **columns)
    measured = {"codes": rows, "classifier": accuracy, "priors": priors}
    write_json(args.out_dir / "coarse_to_fine.json", machine, args, measured)


if __name__ == "__main__":
    main()
