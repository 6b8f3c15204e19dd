"""Measure a trained VQ-VAE on its data set's test images: `python evaluate.py --run results`.

Pixels are in [0, 1]. PSNR is computed per image, then averaged. SSIM uses the usual 11x11 Gaussian window of standard
deviation 1.5, at the positions where it lies inside the image.
"""

import argparse
import io
import json

from harness.cli import make_parser, progress, say, user_errors
from harness.data import batches, chunks, dataset_of, to_pixels, to_uint8
from harness.folder import Images
from harness.machine import pick_device
from harness.run import eval_mode
from harness.storage import load_checkpoint, lock_folder, new_folder, writable_folder, write_whole

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from model import VQVAE, level_key, load_model
from quantizer import perplexity
from reconstruct import write_reconstructions


def evaluate(model: VQVAE, images: Images) -> tuple[dict[str, float], list[Tensor]]:
    """Reconstruct uint8 images (N, C, H, W) in float32, in chunks; the metrics are over all of them.

    Returns:
        test_mse, test_psnr (dB), test_ssim, and perplexity and codes_used of each level;
        and how often each code of each level was used, (K,) int64.
    """
    device = model.mean.device
    errors, counts, order = [], [0] * len(model.levels), chunks(len(images), images.shape[-2:])
    with eval_mode(model):
        for batch in progress(batches(images, order, device), "measuring", len(order)):
            x = to_pixels(batch, device)
            out = model(x)
            x_recon = out.x_recon.clamp(0, 1)
            mse = (x_recon - x).square().mean((1, 2, 3))
            errors.append(torch.stack([mse, -10 * mse.clamp(min=1e-12).log10(), ssim(x_recon, x)]).cpu().double())
            for i, (level, quantized) in enumerate(zip(model.levels, out.quantized)):
                counts[i] = counts[i] + level.quantizer.count(quantized.indices).cpu()
    measured = dict(zip(("test_mse", "test_psnr", "test_ssim"), torch.cat(errors, 1).mean(1).tolist()))
    for name, uses in zip(model.level_names, counts):
        measured |= usage(uses, name)
    return measured, counts


def usage(counts: Tensor, level: str) -> dict[str, float]:
    """Return how many codes of a level were used, and their perplexity, by the counts of their uses (K,)."""
    return {
        level_key("codes_used", level): int((counts > 0).sum()),
        level_key("perplexity", level): perplexity(counts).item(),
    }


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity of each pair of images in [0, 1], (B,) (Wang et al. 2004, equation 13)."""
    size = min(11, *x.shape[-2:])
    window = torch.exp(-((torch.arange(size, device=x.device) - (size - 1) / 2) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def sums(length):  # (length - size + 1, length): each row weighs the pixels of one position of the window
        return torch.stack([F.pad(window, (i, length - size - i)) for i in range(length - size + 1)])

    down, across = sums(x.shape[-2]), sums(x.shape[-1]).T

    def blur(image):  # the Gaussian window is separable
        return down @ image @ across

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).view(len(x), -1).mean(1)


@torch.inference_mode()
def evaluate_jpeg(model: VQVAE, images: Images) -> dict[str, float]:
    """Measure PSNR (dB) and SSIM as the public code of CVQ-VAE (arXiv 2307.15139) does: through JPEG files, in RGB.

    Originals and reconstructions are written at Pillow's default quality, 75, and read back before they are compared.

    Raises:
        ValueError: scikit-image is not installed, or the images are smaller than its windows.
    """
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError:
        raise ValueError("--jpeg needs scikit-image; install requirements-dev.txt") from None
    height, width = images.shape[-2:]
    if min(height, width) < 11:
        raise ValueError(f"--jpeg needs images of at least 11x11 pixels, but these have {width}x{height}; leave it out")
    psnr, ssim, device = [], [], model.mean.device
    order = chunks(len(images), images.shape[-2:])
    for batch in progress(batches(images, order, device), "through JPEG", len(order)):
        x = to_pixels(batch, device)
        for pair in zip(x, model.decode(model.encode(x), x.shape[-2:])):
            original, made = map(through_jpeg, pair)
            psnr.append(peak_signal_noise_ratio(original, made, data_range=1))
            ssim.append(structural_similarity(original, made, win_size=11, channel_axis=-1, data_range=1))
    return {"jpeg_psnr": float(np.mean(psnr)), "jpeg_ssim": float(np.mean(ssim))}


def through_jpeg(image: Tensor) -> np.ndarray:
    """Return an image (C, H, W) in [0, 1] as a JPEG file gives it back, (H, W, 3) in [0, 1]."""
    file = io.BytesIO()
    to_pil_image(to_uint8(image.cpu())).convert("RGB").save(file, "JPEG")
    return np.asarray(Image.open(file)) / 255


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Measure a trained VQ-VAE on the test images; write evaluation.json beside its checkpoint.")
    parser.add_argument("--run", default="results", help="folder of the run")
    parser.add_argument("--data-dir", help="folder of the data set, if it has moved; named sets are downloaded to it")
    parser.add_argument("--jpeg", action="store_true", help="also measure through JPEG files, as CVQ-VAE's code does")
    parser.add_argument("--out", metavar="DIR", help="new folder for originals/, reconstructions/ and codes.npz")
    return parser.parse_args(argv)


def main(args: argparse.Namespace):
    with user_errors():
        checkpoint, folder = load_checkpoint(args.run), writable_folder(args.run)
        model = load_model(checkpoint, pick_device()[0])
        with lock_folder(folder), new_folder(args.out) as out:
            data = dataset_of(checkpoint, folder, args.data_dir)
            through_files = evaluate_jpeg(model, data.test_images) if args.jpeg else {}
            measured = evaluate(model, data.test_images)[0] | through_files
            text = json.dumps({"dataset": data.name, "step": checkpoint["progress"]["step"], **measured}, indent=2)
            write_whole(folder / "evaluation.json", text + "\n")
            if out:
                write_reconstructions(out, model, data.test_images, checkpoint)
    say(*text.split("\n"))


if __name__ == "__main__":
    main(parse_args())
