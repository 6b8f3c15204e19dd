import gzip
import hashlib
import io
import math
import os
import pickle
import shutil
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

from harness import data
from harness.data import (
    Unavailable,
    batch_indices,
    channel_stats,
    chunks,
    first_images,
    load_dataset,
    random_flip,
    to_pixels,
    to_uint8,
)
from harness.folder import count_pixels
from harness.storage import lock_folder

import numpy as np
import pytest
import torch
from conftest import SMALL, refusal, train
from sklearn.datasets import load_digits
from torchvision import datasets
from torchvision.transforms.functional import resize
from tqdm import tqdm

import train as script


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A data folder with a small MNIST, whose checksums count as the originals'; returns its four files by name."""
    random = np.random.default_rng(0)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, n in (("train", 60), ("t10k", 20)):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(random.integers(0, 256, (n, 28, 28), np.uint8)))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(random.integers(0, 10, n, np.uint8)))
    files = {path.name: path for path in folder.iterdir()}
    monkeypatch.setattr(data, "MNIST_MD5", {n: hashlib.md5(p.read_bytes()).hexdigest() for n, p in files.items()})
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    return files


def test_mnist_is_uint8_with_its_own_test_split(mnist, tmp_path):
    loaded = load_dataset("mnist", tmp_path)
    assert loaded.train_images.shape == (60, 1, 28, 28) and loaded.train_images.dtype == torch.uint8
    assert loaded.test_images.shape == (20, 1, 28, 28) and loaded.test_labels.shape == (20,)
    raw = np.frombuffer(mnist["t10k-images-idx3-ubyte"].read_bytes(), np.uint8, offset=16)
    assert np.array_equal(loaded.test_images.flatten().numpy(), raw)


def test_unchecked_files_of_old_versions_are_refused(mnist, tmp_path):
    """torchvision would load them in place of those that were checked."""
    (tmp_path / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        load_dataset("mnist", tmp_path)
        torch.save((torch.zeros(9, 28, 28, dtype=torch.uint8), torch.zeros(9)), tmp_path / "MNIST/processed" / name)
    with pytest.raises(ValueError, match=r"MNIST/processed, of an old torchvision, .*; delete it$"):
        load_dataset("mnist", tmp_path)


def test_missing_data_without_network_is_unavailable(mnist, tmp_path):
    before = socket.getdefaulttimeout()
    with pytest.raises(Unavailable, match="mnist is not in .* and cannot be downloaded"):
        load_dataset("mnist", tmp_path / "elsewhere")
    assert socket.getdefaulttimeout() == before


def test_tilde_is_a_folder_like_any_other(mnist, tmp_path, monkeypatch):
    """torchvision would read the home folder's files, which were not checked, and download to it."""
    roots = []

    def download(*_, download_root, **__):
        roots.append(download_root)

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", download)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unavailable, match="mnist is not in ~"):
        load_dataset("mnist", "~")
    assert roots and all(os.path.expanduser(root) == root for root in roots)


def test_lack_of_memory_blames_no_file(mnist, tmp_path, monkeypatch):
    def load(*_):
        raise MemoryError

    monkeypatch.setattr(datasets.MNIST, "_load_data", load)
    with pytest.raises(MemoryError):
        load_dataset("mnist", tmp_path)


def damage(path, how):
    content = path.read_bytes()
    kept = {"empty": 0, "header cut": 6, "truncated": len(content) // 2}
    if how in kept:
        path.write_bytes(content[: kept[how]])
    elif how == "trailing":
        path.write_bytes(content + b"more")
    elif how == "one bit":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif how == "type":  # the header says another type than bytes
        path.write_bytes(content[:2] + b"\x0a" + content[3:])
    elif how == "not idx":
        path.write_bytes(b"<html>not found</html>" * 99)


@pytest.mark.parametrize("how", ["empty", "header cut", "truncated", "trailing", "one bit", "type", "not idx"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_file_is_named(mnist, tmp_path, name, how):
    damage(mnist[name], how)
    with pytest.raises(ValueError, match=f"{name} is truncated or corrupt; delete .*{name}.gz, and run again"):
        load_dataset("mnist", tmp_path)


def test_half_extracted_file_is_named_before_downloading(mnist, tmp_path):
    damage(mnist["train-images-idx3-ubyte"], "truncated")
    mnist["t10k-labels-idx1-ubyte"].unlink()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is truncated or corrupt"):
        load_dataset("mnist", tmp_path)


def test_one_process_downloads_at_a_time(mnist, tmp_path, monkeypatch):
    """The second waits, and finds the files whole."""
    kept = {path: path.read_bytes() for path in mnist.values()}
    for path in kept:
        path.unlink()
    downloads = []

    def download(self):
        if not self._check_exists():
            downloads.append(1)
            for path, content in kept.items():
                path.write_bytes(content[:50])
                time.sleep(0.05)
                path.write_bytes(content)

    monkeypatch.setattr(datasets.MNIST, "download", download)
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: None)  # the two threads would mix theirs
    with ThreadPoolExecutor() as pool:
        loaded = list(pool.map(lambda _: load_dataset("mnist", tmp_path), range(2)))
    assert len(downloads) == 1 and [len(data.train_images) for data in loaded] == [60, 60]


def test_download_has_a_time_limit(mnist, tmp_path, monkeypatch):
    before, limits = socket.getdefaulttimeout(), []
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: limits.append(socket.getdefaulttimeout()))
    try:
        socket.setdefaulttimeout(7)
        with pytest.raises(Unavailable):
            load_dataset("mnist", tmp_path / "elsewhere")
        assert limits == [30] and socket.getdefaulttimeout() == 7
    finally:
        socket.setdefaulttimeout(before)


def test_data_and_run_may_share_a_folder(mnist, tmp_path):
    """The run has locked it already when it downloads."""
    with lock_folder(tmp_path), pytest.raises(Unavailable, match="Error downloading"):
        mnist["t10k-images-idx3-ubyte"].unlink()
        load_dataset("mnist", tmp_path)


def test_download_survives_a_full_stderr(mnist, tmp_path, monkeypatch):
    """Torchvision's bar would fail on it, with half an archive left."""
    for path in mnist.values():
        path.unlink()
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: tqdm(total=1).close())
    with open("/dev/full", "wb", buffering=0) as full, io.TextIOWrapper(full, write_through=True) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with pytest.raises(Unavailable, match="not found"):
            load_dataset("mnist", tmp_path)
        sys.stderr.close()  # what `say` put in its place


def test_half_downloaded_archive_is_named(mnist, tmp_path):
    path = mnist["train-images-idx3-ubyte"]
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:1000])
    path.unlink()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is truncated or corrupt; delete"):
        load_dataset("mnist", tmp_path)


@pytest.fixture
def fashion(mnist, tmp_path, monkeypatch):
    """A small Fashion-MNIST with its archives, whose checksums count as the originals'; returns its folder.

    torchvision knows the archives' checksums, and each archive that of its content.
    """
    shutil.move(tmp_path / "MNIST", tmp_path / "FashionMNIST")
    folder = tmp_path / "FashionMNIST" / "raw"
    resources = []
    for path in sorted(folder.iterdir()):
        archive = path.with_name(path.name + ".gz")
        archive.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    return folder


@pytest.mark.parametrize("how", ["one bit", "truncated", "type"])
def test_damage_is_found_by_the_archives_checksum(fashion, tmp_path, how):
    assert len(load_dataset("fashion-mnist", tmp_path).train_images) == 60
    damage(fashion / "train-images-idx3-ubyte", how)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is truncated or corrupt; delete"):
        load_dataset("fashion-mnist", tmp_path)


def test_files_without_archives_are_loaded(fashion, tmp_path):
    for archive in fashion.glob("*.gz"):
        archive.unlink()
    loaded = load_dataset("fashion-mnist", tmp_path)
    assert len(loaded.train_images) == 60 and loaded.test_labels.max() < 10


@pytest.mark.parametrize("how", ["empty", "header cut", "truncated", "type", "not idx"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damage_without_archives_is_a_users_error(fashion, tmp_path, name, how):
    """No checksum is known then, but the data set is named, and what to delete."""
    for archive in fashion.glob("*.gz"):
        archive.unlink()
    damage(fashion / name, how)
    with pytest.raises(ValueError, match="fashion-mnist in .* is damaged .*; delete .*FashionMNIST"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("labels", [np.zeros(59, np.uint8), np.full(60, 10, np.uint8)], ids=["too few", "unknown"])
def test_labels_must_fit_images_and_classes(fashion, tmp_path, labels):
    for archive in fashion.glob("*.gz"):
        archive.unlink()
    (fashion / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(ValueError, match="fashion-mnist in .* is damaged .*; delete .*FashionMNIST"):
        load_dataset("fashion-mnist", tmp_path)


def test_digits_are_scikit_learns_in_a_fixed_split():
    loaded = load_dataset("digits", "nowhere")
    assert loaded.train_images.shape == (1500, 1, 28, 28) and loaded.test_images.shape == (297, 1, 28, 28)
    assert loaded.train_images.dtype == torch.uint8 and loaded.train_images.max() > 250
    source = load_digits()
    assert loaded.test_labels.tolist() == source.target[1500:].tolist()
    assert loaded.train_labels.tolist() == source.target[:1500].tolist()
    for images, originals in ((loaded.train_images, source.images[:1500]), (loaded.test_images, source.images[1500:])):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float(), 8)[:, 0].flatten(1)
        for image, original in zip(small.numpy(), originals):
            assert np.corrcoef(image, original.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 10), (10, 25), (12, 4)])
def test_every_epoch_visits_every_image_once(n, batch_size):
    stream = torch.cat([batch_indices(n, batch_size, 7, step) for step in range(12)])
    for epoch in stream.split(n)[:-1]:
        assert sorted(epoch.tolist()) == list(range(n))


def test_batches_depend_on_seed_and_step_alone():
    first = [batch_indices(100, 10, 1, step).tolist() for step in range(20)]
    data.epoch_order.cache_clear()
    assert [batch_indices(100, 10, 1, step).tolist() for step in reversed(range(20))][::-1] == first
    assert first[:10] != first[10:] and batch_indices(100, 10, 2, 0).tolist() != first[0]


def test_channel_stats_match_numpy():
    images = torch.randint(0, 256, (50, 3, 9, 8), dtype=torch.uint8)
    mean, std = channel_stats(count_pixels(images))
    pixels = images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-5)


def test_pixels_are_in_0_to_1():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    assert to_pixels(images, torch.device("cpu")).flatten().tolist() == pytest.approx([0, 0.2, 1])


def test_pixels_are_rounded_to_levels():
    x = torch.tensor([0, 0.4, 0.6, 254.4, 254.6, 255]) / 255
    assert to_uint8(x).tolist() == [0, 0, 1, 254, 255, 255]


def test_images_of_one_level_can_be_normalised():
    mean, std = channel_stats(count_pixels(torch.full((5, 1, 4, 4), 51, dtype=torch.uint8)))
    assert mean.item() == pytest.approx(0.2) and std.item() == pytest.approx(1e-3)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A data folder with a small CIFAR-10, whose checksums count as the originals'; returns its pixels by file."""
    random = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels, md5s = {}, {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        pixels[name] = random.integers(0, 256, (4, 3072), np.uint8)
        content = {"data": pixels[name], "labels": [0, 1, 2, 3], "label_names": ["cat", "dog", "car", "bird"]}
        (folder / name).write_bytes(pickle.dumps(content))
        md5s[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    source = datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [[name, md5s[name]] for name in md5s if "data" in name])
    monkeypatch.setattr(source, "test_list", [["test_batch", md5s["test_batch"]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5s["batches.meta"]})
    return pixels


def test_cifar10_is_uint8_with_its_own_test_split(cifar10, tmp_path):
    loaded = load_dataset("cifar10", tmp_path)
    assert loaded.train_images.shape == (20, 3, 32, 32) and loaded.train_labels.tolist() == [0, 1, 2, 3] * 5
    assert loaded.train_images.dtype == torch.uint8
    planes = cifar10["test_batch"]  # red, green, blue
    assert np.array_equal(loaded.test_images.flatten(1).numpy(), planes)


def test_damaged_cifar10_file_is_named(cifar10, tmp_path):
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"")
    with pytest.raises(ValueError, match="data_batch_3 is truncated or corrupt; delete .*cifar-10-python.tar.gz"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(("size", "lengths"), [(28, [100, 100, 50]), (150, [23] * 10 + [20]), (1024, [1] * 250)])
def test_chunks_of_large_images_are_shorter(size, lengths):
    indices = chunks(250, (size, size))
    assert [len(chunk) for chunk in indices] == lengths and torch.equal(torch.cat(indices), torch.arange(250))


def test_first_images_are_fewer_of_large_ones(monkeypatch):
    images = torch.randint(0, 256, (50, 1, 4, 5), dtype=torch.uint8)
    monkeypatch.setattr(data, "CHUNK_PIXELS", 7 * 20)
    assert torch.equal(first_images(images, 30), images[:30])
    assert torch.equal(first_images(images, 99), images)
    monkeypatch.setattr(data, "FIRST_PIXELS", 9 * 20 + 1)
    assert torch.equal(first_images(images, 30), images[:9])


def test_image_size_scales_and_crops_named_sets():
    small, large = load_dataset("digits", image_size=16), load_dataset("digits")
    for images, originals in ((small.train_images, large.train_images), (small.test_images, large.test_images)):
        assert torch.equal(images, resize(originals, [16, 16], antialias=True))
    torch.testing.assert_close(small.mean, channel_stats(count_pixels(small.train_images))[0])


def test_named_sets_have_class_names(mnist, cifar10, tmp_path):
    assert load_dataset("mnist", tmp_path).class_names == list("0123456789")
    assert load_dataset("digits").class_names == list("0123456789")
    assert load_dataset("cifar10", tmp_path).class_names == ["cat", "dog", "car", "bird"]


def test_fashion_has_its_class_names(fashion, tmp_path):
    names = load_dataset("fashion-mnist", tmp_path).class_names
    assert len(names) == 10 and names[0] == "T-shirt/top" and names[9] == "Ankle boot"


def test_flip_depends_on_seed_and_step_alone():
    """Each image is mirrored left to right or left as it is, half of them; the global generator stays untouched."""
    x = torch.rand(400, 3, 5, 7)
    before = torch.get_rng_state()
    flipped = [random_flip(x, 400, seed, step) for seed, step in ((3, 8), (3, 8), (3, 9), (4, 8))]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(flipped[0], flipped[1])
    mirrored = [[torch.equal(a, b.flip(-1)) for a, b in zip(images, x)] for images in flipped]
    for images, flags in zip(flipped, mirrored):
        assert all(flag or torch.equal(a, b) for flag, a, b in zip(flags, images, x))
        assert 150 < sum(flags) < 250
    assert mirrored[0] != mirrored[2] and mirrored[0] != mirrored[3]


def test_ranks_flip_what_one_process_would(monkeypatch):
    x = torch.rand(11, 1, 4, 4)
    whole = random_flip(x, 11, 0, 5)
    monkeypatch.setattr(data, "world_size", lambda: 3)
    parts = []
    for rank, part in enumerate(x.tensor_split(3)):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        parts.append(random_flip(part, 11, 0, 5))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("color", ["colourless", "#12", "", "line\nbreak", "rgb(300,0,0)"])
def test_unknown_background_is_refused(capsys, color):
    assert "is not a colour; use a name" in refusal(capsys, script, f"--background={color}")


@pytest.mark.parametrize("name", data.IDX)
def test_each_name_loads_its_data_set(name):
    assert data.IDX[name].__name__.lower() == name.replace("-", "")


@pytest.mark.parametrize(("in_memory", "limit"), [(True, math.inf), (False, 0)])
def test_ranks_keep_images_where_rank_0_does(folder, tmp_path, monkeypatch, in_memory, limit):
    """Their machine may have more or less memory, and their batches would be read in another way."""
    monkeypatch.setattr(data, "rank", lambda: 1)
    monkeypatch.setattr(data, "from_rank_0", lambda *_: (str(folder), in_memory))
    with patch.object(data, "load_dataset", wraps=data.load_dataset) as load:
        data.load_training_data(script.parse_args([*SMALL, f"--out-dir={tmp_path}", "--memory-limit=1"]))
    _name, _data_dir, _size, _background, memory_limit, *_ = load.call_args.args
    assert memory_limit == limit


def test_folder_is_decoded_once_for_all_runs(folder, tmp_path, monkeypatch):
    flags = [f"--dataset={folder}", "--steps=1", "--batch-size=4"]
    train(tmp_path, *flags)
    assert (tmp_path / "images.pt").is_file()
    monkeypatch.setattr("harness.folder.decode", None)
    train(tmp_path, *flags, "--seed=1")
