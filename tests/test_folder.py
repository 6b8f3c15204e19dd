"""Folders of images: what is found in them, how they are decoded, and that it is the same from memory and from disk."""

import errno
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

from harness import data as dataset
from harness import folder as folders
from harness import machine
from harness.data import (
    batch_indices,
    batches,
    channel_stats,
    dataset_of,
    load_dataset,
    load_training_data,
)
from harness.folder import ImageFiles, count_pixels, decode, resize_and_crop, walk
from harness.storage import is_ours, lock_folder

import numpy as np
import psutil
import pytest
import torch
from conftest import SMALL, refusal, save, started
from PIL import EpsImagePlugin, Image
from torchvision.transforms.functional import resize

import train as script


def load(folder, **options):
    return load_dataset(str(folder), **options)


def test_folders_are_the_splits_and_classes(folder):
    data = load(folder)
    assert data.train_images.shape == (20, 3, 12, 16) and data.test_images.shape == (10, 3, 12, 16)
    for split, found, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        on_disk = {}
        for path in (folder / split).rglob("*.png"):
            on_disk[np.asarray(Image.open(path)).tobytes()] = ("cat", "dog").index(path.parent.name)
        assert sorted(on_disk) == sorted(image.movedim(0, -1).numpy().tobytes() for image in found)
        assert [on_disk[image.movedim(0, -1).numpy().tobytes()] for image in found] == labels.tolist()
    assert len(data.test_labels[:5].unique()) == 2  # shuffled
    torch.testing.assert_close((data.mean, data.std), channel_stats(count_pixels(data.train_images)))


@pytest.mark.parametrize("flat", [True, False])
def test_same_tenth_is_held_out_without_test_folder(tmp_path, flat):
    for i in range(50):
        save(tmp_path / ("" if flat else f"class{i % 3}") / f"{i:02}.jpg", quality=95)
    first, again = load(tmp_path), load(tmp_path)
    assert len(first.train_images) == 45 and len(first.test_images) == 5
    assert torch.equal(first.test_images, again.test_images)
    assert (first.train_labels is None) == flat
    assert first.class_names == (None if flat else ["class0", "class1", "class2"])
    both = torch.cat([first.train_images, first.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == 50
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    (tmp_path / "train").parent.mkdir()
    shutil.move(tmp_path.with_name("moved"), tmp_path / "train")
    assert torch.equal(load(tmp_path).test_images, first.test_images)  # train/ alone is split alike


def test_reads_formats_grey_and_alpha(tmp_path):
    for name, mode in (("a.PNG", "L"), ("b.jpg", "L"), ("c.jpeg", "L")):
        save(tmp_path / "grey" / name, mode=mode)
    deep = np.arange(192, dtype=np.uint16).reshape(12, 16) * 257
    Image.fromarray(deep).save(tmp_path / "grey" / "deep.png")
    data = load(tmp_path / "grey")
    both = torch.cat([data.train_images, data.test_images])
    assert both.shape == (4, 1, 12, 16)
    assert any(np.array_equal(image[0], deep // 257) for image in both.numpy())
    save(tmp_path / "grey" / "colour.webp")
    pixels = save(tmp_path / "grey" / "colour.png", mode="RGBA")
    data = load(tmp_path / "grey")
    both = torch.cat([data.train_images, data.test_images])
    assert both.shape == (6, 3, 12, 16)
    alpha = pixels[..., 3:] / 255
    over_white = (pixels[..., :3] * alpha + 255 * (1 - alpha)).transpose(2, 0, 1)
    assert any(np.abs(image - over_white).max() < 1 for image in both.numpy())


def test_photos_are_turned_by_their_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # 90 degrees
    upright = [save(tmp_path / f"{i}.png", shape=(16, 12)) for i in range(2)]
    pixels = save(tmp_path / "turned.png", shape=(12, 16), exif=exif)
    data = load(tmp_path)
    both = torch.cat([data.train_images, data.test_images]).numpy()
    for expected in (*upright, np.rot90(pixels, -1)):
        assert any(np.array_equal(image, expected.transpose(2, 0, 1)) for image in both)


def test_differing_sizes_need_an_image_size(tmp_path):
    for i, shape in enumerate([(12, 16)] * 3 + [(20, 10)] * 2):
        save(tmp_path / f"{i}.png", shape=shape)
    with pytest.raises(ValueError, match=r"differ in size: 16x12 \(3 images\), 10x20 \(2 images\); .* --image-size"):
        load(tmp_path)
    data = load(tmp_path, image_size=8)
    assert data.train_images.shape == (4, 3, 8, 8)
    small = resize(Image.open(tmp_path / "3.png"), 8)  # 8 wide, 16 high
    expected = np.asarray(small)[4:12].transpose(2, 0, 1)
    assert any(np.array_equal(image, expected) for image in torch.cat([data.train_images, data.test_images]).numpy())


@pytest.mark.parametrize("kind", ["PIL", "tensor"])
@pytest.mark.parametrize("high", [False, True])
def test_resize_keeps_the_shape_and_crops_the_centre(kind, high):
    """A wide ramp loses as much on the left as on the right, a high one as much at the top as at the bottom."""
    ramp = torch.arange(0, 240, dtype=torch.uint8).expand(120, 240)
    image = (ramp.T if high else ramp).contiguous()
    if kind == "tensor":
        small = resize_and_crop(image[None], 40)[0]
    else:
        small = torch.from_numpy(np.array(resize_and_crop(Image.fromarray(image.numpy()), 40)))
    small = (small.T if high else small).int()
    assert small.shape == (40, 40) and (small == small[0]).all()  # nothing changes along the short side
    expected = torch.arange(40) * 3 + 61  # of the 120 pixels in the middle, three make one
    assert (small[0] - expected).abs().max() <= 1


def test_disk_and_memory_give_the_same_batches(folder):
    memory, disk = load(folder), load(folder, memory_limit=0)
    assert isinstance(disk.train_images, ImageFiles) and disk.train_images.shape == memory.train_images.shape
    assert torch.equal(memory.mean, disk.mean) and torch.equal(memory.std, disk.std)
    assert torch.equal(memory.train_labels, disk.train_labels)
    before = torch.get_rng_state()
    for of_memory, of_disk in ((memory.train_images, disk.train_images), (memory.test_images, disk.test_images)):
        order = [batch_indices(len(of_memory), 6, 3, step) for step in range(9)]
        pairs = zip(*(batches(source, order, torch.device("cpu")) for source in (of_memory, of_disk)), strict=True)
        assert sum(torch.equal(a, b) for a, b in pairs) == 9
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_limit_decides_between_memory_and_disk(folder, monkeypatch):
    size = 30 * 3 * 12 * 16
    assert isinstance(load(folder, memory_limit=size / 1e9).train_images, torch.Tensor)
    assert isinstance(load(folder, memory_limit=(size - 1) / 1e9).train_images, ImageFiles)
    monkeypatch.setattr(folders, "free_memory", lambda: 2 * size - 2)
    assert isinstance(load(folder).train_images, ImageFiles)


@pytest.mark.parametrize("place", [0, 1], ids=["cgroup v2", "cgroup v1"])
@pytest.mark.parametrize(("limit", "kind"), [("max\n", torch.Tensor), ("9999\n", ImageFiles)])
def test_container_limit_decides_too(folder, tmp_path, monkeypatch, place, limit, kind):
    """The machine around it has more than the 17,280 bytes that the images take."""
    paths = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(machine, "CONTAINER_LIMITS", paths)
    assert isinstance(load(folder).train_images, torch.Tensor)
    paths[place].write_text(limit)
    assert isinstance(load(folder).train_images, kind)


def test_folder_locked_by_another_run_is_not_written_to(folder, tmp_path):
    """As the page of demo.py, which takes no lock, would do beside a training."""
    with started([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        (tmp_path / ".lock.pid").write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}")
        load(folder, cache=tmp_path / "images.pt")
    assert not (tmp_path / "images.pt").exists()


def test_decoded_images_are_kept_until_folder_changes(folder, tmp_path, monkeypatch):
    cache, decoded = tmp_path / "images.pt", []
    original = folders.decode
    monkeypatch.setattr(folders, "decode", lambda path, *a: (decoded.append(path), original(path, *a))[1])

    def times_decoded(**options):
        decoded.clear()
        data = load(folder, cache=cache, **options)
        fresh = load(folder, **options)
        assert torch.equal(data.test_images[:], fresh.test_images[:]) and torch.equal(data.mean, fresh.mean)
        return len(decoded) - 30

    assert times_decoded() == 30
    assert times_decoded() == 0
    assert times_decoded(image_size=8) == 30
    assert times_decoded(image_size=8) == 0
    path = folder / "test" / "cat" / "0.png"
    content = path.read_bytes()
    save(path, mode="L")  # and so it changes its size on disk
    assert times_decoded() == 30
    path.write_bytes(content)
    os.utime(path, ns=(0, 10**18))
    assert times_decoded() == 30
    os.utime(path, ns=(0, 10**18 + 1))  # of the same size, changed at another time
    assert times_decoded() == 30
    os.utime(path, ns=(0, 10**18 + 1))  # as after a copy that keeps the time of modification
    assert times_decoded() == 30
    monkeypatch.setattr(folders.PIL, "__version__", "0")
    assert times_decoded() == 30
    monkeypatch.setattr(folders, "DECODER", "next")
    assert times_decoded() == 30
    path.rename(folder / "train" / "cat" / "new.png")  # of the same number
    assert times_decoded() == 30
    (folder / "train" / "cat" / "new.png").rename(path)
    assert times_decoded() == 30
    cache.write_bytes(cache.read_bytes()[:-100])
    assert times_decoded() == 30
    cache.write_bytes(b"")
    assert times_decoded() == 30
    assert not list(tmp_path.glob("*.tmp"))


def test_cache_of_another_folder_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "times_digest", lambda *_: "the same")
    for name in ("a", "b"):
        for i in range(10):
            save(tmp_path / name / f"{i}.bmp")
            os.utime(tmp_path / name / f"{i}.bmp", ns=(0, 0))
    first, second = (load(tmp_path / name, cache=tmp_path / "images.pt") for name in ("a", "b"))
    assert not torch.equal(first.train_images, second.train_images)


@pytest.mark.parametrize("memory_limit", [None, 0])
def test_image_with_bad_header_shifts_no_other(folder, monkeypatch, memory_limit):
    expected = load(folder)
    bad, original = folder / "train" / "cat" / "3b.png", folders.read_header
    save(bad)
    monkeypatch.setattr(
        folders, "read_header", lambda path, *args: original(path if path != bad else folder / "none", *args)
    )
    left = load(folder, memory_limit=memory_limit, skip_bad_images=True)
    assert len(left.train_images) == len(left.train_labels) == 20 and len(left.test_labels) == 10
    for before, after in ((expected.train_images, left.train_images), (expected.test_images, left.test_images)):
        assert len(before) == len(after) and all(torch.equal(before[i], after[i]) for i in range(len(before)))


def test_broken_links_and_odd_sizes_are_named(folder, capsys):
    (folder / "train" / "cat" / "link.png").symlink_to("nowhere")
    path = folder / "train" / "cat" / "large.png"
    save(path, shape=(40, 50))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(
        ValueError, match="2 of the 32 images .* train/cat/(link|large).png .*, train/cat/(link|large).png"
    ):
        load(folder)
    assert len(load(folder, skip_bad_images=True).train_images) == 20


def test_names_in_another_encoding_are_read(tmp_path):
    for i in range(10):
        save(tmp_path / "photos" / f"{i}.png")
    try:
        os.rename(tmp_path / "photos" / "0.png", os.fsencode(tmp_path / "photos") + b"/caf\xe9.png")
    except OSError:
        pytest.skip("names are UTF-8 here")
    assert len(load(tmp_path / "photos", cache=tmp_path / "images.pt").train_images) == 9


def test_images_are_walked_in_the_order_of_names(tmp_path):
    """Not in os.walk's order, which lists a folder's files before its subfolders."""
    paths = [tmp_path / name for name in ("a/y.png", "a/z.png", "b.png", "c/x.png")]
    for path in reversed(paths):
        save(path)
    assert walk(tmp_path) == paths


def test_circular_links_count_no_image_twice(folder):
    (folder / "train" / "again").symlink_to(folder / "train")
    assert len(load(folder).train_images) == 20


def test_links_between_classes_lose_no_class(folder):
    (folder / "train" / "cat" / "more").mkdir()
    save(folder / "train" / "cat" / "more" / "x.png")
    (folder / "train" / "dog" / "more").symlink_to(folder / "train" / "cat" / "more")
    found = [path.relative_to(folder / "train").as_posix() for path in walk(folder / "train")]
    assert len(found) == 22 and "cat/more/x.png" in found and "dog/more/x.png" in found


def test_long_image_takes_no_more_memory(tmp_path):
    save(tmp_path / "long.png", (1, 2_000_000), "L")
    with pytest.raises(ValueError, match="scaled to cover 28x28, it would have 1,568,000,000 pixels, more than"):
        decode(tmp_path / "long.png", 1, 28)


def test_user_file_named_like_cache_is_kept(folder, tmp_path, capsys):
    (tmp_path / "images.pt").write_text("not ours")
    load(folder, cache=tmp_path / "images.pt")
    assert "moved images.pt in" in capsys.readouterr().out
    [kept] = tmp_path.glob("*/images.pt")
    assert kept.read_text() == "not ours" and is_ours(tmp_path / "images.pt")


def test_lone_test_folder_is_never_trained_on(folder):
    for kind in ("cat", "dog"):
        (folder / "train" / kind).rename(folder / kind)
    (folder / "train").rmdir()
    with pytest.raises(ValueError, match="has a folder test/ but no train/; move its other images"):
        load(folder)


def test_image_resized_while_training_is_named(folder):
    data = load(folder, memory_limit=0)
    path = data.train_images.paths[3]
    save(path, shape=(20, 20))
    with pytest.raises(OSError, match="has changed its size to 20x20 pixels"):
        list(batches(data.train_images, torch.arange(20).split(5), torch.device("cpu")))


@pytest.mark.skipif(sys.platform == "win32", reason="signals reach processes as Unix sends them")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_workers_cost_no_image(folder, signum):
    """They reach all processes of a job; what to do is for the one that asked for the images."""
    order, others = torch.arange(20).repeat(20).split(2), psutil.Process().children()
    stream = batches(load(folder, memory_limit=0).train_images, order, torch.device("cpu"))
    count = sum(len(next(stream)) for _ in range(8))  # of each worker one at least: all have started
    workers = [process for process in psutil.Process().children() if process not in others]
    for worker in workers:
        worker.send_signal(signum)
    assert workers and count + sum(map(len, stream)) == 400


def test_unwritable_cache_does_not_stop_loading(folder, tmp_path, capsys):
    assert len(load(folder, cache=tmp_path / "nowhere" / "images.pt").train_images) == 20
    assert "cannot keep the decoded images" in capsys.readouterr().err


@pytest.mark.parametrize("memory_limit", [None, 0])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_bad_images_are_left_out_only_when_asked(folder, tmp_path, capsys, damage, memory_limit):
    bad = folder / "train" / "dog" / "7.png"
    content = bad.read_bytes()
    bad.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not an image" * 50}[damage])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=r"1 of the 30 images .* cannot be decoded: train/dog/7.png .*--skip-bad"):
            load(folder, memory_limit=memory_limit, cache=tmp_path / "images.pt")
        data = load(folder, memory_limit=memory_limit, skip_bad_images=True, cache=tmp_path / "images.pt")
        assert "left out 1 images that cannot be decoded: train/dog/7.png" in capsys.readouterr().err
        assert len(data.train_images) == len(data.train_labels) == 19 and data.train_labels.sum() == 9


def test_image_damaged_while_training_is_named(folder):
    data = load(folder, memory_limit=0)
    path = data.train_images.paths[11]
    path.write_bytes(b"")
    with pytest.raises(OSError, match=r"cat|dog") as error:
        list(batches(data.train_images, torch.arange(20).split(5), torch.device("cpu")))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_folder_without_images_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match="neither a folder nor one of mnist.* give its new path"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden.png").write_bytes(b"")
    with pytest.raises(ValueError, match="empty holds no images"):
        load(tmp_path / "empty")
    shutil.rmtree(folder / "test" / "cat")
    shutil.rmtree(folder / "test" / "dog")
    with pytest.raises(ValueError, match="test holds no images"):
        load(folder)
    save(tmp_path / "one" / "a.png")
    with pytest.raises(ValueError, match="1 good images, 0 of them to train on"):
        load(tmp_path / "one")


@pytest.mark.parametrize("named", [None, "elsewhere"])
def test_moved_folder_is_asked_for_with_data_dir(folder, tmp_path, named):
    args = {"dataset": str(folder), "data_dir": "", "image_size": None, "background": "white"}
    args |= {"memory_limit": None, "skip_bad_images": False}
    run = {"args": args, "identity": {"images": load(folder).digest}}
    folder.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"{named or folder}, does not exist.*--data-dir"):
        dataset_of(run, tmp_path, named)
    assert len(dataset_of(run, tmp_path, str(tmp_path / "moved")).train_images) == 20


def test_changed_folder_is_not_the_runs(folder, tmp_path):
    args = {"dataset": str(folder), "data_dir": "", "image_size": None, "background": "white"}
    args |= {"memory_limit": None, "skip_bad_images": False}
    run = {"args": args, "identity": {"images": load(folder).digest}}
    load(folder).write_listing(tmp_path)
    (folder / "train" / "cat" / "0.png").unlink()
    save(folder / "train" / "cat" / "new.png")
    (folder / "test" / "dog" / "1.png").write_bytes((folder / "test" / "dog" / "2.png").read_bytes())
    with pytest.raises(ValueError, match="not those that the run was trained on") as refused:
        dataset_of(run, tmp_path)
    found = "1 added (train/cat/new.png ...), 1 removed (train/cat/0.png ...), 1 changed (test/dog/1.png ...)"
    assert str(refused.value).endswith(found)


def test_run_keeps_its_background_and_its_gaps(tmp_path):
    """Those of its flags: when it loads its images, and when another script loads them again."""
    for i in range(10):
        save(tmp_path / "photos" / f"{i}.png", mode="RGBA")
    (tmp_path / "photos" / "bad.png").write_bytes(b"")
    flags = [f"--dataset={tmp_path / 'photos'}", f"--out-dir={tmp_path}", "--background=black", "--skip-bad-images"]
    args = script.parse_args(flags)
    expected = load(tmp_path / "photos", background="black", skip_bad_images=True)
    loaded = load_training_data(args)
    again = dataset_of({"args": vars(args), "identity": {"images": loaded.digest}}, tmp_path)
    for found in (loaded, again):
        assert len(found.train_images) == 9 and torch.equal(found.train_images, expected.train_images)


# Every kind of image


def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def save_deep_png(path, values, transparent):
    """Save 16 bits of grey of which one level is transparent, which Pillow cannot write."""
    height, width = values.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 0, 0, 0, 0])
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [chunk(b"IHDR", header), chunk(b"tRNS", transparent.to_bytes(2, "big"))]
    chunks += [chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def save_deep_tiff(path, values, bits, white=0):
    """Save 12 or 16 bits of grey, which Pillow cannot write; with white=1, 0 is black, as in PNG."""
    height, width = values.shape
    if bits == 12:  # two pixels in three bytes
        pairs = values.reshape(-1, 2).astype(int)
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        content = packed.astype(np.uint8).tobytes()
    else:
        content = values.astype("<u2").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: height, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(content)) + content + ifd)


def over(colors, alpha, background):
    """Composite (H, W, 3) over a colour, alpha (H, W) in 0 to 255."""
    alpha = alpha[..., None] / 255
    return colors * alpha + np.array(background) * (1 - alpha)


RANDOM = np.random.default_rng(0)
COLORS = RANDOM.integers(0, 256, (12, 16, 3), np.uint8)
ALPHA = RANDOM.integers(0, 256, (12, 16), np.uint8)
DEEP = np.arange(192, dtype=np.uint16).reshape(12, 16) * 257
BACKGROUND = (32, 64, 96)


def make_kind(kind, folder):
    """Save an image of a kind; return its path and what it must look like, (H, W, 3), over the background."""
    image, black = Image.fromarray(COLORS), Image.new("RGB", (16, 12))
    grey = COLORS[..., :1].repeat(3, 2)
    if kind == "RGBA":
        Image.fromarray(np.dstack([COLORS, ALPHA])).save(folder / "a.png")
        return folder / "a.png", over(COLORS, ALPHA, BACKGROUND)
    if kind == "LA":
        Image.fromarray(np.dstack([COLORS[..., 0], ALPHA])).save(folder / "a.png")
        return folder / "a.png", over(grey, ALPHA, BACKGROUND)
    if kind in ("palette", "transparent GIF"):
        path = folder / ("a.png" if kind == "palette" else "a.gif")
        small = image.quantize(8)
        small.save(path, transparency=3)
        return path, over(np.asarray(small.convert("RGB")), 255 * (np.asarray(small) != 3), BACKGROUND)
    if kind == "CMYK":
        Image.fromarray(np.dstack([COLORS, ALPHA]), "CMYK").save(folder / "a.tif")
        return folder / "a.tif", (255.0 - COLORS) * (255 - ALPHA[..., None]) / 255
    if kind == "16-bit grey":
        Image.fromarray(DEEP).save(folder / "a.png")
        return folder / "a.png", np.dstack([DEEP // 257] * 3)
    if kind == "16-bit grey, one level transparent":
        save_deep_png(folder / "a.png", DEEP, transparent=257 * 5)
        return folder / "a.png", over(np.dstack([DEEP // 257] * 3), 255 * (DEEP != 257 * 5), BACKGROUND)
    if kind == "12-bit grey":
        save_deep_tiff(folder / "a.tif", DEEP // 16, 12, white=1)
        return folder / "a.tif", np.dstack([DEEP // 257] * 3)
    if kind == "16-bit grey, 0 is white":
        save_deep_tiff(folder / "a.tif", 65535 - DEEP, 16, white=0)
        return folder / "a.tif", np.dstack([DEEP // 257] * 3)
    if kind == "32-bit float":
        Image.fromarray(DEEP.astype(np.float32) / 65535).save(folder / "a.tiff")
        return folder / "a.tiff", np.dstack([DEEP // 257] * 3)
    if kind == "1-bit":
        Image.fromarray(ALPHA > 99).save(folder / "a.png")
        return folder / "a.png", np.dstack([255 * (ALPHA > 99)] * 3)
    ending, options = {"GIF": ("gif", {}), "WebP": ("webp", {"lossless": True}), "APNG": ("png", {})}[kind.split()[1]]
    image = image.quantize(200).convert("RGB") if ending == "gif" else image
    image.save(folder / f"a.{ending}", save_all=True, append_images=[black, black], **options)
    return folder / f"a.{ending}", np.asarray(image)


KINDS = ["RGBA", "LA", "palette", "transparent GIF", "CMYK", "16-bit grey", "16-bit grey, one level transparent"]
KINDS += ["12-bit grey", "16-bit grey, 0 is white", "32-bit float", "1-bit"]
KINDS += ["animated GIF", "animated WebP", "animated APNG"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_every_kind_shows_its_own_pixels(tmp_path, kind):
    """Of an animation the first frame; over a background where it is transparent."""
    path, expected = make_kind(kind, tmp_path)
    image = decode(path, 3, None, "#{:02x}{:02x}{:02x}".format(*BACKGROUND))
    assert image.shape == (3, 12, 16) and image.dtype == torch.uint8
    assert np.abs(image.movedim(0, -1).numpy() - expected).max() <= 1
    height, width, _ = folders.read_header(path, "white")
    assert (height, width) == (12, 16)


def test_background_is_part_of_kept_images(tmp_path):
    """White by default; a coloured one makes grey images with transparency colour images."""
    for i in range(10):
        Image.fromarray(np.zeros((4, 4, 2), np.uint8)).save(tmp_path / f"{i}.png")
    options = {"cache": tmp_path / "images.pt"}
    assert load(tmp_path, **options).train_images.unique().tolist() == [255]
    assert load(tmp_path, background="black", **options).train_images.shape == (9, 1, 4, 4)
    red = load(tmp_path, background="red", **options)
    assert red.train_images.shape == (9, 3, 4, 4) and red.mean.tolist() == [1, 0, 0]
    streamed = load(tmp_path, background="red", memory_limit=0)
    assert torch.equal(streamed.train_images[0], red.train_images[0])


def test_turned_tiff_has_its_size(tmp_path):
    """Pillow reports the size after it has turned the image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(4):
        pixels = save(tmp_path / f"{i}.tif", shape=(12, 16), exif=exif)
    data = load(tmp_path)
    both = torch.cat([data.train_images, data.test_images]).numpy()
    assert both.shape == (4, 3, 16, 12)
    assert any(np.array_equal(image, np.rot90(pixels, -1).transpose(2, 0, 1)) for image in both)


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_tiff_has_its_pixels(tmp_path, orientation, mode):
    """From a path, Pillow maps a file into memory with the sides of the turned image."""
    pixels = {"L": COLORS[..., 0], "RGB": COLORS, "I;16": DEEP}[mode]
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={0x0112: orientation})
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[orientation]
    expected = np.rot90(pixels, turns)
    expected = expected[:, ::-1] if orientation in (2, 4, 5, 7) else expected
    expected = np.atleast_3d(expected // 257 if mode == "I;16" else expected).transpose(2, 0, 1)
    assert np.array_equal(decode(tmp_path / "a.tif", expected.shape[0], None), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_header_has_the_size_of_the_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.jpg", shape=(12, 16), exif=exif)
    height, width, _ = folders.read_header(tmp_path / "a.jpg", "white")
    assert (3, height, width) == decode(tmp_path / "a.jpg", 3, None).shape


def test_sixteen_bits_are_rounded(tmp_path):
    Image.fromarray(np.array([[0, 128, 129, 65406, 65407, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", 1, None).flatten().tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("values", [[0, 2.0], [-1.0, 1], [0, np.nan]])
def test_floats_out_of_range_are_refused(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="floating-point numbers from .*, not from 0 to 1"):
        decode(tmp_path / "a.tif", 3, None)


# Ugly folders


def test_upper_case_and_odd_names_are_read(folder, tmp_path):
    names = [b"A.PNG", b"B.Jpeg", "猫 мяу.png".encode(), b"line\nbreak.png", b"$x_{$.png", b"caf\xe9.png", b"-.png"]
    target = tmp_path / "odd"
    target.mkdir()
    for name, source in zip(names, sorted((folder / "train" / "cat").iterdir())):
        shutil.copy(source, os.fsencode(target) + b"/" + name)
    data = load(target)
    assert len(data.train_images) + len(data.test_images) == len(names)
    assert all("\n" not in line for line in data.files)
    data.write_listing(tmp_path)
    assert len((tmp_path / "images.txt").read_text(encoding="utf-8").splitlines()) == len(names)


def test_data_set_is_called_as_typed(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    typed = f"{folder.parent.name}/photos/train"
    assert load(f"{typed}/").name == typed and load(f"{typed}/").class_names == ["cat", "dog"]


def test_decompression_bomb_is_a_bad_image(tmp_path, monkeypatch):
    """Also images for which Pillow only warns."""
    for i in range(10):
        save(tmp_path / f"{i}.png", shape=(8, 8))
    save(tmp_path / "warned.png", shape=(12, 16))
    save(tmp_path / "refused.png", shape=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"2 of the 12 images .*: (warned|refused).png \(Image size .* bomb"):
        load(tmp_path)
    for options in ({}, {"memory_limit": 0}):
        assert len(load(tmp_path, skip_bad_images=True, **options).train_images) == 9
    with pytest.raises(ValueError, match="warned.png cannot be decoded .* bomb"):
        folders.read_images([tmp_path / "warned.png"], 3, None, "white")


def test_postscript_called_png_starts_no_ghostscript(folder, monkeypatch):
    (folder / "train" / "cat" / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n%%EOF\n")
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: started.append(args))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args))
    with pytest.raises(ValueError, match="1 of the 31 images .* train/cat/x.png"):
        load(folder)
    with pytest.raises(ValueError, match="x.png cannot be decoded"):
        folders.read_images([folder / "train" / "cat" / "x.png"], 3, None, "white")
    assert not started


def test_library_log_messages_are_hidden(folder, caplog):
    """Pillow logs an error for a TIFF file of too many channels, and Python would print it."""
    entries = [(256, 16), (257, 12), (258, 8), (259, 1), (262, 2), (273, 8), (277, 40), (278, 12), (279, 9)]
    table = b"".join(tag.to_bytes(2, "little") + b"\3\0\1\0\0\0" + n.to_bytes(4, "little") for tag, n in entries)
    content = b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + table + bytes(4)
    (folder / "train" / "cat" / "many.tif").write_bytes(content)
    with caplog.at_level(logging.DEBUG, ""), pytest.raises(ValueError, match="train/cat/many.tif"):
        load(folder)
    assert not [record for record in caplog.records if record.name.startswith("PIL") and record.levelno > logging.INFO]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_pipes_are_never_waited_for(folder):
    os.mkfifo(folder / "train" / "cat" / "x.png")
    assert len(load(folder).train_images) == 20
    with pytest.raises(ValueError, match="x.png cannot be decoded .it is a folder or a pipe"):
        folders.read_images([folder / "train" / "cat" / "x.png"], 3, None, "white")


def test_unreadable_folder_is_named(folder, monkeypatch):
    """The superuser may read everything, so the system's answer is made."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="the folder .*dog cannot be read .Permission denied"):
        load(folder)


def test_runs_inside_the_folder_are_left_out(folder, capsys):
    """But a folder that only has a metrics.csv beside its images is kept."""
    for name in ("results", "started"):
        save(folder / "train" / name / "recon_000010.png")
    (folder / "train" / "results" / "checkpoint.pt").write_text("")
    lock_folder(folder / "train" / "started").release()
    (folder / "train" / "cat" / "metrics.csv").write_text("name,width")
    data = load(folder)
    assert len(data.train_images) == 20 and data.class_names == ["cat", "dog"]
    assert f"left out {folder / 'train' / 'results'}, the folder of a run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="results is the folder of a run"):
        walk(folder / "train" / "results")


def test_hidden_folders_are_skipped(folder):
    save(folder / "train" / "cat" / ".thumbnails" / "0.png")
    assert len(load(folder).train_images) == 20


def test_promised_formats_are_read(tmp_path):
    endings = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm")
    for ending in endings:
        save(tmp_path / f"a.{ending}")
    data = load(tmp_path)
    assert len(data.train_images) + len(data.test_images) == len(endings)


def test_images_beside_a_run_are_never_lost(capsys, folder, tmp_path):
    """A class that was named as --out-dir by mistake, and refused, is still a class."""
    cats = folder / "train" / "cat"
    for _ in range(2):
        printed = refusal(capsys, script, *SMALL, f"--out-dir={cats}", f"--dataset={folder}")
        assert f"{cats} is the folder of a run, but holds 10 images that it did not write, such as 0.png" in printed
    (cats / ".lock.pid").write_text("0 0.0")  # as if that process had ended
    assert load(folder).class_names == ["cat", "dog"]


def test_warns_of_images_outside_class_folders(folder, capsys):
    save(folder / "train" / "logo.png")
    assert load(folder).train_labels is None
    printed = capsys.readouterr().err
    assert "no classes: 1 images are not in a class folder" in printed and "logo.png" in printed


def test_split_in_capitals_is_refused(folder):
    """Its names would be those of classes."""
    for name in ("train", "test"):
        (folder / name).rename(folder / name.title())
    with pytest.raises(ValueError, match=r"Train and .*Test would be classes, not the split; rename them"):
        load(folder)


def test_warns_of_folders_beside_train(folder, capsys):
    """A class may be called train, or the test set val."""
    for name in ("val/cat/0.png", "car.png", "results/recon_000010.png"):
        save(folder / name)
    (folder / "results" / "checkpoint.pt").write_text("")
    (folder / "labels.csv").write_text("")
    assert len(load(folder).train_images) == 20
    printed = capsys.readouterr().err
    assert printed == f"{folder} has a folder train/, so car.png, val beside it are left out\n"


def test_disk_that_fails_while_training_is_one_sentence(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    data = load(folder, memory_limit=0)
    monkeypatch.setattr(folders, "decode", fail)  # the workers are forked
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: '.*cat/[0-9]+\.png'$"):
        next(batches(data.train_images, iter([torch.arange(2)]), torch.device("cpu")))


NO_SHARED_MEMORY = "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)"
BUS_ERROR = (
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)
FAULTS = [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError, "can't allocate memory"),
    (torch.AcceleratorError("CUDA error: assert"), torch.AcceleratorError, "CUDA error: assert"),
    (RuntimeError(NO_SHARED_MEMORY), OSError, "no shared memory left; enlarge /dev/shm, or raise --memory-limit"),
    (RuntimeError(BUS_ERROR), OSError, "no shared memory left; enlarge /dev/shm, or raise --memory-limit"),
]


@pytest.mark.parametrize(("error", "kind", "message"), FAULTS, ids=["memory", "GPU", "shared memory", "bus error"])
def test_fault_of_memory_or_gpu_blames_no_image(folder, monkeypatch, error, kind, message):
    """Its remedy is a smaller batch or more memory, not another disk."""

    class Loader:
        def __init__(self, *_, **options):
            self._workers = []

        def __iter__(self):
            return self

        def __next__(self):
            raise error

        def _shutdown_workers(self):
            pass

    monkeypatch.setattr(dataset, "DataLoader", Loader)
    with pytest.raises(kind, match=message):
        next(batches(load(folder, memory_limit=0).train_images, iter([torch.arange(2)]), torch.device("cpu")))


def test_only_rank_0_warns(folder, monkeypatch, capsys):
    save(folder / "train" / "logo.png")
    monkeypatch.setattr(folders, "rank", lambda: 1)
    load(folder)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.ENOTCONN])
def test_fault_of_the_machine_blames_no_image(folder, monkeypatch, number):
    """An image skipped for it would be missing, and the run would be of other images."""
    read = Path.read_bytes

    def fails(path):
        if path.name == "3.png":
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(OSError, match=f"{os.strerror(number)}.*3.png"):
        load(folder, skip_bad_images=True)


def test_retries_images_that_failed_to_decode(folder, tmp_path, monkeypatch):
    """The disk may have been busy."""
    original, failed = folders.decode, []

    def fails_once(*args):
        if not failed:
            failed.append(True)
            raise OSError("busy")
        return original(*args)

    cache = tmp_path / "images.pt"
    with monkeypatch.context() as patch:
        patch.setattr(folders, "decode", fails_once)
        data = load(folder, cache=cache, skip_bad_images=True)
        assert len(data.train_images) + len(data.test_images) == 29
    again = load(folder, cache=cache, skip_bad_images=True)
    assert len(again.train_images) + len(again.test_images) == 30
