"""Data sets as uint8 images, in memory or on disk, and batches whose order is a function of the seed and the step.

Shapes: N images, B batch, C channels
    images  (N, C, H, W) uint8      a tensor, or `ImageFiles` where they do not fit in memory
    labels  (N,) int64              None where the images have none
"""

import functools
import http.client
import math
import os
import signal
import socket
import zlib
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5, check_integrity
from torchvision.transforms.functional import resize

from images import ImageFiles, Images, count_pixels, fit, load_folder

IDX = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
NAMES = (*IDX, "cifar10", "digits")
PART_PIXELS = 2**19  # that are measured, encoded or drawn at once: larger images, fewer of them
# torchvision knows the checksums of the archives, not of the files in them, and never looks at those again.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Dataset(NamedTuple):
    name: str
    train_images: Images
    train_labels: Tensor | None
    test_images: Images
    test_labels: Tensor | None
    mean: Tensor  # (C,) of the training images' pixels in [0, 1]
    std: Tensor
    digest: str  # the same for the same images


class Unavailable(ValueError):
    """The data set is not on disk and cannot be downloaded."""


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    memory_limit: float | None = None,
    skip_bad_images: bool = False,
    cache: Path | None = None,
) -> Dataset:
    """Load a data set by name, downloading it into `data_dir` when it is missing, or a folder of images by its path.

    Args:
        image_size: scale the short side to this many pixels, and crop the centre. Without it all must share one size.
        memory_limit: in GB; a folder of more than this, uint8, is read from disk while training. None: half of what is
            free.
        skip_bad_images: leave out images of a folder that cannot be decoded.
        cache: file that a folder's images, once decoded, are kept in until the folder changes.

    Raises:
        Unavailable: it is neither in `data_dir` nor can it be downloaded.
        ValueError: a file of it is truncated or corrupt; the message names the file.
    """
    if name not in NAMES:
        if not Path(name).is_dir():
            raise ValueError(f"--dataset {name} is neither a folder nor one of {', '.join(NAMES)}")
        *splits, counts, digest = load_folder(Path(name), image_size, memory_limit, skip_bad_images, cache)
        return Dataset(Path(name).resolve().name, *splits, *channel_stats(counts), digest)
    train, test = digits() if name == "digits" else torchvision_splits(name, data_dir)
    if image_size is not None:
        train, test = (  # in parts, each of which takes several times its memory while it is scaled
            (torch.cat([fit(part, image_size) for part in images.split(1000)]), labels)
            for images, labels in (train, test)
        )
    return Dataset(name, *train, *test, *channel_stats(count_pixels(train[0])), digest=name)


def dataset_of(checkpoint: dict, data_dir: str | None = None, cache: Path | None = None) -> Dataset:
    """Load the data set that a run was trained on, from `data_dir` if it is elsewhere now.

    Raises:
        ValueError: it cannot be loaded, or it has changed.
    """
    args = checkpoint["args"]
    options = {name: args[name] for name in ("image_size", "memory_limit", "skip_bad_images")}
    name = args["dataset"] if args["dataset"] in NAMES or data_dir is None else data_dir
    if not (name in NAMES or Path(name).is_dir()):
        raise ValueError(f"{name} is not there, and needs to be the run's folder of images; name it with --data-dir")
    data = load_dataset(name, data_dir or args["data_dir"], **options, cache=cache)
    check_same(data, checkpoint)
    return data


def check_same(data: Dataset, checkpoint: dict):
    """Raise ValueError unless these are the images that a run was trained on."""
    if data.digest != checkpoint["data"]:
        trained_on = checkpoint["args"]["dataset"]
        raise ValueError(
            f"the images of {data.name} are not those that the run was trained on, {trained_on}, as it was"
        )


def torchvision_splits(name: str, data_dir: str | Path) -> list[tuple[Tensor, Tensor]]:
    source, check = (datasets.CIFAR10, check_cifar) if name == "cifar10" else (IDX[name], check_idx_files)
    check(source, data_dir)  # before torchvision reads them: what it makes of broken ones names none
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer
    try:
        train = source(data_dir, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        check(source, data_dir, archives=True)
        reason = " ".join(str(error).split())
        raise Unavailable(f"{name} is not in {data_dir} and cannot be downloaded ({reason})") from error
    finally:
        socket.setdefaulttimeout(timeout)
    check(source, data_dir)
    splits = []
    for split in (train, source(data_dir, train=False)):
        images = torch.as_tensor(split.data)  # (N, H, W), or (N, H, W, C)
        images = images[:, None] if images.ndim == 3 else images.movedim(-1, 1).contiguous()
        splits.append((images, torch.as_tensor(split.targets)))
    return splits


def digits() -> list[tuple[Tensor, Tensor]]:
    """Return scikit-learn's embedded 1,797 digits of 8x8 pixels, resized to 28x28; the last 297 are the test set."""
    source = load_digits()
    images = torch.from_numpy(source.images[:, None] * (255 / 16)).float()  # (N, 1, 8, 8), 17 grey levels
    images = resize(images, [28, 28], antialias=True).round().clamp(0, 255).to(torch.uint8)
    labels = torch.from_numpy(source.target).long()
    return [(images[:1500], labels[:1500]), (images[1500:], labels[1500:])]


def check_idx_files(source: type[datasets.MNIST], data_dir: str | Path, archives: bool = False):
    """Raise ValueError naming the first of the four files that is truncated or corrupt; missing files are no error.

    With `archives`, a damaged archive of a missing file counts as well.
    """
    folder = Path(data_dir, source.__name__, "raw")
    counts = {}
    for archive, archive_md5 in source.resources:
        path = folder / archive.removesuffix(".gz")
        remedy = f"delete {path} and {path.name}.gz, and run again to download them"
        if not path.is_file():
            if archives and (folder / archive).is_file() and not check_integrity(folder / archive, archive_md5):
                raise ValueError(f"{folder / archive} is truncated or corrupt; {remedy}")
            continue
        counts[path.name] = check_idx(path, remedy)
        if source is datasets.MNIST:
            intact = calculate_md5(path) == MNIST_MD5[path.name]
        elif check_integrity(folder / archive, archive_md5):  # the archive's trailer holds its content's CRC-32
            trailer = (folder / archive).read_bytes()[-8:-4]
            intact = zlib.crc32(path.read_bytes()) == int.from_bytes(trailer, "little")
        else:
            intact = True  # copied here without its archive: the structure is all that can be checked
        if not intact:
            raise ValueError(f"{path} is corrupt: its checksum is not that of the original; {remedy}")
    for split in ("train", "t10k"):
        images, labels = (counts.get(f"{split}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images is not None and labels is not None and images != labels:
            raise ValueError(f"{folder}: {split} has {images} images but {labels} labels; delete the folder {folder}")


def check_idx(path: Path, remedy: str) -> int:
    """Check an IDX file's header against its size and return its number of items."""
    content = path.read_bytes()
    ndim = 3 if "images" in path.name else 1
    size = 4 + 4 * ndim
    header = np.frombuffer(content[:size].ljust(size, b"\0"), dtype=">u4")  # magic number, then the dimensions
    if header[0] != 0x0800 + ndim:
        raise ValueError(f"{path} is corrupt: it does not begin as an IDX file of {ndim} dimensions; {remedy}")
    expected = size + int(np.prod(header[1:], dtype=np.int64))
    if len(content) != expected:
        raise ValueError(f"{path} is truncated or corrupt: {len(content)} bytes, its header needs {expected}; {remedy}")
    if ndim == 1 and (labels := np.frombuffer(content, np.uint8, offset=8)).max(initial=0) > 9:
        raise ValueError(f"{path} is corrupt: it holds the label {labels.max()}, but the classes are 0 to 9; {remedy}")
    if header[1] == 0 or (ndim == 3 and (*header[2:],) != (28, 28)):
        raise ValueError(f"{path} is corrupt: its header says {tuple(map(int, header[1:]))}, not n x 28 x 28; {remedy}")
    return int(header[1])


def check_cifar(source: type[datasets.CIFAR10], data_dir: str | Path, archives: bool = False):
    """Raise ValueError naming the first file that is truncated or corrupt; missing files are no error."""
    folder = Path(data_dir, source.base_folder)
    files = [(folder / name, md5) for name, md5 in source.train_list + source.test_list]
    files += [(Path(data_dir, source.filename), source.tgz_md5)] if archives else []
    for path, md5 in files:
        if path.is_file() and not check_integrity(path, md5):
            raise ValueError(f"{path} is truncated or corrupt; delete it, and run again to download it")


def channel_stats(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation, (C,) float32, of pixels in [0, 1] of which each level is counted."""
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
    """Return which of n images make the batch of a step, counted from 0: (batch_size,) int64.

    The epochs' orders follow one another without a gap, so that every image is visited once per epoch even where
    the batch size does not divide n.
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    epochs = range(start // n, (stop - 1) // n + 1)
    parts = [epoch_order(n, seed, e)[max(start - e * n, 0) : stop - e * n] for e in epochs]
    return torch.cat(parts)


def parts(count: int, image_size: tuple[int, int], most: int = 100) -> tuple[Tensor, ...]:
    """Return the indices of `count` images of (H, W) pixels in batches of `most`, or of fewer large ones."""
    return torch.arange(count).split(max(1, min(most, PART_PIXELS // math.prod(image_size))))


def batches(images: Images, order: Iterable[Tensor], device: torch.device) -> Generator[Tensor, None, None]:
    """Yield, for each of `order`'s indices (B,), these images (B, C, H, W) uint8 on a device.

    Those on disk are decoded ahead of time by worker processes.

    Raises:
        OSError: one of them cannot be read or decoded.
    """
    if isinstance(images, ImageFiles):
        loader = DataLoader(
            images,
            batch_sampler=(indices.tolist() for indices in order),
            num_workers=min(8, processors()),
            worker_init_fn=ignore_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # not the global one, whose state is the run's
        )
        workers = iter(loader)
        try:
            for batch in workers:
                yield batch.to(device, non_blocking=True)
        except (ValueError, RuntimeError) as error:  # with the traceback of the worker, or of its death
            raise OSError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from error
        finally:
            workers._shutdown_workers()  # an error's traceback would keep them
            for worker in workers._workers:
                worker.kill()  # had it not the time to end, its SIGTERM was ignored
    else:
        if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            images = images.to(device)
        ahead = device.type == "cuda"  # the host does not wait until the GPU has done what it was told before
        for indices in order:
            yield images[indices.to(images.device, non_blocking=ahead)].to(device, non_blocking=ahead)


def processors() -> int:
    """Return how many processors this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_signals(_worker: int):
    """Leave Ctrl-C and SIGTERM, which reach all processes of a job, to the process that trains."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images into float32 pixels in [0, 1] on a device, in the memory layout convolutions prefer."""
    return images.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
