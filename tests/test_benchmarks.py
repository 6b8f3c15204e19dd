"""What the benchmarks' figures rest on."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from generation import distance_within, frechet
from machine import ROOT, median_seconds
from quantizer_speed import Textbook

from quantizer import VectorQuantizer


def cross(scales):
    """Points whose covariance is diagonal: two on each axis."""
    return np.concatenate([np.diag(scales), -np.diag(scales)])


def test_frechet_distance_is_that_of_two_gaussians_with_independent_features():
    a, b, mean = np.array([1.0, 2.0, 5.0]), np.array([3.0, 2.0, 0.5]), np.array([0.5, -1.0, 2.0])
    deviation = np.sqrt(2 / 5)  # of each axis of a cross of scale 1, which has 6 points
    expected = (mean**2).sum() + (deviation**2 * (a - b) ** 2).sum()
    assert frechet(cross(a), cross(b) + mean) == pytest.approx(expected)


def test_distance_within_is_the_mean_over_pairs_and_classes():
    images = torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 1, 0, 1])
    of_classes = []
    for label in (0, 1):
        mine = [image.double() / 255 for image, its in zip(images, labels) if its == label]
        pairs = [(a - b).square().sum().sqrt() for i, a in enumerate(mine) for b in mine[:i]]
        of_classes.append(sum(pairs) / len(pairs))
    assert distance_within(images, labels) == pytest.approx(float(sum(of_classes) / 2), rel=1e-5)


@pytest.mark.parametrize("ema", [False, True])
def test_textbook_layer_does_what_ours_does(ema):
    torch.manual_seed(0)
    textbook, ours = Textbook(16, 4, ema), VectorQuantizer(16, 4, ema=ema, kmeans_start=False, revive_below=0)
    with torch.no_grad():
        ours.codebook.copy_(textbook.codebook)
    z = torch.randn(50, 4)
    inputs, results = [z.clone().requires_grad_() for _ in range(2)], []
    for layer, x in zip((textbook, ours), inputs):
        if layer is ours:
            z_q, _, codebook_loss, commitment_loss = ours(x)
            loss = 0.25 * commitment_loss + (0 if ema else codebook_loss)
        else:
            z_q, loss = textbook(x)
        (z_q.square().sum() + loss).backward()
        results += [[z_q, loss, x.grad, layer.codebook if ema else layer.codebook.grad]]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_time_is_the_median_after_a_first_call(monkeypatch):
    calls, clock = [], iter([0, 5, 10, 11, 20, 23])  # which begins and ends the second to fourth calls
    monkeypatch.setattr("machine.time.perf_counter", lambda: next(clock))
    assert median_seconds(lambda: calls.append(0), repeats=3) == 3 and len(calls) == 4


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch's builds for CUDA")
def test_triton_kernel_gives_the_indices_of_the_plain_lookup():
    code = """if True:
        import torch
        from quantizer import nearest_code
        from triton_lookup import nearest_code_triton
        for n, size, dim in (0, 8, 4), (1, 1, 1), (70, 130, 5), (100, 513, 40):
            few = torch.randint(-3, 4, (max(1, size // 2), dim)).float()
            codebook = few[torch.randint(len(few), (size,))]  # each code several times
            z = torch.randint(-9, 10, (n, dim)) / 2
            expected = nearest_code(z, codebook)
            assert torch.equal(nearest_code_triton(z, codebook), expected)
            assert torch.equal(nearest_code_triton(2.0**70 * z, 2.0**70 * codebook), expected)
            assert torch.equal(nearest_code_triton(z + 100, codebook + 100), expected)
            z, codebook = torch.randn(dim, n).T, torch.randn(dim, size).T
            assert torch.equal(nearest_code_triton(z, codebook), nearest_code(z, codebook))"""
    # The interpreter has to be asked for before Triton is imported, so in a process of its own.
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
