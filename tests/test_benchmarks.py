"""What the benchmarks' figures rest on."""

import argparse
import importlib.util
import json
import math
import shutil
import time

from machine import ROOT, median_seconds, output_file

from harness.run import Run

import coarse_to_fine
import machine_limit
import numpy as np
import pytest
import torch
from conftest import environment, program
from generation import distance_within, frechet
from machine_limit import convolution, flops_of_a_step
from quantizer_speed import Textbook, differing
from time_to_quality import CLONES, measure
from torch.utils.flop_counter import FlopCounterMode

from model import VQVAE
from quantizer import VectorQuantizer


def run(name, **variables):
    """Return what a program of tests/programs prints."""
    return program(name, env=environment(**variables), check=True).stdout


def test_every_script_starts_by_itself(tmp_path):
    """From another folder, where Python finds the repository's modules only if the script says where they are."""
    scripts = [path for path in ROOT.glob("benchmarks/*.py") if "argparse.ArgumentParser" in path.read_text()]
    scripts = [*scripts, ROOT / "pretrained" / "export.py"]
    if importlib.util.find_spec("triton") is None:  # it comes with PyTorch's builds for CUDA
        scripts.remove(ROOT / "benchmarks" / "triton_lookup.py")
    done = program("help_of_scripts.py", *scripts, cwd=tmp_path, env=environment(PYTHONPATH=""))
    assert len(scripts) > 10 and done.stderr.split() == [str(path) for path in scripts], done.stderr


def test_figures_have_a_place_before_they_are_measured(tmp_path):
    assert output_file(str(tmp_path / "new" / "a.json")).parent.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="file needs to be a folder"):
        output_file(str(tmp_path / "file" / "a.json"))
    for folder in (str(tmp_path), ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is a folder; name a file in it"):
            output_file(folder)


@pytest.mark.parametrize(("size", "codes", "other"), [(512, 49, 70), (512, 70, 49), (512, 256, 341)])
def test_equal_bits_is_the_largest_codebook_that_fits(size, codes, other):
    found, budget = coarse_to_fine.equal_bits(size, codes, other), codes * math.log2(size) + 1e-9
    assert other * math.log2(found) <= budget < other * math.log2(found + 1)


@pytest.mark.slow
def test_all_measurements_on_a_gpu_run_through(tmp_path):
    """At small sizes and on a CPU. A part that fails is named in the table, and the rest is still measured."""
    hidden = environment(CUDA_VISIBLE_DEVICES="")
    for name in CLONES:
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "tests" / "programs" / "peer.py", tmp_path / CLONES[0] / "modules.py")  # the others are empty
    flags = ["--tiny", f"--out={tmp_path / 'gpu.json'}", f"--peers={tmp_path}"]
    done = program("benchmarks/on_gpu.py", *flags, env=hidden)
    measured = json.loads((tmp_path / "gpu.json").read_text())["measured"]
    failed = [label for label in measured if label.endswith("FAILED")]
    assert done.returncode == 1 and failed == ["peers FAILED"], measured
    for label in ("test_cuda", "steps/s", "28.0 dB", f"images/s, {CLONES[0]}", "lookup", "codes used"):
        assert any(label in name for name in measured)
    assert all(f"| {label} |" in done.stdout for label in measured)


def cross(scales):
    """Points whose covariance is diagonal: two on each axis."""
    return np.concatenate([np.diag(scales), -np.diag(scales)])


def test_frechet_distance_matches_closed_form():
    a, b, mean = np.array([1.0, 2.0, 5.0]), np.array([3.0, 2.0, 0.5]), np.array([0.5, -1.0, 2.0])
    deviation = np.sqrt(2 / 5)  # of each axis of a cross of scale 1, which has 6 points
    expected = (mean**2).sum() + (deviation**2 * (a - b) ** 2).sum()
    assert frechet(cross(a), cross(b) + mean) == pytest.approx(expected)


def test_distance_within_averages_pairs_and_classes():
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


def test_indices_that_are_not_the_nearest_are_counted(monkeypatch):
    z, codebook = torch.randn(300, 8), torch.randn(70, 8)
    nearest = torch.cdist(z.double(), codebook.double()).argmin(1)
    monkeypatch.setattr("quantizer.nearest_code", lambda *_: nearest)
    assert differing(z, codebook) == 0
    nearest[::3] = (nearest[::3] + 1) % 70
    assert differing(z, codebook) == 100


def test_memory_excludes_the_parent_process():
    """Not that of the process that started it, which has held more."""
    assert b"1" * (5 * 10**8)
    assert 0.9e8 < int(run("held_memory.py")) < 1.2e8


def test_flops_match_the_layers():
    function, flops = convolution(8, 10, torch.float32)
    with FlopCounterMode(display=False) as counter:
        function()
    assert counter.get_total_flops() == flops
    model, layers = VQVAE(1, (28, 28)).eval(), []
    for layer in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
        layer.register_forward_hook(lambda m, _, y: layers.append(2 * m.weight.numel() * y[0, 0].numel()))
    model(torch.rand(1, 1, 28, 28))
    lookup = 2 * 49 * 512 * 64
    # Forward, and backward to the weights and, but for the first layer, to the inputs.
    assert flops_of_a_step(2) == 2 * (3 * sum(layers) - layers[0] + lookup)


def test_step_time_excludes_logging_steps(monkeypatch):
    """Each step sleeps for 20 ms, the first one and those that log for a second."""
    schedule, log = Run.schedule, Run.log
    monkeypatch.setattr(machine_limit, "FIRST", 1)
    monkeypatch.setattr(
        Run, "schedule", lambda run, step: (time.sleep(1 if step == 1 else 0.02), schedule(run, step))[1]
    )
    monkeypatch.setattr(Run, "log", lambda run, *row: (time.sleep(1), log(run, *row))[1])
    flags = ["--dataset=digits", "--width=4", "--blocks=1", "--codebook-size=8", "--log-every=4", "--batch-size=4"]
    measured = machine_limit.timed(argparse.Namespace(data_dir="data"), 8, *flags)
    assert 0.02 < measured["seconds_of_a_step"] < 0.5 and measured["longest"] > 1
    assert 0.4 < measured["no_step"] < 1  # two seconds of logging, and measuring and drawing, beside a second of steps


def test_profile_names_the_operations(monkeypatch):
    monkeypatch.setattr(machine_limit, "FIRST", 1)
    monkeypatch.setattr(machine_limit, "PROFILED", 2)
    flags = ["--dataset=digits", "--width=4", "--blocks=1", "--codebook-size=8", "--batch-size=4"]
    shares = machine_limit.profiled(argparse.Namespace(data_dir="data"), *flags)
    assert len(shares) == 12 and 0.5 < sum(shares.values()) <= 1
    assert any("convolution" in name for name in shares) and "outside of operations" in shares


def test_peer_error_covers_all_images():
    images = torch.randint(50, 200, (600, 1, 4, 4), dtype=torch.uint8)
    scale = torch.tensor([0.01] * 500 + [0.1] * 100).view(-1, 1, 1, 1)  # off by that everywhere
    at = iter(scale.split(250))
    measured = measure(lambda x: (None, x / 255 + next(at)), images)
    assert measured["test_mse"] == pytest.approx((5 * 0.0001 + 0.01) / 6, rel=1e-4)
    assert measured["test_psnr"] == pytest.approx((5 * 40 + 20) / 6, rel=1e-4)


def test_time_is_the_median_after_a_first_call(monkeypatch):
    calls, clock = [], iter([0, 5, 10, 11, 20, 23])  # which begins and ends the second to fourth calls
    monkeypatch.setattr("machine.time.perf_counter", lambda: next(clock))
    assert median_seconds(lambda: calls.append(0), repeats=3) == 3 and len(calls) == 4


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch's builds for CUDA")
def test_triton_kernel_agrees_with_the_plain_lookup():
    """The interpreter has to be asked for before Triton is imported, hence a process of its own."""
    run("compare_triton.py", TRITON_INTERPRET="1")
