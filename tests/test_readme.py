import re
import runpy
import shlex

import pytest
from conftest import ROOT, save
from torch.distributed.run import get_args_parser as torchrun_parser

import evaluate
import reconstruct
import sample
import train as script
import train_prior

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
INLINE = [" ".join(code.split()) for code in re.findall(r"`((?:python|torchrun) [^`]+)`", README)]
SCRIPTS = {"train.py": script, "evaluate.py": evaluate, "train_prior.py": train_prior, "sample.py": sample}
SCRIPTS |= {"reconstruct.py": reconstruct}


def test_length():
    assert len(README.splitlines()) <= 180 and len(README.split()) <= 1700


def test_section_on_scales_is_short():
    section = README.split("### From coarse to fine")[1].split("\n## ")[0]
    assert len(section.split()) <= 150 and section.count("![") == 1


def test_first_screen_has_the_two_commands():
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    assert f"{install} && .venv/bin/python train.py" in COMMANDS
    assert f"{install} -r requirements-dev.txt && .venv/bin/python -m pytest" in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS + INLINE if c.startswith(("python ", "torchrun "))])
def test_command_is_understood(command, generating_run):
    program, *words = shlex.split(command, comments=True)
    if program == "torchrun":
        own = torchrun_parser().parse_args(words)
        name, flags = own.training_script, own.training_script_args
    else:
        name, *flags = words
    flags = [str(generating_run) if flag == "results" else flag for flag in flags]
    if "--resume" in flags and "--steps" not in flags:
        flags += ["--steps", "99"]  # the run at hand has finished its own
    if name in SCRIPTS and flags != ["--help"]:
        SCRIPTS[name].parse_args(flags)
    source = (ROOT / name).read_text()
    assert name in SCRIPTS or all(f'"{flag}"' in source for flag in flags if flag.startswith("--"))


@pytest.mark.parametrize("snippet", [block for language, block in BLOCKS if language == "python"])
def test_snippet_runs(snippet, generating_run, tmp_path, monkeypatch):
    monkeypatch.chdir(generating_run.parent)  # where the run is in results/
    save(generating_run.parent / "a.png", (30, 40))
    (tmp_path / "snippet.py").write_text(snippet)
    runpy.run_path(str(tmp_path / "snippet.py"))


def test_every_file_is_in_the_file_table():
    table = re.search(r"^## Files\n\n```\n(.*?)```", README, re.MULTILINE | re.DOTALL).group(1)
    files = [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")]
    for name in (path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"):
        assert re.search(rf"(?<!\S){re.escape(name)} ", table), name


def test_every_file_named_exists():
    for name in re.findall(r"[\w./-]+\.(?:py|txt|png|toml)\b", re.sub(r"results/\S+|`\w*_?\d{6}\.png`", "", README)):
        # a.png is the user's own; the others are in a run
        elsewhere = {"curves.png", "codebook.png", "samples_by_scale.png", "images.txt", "a.png"}
        assert name in elsewhere or "recon_" in name or (ROOT / name).is_file(), name
