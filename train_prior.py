"""Train a prior over the codes of a trained VQ-VAE; sample.py draws new images from it: `python train_prior.py`.

The VQ-VAE is frozen, and its training images are encoded once. The reported loss is the cross-entropy per code, in
nats, given the codes drawn before it.

Source: prior over the codes, arXiv 1711.00937, section 3.3; scale by scale, arXiv 2404.02905, section 3.2.
"""

import argparse
import contextlib
import math
from pathlib import Path

from harness import figures
from harness.cli import abbreviate, command, make_parser, number, progress, say, user_errors
from harness.data import Dataset, dataset_of
from harness.machine import check_memory, from_rank_0
from harness.run import Means, Run, add_run_flags, eval_mode, parse_run_args
from harness.storage import PRIOR, Damaged, load_checkpoint, read_state, write_state

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import VQVAE, load_model
from muon import Muon
from prior import Prior, build_prior, load_prior
from reconstruct import encode
from sample import sample, trained_on

HELD_OUT_SHARE = 0.05  # share of the training images held out to choose the best prior
DROPPED_LABELS = 0.1  # share of the labels dropped in training, for classifier-free guidance
CODES = "codes.pt"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Train a prior over the codes of a run of train.py; save it in the run's folder.")
    positive, rate = number(int, 1, 2**31), number(float, 0, 1e30)
    parser.add_argument("--run", default="results", help="folder of the run of train.py")
    parser.add_argument("--data-dir", help="folder of the data set, if it has moved; named sets are downloaded to it")
    group = parser.add_argument_group("model")
    group.add_argument("--width", type=positive, default=192, help="channels of the transformer")
    group.add_argument("--depth", type=number(int, 1, 1000), default=4, help="blocks of the transformer")
    group.add_argument("--heads", type=positive, default=6, help="attention heads; they must divide --width")
    group.add_argument("--dropout", type=number(float, 0, 1), default=0.0, help="share of channels dropped")
    group = parser.add_argument_group("optimization")
    group.add_argument("--lr", type=rate, default=1e-2, help="peak learning rate of the blocks' matrices (Muon)")
    group.add_argument("--embedding-lr", type=rate, default=6e-3, help="peak learning rate of all others (AdamW)")
    group.add_argument("--weight-decay", type=rate, default=0.1, help="decoupled weight decay")
    add_run_flags(parser, steps=3000, batch_size=64)
    args = parse_run_args(parser, argv, PRIOR)
    if args.width % args.heads:
        parser.error(f"--width {args.width} must be a multiple of --heads, {args.heads}")
    return args


def main(args: argparse.Namespace):
    # Set-up. A user's mistake ends here: one line, exit code 2, nothing lost.
    with user_errors():
        load_checkpoint(args.run)  # if it names no run, make no folder
        run = Run(args, PRIOR)
        vqvae = load_checkpoint(args.run)  # again, now that the folder is locked
        model = load_model(vqvae, run.device)
        codes = load_codes(run, model, vqvae)
        train, codes["held_out"] = held_out_split(codes["train"])
        if not len(train):
            raise ValueError("a prior needs at least 2 training images, since it holds out one; the run has 1")
        seen = set(train[:, 0].tolist())
        unseen = [name for i, name in enumerate(codes["class_names"]) if i not in seen]
        if unseen and run.rank == 0:
            say(f"no training images of {abbreviate(unseen)}, which the prior cannot learn to draw", error=True)
        shape = {
            "codebook_size": vqvae["args"]["codebook_size"],
            "grids": codes["grids"],
            "classes": len(codes["class_names"]),
        }
        check_memory(lambda: build_prior(vars(args), shape, model), run.device)
        run.begin(len(train), f"images of {codes['dataset']} as codes", **trained_on(vqvae), shape=shape)
        if run.checkpoint:
            load_prior(run.checkpoint, model)  # raises if its best weights do not fit, which `keep` would not notice

        # Model and optimizers: with Muon, the blocks' matrices learn in a third of the steps that AdamW needs
        torch.manual_seed(args.seed)
        prior = build_prior(vars(args), shape, model).to(run.device).train()
        prior.init_from_codebooks(model.codebooks())
        matrices = {name: p for name, p in prior.named_parameters() if name.startswith("blocks") and p.ndim == 2}
        others = [p for name, p in prior.named_parameters() if name not in matrices]
        decay, dtype = args.weight_decay, getattr(torch, args.precision)
        muon = Muon([{"params": matrices.values(), "peak_lr": args.lr}], dtype, weight_decay=decay)
        groups = [{"params": others, "peak_lr": args.embedding_lr}]
        adamw = torch.optim.AdamW(groups, weight_decay=decay, betas=(0.9, 0.95), fused=True)
        best = {"held_out_nats": math.inf, "step": 0, "model": prior.state_dict()}  # the weights that `sample.py` loads
        means = Means()  # of the logged values, since the last logged row
        run.keep(model=prior, muon=muon, adamw=adamw, best=best, means=means)  # saved and restored under these names
        forward = run.parallel(prior)

    with run:
        if run.unreported:  # the checkpoint came before its report, which may be missing
            report(run, model, prior, best, means, codes)

        for step, batch in run.steps(train):
            labels, targets = batch[:, 0], batch[:, 1:]
            dropped = run.shard(torch.rand(args.batch_size, device=run.device)) < DROPPED_LABELS
            labels = labels.masked_fill(dropped, prior.classes)
            with run.autocast():
                logits = forward(targets, labels)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

            # Update. DistributedDataParallel averages gradients over ranks; weight each by its share of the batch.
            share_of_peak = run.schedule(step)
            for group in muon.param_groups + adamw.param_groups:
                group["lr"] = share_of_peak * group["peak_lr"]
            prior.zero_grad()
            (loss * run.share(batch) * run.world_size).backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            muon.step()
            adamw.step()

            # Log and save. The checkpoint comes first, so that a failed measurement or picture loses no step.
            means.add(run.share(batch), train_nats=loss)
            if run.saves_at(step):
                run.save()
            if run.logs_at(step):
                report(run, model, prior, best, means, codes)


def report(run: Run, model: VQVAE, prior: Prior, best: dict, means: Means, codes: dict):
    """Write a row of prior_metrics.csv; when saving, also keep the best prior and draw; at the last step, summarize."""
    train_nats = means.compute()["train_nats"].item()
    if not run.saves_at(run.step):
        means.reset()
        run.log({"train_nats": train_nats, "held_out_nats": None})
        return

    if run.rank == 0:
        held_out_nats = nats(prior, codes["held_out"])
        if held_out_nats < best["held_out_nats"]:
            weights = {name: value.detach().cpu().clone() for name, value in prior.state_dict().items()}
            best.update(held_out_nats=held_out_nats, step=run.step, model=weights)
    run.save()  # again, with the best prior; before the log, so that a restart repeats this report
    means.reset()
    if run.rank == 0:
        run.log({"train_nats": train_nats, "held_out_nats": held_out_nats})
        draw(run, model, prior, best["step"], codes)
        if run.step == run.args.steps:
            summarize(run, prior, best, codes)


def draw(run: Run, model: VQVAE, prior: Prior, best_step: int, codes: dict):
    figures.save_prior_curves(run.folder / "prior_curves.png", run.folder / "prior_metrics.csv", best_step)
    classes = list(range(min(10, prior.classes))) or None
    samples = sample(model, prior, classes=classes, seed=run.args.seed).split(10)
    picture = run.folder / f"samples_{run.step:06d}.png"
    title = f"{codes['dataset']}, prior at step {run.step:,}"
    figures.save_samples(picture, samples, title, codes["class_names"][:10])
    run.log_picture("samples", picture)


def load_codes(run: Run, model: VQVAE, vqvae: dict) -> dict:
    """Read the codes of a VQ-VAE's data set, which rank 0 encodes and writes if they are not there.

    Returns:
        train, test: (N, 1 + T) int64: each image's label (0 without labels), then its codes.
        grids: (h, w) of each level or scale; class_names: empty without labels; dataset: its name.
        key: the checkpoint's digest.
    """
    path, codes = run.folder / CODES, None
    if run.rank == 0 and (codes := kept_codes(path, vqvae, model)) is None:
        # With --resume, data_dir comes from a file: do not download to it.
        download = run.args.data_dir is not None and run.args.resume is None
        data = dataset_of(vqvae, run.folder, run.args.data_dir, download)
        codes = encode_dataset(data, model, vqvae)
        write_state(path, codes)
    from_rank_0()  # the others wait for it
    if run.rank > 0 and (codes := kept_codes(path, vqvae, model)) is None:
        raise ValueError(f"{path} does not hold the codes that rank 0 wrote; all processes must share one folder")
    return codes


def encode_dataset(data: Dataset, model: VQVAE, vqvae: dict) -> dict:
    """Encode all images of a data set; see `load_codes`."""
    codes = {"key": vqvae["digest"], "dataset": data.name, "class_names": data.class_names or []}
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        indices = encode(model, images, f"encoding {split}")
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        codes[split] = torch.cat([labels[:, None], *(level.flatten(1) for level in indices)], 1)
    return codes | {"grids": model.grids(model.image_size)}


def kept_codes(path: Path, vqvae: dict, model: VQVAE) -> dict | None:
    """Return the codes in a file, or None if it is missing or damaged, or does not fit this checkpoint."""
    with contextlib.suppress(Damaged):
        codes, _ = read_state(path)
        return codes if fits(codes, vqvae, model) else None
    return None


def fits(codes: dict, vqvae: dict, model: VQVAE) -> bool:
    """Return whether codes from a file fit this checkpoint."""
    with contextlib.suppress(Exception):  # a mismatch can raise almost any exception
        names, shape = vqvae["identity"]["class_names"] or [], vqvae["identity"]["image_shape"]
        grids = model.grids(shape[1:])
        good = codes["key"] == vqvae["digest"] and codes["grids"] == grids and codes["class_names"] == names
        for rows in (codes["train"], codes["test"]):
            good &= rows.dtype == torch.int64 and rows.min() >= 0
            good &= rows.shape[1:] == (1 + sum(map(math.prod, grids)),)
            good &= rows[:, 0].max() < max(1, len(names)) and rows[:, 1:].max() < vqvae["args"]["codebook_size"]
        return bool(good) and isinstance(codes["dataset"], str)
    return False


def held_out_split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows into training and held-out rows; the split is always the same."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
    share = max(1, int(HELD_OUT_SHARE * len(rows)))
    return rows[order[share:]], rows[order[:share]]


def nats(prior: Prior, rows: Tensor, any_class: bool = False) -> float:
    """Return the cross-entropy per code, in nats and float32, of rows (N, 1 + T): a label, then the codes."""
    total = 0.0
    with eval_mode(prior):
        for batch in progress(rows.to(prior.level_at.device).split(50), "measuring the prior"):
            labels, codes = batch[:, 0], batch[:, 1:]
            logits = prior(codes, torch.full_like(labels, prior.classes) if any_class else labels)
            total += F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum").item()
    return total / rows[:, 1:].numel()


def summarize(run: Run, prior: Prior, best: dict, codes: dict):
    """Measure the best prior on the test images, and write the summary."""
    prior.load_state_dict(best["model"])
    measured = {"held_out_nats_per_code_given_class": best["held_out_nats"]}
    measured["test_nats_per_code_given_class"] = nats(prior, codes["test"])
    measured["test_nats_per_code"] = nats(prior, codes["test"], any_class=True)

    nats_per_image = measured["test_nats_per_code"] * prior.length
    bits_per_image = nats_per_image / math.log(2)
    measured |= {"test_nats_per_image": nats_per_image, "test_bits_per_image": bits_per_image}
    run.summarize(codes["dataset"], best_step=best["step"], **measured)
    say(
        f"{codes['dataset']}: {measured['test_nats_per_code']:.3f} nats per code on test images, without their class, "
        f"{bits_per_image:.0f} bits per image; to draw new images: {command('sample.py', '--run', run.folder)}"
    )


if __name__ == "__main__":
    main(parse_args())
