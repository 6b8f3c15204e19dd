"""Files are whole or absent, a checkpoint is what was written or refused, and no run overwrites another."""

import errno
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from harness import storage
from harness.run import is_finished
from harness.storage import (
    Damaged,
    OtherVersion,
    append_row,
    is_run_folder,
    load_checkpoint,
    lock_folder,
    move_aside,
    new_folder,
    read_state,
    replace,
    save_checkpoint,
    trim_metrics,
    whole_file,
    write_state,
    write_whole,
)

import psutil
import pytest
import torch
from conftest import PROGRAMS, ROOT, SMALL, ended, program, refusal, rows, same_run, same_state, started, train

import evaluate
import reconstruct
import sample
import train as script
import train_prior as prior_script

STATE = {"weights": torch.arange(1000.0), "names": ["a", "b"], "step": 7, "nested": {"seconds": 0.5}}


# Files that are whole or absent


def test_file_is_synced_before_it_replaces(tmp_path, monkeypatch):
    """Else a power cut can leave the new name with nothing in it."""
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, original=original: (done.append(name), original(*args))[1]
        )
    write_whole(tmp_path / "a.txt", "text")
    write_state(tmp_path / "a.pt", STATE)
    assert done == ["fsync", "replace"] * 2


def test_everything_is_written_before_the_sync(tmp_path, monkeypatch):
    sizes, original = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), original(file))[1])
    write_whole(tmp_path / "a.txt", "text")
    write_state(tmp_path / "a.pt", STATE)
    assert sizes == [4, (tmp_path / "a.pt").stat().st_size]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "before")
    with pytest.raises(OSError, match=r"no room: .*a\.txt"), whole_file(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "no room")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "before"


def test_temporary_names_are_random(tmp_path):
    names = set()
    for _ in range(20):
        with whole_file(tmp_path / "a.txt"):
            names |= {path.name for path in tmp_path.glob("*.tmp")}
    assert len(names) == 20 and all(re.fullmatch(r"a\.txt\.[0-9a-f]{16}\.tmp", name) for name in names)


def test_link_under_a_temporary_name_is_not_followed(tmp_path, monkeypatch):
    """Someone else who may write to the folder must not have us overwrite a file elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / "a.pt.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_state(tmp_path / "a.pt", STATE)
    assert victim.read_text() == "mine" and not (tmp_path / "a.pt").exists()


def test_file_that_is_open_elsewhere_is_replaced_later(tmp_path, monkeypatch):
    """On Windows, where a reader keeps the file from being replaced."""
    original, left = os.replace, [1, 1]

    def refuse_twice(*paths):
        if left:
            raise PermissionError(f"in use {left.pop()}")
        original(*paths)

    monkeypatch.setattr(os, "replace", refuse_twice)
    monkeypatch.setattr("time.sleep", lambda _: None)
    (tmp_path / "a").write_text("new")
    with pytest.raises(PermissionError):
        replace(tmp_path / "a", tmp_path / "b", tries=1)
    replace(tmp_path / "a", tmp_path / "b", tries=2)
    assert (tmp_path / "b").read_text() == "new"


def test_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="cannot be locked"):
        lock_folder(tmp_path / "run")
    assert (tmp_path / "victim").read_text() == "mine"


def test_link_in_place_of_a_file_is_replaced(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "summary.json").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "summary.json", "{}")
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "summary.json").is_symlink()


# Checkpoints


def test_state_comes_back_with_its_digest(tmp_path):
    write_state(tmp_path / "a.pt", STATE)
    state, digest = read_state(tmp_path / "a.pt")
    assert same_state(state, STATE) and len(digest) == 64
    assert same_state(torch.load(tmp_path / "a.pt", weights_only=True), STATE)  # a reader needs no module of ours
    write_state(tmp_path / "b.pt", STATE | {"step": 8})
    assert read_state(tmp_path / "b.pt")[1] != digest


def test_damaged_bits_are_always_found(trained_run):
    """Random bits, and every one of the last 500 bytes: the zip's index and the digest itself."""
    path = trained_run / "checkpoint.pt"
    whole, places = path.read_bytes(), random.Random(0)
    bits = [places.randrange(8 * len(whole)) for _ in range(300)]
    bits += [8 * place + places.randrange(8) for place in range(len(whole) - 500, len(whole))]
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match="checkpoint.pt"):
            read_state(path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged.* to resume from step 20 instead: cp "):
        load_checkpoint(trained_run)


@pytest.mark.parametrize("length", [0, 1, 72, 73, 74, 500, -1000, -1])
def test_file_cut_short_is_damaged(tmp_path, length):
    write_state(tmp_path / "a.pt", STATE)
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[:length])
    with pytest.raises(Damaged, match="a.pt"):
        read_state(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(whole + b"\0")
    with pytest.raises(Damaged, match="a.pt"):
        read_state(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", "truncated", "foreign", "incomplete", "newer"])
def test_every_script_refuses_a_bad_checkpoint(capsys, trained_run, content):
    path = trained_run / "checkpoint.pt"
    (trained_run / "checkpoint_previous.pt").unlink()
    if content is None:
        path.unlink()
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "foreign":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif content == "incomplete":
        write_state(path, {"format": storage.FORMAT})
    elif content == "newer":
        torch.save({"format": 99}, path)
    else:
        path.write_bytes(content)
    reasons = {
        "newer": "has format 99",
        None: "holds no checkpoint.pt",
        "incomplete": "does not hold what train.py saves",
    }
    reason = reasons.get(content, "damaged")
    assert reason in refusal(capsys, script, f"--resume={trained_run}")
    for call in (evaluate, reconstruct, sample, prior_script):
        assert reason in refusal(capsys, call, f"--run={trained_run}")


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_loading_a_checkpoint_executes_nothing(capsys, trained_run):
    path = trained_run / "checkpoint.pt"
    write_state(path, {"format": storage.FORMAT, "args": Malicious()})
    assert "holds more than tensors and plain values" in refusal(capsys, script, f"--resume={trained_run}")
    torch.save({"format": storage.FORMAT, "args": Malicious()}, path)  # without a digest
    assert "checkpoint.pt is damaged" in refusal(capsys, script, f"--resume={trained_run}")
    assert "executed" not in capsys.readouterr().out


def test_damaged_checkpoint_names_the_one_before(trained_run, capsys):
    """The command in the message brings it back, and the run goes on from there."""
    (trained_run / "checkpoint.pt").write_bytes(b"")
    printed = refusal(capsys, script, f"--resume={trained_run}", "--steps=40")
    advice = printed.strip().split("to resume from step 20 instead: ")[1]
    ended(advice.split(), check=True)
    assert load_checkpoint(trained_run)["progress"]["step"] == 20
    script.main(script.parse_args([f"--resume={trained_run}", "--steps=40"]))
    assert [int(row["step"]) for row in rows(trained_run)] == [5, 10, 15, 20, 25, 30, 35, 40]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_checkpoint_that_is_not_a_file_is_named(trained_run, capsys, make):
    """The one before it could not be copied to its place; once it has been moved, it can."""
    path = trained_run / "checkpoint.pt"
    path.unlink()
    make(path)
    printed = refusal(capsys, evaluate, f"--run={trained_run}")
    assert f"{path} is not a file; move it away" in printed and "cp --" not in printed
    path.rename(trained_run / "moved")
    assert "to resume from step 20 instead: cp --" in refusal(capsys, evaluate, f"--run={trained_run}")


def test_passing_fault_of_the_disk_is_no_damage(trained_run, monkeypatch, capsys):
    """An older checkpoint must not replace a good one."""
    read = storage.read_digest

    def read_or_fail(path):
        if path.name == "checkpoint.pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(storage, "read_digest", read_or_fail)
    printed = refusal(capsys, evaluate, f"--run={trained_run}")
    assert "cannot be read" in printed and "cp --" not in printed


def test_file_system_without_links_keeps_the_one_before(trained_run, monkeypatch):
    """As many that are shared over a network."""

    def fail(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    before = load_checkpoint(trained_run)
    monkeypatch.setattr(os, "link", fail)
    save_checkpoint(trained_run, before | {"code": "other"})
    kept = storage.read_checkpoint(trained_run / "checkpoint_previous.pt", "checkpoint")
    assert kept["code"] == before["code"] != load_checkpoint(trained_run)["code"]
    assert not list(trained_run.glob("*.tmp"))


def test_poisoned_state_is_never_saved(trained_run):
    before = load_checkpoint(trained_run)
    for part in ("model", "moments"):
        poisoned = load_checkpoint(trained_run)
        bias = poisoned["model"]["levels.0.encoder.1.bias"]
        (bias if part == "model" else poisoned["optimizer"]["state"][0]["exp_avg_sq"])[0] = torch.inf
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            save_checkpoint(trained_run, poisoned)
    assert same_state(load_checkpoint(trained_run), before)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_checkpoint_without_room_leaves_the_one_before(trained_run):
    state = load_checkpoint(trained_run)
    files = sorted(path.name for path in trained_run.iterdir())
    done = program("save_over_limit.py", trained_run)
    assert "File too large" in done.stdout and "checkpoint.pt" in done.stdout, done.stderr
    assert same_state(load_checkpoint(trained_run), state)
    assert sorted(path.name for path in trained_run.iterdir()) == files


def write_format_3(folder):
    """Replace the checkpoint by one as commit b121742 wrote it: a bare zip without a digest."""
    torch.save({"format": 3, "args": {"steps": 30}, "progress": {"step": 20}}, folder / "checkpoint.pt")
    (folder / "checkpoint_previous.pt").unlink()


def test_older_format_is_refused_with_a_remedy(trained_run, capsys):
    write_format_3(trained_run)
    with pytest.raises(OtherVersion):
        load_checkpoint(trained_run)
    for call, flag in ((script, "--resume"), (evaluate, "--run")):
        printed = refusal(capsys, call, f"{flag}={trained_run}")
        assert f"format 3, this version reads {storage.FORMAT}; train again, or use the version that wrote" in printed


def test_older_format_makes_way_for_a_new_run(trained_run, capsys):
    write_format_3(trained_run)
    train(trained_run, "--steps=2")
    printed = capsys.readouterr().out
    assert f"moved the earlier run in {trained_run} to" in printed and "has format 3" in printed
    (archive,) = (path for path in trained_run.iterdir() if path.is_dir())
    assert torch.load(archive / "checkpoint.pt")["format"] == 3 and (archive / "summary.json").is_file()
    assert load_checkpoint(trained_run)["progress"]["step"] == 2


# The folder of a run


def test_earlier_run_moves_to_a_dated_folder(trained_run, capsys):
    """Its files are moved as they are; whatever else is in the folder stays."""
    (trained_run / "notes.txt").write_text("mine")
    stay = {"notes.txt", ".lock", ".lock.pid"}
    earlier = {p.name: p.read_bytes() for p in trained_run.iterdir() if p.name not in stay}
    train(trained_run, "--steps=2")
    (archive,) = (p for p in trained_run.iterdir() if p.is_dir())
    assert {p.name: p.read_bytes() for p in archive.iterdir()} == earlier
    assert f"moved the earlier run in {trained_run} to {archive}" in capsys.readouterr().out
    assert (trained_run / "notes.txt").read_text() == "mine"
    assert len(rows(trained_run)) == 1


def test_every_file_of_an_earlier_run_moves(generating_run):
    names = ("evaluation.json", "reconstructed.png", "reconstructed_2.png", "codes.pt", "images.txt", "samples.png")
    names += ("samples_by_scale.png", "samples_000004.png", "completed.png", "neighbours.png", "generation.json")
    names += ("prior.pt", "prior_previous.pt", "prior_metrics.csv", "prior_curves.png", "prior_summary.json")
    for name in names:
        (generating_run / name).touch()
    train(generating_run, "--steps=2")
    (archive,) = (path for path in generating_run.iterdir() if path.is_dir())
    assert all((archive / name).exists() and not (generating_run / name).exists() for name in names)


def test_killed_move_goes_on_into_the_same_folder(tmp_path, monkeypatch):
    """It is named by the time of the newest file."""
    names = ("metrics.csv", "summary.json", "checkpoint.pt", *(f"recon_00000{i}.png" for i in range(7)))
    for i, name in enumerate(names):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1e9 + i, 1e9 + i))
    rename, moved = Path.rename, []

    def killed(path, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(rename(path, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        move_aside(tmp_path)
    move_aside(tmp_path)
    (archive,) = tmp_path.iterdir()
    assert {path.name for path in archive.iterdir()} == set(names)
    assert archive.name == time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(1e9 + 9))


def test_runs_of_the_same_second_move_apart(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "metrics.csv").write_text(text)
        os.utime(tmp_path / "metrics.csv", (1e9, 1e9))
        move_aside(tmp_path)
    assert sorted(path.read_text() for path in tmp_path.glob("*/metrics.csv")) == ["first", "second"]


def test_second_run_in_a_folder_is_refused(tmp_path, capsys):
    """One line names the process that writes there; killed, it leaves nothing to clean."""
    flags = [f"--out-dir={tmp_path}", *SMALL, "--steps=3000"]
    command = [sys.executable, ROOT / "train.py", *flags]
    with started(command) as process:
        assert any("step 5/" in line for line in process.stdout)
        (tmp_path / "metrics.csv.0123456789abcdef.tmp").write_text("half written")
        printed = refusal(capsys, script, *flags, "--fresh")
        assert f"another run, process {process.pid}, is writing into {tmp_path}" in printed
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # nothing was moved
        process.send_signal(signal.SIGKILL)
    train(tmp_path, "--steps=2")
    assert load_checkpoint(tmp_path)["progress"]["step"] == 2 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="locks a file as Unix does")
def test_lock_of_a_killed_run_is_waited_for(tmp_path):
    """Its other processes may take some seconds to see that the first has died."""
    (tmp_path / ".lock.pid").write_text(ended(["sh", "-c", "echo $$ 0.0"]).stdout)
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        timer = threading.Timer(1, fcntl.flock, [held, fcntl.LOCK_UN])
        timer.start()
        lock_folder(tmp_path).release()
        timer.join()


def test_only_our_own_temporary_files_are_removed(trained_run):
    """Those of a killed run are deleted; a user's own *.tmp files stay."""
    for name in ("a.0123456789abcdef.tmp", "notes.tmp", "a.0123456789ABCDEF.tmp"):
        (trained_run / name).write_text("")
    for name in ("mine.tmp", "b.0123456789abcdef.tmp"):  # the second may be an --out that is being written
        (trained_run / name).mkdir()
    evaluate.main(evaluate.parse_args([f"--run={trained_run}"]))
    left = {path.name for path in trained_run.glob("*.tmp")}
    assert left == {"notes.tmp", "a.0123456789ABCDEF.tmp", "mine.tmp", "b.0123456789abcdef.tmp"}


@pytest.mark.parametrize("error", [NotImplementedError("flock"), OSError(errno.ENOLCK, "No locks available")])
def test_file_system_without_locks_is_named(trained_run, capsys, monkeypatch, error):
    def acquire(*_, **options):
        raise error

    monkeypatch.setattr(storage.filelock.BaseFileLock, "acquire", acquire)
    assert f"{trained_run} cannot be locked" in refusal(capsys, evaluate, f"--run={trained_run}")


def test_no_marker_file_stands_for_a_lock(trained_run, capsys, monkeypatch):
    """It would outlive a killed run."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert f"{trained_run} cannot be locked" in refusal(capsys, evaluate, f"--run={trained_run}")


def test_run_that_has_just_started_is_named(tmp_path, monkeypatch):
    """When this one looked first, .lock.pid still held the process of the run before."""
    owners = [(None, False), (77, True)]
    monkeypatch.setattr(storage, "lock_owner", lambda folder: owners.pop(0))

    def acquire(lock, **options):
        raise storage.filelock.Timeout(lock.lock_file)

    monkeypatch.setattr(storage.filelock.BaseFileLock, "acquire", acquire)
    with pytest.raises(ValueError, match="another run, process 77, is writing"):
        storage.lock_folder(tmp_path)


@pytest.mark.parametrize(("place", "name"), [(torch, "load"), (torch.Tensor, "isfinite")])
def test_lack_of_memory_is_no_damage(trained_run, capsys, monkeypatch, place, name):
    """Nobody should replace a good checkpoint by the one before it."""

    def fail(*_, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(place, name, fail)
    for call, flag in ((evaluate, "--run"), (script, "--resume")):
        printed = refusal(capsys, call, f"{flag}={trained_run}")
        assert "out of memory" in printed and "cp --" not in printed


def test_run_survives_the_loss_of_its_pid_file(finished_run, tmp_path, in_step):
    in_step(13, (tmp_path / ".lock.pid").unlink)
    train(tmp_path, "--steps=30", "--save-every=10")
    assert same_run(tmp_path, finished_run)


def test_refused_run_unlocks_its_folder(tmp_path, capsys):
    """A notebook's process lives on after a mistake."""
    with pytest.raises(SystemExit) as refused:  # holds the frames of the refused run
        train(tmp_path, "--batch-size=1501")
    assert refused.value.code == 2 and "--batch-size 1501" in capsys.readouterr().err
    train(tmp_path, "--steps=1")
    assert (tmp_path / "summary.json").is_file()


def test_unwritable_folder_is_refused_before_data_loads(capsys, trained_run, monkeypatch):
    monkeypatch.setattr(script, "load_training_data", lambda *_: pytest.fail("data were loaded"))
    (trained_run / "file").write_text("")
    assert "needs to be a folder" in refusal(capsys, script, f"--out-dir={trained_run / 'file'}")
    assert "needs to be a folder" in refusal(capsys, script, f"--out-dir={trained_run / 'file' / 'results'}")
    (trained_run / "link").symlink_to("nowhere")
    assert "or a link to nowhere" in refusal(capsys, script, f"--out-dir={trained_run / 'link'}")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    assert "cannot write to the folder" in refusal(capsys, script, f"--out-dir={trained_run}")
    assert "cannot write to the folder" in refusal(capsys, script, f"--resume={trained_run}", "--steps=40")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("step,loss\n5,1\n10,2\n15,3\n", "step,loss\n5,1\n10,2\n"),
        ("step,loss\n5,1\n10,2\n15", "step,loss\n5,1\n10,2\n"),  # the last line was cut
        ("step,loss\n5,1\n1", "step,loss\n5,1\n"),  # and looks like a step
        ("step,loss\n15,3\n", None),
        ("step,lo", None),
        ("", None),
    ],
)
def test_metrics_are_trimmed_to_a_step(tmp_path, text, kept):
    path = tmp_path / "metrics.csv"
    path.write_text(text, errors="surrogateescape")
    trim_metrics(path, 10)
    assert (path.read_text() if path.exists() else None) == kept


@pytest.mark.parametrize(
    "text",
    [
        "step,loss,note\n5,1\n10,2\n",
        "step,loss\n5,1,\n10,2,\n",
        "# my runs\nstep,loss\n5,1\n",
        "step;loss\n5;1\n10;2\n",
        "step,loss\n5\n10,2\n",
    ],
)
def test_metrics_edited_by_hand_are_never_dropped(tmp_path, text):
    """Only a kill leaves an incomplete line, which is then the last one."""
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(Damaged, match="does not fit the header in line 1"):
        trim_metrics(path, 10)
    assert path.read_text() == text
    trim_metrics(tmp_path / "missing.csv", 10)


@pytest.mark.parametrize(("name", "column"), [("metrics.csv", 0), ("metrics.csv", 1), ("prior_metrics.csv", 1)])
def test_word_in_the_metrics_is_named_before_training(generating_run, capsys, name, column):
    """The line can be mended, or the file moved away."""
    path, call = generating_run / name, script if name == "metrics.csv" else prior_script
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    cells[column] = "word"
    path.write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:], ""]))
    forged = path.read_bytes()
    printed = refusal(capsys, call, f"--resume={generating_run}", "--steps=31")
    assert f"{path}, line 3, does not fit the header in line 1" in printed and "move the file away" in printed
    assert path.read_bytes() == forged
    path.unlink()
    call.main(call.parse_args([f"--resume={generating_run}", "--steps=31"]))
    assert path.exists()


def test_new_folder_replaces_only_an_empty_one(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="exists already; name a new folder"), new_folder(tmp_path):
        pass
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("")
        assert not (tmp_path / "empty" / "a").exists()
    assert (tmp_path / "empty" / "a").exists()


def test_failed_new_folder_leaves_no_empty_folders(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_new_folder_may_have_the_longest_name(tmp_path):
    with new_folder(tmp_path / ("a" * 255)):
        pass
    assert (tmp_path / ("a" * 255)).is_dir()


def test_new_folder_follows_a_link(tmp_path):
    """Also one that leads to no folder yet; that of the working directory, and a link in a circle, are refused."""
    (tmp_path / "link").symlink_to("target")
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "a").exists()


@pytest.mark.parametrize("name", [".", "loop"])
def test_new_folder_refuses_what_it_cannot_replace(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "loop":
        Path(name).symlink_to(name)
    with pytest.raises(ValueError, match=f"--out {name} exists already"), new_folder(name):
        pass


def test_warns_of_half_written_folder(tmp_path, capsys):
    """It is left alone, as another process may be writing it."""
    left, other = tmp_path / "out[1].0123456789abcdef.tmp", tmp_path / "out[1].mine.tmp"
    left.mkdir()
    other.mkdir()
    with new_folder(tmp_path / "out[1]"):
        printed = capsys.readouterr().err
    assert f"{left} is left from an --out that was killed" in printed and str(other) not in printed and left.is_dir()


def test_invalid_pid_is_no_owner(tmp_path):
    for content in ("9" * 20 + " 0.0", "1", "", "one two"):
        (tmp_path / ".lock.pid").write_text(content)
        assert not is_run_folder(tmp_path)
        lock_folder(tmp_path).release()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_full_disk_names_what_was_written(tmp_path):
    """Also where a library wrote it."""
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device.*metrics.csv"):
        append_row(tmp_path / "metrics.csv", [1, 2])
    with pytest.raises(OSError, match="No space left on device.*pairs"), new_folder(tmp_path / "pairs"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["checkpoint.pt", "prior.pt"])
def test_one_file_marks_a_run_folder(tmp_path, name):
    assert not is_run_folder(tmp_path)
    (tmp_path / name).write_text("")
    assert is_run_folder(tmp_path)


def test_lock_makes_a_run_while_its_process_lives(tmp_path):
    """A run that was refused leaves its lock in what may be a folder of images."""
    lock_folder(tmp_path).release()
    assert is_run_folder(tmp_path)
    with started([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began = psutil.Process(process.pid).create_time()
        (tmp_path / ".lock.pid").write_text(f"{process.pid} {began}")
        assert is_run_folder(tmp_path)
        (tmp_path / ".lock.pid").write_text(f"{process.pid} {began - 1}")  # an earlier process had the same number
        assert not is_run_folder(tmp_path)
        (tmp_path / ".lock.pid").write_text(f"{process.pid} {began}")
    assert not is_run_folder(tmp_path)


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoint.pt", "prior.pt"])
def test_does_not_block_on_a_pipe(generating_run, capsys, name):
    (generating_run / name).unlink()
    os.mkfifo(generating_run / name)
    call = prior_script if name == "prior.pt" else script
    assert name in refusal(capsys, call, f"--resume={generating_run}", "--steps=31")


def test_pipes_of_other_names_do_not_block_either(tmp_path):
    for name in (".lock.pid", "summary.json"):
        os.mkfifo(tmp_path / name)
    assert not is_run_folder(tmp_path)
    assert not is_finished(tmp_path, "checkpoint", {"step": 2, "reports": True}, 2)


def test_mount_point_is_no_new_folder(tmp_path, monkeypatch):
    """Nothing can be renamed to it."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(ValueError, match="exists already; name a new folder"), new_folder(tmp_path / "out"):
        raise AssertionError


def test_finished_files_survive_a_taken_name(tmp_path):
    """Something was put into the folder while the files were written."""
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="the files are in ") as failed, new_folder(tmp_path / "out") as folder:
        (folder / "mine.png").write_text("hours of work")
        (tmp_path / "out" / "other.png").write_text("")
    kept = Path(str(failed.value).split("the files are in ")[1])
    assert (kept / "mine.png").read_text() == "hours of work" and (tmp_path / "out" / "other.png").exists()


def test_hidden_files_are_no_code(tmp_path, monkeypatch):
    """Editors and macOS leave them beside the code, some as links to nowhere."""
    (tmp_path / "harness").mkdir()
    (tmp_path / "train.py").write_text("code")
    monkeypatch.setattr(storage, "__file__", str(tmp_path / "harness" / "storage.py"))
    before = storage.code_digest("train.py")
    (tmp_path / "harness" / ".#run.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "harness" / "._run.py").write_text("")
    (tmp_path / "harness" / "folder.py").mkdir()
    os.mkfifo(tmp_path / "harness" / "pipe.py")
    assert storage.code_digest("train.py") == before
    (tmp_path / "harness" / "run.py").write_text("")
    assert storage.code_digest("train.py") != before


def test_broken_link_makes_way(tmp_path):
    (tmp_path / "checkpoint.pt").symlink_to(tmp_path / "nowhere")
    move_aside(tmp_path)
    assert not os.path.lexists(tmp_path / "checkpoint.pt")
    assert [path.name for path in tmp_path.glob("*/*")] == ["checkpoint.pt"]


def test_other_bytes_in_the_metrics_are_named(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"\xfe\xff\0,loss\n\xff,1\n")
    with pytest.raises(Damaged, match="metrics.csv, line 2"):
        trim_metrics(tmp_path / "metrics.csv", 10)


# Code


def test_code_digest_changes_with_code_that_a_script_imports(tmp_path, monkeypatch):
    """Directly or not; with harness/ always, never with what lies beside it."""
    monkeypatch.setattr(storage, "__file__", str(tmp_path / "harness" / "storage.py"))
    (tmp_path / "harness").mkdir()
    (tmp_path / "train.py").write_text("import torch\n\nfrom model import VQVAE\n")
    (tmp_path / "model.py").write_text("def f():\n    import layers\n    import train\n")
    for name in ("layers.py", "mine.py", "harness/run.py"):
        (tmp_path / name).write_text("a = 1\n")
    digests = [storage.code_digest("train.py")]
    for name in ("train.py", "model.py", "layers.py", "harness/run.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "b = 2\n")
        digests.append(storage.code_digest("train.py"))
    (tmp_path / "harness" / "run.py").rename(tmp_path / "harness" / "other.py")
    digests.append(storage.code_digest("train.py"))
    assert len(set(digests)) == 6
    (tmp_path / "mine.py").write_text("a = 2\n")
    assert storage.code_digest("train.py") == digests[-1] != storage.code_digest("mine.py")


def test_code_digest_covers_the_scripts_imports():
    """As Python finds them; the page and the tests are no part of a run."""
    for name in storage.SCRIPTS.values():
        imported = ended(
            [sys.executable, PROGRAMS / "files_of_a_script.py", ROOT / name], check=True
        ).stdout.splitlines()
        assert storage.code_files(name) == {Path(path) for path in imported}
