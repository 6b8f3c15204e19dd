"""Several processes over gloo: they share one codebook, match a run of one process, and never hang if one dies."""

import contextlib
import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

from harness.storage import load_checkpoint, lock_folder

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, SMALL, TINY, ended, environment, rows, same_state, started, train, train_prior

from quantizer import VectorQuantizer

STEPS, JOINT = 40, 24  # vectors per step, of all ranks together
SHARES = {2: [17, 7], 3: [5, 0, 19]}  # unequal, one of them empty


def quantizer(ema):
    torch.manual_seed(0)
    vq = VectorQuantizer(32, 4, ema=ema, decay=0.9, revive_below=0.2)
    # Not Adam: it makes steps of full length out of gradients that are nothing but rounding, as after k-means.
    return vq, torch.optim.SGD([*vq.parameters(), torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)


def learn(vq, optimizer, share_of):
    """Train a codebook on this process's part of the same batches; return its state after each step."""
    batches = torch.randn(STEPS, JOINT, 4, generator=torch.Generator().manual_seed(1))
    history = []
    for batch in batches:
        z = share_of(batch)
        out = vq(z)
        if not vq.ema:
            optimizer.zero_grad()
            (out.codebook_loss * len(z) / JOINT).backward()
            if dist.is_initialized():
                dist.all_reduce(vq.codebook.grad)
            vq.reset_revived(optimizer)
            optimizer.step()
        history.append({name: value.clone() for name, value in vq.state_dict().items()})
    return history


def rank_main(rank, ranks, folder):
    made = [quantizer(ema) for ema in (False, True)]  # before there are several processes: nothing may be cached
    options = {"rank": rank, "world_size": ranks, "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", **options)
    torch.manual_seed(rank)  # what a rank draws by itself must not matter
    for vq, optimizer in made:
        if rank == 0:
            torch.manual_seed(0)
        history = learn(vq, optimizer, lambda batch: batch.split(SHARES[ranks])[rank])
        torch.save(history, f"{folder}/{vq.ema}-{rank}.pt")
    dist.destroy_process_group()
    made[0][0](torch.randn(3, 4))  # and alone again


@pytest.mark.parametrize("ranks", [2, 3])
def test_codebook_learns_from_all_ranks(tmp_path, ranks):
    """It is the same on every rank, to the bit, and that of one process up to rounding."""
    mp.spawn(rank_main, args=(ranks, str(tmp_path)), nprocs=ranks)
    for ema in (False, True):
        vq, optimizer = quantizer(ema)
        torch.manual_seed(0)
        alone = learn(vq, optimizer, lambda batch: batch)
        histories = [torch.load(tmp_path / f"{ema}-{rank}.pt") for rank in range(ranks)]
        for step, expected in enumerate(alone):
            for name, value in expected.items():
                assert all(torch.equal(h[step][name], histories[0][step][name]) for h in histories), (ema, step, name)
                torch.testing.assert_close(histories[0][step][name], value, rtol=1e-4, atol=1e-5)


def torchrun(*flags, nproc=2, inside=(), interface=None):
    elastic = [*inside, sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}"]
    variables = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
    options = {"stderr": subprocess.STDOUT, "env": environment(**variables)}
    return started([*elastic, *flags], **options)


def finish(process, seconds=120):
    printed, _ = process.communicate(timeout=seconds)
    return process.returncode, printed


RUN = ["train.py", *SMALL, "--precision=float32", "--steps=20", "--save-every=10"]


def losses(folder):
    return [[float(row[name]) for name in ("recon_loss", "test_mse") if row[name]] for row in rows(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["--ema", "--no-ema"])
def test_torchrun_matches_one_process(tmp_path, way):
    """Up to rounding, which grows from step to step; and its checkpoint goes on with other numbers of processes."""
    one, three = tmp_path / "one", tmp_path / "three"
    run = [*RUN, way, "--steps=10"]
    ended([sys.executable, *run, f"--out-dir={one}"], check=True)
    with torchrun("--standalone", *run, f"--out-dir={three}", nproc=3) as process:  # 16 images: 6, 5, 5
        code, printed = finish(process)
    assert code == 0, printed
    for a, b in zip(losses(three), losses(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert load_checkpoint(three)["model"].keys() == load_checkpoint(one)["model"].keys()
    for ranks, steps in ((2, 14), (1, 18)):
        resume = ["train.py", f"--resume={three}", f"--steps={steps}"]
        with torchrun("--standalone", *resume, nproc=ranks) as process:
            code, printed = finish(process)
        assert code == 0, printed
        assert load_checkpoint(three)["progress"]["step"] == steps
    assert [int(row["step"]) for row in rows(three)] == [5, 10, 14, 15, 18]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 0])
def test_ranks_share_a_folder_of_images(folder, tmp_path, limit):
    flags = [*RUN, f"--dataset={folder}", f"--memory-limit={limit}", "--steps=6", "--save-every=6"]
    with torchrun("--standalone", *flags, f"--out-dir={tmp_path / 'two'}") as process:
        code, printed = finish(process)
    assert code == 0, printed
    ended([sys.executable, *flags, f"--out-dir={tmp_path / 'one'}"], check=True)
    for a, b in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert (tmp_path / "two" / "images.pt").is_file()


def workers(agent):
    """Wait for the agent's two processes and return their ids, rank 0 first."""
    return [int(pid) for pid in ended(["pgrep", "-P", agent.pid]).stdout.split()]


def kill_one_rank(process, folder):
    wait_for_metrics(process, folder)
    os.kill(workers(process)[-1], signal.SIGKILL)


def wait_for_metrics(process, folder):
    while not (folder / "metrics.csv").exists() or len(rows(folder)) < 3:
        time.sleep(0.1)
        assert process.poll() is None


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes as Linux shows them")
def test_killed_rank_ends_or_restarts_the_job(tmp_path):
    """It ends in bounded time, and the same command goes on; with --max-restarts torchrun itself does that."""
    long = [*RUN, "--steps=1500", "--save-every=5", "--log-every=1"]
    folder = tmp_path / "ended"
    with torchrun("--standalone", *long, f"--out-dir={folder}") as process:
        kill_one_rank(process, folder)
        code, _ = finish(process, seconds=60)
    step = load_checkpoint(folder)["progress"]["step"]
    assert code != 0 and not (folder / "summary.json").exists()
    with torchrun("--standalone", *long, f"--out-dir={folder}") as process:  # the same command
        printed = next(line for line in process.stdout if "training on" in line)
        process.send_signal(signal.SIGTERM)
        finish(process, seconds=60)
    assert f"2 processes, resuming from step {step}" in printed
    assert [int(row["step"]) for row in rows(folder)] == list(range(1, len(rows(folder)) + 1))

    folder = tmp_path / "restarted"
    restarting = [*RUN, "--steps=60", "--save-every=5", "--log-every=1", "--fresh"]  # anew once, not at each restart
    with torchrun("--standalone", "--max-restarts=1", *restarting, f"--out-dir={folder}") as process:
        kill_one_rank(process, folder)
        code, printed = finish(process)
    assert code == 0, printed
    assert [int(row["step"]) for row in rows(folder)] == list(range(1, 61))  # nothing lost, nothing twice
    assert not [path for path in folder.iterdir() if path.is_dir()]  # and no new run begun


def test_sigterm_to_the_agent_stops_all_ranks(tmp_path):
    flags = ["--steps=5000", "--save-every=5000", "--log-every=1", f"--out-dir={tmp_path}"]
    with torchrun("--standalone", *RUN, *flags) as process:
        wait_for_metrics(process, tmp_path)
        process.send_signal(signal.SIGTERM)
        code, printed = finish(process, seconds=60)
    step = load_checkpoint(tmp_path)["progress"]["step"]
    assert code != 0 and step >= 3 and f"stopped at step {step}" in printed


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes as Linux shows them")
def test_ranks_end_when_their_agent_is_killed(tmp_path):
    """Nobody is left to stop them: they save and end by themselves, and unlock the folder."""
    run = [*RUN, "--steps=5000", "--save-every=5000", "--log-every=1", f"--out-dir={tmp_path}"]
    with torchrun("--standalone", *run) as agent:
        wait_for_metrics(agent, tmp_path)
        ranks = workers(agent)
        agent.kill()
        gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in ranks if psutil.pid_exists(pid)], timeout=60)
        for process in alive:
            process.kill()
        agent.communicate(timeout=60)
    step = load_checkpoint(tmp_path)["progress"]["step"]
    assert not alive and step >= 3
    assert len(rows(tmp_path)) == step


@pytest.fixture
def nodes():
    """Two network namespaces joined by a cable, which are two machines with an address each; else two of loopback.

    Returns, for each: what to put before a command to run it there, the address, and the network interface.
    """
    names = f"vqa{os.getpid()}", f"vqb{os.getpid()}"
    made = [shutil.which("ip") and ended(["ip", "netns", "add", name]).returncode == 0 for name in names]
    if all(made):
        a, b = names
        cable = ["ip", "link", "add", "veth0", "netns", a, "type", "veth", "peer", "name", "veth0", "netns", b]
        ended(cable, check=True)
        there = [(["ip", "netns", "exec", a], "10.77.0.1", "veth0"), (["ip", "netns", "exec", b], "10.77.0.2", "veth0")]
        for inside, address, interface in there:
            ended([*inside, "ip", "address", "add", f"{address}/24", "dev", interface], check=True)
            for device in ("lo", interface):
                ended([*inside, "ip", "link", "set", device, "up"], check=True)
        yield there
    else:
        yield [([], "127.0.0.1", "lo"), ([], "127.0.0.2", "lo")]
    for name in (name for name, known in zip(names, made) if known):
        ended(["ip", "netns", "delete", name], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names network interfaces as Linux does")
def test_two_nodes_train_together_and_restart_together(nodes, tmp_path):
    """A process of the second node dies: torchrun starts those of both again, from the last checkpoint."""
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={nodes[0][1]}:29511", "--rdzv-id=test"]
    run = [*RUN, "--steps=60", "--save-every=5", "--log-every=1", f"--out-dir={tmp_path}"]
    agents = []
    for i, (inside, address, interface) in enumerate(nodes):
        # What machines find out from their names, which these two do not have.
        own = [f"--local-addr={address}", f"--rdzv-conf=is_host={int(i == 0)}", "--max-restarts=3"]
        agents.append(torchrun(*meet, *own, *run, nproc=1, inside=inside, interface=interface))
    with agents[0] as first, agents[1] as second:
        kill_one_rank(second, tmp_path)
        ends = [finish(agent) for agent in (first, second)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert sum(printed.count(", 2 processes") for _, printed in ends) == 2
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 61))  # nothing lost, nothing twice


@contextlib.contextmanager
def start_ranks(*flags, script="train.py", folders=(ROOT, ROOT)):
    """Start a script in two processes as torchrun would, whose own lines then are not among theirs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    job |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0"}
    command = [sys.executable, ROOT / script, *flags]
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank, folder in enumerate(folders):
            variables = environment(**job, RANK=str(rank), LOCAL_RANK=str(rank))
            process = started(command, cwd=folder, env=variables, stderr=subprocess.PIPE)
            ranks.append(stack.enter_context(process))
        yield ranks


def end_of(ranks, seconds=60):
    """Return the exit code, output and errors of each."""
    printed = [rank.communicate(timeout=seconds) for rank in ranks]
    return [(rank.returncode, *streams) for rank, streams in zip(ranks, printed)]


def first_gradients(folder, name="checkpoint"):
    """Return what the first step left of each gradient: the optimizers' first moments, over 1 - beta."""
    saved, shares = load_checkpoint(folder, name), {"exp_avg": 0.1, "momentum_buffer": 0.05}
    states = [state for key in ("muon", "optimizer", "adamw") if key in saved for state in saved[key]["state"].values()]
    return [state[name] / share for state in states for name, share in shares.items() if name in state]


def test_unequal_shares_give_the_whole_gradient(tmp_path):
    """A batch of 3 on 2 processes, 2 and 1."""
    flags = [*SMALL, "--precision=float32", "--steps=1", "--batch-size=3", "--no-kmeans-start", "--revive-below=0"]
    with start_ranks(*flags, f"--out-dir={tmp_path / 'two'}") as ranks:
        for code, _, errors in end_of(ranks):
            assert code == 0, errors
    train(tmp_path / "one", *flags)
    (alone,), (joint,) = rows(tmp_path / "one"), rows(tmp_path / "two")
    for name in ("recon_loss", "perplexity", "codes_used"):
        assert float(joint[name]) == pytest.approx(float(alone[name]), rel=1e-4), name
    one, two = (first_gradients(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) > 10
    for a, b in zip(two, one):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert max(gradient.abs().max() for gradient in one) > 0.01  # far above what is allowed to differ


def test_unequal_shares_give_the_priors_whole_gradient(finished_run, tmp_path):
    one, two = (shutil.copytree(finished_run, tmp_path / name) for name in ("one", "two"))
    flags = [*TINY, "--precision=float32", "--steps=1", "--batch-size=3", "--dropout=0"]
    with start_ranks(*flags, f"--run={two}", script="train_prior.py") as ranks:
        for code, _, errors in end_of(ranks):
            assert code == 0, errors
    train_prior(one, *flags)
    pairs = list(zip(first_gradients(two, "prior"), first_gradients(one, "prior"), strict=True))
    assert len(pairs) > 10
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_prior_of_two_ranks_resumes_bit_for_bit(finished_run, tmp_path):
    """Ranks draw dropout for different numbers of images, so that each has a random state of its own."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    shutil.copytree(finished_run, whole)
    for folder in (whole, again):
        flags = [*TINY, f"--run={folder}", "--steps=6", "--save-every=3", "--batch-size=15", "--dropout=0.3"]
        with start_ranks(*flags, script="train_prior.py") as ranks:
            ends = end_of(ranks, 180)
        assert [code for code, _, _ in ends] == [0, 0], ends
        assert folder == whole or ", resuming from step 3" in ends[0][1]
        if folder == whole:  # as if it had been killed before its last checkpoint
            shutil.copytree(whole, again)
            (again / "prior_previous.pt").replace(again / "prior.pt")
            assert len(load_checkpoint(again, "prior")["random"]) == 2
    assert same_state(load_checkpoint(whole, "prior"), load_checkpoint(again, "prior"))


def test_ranks_with_other_images_refuse_to_start(folder, tmp_path):
    """A folder of the same name holds other images on each machine."""
    for name in ("a", "b"):
        shutil.copytree(folder, tmp_path / name / "photos")
    shutil.copy(tmp_path / "b/photos/train/cat/0.png", tmp_path / "b/photos/train/cat/1.png")
    flags = [*SMALL, "--dataset=photos", f"--out-dir={tmp_path / 'run'}", "--steps=5"]
    with start_ranks(*flags, folders=(tmp_path / "a", tmp_path / "b")) as ranks:
        for code, _, errors in end_of(ranks):
            assert code == 2 and errors.count("\n") == 1 and "the processes differ in images: " in errors, errors
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_ranks_with_other_checkpoints_refuse_to_start(tmp_path):
    """On machines that do not share the output folder, ranks would resume from different steps."""
    for name in ("a", "b"):
        train(tmp_path / name / "run", "--steps=2")
    flags = [*SMALL, "--resume=run", "--steps=5"]
    with start_ranks(*flags, folders=(tmp_path / "a", tmp_path / "b")) as ranks:
        for code, _, errors in end_of(ranks):
            assert code == 2 and errors.count("\n") == 1, errors
            assert "the processes differ in the checkpoint in run" in errors


def test_signal_to_one_rank_stops_all(tmp_path):
    """As from a scheduler that stops one machine."""
    flags = [*SMALL, f"--out-dir={tmp_path}", "--steps=9000", "--save-every=9000", "--log-every=1"]
    with start_ranks(*flags) as ranks:
        wait_for_metrics(ranks[0], tmp_path)
        ranks[1].send_signal(signal.SIGTERM)
        assert [code for code, *_ in end_of(ranks)] == [143, 143]


def test_mistake_of_rank_0_ends_the_others_by_one_line(tmp_path):
    with lock_folder(tmp_path), start_ranks(*SMALL, f"--out-dir={tmp_path}") as ranks:
        assert [(code, errors.count("\n")) for code, _, errors in end_of(ranks)] == [(2, 1), (1, 1)]


def test_rank_that_lost_another_ends_by_one_line(tmp_path):
    flags = [*SMALL, f"--out-dir={tmp_path}", "--steps=9000", "--save-every=5", "--log-every=5"]
    with start_ranks(*flags) as ranks:
        wait_for_metrics(ranks[0], tmp_path)
        ranks[1].kill()
        (code, _, errors), _ = end_of(ranks)
    assert code == 1 and errors.count("\n") == 1, errors
    assert "another process of this run has ended; the checkpoint of step" in errors
    assert load_checkpoint(tmp_path)["progress"]["step"] >= 10
