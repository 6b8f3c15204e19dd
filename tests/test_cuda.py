"""What only a GPU can show; skipped where there is none."""

from harness.run import Run

import pytest
import torch
from conftest import far_from_zero, rows, save, some_codes, train

import sample
from prior import Prior
from quantizer import nearest_code

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def the_same_everywhere():
    """In place of the fixture that hides the GPU from all other tests."""
    torch.manual_seed(0)


@pytest.mark.parametrize("lookup", ["plain", "triton"])
@pytest.mark.parametrize(("size", "dim"), [(512, 64), (8192, 8)])
def test_lookup_matches_brute_force(lookup, size, dim):
    z, codebook = torch.randn(300, dim, device="cuda"), torch.randn(size, dim, device="cuda")
    expected = torch.cdist(z.double(), codebook.double()).argmin(1)
    if lookup == "triton":
        pytest.importorskip("triton")
        from triton_lookup import nearest_code_triton

        assert torch.equal(nearest_code_triton(z, codebook), expected)
    else:
        assert torch.equal(nearest_code(z, codebook), expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
@pytest.mark.parametrize("way", ["--no-ema", "--ema", "--flip", "--scales=auto"])
def test_steps_do_not_make_the_host_wait(tmp_path, monkeypatch, request, way):
    """Between two lines of metrics nothing asks the GPU for a value, from one batch to the next."""
    steps = Run.steps

    def watched(run, images):
        for step, batch in steps(run, images):
            waits = step == 1 or run.logs_at(step)  # the first step starts the codebook
            torch.cuda.set_sync_debug_mode("default" if waits else "error")
            yield step, batch
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Run, "steps", watched)
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    train(tmp_path, "--steps=30", "--log-every=10", "--save-every=30", "--device=cuda", way)
    assert len(rows(tmp_path)) == 3


@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_run_learns_as_the_eager_one_does(tmp_path):
    for flag in ("--compile", "--no-compile"):
        train(tmp_path / flag, "--steps=30", "--save-every=30", "--device=cuda", "--precision=float32", flag)
    compiled, eager = (float(rows(tmp_path / flag)[-1]["test_mse"]) for flag in ("--compile", "--no-compile"))
    assert compiled == pytest.approx(eager, rel=0.1)


def test_prior_computes_as_on_a_cpu():
    """Its logits, and the gradient of attention's bias; 17 codes, since kernels for a GPU prefer multiples of 8."""
    prior = far_from_zero(Prior(16, [(1, 2), (3, 5)], classes=3, width=32, depth=2, heads=2))
    codes, labels = some_codes(prior)
    expected = prior(codes, labels)
    expected.logsumexp(2).sum().backward()
    gradient, prior.offset_bias.grad = prior.offset_bias.grad, None
    logits = prior.cuda()(codes.cuda(), labels.cuda())
    logits.logsumexp(2).sum().backward()
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prior.offset_bias.grad.cpu(), gradient, rtol=1e-2, atol=1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        close = prior(codes.cuda(), labels.cuda()).float().cpu()
    assert (close - expected).abs().max() < 0.05 * expected.abs().max()


def test_images_are_completed(generating_run, tmp_path):
    save(tmp_path / "a.png", mode="L")
    sample.main(sample.parse_args([f"--run={generating_run}", "--complete", str(tmp_path / "a.png")]))
    assert (generating_run / "completed.png").is_file()
