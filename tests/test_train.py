import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, rows, same_run, save, train
from matplotlib.image import imread
from torchvision import datasets

import checkpoint
import evaluate
import loop
import process
import sample
import train as script
import train_prior
from data import Dataset, batch_indices, load_dataset, to_pixels
from model import build_model

COLUMNS = "step,recon_loss,codebook_loss,commitment_loss,codes_used,perplexity,test_mse,dataset"


def test_run_leaves_its_pictures_figures_and_checkpoint(finished_run):
    pictures = ["recon_000010.png", "recon_000020.png", "recon_000030.png", "curves.png", "codebook.png"]
    assert sorted(p.name for p in finished_run.iterdir()) == sorted(
        [*pictures, "metrics.csv", "summary.json", "checkpoint.pt", "checkpoint_previous.pt"]
    )
    for name in pictures:
        assert imread(finished_run / name).std() > 0.05  # a picture, not a blank


def test_metrics_have_a_line_per_interval_and_the_test_error_at_each_save(finished_run):
    lines = (finished_run / "metrics.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    assert [(int(r["step"]), bool(r["test_mse"])) for r in rows(finished_run)] == [
        (5, False), (10, True), (15, False), (20, True), (25, False), (30, True)
    ]  # fmt: skip
    assert float(rows(finished_run)[-1]["recon_loss"]) < float(rows(finished_run)[0]["recon_loss"])


def test_summary_names_the_data_and_holds_every_figure(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["dataset"] == "digits" and summary["steps"] == 30
    assert summary["arguments"]["codebook_size"] == 32 and summary["arguments"]["beta"] == 0.25
    for name in ("seconds", "images_per_second", "test_mse", "test_psnr", "test_ssim", "perplexity", "codes_used"):
        assert summary[name] > 0
    assert summary["codes_used"] <= 32 and summary["perplexity"] <= summary["codes_used"] + 1e-9


def test_seconds_are_those_of_the_whole_run(tmp_path, monkeypatch):
    """With the last pictures and figures as well; those of training end with the last step."""
    for name in ("save_reconstructions", "save_codebooks"):
        monkeypatch.setattr(script.figures, name, lambda *_: time.sleep(1))
    train(tmp_path, "--steps=1")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] > 2 + summary["training_seconds"] > 2


def test_training_learns_the_digits(tmp_path):
    """The mean image of the training set is the best guess without a code; 300 small steps must beat it by far."""
    train(tmp_path, "--steps=300", "--save-every=300")
    data = load_dataset("digits", "")
    mean = data.train_images.double().mean(0) / 255
    guess = (data.test_images / 255 - mean).square().mean().item()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_mse"] < guess / 4 and summary["codes_used"] > 24


def test_same_seed_gives_the_same_run_and_another_seed_another(finished_run, tmp_path):
    train(tmp_path / "same", "--steps=30", "--save-every=10")
    assert same_run(tmp_path / "same", finished_run)
    train(tmp_path / "other", "--steps=30", "--save-every=10", "--seed=1")
    assert rows(tmp_path / "other")[0]["recon_loss"] != rows(finished_run)[0]["recon_loss"]


def test_earlier_run_is_moved_to_a_dated_folder_and_other_files_are_left(trained_run, capsys):
    (trained_run / "notes.txt").write_text("mine")
    earlier = {p.name: p.read_bytes() for p in trained_run.iterdir() if p.name != "notes.txt"}
    train(trained_run, "--steps=2")
    (archive,) = (p for p in trained_run.iterdir() if p.is_dir())
    assert {p.name: p.read_bytes() for p in archive.iterdir()} == earlier
    assert f"moved the earlier run in {trained_run} to {archive}" in capsys.readouterr().out
    assert (trained_run / "notes.txt").read_text() == "mine"
    assert len(rows(trained_run)) == 1


def stop(folder, *flags, signum=signal.SIGINT, after="step 10/"):
    """Start a long run, send it a signal once it has printed `after`, and return its exit code and output."""
    command = [sys.executable, ROOT / "train.py", "--out-dir", folder, *SMALL, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        printed = ""
        for line in process.stdout:
            printed += line
            if after in line:
                process.send_signal(signum)
                break
        printed += process.stdout.read()
    return process.returncode, printed


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_at_the_end_of_a_step_and_resuming_goes_on_exactly(finished_run, tmp_path, signum, code):
    returned, printed = stop(tmp_path, "--steps", "3000", "--save-every", "10", signum=signum)
    step = checkpoint.load_checkpoint(tmp_path)["progress"]["step"]
    assert returned == code and "Traceback" not in printed
    assert f"stopped at step {step}; to go on: {sys.executable} train.py --resume {tmp_path}" in printed
    stopped = rows(tmp_path)
    resume = ["--resume", str(tmp_path), "--device", "cpu", "--steps", str(step + 25)]
    done = subprocess.run([sys.executable, ROOT / "train.py", *resume], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path)[: len(stopped)] == stopped
    steps = [int(row["step"]) for row in rows(tmp_path)]
    assert steps == sorted({*range(5, step + 25, 5), step + 25})


def test_command_to_go_on_with_can_be_pasted_whatever_the_folder():
    command = checkpoint.resume_command(Path("my run's"), checkpoint.PRIOR)
    assert shlex.split(command) == [sys.executable, "train_prior.py", "--resume", "my run's"]


def stop_before(monkeypatch, folder, cut, *flags):
    """Train in this process and stop after `cut` steps, as a signal would."""
    args = script.parse_args(["--out-dir", str(folder), *SMALL, *flags])
    signals = []
    monkeypatch.setattr(script, "catch_signals", lambda: signals)
    original = loop.batch_indices
    monkeypatch.setattr(
        loop, "batch_indices", lambda *a: (signals.append(2) if a[-1] == cut - 1 else 0, original(*a))[1]
    )
    with pytest.raises(SystemExit) as stopped:
        script.main(args)
    assert stopped.value.code == 130


def resume(folder, *flags):
    command = [sys.executable, ROOT / "train.py", "--resume", folder, "--device", "cpu", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("way", "cut", "levels"), [("--ema", 1, 1), ("--no-ema", 13, 1), ("--ema", 13, 2)])
def test_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(tmp_path, monkeypatch, way, cut, levels, precision):
    """Stop between lines and saves, and go on in a new process; 1,000 codes take two batches to start."""
    flags = [way, f"--precision={precision}", "--codebook-size=1000", "--decay=0.5", "--revive-below=0.9"]
    flags = [*flags, f"--levels={levels}", "--steps=24", "--save-every=8"]
    train(tmp_path / "whole", *flags)
    stop_before(monkeypatch, tmp_path / "halves", cut, *flags)
    assert checkpoint.load_checkpoint(tmp_path / "halves")["progress"]["step"] == cut
    resume(tmp_path / "halves")
    assert same_run(tmp_path / "halves", tmp_path / "whole")
    counts = checkpoint.load_checkpoint(tmp_path / "whole")["model"]["levels.0.quantizer.ema_counts"]
    assert counts.unique(return_counts=True)[1].max() > 50  # many codes revived together


def test_second_sigterm_does_not_cut_the_save_short(tmp_path):
    """A scheduler may send it to the process and again to its group."""
    code = """if True:
        import os, signal, loop, train
        original = loop.batch_indices
        def batch_indices(*args):
            if args[-1] == 8:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)
        loop.batch_indices = batch_indices
        train.main(train.parse_args())"""
    done = subprocess.run([sys.executable, "-c", code, f"--out-dir={tmp_path}", *SMALL], cwd=ROOT, capture_output=True)
    assert done.returncode == 143 and checkpoint.load_checkpoint(tmp_path)["progress"]["step"] == 9


# The choice of the data set


def test_without_mnist_the_run_says_so_loudly_and_trains_on_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    args = script.parse_args(["--data-dir", str(tmp_path)])
    assert script.load_data(args, rank=0).name == args.dataset == "digits"
    printed = capsys.readouterr().err
    assert "WARNING: mnist is not in" in printed and "--data-dir" in printed


def test_dataset_asked_for_by_name_is_never_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    flags = ("--data-dir", tmp_path, "--dataset", "mnist", "--out-dir", tmp_path / "out")
    assert "copy its files into" in refusal(capsys, *flags)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# Mistakes of the user: one line, exit code 2, nothing done


def refusal(capsys, *flags):
    with pytest.raises(SystemExit) as refused:
        script.main(script.parse_args([str(flag) for flag in flags]))
    printed = capsys.readouterr().err
    assert refused.value.code == 2 and printed.count("\n") == 1, printed
    return printed


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *((f"--{name}", "0") for name in ("steps", "batch-size", "codebook-size", "code-dim", "width", "save-every")),
        *(("--steps", bad) for bad in ("-5", "1.5", "many")), *(("--lr", bad) for bad in ("-1", "nan", "inf")),
        ("--beta", "-1"), ("--decay", "1"), ("--revive-below", "1.5"), ("--seed", "-1"), ("--dataset", "imagenet"),
        ("--downsample", "x"), ("--downsample", "3"), ("--device", "tpu"), ("--precision", "float8"),
        ("--no-such-flag", "1"),
    ],
)  # fmt: skip
def test_bad_flag_is_named_in_one_line(capsys, flag, value):
    assert flag in refusal(capsys, flag, value)


def test_device_that_is_not_there_is_refused(capsys):
    assert "--device cuda: this machine has" in refusal(capsys, "--device", "cuda", "--dataset", "digits")


def test_compiling_without_a_compiler_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "install g++" in refusal(capsys, "--compile", "--device", "cpu", "--dataset", "digits")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_run_learns_what_an_eager_one_learns(tmp_path):
    train(tmp_path / "eager", "--steps=10", "--precision=float32")
    train(tmp_path / "compiled", "--steps=10", "--precision=float32", "--compile")
    for eager, compiled in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        # No more than this: Adam's first steps are as large where a gradient is nothing but rounding.
        assert float(compiled["recon_loss"]) == pytest.approx(float(eager["recon_loss"]), rel=1e-3)


def test_batch_larger_than_the_data_is_refused(capsys, tmp_path):
    flags = ("--dataset", "digits", "--batch-size", 1501, "--out-dir", tmp_path / "out")
    assert "--batch-size 1501 is not from 1 (processes) to 1500 (training images)" in refusal(capsys, *flags)


def test_unwritable_folder_is_refused_before_any_data_is_loaded(capsys, trained_run, monkeypatch):
    monkeypatch.setattr(script, "load_dataset", lambda *_, **__: pytest.fail("data were loaded"))
    (trained_run / "file").write_text("")
    assert "needs to be a folder" in refusal(capsys, "--out-dir", trained_run / "file")
    assert "needs to be a folder" in refusal(capsys, "--out-dir", trained_run / "file" / "results")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    assert "cannot write to the folder" in refusal(capsys, "--out-dir", trained_run)
    assert "cannot write to the folder" in refusal(capsys, "--resume", trained_run, "--steps", 40)


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", "truncated", "foreign", "incomplete", "newer"])
def test_bad_checkpoint_is_refused_by_every_script(capsys, trained_run, content):
    path = trained_run / "checkpoint.pt"
    (trained_run / "checkpoint_previous.pt").unlink()
    if content is None:
        path.unlink()
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "foreign":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif content == "incomplete":
        torch.save({"format": checkpoint.FORMAT}, path)
    elif content == "newer":
        torch.save({"format": 99}, path)
    else:
        path.write_bytes(content)
    assert "checkpoint" in refusal(capsys, "--resume", trained_run)
    with pytest.raises(SystemExit) as refused:
        evaluate.main(evaluate.parse_args(["--run", str(trained_run)]))
    printed = capsys.readouterr().err
    assert refused.value.code == 2 and printed.count("\n") == 1 and "checkpoint" in printed


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_loading_a_checkpoint_executes_nothing_in_it(capsys, trained_run):
    torch.save({"format": checkpoint.FORMAT, "args": Malicious()}, trained_run / "checkpoint.pt")
    assert "damaged or not a checkpoint" in refusal(capsys, "--resume", trained_run)
    assert "executed" not in capsys.readouterr().out


def test_resume_refuses_flags_that_contradict_the_run_and_names_both_values(capsys, trained_run):
    for flag, value, saved in (("--codebook-size", 64, 32), ("--dataset", "mnist", "digits"), ("--width", 9, 8)):
        printed = refusal(capsys, "--resume", trained_run, flag, value)
        assert f"{flag} is {value}, but the run in {trained_run} has {saved}" in printed
    assert "has done its 30 steps; give more with --steps" in refusal(capsys, "--resume", trained_run)
    assert "checkpoint" in refusal(capsys, "--resume", "n" * 300)
    assert "leave out --out-dir" in refusal(capsys, "--resume", trained_run, "--steps", 40, "--out-dir", "elsewhere")


def test_learning_rates_may_change_on_resume(prior_run, tmp_path):
    """And then hold for the steps that follow."""
    for main, name, second in ((script, "checkpoint", "--codebook-lr"), (train_prior, "prior", "--embedding-lr")):
        run = shutil.copytree(prior_run, tmp_path / name)
        steps = checkpoint.load_checkpoint(run, name)["progress"]["step"] + 1
        main.main(main.parse_args([f"--resume={run}", f"--steps={steps}", "--lr=1e-9", f"{second}=2e-9"]))
        optimizers = checkpoint.load_checkpoint(run, name)["optimizer"]
        groups = [group for o in ([optimizers] if name == "checkpoint" else optimizers) for group in o["param_groups"]]
        share = loop.schedule(steps, steps)
        assert [group["lr"] for group in groups] == pytest.approx([1e-9 * share, 2e-9 * share])


def test_commands_to_go_on_hold_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python, path, *words = shlex.split(process.command("train.py", "--resume", "my run"))
    assert python == sys.executable and Path(path).samefile(ROOT / "train.py") and words == ["--resume", "my run"]


def test_every_flag_has_its_help(capsys):
    for parse_args in (script.parse_args, evaluate.parse_args, train_prior.parse_args, sample.parse_args):
        with pytest.raises(SystemExit) as done:
            parse_args(["--help"])
        printed = " ".join(capsys.readouterr().out.split())  # whose lines are broken by the terminal's width
        assert done.value.code == 0 and "None" not in printed.replace("(default: None)", "")


def test_the_loop_weighs_the_losses_as_the_paper_does(tmp_path):
    """beta moves the encoder and not the codes; the reconstruction loss is that of normalised images."""
    for beta in (0, 1):
        train(tmp_path / str(beta), "--steps=1", f"--beta={beta}", "--precision=float32", "--log-every=1")
    low, high = (checkpoint.load_checkpoint(tmp_path / beta)["model"] for beta in ("0", "1"))
    assert torch.equal(low["levels.0.quantizer.codebook"], high["levels.0.quantizer.codebook"])
    assert not torch.equal(low["levels.0.encoder.1.weight"], high["levels.0.encoder.1.weight"])

    torch.manual_seed(0)
    data = load_dataset("digits", "")
    mean, std = data.mean, data.std
    args = script.parse_args([*SMALL, "--downsample=4"])
    model = build_model(vars(args), (1, 28, 28), mean=mean, std=std)
    x = to_pixels(data.train_images[batch_indices(1500, 16, 0, 0)], torch.device("cpu"))
    x_recon = model(x).x_recon
    expected = torch.nn.functional.mse_loss((x_recon - mean) / std, (x - mean) / std)
    assert float(rows(tmp_path / "0")[0]["recon_loss"]) == pytest.approx(expected.item(), rel=1e-4)


def test_reconstructions_are_of_the_same_test_images_each_time(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        script.figures, "save_reconstructions", lambda path, rows, title: drawn.append((rows["original"], title))
    )
    train(tmp_path, "--steps=4", "--save-every=2")
    expected = load_dataset("digits", "").test_images[:48] / 255
    assert len(drawn) == 2 and all(torch.equal(x, expected) for x, _ in drawn)
    assert [title for _, title in drawn] == ["digits, step 2", "digits, step 4"]


def test_colour_images_run_from_end_to_end(tmp_path, monkeypatch):
    grey = load_dataset("digits", "")
    colour = [t.repeat(1, 3, 1, 1) if t.ndim == 4 else t for t in grey[1:5]]
    monkeypatch.setattr(
        script, "load_dataset", lambda *_, **__: Dataset("digits", *colour, torch.ones(3) / 2, torch.ones(3), "")
    )
    train(tmp_path, "--steps=5")
    assert checkpoint.load_checkpoint(tmp_path)["image_shape"] == (3, 28, 28)
    assert imread(tmp_path / "recon_000005.png").std() > 0.05


# Folders of images, two levels


def test_run_on_images_from_disk_stopped_and_resumed_is_that_on_images_in_memory(folder, tmp_path, monkeypatch):
    flags = [f"--dataset={folder}", "--levels=2", "--steps=12", "--save-every=4"]
    train(tmp_path / "memory", *flags)
    # Read ahead, the order of a batch is asked for long before its step.
    monkeypatch.setattr(script, "catch_signals", lambda: StopAt(tmp_path / "disk", 5))
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "disk", *flags, "--memory-limit=0")
    assert stopped.value.code == 130
    resume(tmp_path / "disk")
    assert checkpoint.load_checkpoint(tmp_path / "disk")["args"]["memory_limit"] == 0
    assert same_run(tmp_path / "disk", tmp_path / "memory")


class StopAt(list):
    """Signals that come when metrics.csv has the line of a step."""

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def __bool__(self):
        if any(row["step"] == str(self.step) for row in rows(self.folder)):
            self[:] = [signal.SIGINT]
        return len(self) > 0


def test_two_levels_have_their_own_columns_figures_and_pictures(folder, tmp_path):
    train(tmp_path, f"--dataset={folder}", "--levels=2", "--steps=10", "--save-every=10")
    (_, last) = rows(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for level in ("top", "bottom"):
        for name in ("codebook_loss", "commitment_loss", "codes_used", "perplexity"):
            assert float(last[f"{name}_{level}"]) > 0
        assert 0 < summary[f"codes_used_{level}"] <= 32 and summary[f"perplexity_{level}"] >= 1
    assert summary["dataset"] == "photos" and summary["arguments"]["downsample"] == 4
    one = tmp_path / "one"
    train(one, f"--dataset={folder}", "--steps=10", "--save-every=10")
    assert imread(tmp_path / "codebook.png").shape[0] == 2 * imread(one / "codebook.png").shape[0]
    evaluate.main(evaluate.parse_args(["--run", str(tmp_path)]))
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["test_mse"] == pytest.approx(summary["test_mse"])
    assert evaluation["codes_used_top"] == summary["codes_used_top"]


def test_levels_alone_are_drawn_below_the_reconstructions(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(script.figures, "save_reconstructions", lambda path, rows, title: drawn.append(rows))
    train(tmp_path, f"--dataset={folder}", "--levels=2", "--steps=2", "--save-every=2")
    assert list(drawn[0]) == ["original", "reconstruction", "top alone", "bottom alone"]
    assert all(images.shape == (10, 3, 12, 16) for images in drawn[0].values())
    model = checkpoint.load_model(checkpoint.load_checkpoint(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(drawn[0]["reconstruction"], model(drawn[0]["original"]).x_recon.clamp(0, 1))


@pytest.mark.parametrize(("size", "levels", "stride"), [(28, 1, 4), (32, 1, 4), (64, 1, 4), (96, 1, 8), (96, 2, 4)])
def test_depth_follows_the_size_of_the_images(tmp_path, size, levels, stride):
    train(tmp_path, f"--image-size={size}", f"--levels={levels}", "--steps=1", "--batch-size=2")
    saved = checkpoint.load_checkpoint(tmp_path)
    assert saved["args"]["downsample"] == stride
    x = torch.rand(1, 1, size, size)
    assert checkpoint.load_model(saved).encode(x)[-1].shape == (1, size // stride, size // stride)


@pytest.mark.parametrize("change", ["train/cat/0.png", "test/dog/3.png"])
def test_resuming_and_measuring_on_other_images_is_refused(capsys, folder, tmp_path, change):
    train(tmp_path / "run", f"--dataset={folder}", "--steps=2")
    (folder / change).rename(folder / Path(change).parent / "renamed.png")
    printed = refusal(capsys, "--resume", tmp_path / "run", "--steps", 4)
    assert "photos are not those that the run was trained on" in printed
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.parse_args(["--run", str(tmp_path / "run")]))
    assert "photos are not those that the run was trained on" in capsys.readouterr().err


def test_run_goes_on_with_its_images_where_they_are_now(folder, tmp_path):
    train(tmp_path / "run", f"--dataset={folder}", "--steps=2")
    moved = folder.rename(tmp_path / "cats, $dogs$")
    evaluate.main(evaluate.parse_args([f"--run={tmp_path / 'run'}", f"--data-dir={moved}"]))
    for steps in (12, 14):
        again = [f"--resume={tmp_path / 'run'}", f"--dataset={moved}", f"--steps={steps}"]
        script.main(script.parse_args(again))
    assert [row["step"] for row in rows(tmp_path / "run")] == ["2", "5", "10", "12", "14"]  # the comma costs no line


def test_single_image_of_a_single_code_is_drawn(tmp_path):
    for i in range(17):
        save(tmp_path / "photos" / f"{i}.png", shape=(8, 8))
    train(tmp_path / "run", f"--dataset={tmp_path / 'photos'}", "--steps=2", "--levels=2")
    assert (tmp_path / "run" / "codebook.png").is_file()


def test_bad_images_stop_the_run_before_anything_is_moved(capsys, folder, trained_run):
    (folder / "train" / "cat" / "0.png").write_bytes(b"")
    before = {path.name for path in trained_run.iterdir()}
    assert "train/cat/0.png" in refusal(capsys, "--dataset", folder, "--out-dir", trained_run)
    assert {path.name for path in trained_run.iterdir()} <= before | {"images.pt"}


def test_run_whose_images_vanish_ends_with_one_line_and_a_checkpoint(folder, tmp_path):
    code = """if True:
        import shutil, sys, train
        original = train.write_metrics
        def write_metrics(*args):
            shutil.rmtree(sys.argv[1])
            return original(*args)
        train.write_metrics = write_metrics
        train.main(train.parse_args(sys.argv[2:]))"""
    flags = [f"--dataset={folder}", f"--out-dir={tmp_path}", "--memory-limit=0"]
    flags += ["--steps=99", "--save-every=25", "--log-every=25"]  # farther apart than workers decode ahead
    command = [sys.executable, "-c", code, folder, *SMALL, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be decoded" in done.stderr and "the checkpoint of step 25 is whole" in done.stderr
