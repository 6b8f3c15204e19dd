import asyncio
import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

# Several tests run at once, so each process has one thread, and threads that wait leave their core to the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from harness.run import Run
from harness.storage import load_checkpoint

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import train as script
import train_prior as prior_script

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(__file__).parent / "programs"  # what some tests run in a process of its own
SMALL = ["--dataset=digits", "--codebook-size=32", "--code-dim=8", "--width=8", "--blocks=1", "--batch-size=16"]
SMALL += ["--log-every=5", "--device=cpu"]
TINY = ["--width=16", "--depth=1", "--heads=2", "--batch-size=16", "--log-every=2", "--device=cpu"]  # prior
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's background job
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def the_same_everywhere(monkeypatch):
    """Seed random tensors, and hide the GPU, so that no test depends on the machine or on the tests before it."""
    torch.manual_seed(0)
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """On a busy machine, short work may take long; its lines would then be among those that a test expects."""
    monkeypatch.setattr("harness.cli.SHOW_AFTER", 10**6)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the signal handlers that training sets, so that Ctrl-C still ends the tests."""
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def train(folder, *flags):
    """Train a small model on the CPU, in this process."""
    script.main(script.parse_args([f"--out-dir={folder}", *SMALL, *map(str, flags)]))


def train_prior(folder, *flags):
    prior_script.main(prior_script.parse_args([f"--run={folder}", *TINY, *map(str, flags)]))


@pytest.fixture
def in_step(monkeypatch):
    """Return a function that makes the next run call an action at a step, by patching its learning-rate schedule."""
    schedule = Run.schedule

    def set_action(at, action):
        waiting = [action]

        def schedule_and_act(run, step):
            if step == at and waiting:
                waiting.pop()()
            return schedule(run, step)

        monkeypatch.setattr(Run, "schedule", schedule_and_act)

    return set_action


@pytest.fixture
def stop_at(in_step):
    """Return a function that trains in this process and stops in a step by a signal, with exit code 128 + signal."""

    def train_and_stop(step, folder, *flags, signum=signal.SIGINT, call=train):
        in_step(step, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(SystemExit) as stopped:
            call(folder, *flags)
        assert stopped.value.code == 128 + signum

    return train_and_stop


@contextlib.contextmanager
def batches_of(model):
    """Yield a list that gets the number of images of each batch that the model encodes."""
    sizes, encoder = [], model.levels[-1].encoder
    with encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))):
        yield sizes


LIMIT = 240  # seconds; pytest itself ends a test that takes 900, and would leave its processes running


def environment(**variables):
    """Return the variables of a program under test; its output is buffered, whatever this shell asks of Python."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": ""} | variables


def ended(command, **options):
    """Run a command to its end, with a time limit."""
    streams = {} if "stdout" in options else {"capture_output": True}
    options = {"text": True, "timeout": LIMIT, "cwd": ROOT, "env": environment(), **streams} | options
    return subprocess.run(list(map(str, command)), **options)


@contextlib.contextmanager
def started(command, seconds=LIMIT, **options):
    """Start a command, and kill it and its children at the end of the block or after some seconds.

    Its output then ends, so that nobody waits for more of it without limit.
    """
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment()} | options
    with subprocess.Popen(list(map(str, command)), **options) as process, killed_after(process, seconds):
        try:
            yield process
        finally:
            kill(process)


@contextlib.contextmanager
def killed_after(process, seconds):
    timer = threading.Timer(seconds, kill, [process])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def kill(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()


def program(name, *words, **options):
    """Run a script, or a program of tests/programs, in a process of its own."""
    path = ROOT / name if (ROOT / name).exists() else PROGRAMS / name
    return ended([sys.executable, path, *words], **options)


def build_page(run):
    """Return demo.py's page of a run; without a running event loop, gradio makes some and never closes them."""
    import demo  # here: gradio takes seconds to import

    async def build():
        return demo.build(demo.load_page(str(run)), str(run))

    return asyncio.run(build())


def far_from_zero(prior):
    """Give a prior weights far from zero, biases too, so that nothing is hidden by chance; return it in eval mode."""
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return prior.eval()


def some_codes(prior, n=5):
    """Return codes (n, T), and labels (n,) that may be those of any class."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(prior.codebook_size, (n, prior.length), generator=generator)
    return codes, torch.randint(prior.classes + 1, (n,), generator=generator)


def refusal(capsys, script, *flags):
    """Return the one line with which a script refuses its flags, by exit code 2."""
    with pytest.raises(SystemExit) as refused:
        script.main(script.parse_args([str(flag) for flag in flags]))
    printed = capsys.readouterr().err
    assert refused.value.code == 2 and printed.count("\n") == 1, printed
    return printed


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_state(a, b):
    """Return whether two nested states are equal to the bit, seconds and folders aside."""
    if isinstance(a, dict):
        differing = ("seconds", "args", "typed", "job", "digest", "path")  # the digest covers the others
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a if k not in differing)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(a, b):
    pictures = [path.name for path in sorted(a.glob("recon_*.png"))]
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    assert pictures == [path.name for path in sorted(b.glob("recon_*.png"))]
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in [*pictures, "curves.png", "codebook.png"])
    return same_state(load_checkpoint(a), load_checkpoint(b))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run of 30 steps, not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "results"
    train(folder, "--steps=30", "--save-every=10")
    return folder


@pytest.fixture(scope="session")
def scales_run(tmp_path_factory):
    """A run with codes from coarse to fine, not to be changed."""
    folder = tmp_path_factory.mktemp("scales") / "results"
    train(folder, "--scales=1,2,4,7", "--steps=10", "--save-every=5")
    return folder


@pytest.fixture
def trained_run(finished_run, tmp_path):
    """A copy of it, to be changed at will."""
    return Path(shutil.copytree(finished_run, tmp_path / "results"))


@pytest.fixture(scope="session")
def prior_run(finished_run, tmp_path_factory):
    """A run with a prior of 8 steps, not to be changed."""
    folder = shutil.copytree(finished_run, tmp_path_factory.mktemp("prior") / "results")
    train_prior(folder, "--steps=8", "--save-every=4")
    return folder


@pytest.fixture
def generating_run(prior_run, tmp_path):
    """A copy of it, to be changed at will."""
    return Path(shutil.copytree(prior_run, tmp_path / "results"))


def save(path, shape=(12, 16), mode="RGB", **options):
    """Save a random image, always the same for a path; return its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(zlib.crc32("/".join(path.parts[-3:]).encode()))
    pixels = random.integers(0, 256, shape if mode == "L" else (*shape, len(mode)), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


@pytest.fixture
def folder(tmp_path):
    """Thirty RGB images of two classes, in train/ and test/."""
    for split, n in (("train", 10), ("test", 5)):
        for kind in ("cat", "dog"):
            for i in range(n):
                save(tmp_path / "photos" / split / kind / f"{i}.png")
    return tmp_path / "photos"
