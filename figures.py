"""Every picture that training and evaluation leave in a run's folder.

Figures are drawn without a display, through matplotlib's Figure rather than pyplot, so that nothing global is touched.
"""

import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor
from torchvision.utils import make_grid

COLUMNS = 12  # images per row of a picture of reconstructions
ROWS = 4  # rows of originals, each with its reconstructions below


def save_reconstructions(path: Path, x: Tensor, x_recon: Tensor, title: str):
    """Draw images (B, C, H, W) in [0, 1] in rows, each row's reconstructions directly below it."""
    pairs = [row for pair in zip(x.split(COLUMNS), x_recon.split(COLUMNS)) for row in pair]
    height, width = x.shape[-2:]
    row_inches = 10 / COLUMNS * height / width
    figure = Figure(figsize=(11.2, 0.4 + len(pairs) * (row_inches + 0.04)), dpi=100)
    axes = figure.subplots(len(pairs), squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.1, right=0.995, bottom=0.01, top=1 - 0.35 / figure.get_figheight(), hspace=0.04)
    for i, (ax, row) in enumerate(zip(axes, pairs)):
        grid = make_grid(row.cpu(), nrow=COLUMNS, padding=1, pad_value=0.5)
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.set_ylabel(("original", "reconstruction")[i % 2], rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
    figure.suptitle(title, y=1 - 0.05 / figure.get_figheight(), va="top")
    figure.savefig(path)


def save_curves(path: Path, metrics: Path, title: str):
    """Draw the training graph from metrics.csv: the three losses, the test MSE and the codes used."""
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))

    def series(name):  # the steps at which a column has a value, and the values
        return zip(*((int(row["step"]), float(row[name])) for row in rows if row[name]))

    figure = Figure(figsize=(13, 3.8), dpi=110, layout="constrained")
    losses, test, codes = figure.subplots(1, 3)
    for name in ("recon_loss", "codebook_loss", "commitment_loss"):
        style = {"linestyle": "--"} if name == "commitment_loss" else {}  # it lies on the codebook loss
        losses.plot(*series(name), label=name.replace("_", " "), **style)
    losses.set(title="training losses (unweighted)", yscale="log")
    test.plot(*series("test_mse"), marker="o", color="tab:red", label="test MSE of the first 1,000, pixels in [0, 1]")
    test.set(title="reconstruction of held-out images", yscale="log")
    codes.plot(*series("codes_used"), label="codes used")
    codes.plot(*series("perplexity"), label="perplexity")
    codes.set(title="codebook, per logged interval", ylim=(0, None))
    for ax in (losses, test, codes):
        ax.set_xlabel("step")
        ax.grid(alpha=0.3, which="both")
        ax.legend()
    figure.suptitle(title)
    figure.savefig(path)


def save_codebook(path: Path, codebook: Tensor, counts: Tensor, z_e: Tensor, title: str):
    """Draw the embedding: codes (K, D) sized by their use, z_e (B, D, h, w) behind them, and who is used.

    Both are projected on the two directions in which the encoder's outputs vary most (PCA).
    """
    z_e = z_e.movedim(1, -1).flatten(0, -2).float().cpu().numpy()  # (N, D)
    codebook, counts = codebook.float().cpu().numpy(), counts.cpu().numpy()
    used = counts > 0
    figure = Figure(figsize=(13, 6), dpi=110, layout="constrained")
    plane, histogram = figure.subplots(1, 2, width_ratios=(3, 2))
    if z_e.shape[1] == 1:  # one dimension has no plane
        z_e, codebook = (np.pad(v, ((0, 0), (0, 1))) for v in (z_e, codebook))
    pca = PCA(2, random_state=0).fit(z_e)
    plane.scatter(*pca.transform(z_e).T, s=3, color="0.75", label="encoder outputs", rasterized=True)
    points = pca.transform(codebook)
    area = 6 + 30 * counts / max(counts.mean(), 1e-9)
    plane.scatter(*points[used].T, s=area[used], alpha=0.7, edgecolor="black", lw=0.4, label="codes, area by use")
    if (~used).any():
        plane.scatter(*points[~used].T, s=14, marker="x", color="tab:red", label="unused codes")
    share = pca.explained_variance_ratio_.sum()
    plane.set(title=f"codes among the encoder's outputs (PCA, {share:.0%} of the variance)", xticks=[], yticks=[])
    for mark in plane.legend().legend_handles:
        mark.set_sizes([20])
    histogram.bar(np.arange(len(counts)), np.sort(counts)[::-1] / max(counts.sum(), 1), width=1.0)
    histogram.axhline(1 / len(counts), color="black", linestyle="--", linewidth=1, label="if all were used equally")
    histogram.set(title=f"{used.sum()} of {len(counts)} codes used", xlabel="codes, most used first")
    histogram.set(ylabel="share of all positions", yscale="log" if used.any() else "linear")
    histogram.legend()
    figure.suptitle(title)
    figure.savefig(path)
