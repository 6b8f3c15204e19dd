"""A folder of images as uint8 tensors: decoded once and cached, or read while training if they do not fit in memory.

Shapes: N images, C channels
    images  (N, C, H, W) uint8
    labels  (N,) int64
"""

import contextlib
import errno
import hashlib
import io
import logging
import math
import os
import stat
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.cli import abbreviate, printable, progress, say
from harness.machine import free_memory, out_of_memory, rank
from harness.storage import (
    add_path_to_errors,
    is_ours,
    is_run_file,
    is_run_folder,
    locked_by_other,
    move_aside,
    read_state,
    write_state,
)

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps
from torch import Tensor
from torchvision.transforms.functional import center_crop, get_dimensions, pil_to_tensor, resize

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # we report bad files in our own words
AHEAD = 16  # images decoded ahead of the one that is asked for
DECODER = 4  # increment it if the output of `decode` changes, so that cached images are decoded again
ENDINGS = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".gif", ".bmp", ".dib")
ENDINGS += (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
# Only these, whatever a file's extension is: Pillow would pass an EPS file to Ghostscript.
FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
Image.init()
FORMATS += ("AVIF",) if "AVIF" in Image.OPEN else ()  # from Pillow 11.3 on
GREY_MODES = ("1", "L", "LA", "La", "F", "I", "I;16", "I;16B", "I;16L")


class ImageFiles(torch.utils.data.Dataset):
    """Images on disk, each decoded to (C, H, W) uint8 when asked for; `shape` is (N, C, H, W)."""

    def __init__(self, paths: list[Path], shape: tuple[int, int, int], image_size: int | None, background: str):
        self.paths, self.image_size, self.background = paths, image_size, background
        self.shape = (len(paths), *shape)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            with pillow_warnings(), add_path_to_errors(path):
                image = decode(path, self.shape[1], self.image_size, self.background)
        except Exception as error:
            if is_fault_of_machine(error):
                raise
            raise ValueError(f"{printable(path)} cannot be decoded any more ({reason_of(error)})") from error
        if image.shape != self.shape[1:]:
            raise ValueError(f"{printable(path)} has changed its size to {image.shape[2]}x{image.shape[1]} pixels")
        return image


Images = Tensor | ImageFiles


def load_folder(
    folder: Path,
    image_size: int | None = None,
    background: str = "white",
    memory_limit: float | None = None,
    skip_bad_images: bool = False,
    cache: Path | None = None,
) -> tuple:
    """Load a folder of images, which may have train/ and test/, and in them a folder per class.

    Without test/, a fixed 10% of the images is held out as the test set. Folders of runs inside it are skipped.

    Args:
        See `data.load_dataset`.

    Returns:
        the images and labels for training, those for testing, the names of the classes, `count_pixels` of the training
        images, and "name digest" of each file. Labels and names are None if there are no class folders.

    Raises:
        ValueError: there are no images, or some cannot be decoded, or they differ in size.
    """
    files, n_train, class_names, labels = list_images(folder)
    limit = free_memory() / 2 if memory_limit is None else memory_limit * 1e9
    decoded = decode_folder(folder, files, n_train, image_size, background, limit, cache)
    bad = [f"{printable(files[i].relative_to(folder))} ({reason})" for i, reason in decoded["bad"].items()]
    if bad and not skip_bad_images:
        raise ValueError(
            f"{len(bad)} of the {len(files)} images in {printable(folder)} cannot be decoded: {abbreviate(bad)}; "
            "repair or delete them, or skip them with --skip-bad-images"
        )
    good = [i for i in range(len(files)) if i not in decoded["bad"]]
    n_train = sum(i < n_train for i in good)
    if not 0 < n_train < len(good):
        raise ValueError(
            f"{printable(folder)} holds {len(good)} good images, {n_train} of them to train on; both sets need some"
        )
    if bad:
        warn(f"left out {len(bad)} images that cannot be decoded: {abbreviate(bad)}")

    if decoded["images"] is None:
        split = [[files[i] for i in part] for part in (good[:n_train], good[n_train:])]
        train, test = (ImageFiles(part, decoded["shape"], image_size, background) for part in split)
    else:
        train, test = decoded["images"][:n_train], decoded["images"][n_train:]
    names = [printable(files[i].relative_to(folder).as_posix()) for i in good]
    listing = [f"{name} {digest}" for name, digest in zip(names, decoded["digests"])]
    train_labels, test_labels = (None, None) if labels is None else labels[good].tensor_split([n_train])
    return (train, train_labels), (test, test_labels), class_names, decoded["counts"], listing


def warn(text: str):
    if rank() == 0:
        say(text, error=True)


# Which files


def list_images(folder: Path) -> tuple[list[Path], int, list[str] | None, Tensor | None]:
    """Return a folder's images (training set first), the size of the training set, the class names and all labels."""
    split = {path.name.casefold(): path for path in folder.iterdir() if path.is_dir()}
    if {"train", "test"} <= split.keys() and not all((folder / name).is_dir() for name in ("train", "test")):
        found = f"{printable(split['train'])} and {printable(split['test'])}"
        raise ValueError(f"{found} would be classes, not the split; rename them to train and test")
    separate = (folder / "test").is_dir()
    train_root = folder / "train" if (folder / "train").is_dir() else folder
    test_root = folder / "test" if separate else train_root
    if separate and train_root == folder:
        raise ValueError(f"{folder} has a folder test/ but no train/; move its other images to {folder / 'train'}")
    if train_root != folder and (others := left_out(folder)):
        warn(f"{printable(folder)} has a folder train/, so {abbreviate(others)} beside it are left out")
    test = walk(test_root)
    # Shuffled, so that the first test images, which the figures show, come from all classes.
    test = [test[i] for i in np.random.default_rng(0).permutation(len(test))]
    share = max(1, len(test) // 10)
    test, train = (test, walk(train_root)) if separate else (test[:share], test[share:])

    inside = [path.relative_to(root) for root, part in ((train_root, train), (test_root, test)) for path in part]
    loose = [path for path, part in zip(train + test, inside) if len(part.parts) == 1]
    if loose:
        if len(loose) < len(inside):
            warn(f"no classes: {len(loose)} images are not in a class folder, such as {printable(loose[0])}")
        return train + test, len(train), None, None
    classes = sorted({path.parts[0] for path in inside})
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[path.parts[0]] for path in inside])
    return train + test, len(train), [printable(name) for name in classes], labels


def left_out(folder: Path) -> list[str]:
    """Return the names of folders and images that lie beside train/ and test/."""
    others = [path for path in sorted(folder.iterdir()) if path.name not in ("train", "test") and path.name[0] != "."]
    return [
        printable(path.name)
        for path in others
        if (path.is_dir() and not is_run_folder(path)) or (path.suffix.lower() in ENDINGS and not is_run_file(path))
    ]


def walk(root: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, sorted; folders of runs and hidden files are skipped.

    Raises:
        ValueError: there are none, or a folder cannot be read, or images lie beside a run's own pictures.
    """

    def refuse(error: OSError):
        raise ValueError(f"the folder {printable(error.filename)} cannot be read ({error.strerror})") from error

    images, root = [], Path(root)
    for parent, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        parent = Path(parent)
        paths = [parent / name for name in names if not name.startswith(".")]
        paths = [path for path in paths if path.suffix.lower() in ENDINGS and not is_special(path)]
        if is_run_folder(parent):
            if others := [path for path in paths if not is_run_file(path)]:
                found = f"{len(others)} images that it did not write, such as {printable(min(others).name)}"
                raise ValueError(f"{printable(parent)} is the folder of a run, but holds {found}; move them")
            if parent != root:
                warn(f"left out {printable(parent)}, the folder of a run")
            folders.clear()
            continue
        images += paths
        above = {os.path.realpath(path) for path in (parent, *parent.parents) if path.is_relative_to(root)}
        inner = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in inner if os.path.realpath(parent / name) not in above]  # links may loop
    images.sort()
    if not images and is_run_folder(root):
        raise ValueError(f"{printable(root)} is the folder of a run; its pictures are not read as images")
    if not images:
        raise ValueError(f"{printable(root)} holds no images ({', '.join(ENDINGS)})")
    return images


def is_special(path: Path) -> bool:
    """Return whether a path exists but is not a regular file: reading a pipe would block."""
    with contextlib.suppress(OSError):
        return not stat.S_ISREG(path.stat().st_mode)
    return False  # a broken link is reported as a bad image


# All images, once


def decode_folder(
    folder: Path,
    files: list[Path],
    n_train: int,
    image_size: int | None,
    background: str,
    limit: float,
    cache: Path | None,
) -> dict:
    """Decode all images once, and keep them if they take no more than `limit` bytes.

    Returns:
        images: those that can be decoded, or None if they exceed the limit.
        shape: (C, H, W) of each; one channel if all are grey.
        bad: the reason for each file that cannot be decoded, by its position in `files`.
        counts: (C, 256), how often each channel of the training images has each value.
        digests: of the content of each file that can be decoded.
        key: the state of the folder and the decoder for which the kept images are valid.
    """
    decoder = f"{DECODER}, Pillow {PIL.__version__}"
    key = [decoder, str(folder.resolve()), image_size, background, n_train, times_digest(folder, files)]
    if (kept := read_cache(cache, key, len(files), limit)) is not None:
        return kept

    with pillow_warnings():
        good, bad = {}, {}
        for i, header in enumerate(try_each(lambda path: read_header(path, background), files, "reading image sizes")):
            (bad if isinstance(header, str) else good)[i] = header
        shape = common_shape(files, good, bad, image_size, background)
        keep = len(files) * math.prod(shape) <= limit

        def measure(path: Path) -> tuple[Tensor | None, Tensor, str]:
            content = path.read_bytes()
            image = decode(io.BytesIO(content), shape[0], image_size, background)
            if image.shape != shape:
                raise ValueError(f"it has {image.shape[2]}x{image.shape[1]} pixels, the others {shape[2]}x{shape[1]}")
            digest = hashlib.sha256(content).hexdigest()[:16]
            return (image if keep else None), count_pixels(image[None]), digest

        images = torch.empty(len(files) if keep else 0, *shape, dtype=torch.uint8)
        counts, digests = torch.zeros(shape[0], 256, dtype=torch.int64), []
        candidates = [i for i in range(len(files)) if i not in bad]
        for i, result in zip(candidates, try_each(measure, [files[i] for i in candidates], "decoding images")):
            if isinstance(result, str):
                bad[i] = result
                continue
            image, levels, digest = result
            if keep:
                images[len(digests)] = image
            digests.append(digest)
            if i < n_train:
                counts += levels

    images = images[: len(digests)] if keep else None
    decoded = {"images": images, "shape": shape, "bad": bad, "counts": counts, "digests": digests, "key": key}
    # With bad files, the next run tries again. Do not write to a folder that another process has locked.
    if cache and not bad and not locked_by_other(cache.parent):
        try:
            if cache.exists() and not is_ours(cache):
                move_aside(cache.parent, (cache.name,), "another program wrote it", what=cache.name)
            write_state(cache, decoded)
        except OSError as error:
            warn(f"cannot keep the decoded images for the next run ({error})")
    return decoded


def read_cache(cache: Path | None, key: list, count: int, limit: float) -> dict | None:
    """Return what an earlier run decoded, or None if it does not match or is damaged."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        decoded, _ = read_state(cache, mmap=True)
        in_memory = count * math.prod(decoded["shape"]) <= limit
        images = decoded["images"].shape if in_memory else decoded["images"]
        wanted = (count, *decoded["shape"]) if in_memory else None
        lengths = len(decoded["digests"]), tuple(decoded["counts"].shape)
        fits = decoded["key"] == key and images == wanted and lengths == (count, (decoded["shape"][0], 256))
        if fits and decoded["bad"] == {} and (not in_memory or decoded["images"].dtype == torch.uint8):
            return decoded
    return None


def times_digest(folder: Path, files: list[Path]) -> str:
    """Return a digest of the files' names, sizes and times of change, in order, without reading their content."""
    digest = hashlib.sha256()
    for path in files:
        # A copy may keep the time of modification, but never that of change.
        state = path.stat() if path.exists() else None
        known = state and (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        digest.update(os.fsencode(f"{path.relative_to(folder)}\0{known}\0"))
    return digest.hexdigest()


def try_each(function: Callable, paths: list[Path], what: str) -> Iterator:
    """Yield function(path) for each path in order, or a str that says why it failed; uses threads, shows progress."""

    def attempt(path):
        try:
            with add_path_to_errors(path):
                return function(path)
        except Exception as error:  # damaged files surface as almost any exception
            if is_fault_of_machine(error):
                raise
            return reason_of(error)

    with ThreadPoolExecutor() as pool:
        waiting = deque(pool.submit(attempt, path) for path in paths[:AHEAD])  # results wait in memory for their turn
        for i in progress(range(len(paths)), what):
            waiting.extend(pool.submit(attempt, path) for path in paths[i + AHEAD : i + AHEAD + 1])
            yield waiting.popleft().result()


def common_shape(
    files: list[Path], headers: dict, bad: dict, image_size: int | None, background: str
) -> tuple[int, int, int]:
    """Return the (C, H, W) that all images have by their headers; add those that differ and are broken to `bad`."""
    if not headers:
        found = [f"{printable(files[i])} ({reason})" for i, reason in bad.items()]
        raise ValueError(f"none of the images can be decoded: {abbreviate(found)}")
    channels = 1 if all(grey for _, _, grey in headers.values()) else 3
    if image_size is not None:
        return channels, image_size, image_size
    sizes = Counter((height, width) for height, width, _ in headers.values())
    height, width = sizes.most_common(1)[0][0]
    odd = [i for i, header in headers.items() if header[:2] != (height, width)]
    again = try_each(lambda path: decode(path, channels, None, background), [files[i] for i in odd], "decoding again")
    bad |= {i: result for result, i in zip(again, odd) if isinstance(result, str)}
    sizes = Counter(header[:2] for i, header in headers.items() if i not in bad)
    if len(sizes) > 1:
        found = [f"{width}x{height} ({n:,} images)" for (height, width), n in sizes.most_common()]
        raise ValueError(f"the images differ in size: {abbreviate(found)}; give one with --image-size")
    return channels, height, width


# One image


def read_header(path: Path, background: str) -> tuple[int, int, bool]:
    """Return an image's height and width, and whether it is grey."""
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        # Skip squares: turning does not change their size, and to find a PNG's orientation Pillow reads all its pixels.
        turns = width != height and image.format != "TIFF"  # Pillow turns TIFF files itself
        turned = turns and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        grey = image.mode in GREY_MODES and (is_grey(background) or not image.has_transparency_data)
    return (width, height, grey) if turned else (height, width, grey)


def decode(
    source: Path | io.BytesIO, channels: int, size: int | tuple[int, int] | None, background: str = "white"
) -> Tensor:
    """Return an image, or the first of an animation, as (C, H, W) uint8; transparent pixels show the background.

    12- and 16-bit grey is scaled: 4,095 or 65,535 becomes 255. Floating-point pixels must lie in [0, 1].

    Raises:
        ValueError, OSError: it is damaged, too large, or of an unsupported format or kind.
    """
    if isinstance(source, Path):  # Pillow would map an uncompressed TIFF file, and scramble one that has to be turned
        source = io.BytesIO(source.read_bytes())
    with Image.open(source, formats=FORMATS) as opened:
        image = ImageOps.exif_transpose(opened)  # upright
        if image.mode == "F" or image.mode.startswith("I"):
            image = to_8_bits(image, opened, background)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, ImageColor.getrgb(background)), image)
        image = image.convert("L" if channels == 1 else "RGB")
    return pil_to_tensor(image if size is None else resize_and_crop(image, size))


def to_8_bits(image: Image.Image, opened: Image.Image, background: str) -> Image.Image:
    """Scale the pixels of an image to 0 ... 255; `opened` is the image as it was opened, with the tags of a TIFF."""
    values, tags = np.asarray(image), getattr(opened, "tag_v2", {})
    if image.mode == "F":
        highest, what = 1.0, "floating-point numbers"
    elif image.mode == "I" and opened.format == "TIFF":
        raise ValueError("its pixels are signed or 32-bit integers, whose scale is unknown; convert it to 8 or 16 bits")
    else:
        bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]  # 12 in some TIFF files; Pillow does not scale them
        highest, what = 2**bits - 1, f"{bits}-bit numbers"
    if not (values.min() >= 0 and values.max() <= highest):  # refuses NaN too
        raise ValueError(f"its pixels are {what} from {values.min()} to {values.max()}, not from 0 to {highest:g}")
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white; Pillow inverts only 8-bit images
        values = highest - values
    grey = Image.fromarray((values * (255 / highest)).round().astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    transparent = Image.fromarray(values == image.info["transparency"])  # a single grey value
    return Image.composite(
        Image.new("RGB", image.size, ImageColor.getrgb(background)[:3]), grey.convert("RGB"), transparent
    )


def is_grey(color: str) -> bool:
    return len(set(ImageColor.getrgb(color)[:3])) == 1


@contextlib.contextmanager
def pillow_warnings():
    """Turn the warning of a decompression bomb into an error, and hide Pillow's other warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def is_fault_of_machine(error: Exception) -> bool:
    """Return whether no image is to blame: too many open files, no memory, a disk or a network that fails."""
    faults = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT)
    return out_of_memory(error) or getattr(error, "errno", None) in faults


def reason_of(error: Exception) -> str:
    """Return an exception's message on one line, without the memory addresses of Pillow's buffers."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "not an image, or in an unsupported format" if "_io.BytesIO object" in text else printable(text)


def resize_and_crop(image, size: int | tuple[int, int]):
    """Scale an image, PIL's or (..., H, W) uint8, until it just covers `size`, and crop the centre.

    Args:
        size: of the result, (H, W), or one number for both.

    Raises:
        ValueError: the image is so long, or the size so large, that scaling takes more pixels than Pillow would open.
    """
    wanted_height, wanted_width = (size, size) if isinstance(size, int) else size
    _, height, width = get_dimensions(image)
    if wanted_height * width >= wanted_width * height:
        covering = [wanted_height, int(wanted_height * width / height)]
    else:
        covering = [int(wanted_width * height / width), wanted_width]
    if math.prod(covering) > Image.MAX_IMAGE_PIXELS:
        scaled = f"scaled to cover {wanted_width}x{wanted_height}, it would have {math.prod(covering):,} pixels"
        raise ValueError(f"{scaled}, more than {Image.MAX_IMAGE_PIXELS:,}")
    return center_crop(resize(image, covering, antialias=True), [wanted_height, wanted_width])


def count_pixels(images: Tensor) -> Tensor:
    """Count how often each channel has each of the 256 levels: (C, 256)."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])


def read_images(
    paths: list[Path], channels: int, size: tuple[int, int] | None = None, background: str = "white"
) -> tuple[list[Tensor], int]:
    """Read images (C, H, W) uint8, by default at their own size; also return how many were resized to `size`.

    Raises:
        ValueError: one of them is missing or cannot be decoded.
    """
    images, resized = [], 0
    with pillow_warnings():
        for path in progress([Path(path) for path in paths], "reading images"):
            try:
                if is_special(path):
                    raise ValueError("it is a folder or a pipe, not a file")
                with add_path_to_errors(path):
                    resized += size is not None and read_header(path, background)[:2] != size
                    image = decode(path, channels, size, background)
            except FileNotFoundError:
                raise ValueError(f"{printable(path)} does not exist") from None
            except Exception as error:  # damaged files surface as almost any exception
                if is_fault_of_machine(error):
                    raise
                raise ValueError(f"{printable(path)} cannot be decoded ({reason_of(error)})") from error
            images.append(image)
    return images, resized
