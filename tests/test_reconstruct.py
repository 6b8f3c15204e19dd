"""From images to codes and back: what the pictures, the files and the refusals of reconstruct.py say."""

import math
import os
import shutil

from harness import data, figures, machine
from harness.data import load_dataset, to_pixels
from harness.folder import ImageFiles
from harness.storage import load_checkpoint

import numpy as np
import pytest
import torch
from conftest import batches_of, refusal, save, train
from PIL import Image

import evaluate
import reconstruct as script
from model import VQVAE, load_model
from reconstruct import refine, unique_names


def run(folder, *words):
    script.main(script.parse_args([f"--run={folder}", *map(str, words)]))


def read(path):
    """The pixels of a file, (C, H, W) uint8."""
    pixels = np.asarray(Image.open(path))
    return torch.from_numpy(np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)))


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name}


@pytest.fixture(scope="module")
def colour_run(tmp_path_factory):
    """A run on 16x16 crops of colour images of other sizes, with two levels of codes; not to be changed."""
    folder = tmp_path_factory.mktemp("colour")
    for i in range(20):
        save(folder / "photos" / f"{i}.png", shape=(20 + i, 30))
    flags = ["--image-size=16", "--levels=2", "--background=#204060", "--steps=3", "--batch-size=4"]
    train(folder / "results", f"--dataset={folder / 'photos'}", *flags)
    return folder / "results"


@pytest.fixture
def other_run(colour_run, tmp_path):
    return shutil.copytree(colour_run, tmp_path / "results")


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of the pictures drawn so far, and the matplotlib figures."""
    calls, original, figure = [], figures.save_codes, figures.Figure

    class Recorded(figure):
        def __init__(self, **options):
            super().__init__(**options)
            calls.append(self)

    monkeypatch.setattr(figures, "Figure", Recorded)
    monkeypatch.setattr(figures, "save_codes", lambda *args: (calls.append(args), original(*args))[1])
    return calls


# The picture


def test_picture_shows_the_first_ten_images(trained_run, drawn, tmp_path, capsys):
    for i in range(12):
        save(tmp_path / "mine" / f"{i:02d}.png", (28, 28), "L")
    (tmp_path / "mine" / "11.png").write_text("damaged")  # not read, as it is not shown
    run(trained_run, tmp_path / "mine")
    assert "with the first 10 of 12 images" in capsys.readouterr().out
    [figure] = (call for call in drawn if not isinstance(call, tuple))
    assert [ax.get_title() for ax in figure.axes[::3]] == [f"{i:02d}" for i in range(10)]  # original, codes, image


def test_picture_shows_original_codes_and_reconstruction(trained_run, drawn, tmp_path):
    """With the indices written in the grid, and each image's own PSNR."""
    images = load_dataset("digits").test_images[:2]
    for name, image in zip("ab", images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{name}.png")
    run(trained_run, tmp_path / "a.png", tmp_path / "b.png")
    (path, *_), figure = drawn
    assert path == trained_run / "reconstructed.png" and np.asarray(Image.open(path)).shape[2] in (3, 4)
    model = load_model(load_checkpoint(trained_run))
    with torch.inference_mode():
        (indices,) = model.encode(to_pixels(images, "cpu"))
        recon = model.decode([indices])
    axes = np.array(figure.axes).reshape(2, 3)
    for row, name, image, codes, made in zip(axes, "ab", images, indices, recon):
        shown = [ax.images[0].get_array() for ax in row]
        np.testing.assert_allclose(shown[0][..., 0], image[0] / 255)
        np.testing.assert_allclose(shown[2][..., 0], made[0], atol=1e-5)
        assert [text.get_text() for text in row[1].texts] == [str(int(code)) for code in codes.flatten()]
        flat = shown[1].reshape(-1, 3)  # the same colour for the same code alone
        assert len(np.unique(flat, axis=0)) == len(codes.unique())
        psnr = 10 * math.log10(1 / np.square(made.numpy() - image.numpy() / 255).mean())
        titles = [ax.get_title() for ax in row]
        assert titles == [name, "codes, 7x7", f"reconstruction, {psnr:.1f} dB"]


def test_both_levels_codes_are_drawn(other_run, drawn, tmp_path):
    save(tmp_path / "a.png", shape=(16, 16))
    run(other_run, tmp_path / "a.png")
    titles = [ax.get_title() for ax in drawn[1].axes]
    assert titles[1:3] == ["top codes, 2x2", "bottom codes, 4x4"]


def test_large_grids_have_colours_without_numbers(other_run, drawn, tmp_path):
    save(tmp_path / "a.png", shape=(48, 40))
    run(other_run, tmp_path / "a.png", "--full-size")
    grids = drawn[1].axes[1:3]
    assert [ax.images[0].get_array().shape[:2] for ax in grids] == [(6, 5), (12, 10)]
    assert [len(ax.texts) for ax in grids] == [30, 0]


def test_test_images_stand_in_for_files(trained_run, drawn):
    run(trained_run)
    names, images = drawn[0][2:4]
    assert names[:2] == ["test 0", "test 1"] and len(images) == script.TEST_IMAGES
    assert torch.equal(torch.stack(images), load_dataset("digits").test_images[: len(images)])


def test_earlier_pictures_are_never_overwritten(trained_run, tmp_path):
    save(tmp_path / "a.png", mode="L")
    before = everything(trained_run)
    for _ in range(3):
        run(trained_run, tmp_path / "a.png")
    after = everything(trained_run)
    assert {path: after[path] for path in before} == before
    new = sorted(path.name for path in after.keys() - before.keys())
    assert new == ["reconstructed.png", "reconstructed_2.png", "reconstructed_3.png"]


# --out


def test_images_are_prepared_as_in_training(other_run, tmp_path, capsys):
    """Resized, cropped, and over the background: the run's own files give the pixels that it saw."""
    photos = other_run.parent / "mine"
    for i in range(5):
        save(photos / f"{i}.png", shape=(20 + 3 * i, 33), mode="RGBA" if i % 2 else "RGB")
    Image.new("RGBA", (16, 16)).save(photos / "clear.png")
    run(other_run, photos, f"--out={tmp_path / 'out'}")
    assert "resized and cropped 5 of 6 images to 16x16" in capsys.readouterr().out
    seen = ImageFiles(sorted(photos.iterdir()), (3, 16, 16), 16, "#204060")
    written = sorted((tmp_path / "out" / "originals").iterdir())
    assert [path.name for path in written] == ["0.png", "1.png", "2.png", "3.png", "4.png", "clear.png"]
    assert all(torch.equal(read(path), image) for path, image in zip(written, seen))
    assert read(tmp_path / "out" / "originals" / "clear.png").unique().tolist() == [32, 64, 96]


def test_codes_file_is_readable_with_numpy_alone(other_run, tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.png", shape=(16, 16))
    run(other_run, tmp_path / "a.png", tmp_path / "b.png", f"--out={tmp_path / 'out'}")
    with np.load(tmp_path / "out" / "codes.npz", allow_pickle=False) as file:
        codes = dict(file)
    assert codes["names"].tolist() == ["a", "b"] and codes["codebook_size"] == 32
    assert codes["image_size"].tolist() == [16, 16]
    assert codes["bits_per_image"] == (2 * 2 + 4 * 4) * 5  # log2 of 32 codes
    model = load_model(load_checkpoint(other_run))
    images = torch.stack([read(tmp_path / "out" / "originals" / f"{name}.png") for name in "ab"])
    for name, level in zip(("top", "bottom"), model.encode(to_pixels(images, "cpu"))):
        assert np.array_equal(codes[f"indices_{name}"], level) and codes[f"indices_{name}"].dtype.kind == "i"


@pytest.mark.parametrize("full_size", [[], ["--full-size"]], ids=["resized", "full size"])
def test_codes_give_the_same_files_back(other_run, tmp_path, full_size):
    """Without the originals, bit for bit."""
    for i in range(5):
        save(tmp_path / "mine" / f"{i}.png", shape=(21, 37))
    run(other_run, tmp_path / "mine", *full_size, f"--out={tmp_path / 'out'}")
    shutil.rmtree(tmp_path / "mine")
    run(other_run, f"--codes={tmp_path / 'out' / 'codes.npz'}", f"--out={tmp_path / 'again'}")
    first, again = (everything(tmp_path / name / "reconstructions") for name in ("out", "again"))
    assert len(first) == 5 and list(first.values()) == list(again.values())
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["reconstructions"]


@pytest.mark.parametrize("shape", [(16, 16), (1, 1), (37, 21), (8, 100)])
def test_full_size_images_keep_their_pixels(other_run, tmp_path, shape):
    pixels = save(tmp_path / "a.png", shape=shape)
    run(other_run, tmp_path / "a.png", "--full-size", f"--out={tmp_path / 'out'}")
    assert np.array_equal(read(tmp_path / "out" / "originals" / "a.png").movedim(0, -1), pixels)
    made = read(tmp_path / "out" / "reconstructions" / "a.png")
    model = load_model(load_checkpoint(other_run))
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels).movedim(-1, 0)[None] / 255).x_recon.clamp(0, 1)[0]
    assert made.shape == (3, *shape) and (made / 255 - expected).abs().max() < 0.6 / 255


def test_full_size_beyond_the_memory_is_refused(capsys, trained_run, tmp_path, monkeypatch):
    save(tmp_path / "large.png", shape=(300, 400), mode="L")
    monkeypatch.setattr("harness.machine.container_limit", lambda: 1_000_000)
    printed = refusal(capsys, script, f"--run={trained_run}", "--full-size", tmp_path / "large.png")
    assert "the largest image, of 120,000 pixels, takes" in printed and "leave out --full-size" in printed


def test_full_size_images_may_differ_in_size(other_run, tmp_path, capsys):
    """But not in one codes.npz."""
    for i in range(3):
        save(tmp_path / "mine" / f"{i}.png", shape=(10 + i % 2, 20))
    run(other_run, tmp_path / "mine", "--full-size")
    before = everything(other_run)
    printed = refusal(
        capsys, script, f"--run={other_run}", tmp_path / "mine", "--full-size", f"--out={tmp_path / 'out'}"
    )
    assert "differ in size" in printed and everything(other_run) == before and not (tmp_path / "out").exists()


def random_model(*size, **options):
    """A small model with random weights everywhere, also where training starts from zeros."""
    model = VQVAE(1, size, codebook_size=12, code_dim=4, width=6, kmeans_start=False, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.inference_mode()
def test_refine_matches_a_sequential_search():
    model, x = random_model(12, 9, downsample=4, blocks=1), torch.rand(3, 1, 12, 9)
    found, codebook = torch.cat(refine(model, x, model.encode(x), candidates=5)), model.levels[0].quantizer.codebook
    for image, start, result in zip(x.split(1), model.encode(x)[0], found):
        codes = start.clone()
        for place in np.ndindex(*codes.shape):
            distance = (codebook - codebook[codes[place]]).norm(dim=1)
            errors = []
            for codes[place] in (tried := distance.argsort()[:5].tolist()):
                errors.append((model.decode([codes[None]]) - image).square().sum().item())
            codes[place] = tried[int(np.argmin(errors))]
        assert torch.equal(codes, result) and not torch.equal(codes, start)


@torch.inference_mode()
@pytest.mark.parametrize(("downsample", "levels", "blocks"), [(2, 1, 1), (4, 2, 0), (8, 1, 1)])
def test_refining_far_places_at_once_lowers_the_error(downsample, levels, blocks):
    """It would not if a pixel depended on two of them; what is above the last level stays."""
    model = random_model(18 * downsample, 20 * downsample, downsample=downsample, levels=levels, blocks=blocks)
    x = torch.rand(2, 1, 18 * downsample - 1, 20 * downsample - 3)
    encoded, errors = model.encode(x), []
    for candidates in (1, 2, 4):  # 1: none but the chosen one
        found = refine(model, x, encoded, candidates)
        assert all(torch.equal(a, b) for a, b in zip(found[:-1], encoded[:-1]))
        assert torch.equal(found[-1], encoded[-1]) == (candidates == 1)
        errors.append((model.decode(found, x.shape[-2:]) - x).square().sum((1, 2, 3)))
    assert (errors[0] > errors[1]).all() and (errors[0] > errors[2]).all()


def test_more_candidates_than_codes_are_all_codes(trained_run):
    model = load_model(load_checkpoint(trained_run))
    x = to_pixels(load_dataset("digits").test_images[:2], "cpu")
    (every,), (more,) = (refine(model, x, model.encode(x), candidates) for candidates in (32, 600))
    assert torch.equal(every, more)


def test_refined_codes_reach_the_files(trained_run, tmp_path):
    """And decode to the images beside them, which are nearer to the originals."""
    for name, *flags in (("plain",), ("refined", "--refine=3")):
        run(trained_run, *flags, f"--out={tmp_path / name}")
    run(trained_run, f"--codes={tmp_path / 'refined/codes.npz'}", f"--out={tmp_path / 'again'}")
    errors = dict.fromkeys(("plain", "refined"), 0.0)
    for path in (tmp_path / "refined" / "reconstructions").iterdir():
        assert torch.equal(read(path), read(tmp_path / "again" / "reconstructions" / path.name))
        for name in errors:
            made, original = (read(tmp_path / name / kind / path.name) for kind in ("reconstructions", "originals"))
            errors[name] += float((made.float() - original.float()).square().sum())
    assert errors["refined"] < errors["plain"]


def test_refined_codes_reach_the_picture(trained_run, drawn):
    run(trained_run, "--refine=3")
    images, indices = drawn[0][3:5]
    expected, _ = script.reconstruct(load_model(load_checkpoint(trained_run)), images, 3)
    assert all(torch.equal(*pair) for its, other in zip(indices, expected) for pair in zip(its, other))


def test_duplicate_names_are_numbered():
    """Also those that Windows and macOS take for the same; none is too long to be written."""
    paths = [script.Path(name) for name in ("a/x.png", "b/x.jpg", "X.gif", "x_2.png", "x.png", "a\nb.png", "..png")]
    names = unique_names(paths)
    assert names[:2] == ["x", "x_2"] and len({name.casefold() for name in names}) == len(paths)
    names += unique_names([script.Path(os.fsdecode(b"\xe9" * 250))] * 2 + [script.Path("é" * 125)] * 2)
    assert all(len(f"{name}.png".encode()) <= 255 and script.safe_name(name) == name for name in names)


def test_many_duplicates_are_numbered_fast():
    assert len(set(unique_names([script.Path(f"{i}/0.png") for i in range(20_000)]))) == 20_000


# Bad input


@pytest.fixture(scope="module")
def codes(colour_run, tmp_path_factory):
    """The arrays of a valid codes.npz of three images."""
    folder = tmp_path_factory.mktemp("codes")
    for i in range(3):
        save(folder / "mine" / f"{i}.png", shape=(16, 16))
    run(shutil.copytree(colour_run, folder / "results"), folder / "mine", f"--out={folder / 'out'}")
    with np.load(folder / "out" / "codes.npz") as file:
        return dict(file)


CHANGES = {
    "another model": ({"model": "0" * 64}, "was written by another model"),
    "index too large": ({"indices_top": np.full((3, 2, 2), 32)}, "indices run from 32 to 32, out of range"),
    "index below 0": ({"indices_bottom": np.full((3, 4, 4), -1)}, "indices run from -1 to -1, out of range"),
    "float indices": ({"indices_top": np.full((3, 2, 2), 0.7)}, "indices are float64, but must be integers"),
    "boolean indices": ({"indices_top": np.ones((3, 2, 2), bool)}, "indices are bool, but must be integers"),
    "complex indices": ({"indices_top": np.ones((3, 2, 2), complex)}, "indices are complex128, but must be integers"),
    "codebook size": ({"codebook_size": 64}, "codebook_size is 64, but the model has 32"),
    "grid": ({"indices_top": np.zeros((3, 3, 3), int)}, "do not have the shape of 3 images"),
    "too few": ({"indices_top": np.zeros((2, 2, 2), int)}, "do not have the shape of 3 images"),
    "names alike": ({"names": np.array(["a", "a", "b"])}, "its names are not valid file names"),
    "names with folders": ({"names": np.array(["a", "../b", "c"])}, "its names are not valid file names"),
    "names too long": ({"names": np.array(["a", "b" * 300, "c"])}, "a file name takes 304 bytes, more than 255"),
    "names of numbers": ({"names": np.arange(3)}, "names are not text"),
    "names nested": ({"names": np.array([["a", "b", "c"]])}, "names are not text"),
    "no images": (
        {"names": np.array([], str), "indices_top": np.zeros((0, 2, 2)), "indices_bottom": np.zeros((0, 4, 4))},
        "holds no images",
    ),
    "no size": ({"image_size": np.array([0, 16])}, "holds no images"),
    "size of floats": ({"image_size": np.array([16.9, 16.0])}, "is not a codes.npz of this project"),
    "size of three": ({"image_size": np.array([16, 16, 3])}, "is not a codes.npz of this project"),
    "pickled": ({"names": np.array([{}, "b", "c"], object)}, "is not a codes.npz of this project"),
}


def test_codes_of_other_maps_are_of_another_model(capsys, colour_run, codes, tmp_path):
    arrays = {name: array for name, array in codes.items() if name != "indices_top"} | {"model": "0" * 64}
    np.savez(tmp_path / "bad.npz", **arrays)
    printed = refusal(
        capsys, script, f"--run={colour_run}", f"--codes={tmp_path / 'bad.npz'}", f"--out={tmp_path / 'o'}"
    )
    assert "was written by another model" in printed


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_codes_are_refused(capsys, colour_run, codes, tmp_path, change):
    changed, message = CHANGES[change]
    np.savez(tmp_path / "bad.npz", **codes | changed)
    before = everything(colour_run)
    printed = refusal(
        capsys, script, f"--run={colour_run}", f"--codes={tmp_path / 'bad.npz'}", f"--out={tmp_path / 'o'}"
    )
    assert message in printed and not (tmp_path / "o").exists()
    assert everything(colour_run) == before and not list(tmp_path.glob("*.tmp"))


def test_longest_written_names_are_read_back(colour_run, codes, tmp_path):
    """And integers of any width."""
    long = unique_names([script.Path("é" * 125)] * 3)
    np.savez(tmp_path / "long.npz", **codes | {"names": long, "indices_top": codes["indices_top"].astype(">u8")})
    run(colour_run, f"--codes={tmp_path / 'long.npz'}", f"--out={tmp_path / 'out'}")
    assert sorted(path.stem for path in (tmp_path / "out" / "reconstructions").iterdir()) == sorted(long)


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\3\4 cut"])
def test_damaged_codes_are_refused(capsys, trained_run, tmp_path, content):
    if content is not None:
        (tmp_path / "bad.npz").write_bytes(content)
    printed = refusal(
        capsys, script, f"--run={trained_run}", f"--codes={tmp_path / 'bad.npz'}", f"--out={tmp_path / 'o'}"
    )
    assert ("does not exist" if content is None else "is damaged, or is not a codes.npz of this project") in printed


@pytest.mark.parametrize("bad", ["missing", "empty", "text", "truncated", "folder", "empty folder", "line\nbreak"])
def test_bad_image_is_named_and_nothing_written(capsys, trained_run, tmp_path, bad):
    good, path = tmp_path / "good.png", tmp_path / f"{bad}.png"
    save(good, shape=(50, 50))
    content = {"empty": b"", "text": b"not an image" * 99, "truncated": good.read_bytes()[:900]}.get(bad)
    if content is not None:
        path.write_bytes(content)
    elif "folder" in bad:
        path.mkdir()
        shutil.copy(good, path / ("a.txt" if bad == "empty folder" else "a.png"))
        (path / "b.png").write_bytes(b"" if bad == "folder" else good.read_bytes())
        if bad == "empty folder":
            (path / "b.png").unlink()
    before = everything(trained_run)
    printed = refusal(capsys, script, f"--run={trained_run}", good, path, f"--out={tmp_path / 'out'}")
    assert {"empty folder": "holds no images", "missing": "does not exist", "line\nbreak": "does not exist"}.get(
        bad, "cannot be decoded"
    ) in printed
    assert everything(trained_run) == before and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_existing_out_is_refused_before_anything(capsys, trained_run, tmp_path, kind):
    """An empty folder is taken."""
    save(tmp_path / "a.png", mode="L")
    out = tmp_path / "out"
    run_flags = [f"--run={trained_run}", tmp_path / "a.png", f"--out={out}"]
    out.mkdir()
    script.main(script.parse_args([*map(str, run_flags)]))
    if kind == "file":
        shutil.rmtree(out)
        out.write_bytes(b"mine")
    before = everything(tmp_path)
    assert "exists already; name a new folder" in refusal(capsys, script, *run_flags)
    assert everything(tmp_path) == before
    printed = refusal(capsys, evaluate, f"--run={trained_run}", f"--out={out}")
    assert "exists already; name a new folder" in printed and everything(tmp_path) == before


@pytest.mark.parametrize("what", ["originals", "codes.npz", "reconstructed.png"])
def test_full_disk_leaves_nothing_half_written(capsys, trained_run, tmp_path, monkeypatch, what):
    save(tmp_path / "a.png", mode="L")

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    module, name = {"originals": (Image.Image, "save"), "codes.npz": (np, "savez_compressed")}.get(
        what, (figures, "whole_file")
    )
    monkeypatch.setattr(module, name, fail)
    before = everything(trained_run)
    flags = [f"--run={trained_run}", str(tmp_path / "a.png"), f"--out={tmp_path / 'out'}"]
    if what == "reconstructed.png":  # what was written elsewhere is kept
        with pytest.raises(SystemExit) as ended:
            script.main(script.parse_args(flags))
        printed = capsys.readouterr()
        assert ended.value.code == 1 and "No space left" in printed.err and f"{what}\n" not in printed.out
        assert (tmp_path / "out" / "codes.npz").is_file()
    else:
        assert "No space left" in refusal(capsys, script, *flags)
        assert not list(tmp_path.glob("out*"))
    assert everything(trained_run) == before


def test_images_beyond_the_memory_are_refused(capsys, trained_run, tmp_path, monkeypatch):
    save(tmp_path / "a.png", mode="L")
    monkeypatch.setattr(machine, "container_limit", lambda: 1000)
    printed = refusal(capsys, script, f"--run={trained_run}", *[str(tmp_path / "a.png")] * 3)
    assert "reading 3 images takes at least" in printed and "name fewer at a time" in printed


def test_failed_picture_keeps_the_files(trained_run, tmp_path, monkeypatch, capsys):
    save(tmp_path / "a.png", mode="L")

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(figures, "save_codes", fail)
    flags = [f"--run={trained_run}", tmp_path / "a.png", f"--out={tmp_path / 'o'}"]
    assert "out of memory" in refusal(capsys, script, *flags)
    assert (tmp_path / "o" / "codes.npz").is_file()


def test_out_left_by_a_kill_stops_no_command(trained_run, tmp_path, capsys):
    """It is left alone, also inside the run's folder, as another process may be writing it."""
    left = trained_run / "out.0123456789abcdef.tmp"
    (left / "originals").mkdir(parents=True)
    save(tmp_path / "a.png", mode="L")
    run(trained_run, tmp_path / "a.png", f"--out={trained_run / 'out'}")
    assert left.is_dir() and f"{left} is left from an --out" in capsys.readouterr().err
    assert (trained_run / "out" / "codes.npz").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--codes=a.npz"], "--codes needs --out"),
        (["--codes=a.npz", "--out=b", "c.png"], "leave out the files"),
        (["--codes=a.npz", "--out=b", "--full-size"], "leave out the files, --full-size"),
        (["--codes=a.npz", "--out=b", "--refine=4"], "and --refine"),
        (["--full-size"], "--full-size needs image files"),
    ],
)
def test_contradicting_flags_are_refused(capsys, flags, message):
    assert message in refusal(capsys, script, *flags)


def test_run_is_asked_for(capsys, tmp_path):
    assert "holds no checkpoint.pt" in refusal(capsys, script, f"--run={tmp_path / 'typo'}")
    assert not (tmp_path / "typo").exists()


def test_few_large_images_are_computed_at_once(trained_run, tmp_path, monkeypatch):
    """And the files are the same."""
    for i in range(7):
        save(tmp_path / "mine" / f"{i}.png", shape=(28, 28), mode="L")
    run(trained_run, tmp_path / "mine", f"--out={tmp_path / 'out'}")
    monkeypatch.setattr(data, "CHUNK_PIXELS", 2 * 28 * 28)
    run(trained_run, f"--codes={tmp_path / 'out' / 'codes.npz'}", f"--out={tmp_path / 'again'}")
    model = load_model(load_checkpoint(trained_run))
    with batches_of(model) as sizes:
        script.encode(model, torch.zeros(7, 1, 28, 28, dtype=torch.uint8))
    assert sizes == [2, 2, 2, 1]
    for path in (tmp_path / "out" / "reconstructions").iterdir():
        difference = read(path).int() - read(tmp_path / "again" / "reconstructions" / path.name).int()
        assert difference.abs().max() <= 1


def test_moved_test_images_are_found(folder, tmp_path):
    train(tmp_path / "run", "--steps=2", "--batch-size=4", f"--dataset={folder}")
    moved = folder.rename(tmp_path / "moved")
    run(tmp_path / "run", f"--data-dir={moved}")
    assert (tmp_path / "run" / "reconstructed.png").is_file()
