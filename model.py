"""Encoder, decoder and the VQ-VAE made of them, with one or two levels of codes.

Shapes: B batch, C image channels, D code_dim, K codebook_size; an image of H x W pixels has h x w codes
    x, x_recon  (B, C, H, W)        pixels in [0, 1]
    z_e, z_q    (B, D, h, w)        h = H / S, w = W / S for S x S pixels per code, H and W padded to whole top codes
    indices     (B, h, w) int64
Values per level or scale come as a list, the top level (fewest codes) or the coarsest scale first.

Source: VQ-VAE, arXiv 1711.00937, section 4.1; two levels: VQ-VAE-2, arXiv 1906.00446, section 3.1. Departures, for
speed on a CPU: pixel unshuffle replaces the first convolution's stride, pixel shuffle the decoder's transposed
convolutions, and most layers run at the resolution of the codes. SiLU replaces ReLU.
"""

import functools
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantizer import Quantized, VectorQuantizer
from scales import MultiScaleQuantizer, parse_scales


class Reconstruction(NamedTuple):
    x_recon: Tensor
    quantized: list[Quantized]  # of each level, top first


class ResidualBlock(nn.Sequential):
    """SiLU, 3x3 convolution, SiLU, 1x1 convolution, added to the input (arXiv 1711.00937, section 4.1)."""

    def __init__(self, width: int):
        super().__init__(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1))
        nn.init.zeros_(self[-1].weight)  # the block starts as the identity, so no normalisation layers are needed
        nn.init.zeros_(self[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PixelShuffle(nn.Module):
    """Turn (B, 4 C, h, w) into (B, C, 2 h, 2 w).

    Like nn.PixelShuffle(2), but with another order of channels, so that with channels-last memory it copies whole
    pixels: twice as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.movedim(1, -1).unflatten(-1, (2, 2, channels // 4)).transpose(2, 3)  # (B, h, 2, w, 2, C)
        return x.reshape(batch, 2 * height, 2 * width, channels // 4).movedim(-1, 1)


def stage_widths(width: int, stride: int) -> list[int]:
    """Return the channels at 1/2, 1/4, ... 1/stride resolution; if there are several, the first is half as wide."""
    stages = stride.bit_length() - 1
    return [max(1, width // 2), *[width] * (stages - 1)] if stages > 1 else [width]


class Encoder(nn.Sequential):
    """Map (B, C, H, W), H and W divisible by `stride`, to features (B, width, H/stride, W/stride)."""

    def __init__(self, channels: int, width: int, blocks: int, stride: int):
        widths = stage_widths(width, stride)
        layers = [nn.PixelUnshuffle(2), nn.Conv2d(channels * 4, widths[0], 3, padding=1)]
        for before, after in pairwise(widths):
            layers += [nn.SiLU(), nn.Conv2d(before, after, 2, stride=2)]
        super().__init__(*layers, *(ResidualBlock(width) for _ in range(blocks)))


class Decoder(nn.Sequential):
    """Map codes (B, D, h, w) to (B, C, stride h, stride w)."""

    def __init__(self, code_dim: int, channels: int, width: int, blocks: int, stride: int):
        widths = stage_widths(width, stride)[::-1]
        layers = [nn.Conv2d(code_dim, width, 3, padding=1), *(ResidualBlock(width) for _ in range(blocks))]
        for before, after in pairwise(widths):
            layers += [nn.SiLU(), nn.Conv2d(before, after * 4, 1), PixelShuffle(), ResidualBlock(after)]
        super().__init__(*layers, nn.SiLU(), nn.Conv2d(widths[-1], channels * 4, 3, padding=1), PixelShuffle())
        self.reach = blocks + 2  # a pixel depends on codes up to this many positions away


class Level(nn.Module):
    """One level of codes: the encoder of the image or of the level below, the quantizer, and the decoder."""

    def __init__(self, encoder: Encoder, to_code: nn.Module, quantizer: VectorQuantizer, decoder: Decoder):
        super().__init__()
        self.encoder, self.to_code, self.quantizer, self.decoder = encoder, to_code, quantizer, decoder

    def average_code(self, batch: int, height: int, width: int) -> Tensor:
        """Return the mean code, weighted by usage, at every position: z_q (B, D, h, w)."""
        counts = self.quantizer.ema_counts
        return (counts @ self.quantizer.codebook / counts.sum()).view(1, -1, 1, 1).expand(batch, -1, height, width)


class VQVAE(nn.Module):
    """Autoencoder with latents from one codebook (arXiv 1711.00937) or two (arXiv 1906.00446).

    With two levels, the top encoder takes the bottom encoder's features. The top decoder's output is concatenated to
    these features before they are quantized, and to the bottom codes before they are decoded to the image.

    Args:
        channels: C, of the images.
        image_size: (H, W) of the training images, the default of `decode`; `encode` and `forward` take any size, but
            with scales only those with the same grid of codes.
        codebook_size, code_dim: K and D, of each level.
        width: channels of the convolutions.
        blocks: residual blocks at the resolution of the codes, in each encoder and each decoder.
        downsample: pixels per code of the bottom level in each direction, a power of two, at least 2.
        levels: 1 or 2; each level has half the height and width of the one below it.
        scales: sizes of the code maps of a single level, such as "1,2,4,7", or "auto"; see `scales.py`.
        mean, std: (C,) of the training pixels. Inside, the network works on normalised images.
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
        downsample: int = 4,
        levels: int = 1,
        scales: str | None = None,
        mean: Tensor | float = 0.0,
        std: Tensor | float = 1.0,
        **quantizer_options,
    ):
        super().__init__()
        if levels not in (1, 2):
            raise ValueError(f"levels is {levels}, but must be 1 or 2")
        if downsample < 2 or downsample.bit_count() > 1:
            raise ValueError(f"downsample is {downsample}, but must be a power of two, at least 2")
        self.channels, self.image_size = channels, tuple(image_size)
        self.level_names = ("top", "bottom") if levels > 1 else ("",)  # in the names of metrics
        self.strides = [downsample * 2**i for i in reversed(range(levels))]  # pixels per code, top first
        if scales is not None and levels > 1:
            raise ValueError("--levels 2 and --scales cannot be combined; leave out one of them")
        self.scales = parse_scales(scales, [length // downsample for length in self._padded(image_size)])
        self.map_names = [f"scale{i + 1}" for i in range(len(self.scales))] or self.level_names  # of the code maps
        kind = functools.partial(MultiScaleQuantizer, self.scales) if self.scales else VectorQuantizer
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.float32)
            self.register_buffer(name, value.expand(channels).reshape(-1, 1, 1).clone())
        self.levels = nn.ModuleList()
        for i in reversed(range(levels)):  # top first; 0 is the bottom
            channels_above = code_dim if i < levels - 1 else 0  # that the decoder of the level above adds
            channels_below, stride = (width, 2) if i else (channels, downsample)
            encoder = Encoder(channels_below, width, blocks, stride)
            to_code = nn.Sequential(nn.SiLU(), nn.Conv2d(width + channels_above, code_dim, 1))
            quantizer = kind(codebook_size, code_dim, **quantizer_options)
            decoder = Decoder(code_dim + channels_above, code_dim if i else channels, width, blocks, stride)
            self.levels.append(Level(encoder, to_code, quantizer, decoder))

    def forward(self, x: Tensor) -> Reconstruction:
        """Encode, quantize and decode; x_recon is float32 and not clamped to [0, 1]."""
        quantized, above = [], None
        for level, features in zip(self.levels, self._features(x)):
            quantized.append(level.quantizer(level.to_code(concat(features, above))))
            above = level.decoder(concat(quantized[-1].z_q, above))
        return Reconstruction(self._pixels(above, x.shape[-2:]), quantized)

    @property
    def starting(self) -> bool:
        """Whether a codebook is still being initialised, which reads values on the host: do not compile yet."""
        return not all(level.quantizer.all_initialised for level in self.levels)

    def z_e(self, x: Tensor) -> list[Tensor]:
        """Return each level's encoder output before quantization, (B, D, h, w); changes no codebook."""
        return self._encode(x)[0]

    @torch.no_grad()
    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the codes of images: the indices (B, h, w) of each level, or of each scale."""
        indices = self._encode(x)[1]
        return indices[0] if self.scales else indices

    def decode(self, indices: list[Tensor | None], size: tuple[int, int] | None = None) -> Tensor:
        """Return the images of codes, in [0, 1], cropped to `size`; by default `image_size` if it has this grid.

        If a level's indices are None, its average code is used. With scales, the first few are enough.
        """
        indices = [indices] if self.scales else indices
        z_q = [None if i is None else level.quantizer.lookup(i) for level, i in zip(self.levels, indices)]
        known = [(codes, stride) for codes, stride in zip(z_q, self.strides) if codes is not None]
        if len(indices) != len(self.levels) or not known:
            found = len(indices) if known else 0
            raise ValueError(f"got indices of {found} levels, but the model has {len(self.levels)}")
        batch, grid = len(known[0][0]), [length * known[0][1] for length in known[0][0].shape[-2:]]
        z_q = [
            level.average_code(batch, grid[0] // stride, grid[1] // stride) if codes is None else codes
            for level, codes, stride in zip(self.levels, z_q, self.strides)
        ]
        if size is None:
            size = self.image_size if grid == self._padded(self.image_size) else grid
        return self._pixels(self._decode(z_q), size).clamp(0, 1)

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the grid (h, w) of codes of each level or scale, for images of size (H, W)."""
        grids = [tuple(length // stride for length in self._padded(size)) for stride in self.strides]
        return [*self.scales[:-1], *grids]

    def codebooks(self) -> list[Tensor]:
        """Return the codebook (K, D) of each level; with scales, the shared one, once per scale."""
        return [level.quantizer.codebook.detach() for level in self.levels] * (len(self.scales) or 1)

    def _encode(self, x):  # z_e and indices of each level; the lower level needs the decoded codes of the upper one
        z_e, indices = [], []
        for level, features in zip(self.levels, self._features(x)):
            z_q = [upper.quantizer.lookup(chosen) for upper, chosen in zip(self.levels, indices)]
            z_e.append(level.to_code(concat(features, self._decode(z_q))))
            indices.append(level.quantizer.encode(z_e[-1]))
        return z_e, indices

    def _features(self, x):  # of each level, top first
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"images have shape {tuple(x.shape)}, but the model needs (B, {self.channels}, H, W)")
        height, width = self._padded(x.shape[-2:])
        x = (x - self.mean) / self.std
        if (height, width) != x.shape[-2:]:
            x = F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), mode="replicate")
        features = []
        for level in reversed(self.levels):
            x = level.encoder(x)
            features.append(x)
        return reversed(features)

    def _padded(self, size):  # rounded up to whole codes at every level
        return [-(-length // self.strides[0]) * self.strides[0] for length in size]

    def _decode(self, z_q):  # of all levels, or of the first ones from the top
        above = None
        for level, codes in zip(self.levels, z_q):
            above = level.decoder(concat(codes.to(self.mean.dtype), above))  # codes stay float32 in a cast model
        return above

    def _pixels(self, x, size):
        return x[..., : size[0], : size[1]].float() * self.std.float() + self.mean.float()


def concat(x: Tensor, above: Tensor | None) -> Tensor:
    return x if above is None else torch.cat([x, above], 1)


def level_key(kind: str, level: str) -> str:
    """Return the name of a level's metric: "codes_used", or with two levels "codes_used_top"."""
    return f"{kind}_{level}" if level else kind


def build_model(args: dict, image_shape: tuple[int, int, int], **statistics: Tensor) -> VQVAE:
    """Make the model that train.py's arguments describe, for images of shape (C, H, W)."""
    names = ("codebook_size", "code_dim", "width", "blocks", "downsample", "levels", "scales")
    names += ("ema", "decay", "kmeans_start", "revive_below")
    args = {"scales": None} | args  # older checkpoints have none
    return VQVAE(image_shape[0], image_shape[1:], **{name: args[name] for name in names}, **statistics)


def load_model(checkpoint: dict, device: torch.device | str = "cpu") -> VQVAE:
    """Rebuild the VQ-VAE of a checkpoint of train.py, in eval mode.

    Raises:
        ValueError: the checkpoint's weights do not fit its arguments.
    """
    args, shape, weights = checkpoint["args"], checkpoint["identity"]["image_shape"], checkpoint["model"]
    try:
        if max(args["blocks"], args["levels"]) > len(weights):
            raise ValueError("more blocks or levels than weights")
        with torch.device("meta"):  # a file may claim any sizes: compare shapes before allocating memory
            build_model(args, shape).load_state_dict(weights, assign=True)
    except Exception as error:  # a mismatch can raise almost any exception
        raise ValueError(f"{checkpoint.get('path')} holds no VQ-VAE of this version of the project") from error
    model = build_model(args, shape)
    model.load_state_dict(weights)
    return model.to(device, memory_format=torch.channels_last).eval()
