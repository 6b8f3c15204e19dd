import errno
import io
import json
import sys

from harness import data
from harness.data import load_dataset
from harness.storage import load_checkpoint

import numpy as np
import pytest
import torch
from conftest import batches_of, refusal, train
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import evaluate
from model import VQVAE, load_model


def scipy_ssim(x, y):
    def blur(image):  # truncate=3.5 makes the window 11 wide
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    index = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    return index.mean()


def test_ssim_matches_scipy_gaussian_windows():
    x, y = torch.rand(5, 1, 28, 20, dtype=torch.float32), torch.rand(5, 1, 28, 20)
    expected = [scipy_ssim(a, b) for a, b in zip(x[:, 0].double().numpy(), y[:, 0].double().numpy())]
    np.testing.assert_allclose(evaluate.ssim(x, y), expected, atol=1e-5)
    torch.testing.assert_close(evaluate.ssim(x, x), torch.ones(5))
    assert evaluate.ssim(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)).shape == (2,)


def test_code_used_once_is_used(model):
    measured, (counts,) = evaluate.evaluate(model, torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    assert counts.sum() == 1 and measured["codes_used"] == 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = VQVAE(1, (28, 28), codebook_size=16, code_dim=8, width=16, blocks=1, kmeans_start=False)
    torch.nn.init.normal_(model.levels[0].quantizer.codebook, std=0.1)
    return model


def test_metrics_cover_all_images(model, monkeypatch):
    """Whatever number is measured at once."""
    images = torch.randint(0, 256, (37, 1, 28, 28), dtype=torch.uint8)
    measured, (counts,) = evaluate.evaluate(model, images)
    for count in (1, 10):
        monkeypatch.setattr(data, "CHUNK_PIXELS", count * 28 * 28)
        with batches_of(model) as seen:
            assert evaluate.evaluate(model, images)[0] == pytest.approx(measured, rel=1e-5)
        assert max(seen) == count
    with torch.no_grad():
        x = images.numpy() / 255
        x_recon = model.eval()(images / 255).x_recon.clamp(0, 1).double().numpy()
    mse = ((x - x_recon) ** 2).mean((1, 2, 3))
    assert measured["test_mse"] == pytest.approx(mse.mean(), rel=1e-5)
    assert measured["test_psnr"] == pytest.approx((10 * np.log10(1 / mse)).mean(), rel=1e-5)
    ssims = [scipy_ssim(a, b) for a, b in zip(x[:, 0], x_recon[:, 0])]
    assert measured["test_ssim"] == pytest.approx(np.mean(ssims), abs=1e-5)
    share = (counts[counts > 0] / counts.sum()).numpy()
    assert measured["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert measured["codes_used"] == (counts > 0).sum() and counts.sum() == 37 * 49


def test_evaluating_changes_nothing_in_the_model(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    for measure in (evaluate.evaluate, evaluate.evaluate_jpeg):
        measure(model, torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8))
    assert model.training and all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_script_prints_and_writes_what_training_measured(trained_run, capsys):
    evaluate.main(evaluate.parse_args(["--run", str(trained_run)]))
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((trained_run / "summary.json").read_text())
    assert printed == json.loads((trained_run / "evaluation.json").read_text())
    names = ("dataset", "test_mse", "test_psnr", "test_ssim", "perplexity", "codes_used")
    assert {n: printed[n] for n in names} == pytest.approx({n: summary[n] for n in names})


def test_each_level_has_its_own_figures():
    model = VQVAE(1, (16, 16), codebook_size=16, code_dim=8, width=16, blocks=1, levels=2, kmeans_start=False)
    for level in model.levels:
        torch.nn.init.normal_(level.quantizer.codebook)
    images = torch.randint(0, 256, (9, 1, 16, 16), dtype=torch.uint8)
    measured, counts = evaluate.evaluate(model, images)
    for name, uses, indices in zip(("top", "bottom"), counts, model.encode(images / 255), strict=True):
        assert torch.equal(uses, indices.flatten().bincount(minlength=16))
        share = (uses[uses > 0] / uses.sum()).numpy()
        assert measured[f"perplexity_{name}"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
        assert measured[f"codes_used_{name}"] == len(share)


def test_folder_at_another_place_is_measured(folder, tmp_path, capsys):
    train(tmp_path / "results", f"--dataset={folder}", "--steps=2", "--batch-size=4")
    expected = json.loads((tmp_path / "results" / "summary.json").read_text())["test_mse"]
    folder.rename(tmp_path / "moved")
    assert "give its new path with --data-dir" in refusal(capsys, evaluate, "--run", tmp_path / "results")
    evaluate.main(evaluate.parse_args(["--run", str(tmp_path / "results"), "--data-dir", str(tmp_path / "moved")]))
    measured = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert measured["test_mse"] == pytest.approx(expected) and measured["step"] == 2


def test_full_disk_leaves_no_images_without_their_figures(trained_run, tmp_path, capsys, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(evaluate, "write_whole", full)
    monkeypatch.setattr(evaluate, "write_reconstructions", lambda *_: pytest.fail("images were written before"))
    assert "evaluation.json" in refusal(capsys, evaluate, f"--run={trained_run}", f"--out={tmp_path / 'out'}")


def test_out_holds_the_whole_test_set(trained_run, tmp_path, capsys):
    """In the layout of reconstruct.py."""
    out = tmp_path / "out"
    evaluate.main(evaluate.parse_args(["--run", str(trained_run), "--out", str(out)]))
    images = load_dataset("digits").test_images
    names = [f"{i:05d}.png" for i in range(len(images))]
    for kind in ("originals", "reconstructions"):
        assert sorted(path.name for path in (out / kind).iterdir()) == names
    errors = []
    for name, image in zip(names, images[:, 0].numpy()):
        original, made = (np.asarray(Image.open(out / kind / name)) for kind in ("originals", "reconstructions"))
        assert np.array_equal(original, image)
        errors.append(np.square(original / 255 - made / 255).mean())
    measured = json.loads(capsys.readouterr().out)
    assert np.mean(errors) == pytest.approx(measured["test_mse"], rel=1e-2)  # they are rounded to 8 bits
    with np.load(out / "codes.npz") as codes:
        assert codes["indices"].shape == (297, 7, 7) and codes["names"][-1] == "00296"
        assert len(np.unique(codes["indices"])) == measured["codes_used"]


def test_jpeg_figures_are_scikit_images(trained_run, capsys):
    """Of files at quality 75, in RGB, computed here by hand from the first steps on."""
    evaluate.main(evaluate.parse_args(["--run", str(trained_run), "--jpeg"]))
    measured = json.loads(capsys.readouterr().out)
    images, model = load_dataset("digits").test_images, load_model(load_checkpoint(trained_run))
    with torch.inference_mode():
        recon = torch.cat([model(chunk / 255).x_recon.clamp(0, 1) for chunk in images.split(100)])
    psnr, ssim = [], []
    for pair in zip(images[:, 0].numpy(), (recon[:, 0] * 255).round().numpy().astype(np.uint8)):
        read = []
        for pixels in pair:
            file = io.BytesIO()
            Image.fromarray(np.dstack([pixels] * 3)).save(file, "JPEG", quality=75)
            read.append(np.asarray(Image.open(file)).astype(np.float64) / 255)
        psnr.append(peak_signal_noise_ratio(*read, data_range=1.0))
        ssim.append(structural_similarity(*read, win_size=11, channel_axis=2, data_range=1.0))
    assert measured["jpeg_psnr"] == pytest.approx(np.mean(psnr), abs=0.01)
    assert measured["jpeg_ssim"] == pytest.approx(np.mean(ssim), abs=1e-3)


def test_missing_scikit_image_is_named(trained_run, tmp_path, capsys, monkeypatch):
    """And nothing is written."""
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    printed = refusal(capsys, evaluate, "--run", trained_run, "--jpeg", "--out", tmp_path / "out")
    assert "--jpeg needs scikit-image; install requirements-dev.txt" in printed
    assert not (tmp_path / "out").exists() and not (trained_run / "evaluation.json").exists()


def test_jpeg_needs_images_of_a_window(folder, tmp_path, capsys):
    train(tmp_path / "results", f"--dataset={folder}", "--image-size=10", "--steps=1", "--batch-size=4")
    printed = refusal(capsys, evaluate, "--run", tmp_path / "results", "--jpeg")
    assert "--jpeg needs images of at least 11x11 pixels, but these have 10x10" in printed
