"""What every script needs around its work: types of flags, device, processes, and what ends it early."""

import argparse
import atexit
import contextlib
import datetime
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


def number(kind: type, low: float, below: float = math.inf, above: bool = False):
    """Return an argparse type: an int or a float in [low, below), or in (low, below) where it has to be `above`."""

    def parse(text):
        value = kind(text)
        if not low <= value < below or (above and value == low):
            least = f"{'above' if above else 'at least'} {low}"
            bound = f" and below {below}" if below < math.inf else ", and finite"
            raise argparse.ArgumentTypeError(f"{text} must be {least}{bound}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it in its own messages
    return parse


@contextlib.contextmanager
def user_errors():
    """Turn what a user can mend, ValueError and OSError, into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error), code=2)
    except KeyboardInterrupt:
        fail("interrupted", code=130)


def fail(message: str, code: int):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def pick_device(device: str = "auto", precision: str = "auto", compile: bool = False) -> tuple[torch.device, str]:
    """Choose the fastest device, and bfloat16 where it has hardware for it; under torchrun, a GPU per process.

    Raises:
        ValueError: the device asked for is not there, or the compiler without which PyTorch cannot `compile`.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in there if there[name])
    if not there[device]:
        raise ValueError(f"--device {device}: this machine has {', '.join(name for name in there if there[name])}")
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise ValueError(f"process {index} of this machine has no GPU of its own; start fewer, or use --device cpu")
        torch.cuda.set_device(index)
        fast_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    elif device == "cpu":  # where a processor emulates bfloat16 it is slower than float32
        has = torch.cpu.get_capabilities()
        fast_bfloat16 = has.get("avx512_bf16") or has.get("amx_bf16")
    else:
        fast_bfloat16 = False
    variable, compiler = {"cpu": ("CXX", "g++")}.get(device, ("CC", "gcc"))
    if compile and not shutil.which(os.environ.get(variable, compiler)):
        raise ValueError(f"--compile needs a compiler: install {compiler}, name another by {variable}, or leave it out")
    if precision == "auto":
        precision = "bfloat16" if fast_bfloat16 else "float32"
    return torch.device(device), precision


def command(script: str, *words, start: str = "") -> str:
    """Return what to type here to run a script of the project, by default by the Python that runs this one."""
    path = os.path.relpath(Path(__file__).with_name(script))
    return f"{start or shlex.quote(sys.executable)} {shlex.join([path, *map(str, words)])}"


def check_memory(make_model: Callable[[], nn.Module], device: torch.device):
    """Raise ValueError where a model's weights, gradients and the optimiser's two moments cannot fit in memory."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with torch.device("meta"):  # sizes without memory
            needed = 4 * 4 * sum(value.numel() for value in make_model().state_dict().values())
    except RuntimeError:  # more than can be counted
        needed = math.inf
    if needed > there:
        raise ValueError(
            f"training this model takes {needed / 1e9:,.0f} GB or more and there are {there / 1e9:,.0f}; "
            "make it smaller by the flags that --help lists under model"
        )


def join_processes(device: torch.device) -> tuple[int, int]:
    """Join the processes that torchrun started, if it did, and return this one's rank and their number."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    store, rank, ranks = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":  # after a restart the store still holds the addresses of the dead
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    patience = datetime.timedelta(hours=2)  # for rank 0, which may have a million images to decode
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
    atexit.register(dist.destroy_process_group)  # else its threads outlive the interpreter and, at times, abort it
    return rank, ranks


def job() -> str | None:
    """Return what torchrun's restarts of the same job have in common; None where torchrun did not start it.

    On one machine that is the process of torchrun itself; several machines share no more than --rdzv-id.
    """
    if not dist.is_torchelastic_launched():
        return None
    agent = f" {os.getppid()}" if os.environ["GROUP_WORLD_SIZE"] == "1" else ""
    return os.environ["TORCHELASTIC_RUN_ID"] + agent


def started_again() -> bool:
    """Return whether torchrun may have started this process in place of one that died.

    A machine does not count the restarts that another one's process caused, but a job that has a name is known by it.
    """
    counted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return dist.is_torchelastic_launched() and (counted or os.environ["TORCHELASTIC_RUN_ID"] != "none")


def agree(value, what: str):
    """Raise ValueError in every process unless all were given the same value."""
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        if any(other != value for other in values):
            raise ValueError(f"the processes differ in {what}: {', '.join(map(str, values))}; give all the same")


def from_rank_0(value):
    """Return rank 0's value in every process; the others wait until rank 0 has come here."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def catch_signals() -> list[int]:
    """Return a list that SIGINT and SIGTERM will be added to; a second SIGINT ends the process at once.

    Not under torchrun, whose agent sends each signal on to processes that may have had it already.
    """
    received = []

    def remember(signum, _frame):
        received.append(signum)
        if signum == signal.SIGINT and not dist.is_torchelastic_launched():
            signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, remember)
    return received
