"""Train a VQ-VAE on images: `python train.py`.

Source: VQ-VAE, arXiv 1711.00937; with two levels of codes, VQ-VAE-2, arXiv 1906.00446; with scales, VAR, 2404.02905.
"""

import argparse

from harness import figures
from harness.cli import make_parser, number, say, user_errors
from harness.data import Dataset, add_data_flags, first_images, load_training_data, random_flip, to_pixels
from harness.machine import check_memory
from harness.run import Means, Run, add_run_flags, parse_run_args
from harness.storage import CHECKPOINT

import torch
from torch import Tensor

from evaluate import evaluate, usage
from model import VQVAE, build_model, level_key
from muon import Muon
from quantizer import Quantized

CURVE_IMAGES = 1000  # the test-MSE curve uses at most this many test images; summary.json uses all


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Train a VQ-VAE; write pictures, metrics and a checkpoint to a folder.")
    switch, positive = argparse.BooleanOptionalAction, number(int, 1, 2**31)
    rate, share = number(float, 0, 1e30), number(float, 0, 1)
    parser.add_argument("--out-dir", default="results", help="folder for all output; a finished run in it is kept")
    add_data_flags(parser)

    group = parser.add_argument_group("model")
    group.add_argument("--codebook-size", type=positive, default=512, help="K, number of codes")
    group.add_argument("--code-dim", type=positive, default=8, help="D, size of a code")
    group.add_argument("--width", type=positive, default=64, help="channels of the convolutions")
    group.add_argument("--blocks", type=number(int, 1, 1000), default=2, help="residual blocks in encoder and decoder")
    group.add_argument("--levels", type=int, choices=(1, 2), default=1, help="levels of codes; 2: VQ-VAE-2")
    group.add_argument("--scales", help="sizes of the code maps, coarse to fine, such as 1,2,4,7; auto: powers of two")
    downsample = "pixels per code in each direction; default: 4 for images up to 64 pixels or with 2 levels, else 8"
    group.add_argument("--downsample", type=int, choices=(2, 4, 8, 16, 32), help=downsample)

    group = parser.add_argument_group("codebook")
    group.add_argument("--beta", type=rate, default=1.0, help="weight of the commitment loss")
    group.add_argument("--ema", action=switch, default=False, help="update the codes by EMA, not by a loss")
    decay = "EMA decay of the code counts, and with --ema of the codes"
    group.add_argument("--decay", type=share, default=0.99, help=decay)
    group.add_argument("--kmeans-start", action=switch, default=True, help="initialise the codes by k-means")
    revive = "revive codes used less often than this share of the mean count; 0: off"
    group.add_argument("--revive-below", type=share, default=0.03, help=revive)

    group = parser.add_argument_group("optimization")
    group.add_argument("--lr", type=rate, help="peak learning rate of encoder and decoder; default: 0.3 / sqrt(steps)")
    codebook_lr = "peak learning rate of the codes; default: 0.04, or 0.01 with two levels"
    group.add_argument("--codebook-lr", type=rate, help=codebook_lr)
    add_run_flags(parser, steps=7500, batch_size=48)
    return parse_run_args(parser, argv, CHECKPOINT)


def main(args: argparse.Namespace):
    # Set-up. A user's mistake ends here: one line, exit code 2, nothing lost.
    with user_errors():
        run = Run(args, CHECKPOINT)
        data = load_training_data(args, run.checkpoint)
        image_shape = data.train_images.shape[1:]  # (C, H, W)
        if args.downsample is None:
            args.downsample = 4 if args.levels > 1 or max(image_shape) <= 64 else 8
        if args.lr is None:  # Muon's updates all have the same size, so more steps need smaller ones
            args.lr = 0.3 * args.steps**-0.5
        if args.codebook_lr is None:  # a higher rate leaves many top-level codes unused
            args.codebook_lr = 0.04 if args.levels == 1 else 0.01
        check_memory(lambda: build_model(vars(args), image_shape), run.device)
        test_images = first_images(data.test_images, CURVE_IMAGES)
        run.begin(len(data.train_images), f"images of {data.name}", **data.identity())
        if run.rank == 0:
            data.write_listing(run.folder)

        # Model and optimizers: Muon for the convolutions, Adam for biases and codes; codes have their own learning rate
        torch.manual_seed(args.seed)
        model = build_model(vars(args), image_shape, mean=data.mean, std=data.std)
        model.to(run.device, memory_format=torch.channels_last)
        kernels, codebooks, biases = ([p for p in model.parameters() if p.ndim == n] for n in (4, 2, 1))
        muon = Muon([{"params": kernels, "peak_lr": args.lr}], torch.float32, weight_decay=0.0)
        groups = [{"params": biases, "peak_lr": args.lr}, {"params": codebooks, "peak_lr": args.codebook_lr}]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        means = Means()  # of the logged values, since the last logged row
        run.keep(model=model, muon=muon, optimizer=optimizer, means=means)  # saved and restored under these names
        forward = run.parallel(model)

    with run:
        if run.unreported:  # the checkpoint came before its report, which may be missing
            report(run, model, means, data, test_images)

        for step, images in run.steps(data.train_images):
            x = to_pixels(images, run.device)
            if args.flip:
                x = random_flip(x, args.batch_size, args.seed, step)
            with run.autocast():
                x_recon, quantized = forward(x)  # quantized: for each level, z_q, indices and losses

            # Objective: arXiv 1711.00937, equation 3, on normalised images
            recon_loss = ((x_recon - x) / model.std).square().mean()
            codebook_loss = sum(level.codebook_loss for level in quantized)
            commitment_loss = sum(level.commitment_loss for level in quantized)
            loss = recon_loss + codebook_loss + args.beta * commitment_loss

            # Update. DistributedDataParallel averages gradients over ranks; weight each by its share of the batch.
            share_of_peak = run.schedule(step)
            for group in muon.param_groups + optimizer.param_groups:
                group["lr"] = share_of_peak * group["peak_lr"]
            model.zero_grad()
            (loss * run.share(x) * run.world_size).backward()
            for level in model.levels:  # old momentum would drag revived codes away
                level.quantizer.reset_revived(optimizer)
            muon.step()
            optimizer.step()

            # Log and save. The checkpoint comes first, so that a failed measurement or picture loses no step.
            means.add(run.share(x), recon_loss=recon_loss, **named_values(model, quantized))
            if run.saves_at(step):
                run.save()
            if run.logs_at(step):
                report(run, model, means, data, test_images)


def named_values(model: VQVAE, quantized: list[Quantized]) -> dict[str, Tensor]:
    """Return the values to log for each level: its losses, and its counts (K,), as shares of the positions."""
    values = {}
    for name, level, codes in zip(model.level_names, model.levels, quantized):
        values[level_key("codebook_loss", name)] = codes.codebook_loss
        values[level_key("commitment_loss", name)] = codes.commitment_loss
        counts = level.quantizer.count(codes.indices)
        values[level_key("counts", name)] = counts / counts.sum()
    return values


def report(run: Run, model: VQVAE, means: Means, data: Dataset, test_images: Tensor):
    """Write a row of metrics.csv; when saving, also measure and draw; at the last step, also write the summary."""
    values = means.compute()
    means.reset()
    if run.rank > 0:
        return

    saving, title = run.saves_at(run.step), f"{data.name}, step {run.step:,}"
    row = {name: value.item() for name, value in values.items() if value.ndim == 0}
    for name in model.level_names:
        row |= usage(values[level_key("counts", name)], name)
    row["test_mse"] = evaluate(model, test_images)[0]["test_mse"] if saving else None
    run.log(row | {"dataset": run.args.dataset})

    if saving:
        picture = run.folder / f"recon_{run.step:06d}.png"
        figures.save_reconstructions(picture, model, test_images, title)
        figures.save_curves(run.folder / "curves.png", run.folder / "metrics.csv", title)
        run.log_picture("reconstructions", picture)

    if run.step == run.args.steps:
        measured, counts = evaluate(model, data.test_images)
        figures.save_codebooks(run.folder / "codebook.png", model, test_images, counts, title)
        summary = run.summarize(data.name, **measured)
        used = " + ".join(str(summary[level_key("codes_used", name)]) for name in model.level_names)
        say(
            f"{data.name}: test MSE {summary['test_mse']:.5f}, PSNR {summary['test_psnr']:.2f} dB, {used} of "
            f"{run.args.codebook_size} codes used, {summary['seconds']:.0f} s; see {run.folder}"
        )


if __name__ == "__main__":
    main(parse_args())
