"""Missing hardware is refused before anything is done; a container's limits count."""

import math
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from harness import machine
from harness.machine import check_memory, container_limit, cpu_count, free_memory, from_rank_0, pick_device

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import refusal, rows, train
from torch import nn
from torch._inductor.exc import InductorError

import train as script


def test_device_that_is_missing_is_refused(capsys):
    assert "--device cuda: this machine has cpu" in refusal(capsys, script, "--device=cuda", "--dataset=digits")


def test_auto_takes_the_cpu_where_nothing_else_is():
    device, precision = pick_device()
    assert device == torch.device("cpu") and precision == pick_device("cpu")[1] in ("float32", "bfloat16")
    assert pick_device("cpu", "float32")[1] == "float32"


@pytest.mark.parametrize(("hardware", "precision"), [("avx512_bf16", "bfloat16"), ("avx2", "float32")])
def test_bfloat16_needs_hardware(monkeypatch, hardware, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {hardware: True})
    assert pick_device("cpu")[1] == precision


@pytest.mark.parametrize("reason", ["CUDA error: no kernel image is available", "CUDA error: out of memory"])
def test_gpu_that_cannot_be_used_is_named(monkeypatch, reason):
    """It is too old for this torch, or another process has filled it."""

    def ones(*size, **options):
        raise RuntimeError(f"{reason}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(ValueError, match=f"cannot be used .{reason}.; to hide it, set CUDA_VISIBLE_DEVICES=-1$"):
        pick_device()


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretend that there are two GPUs of today; return those that were chosen."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch, "ones", lambda *_, **options: torch.zeros(1))
    return chosen


def test_old_gpu_computes_in_float32(two_gpus, monkeypatch):
    """It would only emulate bfloat16."""
    assert pick_device() == (torch.device("cuda"), "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert pick_device() == (torch.device("cuda"), "float32")


def test_gpu_is_that_of_the_local_rank(two_gpus, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == (torch.device("cuda"), "bfloat16") and two_gpus == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU"):
        pick_device()


def test_ranks_on_unlike_devices_refuse_to_start(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    ranks = {"cpu": (store, 0, 2), "cuda": (client, 1, 2)}
    current = threading.local()
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([ranks[current.device]]))

    def join(device):
        current.device = device
        with pytest.raises(ValueError, match="some processes have a GPU and others have none"):
            machine.join_ranks(torch.device(device))
        return True

    with ThreadPoolExecutor() as pool:
        assert all(pool.map(join, ranks, timeout=60))


def test_ranks_wait_for_long_work_of_rank_0(monkeypatch):
    """It may decode a large folder, or measure, for more than half an hour."""
    options = {}
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **given: options.update(given))
    monkeypatch.setattr(machine.atexit, "register", lambda function: None)
    machine.join_ranks(torch.device("cpu"))
    assert options["timeout"].total_seconds() >= 3600


def test_failed_compilation_is_one_line(tmp_path, capsys, monkeypatch):
    def fail(*inputs):
        raise InductorError(RuntimeError("no Python.h"), None)

    monkeypatch.setenv("CXX", sys.executable)  # nothing is compiled
    monkeypatch.setattr(torch, "compile", lambda forward, mode: fail)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, "--steps=2", "--compile")
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.count("\n") == 1
    assert "--compile failed" in printed and "Python.h" in printed and printed.endswith("--no-compile\n")


def test_compiling_without_a_compiler_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "install g++" in refusal(capsys, script, "--compile", "--device=cpu", "--dataset=digits")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_run_learns_as_an_eager_one(tmp_path):
    train(tmp_path / "eager", "--steps=10", "--precision=float32")
    train(tmp_path / "compiled", "--steps=10", "--precision=float32", "--compile")
    for eager, compiled in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        # No more than this: Adam's first steps are as large where a gradient is nothing but rounding.
        assert float(compiled["recon_loss"]) == pytest.approx(float(eager["recon_loss"]), rel=1e-3)


def test_model_that_exceeds_the_memory_is_refused(capsys, trained_run):
    before = {path.name for path in trained_run.iterdir()}
    flags = ("--dataset=digits", f"--out-dir={trained_run}", "--device=cpu", "--codebook-size=2000000000")
    printed = refusal(capsys, script, *flags)
    assert "training this model takes" in printed and "make it smaller" in printed
    assert {path.name for path in trained_run.iterdir()} == before


def test_memory_check_counts_gradients_and_moments(monkeypatch):
    """1,000 float32 weights take 12 kB to train."""
    for limit, fits in ((12_000, True), (11_999, False)):
        monkeypatch.setattr(machine, "container_limit", lambda limit=limit: limit)
        if fits:
            check_memory(lambda: nn.Linear(1000, 1, bias=False), torch.device("cpu"))
        else:
            with pytest.raises(ValueError, match="make it smaller"):
                check_memory(lambda: nn.Linear(1000, 1, bias=False), torch.device("cpu"))


@pytest.mark.parametrize(("text", "limit"), [("1000", 1000), ("max\n", math.inf), (None, math.inf)])
def test_container_limit_is_read(tmp_path, monkeypatch, text, limit):
    path = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CONTAINER_LIMITS", (tmp_path / "missing", path))
    if text is not None:
        path.write_text(text)
    assert container_limit() == limit
    assert free_memory() <= min(limit, psutil.virtual_memory().total)


def test_memory_in_use_counts_against_the_containers_limit(monkeypatch):
    limit = psutil.Process().memory_info().rss + 10**6
    monkeypatch.setattr(machine, "container_limit", lambda: limit)
    assert free_memory() < 10**7
    monkeypatch.setattr(machine, "container_limit", lambda: 1000)
    assert free_memory() == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the processors as Linux does")
def test_cpu_count_follows_the_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cpu_count() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert cpu_count() == len(allowed)


def test_single_process_agrees_with_itself():
    machine.check_equal_on_ranks(1, "--steps")
    assert from_rank_0("value") == "value" and machine.world_size() == 1


def test_job_has_one_name_across_restarts():
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
    names = [machine.job_name(store, rank) for store in stores for rank in (0, 1, 0)]
    assert len(set(names[:3])) == len(set(names[3:])) == 1 and names[0] != names[3]


@pytest.mark.parametrize("died", ["before it joined", "after all had joined"])
def test_restarted_ranks_do_not_meet_the_dead(died):
    """The agents' store still holds an earlier attempt; rank 1 of the next one looks before rank 0 does."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    store.set("attempt", "earlier")
    store.set("address", "of the dead")
    if died == "after all had joined":
        store.add("earlier/1", 1)
        store.set("earlier/complete", "")
    with ThreadPoolExecutor() as pool:
        other = pool.submit(machine.fresh_store, client, 1, 2)
        time.sleep(0.3)
        assert not other.done()
        first, second = machine.fresh_store(store, 0, 2), other.result(timeout=10)
        assert not second.check(["address"])
        first.set("address", "rank 0")
        assert second.get("address") == b"rank 0"


def test_rank_0_waits_for_all_ranks():
    """Or it would confirm an attempt that a rank of an earlier one, still alive, cannot join any more."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(machine.fresh_store, store, 0, 2)
        time.sleep(0.3)
        assert not first.done()
        machine.fresh_store(client, 1, 2)
        first.result(timeout=10)
