import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muon import Muon, orthogonalize

SHAPES = [(24, 8), (8, 24), (8, 24), (16, 16)]


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer, weights, steps, start=0):
    for step in range(start, start + steps):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_orthogonalize_matches_polynomial_of_singular_values(dtype, tolerance):
    """Newton-Schulz keeps the singular vectors; each singular value goes through the quintic five times."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 96), (96, 32), (32, 32), (64, 64), (32, 48), (32, 96)]  # some go through products together
    matrices = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    for matrix, x in zip(orthogonalize(matrices), matrices, strict=True):
        u, s, vh = torch.linalg.svd(x.double() / x.double().norm(), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(matrix.double(), u * s @ vh, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e15])
def test_orthogonalize_brings_singular_values_near_one(scale):
    x = scale * torch.randn(48, 192, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(orthogonalize([x])[0])
    assert s.min() > 0.6 and s.max() < 1.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_leave_weights_alone(dtype):
    weights = matrices()
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    Muon(weights, dtype, weight_decay=0.0).step()
    assert all(torch.equal(a, b) for a, b in zip(matrices(), weights))


def test_frozen_weights_are_left_alone():
    weights = matrices()
    for weight in weights[1:]:
        weight.grad = torch.ones_like(weight)
    Muon(weights, torch.float32).step()
    Muon(weights[:1], torch.float32).step()
    assert [torch.equal(a, b) for a, b in zip(matrices(), weights)] == [True] + [False] * (len(weights) - 1)


def test_convolutions_are_matrices_of_their_output_channels():
    shaped = [torch.nn.Parameter(torch.randn(6, 3, 2, 4))]
    flat = [torch.nn.Parameter(shaped[0].detach().reshape(6, 24).clone())]
    gradient = torch.randn(6, 3, 2, 4)
    for weights in (shaped, flat):
        weights[0].grad = gradient.reshape(weights[0].shape)
        Muon(weights, torch.float32).step()
    torch.testing.assert_close(shaped[0].reshape(6, 24), flat[0], rtol=0, atol=1e-6)


def test_updates_match_torch_muon():
    """torch.optim.Muon orthogonalises in bfloat16, so that is how far apart they may be."""
    ours, theirs = matrices(), matrices()
    train(Muon(ours, torch.bfloat16, lr=0.02, weight_decay=0.1), ours, 5)
    train(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs, 5)
    for start, a, b in zip(matrices(), ours, theirs):
        assert (a - b).norm() < 0.02 * (b - start).norm()


def test_float32_runs_no_op_in_bfloat16():
    weights = matrices()
    with DtypeLog() as log:
        train(Muon(weights, torch.float32), weights, 2)
    assert log.dtypes == {torch.float32}


class DtypeLog(TorchDispatchMode):
    """Collect the dtypes of all floating-point tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        leaves = tree_leaves(out)
        self.dtypes |= {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit_from_state_dict(dtype):
    whole, resumed = matrices(), matrices()
    train(Muon(whole, dtype), whole, 6)
    first = Muon(resumed, dtype)
    train(first, resumed, 3)
    second = Muon(resumed, dtype)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, resumed, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
