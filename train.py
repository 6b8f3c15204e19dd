"""Train a VQ-VAE (arXiv 1711.00937) on small images: `python train.py`.

A batch's order is a function of (seed, step), and all other state is in the checkpoint, so that a run stopped at any
step and resumed ends with the same weights, bit for bit on a CPU, as one that was never stopped.
"""

import argparse
import csv
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import figures
from checkpoint import load_checkpoint, prepare_folder, save_checkpoint, user_errors
from data import NAMES, Dataset, Unavailable, batch_indices, channel_stats, load_dataset, to_pixels
from evaluate import evaluate
from model import VQVAE, build_model
from quantizer import perplexity

COLUMNS = ("step", "recon_loss", "codebook_loss", "commitment_loss", "codes_used", "perplexity", "test_mse")
RESUME_MAY_CHANGE = {"steps", "save_every", "log_every", "data_dir", "device", "precision", "out_dir", "resume"}
CODEBOOK_IMAGES = 100  # test images whose encoder outputs are drawn behind the codes
RECON_IMAGES = figures.COLUMNS * figures.ROWS
CURVE_IMAGES = 1000  # test images behind the curve of the test MSE; summary.json is about all of them


def number(kind: type, low: float, below: float = math.inf):
    """Return an argparse type: an int or a float in [low, below)."""

    def parse(text):
        value = kind(text)
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and below {below}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it in its own messages
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a VQ-VAE and leave pictures, figures and a checkpoint in a folder.",
        usage=argparse.SUPPRESS,  # an error is then one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    switch = argparse.BooleanOptionalAction
    positive, rate, share = number(int, 1), number(float, 0), number(float, 0, 1)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=NAMES, help="None is mnist, or digits where mnist cannot be had")
    group.add_argument("--data-dir", default="data", help="folder that data sets are kept in and downloaded to")
    group = parser.add_argument_group("model")
    group.add_argument("--codebook-size", type=positive, default=512, help="K, number of codes")
    group.add_argument("--code-dim", type=positive, default=64, help="D, size of a code")
    group.add_argument("--width", type=positive, default=64, help="channels of the convolutions")
    group.add_argument("--blocks", type=positive, default=2, help="residual blocks in the encoder, and in the decoder")
    group = parser.add_argument_group("codebook")
    group.add_argument("--beta", type=rate, default=0.25, help="weight of the commitment loss")
    group.add_argument("--ema", action=switch, default=False, help="learn the codes by moving averages, not by a loss")
    group.add_argument("--decay", type=share, default=0.99, help="of the moving averages")
    group.add_argument("--kmeans-start", action=switch, default=True, help="start the codes from k-means")
    group.add_argument("--revive-below", type=share, default=0.03, help="share of fair use that is dead; 0: no revival")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--steps", type=positive, default=10_000, help="of training; the learning rate falls to 0 there")
    group.add_argument("--batch-size", type=positive, default=32, help="images per step")
    group.add_argument("--lr", type=rate, default=4e-3, help="highest learning rate of encoder and decoder")
    group.add_argument("--codebook-lr", type=rate, default=4e-2, help="highest learning rate of the codes")
    group.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="of everything random")
    group = parser.add_argument_group("run")
    group.add_argument("--out-dir", default="results", help="folder for all output; an earlier run in it is kept")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="folder of a run to go on with, by its own arguments; "
        "with other --steps, the learning rate goes on as if they had been planned from the start",
    )
    group.add_argument("--save-every", type=positive, default=1000, help="steps between pictures and checkpoints")
    group.add_argument("--log-every", type=positive, default=100, help="steps between lines of metrics.csv")
    group.add_argument("--device", choices=("cpu", "cuda", "mps"), help="None is the best one at hand")
    group.add_argument("--precision", choices=("float32", "bfloat16"), help="of convolutions; None is the faster one")
    args = parser.parse_args(argv)
    if args.resume:
        args = resumed_args(parser, argv, args.resume)
    return args


def resumed_args(parser: argparse.ArgumentParser, argv: list[str] | None, run: str) -> argparse.Namespace:
    """Parse again with the run's own arguments as defaults, refusing flags that contradict them."""
    try:
        checkpoint = load_checkpoint(run)
    except ValueError as error:
        parser.error(str(error))
    saved = checkpoint["args"]
    parser.set_defaults(**saved | {"out_dir": run})
    args = parser.parse_args(argv)
    if args.out_dir != run:
        parser.error(f"--out-dir {args.out_dir}: a resumed run goes on in its own folder, {run}; leave out --out-dir")
    for name, value in saved.items():
        if name not in RESUME_MAY_CHANGE and getattr(args, name) != value:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {getattr(args, name)}, but the run in {run} has {value}; leave out {flag}")
    if checkpoint["progress"]["step"] >= args.steps:
        parser.error(f"the run in {run} has done its {checkpoint['progress']['step']} steps; give more with --steps")
    return args


def main(args: argparse.Namespace):
    with user_errors():
        device, precision = pick_device(args.device, args.precision)
        data = load_data(args)
        if args.batch_size > len(data.train_images):
            raise ValueError(f"--batch-size {args.batch_size} is above the {len(data.train_images)} training images")
        checkpoint = load_checkpoint(args.resume) if args.resume else None
        folder = Path(args.resume) if args.resume else prepare_folder(args.out_dir)
    torch.manual_seed(args.seed)
    image_shape = tuple(data.train_images.shape[1:])
    mean, std = channel_stats(data.train_images)
    model = build_model(vars(args), image_shape, mean=mean, std=std)
    model.to(device, memory_format=torch.channels_last).train()
    networks = [*model.encoder.parameters(), *model.decoder.parameters()]
    groups = [{"params": networks}, {"params": list(model.quantizer.parameters())}]  # the second is empty with --ema
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    # The steps and seconds done, and the sums since the step last logged, which the next line of metrics.csv averages.
    progress = {"step": 0, "seconds": 0.0, "logged": 0}
    progress |= {"losses": torch.zeros(3), "counts": torch.zeros(args.codebook_size)}
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        set_random_state(checkpoint["random"], device)
        progress = checkpoint["progress"]
    progress |= {"losses": progress["losses"].to(device), "counts": progress["counts"].to(device)}
    trim_metrics(folder / "metrics.csv", progress["step"])

    images = data.train_images.to(device)
    print(f"training on {len(images):,} images of {data.name}, on {device.type} in {precision}", flush=True)
    bar = tqdm(total=args.steps, initial=progress["step"], disable=not sys.stderr.isatty(), dynamic_ncols=True)
    signals = catch_signals()
    began = time.perf_counter() - progress["seconds"]
    for step in range(progress["step"] + 1, args.steps + 1):
        for group, highest in zip(optimizer.param_groups, (args.lr, args.codebook_lr)):
            group["lr"] = highest * schedule(step, args.steps)
        batch = batch_indices(len(images), args.batch_size, args.seed, step - 1)
        x = to_pixels(images[batch.to(device)], device)

        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            out = model(x)
        recon_loss = ((out.x_recon - x) / model.std).square().mean()  # of normalised images
        loss = recon_loss + out.codebook_loss + args.beta * out.commitment_loss  # arXiv 1711.00937, equation 3
        optimizer.zero_grad()
        loss.backward()
        model.quantizer.reset_revived(optimizer)
        optimizer.step()

        progress["losses"] += torch.stack([recon_loss, out.codebook_loss, out.commitment_loss]).detach()
        progress["counts"] += model.quantizer.count(out.indices)
        progress |= {"step": step, "seconds": time.perf_counter() - began}
        bar.update()
        saving = step % args.save_every == 0 or step == args.steps
        if saving or step % args.log_every == 0:
            test_mse = evaluate(model, data.test_images[:CURVE_IMAGES])[0]["test_mse"] if saving else None
            log(folder / "metrics.csv", args, progress, test_mse, bar)
        if saving:
            save_pictures(folder, model, data, step)
        if step == args.steps:
            measured = finish(folder, args, model, data, progress, began)
        if saving or signals:  # last of all, so that whatever a checkpoint counts as done is on disk
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random_state(device)}
            save_checkpoint(folder, state | {"args": vars(args), "image_shape": image_shape, "progress": progress})
        if signals and step < args.steps:
            bar.close()
            print(f"stopped at step {step}; to go on: python train.py --resume {folder}", flush=True)
            sys.exit(128 + signals[0])
    bar.close()
    print(
        f"{data.name}: test MSE {measured['test_mse']:.5f}, PSNR {measured['test_psnr']:.2f} dB, "
        f"{measured['codes_used']} of {args.codebook_size} codes used, "
        f"{progress['seconds']:.0f} s; pictures and summary.json are in {folder}"
    )


def pick_device(device: str | None, precision: str | None) -> tuple[torch.device, str]:
    """Choose the fastest device, and bfloat16 where it has hardware for it.

    Raises:
        ValueError: the device asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = device or next(name for name in there if there[name])
    if not there[device]:
        raise ValueError(f"--device {device}: this machine has {', '.join(n for n in there if there[n])}")
    if device == "cpu":  # where a processor emulates bfloat16 it is slower than float32
        has = torch.cpu.get_capabilities()
        fast_bfloat16 = has.get("avx512_bf16") or has.get("amx_bf16")
    else:
        fast_bfloat16 = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    return torch.device(device), precision or ("bfloat16" if fast_bfloat16 else "float32")


def load_data(args: argparse.Namespace) -> Dataset:
    """Load the data set asked for; where none was, MNIST, or else the embedded digits with a loud warning."""
    try:
        data = load_dataset(args.dataset or "mnist", args.data_dir)
    except Unavailable as error:
        if args.dataset:
            raise ValueError(f"{error}; copy its files into {args.data_dir}, or name another --dataset") from error
        print(
            f"\n*** WARNING: {error}.\n*** Training on scikit-learn's 1,797 digits instead. To train on MNIST, connect "
            "to the network, or name\n*** the folder that holds MNIST/raw with --data-dir.\n",
            file=sys.stderr,
            flush=True,
        )
        data = load_dataset("digits", args.data_dir)
    args.dataset = data.name
    return data


def schedule(step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 1, as a share of the highest: warm-up, then half a cosine."""
    warm_up = min(1.0, step / (0.03 * steps))
    return warm_up * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def log(metrics: Path, args: argparse.Namespace, progress: dict, test_mse: float | None, bar: tqdm):
    """Append a line to metrics.csv: means since the line before it; show it in the bar, or print it without one."""
    losses = (progress["losses"] / (progress["step"] - progress["logged"])).tolist()
    counts = progress["counts"].cpu()
    used, ppl = int((counts > 0).sum()), perplexity(counts).item()
    row = [progress["step"], *losses, used, ppl, test_mse]
    with open(metrics, "a", newline="") as file:
        csv.writer(file).writerow(row)
    rate = progress["step"] * args.batch_size / progress["seconds"]
    shown = "recon {:.4f}, codebook {:.4f}, commitment {:.4f}".format(*losses)
    shown += f", codes used {used}/{args.codebook_size}, {rate:,.0f} images/s"
    if test_mse is not None:
        shown += f", test MSE {test_mse:.5f}"
    bar.set_postfix_str(shown)
    if bar.disable:
        print(f"step {progress['step']}/{args.steps}: {shown}", flush=True)
    progress["losses"].zero_()
    progress["counts"].zero_()
    progress["logged"] = progress["step"]


def trim_metrics(metrics: Path, step: int):
    """Keep the lines of metrics.csv up to a step: a run that died after its last checkpoint does these again."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    kept = [line for line in lines[1:] if int(line.split(",")[0]) <= step]
    metrics.write_text("\n".join([",".join(COLUMNS), *kept]) + "\n")


def save_pictures(folder: Path, model: VQVAE, data: Dataset, step: int):
    title = f"{data.name}, step {step:,}"
    x = to_pixels(data.test_images[:RECON_IMAGES], model.mean.device)
    model.eval()
    with torch.inference_mode():
        x_recon = model(x).x_recon.clamp(0, 1)
    model.train()
    figures.save_reconstructions(folder / f"recon_{step:06d}.png", x, x_recon, title)
    figures.save_curves(folder / "curves.png", folder / "metrics.csv", title)


def finish(folder: Path, args: argparse.Namespace, model: VQVAE, data: Dataset, progress: dict, began: float) -> dict:
    """Measure the model on all test images, draw its codebook, and write summary.json."""
    measured, counts = evaluate(model, data.test_images)
    title = f"{data.name}, step {progress['step']:,}"
    with torch.inference_mode():
        z_e = model.z_e(to_pixels(data.test_images[:CODEBOOK_IMAGES], model.mean.device))
    figures.save_codebook(folder / "codebook.png", model.quantizer.codebook.detach(), counts, z_e, title)
    progress["seconds"] = time.perf_counter() - began
    rate = progress["step"] * args.batch_size / progress["seconds"]
    summary = {"dataset": data.name, "steps": progress["step"], "seconds": progress["seconds"]}
    summary |= {"images_per_second": rate, **measured, "arguments": vars(args)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return measured


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device):
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


def catch_signals() -> list[int]:
    """Return a list that SIGINT and SIGTERM will be added to; a second one ends the process at once."""
    received = []

    def remember(signum, _frame):
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, remember)
    return received


if __name__ == "__main__":
    main(parse_args())
