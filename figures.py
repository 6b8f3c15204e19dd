"""Every picture that training and sampling leave in a run's folder.

Figures are drawn without a display, through matplotlib's Figure rather than pyplot, so that nothing global is touched.
"""

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from sklearn.decomposition import PCA
from torch import Tensor
from torchvision.utils import make_grid

WIDTH = 1000  # dots that a picture of images takes, more or less
ROWS = 8  # of originals, and of what was made of them
SAMPLES = 20  # rows and columns that a picture of samples has at most


def images_per_row(width: int) -> int:
    """Return how many images of a width in pixels stand beside one another: large ones fewer, so that they show."""
    return min(12, max(4, WIDTH // width))


def save_reconstructions(path: Path, rows: dict[str, Tensor], title: str):
    """Draw images (B, C, H, W) in [0, 1], as many under each name, those of the later names directly below the first's.

    Images that would make more than ROWS rows are left out.
    """
    columns = images_per_row(next(iter(rows.values())).shape[-1])
    groups = list(zip(*(images[: columns * (ROWS // len(rows))].split(columns) for images in rows.values())))
    save_grid(path, list(itertools.chain(*groups)), title, list(rows) * len(groups))


def save_samples(path: Path, rows: Sequence[Tensor], title: str):
    """Draw rows of images (n, C, H, W) uint8, as far as the picture stays readable."""
    save_grid(path, [row[:SAMPLES] for row in rows[:SAMPLES]], title)


def save_grid(path: Path, rows: list[Tensor], title: str, names: Sequence[str] = ()):
    """Draw rows of images (n, C, H, W), uint8 or in [0, 1], with the name of each row before it if there are names."""
    columns = max(len(row) for row in rows)
    grey = 0.5 if rows[0].is_floating_point() else 128
    filled = [F.pad(row.cpu(), (0, 0) * 3 + (0, columns - len(row)), value=grey) for row in rows]
    grid = make_grid(torch.cat(filled), nrow=columns, padding=1, pad_value=grey).permute(1, 2, 0)  # (H, W, 3)
    dots = min(2 * WIDTH / grid.shape[1], max(1, round(WIDTH / max(grid.shape))))  # a pixel's; if large, less than one
    height, width = (dots * length / 100 for length in grid.shape[:2])  # inches
    left, top = 1.2 * bool(names), 0.4
    size = max(left + width, 0.1 * len(title)), height + top
    figure = Figure(figsize=size, dpi=100)
    ax = figure.add_axes((left / size[0], 0, width / size[0], height / size[1]))
    ax.imshow(grid.numpy(), interpolation="nearest", aspect="auto")
    ax.set(frame_on=False, xticks=[])
    middles = (np.arange(len(rows)) + 0.5) * (len(grid) - 1) / len(rows)
    ax.set_yticks(middles[: len(names)], names)
    ax.tick_params(length=0)
    figure.suptitle(title, y=1 - 0.05 / figure.get_figheight(), va="top", parse_math=False)
    figure.savefig(path)


def save_curves(path: Path, metrics: Path, title: str):
    """Draw the training graph from metrics.csv: the losses, the test MSE and the codes used, of each level."""
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))

    figure = Figure(figsize=(13, 3.8), dpi=110)
    losses, test, codes = figure.subplots(1, 3)
    # A constrained layout would draw everything twice.
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.13, top=0.84, wspace=0.28)
    plot_columns(losses, rows, "recon_loss")
    plot_columns(losses, rows, "codebook_loss")
    plot_columns(losses, rows, "commitment_loss", linestyle="--")  # it lies on the codebook loss
    plot_columns(test, rows, "test_mse", marker="o", color="tab:red")
    plot_columns(codes, rows, "codes_used")
    plot_columns(codes, rows, "perplexity")
    for ax in (losses, test):
        ax.set(yscale="log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")  # powers of ten would take as long as all else to set
        ax.minorticks_off()
    codes.set(ylim=(0, None))
    # At a given height: to look for room among the labels would take as long as drawing them.
    losses.set_title("training losses (unweighted)", y=1)
    test.set_title("test MSE, pixels in [0, 1]", y=1)
    codes.set_title("codebook, per logged interval", y=1)
    for ax in (losses, test, codes):
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title, parse_math=False)
    figure.savefig(path)


def plot_columns(ax: Axes, rows: list[dict], kind: str, **style):
    """Plot every column whose name starts with `kind`, at the steps at which it has a value."""
    for name in (name for name in rows[0] if name.startswith(kind)):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        ax.plot(*zip(*points), **{"label": name.replace("_", " "), **style})


def save_codebooks(path: Path, names: list[str], codebooks: list, counts: list, z_e: list, title: str):
    """Draw each level's embedding: codes (K, D) sized by their counts (K,), z_e (B, D, h, w) behind them, who is used.

    Both are projected on the two directions in which the encoder's outputs vary most (PCA).
    """
    height = 6 * len(names)  # inches
    figure = Figure(figsize=(13, height), dpi=110)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.55 / height, top=1 - 0.75 / height, wspace=0.18)
    axes = figure.subplots(len(names), 2, width_ratios=(3, 2), squeeze=False)
    for (plane, histogram), name, *level in zip(axes, names, codebooks, counts, z_e):
        draw_codebook(plane, histogram, name, *level)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path)


def draw_codebook(plane: Axes, histogram: Axes, name: str, codebook: Tensor, counts: Tensor, z_e: Tensor):
    z_e = z_e.movedim(1, -1).flatten(0, -2).float().cpu().numpy()  # (N, D)
    codebook, counts = codebook.float().cpu().numpy(), counts.cpu().numpy()
    used = counts > 0
    if z_e.shape[1] == 1:  # one dimension has no plane
        z_e, codebook = (np.pad(v, ((0, 0), (0, 1))) for v in (z_e, codebook))
    if len(z_e) == 1:  # nor has one vector
        z_e = np.concatenate([z_e, codebook])
    pca = PCA(2, random_state=0).fit(z_e)
    plane.scatter(*pca.transform(z_e).T, s=3, color="0.75", label="encoder outputs", rasterized=True)
    points = pca.transform(codebook)
    area = 6 + 30 * counts / max(counts.mean(), 1e-9)
    plane.scatter(*points[used].T, s=area[used], alpha=0.7, edgecolor="black", lw=0.4, label="codes, area by use")
    if (~used).any():
        plane.scatter(*points[~used].T, s=14, marker="x", color="tab:red", label="unused codes")
    share = pca.explained_variance_ratio_.sum()
    plane.set(title=f"{name}codes among the encoder's outputs (PCA, {share:.0%} of the variance)", xticks=[], yticks=[])
    for mark in plane.legend().legend_handles:
        mark.set_sizes([20])
    histogram.stairs(np.sort(counts)[::-1] / max(counts.sum(), 1), fill=True)  # one shape, where bars would be K
    histogram.axhline(1 / len(counts), color="black", linestyle="--", linewidth=1, label="if all were used equally")
    histogram.set(title=f"{used.sum()} of {len(counts)} {name}codes used", xlabel="codes, most used first")
    histogram.set(ylabel="share of all positions", yscale="log" if used.any() else "linear")
    histogram.legend()


def save_prior_curves(path: Path, metrics: Path, best_step: int):
    """Draw the training graph of a prior from prior_metrics.csv."""
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    ax = figure.subplots()
    plot_columns(ax, rows, "train_nats", label="training images (mean since the last line)")
    plot_columns(ax, rows, "held_out_nats", marker="o", color="tab:red", label="held-out images")
    ax.axvline(best_step, color="black", linestyle="--", linewidth=1, label="kept")
    ax.set(title="cross-entropy of a code", xlabel="step", ylabel="nats per code")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path)
