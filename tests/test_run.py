"""A run stops, resumes, is moved aside and diverges as the README says."""

import argparse
import errno
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import harness
from harness import run
from harness.data import batch_indices, load_dataset
from harness.run import Means, Run, format_duration, format_number
from harness.storage import load_checkpoint, save_checkpoint

import pytest
import torch
from conftest import (
    PROGRAMS,
    ROOT,
    SIGNALS,
    SMALL,
    TINY,
    ended,
    program,
    refusal,
    rows,
    same_run,
    started,
    train,
    train_prior,
)

import evaluate
import reconstruct
import sample
import train as script
import train_prior as prior_script

STEPS = ("--steps=30", "--save-every=10")  # those of the fixture finished_run


def archives(folder):
    return [path for path in folder.iterdir() if path.is_dir()]


# Parts of a run


def test_means_weigh_steps_alike():
    means = Means()
    for value in (1.0, 2.0, 6.0):
        means.add(1.0, loss=torch.tensor(value), counts=torch.tensor([value, 0]))
    computed = means.compute()
    assert computed["loss"] == 3 and computed["counts"].tolist() == [3, 0]
    assert means.compute()["loss"] == 3  # until the reset
    means.reset()
    means.add(0.25, loss=torch.tensor(8.0))  # a rank's share of the batch
    assert means.compute()["loss"] == 2


def test_means_survive_a_checkpoint():
    means, again = Means(), Means()
    means.add(1.0, loss=torch.tensor(1.0))
    again.load_state_dict(means.state_dict())
    for m in (means, again):
        m.add(1.0, loss=torch.tensor(5.0))
    assert again.compute() == means.compute() == {"loss": 3}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_means_refuse_what_is_not_finite(value):
    means = Means()
    means.add(1.0, loss=torch.tensor([1.0, value]))
    with pytest.raises(FloatingPointError, match="NaN or infinite; lower the learning rate"):
        means.compute()


def test_means_of_a_checkpoint_count_once(monkeypatch):
    """Every rank reads the sums of all ranks; rank 0 alone keeps them."""
    for rank, kept in ((0, 3), (1, 0)):
        monkeypatch.setattr(run, "rank", lambda rank=rank: rank)
        means = Means()
        means.load_state_dict({"steps": 1, "sums": {"loss": torch.tensor(3.0)}})
        assert means.sums["loss"] == kept


def test_schedule_warms_up_then_falls_linearly():
    run = argparse.Namespace(args=argparse.Namespace(steps=1000))
    shares = [Run.schedule(run, step) for step in range(1, 1001)]
    assert shares[0] == pytest.approx(1 / 30) and shares[14] == pytest.approx(0.5 * 0.986)
    assert max(shares) == shares[29] == pytest.approx(0.971)
    assert shares[29:] == pytest.approx([(1000 - step) / 1000 for step in range(29, 1000)])


def test_logged_numbers_are_short():
    values = (0.0123449, 512, 512.04, 34350, 34350.6, -2000)
    assert [format_number(value) for value in values] == ["0.01234", "512", "512", "34,350", "34,351", "-2,000"]


def test_duration_is_formatted_with_unit():
    assert [format_duration(seconds) for seconds in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]


def test_steps_yield_the_batches_of_the_seed(tmp_path, monkeypatch):
    seen = []
    steps = Run.steps
    monkeypatch.setattr(Run, "steps", lambda *args: ((seen.append(pair), pair)[1] for pair in steps(*args)))
    train(tmp_path, "--steps=3", "--seed=5")
    images = load_dataset("digits").train_images
    assert [step for step, _ in seen] == [1, 2, 3]
    assert all(torch.equal(batch, images[batch_indices(1500, 16, 5, step - 1)]) for step, batch in seen)


# Stops


@pytest.mark.parametrize("signum", SIGNALS)
def test_signal_stops_at_the_end_of_a_step(finished_run, tmp_path, capsys, stop_at, signum):
    signal.signal(signum, signal.SIG_DFL)  # the tests may run under nohup
    stop_at(13, tmp_path, *STEPS, signum=signum)
    printed = capsys.readouterr()
    assert "stopped at step 13; run the same command again to resume" in printed.out and not printed.err
    assert load_checkpoint(tmp_path)["progress"]["step"] == 13
    stopped = rows(tmp_path)
    assert [row["step"] for row in stopped] == ["5", "10"]
    train(tmp_path, *STEPS)
    assert "resuming from step 13" in capsys.readouterr().out
    assert rows(tmp_path)[:2] == stopped and same_run(tmp_path, finished_run) and not archives(tmp_path)


def test_second_ctrl_c_ends_at_once(tmp_path, in_step):
    """After the first, Python no longer handles it."""
    handlers = []
    in_step(2, lambda: (signal.raise_signal(signal.SIGINT), handlers.append(signal.getsignal(signal.SIGINT))))
    with pytest.raises(SystemExit):
        train(tmp_path, "--steps=4")
    assert handlers == [signal.SIG_DFL]


def test_ctrl_c_forwarded_by_torchrun_changes_nothing(tmp_path, in_step, monkeypatch):
    """The terminal sends it to each rank, and torchrun then sends it again."""
    monkeypatch.setattr(run.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(run, "join_ranks", lambda device: (0, "job"))
    handlers = []
    in_step(2, lambda: (signal.raise_signal(signal.SIGINT), handlers.append(signal.getsignal(signal.SIGINT))))
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, "--steps=4")
    assert handlers[0] not in (signal.SIG_DFL, signal.default_int_handler)
    assert stopped.value.code == 130 and load_checkpoint(tmp_path)["progress"]["step"] == 2


def test_same_command_resumes_after_ctrl_c(finished_run, tmp_path):
    """In a process of its own each time, with steps so slow that the signal comes before the last."""
    command = [sys.executable, PROGRAMS / "every_step_slow.py", f"--out-dir={tmp_path}", *SMALL, *STEPS]
    with started(command, stderr=subprocess.STDOUT) as process:
        assert any("step 10/" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
        process.wait(60)
    step = load_checkpoint(tmp_path)["progress"]["step"]
    assert process.returncode == 130 and 10 <= step < 30 and "Traceback" not in printed
    assert f"stopped at step {step}; run the same command again to resume" in printed
    done = program("train.py", *command[2:])
    assert done.returncode == 0 and f"resuming from step {step}" in done.stdout, done.stderr
    assert same_run(tmp_path, finished_run)


def test_hangup_under_nohup_is_ignored(tmp_path, in_step):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    in_step(2, lambda: signal.raise_signal(signal.SIGHUP))
    train(tmp_path, "--steps=4")
    assert load_checkpoint(tmp_path)["progress"]["step"] == 4


def test_signal_in_the_last_step_lets_it_finish(finished_run, tmp_path, in_step):
    in_step(30, lambda: signal.raise_signal(signal.SIGTERM))
    train(tmp_path, *STEPS)
    assert same_run(tmp_path, finished_run)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("way", "cut", "levels"), [("--ema", 1, 1), ("--no-ema", 13, 1), ("--ema", 13, 2)])
def test_resumes_bit_for_bit(tmp_path, stop_at, way, cut, levels, precision):
    """Stop between lines and saves, and go on in a new process; 1,000 codes take two batches to start."""
    flags = [way, f"--precision={precision}", "--codebook-size=1000", "--decay=0.5", "--revive-below=0.9"]
    flags = [*flags, f"--levels={levels}", "--steps=24", "--save-every=8"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, *flags)
    stop_at(cut, halves, *flags)
    assert load_checkpoint(halves)["progress"]["step"] == cut
    done = program("train.py", f"--out-dir={halves}", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    assert same_run(halves, whole)
    counts = load_checkpoint(whole)["model"]["levels.0.quantizer.ema_counts"]
    assert counts.unique(return_counts=True)[1].max() > 50  # many codes revived together


def test_images_on_disk_make_the_same_run(folder, tmp_path, stop_at):
    """With workers that read ahead, stopped and resumed, it equals the run on images in memory."""
    flags = [f"--dataset={folder}", "--levels=2", "--steps=12", "--save-every=4"]
    train(tmp_path / "memory", *flags)
    stop_at(5, tmp_path / "disk", *flags, "--memory-limit=0")
    done = program("train.py", f"--resume={tmp_path / 'disk'}", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "disk")["args"]["memory_limit"] == 0
    assert same_run(tmp_path / "disk", tmp_path / "memory")


def test_folder_that_vanishes_ends_the_run(tmp_path, in_step, capsys):
    folder, moved = tmp_path / "results", tmp_path / "moved"

    def vanish():
        folder.rename(moved)
        folder.write_text("a file now")

    in_step(11, vanish)
    with pytest.raises(SystemExit) as ended:
        train(folder, "--steps=40", "--save-every=7")
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.count("\n") == 1 and "cannot continue after step 14" in printed
    assert load_checkpoint(moved)["progress"]["step"] == 7


def test_images_that_vanish_end_the_run(folder, tmp_path):
    flags = [f"--dataset={folder}", f"--out-dir={tmp_path}", "--memory-limit=0"]
    flags += ["--steps=99", "--save-every=25", "--log-every=25"]  # farther apart than workers decode ahead
    done = program("lose_images.py", folder, *SMALL, *flags)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be decoded" in done.stderr and "the checkpoint of step 25 is intact" in done.stderr


@pytest.mark.parametrize("way", ["--ema", "--no-ema"])
def test_divergence_ends_the_run_before_it_saves(tmp_path, capsys, way):
    """The message names the last finite checkpoint, and halves the learning rates to go on with."""
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, "--steps=40", "--save-every=5", "--lr=1e20", way)
    printed = capsys.readouterr().err
    saved = load_checkpoint(tmp_path)
    assert ended.value.code == 1 and printed.count("\n") == 1
    assert "diverged after step" in printed and "NaN or infinite; lower the learning rate" in printed
    assert f"the checkpoint of step {saved['progress']['step']} is intact" in printed
    advice = printed.strip().split("to resume: ")[1]  # by the same steps it would diverge again
    assert script.parse_args(advice.split()[2:]).lr == 5e19
    with pytest.raises(SystemExit):
        script.main(script.parse_args(advice.split()[2:]))
    assert capsys.readouterr().err.strip().endswith("--lr=2.5e+19 --codebook-lr=0.01")
    assert all(value.isfinite().all() for value in saved["model"].values())
    logged = "".join(path.read_text() for path in tmp_path.glob("metrics.csv"))  # none if the first line diverged
    assert "nan" not in logged and "inf" not in logged


def test_raised_rate_that_diverges_is_taken_back(trained_run, capsys):
    """The others are as they were when the checkpoint was written."""
    flags = ["--steps=40", "--save-every=5", "--log-every=1", "--lr=1e25"]
    with pytest.raises(SystemExit):
        script.main(script.parse_args([f"--resume={trained_run}", *flags]))
    words = shlex.split(capsys.readouterr().err.strip().split("to resume: ")[1])[2:]
    assert words == ["--resume", str(trained_run), "--steps=40", "--save-every=5", "--log-every=1"]
    script.main(script.parse_args(words))


def test_divergence_of_the_last_step_starts_anew(tmp_path, capsys):
    """Its weights are finite, but what they compute is not."""
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, "--steps=1", "--lr=1e25")
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.endswith("start over with --fresh and a lower rate\n")
    assert "values of z_e are NaN or infinite" in refusal(capsys, evaluate, f"--run={tmp_path}")


def test_divergence_after_a_save_goes_one_save_back(tmp_path, capsys):
    train(tmp_path, "--steps=5")
    with pytest.raises(SystemExit):
        script.main(script.parse_args([f"--resume={tmp_path}", "--steps=6", "--lr=1e25"]))
    printed = capsys.readouterr().err.strip()
    assert "give --resume a lower rate after this copy" in printed
    ended(shlex.split(printed.split("to resume from step 5 instead: ")[1]), check=True)
    script.main(script.parse_args([f"--resume={tmp_path}", "--steps=6"]))
    assert load_checkpoint(tmp_path)["progress"]["step"] == 6


@pytest.mark.parametrize("log_every", [3, 5])
def test_moved_run_writes_nothing_in_its_place(tmp_path, capsys, in_step, log_every):
    """Neither a row of the metrics nor a checkpoint."""
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def replace():
        folder.rename(moved)
        folder.mkdir()
        (folder / ".lock.pid").write_text("1\n")  # another run has begun there

    in_step(3, replace)
    with pytest.raises(SystemExit) as ended:
        train(folder, "--steps=4", "--save-every=2", f"--log-every={log_every}")
    assert ended.value.code == 1 and "was moved, or another run took its place" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".lock.pid"]
    assert load_checkpoint(moved)["progress"]["step"] == 2


def test_run_moved_while_measured_leaves_no_summary(tmp_path, monkeypatch, capsys):
    measure = script.evaluate

    def move(model, images):
        if len(images) == 297:  # all test images, after the last step
            (tmp_path / "run").rename(tmp_path / "moved")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / ".lock.pid").write_text("1\n")
            monkeypatch.setattr(script.figures, "save_codebooks", lambda *_: None)
        return measure(model, images)

    monkeypatch.setattr(script, "evaluate", move)
    monkeypatch.setattr(script, "CURVE_IMAGES", 10)
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "--steps=2")
    assert "another run took its place" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_lack_of_memory_while_training_is_one_line(tmp_path, in_step, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    in_step(3, full)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, "--steps=4", "--save-every=2")
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.count("\n") == 1
    assert "out of memory after step 3" in printed and "checkpoint of step 2 is intact" in printed


def test_no_memory_to_read_the_checkpoint_is_one_line(tmp_path, in_step, monkeypatch, capsys):
    def full(*_):
        raise MemoryError

    def fill():
        monkeypatch.setattr(run.storage, "load_checkpoint", full)
        full()

    in_step(3, fill)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, "--steps=4", "--save-every=2")
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.count("\n") == 1 and "out of memory after step 3" in printed


# Ranks


def test_ranks_compare_all_flags(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(run, "check_equal_on_ranks", lambda value, what: seen.update({what: value}))
    train(tmp_path, "--steps=1", "--precision=auto")
    chosen = seen["the precision that they chose (give all --precision float32)"]
    assert seen["--steps"] == 1 and chosen in ("float32", "bfloat16")
    assert seen.keys() >= {
        "--lr",
        "their code",
        "images",
        f"the checkpoint in {tmp_path}",
        "image_shape",
        "class_names",
    }
    seen.clear()
    train_prior(tmp_path, "--steps=1")
    assert seen.keys() >= {"vqvae", "vqvae_step", "shape"}


def test_batch_smaller_than_the_ranks_is_refused():
    few = argparse.Namespace(world_size=3, args=argparse.Namespace(batch_size=2))
    with pytest.raises(ValueError, match="between 3 .processes"):
        Run.begin(few, 10, "images")


# What a user watches


def test_line_tells_speed_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(run.time, "perf_counter", lambda: 120.0)
    args = argparse.Namespace(steps=40, batch_size=16)
    bar = argparse.Namespace(disable=True, set_postfix_str=str)
    state = argparse.Namespace(rank=0, step=10, _first=0, _read_clock=int, _began=100.0, args=args, bar=bar)
    Run.show(state, "loss 1")
    assert capsys.readouterr().out == "step 10/40: loss 1, 8 images/s, 60 s left\n"


@pytest.mark.parametrize(("seconds", "steps"), [(0, ["1/4:", "4/4:"]), (999, ["4/4:"])])
def test_first_line_comes_early_and_once(tmp_path, capsys, monkeypatch, seconds, steps):
    monkeypatch.setattr(run, "FIRST_LINE", seconds)
    train(tmp_path, "--steps=4")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == steps


def test_terminal_shows_a_bar_that_goes_on(tmp_path, stop_at, monkeypatch, capsys):
    stop_at(3, tmp_path, "--steps=6")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    capsys.readouterr()
    train(tmp_path, "--steps=6")
    printed = capsys.readouterr()
    assert "3/6" in printed.err and "6/6" in printed.err and "0/6" not in printed.err and "step 6/6" not in printed.out


def test_output_into_a_file_is_lines(tmp_path, monkeypatch, capsys):
    """Even if the errors go to a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(tmp_path, "--steps=6")
    assert "step 6/6" in capsys.readouterr().out


# Going on, or making way


def test_finished_run_makes_way(trained_run, finished_run, capsys):
    train(trained_run, *STEPS)
    (archive,) = archives(trained_run)
    assert f"moved the earlier run in {trained_run} to {archive}: it is finished" in capsys.readouterr().out
    assert same_run(trained_run, finished_run) and same_run(archive, finished_run)


def test_run_of_other_flags_makes_way(tmp_path, stop_at, capsys):
    stop_at(13, tmp_path, *STEPS)
    train(tmp_path, "--steps=2", "--save-every=10", "--no-kmeans-start")
    assert ": it was started with other flags (--steps, --kmeans-start)" in sorted_flags(capsys.readouterr().out)
    (archive,) = archives(tmp_path)
    assert load_checkpoint(archive)["progress"]["step"] == 13 and load_checkpoint(tmp_path)["progress"]["step"] == 2


def sorted_flags(printed):
    """Return what was printed, with the two flags that the message names in the order of --help."""
    return printed.replace("(--kmeans-start, --steps)", "(--steps, --kmeans-start)")


def test_trains_in_a_thread(tmp_path):
    """As in a web application; only the main thread may catch signals."""
    thread = threading.Thread(target=train, args=(tmp_path, "--steps=2"))
    thread.start()
    thread.join()
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2


def test_run_of_other_code_makes_way(tmp_path, stop_at, capsys):
    stop_at(13, tmp_path, *STEPS)
    save_checkpoint(tmp_path, load_checkpoint(tmp_path) | {"code": "that of another day"})
    train(tmp_path, *STEPS)
    printed = capsys.readouterr().out
    assert ": the code has changed since; to continue that run, give --resume its new folder" in printed
    assert "resuming from" not in printed
    (archive,) = archives(tmp_path)
    assert load_checkpoint(archive)["progress"]["step"] == 13


def test_run_of_other_code_goes_on_by_resume(tmp_path, stop_at, finished_run, capsys):
    stop_at(13, tmp_path, *STEPS)
    save_checkpoint(tmp_path, load_checkpoint(tmp_path) | {"code": "that of another day"})
    script.main(script.parse_args([f"--resume={tmp_path}"]))
    assert "resuming from step 13" in capsys.readouterr().out and same_run(tmp_path, finished_run)


def test_run_of_other_images_makes_way(folder, tmp_path, stop_at, capsys):
    flags = (f"--dataset={folder}", "--steps=9")
    stop_at(4, tmp_path / "run", *flags)
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / "renamed.png")
    train(tmp_path / "run", *flags)
    assert "its images changed" in capsys.readouterr().out
    (archive,) = archives(tmp_path / "run")
    assert load_checkpoint(archive)["progress"]["step"] == 4


def test_fresh_starts_anew(tmp_path, stop_at, finished_run, capsys):
    stop_at(13, tmp_path, *STEPS)
    train(tmp_path, *STEPS, "--fresh")
    assert ": --fresh" in capsys.readouterr().out and same_run(tmp_path, finished_run)
    (archive,) = archives(tmp_path)
    assert load_checkpoint(archive)["progress"]["step"] == 13


def test_fresh_run_goes_on_when_torchrun_restarts_it(tmp_path, stop_at, finished_run, monkeypatch, capsys):
    """Torchrun gives the same flags again; another torchrun starts anew."""
    flags = [*STEPS, "--fresh"]
    monkeypatch.setattr(run, "join_ranks", lambda device: (0, "job 1"))
    stop_at(13, tmp_path, *flags)
    train(tmp_path, *flags)
    assert same_run(tmp_path, finished_run) and not archives(tmp_path)
    monkeypatch.setattr(run, "join_ranks", lambda device: (0, "job 2"))
    capsys.readouterr()
    stop_at(13, tmp_path, *flags)
    assert len(archives(tmp_path)) == 1
    assert "run the same command again without --fresh to resume" in capsys.readouterr().out


def test_torchrun_never_retrains_a_finished_run(tmp_path, monkeypatch, capsys):
    """A rank that dies after the summary makes torchrun start all of them again."""
    monkeypatch.setattr(run, "join_ranks", lambda device: (0, "job 1"))
    for _ in range(2):
        train(tmp_path, "--steps=2")
    assert "resuming from step 2" in capsys.readouterr().out and not archives(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == ["2"]


def test_signal_handlers_are_restored(tmp_path):
    """A notebook goes on after a run, and so must its Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)
    train(tmp_path, "--steps=1")
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == before[1]


def test_sigterm_stops_even_if_it_was_ignored(tmp_path, stop_at):
    """Some supervisors start their jobs so, and then send it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop_at(2, tmp_path, "--steps=4", signum=signal.SIGTERM)


def test_ignored_signals_stay_ignored(tmp_path, in_step):
    """A shell script's background job ignores Ctrl-C, nohup a closed terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    in_step(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    train(tmp_path, "--steps=2")
    assert load_checkpoint(tmp_path)["progress"]["step"] == 2


def test_compilation_is_announced(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    train(tmp_path, "--steps=2", "--compile")
    assert capsys.readouterr().out.splitlines()[1].startswith("the first steps compile the network")


def test_full_disk_at_the_end_is_one_line(tmp_path, capsys, monkeypatch):
    """TensorBoard's writer tells it when it is closed."""

    class Writer:
        def __init__(self, *_, **options):
            pass

        def add_scalar(self, *_, **options):
            pass

        add_image = add_scalar

        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "summary_writer", lambda: Writer)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, "--steps=2", "--tensorboard")
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.count("\n") == 1
    assert f"No space left on device: '{tmp_path}'" in printed
    done = program("train.py", *SMALL, f"--out-dir={tmp_path}", "--steps=2")
    assert done.returncode == 0, done.stderr  # the folder is not locked


def test_thread_of_tensorboard_says_nothing(capsys):
    """On a full disk, its writer raises the error again in the main thread."""
    writer = type("Writer", (), {"__module__": "tensorboard.summary.writer.event_file_writer"})()
    for thread in (writer, threading.current_thread()):
        error = OSError(errno.ENOSPC, "No space left on device")
        harness.thread_excepthook(threading.ExceptHookArgs([OSError, error, None, thread]))
        assert ("No space left" in capsys.readouterr().err) == (thread is not writer)


def test_fresh_run_goes_on_without_the_flag(tmp_path, stop_at, finished_run):
    stop_at(13, tmp_path, *STEPS, "--fresh")
    train(tmp_path, *STEPS)
    assert same_run(tmp_path, finished_run) and not archives(tmp_path)


def test_fresh_and_resume_exclude_each_other(capsys, trained_run):
    assert "leave out one of them" in refusal(capsys, script, f"--resume={trained_run}", "--fresh")


def test_damaged_checkpoint_is_not_overwritten(tmp_path, stop_at, capsys):
    """The same command refuses it, and says how to start anew."""
    stop_at(13, tmp_path, *STEPS)
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    printed = refusal(capsys, script, f"--out-dir={tmp_path}", *SMALL, *STEPS)
    assert "to resume from step 10 instead: cp " in printed and "or start over with --fresh" in printed
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"damaged" and not archives(tmp_path)
    train(tmp_path, "--steps=1", "--fresh")
    assert (archives(tmp_path)[0] / "checkpoint.pt").read_bytes() == b"damaged"


def test_bad_images_stop_the_run_before_it_moves(capsys, folder, trained_run):
    (folder / "train" / "cat" / "0.png").write_bytes(b"")
    before = {path.name for path in trained_run.iterdir()}
    assert "train/cat/0.png" in refusal(capsys, script, f"--dataset={folder}", f"--out-dir={trained_run}")
    assert {path.name for path in trained_run.iterdir()} <= before | {"images.pt"}


def test_batch_larger_than_the_data_is_refused(capsys, trained_run):
    before = {path.name for path in trained_run.iterdir()}
    printed = refusal(capsys, script, "--dataset=digits", "--batch-size=1501", f"--out-dir={trained_run}")
    assert "--batch-size 1501 is not between 1 (processes) and 1500 (training images)" in printed
    assert {path.name for path in trained_run.iterdir()} == before


# --resume


def test_resume_goes_on_as_the_same_command(tmp_path, stop_at, finished_run):
    """And when it is stopped again, the first command goes on."""
    stop_at(3, tmp_path, *STEPS)
    stop_at(13, tmp_path, call=lambda folder: script.main(script.parse_args([f"--resume={folder}"])))
    train(tmp_path, *STEPS)
    assert same_run(tmp_path, finished_run) and not archives(tmp_path)


def test_resume_may_change_the_machine(finished_run):
    flags = {"data_dir": "x", "device": "auto", "precision": "bfloat16", "memory_limit": 1, "log_every": 7}
    given = [f"{run.flag_of(name)}={value}" for name, value in flags.items()]
    args = vars(script.parse_args([f"--resume={finished_run}", "--steps=40", "--compile", *given]))
    assert args | flags == args and args["compile"]


def test_resume_may_change_the_length(tmp_path, stop_at, capsys):
    """Stopped again, it goes on by the first command with the new length; the old length is another run."""
    stop_at(13, tmp_path, *STEPS)
    stop_at(33, tmp_path, call=lambda folder: script.main(script.parse_args([f"--resume={folder}", "--steps=40"])))
    train(tmp_path, *STEPS, "--steps=40")
    assert "resuming from step 33" in capsys.readouterr().out and not archives(tmp_path)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(5, 41, 5))
    assert load_checkpoint(tmp_path)["args"]["lr"] == 0.3 * 30**-0.5  # that of the first command, not of 40 steps


def test_resumed_longer_run_keeps_its_measurements(trained_run):
    """What was measured at the old last step stays, though it is none of the new steps to save at."""
    before = (trained_run / "metrics.csv").read_text()
    script.main(script.parse_args([f"--resume={trained_run}", "--steps=40", "--save-every=1000", "--log-every=1000"]))
    text = (trained_run / "metrics.csv").read_text()
    assert text.startswith(before) and [row["step"] for row in rows(trained_run)][-2:] == ["30", "40"]


def test_resume_refuses_contradicting_flags(capsys, trained_run):
    """It names both values."""
    for flag, value, saved in (("--codebook-size", 64, 32), ("--dataset", "mnist", "digits"), ("--width", 9, 8)):
        printed = refusal(capsys, script, f"--resume={trained_run}", flag, value)
        assert f"{flag} is {value}, but the run in {trained_run} has {saved}" in printed
    assert "checkpoint" in refusal(capsys, script, "--resume", "n" * 300)
    printed = refusal(capsys, script, f"--resume={trained_run}", "--steps=40", "--out-dir=elsewhere")
    assert "leave out --out-dir" in printed


@pytest.mark.parametrize("steps", [(), ("--steps=30",), ("--steps=20",)])
def test_resume_refuses_a_finished_run(capsys, trained_run, steps):
    before = (trained_run / "checkpoint.pt").read_bytes()
    printed = refusal(capsys, script, f"--resume={trained_run}", *steps)
    assert "has done its 30 steps; give more with --steps" in printed
    assert (trained_run / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_a_length_already_trained(tmp_path, stop_at, capsys):
    """A stopped run has no summary for a step in its midst."""
    stop_at(13, tmp_path, *STEPS)
    for steps in (12, 13):
        assert "give more with --steps" in refusal(capsys, script, f"--resume={tmp_path}", f"--steps={steps}")


def test_learning_rates_may_change_on_resume(prior_run, tmp_path):
    """And then hold for the steps that follow."""
    for module, name, second in ((script, "checkpoint", "--codebook-lr"), (prior_script, "prior", "--embedding-lr")):
        run = shutil.copytree(prior_run, tmp_path / name)
        steps = load_checkpoint(run, name)["progress"]["step"] + 1
        module.main(module.parse_args([f"--resume={run}", f"--steps={steps}", "--lr=1e-9", f"{second}=2e-9"]))
        saved = load_checkpoint(run, name)
        optimizers = [saved[key] for key in (["optimizer"] if name == "checkpoint" else ["muon", "adamw"])]
        share = 1 / steps  # the rate falls linearly
        rates = [group["lr"] for optimizer in optimizers for group in optimizer["param_groups"]]
        assert rates == pytest.approx([1e-9 * share, 2e-9 * share])


@pytest.mark.parametrize("change", ["train/cat/0.png", "test/dog/3.png"])
def test_resume_refuses_other_images(capsys, folder, tmp_path, change):
    train(tmp_path / "run", f"--dataset={folder}", "--steps=2")
    (folder / change).rename(folder / Path(change).parent / "renamed.png")
    printed = refusal(capsys, script, f"--resume={tmp_path / 'run'}", "--steps=4")
    renamed = f"{Path(change).parent}/renamed.png"
    assert f"): 1 added ({renamed} ...), 1 removed ({change} ...)" in printed


def test_resume_finds_images_where_they_are_now(folder, tmp_path):
    train(tmp_path / "run", f"--dataset={folder}", "--steps=2")
    moved = folder.rename(tmp_path / "cats, $dogs$")
    for steps in (12, 14):
        again = [f"--resume={tmp_path / 'run'}", f"--dataset={moved}", f"--steps={steps}"]
        script.main(script.parse_args(again))
    assert [row["step"] for row in rows(tmp_path / "run")] == ["2", "5", "10", "12", "14"]  # the comma costs no line


def test_metrics_go_on_without_gap_or_duplicate(finished_run, trained_run):
    """The process died after the checkpoint of step 20: its later lines are done again, the last one was cut."""
    shutil.copy(trained_run / "checkpoint_previous.pt", trained_run / "checkpoint.pt")
    text = (trained_run / "metrics.csv").read_text()
    (trained_run / "metrics.csv").write_text(text + "2")
    script.main(script.parse_args([f"--resume={trained_run}"]))
    assert (trained_run / "metrics.csv").read_bytes() == (finished_run / "metrics.csv").read_bytes()
    assert same_run(trained_run, finished_run)


@pytest.mark.parametrize("where", ["storage.write_whole", "run.summary_writer"])
def test_full_disk_at_the_start_is_one_line(trained_run, capsys, monkeypatch, where):
    """The metrics cannot be trimmed, or TensorBoard's folder cannot be made."""

    def full(*_, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"harness.{where}", full if where == "storage.write_whole" else lambda: full)
    flags = [f"--resume={trained_run}", "--steps=40", "--tensorboard"]
    assert "No space left on device" in refusal(capsys, script, *flags)


def test_metrics_emptied_while_training_begin_anew(tmp_path, in_step):
    in_step(9, lambda: (tmp_path / "metrics.csv").write_text(""))
    train(tmp_path, "--steps=10")
    assert [row["step"] for row in rows(tmp_path)] == ["10"]


def test_metrics_spoilt_while_training_cost_a_picture(tmp_path, in_step, capsys):
    in_step(9, lambda: (tmp_path / "metrics.csv").write_text("step,recon_loss\n5,word\n"))
    train(tmp_path, "--steps=10")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "metrics.csv, line 2" in printed and (tmp_path / "summary.json").is_file()


def test_means_of_another_codebook_end_the_run(tmp_path, stop_at, capsys):
    """By one line, before a step is saved."""
    stop_at(13, tmp_path, *STEPS)
    sums = {"recon_loss": torch.tensor(1.0), "counts": torch.zeros(31)}
    save_checkpoint(tmp_path, load_checkpoint(tmp_path) | {"means": {"steps": 1, "sums": sums}})
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, *STEPS)
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.count("\n") == 1 and "means are not those of this run" in printed
    assert load_checkpoint(tmp_path)["progress"]["step"] == 13


# The prior's run


def test_stopped_prior_goes_on_by_the_same_command(trained_run, prior_run, stop_at, capsys):
    flags = ("--steps=8", "--save-every=4")
    stop_at(5, trained_run, *flags, call=train_prior)
    train_prior(trained_run, *flags)
    assert "resuming from step 5" in capsys.readouterr().out and not archives(trained_run)
    for name in ("prior_metrics.csv", "prior_curves.png", "samples_000004.png", "samples_000008.png"):
        assert (trained_run / name).read_bytes() == (prior_run / name).read_bytes()


def test_prior_moves_aside_after_vqvae_resumes(generating_run, stop_at, capsys):
    """Its codes are those of another VQ-VAE now."""
    stop_at(3, generating_run, "--steps=6", call=train_prior)
    script.main(script.parse_args([f"--resume={generating_run}", "--steps=32"]))
    capsys.readouterr()
    train_prior(generating_run, "--steps=6")
    printed = capsys.readouterr().out
    assert "changed" in printed.split("its vqvae")[1].splitlines()[0]
    assert load_checkpoint(generating_run, "prior")["progress"]["step"] == 6
    printed = refusal(capsys, prior_script, f"--run={generating_run}", *TINY, "--batch-size=1426")
    assert "1 (processes) and 1425 (training images)" in printed


def test_resume_command_keeps_changed_flags(trained_run, capsys, in_step):
    """Without them, it would train at the old rate, or not at all."""

    def fail():
        raise OSError("no disk")

    in_step(33, fail)
    flags = ["--steps=40", "--lr=0.5", "--log-every=7", "--tensorboard", "--precision=float32", "--data-dir=-mnt"]
    with pytest.raises(SystemExit):
        script.main(script.parse_args([f"--resume={trained_run}", *flags]))
    words = shlex.split(capsys.readouterr().err.strip().split("to resume: ")[1])[2:]
    assert vars(script.parse_args(words)) == vars(script.parse_args([f"--resume={trained_run}", *flags]))


def test_resume_command_can_be_pasted(tmp_path, capsys):
    """Whatever the folder's name."""
    folder = tmp_path / "my run's"
    with pytest.raises(SystemExit):
        train(folder, "--steps=40", "--save-every=5", "--lr=1e20")
    words = shlex.split(capsys.readouterr().err.strip().split("to resume: ")[1])
    assert words[0] == sys.executable and Path(words[1]).samefile(ROOT / "train.py")
    assert words[2:4] == ["--resume", str(folder)]


# --flip and --tensorboard


def test_flipped_run_goes_on_bit_for_bit(tmp_path, stop_at):
    flags = [*STEPS, "--flip", "--levels=2"]
    train(tmp_path / "whole", *flags)
    stop_at(13, tmp_path / "halves", *flags)
    train(tmp_path / "halves", *flags)
    assert same_run(tmp_path / "halves", tmp_path / "whole")


def test_flip_is_off_by_default(finished_run, tmp_path):
    train(tmp_path, *STEPS, "--flip")
    assert not load_checkpoint(finished_run)["args"]["flip"]
    assert [a["recon_loss"] != b["recon_loss"] for a, b in zip(rows(tmp_path), rows(finished_run))] == [True] * 6


def curves(folder):
    """What TensorBoard reads in a folder: the points (step, value) of each curve, and the steps of each picture."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return points, {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}


def check_curves(folder, metrics, pictures, steps):
    points, images = curves(folder)
    expected = {}
    for row in metrics:
        for name, value in row.items():
            if name not in ("step", "dataset") and value:
                expected.setdefault(name, []).append((int(row["step"]), pytest.approx(float(value), rel=1e-6)))
    assert points == expected and images == {pictures: steps}


def test_tensorboard_shows_the_metrics_without_doubles(finished_run, tmp_path, stop_at):
    """The run is stopped between two rows, or killed after rows that no checkpoint holds; its curves continue."""
    flags = [*STEPS, "--tensorboard"]
    stop_at(13, tmp_path, *flags)
    shutil.copy(tmp_path / "checkpoint_previous.pt", tmp_path / "before.pt")
    stop_at(18, tmp_path, *flags)
    shutil.move(tmp_path / "before.pt", tmp_path / "checkpoint.pt")  # of step 10; the line of step 15 comes again
    train(tmp_path, *flags)
    assert same_run(tmp_path, finished_run)
    check_curves(tmp_path / "tensorboard", rows(tmp_path), "reconstructions", [10, 20, 30])


def test_tensorboard_of_earlier_run_makes_way(tmp_path):
    for _ in range(2):
        train(tmp_path, "--steps=4", "--tensorboard")
    (archive,) = (path for path in archives(tmp_path) if path.name != "tensorboard")
    for folder in (tmp_path, archive):
        check_curves(folder / "tensorboard", rows(folder), "reconstructions", [4])


def test_prior_has_curves_of_its_own(trained_run):
    train_prior(trained_run, "--steps=4", "--save-every=4", "--tensorboard")
    points, images = curves(trained_run / "prior_tensorboard")
    assert [step for step, _ in points["train_nats"]] == [2, 4] and images == {"samples": [4]}


def test_missing_tensorboard_is_named(trained_run, capsys, monkeypatch):
    """Before the earlier run makes way."""
    before = {path.name for path in trained_run.iterdir()}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    printed = refusal(capsys, script, f"--out-dir={trained_run}", *SMALL, "--steps=2", "--tensorboard")
    assert "--tensorboard needs the package tensorboard: pip install tensorboard" in printed
    assert {path.name for path in trained_run.iterdir()} == before


def test_tensorboard_refuses_folder_that_is_not_utf8(trained_run, capsys):
    """So is each name beyond ASCII in a C locale without UTF-8. The earlier run stays where it is."""
    pytest.importorskip("tensorboard")
    try:
        moved = trained_run.rename(trained_run.parent / "caf\udce9")
    except OSError:
        pytest.skip("names are UTF-8 here")
    before = {path.name for path in moved.iterdir()}
    printed = refusal(capsys, script, f"--out-dir={moved}", *SMALL, "--steps=2", "--tensorboard")
    assert "set PYTHONUTF8=1 or name another folder" in printed and "caf\\xe9;" in printed
    assert {path.name for path in moved.iterdir()} == before


def test_slow_libraries_are_imported_when_needed(tmp_path):
    """TensorBoard only if asked for, and scikit-learn for its digits and for projections."""
    done = program("imports_of_a_run.py", tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    before, after = (printed.splitlines() for printed in done.stdout.split("training on"))
    assert "torch" in before and "sklearn" not in before
    assert "sklearn" in after and "tensorboard" not in after


def test_data_folder_of_any_name_is_logged(folder, tmp_path):
    """Its bytes need not be text, and a line break costs no line of the metrics."""
    try:
        moved = folder.rename(folder.parent / "猫 caf\udce9\nx")
    except OSError:
        pytest.skip("names are UTF-8 here")
    for steps in (6, 11):
        train(tmp_path / "run", f"--dataset={moved}", f"--steps={steps}", "--batch-size=4", "--fresh")
    assert [row["step"] for row in rows(tmp_path / "run")] == ["5", "10", "11"]
    assert rows(tmp_path / "run")[0]["dataset"].endswith("猫 caf\\xe9\\nx")


# What happens around a run


def test_seconds_survive_a_resume(tmp_path, stop_at):
    stop_at(3, tmp_path, "--steps=6")
    saved = load_checkpoint(tmp_path)
    assert saved["progress"]["seconds"] > 0
    saved["progress"]["seconds"] += 1000
    save_checkpoint(tmp_path, saved)
    train(tmp_path, "--steps=6")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 1000 < summary["training_seconds"] < summary["seconds"] < 1600
    assert summary["images_per_second"] == pytest.approx(6 * 16 / summary["training_seconds"])


def test_checkpoint_comes_before_every_report(tmp_path, monkeypatch):
    steps, report = [], script.report
    monkeypatch.setattr(script, "report", lambda run, *args: (steps.append((run.step, run.saved)), report(run, *args)))
    train(tmp_path, "--steps=12", "--save-every=4", "--log-every=2")
    assert steps == [(2, 0), (4, 4), (6, 4), (8, 8), (10, 8), (12, 12)]


def test_picture_that_cannot_be_written_is_dropped(tmp_path, in_step, capsys):
    """It may belong to someone else; here a folder lies in its place."""
    in_step(2, lambda: (tmp_path / "curves.png").mkdir())
    train(tmp_path, "--steps=4")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "cannot write a picture" in printed and "curves.png" in printed
    assert (tmp_path / "summary.json").is_file() and (tmp_path / "codebook.png").is_file()


def test_going_on_keeps_and_names_the_prior(generating_run, capsys):
    before = (generating_run / "prior.pt").read_bytes()
    script.main(script.parse_args([f"--resume={generating_run}", "--steps=31"]))
    printed = capsys.readouterr().out
    assert f"the prior in {generating_run} belongs to the VQ-VAE of step 30; train it again after this run" in printed
    assert (generating_run / "prior.pt").read_bytes() == before
    printed = refusal(capsys, sample, f"--run={generating_run}")
    assert "(step 30) than the one in this folder (step 31); train it again" in printed


def test_prior_still_fits_if_no_step_is_left(generating_run, capsys):
    """The run was killed while it measured its last step; measuring again changes no weight."""
    (generating_run / "summary.json").unlink()
    script.main(script.parse_args([f"--resume={generating_run}"]))
    assert (generating_run / "summary.json").is_file()
    assert "belongs to the VQ-VAE" not in capsys.readouterr().out
    sample.main(sample.parse_args([f"--run={generating_run}"]))


def test_ctrl_c_of_the_group_spares_workers(folder, tmp_path):
    """A terminal sends it to the workers that read images as well."""
    flags = [*SMALL, f"--dataset={folder}", "--memory-limit=0", "--steps=5000", "--save-every=5000"]
    command = [sys.executable, ROOT / "train.py", f"--out-dir={tmp_path / 'run'}", *flags]
    with started(command, start_new_session=True, stderr=subprocess.PIPE) as process:
        assert any("step 10/" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    step = load_checkpoint(tmp_path / "run")["progress"]["step"]
    assert process.returncode == 130 and step >= 10 and not errors


def test_scripts_respect_the_lock_of_a_run(generating_run, capsys):
    """Whatever writes into a folder waits for no one: one line names the process that writes there."""
    flags = [f"--resume={generating_run}", "--steps=9000", "--save-every=9000"]
    with started([sys.executable, ROOT / "train.py", *flags]) as process:
        assert any("step 35/" in line for line in process.stdout)
        before = {path.name for path in generating_run.iterdir()}
        for call in (evaluate, reconstruct, sample, prior_script):
            printed = refusal(capsys, call, f"--run={generating_run}")
            assert f"another run, process {process.pid}, is writing into {generating_run}" in printed
        assert {path.name for path in generating_run.iterdir()} == before


def test_metrics_of_another_run_are_refused(trained_run, capsys):
    """Rows of this run would stand under that run's names."""
    (trained_run / "metrics.csv").write_text("step,loss\n5,1.0\n")
    with pytest.raises(SystemExit) as ended:
        script.main(script.parse_args([f"--resume={trained_run}", "--steps=31"]))
    assert ended.value.code == 1
    assert f"{trained_run / 'metrics.csv'} has other columns than this run; move it away" in capsys.readouterr().err
    assert (trained_run / "metrics.csv").read_text() == "step,loss\n5,1.0\n"
