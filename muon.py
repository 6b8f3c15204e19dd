"""Muon: momentum SGD whose updates are orthogonalised, for the weights of linear layers and convolutions.

Sources: Muon, https://kellerjordan.github.io/posts/muon; updates as large as AdamW's, arXiv 2502.16982, section 2.2.
As torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in the precision that is fast on the device: torch's is
bfloat16 everywhere, which takes 50 times as long as float32 on a CPU that has to emulate it.
"""

import collections

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; they maximise the slope at 0
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Args:
        params: matrices, or the weights of convolutions, (out, in, height, width), as matrices of `out` rows.
        dtype: of the orthogonalisation. The weights and their momentum keep their own.
    """

    def __init__(self, params, dtype: torch.dtype, lr: float = 1e-2, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype  # not saved: a run may be resumed on another device

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape = collections.defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - momentum)
                updates = torch.stack(torch._foreach_lerp(grads, buffers, momentum))
                matrices = updates.flatten(2).to(self.dtype)
                updates = orthogonalize(matrices).to(updates.dtype).view(-1, *shape)
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, list(updates), alpha=-lr * 0.2 * max(matrices.shape[1:]) ** 0.5)


def orthogonalize(x: Tensor) -> Tensor:
    """Bring the singular values of matrices (N, m, n) near 1, by Newton-Schulz iterations."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.dtype == torch.bfloat16 or x.shape[1] == x.shape[2]:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    # The same with (m, m) matrices alone, which commute: a third faster, but bfloat16 is too coarse for it.
    gram, product = x @ x.mT, None
    for i in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if i < ITERATIONS - 1:
            gram = factor @ gram @ factor
    return product @ x
