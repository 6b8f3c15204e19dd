import csv

import pytest
import torch
from matplotlib.image import imread

import figures


def test_each_row_of_originals_stands_directly_above_its_reconstructions(tmp_path):
    red, blue = torch.zeros(2, 2 * figures.images_per_row(28), 3, 28, 28)
    red[:, 0] = blue[:, 2] = 1
    figures.save_reconstructions(tmp_path / "recon.png", {"original": red, "reconstruction": blue}, "title")
    picture = imread(tmp_path / "recon.png")
    seen = ["red" if r > b else "blue" for r, _, b, _ in picture[:, int(0.6 * picture.shape[1])] if abs(r - b) > 0.9]
    assert [colour for i, colour in enumerate(seen) if seen[i - 1 : i] != [colour]] == ["red", "blue"] * 2


def test_pictures_show_colour(tmp_path):
    red = torch.zeros(4, 3, 8, 8)
    red[:, 0] = 1
    figures.save_reconstructions(tmp_path / "recon.png", {"original": red, "reconstruction": red}, "title")
    assert ((imread(tmp_path / "recon.png")[:, :, :3] == [1, 0, 0]).all(-1)).mean() > 0.05


@pytest.mark.parametrize(("rows", "columns"), [(10, 1), (2, 20)])
def test_samples_are_enlarged_below_a_whole_title(tmp_path, rows, columns):
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


def test_prior_curves_mark_the_step_that_is_kept(tmp_path):
    (tmp_path / "prior_metrics.csv").write_text(
        "step,train_nats,held_out_nats\n10,6.0,\n20,5.0,5.5\n30,4.0,\n40,3.0,4.5\n"
    )
    pictures = []
    for best_step in (20, 40):
        figures.save_prior_curves(tmp_path / "prior_curves.png", tmp_path / "prior_metrics.csv", best_step)
        pictures.append(imread(tmp_path / "prior_curves.png"))
    assert pictures[0].std() > 0.05 and (pictures[0] != pictures[1]).any()


def test_curves_are_drawn_from_metrics_with_gaps(tmp_path):
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["step", "recon_loss", "codebook_loss", "commitment_loss", "codes_used", "perplexity", "test_mse"]
        )
        writer.writerows([[1, 0.5, 0.1, 0.1, 3, 2.5, ""], [2, 0.4, 0.1, 0.1, 4, 2.7, 0.01]])
    figures.save_curves(tmp_path / "curves.png", tmp_path / "metrics.csv", "title")
    assert imread(tmp_path / "curves.png").std() > 0.05


def test_codebook_picture_marks_unused_codes_and_takes_any_dimension(tmp_path):
    red = []
    for dim, unused in ((1, 0), (2, 0), (16, 5)):
        counts = torch.arange(10) + 1
        counts[:unused] = 0
        z_e = torch.randn(4, dim, 7, 7)
        figures.save_codebooks(tmp_path / "codebook.png", [""], [torch.randn(10, dim)], [counts], [z_e], "title")
        r, g, b = imread(tmp_path / "codebook.png")[:, :, :3].transpose(2, 0, 1)
        red.append(int(((r > 0.7) & (g < 0.3) & (b < 0.3)).sum()))
    assert red[0] == red[1] == 0 and red[2] > 20
