"""Train a prior over the codes of a trained VQ-VAE, from which new images are drawn: `python train_prior.py`.

The VQ-VAE stays as it is; the training images are encoded once. What is reported is the cross-entropy of the codes in
nats, that is, how many a code costs when it is predicted from those before it.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import figures
from checkpoint import (
    IMAGE_CACHE,
    PRIOR,
    PRIOR_FILES,
    Damaged,
    digest_of,
    load_checkpoint,
    load_model,
    prepare_folder,
    random_state,
    read_file,
    resume_command,
    run_errors,
    save_checkpoint,
    set_random_state,
    trim_metrics,
    writable_folder,
    write_whole,
)
from data import batches, dataset_of, parts, to_pixels
from loop import add_run_flags, check_batch_size, parse_run, train_loop, wrapped
from model import VQVAE
from prior import Prior, build_prior
from process import (
    agree,
    catch_signals,
    check_memory,
    command,
    from_rank_0,
    join_processes,
    number,
    pick_device,
    user_errors,
)
from sample import sample

COLUMNS = ("step", "train_nats", "held_out_nats")
HELD_OUT = 0.05  # share of the training images that choose the best prior
NO_CLASS = 0.1  # share of the training images whose class is hidden
CODES = "codes.pt"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a prior over the codes of a run of train.py, and leave it in the run's folder.",
        usage=argparse.SUPPRESS,  # an error is then one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    positive, rate = number(int, 1, 2**31), number(float, 0)
    parser.add_argument("--run", default="results", help="folder of the run of train.py")
    parser.add_argument("--data-dir", help="folder of the data set, if it is not where it was for training")
    group = parser.add_argument_group("model")
    group.add_argument("--width", type=positive, default=256, help="of the transformer")
    group.add_argument("--depth", type=number(int, 1, 1000), default=4, help="blocks of the transformer")
    group.add_argument("--heads", type=positive, default=2, help="attention heads; they divide the width")
    group.add_argument("--dropout", type=number(float, 0, 1), default=0.1, help="share of channels dropped in training")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=rate, default=1e-2, help="highest learning rate of the blocks' matrices (Muon)")
    group.add_argument("--embedding-lr", type=rate, default=6e-3, help="highest learning rate of all else (AdamW)")
    group.add_argument("--weight-decay", type=rate, default=0.1, help="share of the learning rate that weights lose")
    add_run_flags(parser, steps=4200, batch_size=64, what="a run with a prior")
    args = parse_run(parser, argv, folder_flag="run", name=PRIOR)
    if args.width % args.heads:
        parser.error(f"--width {args.width} must be a multiple of --heads, {args.heads}")
    return args


def main(args: argparse.Namespace):
    with user_errors():
        vqvae = load_checkpoint(args.run)
        folder = writable_folder(args.run)
        device, args.precision = pick_device(args.device, args.precision, args.compile)
        rank, ranks = join_processes(device)
        agree(args.resume, "--resume")
        checkpoint = load_checkpoint(folder, PRIOR) if args.resume is not None else None
        if checkpoint and checkpoint["vqvae"] != digest_of(folder):
            raise ValueError(f"the prior in {folder} is that of another VQ-VAE; train it anew, without --resume")
        model = load_model(vqvae, device)
        if rank > 0:
            from_rank_0(None)  # rank 0 encodes, the others then read what it has written
        codes = load_codes(folder, model, vqvae, args.data_dir)
        if rank == 0:
            from_rank_0(None)
        train, held_out = held_out_split(codes["train"])
        check_batch_size(args.batch_size, len(train))
        shape = {"codebook_size": vqvae["args"]["codebook_size"], "grids": codes["grids"], "classes": codes["classes"]}
        check_memory(lambda: build_prior(vars(args), shape), device)
        signals = catch_signals()
        if rank == 0 and not checkpoint:
            prepare_folder(folder, PRIOR_FILES)
    torch.manual_seed(args.seed)
    prior = build_prior(vars(args), shape).to(device).train()
    if not checkpoint:
        prior.start_from([level.quantizer.codebook for level in model.levels])
    # Muon's orthogonal updates bring the blocks as far in a third of the steps that AdamW needs.
    matrices = [p for p in prior.blocks.parameters() if p.ndim == 2]
    others = [p for p in prior.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True),
    ]
    progress = {"step": 0, "seconds": 0.0, "logged": 0, "sums": torch.zeros(1)}
    best = {"held_out_nats": math.inf, "step": 0, "model": prior.state_dict()}
    if checkpoint:
        prior.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizer"]):
            optimizer.load_state_dict(state)
        set_random_state(checkpoint["random"], device)
        progress, best = checkpoint["progress"], checkpoint["best"]
    progress["sums"] = progress["sums"].to(device)
    forward = wrapped(prior, args, device)
    attention = contextlib.nullcontext
    if device.type == "cpu" and args.precision == "bfloat16":  # where the fused kernel takes four times as long
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name on any device
        attention = functools.partial(sdpa_kernel, SDPBackend.MATH)
    if rank == 0:
        where = f"{device.type} in {args.precision}" + (f", {ranks} processes" if ranks > 1 else "")
        print(f"training on {len(train):,} images' {prior.length} codes each, on {where}", flush=True)

    def update(batch: Tensor) -> Tensor:
        labels, targets = batch[:, 0], batch[:, 1:]
        hidden = torch.rand(args.batch_size, device=device).tensor_split(ranks)[rank] < NO_CLASS
        labels = labels.where(~hidden, prior.classes)
        prior.zero_grad()
        with attention(), torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
            logits = forward(targets, labels)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        share = len(batch) / args.batch_size  # 1, or what of the batch is on this rank
        (loss * (share * ranks)).backward()  # DistributedDataParallel then averages over the ranks
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach().view(1) * share

    def log(saving: bool) -> str:
        step, began = progress["step"], time.perf_counter()
        train_nats = progress["sums"].item() / (step - progress["logged"])
        held_out_nats = nats(prior, held_out) if saving else None
        with open(folder / "prior_metrics.csv", "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([step, train_nats, held_out_nats])
        if not saving:
            return f"{train_nats:.4f} nats per code"
        if held_out_nats < best["held_out_nats"]:
            weights = {name: value.detach().cpu().clone() for name, value in prior.state_dict().items()}
            best.update(held_out_nats=held_out_nats, step=step, model=weights)
        figures.save_prior_curves(folder / "prior_curves.png", folder / "prior_metrics.csv", best["step"])
        title = f"{codes['dataset']}, prior at step {step:,}"
        shown = list(range(min(10, prior.classes))) or None
        samples = sample(model, prior, classes=shown, seed=args.seed).split(10)
        figures.save_samples(folder / f"samples_{step:06d}.png", samples, title)
        if step == args.steps:
            finish(folder, args, prior, best, codes, progress, began)
        return f"{train_nats:.4f} nats per code, {held_out_nats:.4f} held out"

    def save():
        state = {
            "model": prior.state_dict(),
            "optimizer": [o.state_dict() for o in optimizers],
            "random": random_state(device),
        }
        state |= {"args": vars(args), "shape": shape, "best": best, "vqvae": codes["key"], "progress": progress}
        save_checkpoint(folder, state, PRIOR)

    rates = {"--lr": args.lr, "--embedding-lr": args.embedding_lr}
    with run_errors(folder, progress, rates, PRIOR):
        if rank == 0:
            trim_metrics(folder / "prior_metrics.csv", COLUMNS, progress["step"])
        resume = resume_command(folder, PRIOR)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        highest = list(zip(groups, rates.values()))
        train_loop(args, resume, progress, highest, signals, train, device, update, log, save)
    if rank == 0:
        summary = json.loads((folder / "prior_summary.json").read_text())
        draw = command("sample.py", "--run", folder)
        print(
            f"{codes['dataset']}: {summary['test_nats_per_code']:.3f} nats per code of a test image without its class, "
            f"{summary['test_bits_per_image']:.0f} bits in all; to draw new ones: {draw}"
        )


def load_codes(folder: Path, model: VQVAE, vqvae: dict, data_dir: str | None) -> dict:
    """Encode a run's data set, or read what an earlier call wrote for the same checkpoint.

    Returns:
        train, test: (N, 1 + T) int64, each image's label, 0 without labels, and its codes.
        grids: (h, w) of each level; classes: how many; dataset: its name; key: the checkpoint's digest.
    """
    key = digest_of(folder)
    if (folder / CODES).is_file():
        try:
            codes = read_file(folder / CODES)
            if codes["key"] == key:
                return codes
        except (Damaged, KeyError, TypeError):
            pass
    data = dataset_of(vqvae, data_dir, folder / IMAGE_CACHE)
    codes = {"key": key, "dataset": data.name, "classes": 0}
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        order = parts(len(images), images.shape[-2:])
        rows = []
        for batch in tqdm(batches(images, order, model.mean.device), f"encoding {split}", len(order), disable=None):
            indices = model.encode(to_pixels(batch, model.mean.device))
            rows.append(torch.cat([level.flatten(1) for level in indices], 1).cpu())
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        codes[split] = torch.cat([labels[:, None], torch.cat(rows)], 1)
        codes["classes"] = max(codes["classes"], 0 if data.train_labels is None else int(labels.max()) + 1)
    codes["grids"] = [tuple(level.shape[1:]) for level in indices]
    content = io.BytesIO()
    torch.save(codes, content)
    write_whole(folder / CODES, content.getbuffer())
    return codes


def held_out_split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split off a share of the training images, always the same."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    share = max(1, int(HELD_OUT * len(rows)))
    return rows[order[share:]], rows[order[:share]]


@torch.inference_mode()
def nats(prior: Prior, rows: Tensor, any_class: bool = False) -> float:
    """Return the cross-entropy per code, in nats, of rows (N, 1 + T) of labels and codes, in float32."""
    was_training = prior.training
    prior.eval()
    total = 0.0
    for batch in rows.to(prior.level_at.device).split(50):
        labels, codes = batch[:, 0], batch[:, 1:]
        logits = prior(codes, torch.full_like(labels, prior.classes) if any_class else labels)
        total += F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum").item()
    prior.train(was_training)
    return total / rows[:, 1:].numel()


def finish(folder: Path, args: argparse.Namespace, prior: Prior, best: dict, codes: dict, progress: dict, began: float):
    """Measure the best prior on the test images, and write the summary; the clock stood at `began`."""
    latest = {name: value.clone() for name, value in prior.state_dict().items()}
    prior.load_state_dict(best["model"])
    measured = {"held_out_nats_per_code_given_class": best["held_out_nats"]}
    measured["test_nats_per_code_given_class"] = nats(prior, codes["test"])
    measured["test_nats_per_code"] = nats(prior, codes["test"], any_class=True)
    nats_per_image = measured["test_nats_per_code"] * prior.length
    prior.load_state_dict(latest)
    seconds = progress["seconds"] + time.perf_counter() - began
    summary = {"dataset": codes["dataset"], "steps": progress["step"], "best_step": best["step"]}
    summary |= {"seconds": seconds, **measured, "test_nats_per_image": nats_per_image}
    summary |= {"test_bits_per_image": nats_per_image / math.log(2), "arguments": vars(args)}
    write_whole(folder / "prior_summary.json", (json.dumps(summary, indent=2) + "\n").encode())


if __name__ == "__main__":
    main(parse_args())
