"""Encoder, decoder and the VQ-VAE made of them.

Shapes: B batch, C image channels, D code_dim, K codebook_size; an image of H x W pixels has h x w codes
    x, x_recon  (B, C, H, W)        pixels in [0, 1]
    z_e, z_q    (B, D, h, w)        h = ceil(H / 4), w = ceil(W / 4)
    indices     (B, h, w) int64

Source: VQ-VAE, arXiv 1711.00937, section 4.1. Departures, all for speed at equal quality on a processor: strided and
transposed convolutions became pixel (un)shuffles with plain ones, ReLU became SiLU, and most layers work at 1/4 size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantizer import VectorQuantizer

STRIDE = 4  # pixels per code, in each direction


class Reconstruction(NamedTuple):
    x_recon: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class ResidualBlock(nn.Sequential):
    """SiLU, 3x3 convolution, SiLU, 1x1 convolution, added to the input (arXiv 1711.00937, section 4.1)."""

    def __init__(self, width: int):
        super().__init__(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1))
        nn.init.zeros_(self[-1].weight)  # the block starts as the identity, which makes normalisation layers needless
        nn.init.zeros_(self[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Encoder(nn.Sequential):
    """Map normalised images (B, C, H, W), H and W divisible by 4, to z_e (B, D, H/4, W/4)."""

    def __init__(self, channels: int, code_dim: int, width: int, blocks: int):
        half = max(1, width // 2)
        super().__init__(
            nn.PixelUnshuffle(2),  # (B, 4 C, H/2, W/2)
            nn.Conv2d(channels * 4, half, 3, padding=1),
            nn.SiLU(),
            nn.PixelUnshuffle(2),  # (B, 4 half, H/4, W/4)
            nn.Conv2d(half * 4, width, 1),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.SiLU(),
            nn.Conv2d(width, code_dim, 1),
        )


class Decoder(nn.Sequential):
    """Map z_q (B, D, h, w) to normalised images (B, C, 4h, 4w)."""

    def __init__(self, channels: int, code_dim: int, width: int, blocks: int):
        half = max(1, width // 2)
        super().__init__(
            nn.Conv2d(code_dim, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(blocks)),
            nn.SiLU(),
            nn.Conv2d(width, half * 4, 1),
            nn.PixelShuffle(2),  # (B, half, 2h, 2w)
            ResidualBlock(half),
            nn.SiLU(),
            nn.Conv2d(half, channels * 4, 3, padding=1),
            nn.PixelShuffle(2),  # (B, C, 4h, 4w)
        )


class VQVAE(nn.Module):
    """Autoencoder whose latents are codes of a codebook (arXiv 1711.00937).

    Args:
        channels: of the images, C.
        image_size: (H, W) of the training images, for `decode`; `encode` and `forward` take any size.
        codebook_size, code_dim: K and D.
        width: channels of the convolutions.
        blocks: residual blocks in the encoder, and as many in the decoder.
        mean, std: (C,) of the training pixels. The network sees and makes normalised images.
        quantizer_options: further arguments of `VectorQuantizer`.
    """

    def __init__(
        self,
        channels: int,
        image_size: tuple[int, int],
        codebook_size: int = 512,
        code_dim: int = 64,
        width: int = 64,
        blocks: int = 2,
        mean: Tensor | float = 0.0,
        std: Tensor | float = 1.0,
        **quantizer_options,
    ):
        super().__init__()
        self.channels, self.image_size = channels, tuple(image_size)
        self.register_buffer("mean", torch.as_tensor(mean).expand(channels).reshape(-1, 1, 1).clone())
        self.register_buffer("std", torch.as_tensor(std).expand(channels).reshape(-1, 1, 1).clone())
        self.encoder = Encoder(channels, code_dim, width, blocks)
        self.quantizer = VectorQuantizer(codebook_size, code_dim, **quantizer_options)
        self.decoder = Decoder(channels, code_dim, width, blocks)

    def forward(self, x: Tensor) -> Reconstruction:
        """Encode, quantize and decode; x_recon is float32 and not clamped to [0, 1]."""
        quantized = self.quantizer(self.z_e(x))
        x_recon = self._pixels(quantized.z_q, x.shape[-2:])
        return Reconstruction(x_recon, quantized.indices, quantized.codebook_loss, quantized.commitment_loss)

    def z_e(self, x: Tensor) -> Tensor:
        """Return what the encoder makes of images, (B, D, h, w), before it is quantized."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"images have shape {tuple(x.shape)}, but the model needs (B, {self.channels}, H, W)")
        bottom, right = -x.shape[-2] % STRIDE, -x.shape[-1] % STRIDE
        x = (x - self.mean) / self.std
        return self.encoder(F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of images: indices (B, h, w)."""
        return self.quantizer.encode(self.z_e(x))

    def decode(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the images of codes, in [0, 1], cropped to `size`.

        Without it they are cropped to the model's `image_size`, if they have as many codes as its images.
        """
        if size is None:
            grid = tuple(-(-length // STRIDE) for length in self.image_size)
            whole = tuple(length * STRIDE for length in indices.shape[-2:])
            size = self.image_size if indices.shape[-2:] == grid else whole
        return self._pixels(self.quantizer.lookup(indices), size).clamp(0, 1)

    def _pixels(self, z_q: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.decoder(z_q)[..., : size[0], : size[1]]
        return x.float() * self.std + self.mean


def build_model(args: dict, image_shape: tuple[int, int, int], **statistics: Tensor) -> VQVAE:
    """Make the model that train.py's arguments describe, for images of shape (C, H, W)."""
    names = ("codebook_size", "code_dim", "width", "blocks", "ema", "decay", "kmeans_start", "revive_below")
    return VQVAE(image_shape[0], image_shape[1:], **{name: args[name] for name in names}, **statistics)
