"""Every picture that training and sampling leave in a run's folder.

Figures are drawn without a display, through matplotlib's Figure rather than pyplot, so that nothing global is touched.
"""

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from harness.cli import fail, say
from harness.data import chunks, to_pixels
from harness.run import eval_mode
from harness.storage import Damaged, read_metrics, whole_file

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import make_grid

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except (ValueError, OSError) as error:  # MPLBACKEND names none, or no folder is writable
    fail(f"matplotlib cannot be imported: {error}", code=2)

WIDTH = 1000  # approximate size of a picture of images, in dots
ROWS = 8  # of originals and reconstructions
SAMPLES = 20  # at most this many rows and columns of samples


@contextlib.contextmanager
def picture_or_reason():
    """If a picture cannot be made, say why and go on without it."""
    try:
        yield
    except (OSError, RuntimeError, Damaged) as error:  # RuntimeError: LaTeX, if a matplotlibrc asks for it
        say(f"cannot write a picture ({error}); continuing without it", error=True)


def images_per_row(width: int) -> int:
    """Return how many images of this width in pixels go in a row: fewer if they are large."""
    return min(12, max(4, WIDTH // width))


def save_reconstructions(path: Path, model: nn.Module, images: Tensor, title: str):
    """Draw the first images (N, C, H, W) uint8, each above its reconstruction.

    With several levels, further rows show each level decoded alone; with scales, the rows show the first 1, 2, ...
    scales decoded.
    """
    columns, size = images_per_row(images.shape[-1]), images.shape[-2:]
    names = ["original", *views(model, [None] * len(model.map_names))]
    shown = min(len(images), columns * max(1, ROWS // len(names)))
    rows = []
    with eval_mode(model):
        for chunk in chunks(shown, size):
            x = to_pixels(images[chunk], model.mean.device)
            made = [model.decode(indices, size) for indices in views(model, model.encode(x)).values()]
            rows.append(torch.stack([x, *made]).cpu())
    groups = torch.cat(rows, 1).split(columns, 1)  # (names, columns, C, H, W) each
    save_grid(path, [row for group in groups for row in group], title, names * len(groups))


def views(model: nn.Module, indices: list[Tensor]) -> dict[str, list[Tensor | None]]:
    """Return named sets of indices to decode: the first 1, 2, ... scales, or all levels and then each alone."""
    if model.scales:
        return {f"up to {h}x{w}": indices[: i + 1] for i, (h, w) in enumerate(model.scales)}
    levels = model.level_names if len(indices) > 1 else ()
    alone = {f"{name} alone": [codes if name == n else None for n, codes in zip(levels, indices)] for name in levels}
    return {"reconstruction": indices} | alone


def save_samples(path: Path, rows: Sequence[Tensor], title: str, names: Sequence[str] = ()) -> bool:
    """Draw rows of images (n, C, H, W) uint8, up to SAMPLES rows and columns, each row with its name."""
    return save_grid(path, [row[:SAMPLES] for row in rows[:SAMPLES]], title, names[:SAMPLES])


def save_codes(
    path: Path, model: nn.Module, names: list[str], images: list, indices: list, recon: list, title: str
) -> bool:
    """Draw a row for each image (C, H, W) uint8: original, the codes of each level or scale, reconstruction, PSNR.

    Args:
        indices: (h, w) of each level or scale, for each image.
        recon: (C, H, W) in [0, 1].
    """
    levels = model.map_names
    figure = Figure(figsize=(2.6 * (2 + len(levels)), 2.5 * len(images) + 0.6), dpi=100, layout="constrained")
    axes = figure.subplots(len(images), 2 + len(levels), squeeze=False)
    colors = [code_colors(codebook.cpu()) for codebook in model.codebooks()]
    for row, name, image, level_codes, x_recon in zip(axes, names, images, indices, recon):
        original = image.float() / 255
        show_image(row[0], original, shortened_text(name))
        for ax, level, codes, level_colors in zip(row[1:], levels, level_codes, colors):
            show_codes(ax, codes, level_colors, f"{level} codes, {codes.shape[0]}x{codes.shape[1]}".strip())
        show_image(row[-1], x_recon, f"reconstruction, {psnr(x_recon, original):.1f} dB")
    figure.suptitle(title, parse_math=False)
    return save_figure(figure, path)


def psnr(made: Tensor, original: Tensor) -> float:
    """Return the PSNR, in dB, of one image with pixels in [0, 1]."""
    return -10 * (made - original).square().mean().clamp(min=1e-12).log10().item()


def show_image(ax: Axes, image: Tensor, title: str):
    ax.imshow(image.expand(3, -1, -1).movedim(0, -1).numpy(), interpolation="nearest", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9, parse_math=False)


def show_codes(ax: Axes, codes: Tensor, colors: np.ndarray, title: str):
    """Draw indices (h, w) in the colours of their codes (K, 3), with their numbers if the grid is small."""
    shown = colors[codes.numpy()]
    ax.imshow(shown, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)
    if max(codes.shape) <= 10:
        for (y, x), index in np.ndenumerate(codes.numpy()):
            dark = shown[y, x] @ (0.299, 0.587, 0.114) < 0.5
            ax.text(x, y, index, ha="center", va="center", fontsize=6, color="white" if dark else "black")


def code_colors(codebook: Tensor) -> np.ndarray:
    """Return a colour (K, 3) in [0, 1] for each code (K, D), similar for codes that are near one another (PCA)."""
    codes = F.pad(codebook.float(), (0, max(0, 3 - codebook.shape[1]))).numpy()
    if len(codes) < 3:
        codes = np.concatenate([codes, np.zeros((3 - len(codes), codes.shape[1]))])
    ranks = fit_pca(codes, 3).transform(codes).argsort(0).argsort(0)[: len(codebook)]
    return ranks / max(1, len(codes) - 1)


def fit_pca(vectors: np.ndarray, directions: int):
    """Return scikit-learn's PCA of vectors (N, D), always the same for the same vectors."""
    from sklearn.decomposition import PCA  # here: scikit-learn takes a second to import

    return PCA(directions, random_state=0).fit(vectors)


def shortened_text(text: str, length: int = 28) -> str:
    return text if len(text) <= length else f"...{text[3 - length :]}"


def save_grid(path: Path, rows: list[Tensor], title: str, names: Sequence[str] = ()) -> bool:
    """Draw rows of images (n, C, H, W), uint8 or in [0, 1], with each row's name, if there are any, to its left."""
    columns = max(len(row) for row in rows)
    grey = 0.5 if rows[0].is_floating_point() else 128
    filled = [F.pad(row.cpu(), (0, 0) * 3 + (0, columns - len(row)), value=grey) for row in rows]
    grid = make_grid(torch.cat(filled), nrow=columns, padding=1, pad_value=grey).permute(1, 2, 0)  # (H, W, 3)
    dots = min(2 * WIDTH / grid.shape[1], max(1, round(WIDTH / max(grid.shape))))  # per pixel; below 1 for large grids
    height, width = (dots * length / 100 for length in grid.shape[:2])  # inches
    names = [shortened_text(name) for name in names]
    left, top = 0.2 + 0.1 * max(map(len, names)) if names else 0, 0.4
    size = max(left + width, 0.1 * len(title)), height + top
    figure = Figure(figsize=size, dpi=100)
    ax = figure.add_axes((left / size[0], 0, width / size[0], height / size[1]))
    ax.imshow(grid.numpy(), interpolation="nearest", aspect="auto")
    ax.set(frame_on=False, xticks=[])
    middles = (np.arange(len(rows)) + 0.5) * (len(grid) - 1) / len(rows)
    ax.set_yticks(middles[: len(names)], names, parse_math=False)
    ax.tick_params(length=0)
    figure.suptitle(title, y=1 - 0.05 / figure.get_figheight(), va="top", parse_math=False)
    return save_figure(figure, path)


@picture_or_reason()
def save_curves(path: Path, metrics: Path, title: str):
    """Draw the training graph from metrics.csv: the losses, the test MSE and the codes used, of each level."""
    rows = [row for _, row in read_metrics(metrics)]

    figure = Figure(figsize=(13, 3.8), dpi=110)
    losses, test, codes = figure.subplots(1, 3)
    # A constrained layout would draw everything twice.
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.13, top=0.84, wspace=0.28)
    plot_columns(losses, rows, "recon_loss")
    plot_columns(losses, rows, "codebook_loss")
    plot_columns(losses, rows, "commitment_loss", linestyle="--")  # it overlaps the codebook loss
    plot_columns(test, rows, "test_mse", marker="o", color="tab:red")
    plot_columns(codes, rows, "codes_used")
    plot_columns(codes, rows, "perplexity")
    for ax in (losses, test):
        ax.set(yscale="log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")  # typesetting powers of ten would take as long as all else
        ax.minorticks_off()
    codes.set(ylim=(0, None))
    # Titles have a fixed height: searching for room among the labels would take as long as drawing them.
    losses.set_title("training losses (unweighted)", y=1)
    test.set_title("test MSE, pixels in [0, 1]", y=1)
    codes.set_title("codebook, per logged interval", y=1)
    for ax in (losses, test, codes):
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title, parse_math=False)
    save_figure(figure, path)


def plot_columns(ax: Axes, rows: list[dict], kind: str, **style):
    """Plot every column whose name starts with `kind`, at the steps at which it has a value."""
    names = [name for name in rows[0] if name.startswith(kind)] if rows else []
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row[name] is not None]
        ax.plot(*zip(*points), **{"label": name.replace("_", " "), **style})


def save_codebooks(path: Path, model: nn.Module, images: Tensor, counts: list[Tensor], title: str):
    """Draw each level's codes, sized by their counts (K,), among the vectors they replace, and how often each is used.

    The vectors are the encoder's outputs, or with scales their residuals. All are projected onto the two directions in
    which the vectors vary most (PCA).
    """
    first = images[chunks(len(images), images.shape[-2:])[0]]
    with eval_mode(model):
        z_e = model.z_e(to_pixels(first, model.mean.device))
        if model.scales:
            z_e = [model.levels[0].quantizer.residuals(z_e[0])]
    codebooks = [level.quantizer.codebook.detach() for level in model.levels]
    names = [f"{name} " * bool(name) for name in model.level_names]
    height = 6 * len(names)  # inches
    figure = Figure(figsize=(13, height), dpi=110)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.55 / height, top=1 - 0.75 / height, wspace=0.18)
    axes = figure.subplots(len(names), 2, width_ratios=(3, 2), squeeze=False)
    for (plane, histogram), name, *level in zip(axes, names, codebooks, counts, z_e):
        draw_codebook(plane, histogram, name, *level)
    figure.suptitle(title, parse_math=False)
    save_figure(figure, path)


def draw_codebook(plane: Axes, histogram: Axes, name: str, codebook: Tensor, counts: Tensor, z_e: Tensor):
    z_e = z_e.movedim(1, -1).flatten(0, -2).float().cpu().numpy()  # (N, D)
    codebook, counts = codebook.float().cpu().numpy(), counts.cpu().numpy()
    used = counts > 0
    if z_e.shape[1] == 1:  # PCA needs two dimensions
        z_e, codebook = (np.pad(v, ((0, 0), (0, 1))) for v in (z_e, codebook))
    if len(z_e) == 1:  # and two vectors
        z_e = np.concatenate([z_e, codebook])
    with np.errstate(invalid="ignore"):  # if all vectors are equal, they have no variance to share
        pca = fit_pca(z_e, 2)
    plane.scatter(*pca.transform(z_e).T, s=3, color="0.75", label="vectors", rasterized=True)
    points = pca.transform(codebook)
    area = 6 + 30 * counts / max(counts.mean(), 1e-9)
    plane.scatter(*points[used].T, s=area[used], alpha=0.7, edgecolor="black", lw=0.4, label="codes, area by use")
    if (~used).any():
        plane.scatter(*points[~used].T, s=14, marker="x", color="tab:red", zorder=3, label="unused codes")
    share = np.nan_to_num(pca.explained_variance_ratio_).sum()
    plane.set(title=f"{name}codes among the vectors they replace (PCA, {share:.0%} of variance)", xticks=[], yticks=[])
    for mark in plane.legend().legend_handles:
        mark.set_sizes([20])
    histogram.stairs(np.sort(counts)[::-1] / max(counts.sum(), 1), fill=True)  # one shape, not K bars
    histogram.axhline(1 / len(counts), color="black", linestyle="--", linewidth=1, label="if all were used equally")
    histogram.set(title=f"{used.sum()} of {len(counts)} {name}codes used", xlabel="codes, most used first")
    histogram.set(ylabel="share of all positions", yscale="log" if used.any() else "linear")
    histogram.legend()


@picture_or_reason()
def save_prior_curves(path: Path, metrics: Path, best_step: int):
    """Draw the training graph of a prior from prior_metrics.csv."""
    rows = [row for _, row in read_metrics(metrics)]
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    ax = figure.subplots()
    plot_columns(ax, rows, "train_nats", label="training images (mean since the last row)")
    plot_columns(ax, rows, "held_out_nats", marker="o", color="tab:red", label="held-out images")
    ax.axvline(best_step, color="black", linestyle="--", linewidth=1, label="kept")
    ax.set(title="cross-entropy of a code", xlabel="step", ylabel="nats per code")
    ax.grid(alpha=0.3)
    ax.legend()
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> bool:
    """Write a picture, or say why it cannot be written and go on. Return whether it was written."""
    content = io.BytesIO()
    with picture_or_reason(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font may lack a letter of the data set's name
        figure.savefig(content, format="png")
        with whole_file(path) as file:
            file.write(content.getbuffer())
        return True
    return False
