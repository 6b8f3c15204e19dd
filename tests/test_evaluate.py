import json

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import data
import evaluate
from model import VQVAE


def scipy_ssim(x, y):
    def blur(image):  # truncate=3.5 makes the window 11 wide
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    index = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    return index.mean()


def test_ssim_is_that_of_scipys_gaussian_windows():
    x, y = torch.rand(5, 1, 28, 20, dtype=torch.float32), torch.rand(5, 1, 28, 20)
    expected = [scipy_ssim(a, b) for a, b in zip(x[:, 0].double().numpy(), y[:, 0].double().numpy())]
    np.testing.assert_allclose(evaluate.ssim(x, y), expected, atol=1e-5)
    torch.testing.assert_close(evaluate.ssim(x, x), torch.ones(5))
    assert evaluate.ssim(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)).shape == (2,)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = VQVAE(1, (28, 28), codebook_size=16, code_dim=8, width=16, blocks=1, kmeans_start=False)
    torch.nn.init.normal_(model.levels[0].quantizer.codebook, std=0.1)
    return model


def test_figures_are_those_of_all_images_whatever_is_measured_at_once(model, monkeypatch):
    images = torch.randint(0, 256, (37, 1, 28, 28), dtype=torch.uint8)
    measured, (counts,) = evaluate.evaluate(model, images)
    for count in (1, 10):
        monkeypatch.setattr(data, "PART_PIXELS", count * 28 * 28)
        assert evaluate.evaluate(model, images)[0] == pytest.approx(measured, rel=1e-5)
    with torch.no_grad():
        x = images.numpy() / 255
        x_recon = model.eval()(images / 255).x_recon.clamp(0, 1).double().numpy()
    mse = ((x - x_recon) ** 2).mean((1, 2, 3))
    assert measured["test_mse"] == pytest.approx(mse.mean(), rel=1e-5)
    assert measured["test_psnr"] == pytest.approx((10 * np.log10(1 / mse)).mean(), rel=1e-5)
    share = (counts[counts > 0] / counts.sum()).numpy()
    assert measured["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert measured["codes_used"] == (counts > 0).sum() and counts.sum() == 37 * 49


def test_evaluating_leaves_the_model_in_its_mode_and_changes_nothing(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    evaluate.evaluate(model, torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8))
    assert model.training and all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_script_prints_and_writes_what_training_measured(trained_run, capsys):
    evaluate.main(evaluate.parse_args(["--run", str(trained_run)]))
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((trained_run / "summary.json").read_text())
    assert printed == json.loads((trained_run / "evaluation.json").read_text())
    names = ("dataset", "test_mse", "test_psnr", "test_ssim", "perplexity", "codes_used")
    assert {n: printed[n] for n in names} == pytest.approx({n: summary[n] for n in names})
