"""Each test makes the fault: kills, full disks, damaged files, divergence. What a run has saved must survive it."""

import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, rows, same_run, same_state, train

import checkpoint
import loop
import train as script

SHORT = [*SMALL, "--steps=20", "--save-every=7", "--log-every=3"]

# Runs train.py in a child forked from a process that has already imported it, and kills it (-9): after some seconds, or
# right before its n-th call of a function that changes the folder. A folder with a checkpoint is resumed.
FORKER = """
import os, signal, sys, time
import train

def run(folder, flags, seconds=None, calls=None):
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        done = 0
        def deadly(function):
            def call(*args, **kwargs):
                nonlocal done
                done += 1
                if done == calls:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        for name in ("replace", "fsync", "link", "rename"):
            setattr(os, name, deadly(getattr(os, name)))
        resume = os.path.exists(folder + "/checkpoint.pt")
        code = 0
        try:
            train.main(train.parse_args(["--resume=" + folder] if resume else ["--out-dir=" + folder, *flags]))
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 99
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for line in sys.stdin:
    print(run(**eval(line)), flush=True)
"""


@pytest.fixture(scope="module")
def forker():
    """Return a function that runs train.py in a child and returns its exit code, -9 when it was killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKER], cwd=ROOT, **pipes) as process:

        def run(folder, **kill):
            process.stdin.write(repr({"folder": str(folder), "flags": SHORT, **kill}) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run


@pytest.fixture(scope="module")
def undisturbed(forker, tmp_path_factory):
    for name in ("warm-up", "run"):
        folder = tmp_path_factory.mktemp(name) / "results"
        began = time.perf_counter()
        assert forker(folder) == 0
    return folder, time.perf_counter() - began


def finish_and_compare(forker, folder, undisturbed):
    """Return the step that the run had saved when it was killed."""
    step = checkpoint.load_checkpoint(folder)["progress"]["step"] if (folder / "checkpoint.pt").exists() else 0
    assert forker(folder) == (0 if step < 20 else 2)  # 2: there is nothing left to do
    assert same_run(folder, undisturbed)
    assert not list(folder.glob("*.tmp"))
    return step


@pytest.mark.parametrize("calls", [1, 2, 5, 6, 9])
def test_killed_right_before_a_change_to_the_folder_it_resumes_to_the_same_end(forker, undisturbed, tmp_path, calls):
    folder = tmp_path / "results"
    assert forker(folder, calls=calls) == -signal.SIGKILL
    finish_and_compare(forker, folder, undisturbed[0])


@pytest.mark.slow
def test_killed_at_50_random_moments_it_resumes_to_the_same_end(forker, undisturbed, tmp_path):
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


def command(*flags):
    return [sys.executable, ROOT / "train.py", *map(str, flags)]


def test_second_ctrl_c_stops_at_once_and_leaves_the_last_checkpoint_whole(tmp_path):
    """The step that the first one waits for takes a minute here."""
    slow = """if True:
        import signal, time, loop, train
        original = loop.batch_indices
        def batch_indices(*args):
            if args[-1] == 8:
                print("slow", flush=True)
                last = time.monotonic() + 60
                while signal.getsignal(signal.SIGINT) != signal.SIG_DFL and time.monotonic() < last:
                    time.sleep(0.01)
                print("caught", flush=True)
                time.sleep(60)
            return original(*args)
        loop.batch_indices = batch_indices
        train.main(train.parse_args())"""
    run = [sys.executable, "-c", slow, f"--out-dir={tmp_path}", *SHORT]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for word in ("slow\n", "caught\n"):
            assert word in process.stdout  # reads until it comes
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT
    assert checkpoint.load_checkpoint(tmp_path)["progress"]["step"] == 7


def test_full_disk_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(trained_run):
    """A limit on the size of files, which pictures exceed and metrics.csv does not, stands for the full disk."""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    before = (trained_run / "checkpoint.pt").read_bytes()
    run = command("--resume", trained_run, "--steps", 40)
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, preexec_fn=small_files)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot go on after step 40" in done.stderr and "File too large" in done.stderr
    remedy = f"to go on: {sys.executable} train.py --resume {trained_run}"
    assert f"the checkpoint of step 30 is whole, {remedy}" in done.stderr
    assert (trained_run / "checkpoint.pt").read_bytes() == before
    assert subprocess.run(run, capture_output=True, cwd=ROOT).returncode == 0


def test_checkpoint_that_the_disk_has_no_room_for_ends_the_run_likewise(tmp_path):
    """Here the limit is above the pictures and below the checkpoint."""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    train(tmp_path, "--steps=5", "--codebook-size=4000", "--code-dim=64")
    files = {path.name for path in tmp_path.iterdir()}
    before = (tmp_path / "checkpoint.pt").read_bytes()
    run = command("--resume", tmp_path, "--steps", 10)
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, preexec_fn=small_files)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot go on after step 10" in done.stderr and "the checkpoint of step 5 is whole" in done.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == files | {"recon_000010.png"}


def test_checkpoint_that_does_not_fit_leaves_the_one_before_and_no_rubbish(trained_run):
    state = checkpoint.load_checkpoint(trained_run)
    files = sorted(path.name for path in trained_run.iterdir())
    code = f"""if True:
        import resource, pathlib, checkpoint
        state = checkpoint.load_checkpoint({str(trained_run)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        try:
            checkpoint.save_checkpoint(pathlib.Path({str(trained_run)!r}), state)
        except OSError as error:
            print(error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "File too large" in done.stdout, done.stderr
    assert same_state(checkpoint.load_checkpoint(trained_run), state)
    assert sorted(path.name for path in trained_run.iterdir()) == files


def test_folder_that_vanishes_ends_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    folder, moved = tmp_path / "results", tmp_path / "moved"
    original = loop.batch_indices

    def vanish(*args):
        if args[-1] == 10:
            folder.rename(moved)
            folder.write_text("a file now")
        return original(*args)

    monkeypatch.setattr(loop, "batch_indices", vanish)
    with pytest.raises(SystemExit) as ended:
        train(folder, "--steps=40", "--save-every=7")
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.count("\n") == 1 and "cannot go on after step 14" in printed
    assert checkpoint.load_checkpoint(moved)["progress"]["step"] == 7


def test_damaged_bits_of_a_checkpoint_are_found_or_harmless(trained_run):
    path = trained_run / "checkpoint.pt"
    whole, state, found = path.read_bytes(), checkpoint.load_checkpoint(trained_run), 0
    places = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same_state(checkpoint.load_checkpoint(trained_run), state)  # padding between the zip's entries
        except ValueError as error:
            found += 1
            assert "checkpoint.pt" in str(error) and "cp" in str(error)
    assert found > 100


def test_damaged_checkpoint_is_refused_with_the_way_to_go_on_from_the_one_before(trained_run, capsys):
    (trained_run / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(SystemExit) as refused:
        script.parse_args(["--resume", str(trained_run), "--steps=40"])
    printed = capsys.readouterr().err
    assert refused.value.code == 2 and printed.count("\n") == 1
    advice = printed.strip().split("to go on from step 20 instead: ")[1]
    subprocess.run(advice.split(), check=True)
    assert checkpoint.load_checkpoint(trained_run)["progress"]["step"] == 20
    script.main(script.parse_args(["--resume", str(trained_run), "--steps=40"]))
    assert [int(row["step"]) for row in rows(trained_run)] == [5, 10, 15, 20, 25, 30, 35, 40]


@pytest.mark.parametrize("way", ["--ema", "--no-ema"])
def test_divergence_ends_the_run_and_names_the_last_finite_checkpoint(tmp_path, capsys, way):
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, "--steps=40", "--save-every=5", "--lr=1e20", way)
    printed = capsys.readouterr().err
    saved = checkpoint.load_checkpoint(tmp_path)
    assert ended.value.code == 1 and printed.count("\n") == 1
    assert "diverged after step" in printed and "NaN or infinite; lower the learning rate" in printed
    assert f"the checkpoint of step {saved['progress']['step']} is whole" in printed
    advice = printed.strip().split("to go on: ")[1]  # by the same steps it would diverge again
    assert script.parse_args(advice.split()[2:]).lr == 5e19
    with pytest.raises(SystemExit):
        script.main(script.parse_args([*advice.split()[2:], "--codebook-lr=1"]))
    assert capsys.readouterr().err.strip().endswith("--lr 2.5e+19 --codebook-lr 0.5")
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert not any("nan" in line or "inf" in line for line in (tmp_path / "metrics.csv").read_text().splitlines())


def test_poisoned_model_is_never_saved(trained_run):
    before = checkpoint.load_checkpoint(trained_run)
    for part in ("model", "moments"):
        poisoned = checkpoint.load_checkpoint(trained_run)
        bias = poisoned["model"]["levels.0.encoder.1.bias"]
        (bias if part == "model" else poisoned["optimizer"]["state"][0]["exp_avg_sq"])[0] = torch.inf
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            checkpoint.save_checkpoint(trained_run, poisoned)
    assert same_state(checkpoint.load_checkpoint(trained_run), before)


def test_metrics_go_on_without_gap_or_duplicate_after_a_line_half_written(finished_run, trained_run):
    """The process died after the checkpoint of step 20: its later lines are done again, the last one was cut."""
    shutil.copy(trained_run / "checkpoint_previous.pt", trained_run / "checkpoint.pt")
    text = (trained_run / "metrics.csv").read_text()
    (trained_run / "metrics.csv").write_text(text + "20,0.1\n2")
    script.main(script.parse_args(["--resume", str(trained_run)]))
    assert (trained_run / "metrics.csv").read_bytes() == (finished_run / "metrics.csv").read_bytes()
    assert same_run(trained_run, finished_run)
