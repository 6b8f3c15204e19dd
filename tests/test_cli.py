"""Flags are checked where they are parsed, a mistake is one line, and output never stops a run."""

import argparse
import fcntl
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

from harness import cli
from harness.cli import abbreviate, command, number, progress, say, shell_words, user_errors
from harness.storage import load_checkpoint

import pytest
import torch
from conftest import ROOT, SMALL, ended, environment, program, refusal, started

import evaluate
import reconstruct
import sample
import train as script
import train_prior


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
def test_bad_flag_is_named_in_one_line(capsys, tmp_path, flag, value):
    assert flag in refusal(capsys, script, f"--out-dir={tmp_path}", flag, value)


def test_number_holds_its_bounds():
    share, size = number(float, 0, 1), number(float, 0, above=True)
    assert share("0") == 0 and share("0.5") == 0.5 and size("1e9") == 1e9
    for parse, text in ((share, "1"), (share, "-0.1"), (share, "nan"), (size, "0"), (size, "inf")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} must be "):
            parse(text)


@pytest.mark.parametrize("module", [script, evaluate, train_prior, sample, reconstruct], ids=lambda m: m.__name__)
def test_every_flag_has_its_help(capsys, monkeypatch, module):
    """--help prints every flag with its own help text, and never "(default: None)"."""
    flags, parse_args = {}, argparse.ArgumentParser.parse_args

    def remember(parser, *args):
        flags.update((action.option_strings[0], action.help) for action in parser._actions if action.option_strings)
        return parse_args(parser, *args)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", remember)
    with pytest.raises(SystemExit) as done:
        module.parse_args(["--help"])
    printed = "".join(capsys.readouterr().out.split())  # whose lines are broken by the terminal's width
    assert done.value.code == 0 and len(flags) > 4 and "None" not in printed
    for flag, text in flags.items():
        assert text and len(text) > 3, flag
        assert flag in printed and "".join(text.replace("%%", "%").split())[:20] in printed, flag


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("a mistake"), 2, "a mistake"),
        (OSError("a mistake"), 2, "a mistake"),
        (FloatingPointError("a mistake"), 2, "a mistake"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory"),
        (torch.distributed.DistNetworkError("connection reset"), 1, "another process of this run has ended"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
        (RuntimeError("cannot allocate memory for thread-local data"), 2, "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 2, "out of memory"),
    ],
)
def test_mistake_is_one_line(capsys, error, code, message):
    with pytest.raises(SystemExit) as ended, user_errors():
        raise error
    printed = capsys.readouterr().err
    assert ended.value.code == code and printed.count("\n") == 1 and message in printed


def test_control_characters_reach_no_terminal(capsys):
    """Those of a file's name could move its cursor, or add a line; letters of any language stay."""
    with pytest.raises(SystemExit), user_errors():
        raise ValueError("no é\x1b[2J\nb")
    assert capsys.readouterr().err.endswith("error: no é\\x1b[2J\\nb\n")


def test_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), user_errors():
        1 / 0  # noqa: B018


def test_command_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python, path, *words = shlex.split(command("train.py", "--resume", Path("my run's")))
    assert python == sys.executable and Path(path).samefile(ROOT / "train.py") and words == ["--resume", "my run's"]


def test_command_survives_another_drive(monkeypatch):
    def fail(_):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(os.path, "relpath", fail)
    assert shlex.split(command("train.py"))[1] == str(ROOT / "train.py")


LINES = [f"work: {done} of 4" for done in (1, 2, 3)]


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, []), (3, LINES[:1]), (17, LINES[::2]), (40, LINES)])
def test_long_work_is_never_silent(capsys, monkeypatch, seconds, shown):
    """Without a terminal, a line after two seconds and then one every half minute, but none at the end."""
    now, items = 0.0, []
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    monkeypatch.setattr(cli, "SHOW_AFTER", 2)
    for item in progress(range(4), "work"):
        now += seconds
        items.append(item)
    assert items == [0, 1, 2, 3] and capsys.readouterr().err.splitlines() == shown


@pytest.mark.parametrize(("after", "shown"), [(0, True), (1000, False)])
def test_terminal_shows_a_bar_for_long_work_alone(after, shown):
    code = f"from harness import cli; import time; cli.SHOW_AFTER = {after}\n"
    code += "for _ in cli.progress(range(8), 'work'): time.sleep(0.1)"
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with started([sys.executable, "-c", code], stderr=slave, cwd=ROOT) as process:
        assert process.wait(60) == 0
    os.write(slave, b"end")
    printed = b""
    while not printed.endswith(b"end"):
        printed += os.read(master, 10**5)
    os.close(master), os.close(slave)
    assert (b"work" in printed) == shown and b"\n" not in printed  # and it is cleared in the end


def test_command_survives_a_deleted_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a").rmdir()
    assert shlex.split(command("train.py"))[1] == str(ROOT / "train.py")


def test_backend_that_matplotlib_lacks_is_one_line():
    done = program("evaluate.py", "--help", env=environment(MPLBACKEND="nonsense"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nonsense" in done.stderr


def test_command_takes_no_folder_for_a_flag():
    assert shlex.split(command("sample.py", "--run", Path("-run")))[2:] == ["--run", "./-run"]


@pytest.mark.skipif(not shutil.which("bash"), reason="asks bash")
def test_any_name_can_be_pasted():
    """On one line, whatever is in it."""
    names = [
        "plain",
        "two words",
        "it's $HOME",
        "a\nb\t'c'\\n",
        "caf\udce9",
        "\x1b[31m red",
        "猫\u200b",
        "a\xa0b\x85\xad",
    ]
    line = shell_words("printf", r"%s\0", *names)
    assert line.isprintable()
    for shell in filter(shutil.which, ("bash", "zsh")):
        for locale in ({}, {"LC_ALL": "C"}):
            done = ended([shell, "-c", line], text=False, check=True, env=environment(**locale))
            assert done.stdout == b"".join(os.fsencode(name) + b"\0" for name in names)


def test_ctrl_c_while_torch_is_imported():
    """Before any script can catch it."""
    done = ended([sys.executable, "-c", "import harness; raise KeyboardInterrupt"])
    assert done.returncode == -signal.SIGINT and done.stderr == "-c: error: interrupted\n"
    done = ended([sys.executable, "-c", "import harness; 1 / 0"])
    assert "Traceback" in done.stderr


def test_long_list_of_names_is_shortened():
    assert abbreviate("abcde") == "a, b, c, d, e" and abbreviate("abcdefgh") == "a, b, c, d, e and 3 more"


def test_names_beyond_the_encoding_are_printed(monkeypatch, tmp_path):
    with open(tmp_path / "out.txt", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        say("a → b")
    assert (tmp_path / "out.txt").read_text() == "a \\u2192 b\n"


def test_control_characters_of_names_are_escaped(capsys):
    say("a\x1b[31m\udcff\nb", "c")
    assert capsys.readouterr().out == "a\\x1b[31m\\xff\\nb\nc\n"


@pytest.mark.parametrize("argument", ["--resume=a\nb", "a\nb"])
def test_line_breaks_of_refused_arguments_are_escaped(capsys, argument):
    assert "a\\nb" in refusal(capsys, script, argument)


@pytest.mark.parametrize(
    ("script", "flag"),
    [(script, "--out-dir"), (script, "--dataset"), (sample, "--out"), (reconstruct, "--codes"), (evaluate, "--run")],
)
def test_empty_text_is_refused(capsys, script, flag):
    """It comes from a shell variable that is not set."""
    with pytest.raises(SystemExit) as refused:
        script.parse_args([f"{flag}="])
    assert refused.value.code == 2 and f"argument {flag}: must not be empty" in capsys.readouterr().err


RUN = [sys.executable, ROOT / "train.py", *SMALL, "--steps=10", "--save-every=5"]
FILES = {"checkpoint.pt", "checkpoint_previous.pt", "metrics.csv", "summary.json", "curves.png", "codebook.png"}
FILES |= {"recon_000005.png", "recon_000010.png"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_full_output_does_not_stop_a_run(tmp_path):
    with open("/dev/full", "w") as full:
        done = ended([*RUN, f"--out-dir={tmp_path}"], stdout=full, stderr=full)
    assert done.returncode == 0 and load_checkpoint(tmp_path)["progress"]["step"] == 10
    assert {path.name for path in tmp_path.iterdir()} >= FILES


def test_closed_pipe_does_not_stop_a_run(tmp_path):
    """As in `python train.py | head -1`."""
    with started([*RUN, f"--out-dir={tmp_path}"], stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith("training on 1,500 images")
        process.stdout.close()
        printed = process.stderr.read()
        process.wait(60)
    assert process.returncode == 0 and not printed
    assert {path.name for path in tmp_path.iterdir()} >= FILES


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams as a Unix shell does")
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-"])
def test_closed_streams_do_not_stop_a_run(tmp_path, closed):
    command = shlex.join(map(str, [*RUN, f"--out-dir={tmp_path}"]))
    done = ended(["sh", "-c", f"{command} {closed}"])
    assert done.returncode == 0, done
    assert {path.name for path in tmp_path.iterdir()} >= FILES


def test_unwritable_home_brings_no_warning(tmp_path):
    """Matplotlib would warn that it cannot write its cache."""
    (tmp_path / "file").write_text("")
    done = program("evaluate.py", "--help", env=environment(MPLCONFIGDIR=str(tmp_path / "file" / "inner")))
    assert done.returncode == 0 and not done.stderr


def test_no_message_advises_to_execute_files():
    """Torch's own advice on a file that it does not load is weights_only=False."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")):
        assert not re.search(r"weights_only\s*=\s*False", path.read_text()), path
