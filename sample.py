"""Draw new images from a trained VQ-VAE and its prior: `python sample.py --run results`."""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import figures
from checkpoint import PRIOR, digest_of, load_checkpoint, load_model, writable_folder
from data import parts, to_pixels
from images import decode
from model import VQVAE
from prior import Prior, build_prior, generate
from process import command, number, pick_device, user_errors

PER_CLASS = 10
COMPLETIONS = 8  # of each image
TEMPERATURE, TOP_P, GUIDANCE = 1.0, 0.97, 1.35


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[VQVAE, Prior]:
    """Load the VQ-VAE and the best prior of a run's folder, in eval mode.

    Raises:
        ValueError: one of them is missing or damaged, or the prior is that of another VQ-VAE.
    """
    vqvae, trained = load_checkpoint(run), load_checkpoint(run, PRIOR)
    if trained["vqvae"] != digest_of(run):
        remedy = command("train_prior.py", "--run", run)
        raise ValueError(f"the prior in {run} is that of another VQ-VAE; train it anew: {remedy}")
    prior = build_prior(trained["args"], trained["shape"])
    prior.load_state_dict(trained["best"]["model"])
    return load_model(vqvae, device), prior.to(device).eval()


def sample(
    model: VQVAE, prior: Prior, num: int | None = None, classes: list[int] | None = None, seed: int = 0, **options
) -> Tensor:
    """Draw new images (num, C, H, W) uint8, as many of each class, one class after another.

    Args:
        num: by default 10 of each class, or 100 without classes.
        classes: by default all there are.
        options: temperature, top_k, top_p and guidance, of `prior.generate`.

    Raises:
        ValueError: the prior knows no such class.
    """
    return draw(model, prior, labels_of(prior, num, classes), seed, **options)


def labels_of(prior: Prior, num: int | None = None, classes: list[int] | None = None) -> Tensor:
    """Return the labels (num,) of images of these classes, as many of each as can be, one class after another."""
    wanted = list(range(max(1, prior.classes))) if classes is None else classes
    if classes is not None and not (wanted and 0 <= min(wanted) <= max(wanted) < prior.classes):
        raise ValueError(f"--classes {wanted}: the prior was trained on {prior.classes} classes, from 0 on")
    if num is None:
        num = PER_CLASS * (len(wanted) if prior.classes else PER_CLASS)
    return torch.tensor(wanted)[torch.arange(num) * len(wanted) // num]


@torch.inference_mode()
def draw(model: VQVAE, prior: Prior, labels: Tensor, seed: int = 0, given: Tensor | None = None, **options) -> Tensor:
    """Draw an image (N, C, H, W) uint8 for each label (N,), going on from the codes (N, t) given."""
    device = prior.level_at.device
    options = {"temperature": TEMPERATURE, "top_p": TOP_P, "guidance": GUIDANCE} | options
    was_training = prior.training
    prior.eval()
    generator = torch.Generator(device).manual_seed(seed)
    images = []
    order = parts(len(labels), model.image_size, most=500)
    for part in tqdm(order, "drawing", disable=None if len(order) > 1 else True):
        kept = None if given is None else given[part].to(device)
        codes = generate(prior, labels[part].to(device), given=kept, generator=generator, **options)
        levels = [codes.unflatten(1, grid) for codes, grid in zip(codes.split(prior.sizes, 1), prior.grids)]
        images.append((model.decode(levels) * 255).round().to(torch.uint8))
    prior.train(was_training)
    return torch.cat(images)


def read_images(files: list[str], model: VQVAE, image_size: int | None) -> Tensor:
    """Read images (N, C, H, W) uint8, prepared as those of the training."""
    wanted, images = (model.channels, *model.image_size), []
    for file in files:
        try:
            image = decode(Path(file), model.channels, image_size)
        except Exception as error:  # damaged files surface as almost any exception
            raise ValueError(f"{file} cannot be decoded ({' '.join(str(error).split())})") from error
        if tuple(image.shape) != wanted:
            size = "{2}x{1}".format(*image.shape)
            raise ValueError(
                f"{file} has {size} pixels, but the model was trained on {wanted[2]}x{wanted[1]}; resize it"
            )
        images.append(image)
    return torch.stack(images)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw new images from a run of train.py and train_prior.py.",
        usage=argparse.SUPPRESS,  # an error is then one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    positive, above_zero = number(int, 1, 2**31), number(float, 0, above=True)
    parser.add_argument("--run", default="results", help="folder of the run")
    parser.add_argument("--num", type=positive, help="images in all; by default 10 of each class")
    parser.add_argument("--classes", type=class_list, help="as 3,7, in order of their names, from 0; by default all")
    parser.add_argument("--temperature", type=above_zero, default=TEMPERATURE, help="below 1, likelier codes")
    parser.add_argument("--top-k", type=number(int, 0, 2**31), default=0, help="draw from so many codes; 0: all")
    parser.add_argument("--top-p", type=above_zero, default=TOP_P, help="draw from codes of this probability in all")
    parser.add_argument("--guidance", type=number(float, 0, 100), default=GUIDANCE, help="above 1, more typical")
    parser.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="the same seed draws the same images")
    parser.add_argument("--complete", nargs="+", metavar="FILE", help="images to go on from the first codes of")
    parser.add_argument("--keep", type=number(float, 0, 1), default=0.5, help="share of codes that --complete keeps")
    parser.add_argument("--out", metavar="DIR", help="also write each image to a file of its own in this folder")
    args = parser.parse_args(argv)
    if args.complete and (args.classes or args.num):
        parser.error("--complete goes on from images of any class, 8 times each; leave out --classes and --num")
    if args.top_p > 1:
        parser.error(f"--top-p {args.top_p}: must be at most 1, which is all codes")
    return args


def class_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be numbers of classes, such as 3,7") from None


def main(args: argparse.Namespace):
    with user_errors():
        device, _ = pick_device()
        model, prior = load_run(args.run, device)
        folder = writable_folder(args.run)
        out = writable_folder(args.out) if args.out else None
        if out and any(out.iterdir()):
            raise ValueError(f"--out {out} is not empty; name a new folder")
        options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "guidance", "seed")}
        if args.complete:
            originals = read_images(args.complete, model, load_checkpoint(folder)["args"]["image_size"]).to(device)
            codes = torch.cat([level.flatten(1) for level in model.encode(to_pixels(originals, device))], 1)
            kept = codes[:, : int(args.keep * prior.length)]
            labels = torch.full((COMPLETIONS * len(kept),), prior.classes)  # any class
            images = draw(model, prior, labels, given=kept.repeat_interleave(COMPLETIONS, 0), **options)
            rows = [torch.cat(row) for row in zip(originals.split(1), images.split(COMPLETIONS))]
            path = folder / "completed.png"
            title = f"originals, and completions from the first {kept.shape[1]} of their {prior.length} codes"
        else:
            labels = labels_of(prior, args.num, args.classes)
            images = draw(model, prior, labels, **options)
            of_classes = [images[labels == label] for label in dict.fromkeys(labels.tolist())]
            rows = of_classes if prior.classes else images.split(PER_CLASS)
            path, title = folder / "samples.png", "samples" + ", a row per class" * (prior.classes > 0)
        for i, image in enumerate(images if out else []):
            to_pil_image(image.cpu()).save(out / f"{i:05d}.png")  # grey images stay grey
        figures.save_samples(path, rows, title)
    print(f"wrote {path}" + (f" and {len(images):,} images in {out}" if out else ""))


if __name__ == "__main__":
    main(parse_args())
