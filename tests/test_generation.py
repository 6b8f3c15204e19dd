"""From a trained VQ-VAE to its prior to new images, by the commands that a user gives."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, same_state, save, train, train_prior
from PIL import Image

import data
import loop
import sample as sample_script
import train_prior as script
from checkpoint import load_checkpoint, read_file
from data import load_dataset, to_pixels
from sample import load_run, sample


def draw(folder, *flags):
    sample_script.main(sample_script.parse_args([f"--run={folder}", *map(str, flags)]))


def refusal(capsys, call, *args):
    """Return the one line that a call ends with, at exit code 2."""
    with pytest.raises(SystemExit) as refused:
        call(*args)
    printed = capsys.readouterr().err
    assert refused.value.code == 2 and printed.count("\n") == 1, printed
    return printed


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
    summary = json.loads((prior_run / "prior_summary.json").read_text())
    assert summary["test_bits_per_image"] == pytest.approx(summary["test_nats_per_code"] * 49 / np.log(2))
    held_out = [float(row["held_out_nats"]) for row in lines(prior_run) if row["held_out_nats"]]
    assert summary["held_out_nats_per_code_given_class"] == min(held_out) == held_out[summary["best_step"] // 4 - 1]
    _, rows = script.held_out_split(read_file(prior_run / "codes.pt")["train"])
    _, best = load_run(prior_run)
    assert script.nats(best, rows) == pytest.approx(min(held_out))


def test_nats_are_those_of_the_test_images_codes(prior_run):
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


def test_held_out_images_are_training_images_and_not_trained_on(generating_run, monkeypatch):
    seen, original = [], loop.batches
    monkeypatch.setattr(
        loop,
        "batches",
        lambda rows, order, device: (batch for batch in original(rows, order, device) if seen.append(batch) or True),
    )
    train_prior(generating_run, "--steps=30", "--batch-size=100")  # more than two epochs
    codes = torch.load(generating_run / "codes.pt")["train"]
    train_rows, held_out = script.held_out_split(codes)
    assert len(held_out) == 75 and len(train_rows) == 1425
    together = torch.cat([train_rows, held_out])
    assert torch.equal(together.unique(dim=0), codes.unique(dim=0))
    trained_on = torch.cat(seen).unique(dim=0)
    assert torch.equal(trained_on, train_rows.unique(dim=0))
    others = set(map(tuple, held_out.tolist())) - set(map(tuple, train_rows.tolist()))
    assert others and not others & set(map(tuple, trained_on.tolist()))


def test_codes_are_kept_until_the_checkpoint_changes(generating_run, monkeypatch):
    encoded = []
    original = script.dataset_of
    monkeypatch.setattr(script, "dataset_of", lambda *args: (encoded.append(args), original(*args))[1])
    before = torch.load(generating_run / "codes.pt")
    train_prior(generating_run, "--steps=1")
    assert not encoded
    subprocess.run(
        [sys.executable, "train.py", "--resume", generating_run, "--steps=40"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    train_prior(generating_run, "--steps=1")
    after = torch.load(generating_run / "codes.pt")
    assert len(encoded) == 1 and after["key"] != before["key"]
    assert not torch.equal(after["train"], before["train"])


@pytest.mark.parametrize("content", [b"", b"not a file of torch"])
def test_damaged_codes_are_made_anew(generating_run, content):
    before = torch.load(generating_run / "codes.pt")
    (generating_run / "codes.pt").write_bytes(content)
    train_prior(generating_run, "--steps=1")
    assert same_state(torch.load(generating_run / "codes.pt"), before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_prior_ends_bit_for_bit_as_one_that_never_stopped(prior_run, tmp_path, monkeypatch, precision):
    flags = ["--steps=9", "--save-every=4", f"--precision={precision}", "--dropout=0.1"]
    whole, halves = (shutil.copytree(prior_run, tmp_path / name) for name in ("whole", "halves"))
    train_prior(whole, *flags)
    signals, original = [], loop.batch_indices
    with monkeypatch.context() as patch:
        patch.setattr(script, "catch_signals", lambda: signals)
        patch.setattr(loop, "batch_indices", lambda *a: (signals.append(15) if a[-1] == 4 else 0, original(*a))[1])
        with pytest.raises(SystemExit) as stopped:
            train_prior(halves, *flags)
    assert stopped.value.code == 143 and load_checkpoint(halves, "prior")["progress"]["step"] == 5
    resume = [sys.executable, "train_prior.py", "--resume", halves, "--device=cpu"]
    subprocess.run(resume, cwd=ROOT, check=True, capture_output=True)
    assert (halves / "prior_metrics.csv").read_bytes() == (whole / "prior_metrics.csv").read_bytes()
    assert same_state(load_checkpoint(halves, "prior"), load_checkpoint(whole, "prior"))
    for picture in ("samples_000008.png", "samples_000009.png", "prior_curves.png"):
        assert (halves / picture).read_bytes() == (whole / picture).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_prior_learns_what_an_eager_one_learns(prior_run, tmp_path):
    learnt = []
    for flag in ("--no-compile", "--compile"):
        folder = shutil.copytree(prior_run, tmp_path / flag)
        train_prior(folder, "--steps=6", "--precision=float32", "--dropout=0", flag)
        learnt.append(np.loadtxt(folder / "prior_metrics.csv", delimiter=",", skiprows=1, usecols=1))
    assert len(learnt[0]) == 3 and learnt[1] == pytest.approx(learnt[0], rel=1e-3)


@pytest.mark.slow
def test_prior_of_two_processes_is_that_of_one(finished_run, tmp_path):
    for ranks in (1, 2):
        folder = shutil.copytree(finished_run, tmp_path / str(ranks))
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--", "train_prior.py"]
        flags = [f"--run={folder}", *TINY, "--steps=8", "--save-every=4", "--precision=float32"]
        flags += ["--batch-size=15", "--dropout=0"]  # whose masks each process draws for itself
        subprocess.run([sys.executable, *command, *flags], cwd=ROOT, check=True, capture_output=True, timeout=600)
    one, two = lines(tmp_path / "1"), lines(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert float(a[name] or 0) == pytest.approx(float(b[name] or 0), rel=1e-4)


def test_earlier_prior_is_kept_in_a_dated_folder_and_the_vqvae_stays(generating_run, capsys):
    prior, vqvae = ((generating_run / name).read_bytes() for name in ("prior.pt", "checkpoint.pt"))
    train_prior(generating_run, "--steps=1")
    [moved] = generating_run.glob("20*/prior.pt")
    assert moved.read_bytes() == prior and str(moved.parent) in capsys.readouterr().out
    assert (generating_run / "checkpoint.pt").read_bytes() == vqvae


def test_samples_are_images_and_a_seed_fixes_them(prior_run):
    model, prior = load_run(prior_run)
    images = sample(model, prior, num=12, classes=[3, 7], seed=1)
    assert images.shape == (12, 1, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images, sample(model, prior, num=12, classes=[3, 7], seed=1))
    assert not torch.equal(images, sample(model, prior, num=12, classes=[3, 7], seed=2))


def test_samples_differ_by_class(prior_run):
    """Take the likeliest image of each class from a prior whose label matters."""
    model, prior = load_run(prior_run)
    torch.nn.init.normal_(prior.label.weight, std=10)
    images = sample(model, prior, num=10, temperature=1e-6)
    assert len(images.flatten(1).unique(dim=0)) > 2


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: path, rows and title."""
    calls = []
    monkeypatch.setattr(sample_script.figures, "save_samples", lambda *args: calls.append(args))
    return calls


def test_sample_writes_a_row_per_class_and_single_images(generating_run, drawn, tmp_path):
    out = tmp_path / "single"
    draw(generating_run, "--num=6", "--classes=7,3", "--seed=5", "--top-k=9", "--guidance=2", "--out", out)
    [(path, rows, _)] = drawn
    expected = sample(*load_run(generating_run), num=6, classes=[7, 3], seed=5, top_k=9, guidance=2)
    assert path == generating_run / "samples.png" and len(rows) == 2
    assert torch.equal(torch.cat(list(rows)), expected)
    files = sorted(out.iterdir())
    assert len(files) == 6
    for file, image in zip(files, expected):
        assert np.array_equal(np.asarray(Image.open(file)), image[0].numpy())  # grey, as it was learnt


def test_what_is_drawn_at_once_is_bounded_by_pixels(prior_run, monkeypatch):
    drawn, original = [], sample_script.generate
    monkeypatch.setattr(sample_script, "generate", lambda *a, **o: drawn.append(original(*a, **o)) or drawn[-1])
    monkeypatch.setattr(data, "PART_PIXELS", 3 * 28 * 28 + 1)
    assert sample(*load_run(prior_run), num=10).shape == (10, 1, 28, 28)
    assert [len(codes) for codes in drawn] == [3, 3, 3, 1]


def test_no_class_is_left_out_whatever_the_number(prior_run):
    _, prior = load_run(prior_run)
    for num in (10, 11, 15, 99):
        counts = torch.bincount(sample_script.labels_of(prior, num), minlength=10)
        assert counts.sum() == num and counts.max() - counts.min() <= 1


def test_images_are_completed_from_their_first_codes(generating_run, drawn, monkeypatch, tmp_path):
    image = load_dataset("digits", "").test_images[0]
    Image.fromarray(image[0].numpy()).save(tmp_path / "digit.png")
    codes, original = [], sample_script.generate
    monkeypatch.setattr(
        sample_script, "generate", lambda *args, **options: codes.append(original(*args, **options)) or codes[-1]
    )
    draw(generating_run, "--complete", tmp_path / "digit.png", "--keep=0.6")
    [(path, [row], _)] = drawn
    assert path.name == "completed.png" and len(row) == 1 + sample_script.COMPLETIONS
    assert torch.equal(row[0], image) and len(row[1:].flatten(1).unique(dim=0)) > 1
    model, _ = load_run(generating_run)
    given = model.encode(to_pixels(image[None], "cpu"))[0].flatten()[:29]
    assert (codes[0][:, :29] == given).all()


@pytest.mark.parametrize("levels", [1, 2])
def test_folder_without_classes_runs_from_train_to_sample(tmp_path, levels):
    """Non-square, in colour, unlabelled, one and two levels."""
    for i in range(60):
        save(tmp_path / "photos" / f"{i}.png")
    folder = tmp_path / "results"
    train(folder, f"--dataset={tmp_path / 'photos'}", f"--levels={levels}", "--steps=3")
    train_prior(folder, "--steps=3", "--batch-size=8")
    model, prior = load_run(folder)
    assert prior.classes == 0 and prior.length == (12 if levels == 1 else 2 * 2 + 4 * 4)
    assert sample(model, prior, num=5).shape == (5, 3, 12, 16)
    draw(folder, "--num=7")
    draw(folder, "--complete", tmp_path / "photos" / "0.png")
    assert (
        "the prior was trained on 0 classes"
        in pytest.raises(ValueError, sample, model, prior, classes=[1]).value.args[0]
    )


def test_run_without_checkpoint_or_prior_is_refused(capsys, tmp_path, trained_run):
    for call in (train_prior, draw):
        assert f"{tmp_path} holds no checkpoint.pt" in refusal(capsys, call, tmp_path)
    assert "holds no prior.pt; name the folder of a run of train_prior.py" in refusal(capsys, draw, trained_run)


def test_prior_of_another_vqvae_is_refused(capsys, generating_run, tmp_path):
    train(tmp_path / "other", "--steps=1")
    shutil.copy(tmp_path / "other" / "checkpoint.pt", generating_run)
    assert "is that of another VQ-VAE; train it anew" in refusal(capsys, draw, generating_run)
    resume = [sys.executable, "train_prior.py", "--resume", generating_run, "--steps=9"]
    done = subprocess.run(resume, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is that of another VQ-VAE" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--classes", "3,10", "the prior was trained on 10 classes, from 0 on"),
        ("--classes", "3;7", "must be numbers of classes, such as 3,7"),
        ("--temperature", "0", "must be above 0"),
        ("--temperature", "nan", "must be above 0"),
        ("--temperature", "hot", "invalid float value"),
        ("--top-p", "-1", "must be above 0"),
        ("--top-p", "95", "must be at most 1"),
        ("--guidance", "1e39", "guidance"),
        ("--top-k", "-1", "top-k"),
        ("--num", "0", "num"),
        ("--keep", "1.5", "keep"),
        ("--complete", "none.png", "none.png cannot be decoded"),
    ],
)
def test_bad_flag_is_named_in_one_line(capsys, prior_run, flag, value, message):
    assert message in refusal(capsys, draw, prior_run, f"{flag}={value}")


def test_completing_takes_no_class_and_no_number(capsys, prior_run):
    assert "leave out --classes and --num" in refusal(capsys, draw, prior_run, "--complete=a.png", "--classes=3")


def test_mistyped_run_leaves_no_folder(capsys, tmp_path):
    for call in (train_prior, draw):
        refusal(capsys, call, tmp_path / "typo")
        assert not (tmp_path / "typo").exists()


def test_single_images_never_fall_among_others(capsys, prior_run, tmp_path):
    (tmp_path / "00000.png").write_bytes(b"mine")
    assert "is not empty; name a new folder" in refusal(capsys, draw, prior_run, "--out", tmp_path)
    assert (tmp_path / "00000.png").read_bytes() == b"mine"


def test_images_of_the_wrong_size_are_refused(capsys, prior_run, tmp_path):
    save(tmp_path / "wide.png", (28, 40), "L")
    printed = refusal(capsys, draw, prior_run, "--complete", tmp_path / "wide.png")
    assert "wide.png has 40x28 pixels, but the model was trained on 28x28" in printed


def test_resuming_with_flags_that_contradict_the_prior_is_refused(capsys, prior_run):
    def resume(*flags):
        script.main(script.parse_args(["--resume", str(prior_run), *flags]))

    assert f"--width is 32, but the run in {prior_run} has 16" in refusal(capsys, resume, "--width=32", "--steps=20")
    assert "has done its 8 steps; give more with --steps" in refusal(capsys, resume)


def test_classes_are_hidden_for_a_tenth_of_the_images(trained_run, monkeypatch):
    labels = []
    original = script.Prior.forward
    monkeypatch.setattr(
        script.Prior,
        "forward",
        lambda self, codes, start: labels.append((self.training, start)) or original(self, codes, start),
    )
    train_prior(trained_run, "--steps=60", "--batch-size=32")
    seen = torch.cat([start for training, start in labels if training])
    assert len(seen) == 60 * 32 and 0.07 < (seen == 10).float().mean() < 0.13
    assert F.one_hot(seen, 11).sum(0).min() > 0
