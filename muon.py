"""Muon: momentum SGD whose updates are orthogonalised, for the weights of linear layers and convolutions.

Sources: Muon, https://kellerjordan.github.io/posts/muon; updates as large as AdamW's, arXiv 2502.16982, section 2.2.
Like torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in the precision that is fast on the device: torch
always uses bfloat16, which takes 50 times as long as float32 on a CPU that has to emulate it.
"""

import collections

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial; they maximise its slope at 0
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Args:
        params: matrices, or convolution weights (out, in, height, width), treated as matrices of `out` rows.
        dtype: used for the orthogonalisation. The weights and their momentum keep their own dtype.
    """

    def __init__(self, params, dtype: torch.dtype, lr: float = 1e-2, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype  # not saved: a run may be resumed on another device

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            params = [p for p in group["params"] if p.grad is not None]  # frozen weights have none
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            updates = torch._foreach_lerp(grads, buffers, momentum)

            # Channels last, as convolution weights are stored; the order of the columns does not matter.
            updates = [update.movedim(1, -1) for update in updates]
            matrices = orthogonalize([update.flatten(1).to(self.dtype) for update in updates])
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            for p, update, matrix in zip(params, updates, matrices):
                p.add_(matrix.reshape(update.shape).movedim(-1, 1), alpha=-lr * 0.2 * max(matrix.shape) ** 0.5)


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """Bring the singular values of matrices near 1, by Newton-Schulz iterations."""
    coarse = matrices[0].dtype == torch.bfloat16
    iterate = iterate_matrices if coarse else iterate_grams
    batches = collections.defaultdict(list)  # indices of matrices that are iterated together
    for i, matrix in enumerate(matrices):
        rows, columns = sorted(matrix.shape)
        batches[rows, columns if coarse else None].append(i)
    done = {}
    for batch in batches.values():
        tall = [matrices[i].shape[0] > matrices[i].shape[1] for i in batch]
        wide = [matrices[i].mT if flip else matrices[i] for i, flip in zip(batch, tall)]
        done |= {i: x.mT if flip else x for i, x, flip in zip(batch, iterate(wide), tall)}
    return [done[i] for i in range(len(matrices))]


def iterate_matrices(matrices: list[Tensor]) -> Tensor:
    """Orthogonalize matrices of one shape."""
    a, b, c = COEFFICIENTS
    x = torch.stack(matrices)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def iterate_grams(matrices: list[Tensor]) -> list[Tensor]:
    """Orthogonalize matrices with equally many rows: a third faster, but not accurate enough in bfloat16.

    Every iterate is the matrix times a polynomial in its Gram matrix, so that only small square matrices are iterated.
    """
    a, b, c = COEFFICIENTS
    gram = torch.stack([x @ x.mT for x in matrices])
    square_norm = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-14)
    gram, polynomial = gram / square_norm, torch.eye(gram.shape[1], device=gram.device) / square_norm.sqrt()
    for i in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial = torch.baddbmm(polynomial, factor, polynomial, beta=a)
        if i < ITERATIONS - 1:
            for _ in range(2):
                gram = torch.baddbmm(gram, factor, gram, beta=a)
    return [p @ x for p, x in zip(polynomial, matrices)]
