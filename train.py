"""Train a VQ-VAE (arXiv 1711.00937), of one level or two (arXiv 1906.00446), on images: `python train.py`.

A batch's order is a function of (seed, step), and all other state is in the checkpoint, so that a run stopped at any
step and resumed ends with the same weights, bit for bit on a CPU, as one that was never stopped.
"""

import argparse
import collections
import csv
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import figures
from checkpoint import (
    CHECKPOINT,
    IMAGE_CACHE,
    load_checkpoint,
    prepare_folder,
    random_state,
    resume_command,
    run_errors,
    save_checkpoint,
    set_random_state,
    trim_metrics,
    writable_folder,
    write_whole,
)
from data import NAMES, Dataset, Unavailable, batches, check_same, load_dataset, parts, to_pixels
from evaluate import evaluate
from loop import add_run_flags, check_batch_size, parse_run, train_loop, wrapped
from model import LEVELS, VQVAE, build_model
from process import (
    agree,
    catch_signals,
    check_memory,
    from_rank_0,
    join_processes,
    number,
    pick_device,
    user_errors,
)
from quantizer import perplexity

# Test images, at most, behind the curve of the test MSE, and the pixels of them all; summary.json is about all images.
CURVE_IMAGES, CURVE_PIXELS = 1000, 2**26


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a VQ-VAE and leave pictures, figures and a checkpoint in a folder.",
        usage=argparse.SUPPRESS,  # an error is then one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    switch = argparse.BooleanOptionalAction
    positive, rate, share = number(int, 1, 2**31), number(float, 0), number(float, 0, 1)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="auto",
        help=f"one of {', '.join(NAMES)}, or a folder of images, which may hold train/ and test/; "
        "auto: mnist, or digits if it cannot be had",
    )
    group.add_argument("--data-dir", default="data", help="folder that data sets are kept in and downloaded to")
    group.add_argument(
        "--image-size", type=positive, help="pixels to scale the short side to, before the centre is cropped"
    )
    group.add_argument(
        "--skip-bad-images", action=switch, default=False, help="leave out images that cannot be decoded"
    )
    group.add_argument(
        "--memory-limit",
        type=number(float, 0),
        metavar="GB",
        help="images of a folder that take more are read from disk while training; by default half of the free memory",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--codebook-size", type=positive, default=512, help="K, number of codes")
    group.add_argument("--code-dim", type=positive, default=64, help="D, size of a code")
    group.add_argument("--width", type=positive, default=64, help="channels of the convolutions")
    group.add_argument("--blocks", type=number(int, 1, 1000), default=2, help="residual blocks in encoder and decoder")
    group.add_argument("--levels", type=int, choices=(1, 2), default=1, help="of codes; 2: VQ-VAE-2")
    group.add_argument(
        "--downsample",
        type=lambda text: int(text) if text.isdecimal() else text,
        choices=("auto", 2, 4, 8, 16, 32),
        default="auto",
        help="pixels per code in each direction; auto: 4 up to 64 pixels and for the lower of 2 levels, else 8",
    )
    group = parser.add_argument_group("codebook")
    group.add_argument("--beta", type=rate, default=0.25, help="weight of the commitment loss")
    group.add_argument("--ema", action=switch, default=False, help="learn the codes by moving averages, not by a loss")
    group.add_argument(
        "--decay", type=share, default=0.99, help="moving averages keep this share of themselves per step"
    )
    group.add_argument("--kmeans-start", action=switch, default=True, help="start the codes from k-means")
    group.add_argument(
        "--revive-below", type=share, default=0.03, help="revive codes used less than this share of the mean; 0: none"
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=rate, default=4e-3, help="highest learning rate of encoder and decoder")
    group.add_argument("--codebook-lr", type=rate, default=4e-2, help="highest learning rate of the codes")
    group.add_argument("--out-dir", default="results", help="folder for all output; an earlier run in it is kept")
    add_run_flags(parser, steps=10_000, batch_size=32, what="a run")
    return parse_run(parser, argv, folder_flag="out_dir")


def main(args: argparse.Namespace):
    with user_errors():
        folder = writable_folder(args.out_dir)
        device, args.precision = pick_device(args.device, args.precision, args.compile)
        rank, ranks = join_processes(device)
        agree(args.resume, "--resume")
        data = load_data(args, rank)
        check_batch_size(args.batch_size, len(data.train_images))
        image_shape = tuple(data.train_images.shape[1:])
        if args.downsample == "auto":
            args.downsample = 4 if args.levels > 1 or max(image_shape) <= 64 else 8
        check_memory(lambda: build_model(vars(args), image_shape), device)
        checkpoint = load_checkpoint(folder) if args.resume is not None else None
        if checkpoint:
            check_same(data, checkpoint)
        shown = min(CURVE_IMAGES, len(data.test_images), max(1, CURVE_PIXELS // math.prod(image_shape[1:])))
        first_test_images = torch.cat(list(batches(data.test_images, parts(shown, image_shape[1:]), device)))
        signals = catch_signals()
        if rank == 0 and not checkpoint:
            prepare_folder(folder)
    torch.manual_seed(args.seed)
    model = build_model(vars(args), image_shape, mean=data.mean, std=data.std)
    model.to(device, memory_format=torch.channels_last).train()
    quantizers = [level.quantizer for level in model.levels]
    codebooks = [codebook for quantizer in quantizers for codebook in quantizer.parameters()]  # none with --ema
    networks = [p for p in model.parameters() if not any(p is codebook for codebook in codebooks)]
    optimizer = torch.optim.Adam([{"params": networks}, {"params": codebooks}], betas=(0.9, 0.99), fused=True)
    # What is done, and the sums of the losses and of each code's uses since the step last logged.
    sums = torch.zeros(1 + args.levels * (2 + args.codebook_size))
    progress = {"step": 0, "seconds": 0.0, "logged": 0, "sums": sums}
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        set_random_state(checkpoint["random"], device)
        progress = checkpoint["progress"]
    progress["sums"] = progress["sums"].to(device)
    forward = wrapped(model, args, device)
    if rank == 0:
        where = f"{device.type} in {args.precision}" + (f", {ranks} processes" if ranks > 1 else "")
        print(f"training on {len(data.train_images):,} images of {data.name}, on {where}", flush=True)

    def update(images: Tensor) -> Tensor:
        x = to_pixels(images, device)
        optimizer.zero_grad()
        # The start of the codebook asks for values all along, and is not compiled.
        stance = "default" if all(quantizer.all_started for quantizer in quantizers) else "force_eager"
        precision = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16")
        with precision, torch.compiler.set_stance(stance):
            x_recon, levels = forward(x)
        recon_loss = ((x_recon - x) / model.std).square().mean()  # of normalised images
        codebook_loss = sum(level.codebook_loss for level in levels)
        commitment_loss = sum(level.commitment_loss for level in levels)
        loss = recon_loss + codebook_loss + args.beta * commitment_loss  # arXiv 1711.00937, equation 3
        share = len(x) / args.batch_size  # 1, or what of the batch is on this rank
        (loss * (share * ranks)).backward()  # DistributedDataParallel then averages over the ranks
        for quantizer in quantizers:
            quantizer.reset_revived(optimizer)
        optimizer.step()
        of_levels = [loss for level in levels for loss in (level.codebook_loss, level.commitment_loss)]
        losses = torch.stack([recon_loss, *of_levels]).detach() * share
        counts = [quantizer.count(level.indices) for quantizer, level in zip(quantizers, levels)]
        return torch.cat([losses, *counts])

    def log(saving: bool) -> str:
        began = time.perf_counter()
        test_mse = evaluate(model, first_test_images)[0]["test_mse"] if saving else None
        line = write_metrics(folder, args, progress, test_mse)
        if saving:
            save_pictures(folder, model, first_test_images, f"{data.name}, step {progress['step']:,}", progress["step"])
        if progress["step"] == args.steps:
            finish(folder, args, model, data, first_test_images, progress, began)
        return line

    def save():
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state(device)}
        state |= {"args": vars(args), "data": data.digest, "image_shape": image_shape, "progress": progress}
        save_checkpoint(folder, state)

    rates = {"--lr": args.lr, "--codebook-lr": args.codebook_lr}
    with run_errors(folder, progress, rates):
        if rank == 0:
            trim_metrics(folder / "metrics.csv", columns(args.levels), progress["step"])
        resume, images = resume_command(folder, CHECKPOINT), data.train_images
        highest = list(zip(optimizer.param_groups, rates.values()))
        train_loop(args, resume, progress, highest, signals, images, device, update, log, save)
    if rank == 0:
        summary = json.loads((folder / "summary.json").read_text())
        used = " + ".join(str(summary["codes_used" + of]) for of in LEVELS[args.levels])
        print(
            f"{data.name}: test MSE {summary['test_mse']:.5f}, PSNR {summary['test_psnr']:.2f} dB, {used} of "
            f"{args.codebook_size} codes used, {summary['seconds']:.0f} s; pictures and summary.json are in {folder}"
        )


def load_data(args: argparse.Namespace, rank: int) -> Dataset:
    """Load the data set asked for; where none was, MNIST, or else the embedded digits with a loud warning.

    Rank 0 downloads and decides; the other processes take the data set that it took.
    """
    memory_limit = args.memory_limit
    if rank > 0:  # not each by the memory that the others have left it
        args.dataset, in_memory = from_rank_0(None)
        memory_limit = math.inf if in_memory else 0
    try:
        data = load_dataset(
            "mnist" if args.dataset == "auto" else args.dataset,
            args.data_dir,
            args.image_size,
            memory_limit,
            args.skip_bad_images,
            cache=Path(args.out_dir, IMAGE_CACHE),
        )
    except Unavailable as error:
        if args.dataset != "auto":
            raise ValueError(f"{error}; copy its files into {args.data_dir}, or name another --dataset") from error
        print(
            f"\n*** WARNING: {error}.\n*** Training on scikit-learn's 1,797 digits instead. To train on MNIST, connect "
            "to the network, or name\n*** the folder that holds MNIST/raw with --data-dir.\n",
            file=sys.stderr,
            flush=True,
        )
        data = load_dataset("digits", image_size=args.image_size)
    if args.dataset == "auto":
        args.dataset = data.name
    if rank == 0:
        from_rank_0((args.dataset, isinstance(data.train_images, Tensor)))
    return data


def columns(levels: int) -> list[str]:
    """Name the columns of metrics.csv; with two levels there are, for example, codes_used_top and codes_used_bottom."""
    names = ("codebook_loss", "commitment_loss", "codes_used", "perplexity")
    return ["step", "recon_loss", *(name + of for of in LEVELS[levels] for name in names), "test_mse", "dataset"]


def write_metrics(folder: Path, args: argparse.Namespace, progress: dict, test_mse: float | None) -> str:
    """Append a line to metrics.csv: means since the line before it; return it to be read."""
    losses, counts = progress["sums"].split([1 + 2 * args.levels, args.levels * args.codebook_size])
    recon_loss, *losses = (losses / (progress["step"] - progress["logged"])).tolist()
    row, shown = [progress["step"], recon_loss], [f"recon {recon_loss:.4f}"]
    for i, (of, uses) in enumerate(zip(LEVELS[args.levels], counts.cpu().split(args.codebook_size))):
        used = int((uses > 0).sum())
        row += [*losses[2 * i : 2 * i + 2], used, perplexity(uses).item()]
        level = "codebook {:.4f}, commitment {:.4f}, codes used {}/{}".format(*row[-4:-1], args.codebook_size)
        shown.append(f"{of[1:]} {level}".strip())
    with open(folder / "metrics.csv", "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow([*row, test_mse, args.dataset])
    if test_mse is not None:
        shown.append(f"test MSE {test_mse:.5f}")
    return ", ".join(shown)


@torch.inference_mode()
def save_pictures(folder: Path, model: VQVAE, images: Tensor, title: str, step: int):
    """Draw the first images' reconstructions, with two levels also from each level's codes alone, and the curves."""
    count, size = figures.ROWS // 2 * figures.images_per_row(images.shape[-1]), images.shape[-2:]
    rows = collections.defaultdict(list)
    model.eval()
    for part in parts(min(count, len(images)), size):
        x = to_pixels(images[part], model.mean.device)
        indices = model.encode(x)
        rows["original"].append(x)
        rows["reconstruction"].append(model.decode(indices, size))
        for i, of in enumerate(LEVELS[len(indices)] if len(indices) > 1 else ()):
            alone = [level if i == j else None for j, level in enumerate(indices)]
            rows[f"{of[1:]} alone"].append(model.decode(alone, size))
    rows = {name: torch.cat(made) for name, made in rows.items()}
    model.train()
    figures.save_reconstructions(folder / f"recon_{step:06d}.png", rows, title)
    figures.save_curves(folder / "curves.png", folder / "metrics.csv", title)


def finish(
    folder: Path,
    args: argparse.Namespace,
    model: VQVAE,
    data: Dataset,
    images: Tensor,
    progress: dict,
    began: float,
):
    """Measure the model on all test images, draw its codebooks, and write the summary; the clock stood at `began`."""
    measured, counts = evaluate(model, data.test_images)
    with torch.inference_mode():
        z_e = model.z_e(to_pixels(images[parts(len(images), images.shape[-2:])[0]], model.mean.device))
    codebooks = [level.quantizer.codebook.detach() for level in model.levels]
    names = [f"{of[1:]} " * bool(of) for of in LEVELS[args.levels]]
    title = f"{data.name}, step {progress['step']:,}"
    figures.save_codebooks(folder / "codebook.png", names, codebooks, counts, z_e, title)
    training_seconds = progress["seconds"]
    seconds = training_seconds + time.perf_counter() - began  # with what came after the last step
    summary = {"dataset": data.name, "steps": progress["step"], "seconds": seconds}
    rate = progress["step"] * args.batch_size / training_seconds
    summary |= {"training_seconds": training_seconds, "images_per_second": rate, **measured, "arguments": vars(args)}
    write_whole(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


if __name__ == "__main__":
    main(parse_args())
