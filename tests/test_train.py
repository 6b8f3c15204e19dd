"""What train.py does: its files, its figures, its objective, its data."""

import json
import time
from pathlib import Path

from harness import figures, machine
from harness.data import Dataset, batch_indices, load_dataset, load_training_data, random_flip, to_pixels
from harness.storage import load_checkpoint

import pytest
import torch
from conftest import SMALL, refusal, rows, same_run, save, train
from matplotlib.image import imread
from torchvision import datasets

import evaluate
import train as script
from model import build_model, load_model
from muon import Muon
from quantizer import VectorQuantizer

COLUMNS = "step,recon_loss,codebook_loss,commitment_loss,codes_used,perplexity,test_mse,dataset"


def test_run_leaves_pictures_metrics_and_checkpoint(finished_run):
    pictures = ["recon_000010.png", "recon_000020.png", "recon_000030.png", "curves.png", "codebook.png"]
    assert sorted(p.name for p in finished_run.iterdir() if not p.name.startswith(".lock")) == sorted(
        [*pictures, "metrics.csv", "summary.json", "checkpoint.pt", "checkpoint_previous.pt"]
    )
    for name in pictures:
        assert imread(finished_run / name).ndim == 3  # what it shows is tested with the figures


def test_lines_tell_the_precision_and_the_result(tmp_path, capsys):
    train(tmp_path, "--steps=1", "--precision=float32")
    first, *_, last = capsys.readouterr().out.splitlines()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert first == "training on 1,500 images of digits, on cpu in float32"
    assert f"test MSE {summary['test_mse']:.5f}, PSNR {summary['test_psnr']:.2f} dB, {summary['codes_used']} of" in last


def test_metrics_have_a_line_per_interval(finished_run):
    lines = (finished_run / "metrics.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    assert [(int(r["step"]), bool(r["test_mse"])) for r in rows(finished_run)] == [
        (5, False), (10, True), (15, False), (20, True), (25, False), (30, True)
    ]  # fmt: skip
    assert float(rows(finished_run)[-1]["recon_loss"]) < float(rows(finished_run)[0]["recon_loss"])


def test_summary_names_the_data_and_its_measurements(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["dataset"] == "digits" and summary["steps"] == 30
    assert summary["arguments"]["codebook_size"] == 32 and summary["arguments"]["beta"] == 1.0
    for name in ("seconds", "images_per_second", "test_mse", "test_psnr", "test_ssim", "perplexity", "codes_used"):
        assert summary[name] > 0
    assert summary["codes_used"] <= 32 and summary["perplexity"] <= summary["codes_used"] + 1e-9


def test_seconds_cover_the_whole_run(tmp_path, monkeypatch):
    """With the last pictures and figures as well; those of training end with the last step."""
    for name in ("save_reconstructions", "save_codebooks"):
        monkeypatch.setattr(script.figures, name, lambda *_: time.sleep(1))
    train(tmp_path, "--steps=1")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] > 2 + summary["training_seconds"] > 2


def test_training_learns_the_digits(tmp_path):
    """The mean image of the training set is the best guess without a code; 300 small steps must beat it by far."""
    train(tmp_path, "--steps=300", "--save-every=300")
    data = load_dataset("digits")
    mean = data.train_images.double().mean(0) / 255
    guess = (data.test_images / 255 - mean).square().mean().item()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_mse"] < guess / 4 and summary["codes_used"] > 24


def test_defaults_are_those_of_the_readme(capsys):
    args = vars(script.parse_args([]))
    documented = {"steps": 7500, "batch_size": 48, "codebook_size": 512, "code_dim": 8, "width": 64, "blocks": 2}
    documented |= {"decay": 0.99, "beta": 1.0, "revive_below": 0.03, "save_every": 1000, "log_every": 100}
    documented |= {"dataset": "auto", "out_dir": "results", "background": "white", "device": "auto"}
    documented |= {"precision": "auto", "ema": False, "kmeans_start": True, "levels": 1, "scales": None}
    assert args | documented == args and script.CURVE_IMAGES == 1000
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    assert "(default: 7500)" in " ".join(capsys.readouterr().out.split())


def test_seed_decides_the_run(finished_run, tmp_path):
    train(tmp_path / "same", "--steps=30", "--save-every=10")
    assert same_run(tmp_path / "same", finished_run)
    train(tmp_path / "other", "--steps=30", "--save-every=10", "--seed=1")
    assert rows(tmp_path / "other")[0]["recon_loss"] != rows(finished_run)[0]["recon_loss"]


def test_digits_replace_missing_mnist_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    args = script.parse_args([f"--data-dir={tmp_path}", f"--out-dir={tmp_path}"])
    assert load_training_data(args).name == args.dataset == "digits"
    printed = capsys.readouterr().err
    assert "WARNING: mnist is not in" in printed and "--data-dir" in printed


def test_dataset_asked_for_is_never_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    flags = ("--data-dir", tmp_path, "--dataset", "mnist", "--out-dir", tmp_path / "out")
    with pytest.raises(SystemExit) as refused:
        script.main(script.parse_args([*map(str, flags)]))
    assert refused.value.code == 2 and "copy its files into" in capsys.readouterr().err
    assert all(path.name.startswith(".lock") for path in tmp_path.glob("out/*"))


def test_losses_are_weighed_as_in_the_paper(tmp_path):
    """beta moves the encoder and not the codes; the reconstruction loss is that of normalised images."""
    for beta in (0, 1):
        train(tmp_path / str(beta), "--steps=1", f"--beta={beta}", "--precision=float32", "--log-every=1")
    low, high = (load_checkpoint(tmp_path / beta)["model"] for beta in ("0", "1"))
    assert torch.equal(low["levels.0.quantizer.codebook"], high["levels.0.quantizer.codebook"])
    assert not torch.equal(low["levels.0.encoder.1.weight"], high["levels.0.encoder.1.weight"])

    torch.manual_seed(0)
    data = load_dataset("digits")
    mean, std = data.mean, data.std
    args = script.parse_args([*SMALL, "--downsample=4"])
    model = build_model(vars(args), (1, 28, 28), mean=mean, std=std)
    x = to_pixels(data.train_images[batch_indices(1500, 16, 0, 0)], torch.device("cpu"))
    x_recon = model(x).x_recon
    expected = torch.nn.functional.mse_loss((x_recon - mean) / std, (x - mean) / std)
    assert float(rows(tmp_path / "0")[0]["recon_loss"]) == pytest.approx(expected.item(), rel=1e-4)


def test_steps_match_the_formulas(tmp_path):
    """Two of them: each optimizer's weights, learning rate and decay, and gradients of one step alone."""
    flags = ["--no-kmeans-start", "--revive-below=0", "--precision=float32", "--beta=0.7", "--flip", "--seed=1"]
    train(tmp_path, "--steps=2", *flags)
    torch.manual_seed(1)
    data, used = load_dataset("digits"), []
    args = script.parse_args([*SMALL, *flags, "--downsample=4"])
    model = build_model(vars(args), (1, 28, 28), mean=data.mean, std=data.std).to(memory_format=torch.channels_last)
    kernels, biases = ([p for p in model.parameters() if p.ndim == ndim] for ndim in (4, 1))
    muon = Muon(kernels, torch.float32, weight_decay=0.0)
    adam = torch.optim.Adam([{"params": biases}, {"params": model.levels[0].quantizer.codebook}], betas=(0.9, 0.99))
    for step, share in ((0, 1.0), (1, 0.5)):  # linear
        for group, highest in zip(muon.param_groups + adam.param_groups, (0.3 / 2**0.5, 0.3 / 2**0.5, 0.04)):
            group["lr"] = highest * share
        x = to_pixels(data.train_images[batch_indices(1500, 16, 1, step)], torch.device("cpu"))
        x = random_flip(x, 16, seed=1, step=step + 1)
        x_recon, [quantized] = model(x)
        used.append(quantized.indices)
        recon_loss = torch.nn.functional.mse_loss(x_recon / data.std, x / data.std)
        loss = recon_loss + quantized.codebook_loss + 0.7 * quantized.commitment_loss
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()])):
            parameter.grad = gradient
        muon.step()
        adam.step()
    trained = load_checkpoint(tmp_path)["model"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=1e-4, msg=name)
    assert int(rows(tmp_path)[-1]["codes_used"]) == len(torch.stack(used).unique()) < 32


def test_reconstructions_are_of_the_same_images(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_grid", lambda path, rows, title, names: drawn.append((rows[::2], title)))
    train(tmp_path, "--steps=4", "--save-every=2")
    expected = load_dataset("digits").test_images[:48] / 255
    assert len(drawn) == 2 and all(torch.equal(torch.cat(originals), expected) for originals, _ in drawn)
    assert [title for _, title in drawn] == ["digits, step 2", "digits, step 4"]


def test_colour_images_run_from_end_to_end(tmp_path, monkeypatch):
    grey = load_dataset("digits")
    colour = [t.repeat(1, 3, 1, 1) if t.ndim == 4 else t for t in grey[1:5]]
    monkeypatch.setattr(
        script, "load_training_data", lambda *_: Dataset("digits", *colour, torch.ones(3) / 2, torch.ones(3), None, "")
    )
    train(tmp_path, "--steps=5")
    assert load_checkpoint(tmp_path)["identity"]["image_shape"] == (3, 28, 28)
    assert imread(tmp_path / "recon_000005.png").ndim == 3


def test_two_levels_have_their_own_columns(folder, tmp_path):
    train(tmp_path, f"--dataset={folder}", "--levels=2", "--steps=10", "--save-every=10")
    (_, last) = rows(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for level in ("top", "bottom"):
        for name in ("codebook_loss", "commitment_loss", "codes_used", "perplexity"):
            assert float(last[f"{name}_{level}"]) > 0
        assert 0 < summary[f"codes_used_{level}"] <= 32 and summary[f"perplexity_{level}"] >= 1
    assert summary["dataset"] == str(folder) and summary["arguments"]["downsample"] == 4
    assert summary["arguments"]["codebook_lr"] == 0.01
    one = tmp_path / "one"
    train(one, f"--dataset={folder}", "--steps=10", "--save-every=10")
    assert imread(tmp_path / "codebook.png").shape[0] == 2 * imread(one / "codebook.png").shape[0]
    evaluate.main(evaluate.parse_args(["--run", str(tmp_path)]))
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["test_mse"] == pytest.approx(summary["test_mse"])
    assert evaluation["codes_used_top"] == summary["codes_used_top"]


def test_levels_alone_are_drawn_below_reconstructions(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_grid", lambda path, rows, title, names: drawn.append((rows, names)))
    train(tmp_path, f"--dataset={folder}", "--levels=2", "--steps=2", "--save-every=2")
    rows, names = drawn[0]
    assert list(names) == ["original", "reconstruction", "top alone", "bottom alone"]
    assert all(images.shape == (10, 3, 12, 16) for images in rows)
    model = load_model(load_checkpoint(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(rows[1], model(rows[0]).x_recon.clamp(0, 1))


@pytest.mark.parametrize(("size", "levels", "stride"), [(28, 1, 4), (32, 1, 4), (64, 1, 4), (96, 1, 8), (96, 2, 4)])
def test_depth_follows_the_size_of_the_images(tmp_path, size, levels, stride):
    train(tmp_path, f"--image-size={size}", f"--levels={levels}", "--steps=1", "--batch-size=2")
    saved = load_checkpoint(tmp_path)
    assert saved["args"]["downsample"] == stride
    x = torch.rand(1, 1, size, size)
    assert load_model(saved).encode(x)[-1].shape == (1, size // stride, size // stride)


def test_single_image_of_a_single_code_is_drawn(tmp_path):
    for i in range(17):
        save(tmp_path / "photos" / f"{i}.png", shape=(8, 8))
    train(tmp_path / "run", f"--dataset={tmp_path / 'photos'}", "--steps=2", "--levels=2")
    assert (tmp_path / "run" / "codebook.png").is_file()


def test_measuring_other_images_is_refused(capsys, folder, tmp_path):
    train(tmp_path / "run", f"--dataset={folder}", "--steps=2")
    for change in ("train/cat/0.png", "test/dog/3.png"):
        renamed = (folder / change).rename(folder / Path(change).parent / "renamed.png")
        printed = refusal(capsys, evaluate, f"--run={tmp_path / 'run'}")
        assert "photos are not those that the run was trained on" in printed
        renamed.rename(folder / change)
    moved = folder.rename(tmp_path / "cats, $dogs$")
    evaluate.main(evaluate.parse_args([f"--run={tmp_path / 'run'}", f"--data-dir={moved}"]))
    assert (tmp_path / "run" / "evaluation.json").is_file()


def test_revived_codes_lose_their_momentum(tmp_path, monkeypatch):
    """Each step resets the moments of revived codes, after backward and before the optimizer moves them."""
    calls = []
    for owner, name in ((VectorQuantizer, "reset_revived"), (torch.Tensor, "backward"), (torch.optim.Adam, "step")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, name=name, original=original, **k: (calls.append(name), original(*a, **k))[1]
        )
    train(tmp_path, "--steps=3")
    assert calls == ["backward", "reset_revived", "step"] * 3


def test_logged_means_cover_one_interval(tmp_path):
    train(tmp_path / "each", "--steps=6", "--log-every=1")
    train(tmp_path / "third", "--steps=6", "--log-every=3")
    for name in ("recon_loss", "codebook_loss", "commitment_loss"):
        each = [float(row[name]) for row in rows(tmp_path / "each")]
        means = [float(row[name]) for row in rows(tmp_path / "third")]
        assert means == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-5)


def test_summary_is_over_all_test_images(tmp_path, monkeypatch):
    """The curve is of fewer."""
    monkeypatch.setattr(script, "CURVE_IMAGES", 40)
    train(tmp_path, "--steps=2")
    model, images = load_model(load_checkpoint(tmp_path)), load_dataset("digits").test_images
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_mse"] == pytest.approx(evaluate.evaluate(model, images)[0]["test_mse"], rel=1e-6)
    curve = evaluate.evaluate(model, images[:40])[0]["test_mse"]
    assert float(rows(tmp_path)[-1]["test_mse"]) == pytest.approx(curve, rel=1e-6)
    assert summary["test_mse"] != pytest.approx(curve, rel=1e-6)


def test_model_beyond_the_gpu_is_one_line(tmp_path, monkeypatch, capsys):
    """As on a GPU that another process has filled."""

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(script.VQVAE, "to", full)
    assert "out of memory" in refusal(capsys, script, *SMALL, f"--out-dir={tmp_path}")


def test_size_beyond_the_memory_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "container_limit", lambda: 10**9)
    printed = refusal(capsys, script, "--dataset=digits", f"--out-dir={tmp_path}", "--image-size=8192")
    assert "--image-size 8192 takes" in printed and "make it smaller" in printed
