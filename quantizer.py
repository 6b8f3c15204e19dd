"""The codebook of a VQ-VAE: nearest code, straight-through gradient, and how the codes learn.

This file needs torch alone; copy it into your own project. MIT licence, copyright 2026 the authors.

Shapes: B batch, D code_dim, K codebook_size, N vectors (B times the spatial positions)
    z_e, z_q  (B, D, *spatial)      encoder output, and the codes that replace it
    indices   (B, *spatial) int64   the code at each position
    codebook  (K, D) float32
    counts    (K,)                  how often each code was used

Source: VQ-VAE, arXiv 1711.00937; equations 1 and 2 (nearest code), 3 (objective), appendix A.1 (moving averages).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LOOKUP_ELEMENTS = 2**20  # distances held at once: 4 MiB of float32 fit in a CPU's cache
LOOKUP_ELEMENTS_GPU = 2**26  # 256 MiB: few kernel launches, each with enough work
LOOKUP_ROWS = 16  # fewest vectors compared at once; with fewer, the matrix product is slow
LOOKUP_BLOCK = 64  # codes per block in the two-step argmin
KMEANS_ITERATIONS = 10


class Quantized(NamedTuple):
    """What `VectorQuantizer` returns. The losses are means over all elements, unweighted."""

    z_q: Tensor
    indices: Tensor  # with scales (scales.py), a list of them
    codebook_loss: Tensor
    commitment_loss: Tensor


class VectorQuantizer(nn.Module):
    """Replace each vector of z_e by its nearest code (arXiv 1711.00937, section 3).

        indices         k* = argmin_k ||z_e - e_k||^2         always in float32; ties go to the lowest k
        z_q             e_k*, with the gradient of z_e        straight-through estimator
        codebook_loss   mean (sg[z_e] - e_k*)^2               moves the codes
        commitment_loss mean (z_e - sg[e_k*])^2               moves the encoder

    The channels at each position are one vector, and all other dimensions are flattened: z_e of shape
    [16, 64, 32, 32] is 16,384 vectors of size 64. In train mode `forward` also initialises and updates the codebook;
    in eval mode it changes nothing. With torch.distributed, the codebook learns from the vectors of all ranks, and is
    the same on each. In train mode, do not wrap `forward` in activation checkpointing: it would update twice.

    The codes learn from `codebook_loss` through the optimizer. With `ema=True` they learn from moving averages of the
    vectors that chose them (appendix A.1), and `codebook_loss` has no gradient: N_k <- decay N_k + (1 - decay) n_k and
    m_k <- decay m_k + (1 - decay) sum z_e give e_k = m_k / N_k. Only e_k and N_k are stored, so that a code that no
    vector chose stays exactly where it is.

    Args:
        codebook_size: K, the number of codes.
        code_dim: D, the size of a code and the channels of z_e.
        ema: learn the codes by moving averages.
        decay: EMA decay of each code's count, and with `ema` of the codes.
        kmeans_start: k-means initialisation on the first training batch. If it has fewer than K distinct vectors,
            they become the first codes, and later batches supply the rest. False: codes are uniform in [-1/K, 1/K].
        revive_below: dead-code revival: a code moves onto a random vector of the batch if the batch does not use it
            and its average count is below this share of the mean count. 0 switches revival off.
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
        self.ema, self.decay, self.kmeans_start, self.revive_below = ema, decay, kmeans_start, revive_below

        codebook = torch.empty(codebook_size, code_dim, dtype=torch.float32)
        if ema:
            self.register_buffer("codebook", codebook)
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("ema_counts", torch.empty(codebook_size, dtype=torch.float32))
        self.register_buffer("started", torch.empty((), dtype=torch.int64))  # codes initialised
        self.register_buffer("revived", torch.empty(codebook_size, dtype=torch.bool), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw new codes and reset their counts; needed after `to_empty`."""
        nn.init.uniform_(self.codebook, -1 / self.codebook_size, 1 / self.codebook_size)
        self.ema_counts.fill_(1)
        self.started.fill_(0 if self.kmeans_start else self.codebook_size)
        self.all_initialised = not self.kmeans_start  # known on the host: reading `started` would wait for a GPU
        self.revived.zero_()

    def forward(self, z_e: Tensor) -> Quantized:
        """Quantize z_e (B, D, *spatial); z_q has the same shape and dtype. An empty batch gives zero losses.

        Raises:
            ValueError: z_e does not have D channels or is not floating point.
            FloatingPointError: z_e holds NaN or infinite values; the codebook is unchanged. On a GPU or if compiled,
                losses and codes become NaN or infinite instead, since raising would wait for the device.
        """
        z = self._flatten(z_e)
        learning = self.training and (len(z) > 0 or world_size() > 1)  # an empty rank still learns from the others
        if learning and not self.all_initialised:
            self._initialise(z.detach())
        indices = nearest_code(z, self.codebook)

        codes = F.embedding(indices, self.codebook)
        # Means over all elements, or 0 for an empty batch
        codebook_loss = F.mse_loss(codes, z.detach(), reduction="sum") / max(z.numel(), 1)
        commitment_loss = F.mse_loss(z, codes.detach(), reduction="sum") / max(z.numel(), 1)
        z_q = self._unflatten(codes.detach(), z_e).to(z_e.dtype)
        z_q = z_q + (z_e - z_e.detach())  # exactly the codes, with z_e's gradient

        if learning:
            self._update(z.detach(), indices)
        return Quantized(z_q, self._unflatten(indices, z_e), codebook_loss, commitment_loss)

    def encode(self, z_e: Tensor) -> Tensor:
        """Return the indices (B, *spatial) of z_e's nearest codes; changes nothing, even in train mode."""
        return self._unflatten(nearest_code(self._flatten(z_e), self.codebook), z_e)

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes (B, D, *spatial) of indices (B, *spatial).

        Raises:
            ValueError: indices that are not int32 or int64, or outside of 0 .. K - 1.
        """
        if indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"indices are {indices.dtype}, but must be int32 or int64")
        if indices.numel() and not 0 <= indices.min() <= indices.max() < self.codebook_size:
            low, high = int(indices.min()), int(indices.max())
            raise ValueError(f"indices run from {low} to {high}, but the codes are 0 to {self.codebook_size - 1}")
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def count(self, indices: Tensor) -> Tensor:
        """Count each code's uses, (K,) int64. Counts of several batches can be added and passed to `perplexity`."""
        counts = torch.zeros(self.codebook_size, dtype=torch.int64, device=indices.device)
        return counts.index_add_(0, indices.flatten().long(), counts.new_ones(indices.numel()))

    def reset_revived(self, optimizer: torch.optim.Optimizer):
        """Zero the optimizer's moments of the codes revived since the last call: old momentum would drag them away.

        Call it between `backward` and `optimizer.step` if the codes learn from `codebook_loss`.
        """
        for moment in optimizer.state.get(self.codebook, {}).values():
            if torch.is_tensor(moment) and moment.shape == self.codebook.shape:
                moment.masked_fill_(self.revived[:, None], 0)
        self.revived.zero_()

    def _flatten(self, z_e):  # (B, D, *spatial) -> (N, D) float32
        if z_e.ndim < 2 or z_e.shape[1] != self.code_dim:
            raise ValueError(
                f"z_e has shape {tuple(z_e.shape)} but needs (B, {self.code_dim}, ...), since the codes are "
                f"{self.code_dim}-dimensional; add a 1x1 convolution or change code_dim"
            )
        if not z_e.is_floating_point():
            raise ValueError(f"z_e is {z_e.dtype} but must be floating point")
        z = z_e.movedim(1, -1).reshape(-1, self.code_dim).contiguous().float()  # sums round alike in every layout
        if can_read_values(z) and (bad := z.numel() - int(z.isfinite().sum())):
            raise FloatingPointError(f"{bad} of {z.numel()} values of z_e are NaN or infinite; lower the learning rate")
        return z

    def _unflatten(self, flat, z_e):  # (N, D) -> (B, D, *spatial), or (N,) -> (B, *spatial)
        flat = flat.view(z_e.shape[0], *z_e.shape[2:], *flat.shape[1:])
        return flat.movedim(-1, 1) if flat.ndim == z_e.ndim else flat

    def _apply(self, fn, recurse=True):  # the codebook stays in float32, whatever the module is cast to
        def keep_dtype(value):
            changed = fn(value)
            return changed if changed.dtype == value.dtype else value.to(changed.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, value in state_dict.items():  # with assign=True the codebook would get the dtype of the file
            if name.startswith(prefix) and torch.is_tensor(value) and value.is_floating_point():
                state_dict[name] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *args)
        codes = state_dict.get(f"{prefix}codebook", torch.empty(0))
        if codes.shape == self.codebook.shape and f"{prefix}started" not in state_dict:
            self.started.fill_(self.codebook_size)  # codes alone were loaded, which k-means must not replace
        self.all_initialised = False
        if self.revived.device != self.ema_counts.device:  # no file has it
            self.revived = torch.zeros_like(self.ema_counts, dtype=torch.bool)
        self.revived.zero_()

    @torch.no_grad()
    def _initialise(self, z):
        first = int(self.started)
        self.all_initialised = first == self.codebook_size
        if self.all_initialised:  # known from a loaded checkpoint
            return
        z = gather_vectors(z)
        distinct = z.unique(dim=0)  # equal vectors, as in an image's empty margin, would give equal codes
        chosen = torch.randperm(len(distinct), device=z.device)[: self.codebook_size - first]
        last = first + len(chosen)
        self.codebook[first:last] = distinct[chosen]
        self.codebook[last:] = self.codebook[0]  # ties go to the lowest code, so none of these is chosen yet
        self.started.fill_(last)
        self.all_initialised = last == self.codebook_size
        if self.all_initialised:
            for _ in range(KMEANS_ITERATIONS):
                indices = nearest_code(z, self.codebook)
                counts = self.count(indices)[:, None]
                self.codebook.copy_(torch.where(counts > 0, self._sums(z, indices) / counts, self.codebook))
        if world_size() > 1:
            dist.broadcast(self.codebook.data, src=0)  # all ranks take rank 0's random choice

    @torch.no_grad()
    def _update(self, z, indices):
        counts = self.count(indices).float()
        if world_size() > 1:
            dist.all_reduce(counts)
        self.ema_counts.lerp_(counts, 1 - self.decay)
        if self.ema:
            sums = self._sums(z, indices)
            if world_size() > 1:
                dist.all_reduce(sums)
            # With m = decay N_old e + (1 - decay) sum z_e, m / N is e + (1 - decay) / N (sum z_e - n e)
            rate = (1 - self.decay) / self.ema_counts.clamp(min=1e-30)
            self.codebook += rate[:, None] * (sums - counts[:, None] * self.codebook)
        if self.revive_below:
            self._revive(z, counts)

    def _revive(self, z, counts):
        mean_count = self.ema_counts.mean()
        dead = (self.ema_counts < self.revive_below * mean_count) & (counts == 0)
        if (can_read_values(z) or world_size() > 1) and not (dead.any() and counts.any()):
            return  # nothing to revive; on a single GPU, asking would wait for it
        z = gather_vectors(z)

        # Equal vectors have equal projections; only the first of equal ones may become a code. On a GPU, `unique` would
        # wait.
        projections, order = (z * torch.arange(1, self.code_dim + 1, device=z.device).sqrt()).sum(1).sort()
        distinct = F.pad(projections.diff() != 0, (1, 0), value=True)
        priority = torch.rand(len(z), device=z.device)
        if world_size() > 1:
            dist.broadcast(priority, src=0)
        order = order[priority.where(distinct, 2.0).argsort()]

        position = dead.cumsum(0) - 1  # of each dead code among the dead ones
        moved = dead & (position < distinct.sum())
        vectors = z[order[position.clamp(0, len(z) - 1)]]
        self.codebook.copy_(vectors.where(moved[:, None], self.codebook))
        # The mean count gives a revived code time before it is dead again; with `ema`, it also slows its updates.
        self.ema_counts.copy_(mean_count.where(moved, self.ema_counts))
        self.revived |= moved

    def _sums(self, z, indices):  # sum of the vectors that chose each code, (K, D)
        return torch.zeros_like(self.codebook).index_add_(0, indices, z)


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Return argmin_k ||z_n - e_k||^2 for each vector z_n of z (N, D): (N,) int64, the lowest k of a tie.

    ||z_n||^2 is the same for all k, which leaves argmin_k 1/2 ||e_k||^2 - z_n . e_k: one matrix product, in chunks of
    N so that memory does not grow with N x K. The rounding error is that of float32 at ||e_k|| (||e_k|| + ||z_n||),
    measured from the middle of the codebook; if two distances differ by less, either code may be returned. On a GPU,
    this holds only if float32 matrix products do not use TF32; by default, PyTorch does not.
    """
    z, codebook = center(z, codebook)
    half_square = codebook.square().sum(1) / 2
    # Matrix products round differently in an incomplete last block; with padding, equal codes get equal distances.
    padding = -len(codebook) % LOOKUP_BLOCK
    half_square, codebook = F.pad(half_square, (0, padding), value=torch.inf), F.pad(codebook, (0, 0, 0, padding))
    elements = LOOKUP_ELEMENTS if z.is_cpu else LOOKUP_ELEMENTS_GPU
    rows = max(1, min(len(z), max(LOOKUP_ROWS, elements // len(codebook))))
    distances = z.new_empty(rows, len(codebook))  # one buffer for all chunks
    indices = torch.empty(len(z), dtype=torch.int64, device=z.device)
    row = torch.arange(rows, device=z.device)
    for chunk, chosen in zip(z.split(rows), indices.split(rows)):
        n = len(chunk)
        torch.addmm(half_square, chunk, codebook.T, alpha=-1, out=distances[:n])  # out: autocast leaves it in float32
        # First find the block with the least distance, then the code in it: argmin over a whole row is far slower.
        blocks = distances[:n].unflatten(1, (-1, LOOKUP_BLOCK))
        block = blocks.amin(2).argmin(1)
        torch.add(blocks[row[:n], block].argmin(1), block, alpha=LOOKUP_BLOCK, out=chosen)
    return indices


def center(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and move vectors (N, D) and codes (K, D) alike, so that float32 can tell the codes apart."""
    # Scale by a power of two, which is exact, so that float32 can hold the squares of the codes.
    scale = 1 / power_of_two_above(codebook.abs().amax())
    codebook = codebook * scale
    # Far from the origin, ||e_k||^2 would drown the differences between codes, so move the origin to their middle.
    # Round it to a multiple of a power of two above their spread, so that far away the shift is exact and keeps ties.
    middle = codebook.mean(0)
    step = power_of_two_above((codebook - middle).abs().amax())
    middle = (middle / step).round() * step
    # Clamp far beyond all codes, so that products stay finite.
    return torch.addcmul(-middle, z, scale).clamp_(-(2.0**100), 2.0**100), codebook - middle


def power_of_two_above(value: Tensor) -> Tensor:
    """Return the least power of two >= value, to float32 rounding, clamped so that its inverse is a normal number."""
    return torch.exp2(value.clamp(2.0**-126, 2.0**126).log2().ceil())


def can_read_values(values: Tensor) -> bool:
    """Return whether Python may read values: on a GPU, reading waits for it; when compiling, it breaks the graph."""
    return values.is_cpu and not torch.compiler.is_compiling()


def world_size() -> int:
    """Return how many ranks train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_vectors(z: Tensor) -> Tensor:
    """Return the vectors (N, D) of all ranks, in rank order; N may differ between them."""
    if world_size() == 1:
        return z
    sizes = [torch.zeros(1, dtype=torch.int64, device=z.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(z)], device=z.device))
    padded = F.pad(z, (0, 0, 0, int(max(sizes)) - len(z)))
    chunks = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(chunks, padded)
    return torch.cat([chunk[: int(size)] for chunk, size in zip(chunks, sizes)])


def perplexity(counts: Tensor) -> Tensor:
    """Return exp(entropy) of the codes' shares: how many equally used codes would carry as much information."""
    share = counts.cpu().double() / counts.sum().clamp(min=1e-30).cpu()
    return torch.special.entr(share).sum().exp()
