"""A folder of images as uint8 tensors: decoded once and kept, or, where they exceed the memory, read while training.

Shapes: N images, C channels
    images  (N, C, H, W) uint8
    labels  (N,) int64
"""

import contextlib
import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize
from tqdm import tqdm

from checkpoint import Damaged, read_file


class ImageFiles(torch.utils.data.Dataset):
    """Images on disk, each decoded to (C, H, W) uint8 when it is asked for; `shape` is that of the tensor of all."""

    def __init__(self, paths: list[Path], shape: tuple[int, int, int], image_size: int | None):
        self.paths, self.image_size = paths, image_size
        self.shape = (len(paths), *shape)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return decode(self.paths[index], self.shape[1], self.image_size)
        except Exception as error:
            raise ValueError(f"{self.paths[index]} cannot be decoded any more ({error})") from error


Images = Tensor | ImageFiles


def load_folder(
    folder: Path, image_size: int | None, memory_limit: float | None, skip_bad_images: bool, cache: Path | None
) -> tuple[Images, Tensor | None, Images, Tensor | None, Tensor]:
    """Load a folder of images (PNG, JPEG, WebP, ...), which may have train/ and test/, and in them a folder per class.

    Without test/, a tenth of the images is the test set, always the same.

    Args:
        As of `data.load_dataset`.

    Returns:
        Training images and labels, test images and labels, and `count_pixels` of the training images.

    Raises:
        ValueError: there are no images, or some that cannot be decoded, or they differ in size.
    """
    files, n_train, labels = list_images(folder)
    limit = free_memory() / 2 if memory_limit is None else memory_limit * 1e9
    decoded = decode_folder(folder, files, n_train, image_size, limit, cache)
    bad = [f"{files[i].relative_to(folder)} ({reason})" for i, reason in decoded["bad"].items()]
    if bad and not skip_bad_images:
        raise ValueError(
            f"{len(bad)} of the {len(files)} images in {folder} cannot be decoded: {shortened(bad)}; "
            "mend or delete them, or leave them out with --skip-bad-images"
        )
    good = [i for i in range(len(files)) if i not in decoded["bad"]]
    n_train = sum(i < n_train for i in good)
    if not 0 < n_train < len(good):
        raise ValueError(
            f"{folder} holds {len(good)} good images, {n_train} of them to train on; needs some to test on"
        )
    if bad:
        print(f"left out {len(bad)} images that cannot be decoded: {shortened(bad)}", file=sys.stderr, flush=True)
    images = decoded["images"]
    if images is None:
        parts = [[files[i] for i in part] for part in (good[:n_train], good[n_train:])]
        train, test = (ImageFiles(part, decoded["shape"], image_size) for part in parts)
    else:
        train, test = images[:n_train], images[n_train:]
    train_labels, test_labels = (None, None) if labels is None else labels[good].tensor_split([n_train])
    return train, train_labels, test, test_labels, decoded["counts"]


def list_images(folder: Path) -> tuple[list[Path], int, Tensor | None]:
    """Return a folder's images, those of the training set first, how many these are, and the labels of all."""
    train_root = folder / "train" if (folder / "train").is_dir() else folder
    separate = train_root != folder and (folder / "test").is_dir()
    test_root = folder / "test" if separate else train_root
    train, test = walk(train_root), walk(test_root)
    # Shuffled, so that the first of the test images, which are drawn, are of all classes.
    test = [test[i] for i in np.random.default_rng(0).permutation(len(test))]
    if not separate:
        share = max(1, len(test) // 10)
        test, train = test[:share], test[share:]
    inside = [path.relative_to(root) for root, part in ((train_root, train), (test_root, test)) for path in part]
    classes = sorted({path.parts[0] for path in inside})
    labels = torch.tensor([classes.index(path.parts[0]) for path in inside])
    return train + test, len(train), labels if all(len(path.parts) > 1 for path in inside) else None


def walk(root: Path) -> list[Path]:
    """Return the images in a folder and the folders in it, sorted.

    Raises:
        ValueError: there are none.
    """
    walked = os.walk(root, followlinks=True)
    paths = [Path(parent, name) for parent, _, names in walked for name in names if not name.startswith(".")]
    images = sorted(path for path in paths if path.suffix.lower() in IMG_EXTENSIONS)
    if not images:
        raise ValueError(f"{root} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return images


def decode_folder(
    folder: Path, files: list[Path], n_train: int, image_size: int | None, limit: float, cache: Path | None
) -> dict:
    """Decode all images once, and keep them if they take no more than `limit` bytes.

    Returns:
        images: those that can be decoded, or None where they exceed the limit.
        shape: (C, H, W) of each; one channel if all are grey.
        bad: for each of `files` that cannot be decoded, by its number, the reason.
        counts: (C, 256), how often each channel of the training images has each level.
        key: a digest of the folder's listing.
    """
    stats = [path.stat() for path in files]
    listing = [f"{path.relative_to(folder)} {s.st_size} {s.st_mtime_ns}" for path, s in zip(files, stats)]
    key = hashlib.sha256("\n".join([str(image_size), str(n_train), *listing]).encode()).hexdigest()
    if cache and cache.is_file():
        with contextlib.suppress(Damaged, KeyError, TypeError):
            saved = read_file(cache, mmap=True)
            if saved["key"] == key and (saved["images"] is not None) == (
                len(files) * math.prod(saved["shape"]) <= limit
            ):
                return saved

    headers = dict(enumerate(attempts(read_header, files, "reading sizes")))
    bad = {i: header for i, header in headers.items() if isinstance(header, str)}
    shape = common_shape([header for i, header in headers.items() if i not in bad], folder, image_size)
    keep = len(files) * math.prod(shape) <= limit
    images = torch.empty(len(files) if keep else 0, *shape, dtype=torch.uint8)
    counts = torch.zeros(shape[0], 256, dtype=torch.int64)
    good = 0
    for i, image in enumerate(attempts(lambda path: decode(path, shape[0], image_size), files, "decoding")):
        if isinstance(image, str):
            bad[i] = image
            continue
        if keep:
            images[good] = image
        good += 1
        if i < n_train:
            counts += count_pixels(image[None])
    images = (images if good == len(files) else images[:good].clone()) if keep else None
    decoded = {"images": images, "shape": shape, "bad": bad, "counts": counts, "key": key}
    if cache:
        temporary = cache.with_name(cache.name + ".tmp")
        try:
            torch.save(decoded, temporary)
            os.replace(temporary, cache)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            print(f"cannot keep the decoded images for the next run ({error})", file=sys.stderr, flush=True)
    return decoded


def attempts(function: Callable, paths: list[Path], what: str) -> Iterator:
    """Yield function(path) for each path in order, or why it failed, a str; in threads, with a progress bar."""

    def attempt(path):
        try:
            return function(path)
        except Exception as error:  # damaged files surface as almost any exception
            return " ".join(str(error).split()) or type(error).__name__

    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), desc=what, unit=" images", disable=None) as bar:
        for start in range(0, len(paths), 1000):  # results wait in memory until it is their turn
            for result in pool.map(attempt, paths[start : start + 1000]):
                bar.update()
                yield result


def read_header(path: Path) -> tuple[int, int, bool]:
    """Return an image's height and width, and whether it is grey."""
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    return (width, height, grey) if turned else (height, width, grey)


def common_shape(headers: list, folder: Path, image_size: int | None) -> tuple[int, int, int]:
    if not headers:
        raise ValueError(f"none of the images in {folder} can be decoded")
    sizes = Counter((width, height) for height, width, _ in headers)
    if image_size is None and len(sizes) > 1:
        found = [f"{width}x{height} ({n:,} images)" for (width, height), n in sizes.most_common()]
        raise ValueError(f"the images in {folder} differ in size: {shortened(found)}; give one with --image-size")
    height, width, _ = headers[0] if image_size is None else (image_size, image_size, None)
    return 1 if all(grey for _, _, grey in headers) else 3, height, width


def decode(path: Path, channels: int, image_size: int | None) -> Tensor:
    """Return an image as (C, H, W) uint8."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)  # as its camera was held
        if image.mode.startswith("I"):  # 16 bits of grey
            image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
        image = image.convert("L" if channels == 1 else "RGB")
    return pil_to_tensor(image if image_size is None else fit(image, image_size))


def fit(image, size: int):
    """Scale the short side of an image, PIL's or (..., H, W) uint8, to `size` and crop the centre."""
    return center_crop(resize(image, size, antialias=True), size)


def shortened(parts: list[str]) -> str:
    return ", ".join(parts[:5]) + (f" and {len(parts) - 5} more" if len(parts) > 5 else "")


def free_memory() -> int:
    """Return the bytes of memory that can still be used."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        return 1024 * int(dict(line.split(":") for line in file)["MemAvailable"].removesuffix("kB\n"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def count_pixels(images: Tensor) -> Tensor:
    """Count how often each channel has each of the 256 levels: (C, 256)."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
