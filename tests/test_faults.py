"""Each test causes a fault: a kill or a full disk. What a run has saved must survive, and resuming must be exact."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

from harness.storage import load_checkpoint

import pytest
from conftest import (
    LIMIT,
    PROGRAMS,
    ROOT,
    SMALL,
    TINY,
    ended,
    environment,
    killed_after,
    rows,
    same_run,
    same_state,
    started,
    train,
)

SHORT = [*SMALL, "--steps=20", "--save-every=7", "--log-every=3"]
PRIOR = [*TINY, "--steps=8", "--save-every=4"]


@pytest.fixture(scope="module")
def forker():
    """Return a function that runs train.py in a child and returns its exit code, -9 when it was killed.

    The child dies or gets a signal where the keywords say, which tests/programs/forker.py explains.
    """
    command = [sys.executable, PROGRAMS / "forker.py"]
    threads = environment(OMP_NUM_THREADS="2")  # as users have: resuming must be exact with several, too
    with started(command, seconds=3600, stdin=subprocess.PIPE, env=threads) as process:  # of all tests below

        def run(folder, flags=SHORT, script="train", **fate):
            option = "--out-dir" if script == "train" else "--run"
            command = [script, f"{option}={folder}", *flags]
            process.stdin.write(json.dumps({"command": command, **fate}) + "\n")
            process.stdin.flush()
            with killed_after(process, LIMIT):
                return int(process.stdout.readline())

        yield run


@pytest.fixture(scope="module")
def undisturbed(forker, tmp_path_factory):
    for name in ("warm-up", "run"):
        folder = tmp_path_factory.mktemp(name) / "results"
        began = time.perf_counter()
        assert forker(folder) == 0
    return folder, time.perf_counter() - began


@pytest.fixture(scope="module")
def undisturbed_prior(forker, finished_run, tmp_path_factory):
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("prior") / "results")
    assert forker(folder, PRIOR, "train_prior") == 0
    return folder


def finish_and_compare(forker, folder, undisturbed):
    """Run the same command again to its end; return the step that the run had saved when it was killed."""
    step = load_checkpoint(folder)["progress"]["step"] if (folder / "checkpoint.pt").exists() else 0
    finished = (folder / "summary.json").exists()
    if not finished:  # else the same command would start anew
        assert forker(folder) == 0
    assert same_run(folder, undisturbed)
    assert not list(folder.glob("*.tmp")) and not [path for path in folder.iterdir() if path.is_dir()]
    return step


# Kills


@pytest.mark.parametrize("changes", [1, 2, 5, 6, 9, 13])
def test_kill_before_a_write_costs_nothing(forker, undisturbed, tmp_path, changes):
    """Killed right before its n-th change to the folder, a run ends by the same command as if undisturbed."""
    folder = tmp_path / "results"
    assert forker(folder, changes=changes) == -signal.SIGKILL
    finish_and_compare(forker, folder, undisturbed[0])


@pytest.mark.parametrize(
    "call",
    [
        ("train.report", 6),  # at step 14, after the checkpoint
        ("harness.figures.save_reconstructions", 2),  # after the row of step 14
        ("train.report", 9),  # at the last step
        ("train.evaluate", 3),
        ("harness.figures.save_reconstructions", 3),
        ("harness.figures.save_curves", 3),
        ("harness.figures.save_codebooks", 1),
        ("harness.figures.save_codebooks", 1),
    ],
)
def test_kill_between_checkpoint_and_report_costs_nothing(forker, undisturbed, tmp_path, call):
    """The row, the pictures and the summary that are missing are made when the run is started again."""
    folder = tmp_path / "results"
    assert forker(folder, call=call) == -signal.SIGKILL
    saved = finish_and_compare(forker, folder, undisturbed[0])
    assert saved == (14 if call in (("train.report", 6), ("harness.figures.save_reconstructions", 2)) else 20)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, undisturbed[0])]
    assert summaries[0].keys() == summaries[1].keys()
    assert all(summaries[0][name] == summaries[1][name] for name in summaries[0] if name.startswith("test_"))


def test_kill_in_the_report_of_a_longer_run(forker, undisturbed, tmp_path):
    """The summary of the shorter run is still there, and does not make the longer one finished."""
    folder = shutil.copytree(undisturbed[0], tmp_path / "results")
    longer = [f"--resume={folder}", "--steps=24"]
    assert forker(folder, longer, call=("harness.figures.save_codebooks", 1)) == -signal.SIGKILL
    assert json.loads((folder / "summary.json").read_text())["steps"] == 20
    assert forker(folder, longer) == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 24
    assert [int(row["step"]) for row in rows(folder)][-3:] == [20, 21, 24]
    assert forker(folder, longer) == 2  # now it has done them


@pytest.mark.parametrize(
    "call",
    [
        ("train_prior.report", 4),  # at the last step, after the first of its two checkpoints
        ("train_prior.draw", 2),  # after the second
        ("harness.figures.save_samples", 2),
        ("train_prior.summarize", 1),
        ("train_prior.draw", 1),  # at step 4
    ],
)
def test_kill_in_a_priors_report_costs_nothing(forker, finished_run, undisturbed_prior, tmp_path, call):
    folder = shutil.copytree(finished_run, tmp_path / "results")
    assert forker(folder, PRIOR, "train_prior", call=call) == -signal.SIGKILL
    assert not (folder / "prior_summary.json").exists()
    assert forker(folder, PRIOR, "train_prior") == 0
    for name in ("prior_metrics.csv", "prior_curves.png", "samples_000004.png", "samples_000008.png"):
        assert (folder / name).read_bytes() == (undisturbed_prior / name).read_bytes(), name
    assert same_state(load_checkpoint(folder, "prior"), load_checkpoint(undisturbed_prior, "prior"))
    summaries = [json.loads((path / "prior_summary.json").read_text()) for path in (folder, undisturbed_prior)]
    assert summaries[0]["test_nats_per_code"] == summaries[1]["test_nats_per_code"]


@pytest.mark.slow
def test_kills_at_50_random_moments_cost_nothing(forker, undisturbed, tmp_path):
    """A run that ends before its moment is not one of the 50; how long one takes is measured again and again."""
    whole, seconds = undisturbed
    moments, found = random.Random(0), []
    while len(found) < 50:
        folder, moment = tmp_path / f"{len(found)}", moments.uniform(0, seconds)
        code = forker(folder, seconds=moment)
        if code == 0:
            assert same_run(folder, whole)
            shutil.rmtree(folder)
            seconds = moment
            continue
        assert code == -signal.SIGKILL
        began = time.perf_counter()
        found.append(finish_and_compare(forker, folder, whole))
        if found[-1] == 0:  # all of it was left to do
            seconds = time.perf_counter() - began
    assert {0, 7, 14} <= set(found)


def test_second_sigterm_does_not_cut_the_save(forker, tmp_path):
    """A scheduler may send it to the process and again to its group."""
    assert forker(tmp_path, signal=[9, signal.SIGTERM, 2]) == 143
    assert load_checkpoint(tmp_path)["progress"]["step"] == 9


def test_second_ctrl_c_stops_at_once(tmp_path):
    """The step that the first one waits for takes a minute here; the last checkpoint is whole."""
    run = [sys.executable, PROGRAMS / "slow_step.py", f"--out-dir={tmp_path}", *SHORT]
    with started(run) as process:
        for word in ("slow\n", "caught\n"):
            assert word in process.stdout  # reads until it comes
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT
    assert load_checkpoint(tmp_path)["progress"]["step"] == 7


# Full disks


def command(*flags):
    return [sys.executable, ROOT / "train.py", *map(str, flags)]


def test_full_disk_leaves_the_run_intact(trained_run):
    """A limit on the size of files, which pictures exceed and metrics.csv does not, stands for the full disk."""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    before = (trained_run / "checkpoint.pt").read_bytes()
    run = command("--resume", trained_run, "--steps", 40)
    done = ended(run, preexec_fn=small_files)
    *pictures, error = done.stderr.splitlines()  # pictures that fail do not stop a run
    assert done.returncode == 1 and all(line.startswith("cannot write a picture") for line in pictures), done.stderr
    assert "cannot continue after step 40" in error and "File too large" in error
    remedy = f"{sys.executable} train.py --resume {trained_run} --steps=40"  # without its flags, nothing is left to do
    assert error.endswith(f"the checkpoint of step 30 is intact; to resume: {remedy}")
    assert (trained_run / "checkpoint.pt").read_bytes() == before
    assert ended(remedy.split(), cwd=ROOT).returncode == 0


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    """Here the limit is above the pictures and below the checkpoint."""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    train(tmp_path, "--steps=5", "--codebook-size=4000", "--code-dim=64")
    files = {path.name for path in tmp_path.iterdir()}
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run = command("--resume", tmp_path, "--steps", 10)
    done = ended(run, preexec_fn=small_files)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot continue after step 10" in done.stderr and "the checkpoint of step 5 is intact" in done.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == files
