"""What holds for any input: hypothesis looks for one for which it does not."""

import contextlib
import io

from harness.data import batch_indices

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import evaluate
import sample
import train as script
import train_prior
from quantizer import VectorQuantizer

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@st.composite
def inputs(draw):
    """A codebook, at times with duplicates, and z_e of any rank and dtype, from denormals up to 1e30."""
    dim, size = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    numbers = st.floats(-8, 8, width=32)
    scale, code_scale = (np.float32(10.0) ** draw(st.sampled_from([-44, -30, -3, 0, 3, 30])) for _ in range(2))
    codebook = draw(arrays.arrays(np.float32, (size, dim), elements=numbers)) * code_scale
    codebook = codebook[draw(st.lists(st.integers(0, size - 1), min_size=size, max_size=size))]
    shape = (draw(st.integers(0, 4)), dim, *draw(st.lists(st.integers(1, 3), max_size=3)))
    z_e = torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=numbers)) * scale)
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    return torch.from_numpy(codebook), z_e.to(dtype) if z_e.to(dtype).isfinite().all() else z_e


@settings(max_examples=300, deadline=None)
@given(inputs())
def test_every_vector_gets_a_nearest_code(case):
    """As near as the best code by brute force in float64, up to float32's rounding."""
    codebook, z_e = case
    vq = VectorQuantizer(*codebook.shape, kmeans_start=False).eval()
    vq.codebook.data.copy_(codebook)
    out = vq(z_e)
    assert out.z_q.shape == z_e.shape and out.z_q.dtype == z_e.dtype
    z = z_e.movedim(1, -1).reshape(-1, codebook.shape[1]).double()
    distances = (z[:, None] - codebook.double()).square().sum(-1)
    if len(z):
        chosen = distances.gather(1, out.indices.view(-1, 1))[:, 0]
        size = (z.abs().amax() + codebook.double().abs().amax()).square()
        assert (chosen - distances.amin(1)).amax() <= 1e-6 * size * codebook.shape[1]
        first = (codebook[out.indices.flatten()][:, None] == codebook).all(-1).int().argmax(1)
        assert torch.equal(first, out.indices.flatten())  # of equal codes always the lowest


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_batches_repeat_images_only_across_epochs(n, batch_size, seed, step):
    indices = batch_indices(n, batch_size, seed, step)
    assert len(indices) == batch_size and indices.min() >= 0 and indices.max() < n
    assert indices.bincount().max() <= -(-batch_size // n) + 1


FLAGS = ["--steps", "--batch-size", "--codebook-size", "--code-dim", "--width", "--blocks", "--beta", "--decay", "--lr"]
FLAGS += ["--codebook-lr", "--revive-below", "--seed", "--save-every", "--log-every", "--dataset", "--device", "--ema"]
FLAGS += ["--precision", "--resume", "--out-dir", "--no-kmeans-start", "--help", "--data-dir", "--run", "--", "-"]
FLAGS += ["--levels", "--downsample", "--image-size", "--memory-limit", "--depth", "--heads", "--dropout", "--num"]
FLAGS += ["--classes", "--temperature", "--top-k", "--top-p", "--guidance", "--complete", "--keep", "--fresh"]
VALUES = st.one_of(
    st.integers().map(str), st.floats().map(str), st.text(max_size=8), st.sampled_from(["digits", "cpu"])
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.sampled_from(FLAGS), VALUES), max_size=6))
def test_any_command_line_is_understood_or_refused(argv):
    """Refused means one line and exit code 2."""
    for parse_args in (script.parse_args, evaluate.parse_args, train_prior.parse_args, sample.parse_args):
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                parse_args(argv)
        except SystemExit as end:
            assert end.code in (0, 2)
            assert end.code == 0 or errors.getvalue().count("\n") == 1


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["--codebook-size", "--code-dim", "--width", "--blocks", "--batch-size", "--seed"]),
        st.one_of(st.integers(-2, 40), st.integers(10**11, 2**70)),
        min_size=1,
        max_size=3,
    )
)
def test_any_sizes_train_or_are_refused(tmp_path_factory, sizes):
    """Refused means one line and exit code 2, and no file left but the folder's lock."""
    folder = tmp_path_factory.mktemp("any") / "results"
    argv = [f"--out-dir={folder}", "--dataset=digits", "--steps=1", "--device=cpu", "--width=4", "--blocks=1"]
    argv += [f"{flag}={value}" for flag, value in sizes.items()]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            script.main(script.parse_args(argv))
    except SystemExit as end:
        assert end.code == 2 and errors.getvalue().count("\n") == 1, errors.getvalue()
        assert not folder.exists() or all(".lock" in path.name for path in folder.iterdir())
    else:
        assert (folder / "summary.json").exists()
