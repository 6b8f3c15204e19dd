"""With --precision=float32, no script computes in 16 bits: not in the network, the optimizer or the lookup."""

import pytest
import torch
from conftest import SMALL, TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import sample
import train
import train_prior

LOW = {torch.bfloat16, torch.float16}
FLOAT32 = ["--precision=float32", "--steps=2", "--save-every=1"]


class FullPrecision(TorchDispatchMode):
    """Refuse every operation, forward or backward, that reads or makes a tensor of 16 bits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, made)):
            assert not (torch.is_tensor(value) and value.dtype in LOW), f"{func} computes in {value.dtype}"
        return made


def run(script, *flags):
    with FullPrecision():
        script.main(script.parse_args([str(flag) for flag in flags]))


@pytest.mark.parametrize("options", [[], ["--ema"], ["--levels=2"]], ids=str)
def test_vqvae_trains_in_float32(tmp_path, options):
    run(train, f"--out-dir={tmp_path}", *SMALL, *FLOAT32, *options)


def test_prior_trains_in_float32(trained_run):
    run(train_prior, f"--run={trained_run}", *TINY, *FLOAT32)


def test_samples_are_drawn_in_float32(generating_run):
    run(sample, f"--run={generating_run}", "--num=3")


def test_figures_are_measured_in_float32(trained_run):
    run(evaluate, f"--run={trained_run}")


@pytest.mark.parametrize("script", [train, train_prior], ids=["train", "train_prior"])
def test_bfloat16_would_be_noticed(trained_run, tmp_path, script):
    """The other side of the tests above."""
    flags = [f"--out-dir={tmp_path / 'new'}", *SMALL] if script is train else [f"--run={trained_run}", *TINY]
    with pytest.raises(AssertionError, match="computes in torch.bfloat16"):
        run(script, *flags, "--precision=bfloat16", "--steps=1")
