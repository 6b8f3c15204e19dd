"""Measure a trained VQ-VAE on its data set's test images: `python evaluate.py --run results`.

Pixels are in [0, 1]. PSNR is the mean over images of each image's own; SSIM has the usual 11x11 Gaussian window of
standard deviation 1.5, over the positions where it lies inside the image.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import IMAGE_CACHE, load_checkpoint, load_model, writable_folder, write_whole
from data import batches, dataset_of, parts, to_pixels
from images import Images
from model import LEVELS, VQVAE
from process import pick_device, user_errors
from quantizer import perplexity


@torch.inference_mode()
def evaluate(model: VQVAE, images: Images) -> tuple[dict[str, float], list[Tensor]]:
    """Reconstruct uint8 images (N, C, H, W) in float32, in parts; the figures are over all of them.

    Returns:
        test_mse, test_psnr (dB), test_ssim, and perplexity and codes_used of each level (`LEVELS`);
        and each level's counts of its codes, (K,) int64.
    """
    was_training = model.training
    model.eval()
    device = model.mean.device
    errors, counts = [], [0] * len(model.levels)
    for batch in batches(images, parts(len(images), images.shape[-2:]), device):
        x = to_pixels(batch, device)
        out = model(x)
        x_recon = out.x_recon.clamp(0, 1)
        mse = (x_recon - x).square().mean((1, 2, 3))
        errors.append(torch.stack([mse, -10 * mse.clamp(min=1e-12).log10(), ssim(x_recon, x)]).cpu().double())
        for i, (level, quantized) in enumerate(zip(model.levels, out.levels)):
            counts[i] = counts[i] + level.quantizer.count(quantized.indices).cpu()
    model.train(was_training)
    measured = dict(zip(("test_mse", "test_psnr", "test_ssim"), torch.cat(errors, 1).mean(1).tolist()))
    for of, uses in zip(LEVELS[len(counts)], counts):
        measured |= {"perplexity" + of: perplexity(uses).item(), "codes_used" + of: int((uses > 0).sum())}
    return measured, counts


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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure a trained VQ-VAE on the test images and write evaluation.json beside its checkpoint.",
        usage=argparse.SUPPRESS,  # an error is then one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--run", default="results", help="folder of the run")
    parser.add_argument("--data-dir", help="folder of the data set, if it is not where it was for training")
    return parser.parse_args(argv)


def main(args: argparse.Namespace):
    with user_errors():
        checkpoint = load_checkpoint(args.run)
        folder = writable_folder(args.run)
        data = dataset_of(checkpoint, args.data_dir, folder / IMAGE_CACHE)
        measured, _ = evaluate(load_model(checkpoint, pick_device()[0]), data.test_images)
        text = json.dumps({"dataset": data.name, "step": checkpoint["progress"]["step"], **measured}, indent=2)
        write_whole(folder / "evaluation.json", (text + "\n").encode())
    print(text)


if __name__ == "__main__":
    main(parse_args())
