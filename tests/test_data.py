import gzip
import hashlib
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision import datasets

import data
from data import Unavailable, batch_indices, channel_stats, load_dataset, parts, to_pixels
from images import count_pixels


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


def test_mnist_is_loaded_as_uint8_with_its_own_test_split(mnist, tmp_path):
    loaded = load_dataset("mnist", tmp_path)
    assert loaded.train_images.shape == (60, 1, 28, 28) and loaded.train_images.dtype == torch.uint8
    assert loaded.test_images.shape == (20, 1, 28, 28) and loaded.test_labels.shape == (20,)
    raw = np.frombuffer(mnist["t10k-images-idx3-ubyte"].read_bytes(), np.uint8, offset=16)
    assert np.array_equal(loaded.test_images.flatten().numpy(), raw)


def test_missing_data_that_cannot_be_downloaded_is_unavailable(mnist, tmp_path):
    with pytest.raises(Unavailable, match="mnist is not in .* and cannot be downloaded"):
        load_dataset("mnist", tmp_path / "elsewhere")


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
    with pytest.raises(ValueError, match=f"{name} is (truncated|corrupt).* delete "):
        load_dataset("mnist", tmp_path)


def test_file_half_extracted_is_named_when_another_is_missing(mnist, tmp_path):
    damage(mnist["train-images-idx3-ubyte"], "truncated")
    mnist["t10k-labels-idx1-ubyte"].unlink()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is truncated"):
        load_dataset("mnist", tmp_path)


def test_half_downloaded_archive_is_named(mnist, tmp_path):
    path = mnist["train-images-idx3-ubyte"]
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:1000])
    path.unlink()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is truncated or corrupt; delete"):
        load_dataset("mnist", tmp_path)


def test_labels_must_be_as_many_as_images_and_classes(mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "calculate_md5", lambda path: data.MNIST_MD5[path.name])
    labels = mnist["train-labels-idx1-ubyte"]
    labels.write_bytes(idx(np.zeros(59, np.uint8)))
    with pytest.raises(ValueError, match="train has 60 images but 59 labels"):
        load_dataset("mnist", tmp_path)
    labels.write_bytes(idx(np.full(60, 10, np.uint8)))
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is corrupt: it holds the label 10"):
        load_dataset("mnist", tmp_path)


def test_bit_flip_is_found_by_the_archive_beside_the_file(mnist, tmp_path, monkeypatch):
    """Fashion-MNIST: torchvision knows the archive's checksum, and the archive its content's."""
    shutil.move(tmp_path / "MNIST", tmp_path / "FashionMNIST")
    folder = tmp_path / "FashionMNIST" / "raw"
    resources = []
    for path in sorted(folder.iterdir()):
        archive = path.with_name(path.name + ".gz")
        archive.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((archive.name, hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    assert len(load_dataset("fashion-mnist", tmp_path).train_images) == 60
    damage(folder / "train-images-idx3-ubyte", "one bit")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is corrupt: its checksum"):
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


def test_batches_are_a_function_of_seed_and_step_and_epochs_differ():
    first = [batch_indices(100, 10, 1, step).tolist() for step in range(20)]
    data.epoch_order.cache_clear()
    assert [batch_indices(100, 10, 1, step).tolist() for step in reversed(range(20))][::-1] == first
    assert first[:10] != first[10:] and batch_indices(100, 10, 2, 0).tolist() != first[0]


def test_channel_stats_are_those_of_numpy():
    images = torch.randint(0, 256, (50, 3, 9, 8), dtype=torch.uint8)
    mean, std = channel_stats(count_pixels(images))
    pixels = images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-5)


def test_pixels_are_in_0_to_1():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    assert to_pixels(images, torch.device("cpu")).flatten().tolist() == pytest.approx([0, 0.2, 1])


def test_cifar10_is_loaded_as_uint8_with_its_own_test_split_and_damaged_files_are_named(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels, md5s = {}, {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        pixels[name] = random.integers(0, 256, (4, 3072), np.uint8)
        content = {"data": pixels[name], "labels": [0, 1, 2, 3], "label_names": ["cat"]}
        (folder / name).write_bytes(pickle.dumps(content))
        md5s[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    source = datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [[name, md5s[name]] for name in md5s if "data" in name])
    monkeypatch.setattr(source, "test_list", [["test_batch", md5s["test_batch"]]])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5s["batches.meta"]})
    loaded = load_dataset("cifar10", tmp_path)
    assert loaded.train_images.shape == (20, 3, 32, 32) and loaded.train_labels.tolist() == [0, 1, 2, 3] * 5
    assert np.array_equal(loaded.test_images.flatten(1).numpy(), pixels["test_batch"])  # red, green, blue planes
    (folder / "data_batch_3").write_bytes(b"")
    with pytest.raises(ValueError, match="data_batch_3 is truncated or corrupt; delete it"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(("size", "lengths"), [(28, [100, 100, 50]), (150, [23] * 10 + [20]), (1024, [1] * 250)])
def test_parts_hold_all_images_in_order_and_of_large_ones_fewer(size, lengths):
    indices = parts(250, (size, size))
    assert [len(part) for part in indices] == lengths and torch.equal(torch.cat(indices), torch.arange(250))
