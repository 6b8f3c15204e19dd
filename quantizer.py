"""The codebook of a VQ-VAE: nearest code, straight-through gradient, and the ways the codes learn.

This file needs torch alone; copy it into your own project.

Shapes: B batch, D code_dim, K codebook_size, N vectors (B times the spatial positions)
    z_e, z_q  (B, D, *spatial)      encoder output, and the codes that replace it
    indices   (B, *spatial) int64   which code stands where
    codebook  (K, D) float32
    counts    (K,)                  how often each code was used

Source: VQ-VAE, arXiv 1711.00937; equations 1 and 2 (nearest code), 3 (objective), appendix A.1 (moving averages).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LOOKUP_ELEMENTS = 2**20  # distances held at once: 4 MiB of float32 stay in a processor's cache
LOOKUP_ELEMENTS_GPU = 2**26  # 256 MiB: few kernels, each with enough to do
LOOKUP_ROWS = 16  # vectors compared at once, at least; of fewer, the matrix product is slow
LOOKUP_BLOCK = 64  # codes whose least distance is found together
KMEANS_ITERATIONS = 10


class Quantized(NamedTuple):
    """What `VectorQuantizer` returns; the losses are means over all elements, without weights."""

    z_q: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


class VectorQuantizer(nn.Module):
    """Replace each vector of z_e by its nearest code (arXiv 1711.00937, section 3).

        indices         k* = argmin_k ||z_e - e_k||^2         float32 under autocast too; the lowest k of a tie
        z_q             e_k*, with the gradient of z_e        straight-through estimator
        codebook_loss   mean (sg[z_e] - e_k*)^2               moves the codes
        commitment_loss mean (z_e - sg[e_k*])^2               moves the encoder

    The channels are the space of the codes and every other dimension is flattened: z_e of shape [16, 64, 32, 32] is
    16,384 vectors of size 64. Train mode also updates the codebook, after the lookup; eval mode changes nothing.
    Where torch.distributed is initialised, the codebook learns in train mode from the vectors of all processes, which
    may hold different numbers of them, and stays the same in each.

    The codes learn from `codebook_loss` through the optimiser, or with `ema=True` by moving averages of the vectors
    that chose them (appendix A.1), and then `codebook_loss` has no gradient. N_k <- decay N_k + (1 - decay) n_k and
    m_k <- decay m_k + (1 - decay) sum z_e give e_k = m_k / N_k, kept here as e_k and N_k: a code that no vector chose
    stays exactly where it is.

    Args:
        codebook_size: K, the number of codes.
        code_dim: D, the size of a code and the channels of z_e.
        ema: learn the codes by moving averages.
        decay: of the moving average of each code's count, and with `ema` of the codes.
        kmeans_start: start from k-means on the first training batch; a batch of fewer than K distinct vectors gives
            these as codes, and the batches after it the rest. Otherwise codes start uniform in [-1/K, 1/K].
        revive_below: a code whose average count falls below this share of the mean count, and that the batch at hand
            does not use, is dead and moves onto a random vector of the batch. 0 switches revival off.
    """

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        ema: bool = False,
        decay: float = 0.99,
        kmeans_start: bool = True,
        revive_below: float = 0.03,
    ):
        super().__init__()
        if codebook_size < 1 or code_dim < 1:
            raise ValueError(f"codebook_size and code_dim must be at least 1, got {codebook_size} and {code_dim}")
        if not (0 <= decay < 1 and 0 <= revive_below < 1):
            raise ValueError(f"decay and revive_below must be in [0, 1), got {decay} and {revive_below}")
        self.codebook_size, self.code_dim = codebook_size, code_dim
        self.ema, self.decay, self.revive_below = ema, decay, revive_below
        codebook = torch.empty(codebook_size, code_dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        if ema:
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("ema_counts", torch.ones(codebook_size))
        self.register_buffer("started", torch.tensor(0 if kmeans_start else codebook_size))  # codes that have a start
        self.all_started = not kmeans_start  # False: ask `started`, for which the host would wait for a GPU
        self.register_buffer("revived", torch.zeros(codebook_size, dtype=torch.bool), persistent=False)

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantize z_e (B, D, *spatial); z_q has its shape and dtype. An empty batch gives empties and zero losses.

        Raises:
            ValueError: z_e has another number of channels or is not floating point.
            FloatingPointError: z_e holds NaN or infinite values; the codebook is left as it was. Not on a GPU, which
                would have to be waited for, nor where compiled: there the losses and codes turn NaN or infinite.
        """
        z = self._flatten(z_e)
        learning = self.training and (len(z) > 0 or processes() > 1)
        if learning and not self.all_started:
            self._start(z.detach())
        indices = nearest_code(z.detach(), self.codebook.detach())
        codes = F.embedding(indices, self.codebook)
        codebook_loss = F.mse_loss(codes, z.detach(), reduction="sum") / max(z.numel(), 1)
        commitment_loss = F.mse_loss(z, codes.detach(), reduction="sum") / max(z.numel(), 1)
        if learning:
            self._update(z.detach(), indices)
        z_q = codes.detach() + (z - z.detach())  # exactly the codes, with the gradient of z
        return Quantized(self._unflatten(z_q, z_e), self._unflatten(indices, z_e), codebook_loss, commitment_loss)

    def encode(self, z_e: Tensor) -> Tensor:
        """Return the indices (B, *spatial) of z_e's nearest codes; changes nothing in train mode either."""
        return self._unflatten(nearest_code(self._flatten(z_e.detach()), self.codebook.detach()), z_e)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes (B, D, *spatial) of indices (B, *spatial).

        Raises:
            ValueError: indices outside of 0 .. K - 1.
        """
        if indices.numel() and not 0 <= indices.min() <= indices.max() < self.codebook_size:
            low, high = int(indices.min()), int(indices.max())
            raise ValueError(f"indices run from {low} to {high}, but the codes are 0 to {self.codebook_size - 1}")
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def count(self, indices: Tensor) -> Tensor:
        """Count each code's uses, (K,) int64; counts of several batches add up, and `perplexity` reads them."""
        counts = torch.zeros(self.codebook_size, dtype=torch.int64, device=indices.device)
        return counts.index_add_(0, indices.flatten().long(), counts.new_ones(indices.numel()))

    def reset_revived(self, optimizer: torch.optim.Optimizer):
        """Zero the optimiser's moments of the codes revived since the last call, lest old momentum drags them away.

        Call it between `backward` and `optimizer.step` when the codes learn from `codebook_loss`.
        """
        for moment in optimizer.state.get(self.codebook, {}).values():
            if torch.is_tensor(moment) and moment.shape == self.codebook.shape:
                moment.masked_fill_(self.revived[:, None], 0)
        self.revived.zero_()

    def _flatten(self, z_e):  # (B, D, *spatial) -> (N, D)
        if z_e.ndim < 2 or z_e.shape[1] != self.code_dim:
            raise ValueError(
                f"z_e has shape {tuple(z_e.shape)} but needs (B, {self.code_dim}, ...), since the codes are "
                f"{self.code_dim}-dimensional; add a 1x1 convolution or change code_dim"
            )
        if not z_e.is_floating_point():
            raise ValueError(f"z_e is {z_e.dtype} but must be floating point")
        z = z_e.movedim(1, -1).reshape(-1, self.code_dim).float()
        if costs_nothing_to_ask(z) and not largest(z.detach()).isfinite():
            bad = int((~z.isfinite()).sum())
            raise FloatingPointError(f"{bad} of {z.numel()} values of z_e are NaN or infinite; lower the learning rate")
        return z

    def _unflatten(self, flat, z_e):  # (N, D) -> (B, D, *spatial) as z_e's dtype, or (N,) -> (B, *spatial)
        flat = flat.view(z_e.shape[0], *z_e.shape[2:], *flat.shape[1:])
        return flat.movedim(-1, 1).to(z_e.dtype) if flat.ndim == z_e.ndim else flat

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.all_started = False

    @torch.no_grad()
    def _start(self, z):
        first = int(self.started)
        self.all_started = first == self.codebook_size
        if self.all_started:  # as a checkpoint says
            return
        z = gather(z)
        distinct = z.unique(dim=0)  # equal vectors, as of an image's empty margin, would be one code many times over
        chosen = torch.randperm(len(distinct), device=z.device)[: self.codebook_size - first]
        last = first + len(chosen)
        self.codebook[first:last] = distinct[chosen]
        self.codebook[last:] = self.codebook[0]  # not chosen until it has a start of its own: ties go to the lowest
        self.started.fill_(last)
        self.all_started = last == self.codebook_size
        if self.all_started:
            for _ in range(KMEANS_ITERATIONS):
                indices = nearest_code(z, self.codebook)
                counts = self.count(indices)[:, None]
                self.codebook.copy_(torch.where(counts > 0, self._sums(z, indices) / counts, self.codebook))
        if processes() > 1:
            dist.broadcast(self.codebook.data, src=0)  # the random choice of the first process

    @torch.no_grad()
    def _update(self, z, indices):
        counts = self.count(indices).float()
        if processes() > 1:
            dist.all_reduce(counts)
        self.ema_counts.lerp_(counts, 1 - self.decay)
        if self.ema:
            sums = self._sums(z, indices)
            if processes() > 1:
                dist.all_reduce(sums)
            rate = (1 - self.decay) / self.ema_counts.clamp(min=1e-30)
            self.codebook += rate[:, None] * (sums - counts[:, None] * self.codebook)
        if self.revive_below:
            self._revive(z, counts)

    def _revive(self, z, counts):
        fair = self.ema_counts.mean()
        dead = (self.ema_counts < self.revive_below * fair) & (counts == 0)
        if (costs_nothing_to_ask(z) or processes() > 1) and not (dead.any() and counts.any()):
            return
        z = gather(z)
        # Equal vectors, as of an image's empty margin, have equal marks: only the first of each may become a code.
        marks, order = (z * torch.arange(1, self.code_dim + 1, device=z.device).sqrt()).sum(1).sort()
        distinct = F.pad(marks.diff() != 0, (1, 0), value=True)
        priority = torch.rand(len(z), device=z.device)
        if processes() > 1:
            dist.broadcast(priority, src=0)
        order = order[priority.where(distinct, 2.0).argsort()]
        place = dead.cumsum(0) - 1  # of each dead code among them
        moved = dead & (place < distinct.sum())
        vectors = z[order[place.clamp(0, len(z) - 1)]]
        self.codebook.copy_(vectors.where(moved[:, None], self.codebook))
        self.ema_counts.copy_(fair.where(moved, self.ema_counts))  # time to find users; with `ema`, average inertia
        self.revived |= moved

    def _sums(self, z, indices):  # of the vectors that chose each code, (K, D)
        return torch.zeros_like(self.codebook).index_add_(0, indices, z)


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Return argmin_k ||z_n - e_k||^2 for each vector z_n of z (N, D): (N,) int64, the lowest k of a tie.

    ||z_n||^2 is the same for all k, which leaves argmin_k 1/2 ||e_k||^2 - z_n . e_k: one matrix product, in chunks
    of N so that memory does not grow with N x K. Distances are rounded as float32 rounds ||e_k|| (||e_k|| + ||z_n||),
    counted from the middle of the codebook; of codes whose distances differ by less, either may be returned. On a GPU
    that holds as long as float32 matrix products are not allowed to use TF32, which they are not by default.
    """
    scale, middle, codebook, half_square = prepared(codebook)
    # Matrix products round differently in their last, incomplete blocks; filled up, equal codes get equal distances.
    filling = -len(codebook) % LOOKUP_BLOCK
    half_square, codebook = F.pad(half_square, (0, filling), value=torch.inf), F.pad(codebook, (0, 0, 0, filling))
    elements = LOOKUP_ELEMENTS if z.is_cpu else LOOKUP_ELEMENTS_GPU
    rows = max(1, min(len(z), max(LOOKUP_ROWS, elements // len(codebook))))
    distances = z.new_empty(rows, len(codebook))  # one buffer for all chunks
    indices = torch.empty(len(z), dtype=torch.int64, device=z.device)
    row = torch.arange(rows, device=z.device)
    for chunk, chosen in zip(z.split(rows), indices.split(rows)):
        n = len(chunk)
        torch.addmm(half_square, shifted(chunk, scale, middle), codebook.T, alpha=-1, out=distances[:n])
        # The first block that holds the least distance, then where in it: argmin over a whole row is far slower.
        blocks = distances[:n].unflatten(1, (-1, LOOKUP_BLOCK))
        block = blocks.amin(2).argmin(1)
        torch.add(blocks[row[:n], block].argmin(1), block, alpha=LOOKUP_BLOCK, out=chosen)
    return indices


def prepared(codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scale, middle (D,), the codes e_k as scale e_k - middle (K, D), and 1/2 ||e_k||^2 (K,) of these."""
    # A power of two, by which no digit is lost, brings the codes to where float32 holds their squares.
    scale = 1 / power_of_two_above(largest(codebook))
    codebook = codebook * scale
    # Far from the origin ||e_k||^2 would drown the differences between codes, so that goes to their middle; rounded to
    # a power of two above their spread, lest the shift itself lose digits and with them exact ties.
    middle = codebook.mean(0)
    step = power_of_two_above(largest(codebook - middle))
    middle = (middle / step).round() * step
    codebook = codebook - middle
    return scale, middle, codebook, codebook.square().sum(1) / 2


def shifted(z: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    """Return scale z - middle (N, D), cut off where products with codes would be infinite: far beyond all codes."""
    return torch.addcmul(-middle, z, scale).clamp_(-(2.0**100), 2.0**100)


def largest(values: Tensor) -> Tensor:
    """Return the largest magnitude, a scalar; NaN where there is one."""
    return values.abs().amax() if values.numel() else values.new_zeros(())


def power_of_two_above(value: Tensor) -> Tensor:
    """Return the least power of two >= value, to float32's rounding, clamped so that its inverse is a normal number."""
    return torch.exp2(value.clamp(2.0**-126, 2.0**126).log2().ceil())


def costs_nothing_to_ask(values: Tensor) -> bool:
    """Return whether Python may look at values: the host would wait for a GPU, and a compiled graph would be cut."""
    return values.is_cpu and not torch.compiler.is_compiling()


def processes() -> int:
    """Return how many processes train together now."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(z: Tensor) -> Tensor:
    """Return the vectors (N, D) of all processes in the order of their ranks, whatever each one's N."""
    if processes() == 1:
        return z
    sizes = [torch.zeros(1, dtype=torch.int64, device=z.device) for _ in range(processes())]
    dist.all_gather(sizes, torch.tensor([len(z)], device=z.device))
    padded = F.pad(z, (0, 0, 0, int(max(sizes)) - len(z)))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes)])


def perplexity(counts: Tensor) -> Tensor:
    """Return exp(entropy) of the codes' shares: the number of equally used codes that would carry as much."""
    share = counts.cpu().double() / counts.sum().clamp(min=1).cpu()
    return torch.special.entr(share).sum().exp()
