"""Data sets as uint8 tensors, and batches whose order is a function of the seed and the step.

Shapes: N images, B batch, C channels
    images  (N, C, H, W) uint8
    labels  (N,) int64
"""

import functools
import http.client
import socket
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5, check_integrity
from torchvision.transforms.functional import resize

TORCHVISION = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
NAMES = (*TORCHVISION, "digits")
# torchvision knows the checksums of the archives, not of the files in them, and never looks at those again.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class Dataset(NamedTuple):
    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Unavailable(ValueError):
    """The data set is not on disk and cannot be downloaded."""


def load_dataset(name: str, data_dir: str | Path) -> Dataset:
    """Load a data set whole, downloading it into `data_dir` when it is missing.

    Raises:
        Unavailable: it is neither in `data_dir` nor can it be downloaded.
        ValueError: a file of it is truncated or corrupt; the message names the file.
    """
    if name == "digits":
        return load_digits_28()
    source = TORCHVISION[name]
    check_files(source, data_dir)  # before torchvision reads them: what it makes of broken ones names none
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer
    try:
        train = source(data_dir, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        check_files(source, data_dir, archives=True)
        reason = " ".join(str(error).split())
        raise Unavailable(f"{name} is not in {data_dir} and cannot be downloaded ({reason})") from error
    finally:
        socket.setdefaulttimeout(timeout)
    check_files(source, data_dir)
    test = source(data_dir, train=False)
    return Dataset(name, train.data[:, None], train.targets, test.data[:, None], test.targets)


def load_digits_28() -> Dataset:
    """Load scikit-learn's embedded 1,797 digits of 8x8 pixels, resized to 28x28; the last 297 are the test set."""
    digits = load_digits()
    images = torch.from_numpy(digits.images[:, None] * (255 / 16)).float()  # (N, 1, 8, 8), 17 grey levels
    images = resize(images, [28, 28], antialias=True).round().clamp(0, 255).to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    return Dataset("digits", images[:1500], labels[:1500], images[1500:], labels[1500:])


def check_files(source: type[datasets.MNIST], data_dir: str | Path, archives: bool = False):
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


def channel_stats(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each channel, (C,) float32, of pixels in [0, 1]."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)  # (C, 256): a histogram, so that no float copy of the images is made
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


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Turn uint8 images into float32 pixels in [0, 1] on a device, in the memory layout convolutions prefer."""
    return images.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
