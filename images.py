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
from collections import Counter, deque
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

AHEAD = 16  # images decoded ahead of the one that is asked for
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # bytes of memory, as a container on Linux sees it


class ImageFiles(torch.utils.data.Dataset):
    """Images on disk, each decoded to (C, H, W) uint8 when it is asked for; `shape` is that of the tensor of all."""

    def __init__(self, paths: list[Path], shape: tuple[int, int, int], image_size: int | None):
        self.paths, self.image_size = paths, image_size
        self.shape = (len(paths), *shape)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            image = decode(self.paths[index], self.shape[1], self.image_size)
        except Exception as error:
            raise ValueError(f"{self.paths[index]} cannot be decoded any more ({error})") from error
        if image.shape != self.shape[1:]:
            raise ValueError(f"{self.paths[index]} has changed its size to {image.shape[2]}x{image.shape[1]} pixels")
        return image


Images = Tensor | ImageFiles


def load_folder(
    folder: Path, image_size: int | None, memory_limit: float | None, skip_bad_images: bool, cache: Path | None
) -> tuple[Images, Tensor | None, Images, Tensor | None, Tensor, str]:
    """Load a folder of images (PNG, JPEG, WebP, ...), which may have train/ and test/, and in them a folder per class.

    Without test/, a tenth of the images is the test set, always the same.

    Args:
        As of `data.load_dataset`.

    Returns:
        Training images and labels, test images and labels, `count_pixels` of the training images, and a digest of the
        images' names and sizes on disk, in order.

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
    digest = listing_digest(folder, [files[i] for i in good], n_train)
    train_labels, test_labels = (None, None) if labels is None else labels[good].tensor_split([n_train])
    return train, train_labels, test, test_labels, decoded["counts"], digest


def list_images(folder: Path) -> tuple[list[Path], int, Tensor | None]:
    """Return a folder's images, those of the training set first, how many these are, and the labels of all."""
    separate = (folder / "test").is_dir()
    train_root = folder / "train" if (folder / "train").is_dir() else folder
    test_root = folder / "test" if separate else train_root
    if separate and train_root == folder:
        raise ValueError(f"{folder} has a folder test/ but no train/; move its other images to {folder / 'train'}")
    test = walk(test_root)
    # Shuffled, so that the first of the test images, which are drawn, are of all classes.
    test = [test[i] for i in np.random.default_rng(0).permutation(len(test))]
    share = max(1, len(test) // 10)
    test, train = (test, walk(train_root)) if separate else (test[:share], test[share:])
    inside = [path.relative_to(root) for root, part in ((train_root, train), (test_root, test)) for path in part]
    classes = sorted({path.parts[0] for path in inside})
    labels = torch.tensor([classes.index(path.parts[0]) for path in inside])
    return train + test, len(train), labels if all(len(path.parts) > 1 for path in inside) else None


def walk(root: Path) -> list[Path]:
    """Return the images in a folder and the folders in it, sorted.

    Raises:
        ValueError: there are none.
    """
    paths, seen = [], set()
    for parent, folders, names in os.walk(root, followlinks=True):
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if os.path.realpath(Path(parent, name)) not in seen]  # links may circle
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
        key: what the kept images are valid for: the folder as it is now.
    """
    key = [str(folder.resolve()), image_size, listing_digest(folder, files, n_train, times=True)]
    if cache and cache.is_file():
        with contextlib.suppress(Damaged, KeyError, TypeError):
            saved = read_file(cache, mmap=True)
            if saved["key"] == key and (saved["images"] is not None) == (
                len(files) * math.prod(saved["shape"]) <= limit
            ):
                return saved

    headers = dict(enumerate(attempts(read_header, files, "reading sizes")))
    bad = {i: header for i, header in headers.items() if isinstance(header, str)}
    shape = common_shape(files, {i: header for i, header in headers.items() if i not in bad}, bad, image_size)
    keep = len(files) * math.prod(shape) <= limit

    def measured(path: Path) -> tuple[Tensor | None, Tensor]:
        image = decode(path, shape[0], image_size)
        if image.shape != shape:
            raise ValueError(f"it has {image.shape[2]}x{image.shape[1]} pixels, the others {shape[2]}x{shape[1]}")
        return (image if keep else None), count_pixels(image[None])

    images = torch.empty(len(files) if keep else 0, *shape, dtype=torch.uint8)
    counts = torch.zeros(shape[0], 256, dtype=torch.int64)
    candidates = [i for i in range(len(files)) if i not in bad]
    good = 0
    for i, result in zip(candidates, attempts(measured, [files[i] for i in candidates], "decoding")):
        if isinstance(result, str):
            bad[i] = result
            continue
        image, levels = result
        if keep:
            images[good] = image
        good += 1
        if i < n_train:
            counts += levels
    images = images[:good] if keep else None
    decoded = {"images": images, "shape": shape, "bad": bad, "counts": counts, "key": key}
    if cache and not bad:  # what could not be decoded is tried again
        temporary = cache.with_name(cache.name + ".tmp")
        try:
            torch.save(decoded, temporary)
            os.replace(temporary, cache)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            print(f"cannot keep the decoded images for the next run ({error})", file=sys.stderr, flush=True)
    return decoded


def listing_digest(folder: Path, files: list[Path], n_train: int, times: bool = False) -> str:
    """Return a digest of the files' names and sizes on disk, in order, and of their times of change."""
    digest = hashlib.sha256(str(n_train).encode())
    for path in files:
        size, changed = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else (0, 0)
        digest.update(os.fsencode(f"\n{path.relative_to(folder)} {size} {changed if times else ''}"))
    return digest.hexdigest()


def attempts(function: Callable, paths: list[Path], what: str) -> Iterator:
    """Yield function(path) for each path in order, or why it failed, a str; in threads, with a progress bar."""

    def attempt(path):
        try:
            return function(path)
        except Exception as error:  # damaged files surface as almost any exception
            return " ".join(str(error).split()) or type(error).__name__

    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), desc=what, unit=" images", disable=None) as bar:
        waiting = deque()  # few: results wait in memory until it is their turn
        for path in [*paths, *[None] * AHEAD]:
            if path is not None:
                waiting.append(pool.submit(attempt, path))
            if waiting and (path is None or len(waiting) > AHEAD):
                bar.update()
                yield waiting.popleft().result()


def read_header(path: Path) -> tuple[int, int, bool]:
    """Return an image's height and width, and whether it is grey."""
    with Image.open(path) as image:
        width, height = image.size
        # A square stays as it is when turned, and of a PNG the pixels would have to be read to know.
        turned = width != height and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
    return (width, height, grey) if turned else (height, width, grey)


def common_shape(files: list[Path], headers: dict, bad: dict, image_size: int | None) -> tuple[int, int, int]:
    """Return (C, H, W) of all images from their headers, adding to `bad` those that differ because they are broken."""
    if not headers:
        found = [f"{files[i]} ({reason})" for i, reason in bad.items()]
        raise ValueError(f"none of the images can be decoded: {shortened(found)}")
    channels = 1 if all(grey for _, _, grey in headers.values()) else 3
    if image_size is not None:
        return channels, image_size, image_size
    sizes = Counter((height, width) for height, width, _ in headers.values())
    height, width = sizes.most_common(1)[0][0]
    odd = [i for i, header in headers.items() if header[:2] != (height, width)]
    tried = zip(odd, attempts(lambda path: decode(path, channels, None), [files[i] for i in odd], "reading odd sizes"))
    bad |= {i: result for i, result in tried if isinstance(result, str)}
    sizes = Counter(header[:2] for i, header in headers.items() if i not in bad)
    if len(sizes) > 1:
        found = [f"{width}x{height} ({n:,} images)" for (height, width), n in sizes.most_common()]
        raise ValueError(f"the images differ in size: {shortened(found)}; give one with --image-size")
    return channels, height, width


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
    """Return the bytes of memory that can still be used; in a container, of no more than its limit."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        free = 1024 * int(dict(line.split(":") for line in file)["MemAvailable"].removesuffix("kB\n"))
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
        free = min(free, int(CONTAINER_LIMIT.read_text()))
    return free


def count_pixels(images: Tensor) -> Tensor:
    """Count how often each channel has each of the 256 levels: (C, 256)."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
