import csv
import os
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import train as script
import train_prior as prior_script

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their processor to the other tests
ROOT = Path(__file__).parent.parent
SMALL = ["--dataset=digits", "--codebook-size=32", "--code-dim=8", "--width=8", "--blocks=1", "--batch-size=16"]
SMALL += ["--log-every=5", "--device=cpu"]
TINY = ["--width=16", "--depth=1", "--heads=2", "--batch-size=16", "--log-every=2", "--device=cpu"]  # prior


@pytest.fixture(autouse=True)
def the_same_everywhere(monkeypatch):
    """Random tensors do not depend on the tests before, nor what scripts compute on whether there is a GPU."""
    torch.manual_seed(0)
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Take back what training does with signals, so that Ctrl-C still ends the tests."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def train(folder, *flags):
    """Train a small model on the CPU, in this process."""
    script.main(script.parse_args([f"--out-dir={folder}", *SMALL, *map(str, flags)]))


def train_prior(folder, *flags):
    prior_script.main(prior_script.parse_args([f"--run={folder}", *TINY, *map(str, flags)]))


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_state(a, b):
    """Whether two nested states are equal to the bit, seconds aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a if k not in ("seconds", "args"))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(a, b):
    pictures = [path.name for path in sorted(a.glob("recon_*.png"))]
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    assert pictures == [path.name for path in sorted(b.glob("recon_*.png"))]
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in [*pictures, "curves.png", "codebook.png"])
    return same_state(checkpoint.load_checkpoint(a), checkpoint.load_checkpoint(b))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run of 30 steps, not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "results"
    train(folder, "--steps=30", "--save-every=10")
    return folder


@pytest.fixture
def trained_run(finished_run, tmp_path):
    """A copy of it, to be changed at will."""
    return Path(shutil.copytree(finished_run, tmp_path / "results"))


@pytest.fixture(scope="session")
def prior_run(finished_run, tmp_path_factory):
    """A run with a prior of 8 steps, not to be changed."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("prior") / "results")
    train_prior(folder, "--steps=8", "--save-every=4")
    return folder


@pytest.fixture
def generating_run(prior_run, tmp_path):
    """A copy of it, to be changed at will."""
    return Path(shutil.copytree(prior_run, tmp_path / "results"))


def save(path, shape=(12, 16), mode="RGB", **options):
    """Save a random image, always the same for a path; return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(zlib.crc32("/".join(path.parts[-3:]).encode()))
    pixels = random.integers(0, 256, shape if mode == "L" else (*shape, len(mode)), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


@pytest.fixture
def folder(tmp_path):
    """Thirty RGB images of two classes, in train/ and test/."""
    for split, n in (("train", 10), ("test", 5)):
        for kind in ("cat", "dog"):
            for i in range(n):
                save(tmp_path / "photos" / split / kind / f"{i}.png")
    return tmp_path / "photos"
