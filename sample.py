"""Draw new images from a trained VQ-VAE and its prior: `python sample.py --run results`."""

import argparse
import csv
import functools
import itertools
import math
import sys
from pathlib import Path

from harness import figures
from harness.cli import command, make_parser, number, progress, say, user_errors
from harness.data import chunks
from harness.folder import read_images
from harness.machine import check_room, pick_device
from harness.run import eval_mode
from harness.storage import PRIOR, load_checkpoint, lock_folder, new_folder, writable_folder

import torch
from torch import Tensor

from model import VQVAE, load_model
from prior import Prior, generate, load_prior
from reconstruct import encode, render, write_images

IMAGES_PER_CLASS = 10
COMPLETIONS = 8  # per image
TEMPERATURE, TOP_P, GUIDANCE = 1.0, 0.97, 1.35


def trained_on(vqvae: dict) -> dict:
    """Return what a prior's checkpoint stores about the checkpoint of its VQ-VAE."""
    return {"vqvae": vqvae["digest"], "vqvae_step": vqvae["progress"]["step"]}


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[VQVAE, Prior]:
    """Load the VQ-VAE and the best prior of a run's folder, in eval mode.

    Raises:
        ValueError: one of them is missing or damaged, or the prior belongs to another VQ-VAE.
    """
    vqvae = load_checkpoint(run)
    model = load_model(vqvae, device)
    return model, matching_prior(run, vqvae, model)


def matching_prior(run: str | Path, vqvae: dict, model: VQVAE) -> Prior:
    """Load the best prior of a run's folder, and check that it belongs to this VQ-VAE."""
    trained = load_checkpoint(run, PRIOR)
    if trained["identity"]["vqvae"] != vqvae["digest"]:
        steps = trained["identity"]["vqvae_step"], vqvae["progress"]["step"]
        raise ValueError(
            f"the prior in {run} belongs to another VQ-VAE (step {steps[0]:,}) than the one in this folder (step "
            f"{steps[1]:,}); train it again: {command('train_prior.py', '--run', Path(run))}"
        )
    prior = load_prior(trained, model)
    names = vqvae["identity"]["class_names"]
    fits = prior.grids == model.grids(model.image_size) and prior.codebook_size == vqvae["args"]["codebook_size"]
    if not fits or (names and prior.classes != len(names)):
        raise ValueError(f"the prior in {run} does not fit the VQ-VAE's codes; train it again")
    return prior


def class_numbers(wanted: list[str], names: list[str] | None) -> list[int]:
    """Return the numbers of classes that are given by name or by number.

    Raises:
        ValueError: one is neither; the message lists the classes.
    """
    names = names or []
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    for text in wanted:
        if text not in numbers:
            known = f"the classes are {', '.join(names)}" if names else "the prior was trained without classes"
            raise ValueError(f"--classes: there is no class {text}; {known}")
    return [numbers[text] for text in wanted]


def sample(
    model: VQVAE, prior: Prior, num: int | None = None, classes: list[int] | None = None, seed: int = 0, **options
) -> Tensor:
    """Draw new images (num, C, H, W) uint8, split evenly over the classes, one class after another.

    Args:
        num: by default 10 of each class, or 100 without classes.
        classes: class numbers; by default all.
        options: temperature, top_k, top_p and guidance; see `prior.generate`.

    Raises:
        ValueError: the prior knows no such class.
    """
    return draw(model, prior, labels_of(prior, num, classes), seed, **options)


def labels_of(prior: Prior, num: int | None = None, classes: list[int] | None = None) -> Tensor:
    """Return labels (num,), split as evenly as possible over these classes, one class after another."""
    wanted = list(range(max(1, prior.classes))) if classes is None else classes
    if classes is not None and not (wanted and 0 <= min(wanted) <= max(wanted) < prior.classes):
        raise ValueError(f"--classes {wanted}: the prior has {prior.classes} classes, numbered from 0")
    if num is None:
        num = IMAGES_PER_CLASS * (len(wanted) if prior.classes else IMAGES_PER_CLASS)
    return torch.tensor(wanted)[torch.arange(num) * len(wanted) // num]


@torch.inference_mode()
def draw(model: VQVAE, prior: Prior, labels: Tensor, seed: int = 0, given: Tensor | None = None, **options) -> Tensor:
    """Draw an image (N, C, H, W) uint8 for each label (N,), continuing the codes `given` (N, t)."""
    return render(model, draw_codes(model, prior, labels, seed, given, **options))


def draw_codes(
    model: VQVAE, prior: Prior, labels: Tensor, seed: int = 0, given: Tensor | None = None, **options
) -> list[Tensor]:
    """Draw the codes of an image for each label, like `draw`: the indices (N, h, w) of each level or scale."""
    device = prior.level_at.device
    options = {"temperature": TEMPERATURE, "top_p": TOP_P, "guidance": GUIDANCE} | options
    options |= {"generator": torch.Generator(device).manual_seed(seed)}
    options |= {"progress": functools.partial(progress, what="drawing, steps")}
    codes, order = [], chunks(len(labels), model.image_size, most=500)
    with eval_mode(prior):
        for part in progress(order, "drawing, parts"):
            kept = None if given is None else given[part].to(device)
            codes.append(generate(prior, labels[part].to(device), given=kept, **options))
    levels = torch.cat(codes).split(prior.sizes, 1)
    return [level.unflatten(1, grid) for level, grid in zip(levels, prior.grids)]


def split_names(text: str) -> list[str]:
    """Split names at commas and line breaks outside of quotes; an argparse type."""
    try:
        lines = csv.reader(text.splitlines(), skipinitialspace=True)
        return [name for line in lines for name in line] or [text]
    except csv.Error as error:
        raise argparse.ArgumentTypeError(f"cannot be split into names ({error})") from error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Draw new images from a run of train.py and train_prior.py.")
    positive, above_zero = number(int, 1, 2**31), number(float, 0, above=True)
    parser.add_argument("--run", default="results", help="folder of the run")
    parser.add_argument("--num", type=positive, help="number of images; default: 10 per class, 100 without classes")
    classes = """names or numbers, such as cats,dogs or 3,7 or 'cats,"salt, pepper"'; default: all"""
    parser.add_argument("--classes", type=split_names, help=classes)
    parser.add_argument("--temperature", type=above_zero, default=TEMPERATURE, help="below 1, likelier codes")
    parser.add_argument("--top-k", type=number(int, 0, 2**31), default=0, help="likeliest codes to draw from; 0: all")
    top_p = "nucleus sampling: draw from the likeliest codes with this probability in total"
    parser.add_argument("--top-p", type=above_zero, default=TOP_P, help=top_p)
    guidance = "scale of classifier-free guidance; above 1, more typical of the class"
    parser.add_argument("--guidance", type=number(float, 0, 100), default=GUIDANCE, help=guidance)
    parser.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="the same seed draws the same images")
    parser.add_argument("--complete", nargs="+", metavar="FILE", help="images to complete from their first codes")
    keep = "share of codes that --complete keeps; with scales, rounded down to whole ones"
    parser.add_argument("--keep", type=number(float, 0, 1), default=0.5, help=keep)
    parser.add_argument("--out", metavar="DIR", help="also write each image as a separate file to this new folder")
    args = parser.parse_args(argv)
    if args.complete and (args.classes or args.num):
        parser.error("--complete completes each image 8 times, for any class; leave out --classes and --num")
    if args.top_p > 1:
        parser.error(f"--top-p {args.top_p}: must be at most 1, which is all codes")
    return args


def main(args: argparse.Namespace):
    with user_errors():
        checkpoint = load_checkpoint(args.run)
        model = load_model(checkpoint, pick_device()[0])
        prior = matching_prior(args.run, checkpoint, model)
        names = checkpoint["identity"]["class_names"]
        options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "guidance", "seed")}
        with lock_folder(writable_folder(args.run)), new_folder(args.out) as out:
            if args.complete:
                rows, images, title = complete(args, model, prior, checkpoint, options)
                pictures = {"completed.png": (rows, title)}
            else:
                pixels = model.channels * math.prod(model.image_size)
                size = (args.num or 0) * (8 + 8 * prior.length + pixels)  # bytes of labels, codes and pixels
                check_room(size, f"--num {args.num}", "draw fewer at a time")
                labels = labels_of(prior, args.num, class_numbers(args.classes, names) if args.classes else None)
                levels = draw_codes(model, prior, labels, **options)
                images = render(model, levels)
                shown = list(dict.fromkeys(labels.tolist()))
                rows = [images[labels == label] for label in shown] if prior.classes else images.split(IMAGES_PER_CLASS)
                row_names = [names[label] for label in shown] if prior.classes and names else ()
                title = "samples" + ", a row per class" * (prior.classes > 0)
                pictures = {"samples.png": (rows, title, row_names)}
                if model.scales:
                    pictures["samples_by_scale.png"] = samples_by_scale(model, levels)
            if out:
                write_images(out, [f"{i:05d}" for i in range(len(images))], images)
            drawn = [figures.save_samples(Path(args.run, name), *picture) for name, picture in pictures.items()]
    if args.out:
        say(f"wrote {len(images):,} images to {args.out}")
    for name, (rows, *_) in itertools.compress(pictures.items(), drawn):
        shown, count = sum(len(row[: figures.SAMPLES]) for row in rows[: figures.SAMPLES]), sum(map(len, rows))
        say(f"wrote {Path(args.run, name)}" + (f", with {shown} of {count:,} images" if shown < count else ""))
    if not all(drawn):
        sys.exit(1)


def samples_by_scale(model: VQVAE, levels: list[Tensor]) -> tuple[list[Tensor], str, list[str]]:
    """Return some of the samples, spread over the classes, decoded up to each scale: rows, a title and their names."""
    some = torch.linspace(0, len(levels[0]) - 1, min(IMAGES_PER_CLASS, len(levels[0]))).long()
    views = figures.views(model, [codes[some] for codes in levels])
    rows = [render(model, indices) for indices in views.values()]
    return rows, "the same samples, coarse to fine", list(views)


def complete(
    args: argparse.Namespace, model: VQVAE, prior: Prior, checkpoint: dict, options: dict
) -> tuple[list[Tensor], Tensor, str]:
    """Return rows of an original and its completions, the completions alone, and a title."""
    background = checkpoint["args"]["background"]
    originals, _ = read_images(list(map(Path, args.complete)), model.channels, model.image_size, background)
    originals = torch.stack(originals)
    codes = torch.cat([level.flatten(1) for level in encode(model, originals)], 1)
    kept = codes[:, : prior.whole_steps(int(args.keep * prior.length))]
    labels = torch.full((COMPLETIONS * len(kept),), prior.classes)  # any class
    images = draw(model, prior, labels, given=kept.repeat_interleave(COMPLETIONS, 0), **options)
    rows = [torch.cat(row) for row in zip(originals.split(1), images.split(COMPLETIONS))]
    return rows, images, f"originals, and completions from the first {kept.shape[1]} of their {prior.length} codes"


if __name__ == "__main__":
    main(parse_args())
