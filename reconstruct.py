"""Reconstruct images with a VQ-VAE: images -> codes -> images, `python reconstruct.py --run results a.png b.png`."""

import argparse
import math
import operator
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, product
from pathlib import Path

from harness import figures
from harness.cli import make_parser, number, printable, progress, say, user_errors
from harness.data import batches, chunks, dataset_of, first_images, to_pixels, to_uint8
from harness.folder import Images, read_images, walk
from harness.machine import check_room, pick_device
from harness.storage import load_checkpoint, lock_folder, new_folder, writable_folder

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from model import VQVAE, level_key, load_model

SHOWN = 10  # images in reconstructed.png; --out writes all
TEST_IMAGES = 8  # test images, if no files are named
LONGEST_FILE_NAME = 255  # bytes: the limit of most file systems
LONGEST_NAME = 240  # bytes: leaves room for a number and .png


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Encode images with a run of train.py, and reconstruct them from their codes.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="images or folders; default: some test images")
    parser.add_argument("--run", default="results", help="folder of the run")
    parser.add_argument("--data-dir", help="folder of the data set, if it has moved; named sets are downloaded to it")
    parser.add_argument(
        "--full-size", action="store_true", help="encode images at their own size; do not resize to the training size"
    )
    parser.add_argument(
        "--refine", type=number(int, 2, 2**31), metavar="N", help="search for better codes: try N at each position"
    )
    parser.add_argument("--codes", metavar="NPZ", help="decode the codes.npz of an earlier --out, in place of images")
    parser.add_argument("--out", metavar="DIR", help="new folder for originals/, reconstructions/ and codes.npz")
    args = parser.parse_args(argv)
    if args.codes and (args.files or args.full_size or args.refine):
        parser.error("--codes replaces the images; leave out the files, --full-size and --refine")
    if args.full_size and not args.files:
        parser.error("--full-size needs image files; test images are as in training")
    if args.codes and not args.out:
        parser.error("--codes needs --out, the folder to write the images to")
    return args


def main(args: argparse.Namespace):
    with user_errors():
        checkpoint = load_checkpoint(args.run)
        model = load_model(checkpoint, pick_device()[0])
        if args.codes:
            names, levels, size = read_codes(Path(args.codes), model, checkpoint)
            with new_folder(args.out) as out:
                for chunk in progress(chunks(len(names), size), "writing, parts"):
                    made = render(model, [level[chunk] for level in levels], size)
                    write_images(out / "reconstructions", [names[i] for i in chunk], made)
        else:
            with lock_folder(writable_folder(args.run)):
                with new_folder(args.out) as out:
                    names, images = load_images(args, checkpoint, model)
                    indices, recon = reconstruct(model, images[:SHOWN], args.refine)
                    if out:
                        write_reconstructions(out, model, torch.stack(images), checkpoint, names, args.refine)
                path = free_name(Path(args.run, "reconstructed.png"))
                title = f"{printable(checkpoint['args']['dataset'])}, step {checkpoint['progress']['step']:,}"
                drawn = figures.save_codes(path, model, names[:SHOWN], images[:SHOWN], indices, recon, title)
    if args.out:
        say(f"wrote {len(names):,} images to {args.out}")
    if not args.codes:
        if not drawn:
            sys.exit(1)
        say(f"wrote {path}" + (f", with the first {SHOWN} of {len(names)} images" if len(names) > SHOWN else ""))


def load_images(args: argparse.Namespace, checkpoint: dict, model: VQVAE) -> tuple[list[str], list[Tensor]]:
    """Return the names and the images (C, H, W) uint8, resized and cropped as in training unless --full-size.

    Without --out, only the images that the picture shows are read.
    """
    if not args.files:
        images = first_images(dataset_of(checkpoint, Path(args.run), args.data_dir).test_images, TEST_IMAGES)
        return [f"test {i}" for i in range(len(images))], list(images)
    paths = []
    for file in map(Path, args.files):
        paths += walk(file) if file.is_dir() else [file]
    size, read = None if args.full_size else model.image_size, paths if args.out else paths[:SHOWN]
    if size:
        needed = len(read) * model.channels * math.prod(size)
        check_room(needed, f"reading {len(read):,} images", "name fewer at a time")
    images, resized = read_images(read, model.channels, size, checkpoint["args"]["background"])
    if args.full_size:
        # Most memory goes to three float32 maps at half the height and width: 3 x 4 bytes / 4 per pixel and channel.
        bytes_per_pixel = 3 * model.levels[-1].encoder[1].out_channels
        largest = max(image.shape[-2:].numel() for image in images)
        remedy = "leave out --full-size, or make it smaller"
        check_room(bytes_per_pixel * largest, f"the largest image, of {largest:,} pixels,", remedy, model.mean.device)
    if resized:
        height, width = model.image_size
        remedy = "" if model.scales else "; --full-size leaves them whole"
        say(f"resized and cropped {resized} of {len(images)} images to {width}x{height}{remedy}")
    if args.out and len({image.shape for image in images}) > 1:
        raise ValueError("the images differ in size, but codes.npz needs one; leave out --full-size or --out")
    return unique_names(paths), images


@torch.inference_mode()
def reconstruct(
    model: VQVAE, images: list[Tensor], candidates: int | None = None
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return each image's indices, (h, w) of each level, and its reconstruction (C, H, W) in [0, 1], on the CPU.

    With `candidates`, `refine` chooses the indices.
    """
    indices, recon = [], []
    order = list(same_size_chunks(images))
    for chunk in progress(order, "reconstructing"):
        x = to_pixels(torch.stack([images[i] for i in chunk]), model.mean.device)
        levels = model.encode(x)
        if candidates:
            levels = refine(model, x, levels, candidates)
        recon += model.decode(levels, x.shape[-2:]).cpu()
        indices += zip(*(level.cpu() for level in levels))
    return indices, recon


@torch.inference_mode()
def encode(model: VQVAE, images: Images, what: str = "encoding") -> list[Tensor]:
    """Encode images (N, C, H, W) uint8 in chunks; return the indices (N, h, w) of each level or scale, on the CPU."""
    order, device, parts = chunks(len(images), images.shape[-2:]), model.mean.device, []
    for batch in progress(batches(images, order, device), what, len(order)):
        parts.append([level.cpu() for level in model.encode(to_pixels(batch, device))])
    return [torch.cat(level) for level in zip(*parts)]


@torch.inference_mode()
def render(model: VQVAE, levels: list[Tensor | None], size: Sequence[int] | None = None) -> Tensor:
    """Decode indices (N, h, w) in chunks; return images (N, C, H, W) uint8 on the CPU. See `VQVAE.decode`."""
    count = next(len(level) for level in levels if level is not None)
    images = []
    for chunk in progress(chunks(count, size or model.image_size, most=500), "decoding"):
        indices = [None if level is None else level[chunk].to(model.mean.device) for level in levels]
        images.append(to_uint8(model.decode(indices, size)).cpu())
    return torch.cat(images)


@torch.inference_mode()
def refine(model: VQVAE, x: Tensor, indices: list[Tensor], candidates: int) -> list[Tensor]:
    """Search for codes that reconstruct the images x (B, C, H, W) with less error than the codes nearest to z_e.

    At each position of the last level, try the codes nearest to the chosen one, and keep the one with the smallest
    squared error. Positions so far apart that no pixel depends on two of them are searched together.

    Args:
        candidates: number of codes to try at each position, including the chosen one.
    """
    *above, codes = *indices[:-1], indices[-1].clone()
    codebook, stride, reach = model.levels[-1].quantizer.codebook, model.strides[-1], model.levels[-1].decoder.reach
    apart = 2 * reach + 1

    def errors(place, at):
        """Return the squared error of the pixels that each code in `at` can change, in the shape of `at`."""
        error = (model.decode([*above, codes], x.shape[-2:]) - x).square().sum(1, keepdim=True)
        top, left = ((reach - start) * stride for start in place)
        error = F.avg_pool2d(F.pad(error, (left, 0, top, 0)), apart * stride, ceil_mode=True, divisor_override=1)
        return error[:, 0, : at.shape[1], : at.shape[2]]

    places = [*product(*(range(min(apart, length)) for length in codes.shape[-2:]))]
    for place in progress(places, "refining"):
        at = codes[:, place[0] :: apart, place[1] :: apart]  # a view: writing to it changes the codes
        distances = torch.cdist(codebook[at].flatten(0, 2), codebook)
        tried = distances.topk(min(candidates, len(codebook)), largest=False).indices[:, 1:].unflatten(0, at.shape)
        best, least = at.clone(), errors(place, at)
        for candidate in tried.unbind(-1):
            at.copy_(candidate)
            error = errors(place, at)
            best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
        at.copy_(best)
    return [*above, codes]


def same_size_chunks(images: list[Tensor]) -> Iterator[list[int]]:
    """Yield the positions of consecutive images of equal size, few enough to be computed at once."""
    start = 0
    for size, group in groupby(image.shape[-2:] for image in images):
        count = len(list(group))
        for chunk in chunks(count, size):
            yield (start + chunk).tolist()
        start += count


# Files


def write_reconstructions(
    folder: Path,
    model: VQVAE,
    images: Images,
    checkpoint: dict,
    names: list[str] | None = None,
    candidates: int | None = None,
):
    """Write originals/NAME.png as the model sees them, reconstructions/NAME.png, and codes.npz."""
    names = names or [f"{i:05d}" for i in range(len(images))]
    order, indices = chunks(len(images), images.shape[-2:]), []
    stream = batches(images, order, torch.device("cpu"))
    for batch, chunk in zip(progress(stream, "writing, parts", len(order)), order):
        chunk_indices, recon = reconstruct(model, list(batch), candidates)
        write_images(folder / "originals", [names[i] for i in chunk], batch)
        write_images(folder / "reconstructions", [names[i] for i in chunk], recon)
        indices += chunk_indices
    write_codes(folder / "codes.npz", names, indices, images.shape[-2:], model, checkpoint)


def write_images(folder: Path, names: list[str], images: Iterable[Tensor]):
    """Write NAME.png for each image (C, H, W), uint8 or in [0, 1]."""
    folder.mkdir(exist_ok=True)
    for name, image in progress(zip(names, images), f"writing to {folder.name}", len(names)):
        image = to_uint8(image) if image.is_floating_point() else image
        to_pil_image(image.cpu()).save(folder / f"{name}.png")  # grey images stay grey


def write_codes(path: Path, names: list[str], indices: list, size: tuple, model: VQVAE, checkpoint: dict):
    """Write, readable with only numpy: the indices (N, h, w) of every level or scale, names, K, and bits per image."""
    levels = dict(zip((level_key("indices", name) for name in model.map_names), map(torch.stack, zip(*indices))))
    codebook_size = model.levels[0].quantizer.codebook_size
    bits = sum(level[0].numel() for level in levels.values()) * math.log2(codebook_size)
    arrays = {name: level.numpy().astype(np.int32) for name, level in levels.items()}
    facts = {"names": np.array(names), "codebook_size": codebook_size, "bits_per_image": bits}
    np.savez_compressed(path, **arrays, **facts, image_size=np.array(size), model=checkpoint["digest"])


def read_codes(path: Path, model: VQVAE, checkpoint: dict) -> tuple[list[str], list[Tensor], tuple[int, int]]:
    """Return the names of the images in a codes.npz, the indices (N, h, w) of each level or scale, and (H, W).

    Raises:
        ValueError: it is damaged, or from another model.
    """
    if not path.is_file():
        raise ValueError(f"{printable(path)} does not exist, or is not a file")
    codebook_size = model.levels[0].quantizer.codebook_size
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            names, (height, width) = file["names"].tolist(), map(operator.index, file["image_size"])
            size, digest = (height, width), str(file["model"])
            file_codebook_size = str(file.get("codebook_size", codebook_size))
            maps = model.map_names if digest == checkpoint["digest"] else []  # another model may have other maps
            levels = [file[level_key("indices", name)] for name in maps]
    except Exception as error:  # damaged archives surface as almost any exception
        raise ValueError(f"{printable(path)} is damaged, or is not a codes.npz of this project") from error
    if digest != checkpoint["digest"]:
        raise ValueError(f"{printable(path)} was written by another model; name the folder of that model with --run")
    if not (isinstance(names, list) and names and min(size) > 0 and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{printable(path)} holds no images, or their names are not text")
    if [tuple(level.shape) for level in levels] != [(len(names), *grid) for grid in model.grids(size)]:
        raise ValueError(f"{printable(path)}: the indices do not have the shape of {len(names)} images of this model")
    if file_codebook_size != str(codebook_size):
        raise ValueError(f"{printable(path)}: codebook_size is {file_codebook_size}, but the model has {codebook_size}")
    for level in levels:
        if level.dtype.kind not in "iu":
            raise ValueError(f"{printable(path)}: the indices are {level.dtype}, but must be integers")
        if not 0 <= level.min() <= level.max() < codebook_size:
            raise ValueError(f"{printable(path)}: indices run from {level.min()} to {level.max()}, out of range")
    if len(set(names)) < len(names) or any(name != safe_name(name) for name in names):
        raise ValueError(f"{printable(path)}: its names are not valid file names")
    if (longest := max(len(f"{name}.png".encode()) for name in names)) > LONGEST_FILE_NAME:
        raise ValueError(f"{printable(path)}: a file name takes {longest} bytes, more than {LONGEST_FILE_NAME}")
    return names, [torch.from_numpy(level.astype(np.int64)) for level in levels], size


def free_name(path: Path) -> Path:
    """Return the path, with _2, _3, ... added if it is taken."""
    tried, number = path, 1
    while tried.exists():
        number += 1
        tried = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return tried


def unique_names(paths: list[Path]) -> list[str]:
    """Return a file name without extension for each path; duplicates get a number."""
    names, numbers = {}, Counter()  # in order; names that differ only in case are duplicates on Windows and macOS
    for path in paths:
        name = stem = safe_name(path.stem).encode()[:LONGEST_NAME].decode(errors="ignore").rstrip(" .")
        while name.casefold() in names:
            numbers[stem.casefold()] += 1
            name = f"{stem}_{numbers[stem.casefold()] + 1}"
        names[name.casefold()] = name
    return list(names.values())


def safe_name(name: str) -> str:
    return re.sub(r"[^\w .()+-]", "_", printable(name)).strip(" .") or "image"


if __name__ == "__main__":
    main(parse_args())
