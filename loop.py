"""What the training scripts share: a run's flags, how it is resumed, and the loop with its schedule and its stops."""

import argparse
import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import CHECKPOINT, load_checkpoint
from data import NAMES, batch_indices, batches
from images import Images
from process import job, number, started_again
from quantizer import processes

RESUME_MAY_CHANGE = {"steps", "save_every", "log_every", "data_dir", "device", "precision", "resume", "job"}
RESUME_MAY_CHANGE |= {"memory_limit", "compile", "lr", "codebook_lr", "embedding_lr"}


def add_run_flags(parser: argparse.ArgumentParser, steps: int, batch_size: int, what: str):
    """Add the flags of any training run, with defaults for its length; `what` lies in the folder of a run."""
    positive = number(int, 1, 2**31)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--steps", type=positive, default=steps, help="training steps in all; the learning rate falls to 0 there"
    )
    group.add_argument(
        "--batch-size", type=positive, default=batch_size, help="images per step, of all processes together"
    )
    group.add_argument(
        "--seed", type=number(int, 0, 2**63), default=0, help="seed of the weights, the batches and all that is drawn"
    )
    group.add_argument(
        "--resume",
        metavar="RUN",
        help=f"folder of {what} to go on with, by its own arguments; "
        "with other --steps, the learning rate goes on as if they had been planned from the start",
    )
    group.add_argument("--save-every", type=positive, default=1000, help="steps between pictures and checkpoints")
    group.add_argument("--log-every", type=positive, default=100, help="steps between lines of the metrics")
    devices, precisions = ("auto", "cuda", "mps", "cpu"), ("auto", "float32", "bfloat16")
    group.add_argument("--device", choices=devices, default="auto", help="auto: the first of these that is there")
    group.add_argument("--precision", choices=precisions, default="auto", help="of the network; auto: the faster one")
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile the network; on a CPU it gets no faster by that",
    )


def parse_run(
    parser: argparse.ArgumentParser, argv: list[str] | None, folder_flag: str, name: str = CHECKPOINT
) -> argparse.Namespace:
    """Parse the flags of a run whose folder is that of `folder_flag`; those of a resumed run are its own.

    torchrun starts all processes of a job again when one has died: they go on with their own run.
    """
    args = parser.parse_args(argv)
    folder = getattr(args, folder_flag)
    if args.resume is None and started_again():
        with contextlib.suppress(ValueError):
            if load_checkpoint(folder, name)["args"]["job"] == job():
                args.resume = folder
    if args.resume is not None:
        args = resumed_args(parser, argv, args.resume, folder_flag, name)
    args.job = job()
    return args


def resumed_args(
    parser: argparse.ArgumentParser, argv: list[str] | None, run: str, folder_flag: str, name: str
) -> argparse.Namespace:
    """Parse again with the run's own arguments as defaults, refusing flags that contradict them."""
    try:
        checkpoint = load_checkpoint(run, name)
    except ValueError as error:
        parser.error(str(error))
    saved = checkpoint["args"] | {folder_flag: run, "resume": run}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for option, value in saved.items():
        moved = option == "dataset" and value not in NAMES  # a folder, whose images must be the same
        if not (option in RESUME_MAY_CHANGE or moved or getattr(args, option) == value):
            flag = "--" + option.replace("_", "-")
            parser.error(f"{flag} is {getattr(args, option)}, but the run in {run} has {value}; leave out {flag}")
    if checkpoint["progress"]["step"] >= args.steps:
        if started_again() and saved["job"] == job():
            print(f"the run in {run} has done its {args.steps} steps")
            sys.exit(0)  # a process died after the last step of a job
        parser.error(f"the run in {run} has done its {checkpoint['progress']['step']} steps; give more with --steps")
    return args


def check_batch_size(batch_size: int, images: int):
    """Raise ValueError if a step's images are fewer than the processes, or more than there are."""
    least = processes()
    if not least <= batch_size <= images:
        raise ValueError(f"--batch-size {batch_size} is not from {least} (processes) to {images} (training images)")


def wrapped(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Return what calls the model in training: in step with the other processes, and compiled if so asked."""
    forward = DistributedDataParallel(model) if processes() > 1 else model
    if args.compile:  # on a GPU into CUDA graphs, which start many small kernels together
        forward = torch.compile(forward, mode="reduce-overhead" if device.type == "cuda" else None)
    return forward


def schedule(step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 1, as a share of the highest: warm-up, then half a cosine."""
    warm_up = min(1.0, step / (0.03 * steps))
    return warm_up * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def train_loop(
    args: argparse.Namespace,
    resume: str,
    progress: dict,
    highest: list[tuple[dict, float]],
    signals: list[int],
    images: Images,
    device: torch.device,
    update: Callable[[Tensor], Tensor],
    log: Callable[[bool], str],
    save: Callable[[], None],
):
    """Do the steps that are left; log and save in between; after a signal, save and exit.

    Args:
        resume: the command to go on with.
        progress: the `step` that is done, the `seconds` it took, the step last `logged` and the `sums` since then.
        highest: each group of parameters, those of all optimisers, and its highest learning rate.
        images: of the training set, or what else stands for them; each rank takes its share of a step's.
        update: takes a batch, makes a step of the optimiser, and returns what to add up over steps and processes.
        log: writes the metrics since the last log and, if its argument says that the run saves here, its pictures;
            returns the line to show. Called where all `sums` are finite, by rank 0.
        save: writes a checkpoint. Called by rank 0 before the first step of all, after a signal, and after a `log`
            that saves, so that whatever it counts as done is on disk.
    """
    ranks, rank = processes(), dist.get_rank() if processes() > 1 else 0
    if rank == 0 and progress["step"] == 0:
        save()  # so that there is something to resume from the first step on
    hidden = rank > 0 or not (sys.stderr.isatty() and sys.stdout.isatty())
    bar = tqdm(total=args.steps, initial=progress["step"], disable=hidden, dynamic_ncols=True)
    began = time.perf_counter() - progress["seconds"]
    steps = range(progress["step"], args.steps)
    order = (batch_indices(len(images), args.batch_size, args.seed, step).tensor_split(ranks)[rank] for step in steps)
    stream = batches(images, order, device)
    with contextlib.closing(bar), contextlib.closing(stream):  # or images are still decoded ahead
        for step, batch in enumerate(stream, progress["step"] + 1):
            for group, rate in highest:
                group["lr"] = rate * schedule(step, args.steps)
            sums, stopping = update(batch), bool(signals)
            if ranks > 1:
                sums = torch.cat([sums, sums.new_tensor([stopping])])
                dist.all_reduce(sums)
                sums, stopping = sums[:-1], bool(sums[-1])  # at the same step on every rank
            saving = step % args.save_every == 0 or step == args.steps
            progress["sums"] += sums
            progress["step"] = step
            bar.update()
            if not (saving or stopping or step % args.log_every == 0):
                continue
            # With one process, the host waits for a GPU only in this check, after which the clock is read.
            if not progress["sums"].isfinite().all():
                raise FloatingPointError("a loss is NaN or infinite; lower the learning rate")
            progress["seconds"] = time.perf_counter() - began
            if saving or step % args.log_every == 0:
                if rank == 0:
                    shown = f"{log(saving)}, {step * args.batch_size / progress['seconds']:,.0f} images/s"
                    bar.set_postfix_str(shown)
                    if bar.disable:
                        print(f"step {step}/{args.steps}: {shown}", flush=True)
                progress["sums"].zero_()
                progress["logged"] = step
            if rank == 0 and (saving or stopping):
                save()
            if stopping and step < args.steps:
                bar.close()
                if rank == 0:
                    print(f"stopped at step {step}; to go on: {resume}", flush=True)
                sys.exit(128 + (signals or [signal.SIGTERM])[0])
