"""From a trained VQ-VAE to its prior, by the commands that a user gives."""

import argparse
import csv
import json
import re
import shutil
import sys

from harness import storage
from harness.data import batch_indices, load_dataset, to_pixels
from harness.storage import load_checkpoint, read_checkpoint, read_state

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, ended, refusal, same_state, save, train, train_prior
from torch.optim.optimizer import register_optimizer_step_pre_hook

import muon
import sample
import train as vqvae_script
import train_prior as script
from model import load_model
from muon import Muon
from prior import Prior, build_prior
from sample import load_run


def resume(folder, *flags):
    script.main(script.parse_args(["--resume", str(folder), "--device=cpu", *flags]))


@pytest.fixture
def trained_on():
    """The codes and labels of each call of a prior in train mode."""
    calls = []

    def remember(module, inputs):
        if isinstance(module, Prior) and module.training:
            calls.append(inputs)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(remember)
    yield calls
    hook.remove()


def lines(folder):
    with open(folder / "prior_metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_prior_leaves_its_files(prior_run):
    for name in ("prior.pt", "prior_metrics.csv", "prior_curves.png", "samples_000004.png", "samples_000008.png"):
        assert (prior_run / name).stat().st_size > 0
    assert [(row["step"], bool(row["held_out_nats"])) for row in lines(prior_run)] == [
        ("2", False),
        ("4", True),
        ("6", False),
        ("8", True),
    ]
    assert read_checkpoint(prior_run / "prior_previous.pt", "prior")["progress"]["step"] == 4  # 8 was saved twice
    summary = json.loads((prior_run / "prior_summary.json").read_text())
    assert summary["test_bits_per_image"] == pytest.approx(summary["test_nats_per_code"] * 49 / np.log(2))
    held_out = [float(row["held_out_nats"]) for row in lines(prior_run) if row["held_out_nats"]]
    assert summary["held_out_nats_per_code_given_class"] == min(held_out) == held_out[summary["best_step"] // 4 - 1]
    _, rows = script.held_out_split(read_state(prior_run / "codes.pt")[0]["train"])
    _, best = load_run(prior_run)
    assert script.nats(best, rows) == pytest.approx(min(held_out))


def test_nats_match_an_image_at_a_time(prior_run):
    """Encode, look up and sum the logarithms one image at a time."""
    model, prior = load_run(prior_run)
    data = load_dataset("digits", "")
    total = {"test_nats_per_code": 0.0, "test_nats_per_code_given_class": 0.0}
    with torch.no_grad():
        for image, label in zip(data.test_images, data.test_labels):
            codes = model.encode(to_pixels(image[None], "cpu"))[0].flatten(1)
            for name, start in zip(total, (torch.tensor([prior.classes]), label[None])):
                logs = prior(codes, start)[0].double().log_softmax(-1)
                total[name] -= sum(logs[at, code].item() for at, code in enumerate(codes[0]))
    summary = json.loads((prior_run / "prior_summary.json").read_text())
    for name, nats in total.items():
        assert summary[name] == pytest.approx(nats / (297 * 49), rel=1e-4)


def test_held_out_images_are_never_trained_on(generating_run, trained_on):
    """They are training images; all others are trained on."""
    train_prior(generating_run, "--steps=30", "--batch-size=100")  # more than two epochs
    rows = torch.load(generating_run / "codes.pt")["train"]
    train_rows, held_out = script.held_out_split(rows)
    assert len(held_out) == 75 and len(train_rows) == 1425
    assert torch.equal(torch.cat([train_rows, held_out]).unique(dim=0), rows.unique(dim=0))
    seen = {tuple(codes) for batch, _ in trained_on for codes in batch.tolist()}
    to_train, others = ({tuple(row[1:]) for row in part.tolist()} for part in (train_rows, held_out))
    assert seen == to_train and others - to_train


def test_defaults_are_those_that_were_measured():
    args = vars(script.parse_args([]))
    documented = {"run": "results", "steps": 3000, "batch_size": 64, "width": 192, "depth": 4, "heads": 6}
    documented |= {"dropout": 0.0, "weight_decay": 0.1, "lr": 1e-2, "embedding_lr": 6e-3, "precision": "auto"}
    assert args | documented == args


def test_images_that_moved_are_encoded(folder, tmp_path):
    train(tmp_path / "run", "--steps=2", "--batch-size=4", f"--dataset={folder}")
    moved = folder.rename(tmp_path / "moved")
    train_prior(tmp_path / "run", "--steps=1", "--batch-size=4", f"--data-dir={moved}")
    assert len(read_state(tmp_path / "run" / "codes.pt")[0]["train"]) == 20


def test_prior_beyond_the_memory_is_refused(prior_run, capsys):
    """Before an earlier prior makes way."""
    before = {path.name for path in prior_run.iterdir()}
    assert "training this model takes" in refusal(capsys, script, f"--run={prior_run}", "--width=6000000")
    assert {path.name for path in prior_run.iterdir()} == before


def test_samples_while_training_are_of_ten_classes(generating_run, monkeypatch):
    """Of a thousand classes, drawing all would take longer than training."""
    drawn = []
    monkeypatch.setattr(script, "sample", lambda *_, classes, **__: drawn.append(classes) or torch.zeros(100, 1, 4, 4))
    monkeypatch.setattr(script.figures, "save_samples", lambda *_: None)
    model, prior = load_run(generating_run)
    prior.classes = 1000
    run = argparse.Namespace(args=argparse.Namespace(seed=0), folder=generating_run, step=1, log_picture=print)
    script.draw(run, model, prior, 1, {"dataset": "digits", "class_names": [str(i) for i in range(1000)]})
    assert drawn == [list(range(10))]


def test_held_out_images_are_of_all_classes():
    """Those of a folder come class by class: here ten of 100 images."""
    rows = torch.arange(1000)[:, None]
    train_rows, held_out = script.held_out_split(rows)
    assert torch.equal(torch.cat([train_rows, held_out]).sort(0).values, rows) and len(held_out) == 50
    assert len((held_out // 100).unique()) == 10 and torch.equal(script.held_out_split(rows)[1], held_out)


def test_logged_means_cover_one_interval(trained_run, tmp_path):
    """Those that end at a save, too."""
    pairs = shutil.copytree(trained_run, tmp_path / "pairs")
    train_prior(trained_run, "--steps=4", "--log-every=1", "--precision=float32")
    train_prior(pairs, "--steps=4", "--save-every=2", "--precision=float32")
    each, means = ([float(row["train_nats"]) for row in lines(folder)] for folder in (trained_run, pairs))
    assert means == pytest.approx([sum(each[:2]) / 2, sum(each[2:]) / 2], rel=1e-5)


def test_codes_of_each_map_are_in_order(scales_run, tmp_path):
    """The first image's codes, from the coarsest map to the finest, stand behind its label."""
    folder = shutil.copytree(scales_run, tmp_path / "scales")
    train_prior(folder, "--steps=1")
    model, data = load_model(load_checkpoint(folder)), load_dataset("digits")
    maps = model.encode(to_pixels(data.train_images[:1], "cpu"))
    expected = [int(data.train_labels[0]), *(code for level in maps for code in level.flatten().tolist())]
    assert read_state(folder / "codes.pt")[0]["train"][0].tolist() == expected


def test_codes_are_kept_until_checkpoint_changes(generating_run):
    def written():
        return (generating_run / "codes.pt").stat().st_mtime_ns

    before, at = torch.load(generating_run / "codes.pt"), written()
    train_prior(generating_run, "--steps=1")
    assert written() == at
    vqvae_script.main(vqvae_script.parse_args(["--resume", str(generating_run), "--steps=40", "--device=cpu"]))
    train_prior(generating_run, "--steps=1")
    after = torch.load(generating_run / "codes.pt")
    assert after["key"] == load_checkpoint(generating_run)["digest"] != before["key"]
    assert not torch.equal(after["train"], before["train"])


@pytest.mark.parametrize("content", [b"", b"not a file of torch"])
def test_damaged_codes_are_recomputed(generating_run, content):
    before = torch.load(generating_run / "codes.pt")
    (generating_run / "codes.pt").write_bytes(content)
    train_prior(generating_run, "--steps=1")
    assert same_state(torch.load(generating_run / "codes.pt"), before)


def test_codes_that_link_to_nowhere_are_recomputed(generating_run):
    path = generating_run / "codes.pt"
    path.unlink()
    path.symlink_to("nowhere")
    train_prior(generating_run, "--steps=1")
    assert path.is_file() and not path.is_symlink()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["same command", "--resume"])
def test_stopped_prior_goes_on_bit_for_bit(prior_run, tmp_path, stop_at, precision, way):
    flags = ["--steps=9", "--save-every=4", f"--precision={precision}", "--dropout=0.1"]
    whole, halves = (shutil.copytree(prior_run, tmp_path / name) for name in ("whole", "halves"))
    train_prior(whole, *flags)
    stop_at(5, halves, *flags, call=train_prior)
    assert load_checkpoint(halves, "prior")["progress"]["step"] == 5
    if way == "--resume":
        resume(halves)
    else:
        train_prior(halves, *flags)
    assert_same_prior(whole, halves)


def assert_same_prior(a, b):
    assert (a / "prior_metrics.csv").read_bytes() == (b / "prior_metrics.csv").read_bytes()
    assert same_state(load_checkpoint(a, "prior"), load_checkpoint(b, "prior"))
    for picture in ("samples_000004.png", "samples_000008.png", "samples_000009.png", "prior_curves.png"):
        assert (a / picture).read_bytes() == (b / picture).read_bytes()
    summaries = [json.loads((folder / "prior_summary.json").read_text()) for folder in (a, b)]
    names = {name for name in summaries[0] if name.endswith(("_step", "_image")) or "nats" in name}
    assert len(names) == 6 and all(summaries[0][name] == summaries[1][name] for name in names)


@pytest.mark.parametrize("step", [4, 9])
def test_report_that_failed_is_made_later(prior_run, tmp_path, monkeypatch, capsys, step):
    """The disk is full when a picture is drawn, at a save halfway or at the end; the same command makes it later."""
    flags = ["--steps=9", "--save-every=4"]
    whole, halves = (shutil.copytree(prior_run, tmp_path / name) for name in ("whole", "halves"))
    train_prior(whole, *flags)
    save_samples = script.figures.save_samples

    def full_disk(path, *args):
        if path.name == f"samples_{step:06d}.png":
            raise OSError(28, "No space left on device", str(path))
        save_samples(path, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(script.figures, "save_samples", full_disk)
        train_prior(halves, *flags)
    assert stopped.value.code == 1 and f"the checkpoint of step {step} is intact" in capsys.readouterr().err
    train_prior(halves, *flags)
    assert_same_prior(whole, halves)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_prior_learns_like_the_eager_one(prior_run, tmp_path):
    learnt = []
    for flag in ("--no-compile", "--compile"):
        folder = shutil.copytree(prior_run, tmp_path / flag)
        train_prior(folder, "--steps=6", "--precision=float32", "--dropout=0", flag)
        learnt.append(np.loadtxt(folder / "prior_metrics.csv", delimiter=",", skiprows=1, usecols=1))
    assert len(learnt[0]) == 3 and learnt[1] == pytest.approx(learnt[0], rel=1e-3)


@pytest.mark.slow
def test_two_processes_match_one(finished_run, tmp_path):
    for ranks in (1, 2):
        folder = shutil.copytree(finished_run, tmp_path / str(ranks))
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--", "train_prior.py"]
        flags = [f"--run={folder}", *TINY, "--steps=8", "--save-every=4", "--precision=float32"]
        flags += ["--batch-size=15", "--dropout=0"]  # whose masks each process draws for itself
        ended([sys.executable, *command, *flags], check=True)
    one, two = lines(tmp_path / "1"), lines(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert float(a[name] or 0) == pytest.approx(float(b[name] or 0), rel=1e-4)


def test_steps_match_the_formulas(trained_run):
    """Two of them: each optimizer's weights, learning rate and decay, and gradients of one step alone."""
    flags = ["--steps=2", "--dropout=0", "--precision=float32", "--seed=1", "--weight-decay=10"]
    train_prior(trained_run, *flags)
    model, codes = load_model(load_checkpoint(trained_run)), read_state(trained_run / "codes.pt")[0]
    rows, _ = script.held_out_split(codes["train"])
    torch.manual_seed(1)
    shape = {"codebook_size": 32, "grids": [(7, 7)], "classes": 10}
    prior = build_prior(vars(script.parse_args([*TINY, *flags])), shape, model)
    prior.init_from_codebooks([model.levels[0].quantizer.codebook.detach()])
    matrices = [p for name, p in prior.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    others = [p for name, p in prior.named_parameters() if not (name.startswith("blocks") and p.ndim == 2)]
    muon, adamw = Muon(matrices, torch.float32, weight_decay=10), torch.optim.AdamW(others, weight_decay=10)
    for step, share in ((0, 1.0), (1, 0.5)):  # linear
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 1e-2 * share, 6e-3 * share
        adamw.param_groups[0]["betas"] = (0.9, 0.95)
        batch = rows[batch_indices(len(rows), 16, 1, step)]
        labels = torch.where(torch.rand(16) < 0.1, 10, batch[:, 0])
        loss = F.cross_entropy(prior(batch[:, 1:], labels).flatten(0, 1), batch[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, [*prior.parameters()])
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for parameter, gradient in zip(prior.parameters(), gradients):
            parameter.grad = gradient / norm.clamp(min=1)
        muon.step()
        adamw.step()
    trained = load_checkpoint(trained_run, "prior")["model"]
    for name, parameter in prior.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=1e-4, msg=name)


def test_gradients_are_clipped_to_a_norm_of_one(trained_run, monkeypatch):
    """Of all weights together, however large the loss."""
    cross_entropy, norms = F.cross_entropy, []
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **options: 1000 * cross_entropy(*args, **options))

    def remember(optimizer, *_):
        norms.append([p.grad.norm() for group in optimizer.param_groups for p in group["params"]])

    hook = register_optimizer_step_pre_hook(remember)
    train_prior(trained_run, "--steps=1")
    hook.remove()
    assert torch.tensor([norm for of_one in norms for norm in of_one]).norm().item() == pytest.approx(1, rel=1e-3)


def test_earlier_prior_moves_to_a_dated_folder(generating_run, capsys):
    prior, vqvae = ((generating_run / name).read_bytes() for name in ("prior.pt", "checkpoint.pt"))
    train_prior(generating_run, "--steps=1")
    [moved] = generating_run.glob("20*/prior.pt")
    assert moved.read_bytes() == prior and str(moved.parent) in capsys.readouterr().out
    assert (generating_run / "checkpoint.pt").read_bytes() == vqvae


def test_prior_of_other_code_says_how_to_go_on(generating_run, capsys, stop_at):
    """Its dated folder holds no VQ-VAE, and cannot be resumed where it is."""
    flags = ["--steps=6", "--seed=1"]
    stop_at(3, generating_run, *flags, call=train_prior)
    before = load_checkpoint(generating_run, "prior")
    storage.save_checkpoint(generating_run, before | {"code": "that of another day"}, "prior")
    train_prior(generating_run, *flags)
    printed = capsys.readouterr().out
    assert f"stop this one, move its files back, and give --resume {generating_run}" in printed
    archive = generating_run / re.findall(r"moved .* to (\S+):", printed)[-1]
    for path in archive.iterdir():
        path.replace(generating_run / path.name)
    script.main(script.parse_args([f"--resume={generating_run}"]))
    assert "resuming from step 3" in capsys.readouterr().out


def test_diverged_prior_is_one_line(trained_run, capsys):
    """Its weights are finite, but what they compute is not."""
    with pytest.raises(SystemExit) as diverged:
        train_prior(trained_run, "--steps=1", "--lr=1e25")
    printed = capsys.readouterr().err
    assert diverged.value.code == 1 and printed.count("\n") == 1 and "diverged after step 1" in printed
    assert printed.endswith("start over with --fresh and a lower rate\n")
    assert not (trained_run / "prior_metrics.csv").exists()


@pytest.mark.parametrize("way", ["same command", "--resume"])
def test_unfinished_prior_of_other_vqvae_makes_way(generating_run, capsys, stop_at, way):
    """The same command starts anew; --resume, which asks for that prior, is refused."""
    stop_at(3, generating_run, "--steps=4", call=train_prior)
    vqvae_script.main(vqvae_script.parse_args(["--resume", str(generating_run), "--steps=31", "--device=cpu"]))
    if way == "--resume":
        capsys.readouterr()
        assert "cannot be resumed: its vqvae, vqvae step (from 30 to 31) changed" in refusal(
            capsys, script, "--resume", generating_run
        )
        assert load_checkpoint(generating_run, "prior")["progress"]["step"] == 3
    else:
        train_prior(generating_run, "--steps=4")
        assert ": its vqvae, vqvae step (from 30 to 31) changed" in capsys.readouterr().out
        assert load_run(generating_run)


def test_run_without_checkpoint_is_refused(capsys, tmp_path):
    assert f"{tmp_path} holds no checkpoint.pt" in refusal(capsys, script, "--run", tmp_path)
    assert not list(tmp_path.iterdir())


def test_mistyped_run_leaves_no_folder(capsys, tmp_path):
    refusal(capsys, script, "--run", tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_resume_refuses_flags_that_contradict_the_prior(capsys, prior_run):
    assert f"--width is 32, but the run in {prior_run} has 16" in refusal(
        capsys, script, "--resume", prior_run, "--width=32", "--steps=20"
    )
    assert "has done its 8 steps; give more with --steps" in refusal(capsys, script, "--resume", prior_run)


def test_a_tenth_of_the_labels_are_dropped(trained_run, trained_on):
    train_prior(trained_run, "--steps=60", "--batch-size=32")
    seen = torch.cat([labels for _, labels in trained_on])
    assert len(seen) == 60 * 32 and 0.07 < (seen == 10).float().mean() < 0.13
    assert F.one_hot(seen, 11).sum(0).min() > 0


def test_best_prior_is_kept_not_the_last(trained_run, monkeypatch):
    """Of three measurements the second is the lowest; what is kept is a copy of the weights of that step."""
    seen, drawn, measured = [], [], iter([3.0, 1.0, 2.0])

    def nats(prior, *_, **options):
        seen.append({name: value.clone() for name, value in prior.state_dict().items()})
        return next(measured, 9.0)

    monkeypatch.setattr(script, "nats", nats)
    monkeypatch.setattr(script.figures, "save_prior_curves", lambda _path, _metrics, best_step: drawn.append(best_step))
    train_prior(trained_run, "--steps=6", "--save-every=2")
    saved = load_checkpoint(trained_run, "prior")
    assert saved["best"]["step"] == 4 and saved["best"]["held_out_nats"] == 1 and drawn == [2, 4, 4]
    assert same_state(saved["best"]["model"], seen[1]) and not same_state(seen[1], seen[2])
    assert same_state(saved["model"], seen[2])
    assert same_state(dict(load_run(trained_run)[1].state_dict()), seen[1])
    assert all(same_state(weights, seen[1]) for weights in seen[3:])  # those that the summary measures
    summary = json.loads((trained_run / "prior_summary.json").read_text())
    assert summary["best_step"] == 4 and summary["held_out_nats_per_code_given_class"] == 1


def test_samples_while_training_are_drawn_without_dropout(trained_run, monkeypatch):
    modes, generate = [], sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda prior, *a, **o: (modes.append(prior.training), generate(prior, *a, **o))[1]
    )
    train_prior(trained_run, "--steps=4", "--save-every=2")
    assert modes == [False] * 2


def test_prior_trains_with_dropout_after_a_report(trained_run, trained_on):
    train_prior(trained_run, "--steps=4", "--save-every=2")
    assert len(trained_on) == 4


def test_prior_reads_its_vqvae_under_the_lock(trained_run, monkeypatch):
    """A run of train.py that holds the lock may save until it releases it."""
    lock = storage.lock_folder

    def lock_later(folder):
        shutil.copy(folder / "checkpoint_previous.pt", folder / "checkpoint.pt")
        return lock(folder)

    monkeypatch.setattr(storage, "lock_folder", lock_later)
    train_prior(trained_run, "--steps=1")
    assert load_checkpoint(trained_run, "prior")["identity"]["vqvae"] == load_checkpoint(trained_run)["digest"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_prior_computes_in_its_precision(trained_run, monkeypatch, precision):
    layers, updates, losses, original = set(), set(), set(), muon.orthogonalize
    cross_entropy = F.cross_entropy

    def measure(logits, targets, **options):
        losses.add(logits.dtype)
        return cross_entropy(logits, targets, **options)

    monkeypatch.setattr(F, "cross_entropy", measure)

    def orthogonalize(matrices):
        updates.add(matrices[0].dtype)
        return original(matrices)

    def see(module, inputs, output):
        if isinstance(module, torch.nn.Linear) and module.training:
            layers.add(output.dtype)

    monkeypatch.setattr(muon, "orthogonalize", orthogonalize)
    with torch.nn.modules.module.register_module_forward_hook(see):
        train_prior(trained_run, "--steps=1", f"--precision={precision}")
    assert layers == updates == {getattr(torch, precision)} and losses == {torch.float32}


def test_betas_of_adam(trained_run):
    train_prior(trained_run, "--steps=1")
    assert load_checkpoint(trained_run, "prior")["adamw"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert load_checkpoint(trained_run)["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)


def test_samples_while_training_are_of_the_seed(trained_run, monkeypatch):
    drawn = []
    monkeypatch.setattr(script.figures, "save_samples", lambda path, rows, title, names: drawn.append((rows, names)))
    train_prior(trained_run, "--steps=2", "--seed=3")
    ((rows, names),) = drawn
    assert torch.equal(torch.cat(rows), sample.sample(*load_run(trained_run), seed=3)) and names == list("0123456789")


def test_single_training_image_is_refused(capsys, tmp_path):
    for name in "ab":
        save(tmp_path / "photos" / f"{name}.png")
    train(tmp_path / "run", f"--dataset={tmp_path / 'photos'}", "--steps=1", "--batch-size=1")
    assert "needs at least 2 training images" in refusal(capsys, script, "--run", tmp_path / "run", *TINY)


def test_class_without_training_images_is_named(folder, tmp_path, capsys):
    save(folder / "test" / "bird" / "0.png")
    train(tmp_path, f"--dataset={folder}", "--steps=2", "--batch-size=4")
    train_prior(tmp_path, "--steps=1", "--batch-size=4")
    assert "no training images of bird, which the prior cannot learn to draw\n" in capsys.readouterr().err


def test_prior_of_another_run_makes_way(prior_run, scales_run, tmp_path, capsys):
    """Also one of other sizes that has steps left."""
    folder = shutil.copytree(scales_run, tmp_path / "scales")
    shutil.copy(prior_run / "prior.pt", folder)
    train_prior(folder, "--steps=8", "--save-every=4")
    assert re.search(r": its vqvae, vqvae step \(from \d+ to \d+\), shape changed", capsys.readouterr().out)
    assert load_run(folder)[1].grids == [(1, 1), (2, 2), (4, 4), (7, 7)]
