"""Codes from coarse to fine: a map of 1x1 codes, then 2x2, ... up to the full grid, all from one codebook.

Shapes: B batch, D code_dim, K codebook_size, scale s of S has h_s x w_s codes, the last one h x w; T codes in all
    z_e, z_q  (B, D, h, w)          encoder output, and the sum of the codes of all scales that replaces it
    indices   S x (B, h_s, w_s)     int64, coarsest first
    codebook  (K, D) float32

Source: multi-scale residual quantization, VAR, arXiv 2404.02905, algorithms 1 and 2. Departures: upscaling is bilinear,
many times as fast on a CPU as bicubic; the convolution after it starts as the identity; the last scale is not upscaled
and has no convolution, so that a single scale equals `VectorQuantizer`; and the codes of all scales learn together,
from the residuals that they quantize.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantizer import Quantized, VectorQuantizer

Size = tuple[int, int]  # (height, width) in codes
PHI_SHARE = 0.1  # weight of each convolution's output: with 1, phi changes faster than the codes can follow


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class MultiScaleQuantizer(VectorQuantizer):
    """Replace z_e by a sum of codes: each scale quantizes the residual of the scales before it.

        r_1     = z_e                                   the residual; r_{s+1} = r_s - u_s
        d_s     = downscale(r_s)                        (B, D, h_s, w_s), its local means
        e_s     = the codes nearest to d_s
        u_s     = phi_s(upscale(e_s))                   (B, D, h, w), bilinear; at the last scale u_S = e_S
        phi_s   = 1 + 0.1 conv_s                        a convolution added to its input; starts as the identity
        z_q     = u_1 + ... + u_S                       with the gradient of z_e: straight-through estimator

    `VectorQuantizer` takes the d_s of all scales as one batch. It computes the losses, mean (sg[d_s] - e_s)^2 and
    mean (d_s - sg[e_s])^2 over all T codes, and it initialises, updates and revives the codes. phi_s learns to make the
    residual small: codebook_loss also has the gradient of sum_s mean (sg[r_s] - phi_s(upscale(sg[e_s])))^2. If phi_s
    learned from the reconstruction loss instead, residuals and codes would grow without bound.

    Args:
        scales: (h_s, w_s) in growing order; z_e has the size of the last one.
        codebook_size, code_dim, options: of `VectorQuantizer`; all scales share the codebook.
    """

    def __init__(self, scales: list[Size], codebook_size: int, code_dim: int, **options):
        super().__init__(codebook_size, code_dim, **options)
        self.scales, self.sizes = scales, [height * width for height, width in scales]
        self.phi = nn.ModuleList(ZeroConv2d(code_dim, code_dim, 3, padding=1, dtype=torch.float32) for _ in scales[:-1])

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantize z_e (B, D, h, w); the indices are a list, coarsest first. Raises what `VectorQuantizer` does."""
        quantized = super().forward(self.residuals(z_e))
        residual, z_q, phi_loss = z_e.detach().float(), 0.0, 0.0
        for scale, codes in enumerate(self._split(quantized.z_q.detach())):
            upscaled = self._upscale(scale, codes)
            phi_loss = phi_loss + F.mse_loss(upscaled, residual, reduction="sum") / max(residual.numel(), 1)
            residual, z_q = residual - upscaled.detach(), z_q + upscaled.detach()
        return Quantized(
            z_q.to(z_e.dtype) + (z_e - z_e.detach()),  # exactly the sum, with z_e's gradient
            self._split(quantized.indices),
            quantized.codebook_loss + (phi_loss - phi_loss.detach()),  # adds phi's gradient, but not its value
            quantized.commitment_loss,
        )

    def encode(self, z_e: Tensor) -> list[Tensor]:
        """Return the indices of z_e, coarsest first; changes nothing."""
        return self._split(super().encode(self.residuals(z_e.detach())))

    def lookup(self, indices: list[Tensor | None]) -> Tensor:
        """Return the sum (B, D, h, w) of the codes of all scales, or of the first ones; None leaves a scale out.

        Raises:
            ValueError: the maps of indices do not have the sizes of the scales, or there is none.
        """
        sizes = [None if chosen is None else tuple(chosen.shape[1:]) for chosen in indices]
        known = {scale: chosen for scale, chosen in enumerate(indices) if chosen is not None}
        if not known or sizes != [size and scale for size, scale in zip(sizes, self.scales)]:
            raise ValueError(
                f"got codes of {format_sizes(filter(None, sizes))}, but the scales are {format_sizes(self.scales)}"
            )
        codes = {scale: super(MultiScaleQuantizer, self).lookup(chosen) for scale, chosen in known.items()}
        return sum(self._upscale(scale, part) for scale, part in codes.items())

    @torch.no_grad()
    def contexts(self, indices: list[Tensor], batch: int) -> list[Tensor]:
        """Return a prior's input for each scale of `indices` and for the next one.

        Returns:
            (batch, D, h_s, w_s) for each: the sum of the scales before it, resized to it; zeros for the first.
        """
        total = self.codebook.new_zeros(batch, self.code_dim, *self.scales[-1])
        contexts = [downscale(total, self.scales[0])]
        for scale, chosen in enumerate(indices):
            total = total + self._upscale(scale, self._codes(chosen))
            contexts.append(downscale(total, self.scales[scale + 1]))
        return contexts

    def count(self, indices: Tensor | list[Tensor]) -> Tensor:
        """Count each code's uses, at all scales together: (K,) int64."""
        return super().count(torch.cat([chosen.flatten() for chosen in indices]) if type(indices) is list else indices)

    def residuals(self, z_e: Tensor) -> Tensor:
        """Return the vectors that the codes replace, each scale's d_s side by side: (B, D, T) float32."""
        if (size := z_e.shape[2:]) != self.scales[-1]:
            raise ValueError(
                f"z_e has {format_sizes([size])} vectors, but the scales are {format_sizes(self.scales)}; give images "
                "of the size that the model was trained on"
            )
        # Until the codebook is initialised, every vector is its own code, so that k-means sees realistic residuals.
        starting = self.training and not self.all_initialised and int(self.started) < self.codebook_size
        residual, residuals = z_e.float(), []
        for scale, size in enumerate(self.scales):
            residuals.append(downscale(residual, size))
            if size != self.scales[-1]:
                with torch.no_grad():
                    codes = residuals[-1] if starting else self._codes(super().encode(residuals[-1]))
                    upscaled = self._upscale(scale, codes)
                residual = residual - upscaled
        return torch.cat([part.movedim(1, -1).flatten(1, 2) for part in residuals], 1).movedim(-1, 1)

    def _codes(self, indices):
        return F.embedding(indices, self.codebook.detach()).movedim(-1, 1)

    def _split(self, flat):  # (..., T) -> S x (..., h_s, w_s)
        return [part.unflatten(-1, size) for part, size in zip(flat.split(self.sizes, -1), self.scales)]

    def _upscale(self, scale, codes):  # u_s, in float32 under autocast too
        if self.scales[scale] == self.scales[-1]:
            return codes
        with torch.autocast(codes.device.type, enabled=False):
            codes = codes.clone(memory_format=torch.channels_last)  # one memory layout: others round differently
            upscaled = F.interpolate(codes, self.scales[-1], mode="bilinear")
            return upscaled + PHI_SHARE * self.phi[scale](upscaled)


def downscale(x: Tensor, size: Size) -> Tensor:
    """Downscale x (B, D, h, w) to `size` by averaging."""
    if x.shape[2:] == size:
        return x
    if x.device.type == "mps":  # it averages only if the sizes divide (pytorch issue 96056); not tested
        return F.interpolate(x.cpu(), size, mode="area").to(x.device)
    return F.interpolate(x, size, mode="area")


def format_sizes(sizes: Iterable[Size]) -> str:
    return ", ".join("x".join(map(str, size)) for size in sizes) or "no scale"


def parse_scales(text: str | None, grid: Sequence[int]) -> list[Size]:
    """Parse scales such as "1,2,4,7", or "1,2x3,3x5" for images that are not square; the last one must be the grid.

    "auto" means sides of 1, 2, 4, ... up to the grid; None means no scales.

    Raises:
        ValueError: the text cannot be parsed, or the scales do not grow, or do not end at the grid.
    """
    if text is None:
        return []
    if text == "auto":
        sides = [2**i for i in range(max(grid).bit_length()) if 2**i < max(grid)]
        return [(min(side, grid[0]), min(side, grid[1])) for side in sides] + [tuple(grid)]
    side = r"[1-9]\d{0,5}"
    if not re.fullmatch(rf"{side}(x{side})?(,{side}(x{side})?)*", text, re.ASCII):
        raise ValueError(f"--scales {text}: must be auto, or sizes from coarse to fine, such as 1,2,4,7 or 1,2x3,3x5")
    sides = [size.split("x") for size in text.split(",")]
    scales = [(int(side[0]), int(side[-1])) for side in sides]
    for before, after in pairwise(scales):
        if before == after or before[0] > after[0] or before[1] > after[1]:
            raise ValueError(
                f"--scales {text}: scales must grow, but {format_sizes([after])} comes after {format_sizes([before])}"
            )
    if scales[-1] != tuple(grid):
        raise ValueError(f"--scales {text}: the last scale must be the grid of codes, {format_sizes([grid])}")
    return scales
