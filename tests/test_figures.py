"""The pictures are read back: what they show must be the images and the numbers that they name."""

import csv

from harness import figures
from harness.data import to_pixels

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from model import VQVAE


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures drawn so far."""
    made = []

    class Recorded(Figure):
        def __init__(self, **options):
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(figures, "Figure", Recorded)
    return made


def make(channels=1, size=(8, 8), **options):
    torch.manual_seed(0)
    model = VQVAE(channels, size, **{"codebook_size": 10, "code_dim": 4, "width": 8, "blocks": 1} | options)
    for level in model.levels:
        torch.nn.init.normal_(level.quantizer.codebook)
    return model


def read_grid(path, figure, height, width):
    """Read the images back from a picture, (rows, columns, 3, H, W) in [0, 1]; a line of one pixel is around each."""
    picture = torch.from_numpy(imread(path)[:, :, :3].copy())
    (ax,) = figure.axes
    rows, columns = (length - 1 for length in ax.images[0].get_array().shape[:2])
    box = ax.get_window_extent()
    x = box.x0 + (torch.arange(columns + 1) + 0.5) * box.width / (columns + 1)  # the middle of each pixel
    y = len(picture) - box.y1 + (torch.arange(rows + 1) + 0.5) * box.height / (rows + 1)
    pixels = picture[y.long()][:, x.long()]  # (rows + 1, columns + 1, 3)
    pixels = pixels[1:, 1:].unflatten(0, (-1, height + 1)).unflatten(2, (-1, width + 1))
    return pixels[:, :-1, :, :-1].permute(0, 2, 4, 1, 3)


def same_images(seen, expected):
    expected = expected.float() / 255 if expected.dtype == torch.uint8 else expected
    torch.testing.assert_close(seen, expected.expand(-1, 3, -1, -1), rtol=0, atol=1.1 / 255)
    return True


def labels_of(ax):
    """Each label of the vertical axis, and its place."""
    return list(zip((text.get_text() for text in ax.get_yticklabels()), ax.get_yticks()))


@pytest.mark.parametrize("channels", [1, 3])
def test_originals_stand_above_their_reconstructions(tmp_path, drawn, channels):
    model = make(channels, (9, 12)).train()
    columns = figures.images_per_row(12)
    images = torch.randint(0, 256, (2 * columns, channels, 9, 12), dtype=torch.uint8)
    figures.save_reconstructions(tmp_path / "recon.png", model, images, "title")
    seen = read_grid(tmp_path / "recon.png", drawn[0], 9, 12)
    assert seen.shape[:2] == (4, columns) and model.training
    x = to_pixels(images, "cpu")
    x_recon = model.decode(model.encode(x)).detach()
    for i, row in enumerate(images.split(columns)):
        assert same_images(seen[2 * i], row) and same_images(seen[2 * i + 1], x_recon[i * columns :][:columns])
    assert [name for name, _ in labels_of(drawn[0].axes[0])] == ["original", "reconstruction"] * 2
    assert np.allclose([at for _, at in labels_of(drawn[0].axes[0])], 10 * np.arange(4) + 4.5, atol=1)


def test_each_levels_codes_alone_come_below(tmp_path, drawn):
    model = make(3, (16, 16), levels=2)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    figures.save_reconstructions(tmp_path / "recon.png", model, images, "title")
    seen = read_grid(tmp_path / "recon.png", drawn[0], 16, 16)
    with torch.no_grad():
        top, bottom = model.encode(to_pixels(images, "cpu"))
        expected = [images, *(model.decode(codes) for codes in ([top, bottom], [top, None], [None, bottom]))]
    assert len(seen) == 4 and all(same_images(*pair) for pair in zip(seen, expected))
    names = ["original", "reconstruction", "top alone", "bottom alone"]
    assert [name for name, _ in labels_of(drawn[0].axes[0])] == names


def test_reconstructions_are_made_in_eval_mode(tmp_path, drawn):
    """In train mode, residuals of scales are other ones until the codebook has its start."""
    model = make(3, (16, 16), scales="1,2,4").train()
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    figures.save_reconstructions(tmp_path / "recon.png", model, images, "title")
    indices = model.eval().encode(to_pixels(images, "cpu"))
    expected = [model.decode(indices[: n + 1]).detach() for n in range(3)]
    assert all(map(same_images, read_grid(tmp_path / "recon.png", drawn[0], 16, 16)[1:], expected))


def test_codebook_is_drawn_in_eval_mode(tmp_path, monkeypatch):
    """A run may end before its codebook has its start."""
    model, drawn = make(3, (16, 16), scales="1,2,4").train(), []
    monkeypatch.setattr(figures, "draw_codebook", lambda *args: drawn.append(args[-1]))
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    figures.save_codebooks(tmp_path / "codebook.png", model, images, [torch.ones(10)], "title")
    assert model.training
    with torch.no_grad():
        z_e = model.eval().z_e(to_pixels(images, "cpu"))[0]
        assert torch.equal(drawn[0], model.levels[0].quantizer.residuals(z_e))


def test_vectors_that_are_all_equal_are_drawn():
    axes = Figure().subplots(1, 2)
    figures.draw_codebook(*axes, "", torch.randn(4, 3), torch.ones(4), torch.ones(2, 3, 5, 5))
    assert "0% of variance" in axes[0].get_title()


def test_near_codes_have_near_colours():
    places = torch.randperm(20)
    colours = figures.code_colors(places[:, None].float())
    assert abs(np.corrcoef(colours[:, 0], places)[0, 1]) > 0.99


def test_psnr_is_in_decibels():
    assert figures.psnr(torch.full((3, 4, 4), 0.6), torch.full((3, 4, 4), 0.5)) == pytest.approx(20, abs=1e-4)


def test_reconstructions_are_few_enough_to_see(tmp_path, drawn):
    images = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8)
    figures.save_reconstructions(tmp_path / "recon.png", make(), images, "title")
    assert read_grid(tmp_path / "recon.png", drawn[0], 8, 8).shape[:2] == (8, 12)
    assert [figures.images_per_row(width) for width in (8, 100, 1024)] == [12, 10, 4]


def test_samples_keep_rows_and_fill_with_grey(tmp_path, drawn):
    images = torch.randint(0, 256, (5, 3, 8, 6), dtype=torch.uint8)
    figures.save_samples(tmp_path / "samples.png", [images[:3], images[3:]], "title")
    seen = read_grid(tmp_path / "samples.png", drawn[0], 8, 6)
    assert seen.shape[:2] == (2, 3) and same_images(seen[0], images[:3]) and same_images(seen[1, :2], images[3:])
    assert same_images(seen[1, 2:], torch.full((1, 3, 8, 6), 128, dtype=torch.uint8))


def test_samples_are_twenty_by_twenty_at_most(tmp_path, drawn):
    images = torch.randint(0, 256, (23, 25, 1, 4, 4), dtype=torch.uint8)
    names = [f"class {i}" for i in range(23)]
    figures.save_samples(tmp_path / "samples.png", list(images), "title", names)
    seen = read_grid(tmp_path / "samples.png", drawn[0], 4, 4)
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == names[:20]
    assert seen.shape[:2] == (20, 20) and all(same_images(row, images[i, :20]) for i, row in enumerate(seen))


@pytest.mark.parametrize(("rows", "columns"), [(10, 1), (2, 20)])
def test_samples_are_enlarged_below_whole_title(tmp_path, rows, columns):
    title, colours = "samples, a row per class", torch.tensor([[255, 0, 0], [0, 0, 255]], dtype=torch.uint8)
    images = [colours[i % 2, None, :, None, None].expand(columns, 3, 28, 28) for i in range(rows)]
    figures.save_samples(tmp_path / "samples.png", images, title)
    picture = imread(tmp_path / "samples.png")[:, :, :3]
    red, blue = ((picture == colour).all(-1) for colour in ([1, 0, 0], [0, 0, 1]))
    found = ["red" if r else "blue" for r, b in zip(red.any(1), blue.any(1)) if r or b]
    assert [colour for i, colour in enumerate(found) if found[i - 1 : i] != [colour]] == ["red", "blue"] * (rows // 2)
    assert red.sum() + blue.sum() >= 4 * rows * columns * 28 * 28  # two dots a pixel at least, in each direction
    dark = (picture[:30].max(-1) < 0.5).any(0).nonzero()[0]  # the columns that the title takes
    assert dark[0] > 3 and dark[-1] < picture.shape[1] - 4 and dark[-1] - dark[0] > 5 * len(title)


def write_csv(path, columns):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))


def curves(ax):
    """The points of each line by its label in the legend, all of them inside the axes."""
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines)
    for points in lines.values():
        (left, right), (bottom, top) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
        assert (left <= points[:, 0]).all() and (points[:, 0] <= right).all()
        assert (bottom <= points[:, 1]).all() and (points[:, 1] <= top).all()
    return {label: points.tolist() for label, points in lines.items()}


LOSSES, TEST, CODES = ("recon_loss", "codebook_loss", "commitment_loss"), ("test_mse",), ("codes_used", "perplexity")


@pytest.mark.parametrize("levels", [("",), ("_top", "_bottom")], ids=len)
def test_curves_are_the_columns_they_name(tmp_path, drawn, levels):
    columns, expected = {"step": [10, 20, 30]}, []
    for kinds in (LOSSES, TEST, CODES):
        expected.append({})
        for kind in kinds:
            for level in ("",) if kind in ("recon_loss", "test_mse") else levels:
                values = (np.arange(3) + len(columns) + 0.25).tolist()
                columns[kind + level] = values
                expected[-1][(kind + level).replace("_", " ")] = list(map(list, zip(columns["step"], values)))
    columns["test_mse"][0] = ""  # measured at saves alone
    del expected[1]["test mse"][0]
    write_csv(tmp_path / "metrics.csv", columns | {"dataset": ["digits"] * 3})
    figures.save_curves(tmp_path / "curves.png", tmp_path / "metrics.csv", "title")
    assert [curves(ax) for ax in drawn[0].axes] == expected
    assert [ax.get_yscale() for ax in drawn[0].axes] == ["log", "log", "linear"]
    assert [ax.get_title() for ax in drawn[0].axes] == [
        "training losses (unweighted)",
        "test MSE, pixels in [0, 1]",
        "codebook, per logged interval",
    ]


def test_curves_lie_visibly_in_the_picture(tmp_path, drawn):
    """The test MSE is the only thing that is red; its marks stand where its points are."""
    columns = {name: [0.5, 0.4, 0.1] for name in (*LOSSES, *TEST, *CODES)}
    write_csv(tmp_path / "metrics.csv", {"step": [1, 2, 3]} | columns)
    figures.save_curves(tmp_path / "curves.png", tmp_path / "metrics.csv", "title")
    picture = imread(tmp_path / "curves.png")[:, :, :3]
    line = drawn[0].axes[1].lines[0]
    for x, y in drawn[0].axes[1].transData.transform(line.get_xydata()):
        red, green, blue = picture[len(picture) - 1 - round(y), round(x)]
        assert red > 0.7 and green < 0.4 and blue < 0.4


def test_prior_curves_mark_the_kept_step(tmp_path, drawn):
    columns = {"step": [10, 20, 30, 40], "train_nats": [6.0, 5.0, 4.0, 3.0], "held_out_nats": ["", 5.5, "", 4.5]}
    write_csv(tmp_path / "prior_metrics.csv", columns)
    figures.save_prior_curves(tmp_path / "prior_curves.png", tmp_path / "prior_metrics.csv", 20)
    training, held_out, kept = drawn[0].axes[0].lines
    assert training.get_xydata().tolist() == [[10, 6], [20, 5], [30, 4], [40, 3]]
    assert held_out.get_xydata().tolist() == [[20, 5.5], [40, 4.5]]
    assert list(kept.get_xdata()) == [20, 20]
    names = ["training images (mean since the last row)", "held-out images", "kept"]
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == names
    assert (tmp_path / "prior_curves.png").stat().st_size > 0


def red_dots(path):
    r, g, b = imread(path)[:, :, :3].transpose(2, 0, 1)
    return int(((r > 0.7) & (g < 0.3) & (b < 0.3)).sum())


@pytest.mark.parametrize(("dim", "unused", "size"), [(1, 0, 16), (2, 3, 16), (16, 5, 16), (3, 2, 4)])
def test_codebook_picture_shows_codes_and_their_use(tmp_path, drawn, dim, unused, size):
    """Codes of one dimension, and images of a single code (4x4 pixels), are drawn as well."""
    model, counts = make(1, (size, size), code_dim=dim), 10 - torch.arange(10)
    counts[10 - unused :] = 0
    images = torch.randint(0, 256, (1 if size == 4 else 6, 1, size, size), dtype=torch.uint8)
    figures.save_codebooks(tmp_path / "codebook.png", model, images, [counts], "title")
    plane, histogram = drawn[0].axes
    points = {mark.get_label(): mark.get_offsets() for mark in plane.collections}
    shown = [len(points.get(name, ())) for name in ("codes, area by use", "unused codes")]
    assert shown == [10 - unused, unused]
    sizes = {mark.get_label(): mark.get_sizes() for mark in plane.collections}["codes, area by use"]
    assert np.allclose(sizes, 6 + 30 * counts[counts > 0] / counts.float().mean())
    assert len(points["vectors"]) == (11 if size == 4 else 6 * 16)
    if dim == 2:  # then the projection only turns and moves, which keeps distances
        codes = torch.tensor(np.concatenate([points["codes, area by use"], points["unused codes"]]))
        expected = torch.pdist(model.levels[0].quantizer.codebook.detach().double())
        torch.testing.assert_close(torch.pdist(codes.double()), expected, rtol=1e-4, atol=1e-5)
    (stairs,) = histogram.patches
    assert stairs.get_data().values.tolist() == pytest.approx((counts / counts.sum()).tolist())
    assert histogram.get_title() == f"{10 - unused} of 10 codes used"
    assert (red_dots(tmp_path / "codebook.png") > 20) == bool(unused)


def test_codebooks_of_two_levels_are_named(tmp_path, drawn):
    model, counts = make(1, (16, 16), levels=2), [torch.arange(10), torch.ones(10)]
    images = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8)
    figures.save_codebooks(tmp_path / "codebook.png", model, images, counts, "title")
    titles = [ax.get_title() for ax in drawn[0].axes]
    assert titles[1] == "9 of 10 top codes used" and titles[3] == "10 of 10 bottom codes used"
    assert titles[0].startswith("top codes") and titles[2].startswith("bottom codes")
    z_e = [len(ax.collections[0].get_offsets()) for ax in drawn[0].axes[::2]]
    assert z_e == [4 * 2 * 2, 4 * 4 * 4]
