"""What this machine offers: device, precision, memory, CPU count, ranks."""

import atexit
import contextlib
import datetime
import gc
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import nn

CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # bytes
# What torch says in plain RuntimeErrors, when a rank has died and when the memory is used up
LOST_RANK = re.compile("gloo|nccl|peer|connection|socket", re.IGNORECASE)
NO_MEMORY = re.compile("can('t|not) allocate memory|out of memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
PATIENCE = datetime.timedelta(hours=2)  # of ranks: rank 0 may have a million images to decode or to measure


def pick_device(device: str = "auto", precision: str = "auto", compile: bool = False) -> tuple[torch.device, str]:
    """Choose the fastest device, and bfloat16 if it has hardware for it; under torchrun, one GPU per rank.

    Raises:
        ValueError: the machine lacks the device, or the C++ compiler that `compile` needs.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name in available if available[name])
    if not available[device]:
        raise ValueError(
            f"--device {device}: this machine has {', '.join(name for name in available if available[name])}"
        )
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise ValueError(f"process {index} of this machine has no GPU of its own; start fewer, or use --device cpu")
        try:
            torch.cuda.set_device(index)
            torch.ones(1, device=device).sum().item()
        except RuntimeError as error:  # too old for this torch, or full
            reason = str(error).splitlines()[0]
            raise ValueError(f"the GPU cannot be used ({reason}); to hide it, set CUDA_VISIBLE_DEVICES=-1") from error
        fast_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    elif device == "cpu":  # a CPU that emulates bfloat16 is slower in it than in float32
        capabilities = torch.cpu.get_capabilities()
        fast_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    else:
        fast_bfloat16 = False
    variable, compiler = {"cpu": ("CXX", "g++")}.get(device, ("CC", "gcc"))
    if compile and not shutil.which(os.environ.get(variable, compiler)):
        raise ValueError(f"--compile needs a compiler: install {compiler}, set {variable} to another, or leave it out")
    if precision == "auto":
        precision = "bfloat16" if fast_bfloat16 else "float32"
    return torch.device(device), precision


def container_limit() -> float:
    """Return the bytes of memory that this container may use, or infinity outside a container."""
    for path in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or it says "max"
            return int(path.read_text(encoding="utf-8"))
    return math.inf


def free_memory() -> float:
    """Return the bytes of memory that can still be used."""
    used = psutil.Process().memory_info().rss  # others in the container are not seen
    return max(0, min(psutil.virtual_memory().available, container_limit() - used))


def check_memory(make_model: Callable[[], nn.Module], device: torch.device):
    """Raise ValueError if a model's weights, their gradients and one moment per weight exceed the memory."""
    try:
        with torch.device("meta"):  # shapes without memory
            needed = 3 * 4 * sum(value.numel() for value in make_model().state_dict().values())
    except RuntimeError:  # more elements than an int64 counts
        needed = math.inf
    check_room(needed, "training this model", "make it smaller with the flags that --help lists under model", device)


def check_room(needed: float, what: str, remedy: str, device: torch.device | None = None):
    """Raise ValueError if a flag asks for more bytes than this machine's memory has."""
    if device is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = min(psutil.virtual_memory().total, container_limit())
    if needed > total:
        raise ValueError(
            f"{what} takes at least {needed / 1e9:,.0f} GB, but the memory has {total / 1e9:,.0f}; {remedy}"
        )


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that the memory of the machine or of the GPU is used up."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def cpu_count() -> int:
    """Return how many CPUs this process may use; a container or taskset may allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def join_ranks(device: torch.device) -> tuple[int, str]:
    """Join the other processes if torchrun started this one.

    Returns:
        this process's rank, and a job name that all processes of this torchrun share, also after a restart; without
        torchrun, 0 and "".
    """
    if not dist.is_torchelastic_launched():
        return 0, ""
    store, rank, ranks = next(dist.rendezvous("env://"))
    job = job_name(store, rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = fresh_store(store, rank, ranks)
    store.set(f"backend/{rank}", backend)
    if any(store.get(f"backend/{other}").decode() != backend for other in range(ranks)):  # waits for each
        raise ValueError("some processes have a GPU and others have none; give all --device cpu")
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    atexit.register(leave_ranks)
    return rank, job


def job_name(store: dist.Store, rank: int) -> str:
    """Return a name that torchrun's store gives to all processes it serves, before and after a restart."""
    if rank == 0 and not store.check(["job"]):
        store.set("job", uuid.uuid4().hex)
    return store.get("job").decode()  # waits for rank 0


def fresh_store(store: dist.Store, rank: int, ranks: int) -> dist.Store:
    """Return a part of torchrun's store that only the living processes use.

    The store outlives a restart and still holds the addresses of dead processes. Machines may count restarts
    differently, so rank 0 names each attempt, and the others join the one that rank 0 confirms.
    """
    if rank == 0:
        attempt = uuid.uuid4().hex
        store.set("attempt", attempt)
        store.wait([f"{attempt}/{other}" for other in range(1, ranks)])
        store.set(f"{attempt}/complete", "")
    else:
        attempt = ""
        while not attempt or not store.check([f"{attempt}/complete"]):
            latest = store.get("attempt").decode()  # waits for rank 0
            if store.add(f"{latest}/{rank}", 1) == 1:  # else this rank joined it before a restart
                attempt = latest
            time.sleep(0.05)
    return dist.PrefixStore(attempt, store)


def lost_rank(error: BaseException | None) -> bool:
    """Return whether an error says that another rank has died."""
    told = isinstance(error, RuntimeError) and world_size() > 1 and bool(LOST_RANK.search(str(error)))
    return told or isinstance(error, dist.DistError)


def leave_ranks():
    """Destroy the process groups and what refers to them: threads that outlive the interpreter may abort it."""
    dist.destroy_process_group()
    gc.collect()


def check_equal_on_ranks(value, what: str):
    """Raise ValueError on every rank unless all have the same value."""
    values = gather_from_ranks(value)
    if any(other != value for other in values):
        found = ", ".join(map(str, values))
        raise ValueError(f"the processes differ in {what}: {found}; start all with the same flags, code and folders")


def gather_from_ranks(value) -> list:
    """Return the values of all ranks, in their order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def from_rank_0(value=None):
    """Return rank 0's value on every rank; the others wait until rank 0 gets here."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]
