"""Data sets as uint8 images, in memory or on disk, and batches whose order is a function of the seed and the step.

Shapes: N images, B batch, C channels
    images  (N, C, H, W) uint8      a tensor, or `ImageFiles` if they do not fit in memory
    labels  (N,) int64              None if the images have no labels
"""

import argparse
import contextlib
import functools
import hashlib
import math
import re
import signal
import socket
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from harness.cli import check_values, number, printable, say
from harness.folder import ImageFiles, Images, count_pixels, load_folder, resize_and_crop
from harness.machine import check_equal_on_ranks, check_room, cpu_count, from_rank_0, out_of_memory, rank, world_size
from harness.storage import IMAGE_CACHE, read_text, write_whole

import filelock
import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import resize

IDX = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
NAMES = (*IDX, "cifar10", "digits")
LISTING = "images.txt"  # the names and digests of a folder's images
FIRST_PIXELS = 2**26  # most pixels that `first_images` returns, per channel
CHUNK_PIXELS = 2**19  # pixels measured, encoded or drawn at once; larger images make smaller chunks
# torchvision checks the archives that it downloads, never the files that it extracts from them.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Dataset(NamedTuple):
    name: str  # as the user typed it
    train_images: Images
    train_labels: Tensor | None
    test_images: Images
    test_labels: Tensor | None
    mean: Tensor  # (C,) of the training images' pixels in [0, 1]
    std: Tensor
    class_names: list[str] | None
    digest: str  # identifies the images
    files: list[str] | None = None  # for a folder: "name digest" of each image

    def identity(self) -> dict:
        """Return what a run's checkpoint stores about its images, to tell whether they are the same."""
        shape = tuple(self.train_images.shape[1:])
        return {"images": self.digest, "image_shape": shape, "class_names": self.class_names}

    def write_listing(self, folder: Path):
        """Write the names and digests of a folder's images, so that `check_same` can say what has changed."""
        if self.files:
            write_whole(folder / LISTING, "\n".join([*self.files, ""]))


class Unavailable(ValueError):
    """The data set is not on disk and cannot be downloaded."""


def add_data_flags(parser: argparse.ArgumentParser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="auto",
        help=f"one of {', '.join(NAMES)}, or a folder of images, which may hold train/ and test/; "
        "auto: mnist, or digits if it cannot be downloaded",
    )
    group.add_argument("--data-dir", default="data", help="folder of the data sets; missing ones are downloaded to it")
    group.add_argument(
        "--image-size",
        type=number(int, 1, 2**13 + 1),
        help="scale the short side to this many pixels; crop the centre",
    )
    group.add_argument(
        "--background", type=color, default="white", help="colour behind transparent images, by name or as #rrggbb"
    )
    group.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror half of the training images"
    )
    group.add_argument(
        "--skip-bad-images",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out images that cannot be decoded",
    )
    group.add_argument(
        "--memory-limit",
        type=number(float, 0),
        metavar="GB",
        help="if a folder's images take more, read them from disk while training; default: half of the free memory",
    )


def color(text: str) -> str:
    """Return the name of a colour that Pillow knows; an argparse type."""
    try:
        if max(ImageColor.getrgb(text)) > 255:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{printable(text)} is not a colour; use a name, such as white, or #rrggbb"
        ) from None
    return text


def load_training_data(args: argparse.Namespace, checkpoint: dict | None = None) -> Dataset:
    """Load the data set of the flags; "auto" is MNIST or, with a loud warning, scikit-learn's digits.

    Rank 0 downloads, decodes and decides; the other ranks then load the same data set.

    Args:
        checkpoint: of the run to resume; with --resume its images must be the same.
    """
    memory_limit = args.memory_limit
    if rank() > 0:
        args.dataset, in_memory = from_rank_0()
        memory_limit = math.inf if in_memory else 0
    options = (args.image_size, args.background, memory_limit, args.skip_bad_images, Path(args.out_dir, IMAGE_CACHE))
    try:
        # With --resume, the name and the folder come from a file: download nothing, the data must be there.
        name, download = "mnist" if args.dataset == "auto" else args.dataset, args.resume is None
        data = load_dataset(name, args.data_dir, *options, download=download)
    except Unavailable as error:
        if args.dataset != "auto":
            other = "name their folder with --data-dir" if args.resume else "name another --dataset"
            raise ValueError(f"{error}; copy its files into {args.data_dir}, or {other}") from error
        say(
            "",
            f"*** WARNING: {error}.",
            "*** Training on scikit-learn's 1,797 digits instead. To train on MNIST, connect to the network, or name",
            "*** the folder that holds MNIST/raw with --data-dir.",
            "",
            error=True,
        )
        data = load_dataset("digits", image_size=args.image_size)
    if args.dataset == "auto":
        args.dataset = data.name
    if rank() == 0:
        from_rank_0((args.dataset, isinstance(data.train_images, Tensor)))
    if checkpoint and args.resume is not None:
        check_same(data, checkpoint, args.out_dir)
    check_equal_on_ranks([data.digest, *data.mean.tolist(), *data.std.tolist()], "images")
    return data


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    background: str = "white",
    memory_limit: float | None = None,
    skip_bad_images: bool = False,
    cache: Path | None = None,
    download: bool = True,
) -> Dataset:
    """Load a data set by name, downloading it to `data_dir` if it is missing, or a folder of images by its path.

    Args:
        image_size: scale the short side to this many pixels, and crop the centre. None: all must have the same size.
        background: the colour behind transparent images of a folder.
        memory_limit: in GB; if a folder's images take more as uint8, they are read from disk while training. None: half
            of the free memory.
        skip_bad_images: leave out images of a folder that cannot be decoded.
        cache: file that keeps a folder's decoded images until the folder changes.
        download: whether a missing data set may be downloaded.

    Raises:
        Unavailable: it is not in `data_dir` and cannot be downloaded.
        ValueError: one of its files is truncated or corrupt; the message names the file.
    """
    if name not in NAMES:
        if not Path(name).is_dir():
            named = f"--dataset {name} is neither a folder nor one of {', '.join(NAMES)}"
            raise ValueError(f"{named}; if your folder has moved, give its new path")
        folder = load_folder(Path(name), image_size, background, memory_limit, skip_bad_images, cache)
        train, test, class_names, counts, files = folder
        digest = hashlib.sha256("\n".join([str(len(train[0])), *files]).encode()).hexdigest()
        shown = printable(Path(name).as_posix())
        return Dataset(shown, *train, *test, *channel_stats(counts), class_names, digest, files)
    train, test, class_names = digits() if name == "digits" else torchvision_splits(name, data_dir, download)
    if image_size is not None:
        size = (len(train[0]) + len(test[0])) * train[0].shape[1] * image_size**2
        check_room(size, f"{name} at --image-size {image_size}", "make it smaller")
        train, test = (  # in chunks: scaling takes several times their memory
            (torch.cat([resize_and_crop(chunk, image_size) for chunk in images.split(1000)]), labels)
            for images, labels in (train, test)
        )
    return Dataset(name, *train, *test, *channel_stats(count_pixels(train[0])), class_names, digest=name)


def dataset_of(checkpoint: dict, folder: Path, data_dir: str | None = None, download: bool | None = None) -> Dataset:
    """Load the data set that the run in a folder was trained on, from `data_dir` if it has moved.

    Args:
        download: whether to download it to `data_dir` if it is missing; by default only if `data_dir` is given.

    Raises:
        ValueError: it cannot be loaded, or it has changed.
    """
    parser = argparse.ArgumentParser()
    add_data_flags(parser)
    args = vars(parser.parse_args([])) | checkpoint["args"]
    check_values(parser, args, checkpoint.get("path"))
    name = args["dataset"] if args["dataset"] in NAMES or data_dir is None else data_dir
    if not (name in NAMES or Path(name).is_dir()):
        raise ValueError(f"the run's folder of images, {name}, does not exist; give its new path with --data-dir")
    options = (args["image_size"], args["background"], args["memory_limit"], args["skip_bad_images"])
    # Download only to a folder that the user names now: the one in the checkpoint may be anybody's.
    download = data_dir is not None if download is None else download
    try:
        data = load_dataset(name, data_dir or args["data_dir"], *options, folder / IMAGE_CACHE, download)
    except Unavailable as error:
        raise ValueError(f"{error}; name its folder with --data-dir") from error
    check_same(data, checkpoint, folder)
    return data


def check_same(data: Dataset, checkpoint: dict, folder: str | Path):
    """Raise ValueError unless these are the images that the run in a folder was trained on; say which differ."""
    if data.digest == checkpoint["identity"]["images"]:
        return
    trained_on = checkpoint["args"]["dataset"]
    message = f"the images of {data.name} are not those that the run was trained on ({trained_on})"
    with contextlib.suppress(OSError, ValueError):
        before = dict(line.rsplit(" ", 1) for line in read_text(Path(folder, LISTING)).splitlines())
        now = dict(line.rsplit(" ", 1) for line in data.files or ())
        changed = [name for name in now if name in before and now[name] != before[name]]
        kinds = {
            "added": [*(now.keys() - before.keys())],
            "removed": [*(before.keys() - now.keys())],
            "changed": changed,
        }
        found = [f"{len(names)} {kind} ({min(names)} ...)" for kind, names in kinds.items() if names]
        message += f": {', '.join(found) or 'the split differs'}"
    raise ValueError(message)


def torchvision_splits(name: str, data_dir: str | Path, download: bool) -> tuple:
    """Return the images and labels for training, those for testing, and the names of the classes."""
    data_dir = Path(data_dir)
    source = datasets.CIFAR10 if name == "cifar10" else IDX[name]
    whole = all(path.is_file() and intact(path) for path, _, intact in known_files(source, data_dir))
    if name in IDX:
        old = data_dir / source.__name__ / "processed"
        if all((old / file).is_file() for file in (source.training_file, source.test_file)):
            raise ValueError(f"{old}, of an old torchvision, would be read in place of raw/, unchecked; delete it")
    with contextlib.ExitStack() as stack:
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(30)
        try:
            if download and not whole:
                # This also replaces a stderr that cannot be written, on which torchvision's bar would fail.
                say(f"preparing {name} in {data_dir}", error=True)
                data_dir.mkdir(parents=True, exist_ok=True)
                lock = filelock.FileLock(data_dir / ".download.lock")  # another process may be downloading
                stack.enter_context(lock)
            if not whole:
                check_files(source, data_dir)
            root = data_dir.absolute()  # torchvision would write to another folder if the path starts with ~
            loaded = [source(root, download=download), source(root, train=False)]
        except Exception as error:  # no network, or damaged files without a known checksum
            if out_of_memory(error):
                raise
            check_files(source, data_dir, archives=True)
            reason = " ".join(str(error).split()) or type(error).__name__
            if all(path.is_file() for path, _, _ in known_files(source, data_dir)):
                raise damaged(name, source, data_dir, reason) from error
            reason = f" and cannot be downloaded ({reason})" if download else ""
            raise Unavailable(f"{name} is not in {data_dir}{reason}") from error
    if not whole:
        check_files(source, data_dir)
    splits = []
    for split in loaded:
        images, labels = torch.as_tensor(split.data), torch.as_tensor(split.targets)  # (N, H, W), or (N, H, W, C)
        if len(images) != len(labels) or labels.max() >= len(split.classes):
            reason = f"{len(images)} images, {len(labels)} labels up to {labels.max()}"
            raise damaged(name, source, data_dir, reason)
        images = images[:, None] if images.ndim == 3 else images.movedim(-1, 1).contiguous()
        splits.append((images, labels))
    return *splits, [label.split(" - ")[0] for label in loaded[0].classes]  # MNIST's are "0 - zero", "1 - one", ...


def damaged(name: str, source: type, data_dir: Path, reason: str) -> ValueError:
    folder = data_dir / getattr(source, "base_folder", source.__name__)
    return ValueError(f"{name} in {data_dir} is damaged ({reason}); delete {folder}, and run again to download it")


def check_files(source: type, data_dir: Path, archives: bool = False):
    """Raise ValueError naming the first file of a data set that is truncated or corrupt; missing files are no error.

    With `archives`, a damaged archive counts as well.
    """
    for path, archive, intact in known_files(source, data_dir):
        broken = path if path.is_file() and not intact(path) else None
        if archives and not path.is_file() and archive[0].is_file() and not check_integrity(*archive):
            broken = archive[0]
        if broken:
            remedy = f"delete {path} and {archive[0]}, and run again to download them"
            raise ValueError(f"{broken} is truncated or corrupt; {remedy}")


def known_files(source: type, data_dir: Path) -> Iterator[tuple]:
    """Yield each file of a data set, its archive with the archive's MD5, and a check of the file."""
    if source is datasets.CIFAR10:
        archive = data_dir / source.filename, source.tgz_md5
        for name, md5 in source.train_list + source.test_list:
            yield data_dir / source.base_folder / name, archive, functools.partial(check_integrity, md5=md5)
        return
    for name, md5 in source.resources:
        archive = data_dir / source.__name__ / "raw" / name, md5
        path = archive[0].with_suffix("")
        if source is datasets.MNIST:
            yield path, archive, functools.partial(check_integrity, md5=MNIST_MD5[path.name])
        else:
            yield path, archive, functools.partial(matches_archive, archive=archive)


def matches_archive(path: Path, archive: tuple[Path, str]) -> bool:
    """Return whether a file has the CRC-32 at the end of its gzip archive; without an intact archive, assume so."""
    if not check_integrity(*archive):
        return True
    return zlib.crc32(path.read_bytes()) == int.from_bytes(archive[0].read_bytes()[-8:-4], "little")


def digits() -> tuple:
    """Return scikit-learn's 1,797 digits of 8x8 pixels, resized to 28x28; the last 297 are the test set."""
    from sklearn.datasets import load_digits  # here: scikit-learn takes a second to import

    source = load_digits()
    images = torch.from_numpy(source.images[:, None] * (255 / 16)).float()  # (N, 1, 8, 8), 17 grey levels
    images = resize(images, [28, 28], antialias=True).round().clamp(0, 255).to(torch.uint8)
    labels = torch.from_numpy(source.target).long()
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:]), [str(digit) for digit in range(10)]


def channel_stats(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation, (C,) float32, of pixels in [0, 1], from counts (C, 256) of values."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True).double()
    mean = share @ levels
    std = (share * (levels - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), std.clamp(min=1e-3).float()


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the order (n,) int64 in which an epoch visits n images."""
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Return the indices (batch_size,) int64, among n images, of a step's batch; steps count from 0.

    Epochs follow one another without a gap, so that every image is visited once per epoch even if the batch size does
    not divide n.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // n, (stop - 1) // n + 1)
    orders = [epoch_order(n, seed, e)[max(start - e * n, 0) : stop - e * n] for e in epochs]
    return torch.cat(orders)


def chunks(count: int, image_size: tuple[int, int], most: int = 100) -> tuple[Tensor, ...]:
    """Split the indices of `count` images into chunks of at most `most`, or fewer if the images (H, W) are large."""
    return torch.arange(count).split(max(1, min(most, CHUNK_PIXELS // math.prod(image_size))))


def first_images(images: Images, count: int) -> Tensor:
    """Return the first images, at most `count`, or fewer if they are large: (n, C, H, W) uint8 on the CPU."""
    size = images.shape[-2:]
    shown = min(count, len(images), max(1, FIRST_PIXELS // math.prod(size)))
    return torch.cat(list(batches(images, chunks(shown, size), torch.device("cpu"))))


def batches(images: Images, order: Iterable[Tensor], device: torch.device) -> Generator[Tensor, None, None]:
    """Yield a batch of images (B, C, H, W) uint8, on a device, for each tensor of indices (B,) in `order`.

    Worker processes decode images on disk ahead of time.

    Raises:
        OSError: an image cannot be read or decoded.
    """
    if isinstance(images, ImageFiles):
        loader = DataLoader(
            images,
            batch_sampler=(indices.tolist() for indices in order),
            num_workers=min(8, cpu_count()),
            worker_init_fn=ignore_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # not the global one, whose state belongs to the run
        )
        workers = iter(loader)
        try:
            for batch in workers:
                yield batch.to(device, non_blocking=True)
        except (ValueError, OSError, RuntimeError) as error:  # its text is a worker's traceback, or that it died
            if out_of_memory(error) or isinstance(error, torch.AcceleratorError):  # of the GPU's earlier work
                raise
            reason = re.sub("^(ValueError|OSError): ", "", str(error).splitlines()[-1])
            if re.search("(allocate|out of) shared memory", reason):  # a container's /dev/shm has 64 MB by default
                reason = "workers have no shared memory left; enlarge /dev/shm, or raise --memory-limit"
            raise OSError(reason) from error
        finally:
            workers._shutdown_workers()  # an error's traceback would keep them alive
            for worker in workers._workers:
                worker.kill()  # workers ignore SIGTERM, so kill any that are still running
    else:
        if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            images = images.to(device)
        ahead = device.type == "cuda"  # the host does not wait for the GPU's earlier work
        for indices in order:
            yield images[indices.to(images.device, non_blocking=ahead)].to(device, non_blocking=ahead)


def ignore_signals(_worker: int):
    """Ignore signals in workers: they reach all processes of a job, and the one that trains handles them."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images into float32 pixels in [0, 1] on a device, in the memory layout convolutions prefer."""
    return images.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)


def to_uint8(x: Tensor) -> Tensor:
    """Turn pixels in [0, 1] into uint8 images."""
    return (x * 255).round().to(torch.uint8)


def random_flip(x: Tensor, batch: int, seed: int, step: int) -> Tensor:
    """Mirror each of a rank's images (B, C, H, W) with probability 1/2, as a function of seed and step.

    Args:
        batch: the global batch size.
    """
    mirrored = torch.from_numpy(np.random.default_rng((seed, step, 1)).random(batch) < 0.5)
    mirrored = mirrored.tensor_split(world_size())[rank()]
    return torch.where(mirrored.to(x.device, non_blocking=True)[:, None, None, None], x.flip(-1), x)
