"""A training run: its flags, its steps, and how it is stopped, saved and resumed.

A batch is a function of (seed, step), and all other state is in the checkpoint. So a run that is stopped at any step
and resumed ends with the same weights, bit for bit on a CPU, as one that never stopped.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import storage
from harness.cli import check_values, command, fail, number, printable, say, user_errors
from harness.data import NAMES, batch_indices, batches
from harness.folder import Images
from harness.machine import (
    check_equal_on_ranks,
    from_rank_0,
    gather_from_ranks,
    join_ranks,
    lost_rank,
    out_of_memory,
    pick_device,
    rank,
    world_size,
)

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

FOLDER_OPTION = {storage.CHECKPOINT: "out_dir", storage.PRIOR: "run"}  # which flag names the folder
PREFIX = {storage.CHECKPOINT: "", storage.PRIOR: "prior_"}  # of the names of metrics, summary and TensorBoard's folder
FILES = {storage.CHECKPOINT: storage.RUN_FILES, storage.PRIOR: storage.PRIOR_FILES}
LEARNING_RATES = ("lr", "codebook_lr", "embedding_lr")
RESUME_MAY_CHANGE = {"steps", "save_every", "log_every", "data_dir", "device", "precision", "memory_limit"}
RESUME_MAY_CHANGE |= {"compile", "tensorboard", "resume", "fresh", *LEARNING_RATES}
FIRST_LINE = 5  # seconds of training before the first line, which estimates the time left


def add_run_flags(parser: argparse.ArgumentParser, steps: int, batch_size: int):
    """Add the flags that all training runs share, with these defaults."""
    positive, switch = number(int, 1, 2**31), argparse.BooleanOptionalAction
    group = parser.add_argument_group("run")
    group.add_argument(
        "--steps", type=positive, default=steps, help="training steps; the learning rate decays to 0 at the end"
    )
    group.add_argument("--batch-size", type=positive, default=batch_size, help="global batch size, over all processes")
    group.add_argument("--seed", type=number(int, 0, 2**63), default=0, help="seed of weights, batches and samples")
    group.add_argument("--fresh", action="store_true", help="start over; do not resume the run in the folder")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="folder of a run to resume with its own flags; some may change, such as --steps and the learning rates",
    )
    group.add_argument("--save-every", type=positive, default=1000, help="steps between pictures and checkpoints")
    group.add_argument("--log-every", type=positive, default=100, help="steps between lines of metrics")
    group.add_argument("--tensorboard", action=switch, default=False, help="also write the metrics for TensorBoard")
    group.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the fastest")
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="precision of the network; auto: bfloat16 if the hardware supports it",
    )
    group.add_argument("--compile", action=switch, default=False, help="compile the network; of no use on a CPU")


def parse_run_args(parser: argparse.ArgumentParser, argv: list[str] | None, name: str) -> argparse.Namespace:
    """Parse the flags of a run. With --resume, the run's own arguments are the defaults, and only some may change."""
    args = parser.parse_args(argv)
    if args.resume is None:
        return args
    if args.fresh:
        parser.error("--fresh starts over and --resume continues; leave out one of them")
    with user_errors():
        checkpoint = storage.load_checkpoint(args.resume, name)
        check_values(parser, vars(args) | checkpoint["args"], checkpoint["path"])
    saved = checkpoint["args"] | {FOLDER_OPTION[name]: args.resume, "resume": args.resume}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for option, value in saved.items():
        moved = option == "dataset" and value not in NAMES  # a folder may move; its images must be the same
        if not (option in RESUME_MAY_CHANGE or moved or getattr(args, option) == value):
            flag = flag_of(option)
            parser.error(
                f"{flag} is {getattr(args, option)}, but the run in {args.resume} has {value}; leave out {flag}"
            )
    if is_finished(args.resume, name, checkpoint["progress"], args.steps):
        parser.error(
            f"the run in {args.resume} has done its {checkpoint['progress']['step']} steps; give more with --steps"
        )
    return args


def flag_of(option: str) -> str:
    return "--" + option.replace("_", "-")


def is_finished(folder: str | Path, name: str, progress: dict, steps: int) -> bool:
    """Return whether a run has done its steps and written its summary, or has none to write."""
    if progress["step"] != steps or not progress["reports"]:
        return progress["step"] >= steps
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        summary = json.loads(storage.read_text(Path(folder, f"{PREFIX[name]}summary.json")))
        return summary["steps"] == steps  # that of fewer steps may still be there
    return False


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Use a model in eval mode and without gradients, to measure or draw; then return it to the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


class NamedMeans(dict):
    """Means by name; those of a checkpoint may lack some."""

    def __missing__(self, name):
        raise storage.Damaged(f"the checkpoint's means hold no {name}; start over with --fresh")


class Means:
    """Means over steps, and over all ranks, of named tensors; nothing waits for the device before `compute`."""

    def __init__(self):
        self.steps, self.sums = 0, {}

    def add(self, share: float, **values: Tensor):
        """Add a step's values; `share` is this rank's share of the batch."""
        self.steps += 1
        if self.sums and {k: v.shape for k, v in values.items()} != {k: v.shape for k, v in self.sums.items()}:
            raise storage.Damaged("the checkpoint's means are not those of this run; start over with --fresh")
        for name, value in values.items():
            value = value.detach() * share
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value

    def compute(self) -> dict[str, Tensor]:
        """Return the means since the last `reset`, on the CPU. All ranks call it; the result is rank 0's.

        Raises:
            FloatingPointError: one of them is NaN or infinite.
        """
        return NamedMeans({name: total / self.steps for name, total in self.state_dict()["sums"].items()})

    def reset(self):
        self.steps, self.sums = 0, {}

    def state_dict(self) -> dict:
        """Add up the sums of all ranks on rank 0, and return them."""
        for total in self.sums.values():
            if world_size() > 1:
                dist.all_reduce(total)
            if not total.isfinite().all():
                raise FloatingPointError("a loss is NaN or infinite; lower the learning rate")
            if rank() > 0:
                total.zero_()
        return {"steps": self.steps, "sums": {name: total.cpu() for name, total in self.sums.items()}}

    def load_state_dict(self, state: dict):
        self.steps = state["steps"]
        sums = state["sums"].items()
        self.sums = {name: total if rank() == 0 else torch.zeros_like(total) for name, total in sums}


class Run:
    """A run of train.py or train_prior.py in a folder of its own, on one process or several.

    Use, in this order: `Run(args, name)`, `begin`, `keep`, `parallel`, then inside `with run:` the loop over `steps`.

    Attributes:
        args: the flags, with data set and precision in place of "auto".
        folder, device: where it writes, and where it computes.
        rank, world_size: this process's number, and how many processes there are.
        step: training steps done, including the current one.
        unreported: whether the checkpoint was saved before its step was measured and drawn, which is then done again.
    """

    def __init__(self, args: argparse.Namespace, name: str):
        """Choose the device, join the other processes, lock the folder, and look for an unfinished run in it.

        Raises:
            ValueError, OSError: a flag asks for something unavailable, or another run is writing into the folder.
        """
        self.args, self.name, self.typed = args, name, dict(vars(args))
        folder = self.typed[FOLDER_OPTION[name]]
        storage.refuse_weights_only(folder)
        self.folder = storage.writable_folder(folder)
        self.device, args.precision = pick_device(args.device, args.precision, args.compile)
        (self.rank, self.job), self.world_size = join_ranks(self.device), world_size()
        for option, value in self.typed.items():
            check_equal_on_ranks(value, flag_of(option))
        check_equal_on_ranks(args.precision, "the precision that they chose (give all --precision float32)")
        self._open = contextlib.ExitStack()
        if self.rank == 0:
            self._open.callback(storage.lock_folder(self.folder).release, force=True)
        from_rank_0()  # nobody reads the folder before it is locked
        self.code = storage.code_digest(storage.SCRIPTS[name])
        self.checkpoint, self.move_reason = self._find_checkpoint()
        check_equal_on_ranks(self.code, "their code")
        check_equal_on_ranks(self.checkpoint and self.checkpoint["digest"], f"the checkpoint in {self.folder}")
        self.step, self.logged, self.saved, self.unreported = 0, 0, None, False
        self.seconds = 0.0  # of training, up to the last log or save
        self.kept, self.signals, self.parent = {}, [], os.getppid()

    def _find_checkpoint(self) -> tuple[dict | None, str]:
        """Return the checkpoint to resume from, or None and the reason why the run in the folder is moved aside."""
        if self.args.resume is not None:
            checkpoint = storage.load_checkpoint(self.folder, self.name)
            # Keep what was typed at first unless the user changes it now, so that the first command can go on as well.
            typed = {k: v for k, v in checkpoint["typed"].items() if self.typed.get(k) == checkpoint["args"].get(k)}
            self.typed |= typed
            return checkpoint, ""
        if not storage.checkpoint_path(self.folder, self.name).exists():
            return None, "--fresh" * self.args.fresh
        try:
            checkpoint = storage.load_checkpoint(self.folder, self.name)
        except ValueError as error:
            if self.args.fresh or isinstance(error, storage.OtherVersion):
                return None, "--fresh" if self.args.fresh else str(error)
            raise ValueError(f"{error}; or start over with --fresh") from error
        if self.job and checkpoint.get("job") == self.job:  # restarted by torchrun: the same flags, even if finished
            return checkpoint, ""
        if self.args.fresh:
            return None, "--fresh"
        if is_finished(self.folder, self.name, checkpoint["progress"], checkpoint["args"]["steps"]):
            return None, "it is finished"
        own = {"fresh", "resume", FOLDER_OPTION[self.name]}
        changed = [option for option, value in self.typed.items() if checkpoint["typed"].get(option) != value]
        if changed := [flag_of(option) for option in changed if option not in own]:
            return None, f"it was started with other flags ({', '.join(changed)})"
        if checkpoint["code"] != self.code:
            remedy = "give --resume its new folder"
            if self.name == storage.PRIOR:  # the VQ-VAE stays where it is
                remedy = f"stop this one, move its files back, and give --resume {self.folder}"
            return None, f"the code has changed since; to continue that run, {remedy}"
        return checkpoint, ""

    def begin(self, count: int, what: str, **identity):
        """Do the last checks, then move an earlier run aside; from now on, signals stop the run at the end of a step.

        Args:
            count: number of training images.
            what: their description, for the first line.
            identity: what identifies the run, such as the digest of its images; saved in each checkpoint.

        Raises:
            ValueError: the batch size is out of range, or the run to resume has another identity.
        """
        if not self.world_size <= self.args.batch_size <= count:
            bounds = f"{self.world_size} (processes) and {count} (training images)"
            raise ValueError(f"--batch-size {self.args.batch_size} is not between {bounds}")
        for name, value in identity.items():
            check_equal_on_ranks(value, name)
        self.identity = identity
        if self.checkpoint:
            before = self.checkpoint["identity"]
            changed = [
                name.replace("_", " ") + (f" (from {before.get(name)} to {value})" if isinstance(value, int) else "")
                for name, value in identity.items()
                if before.get(name) != value
            ]
            if changed and self.args.resume is not None:
                raise ValueError(f"the run in {self.folder} cannot be resumed: its {', '.join(changed)} changed")
            if changed:
                self.checkpoint, self.move_reason = None, f"its {', '.join(changed)} changed"
        for option in LEARNING_RATES if self.checkpoint else ():
            rate = self.checkpoint["args"].get(option)
            if option in self.typed and self.typed[option] is None and isinstance(rate, float):
                setattr(self.args, option, rate)  # the default depends on --steps, which --resume may have changed
        if self.args.tensorboard:
            summary_writer()
            try:
                str(self.folder).encode()
            except UnicodeEncodeError:  # TensorBoard itself fails only after the earlier run is moved
                reason = f"--tensorboard needs a folder whose name Python reads as UTF-8, unlike {self.folder}"
                raise ValueError(f"{reason}; set PYTHONUTF8=1 or name another folder") from None
        self._catch_signals()
        if self.rank == 0:
            if self.checkpoint is None:
                storage.move_aside(self.folder, FILES[self.name], self.move_reason)
            where = f"{self.device.type} in {self.args.precision}"
            where += f", {self.world_size} processes" if self.world_size > 1 else ""
            left = self.checkpoint and self.checkpoint["progress"]["step"] < self.args.steps
            if left and self.name == storage.CHECKPOINT:
                storage.warn_of_stale_prior(self.folder)
            resuming = f", resuming from step {self.checkpoint['progress']['step']:,}" if self.checkpoint else ""
            say(f"training on {count:,} {what}, on {where}{resuming}")
        from_rank_0()

    def _catch_signals(self):
        """Remember signals that ask the run to stop. A second Ctrl-C ends the process at once.

        Under torchrun it does not: torchrun forwards signals to processes that may have received them already.
        """
        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
            return
        signals = self.signals  # not self: what a handler refers to lives as long as the process

        def remember(signum, _frame):
            signals.append(signum)
            if signum == signal.SIGINT and not dist.is_torchelastic_launched():
                signal.signal(signum, signal.SIG_DFL)

        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # SIGHUP: a closed terminal; Windows has none
            signum = getattr(signal, name, None)
            ignored = name != "SIGTERM" and signum and signal.getsignal(signum) == signal.SIG_IGN
            if signum and not ignored:  # nohup ignores SIGHUP, a script's background job SIGINT
                before = signal.signal(signum, remember)
                if not dist.is_torchelastic_launched():
                    self._open.callback(signal.signal, signum, before or signal.SIG_DFL)

    def keep(self, **kept):
        """Save these under their names in each checkpoint; if the run is resumed, restore them first.

        Args:
            kept: objects with `state_dict` and `load_state_dict`, or dicts.

        Raises:
            ValueError: the checkpoint does not fit them.
        """
        self.kept = kept
        if not self.checkpoint:
            return
        try:
            for name, value in kept.items():
                load = value.update if isinstance(value, dict) else value.load_state_dict
                if isinstance(value, torch.optim.Optimizer):
                    load = functools.partial(restore_optimizer, value)
                load(self.checkpoint[name])
            saved = self.checkpoint["random"]
            own = {name: saved.get(f"{name}/{self.rank}", saved[name]) for name in saved if "/" not in name}
            set_random_state(own, self.device)  # that of rank 0 if there are more ranks than before
            progress = self.checkpoint["progress"]
            self.step, self.logged, self.seconds = (progress[name] for name in ("step", "logged", "seconds"))
            self.saved, self.unreported = self.step, progress["reports"]
        except Exception as error:  # a mismatch can raise almost any exception
            if out_of_memory(error):
                raise
            path = storage.checkpoint_path(self.folder, self.name)
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} does not fit this version ({reason}); start over with --fresh") from error
        if self.rank == 0:  # steps after the checkpoint will run again
            storage.trim_metrics(self.folder / f"{PREFIX[self.name]}metrics.csv", self.logged)
        self.checkpoint = None

    def parallel(self, model: nn.Module) -> Callable:
        """Return the model to call in training: it averages gradients over ranks, and --compile compiles it."""
        forward = DistributedDataParallel(model) if self.world_size > 1 else model
        if not self.args.compile:
            return forward
        if self.rank == 0:
            say("the first steps compile the network, which may take a minute")
        # On a GPU, compile to CUDA graphs, which launch many small kernels together.
        compiled = torch.compile(forward, mode="reduce-overhead" if self.device.type == "cuda" else None)

        def call(*inputs):
            with torch.compiler.set_stance("force_eager" if getattr(model, "starting", False) else "default"):
                return compiled(*inputs)

        return call

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bfloat16")

    def schedule(self, step: int) -> float:
        """Return a step's learning rate as a share of the peak: linear warm-up, then linear decay."""
        warm_up = min(1.0, step / (0.03 * self.args.steps))
        return warm_up * (1 - (step - 1) / self.args.steps)

    def shard(self, batch: Tensor) -> Tensor:
        """Return this rank's part of a global batch."""
        return batch.tensor_split(self.world_size)[self.rank]

    def share(self, batch: Tensor) -> float:
        """Return this rank's share of the batch: 1 on a single process."""
        return len(batch) / self.args.batch_size

    def steps(self, images: Images) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and the batch of each remaining step; on a signal, save and exit.

        Each rank gets its own part of the batch.
        """
        if self.saved is None:
            self.save()  # so that the run can be resumed from the first step on
        order = (
            self.shard(batch_indices(len(images), self.args.batch_size, self.args.seed, step))
            for step in range(self.step, self.args.steps)
        )
        stream = self._open.enter_context(contextlib.closing(batches(images, order, self.device)))
        for batch in stream:
            self.step += 1
            yield self.step, batch
            self.bar.update()
            if not self._has_shown and time.perf_counter() - self._began - self.seconds > FIRST_LINE:
                self.show("")
            signum = self._agreed_signal()
            if signum and self.step < self.args.steps:
                if self.saved != self.step:
                    self.save()
                self.bar.close()
                if self.rank == 0:
                    again = " without --fresh" if self.args.fresh and self.args.resume is None else ""
                    say(f"stopped at step {self.step}; run the same command again{again} to resume")
                sys.exit(128 + signum)

    def logs_at(self, step: int) -> bool:
        return step % self.args.log_every == 0 or self.saves_at(step)

    def saves_at(self, step: int) -> bool:
        """Return whether to save at a step; a step that was saved still counts if --resume changes --save-every."""
        return step % self.args.save_every == 0 or step in (self.args.steps, self.saved)

    def save(self):
        """Write the checkpoint. All ranks call it; the first call at a step comes before any measurement or picture."""
        self._read_clock()
        state = {name: dict(v) if isinstance(v, dict) else v.state_dict() for name, v in self.kept.items()}
        progress = {"step": self.step, "logged": self.logged, "seconds": self.seconds}
        progress["reports"] = self.saves_at(self.step) and self.logged < self.step
        state |= {
            "name": self.name,
            "args": vars(self.args),
            "typed": self.typed,
            "code": self.code,
            "job": self.job,
            "identity": self.identity,
        }
        of_ranks = enumerate(gather_from_ranks(random_state(self.device)))
        random = {f"{name}/{i}" if i else name: value for i, own in of_ranks for name, value in own.items()}
        state |= {"progress": progress, "random": random}
        if self.rank == 0:
            storage.check_owner(self.folder)
            storage.save_checkpoint(self.folder, state, self.name, keep_previous=self.saved != self.step)
        self.saved = self.step

    def log(self, row: dict):
        """Append a row to the metrics, with the step as its first column, and show it as a line."""
        if self.rank > 0:
            return
        storage.check_owner(self.folder)
        path = self.folder / f"{PREFIX[self.name]}metrics.csv"
        row = {"step": self.step} | {k: printable(v) if isinstance(v, str) else v for k, v in row.items()}
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        if not all(map(math.isfinite, numbers.values())):  # the weights are finite, but what they compute is not
            raise FloatingPointError("a measured loss is NaN or infinite; lower the learning rate")
        header = ",".join(row) + "\n"
        if not path.exists() or not path.stat().st_size:
            storage.write_whole(path, header)
        elif self.logged <= self._first:  # the first row of this process
            with open(path, encoding="utf-8", errors="replace") as file:
                found = file.read(len(header))
            if found != header:
                raise storage.Damaged(f"{path} has other columns than this run; move it away")
        storage.append_row(path, list(row.values()))
        if self.writer:
            with storage.add_path_to_errors(self.folder):
                for name, value in numbers.items():
                    self.writer.add_scalar(name, value, self.step)
        self.logged = self.step
        self.show(", ".join(f"{name} {format_number(value)}" for name, value in numbers.items()))

    def log_picture(self, name: str, path: Path):
        """Show a picture in TensorBoard, if --tensorboard asks for it."""
        if self.writer and path.is_file():
            self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), self.step, dataformats="HWC")

    def show(self, text: str):
        """Show the progress and a text: behind the progress bar on a terminal, else as a line."""
        if self.rank > 0 or self.step == self._first:
            return
        self._read_clock()
        self._has_shown = True
        passed = time.perf_counter() - self._began
        rate = self.step * self.args.batch_size / passed
        left = passed / self.step * (self.args.steps - self.step)
        text = ", ".join(filter(None, (text, f"{rate:,.0f} images/s, {format_duration(left)} left")))
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            say(f"step {self.step}/{self.args.steps}: {text}")

    def summarize(self, dataset: str, **measured) -> dict:
        """Write and return the summary: what was measured, the time that it took, and all arguments."""
        storage.check_owner(self.folder)  # measuring takes long
        summary = {"dataset": dataset, "steps": self.step, "seconds": time.perf_counter() - self._began}
        summary |= {
            "training_seconds": self.seconds,
            "images_per_second": self.step * self.args.batch_size / max(self.seconds, 1e-9),
        }
        summary |= {**measured, "device": self.device.type, "arguments": vars(self.args)}
        storage.write_whole(self.folder / f"{PREFIX[self.name]}summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _read_clock(self):
        if self.step == 0 or self.step == self.saved:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began

    def _agreed_signal(self) -> int:
        """Return the signal to stop for, or 0; all ranks agree on it at the same step."""
        if os.getppid() != self.parent and dist.is_torchelastic_launched():
            self.signals.append(signal.SIGTERM)  # torchrun itself was killed
        signum = self.signals[0] if self.signals else 0
        if self.world_size > 1:
            box = torch.tensor(signum)
            dist.all_reduce(box, dist.ReduceOp.MAX)
            signum = int(box)
        return signum

    def __enter__(self):
        """Start the clock, and open the progress bar and TensorBoard's writer."""
        self._first, self._began = self.step, time.perf_counter() - self.seconds
        hidden = self.rank > 0 or not (sys.stderr.isatty() and sys.stdout.isatty())
        bar = tqdm(total=self.args.steps, initial=self.step, disable=hidden, dynamic_ncols=True)
        self.writer = None
        if self.rank == 0 and self.args.tensorboard:  # steps after the checkpoint are logged again
            folder = self.folder / f"{PREFIX[self.name]}tensorboard"
            with user_errors():
                self.writer = self._open.enter_context(summary_writer()(folder, purge_step=self.logged + 1))
        self.bar, self._has_shown = self._open.enter_context(contextlib.closing(bar)), False
        return self

    def __exit__(self, _type, error, _traceback):
        """Close what is open, and unlock the folder. Errors that users can fix end the run in one line, with code 1."""
        try:
            with storage.add_path_to_errors(self.folder):
                self._open.close()
        except OSError as failed:  # TensorBoard's writer, on a full disk
            error = error or failed
        if failure := self._failure(error):
            fail(f"{failure[0]} after step {self.step}: {failure[1]}{self._remedy(error)}", code=1)

    def _failure(self, error: BaseException | None) -> tuple[str, str] | None:
        """Return how and why a run failed, or None if nothing failed or the cause is our own bug."""
        text = " ".join(str(error).split())
        if isinstance(error, FloatingPointError):
            return "diverged", text
        if isinstance(error, OSError | storage.Damaged):
            return "cannot continue", text
        if out_of_memory(error):
            return "out of memory", "free some memory and resume, or start anew with a smaller --batch-size or model"
        if lost_rank(error):
            return "cannot continue", "another process of this run has ended"
        if failed_to_compile(error):
            return "cannot continue", f"--compile failed ({text[:200]})"
        return None

    def _remedy(self, error: BaseException) -> str:
        """Return how to resume from the last checkpoint, as the end of a message; "" if there is nothing to resume."""
        if isinstance(error, storage.Damaged):  # its message names a remedy
            return ""
        try:
            saved = storage.load_checkpoint(self.folder, self.name)
        except (ValueError, OSError, MemoryError, RuntimeError):  # there is none, or no memory to read it
            return ""
        step = saved["progress"]["step"]
        if isinstance(error, FloatingPointError) and step == self.step:  # finite weights, infinite results
            if back := storage.way_back(self.folder, self.name):
                return f"; its checkpoint would diverge again, so give --resume a lower rate after this copy; {back}"
            return "; its checkpoint would diverge again: start over with --fresh and a lower rate"
        if is_finished(self.folder, self.name, saved["progress"], self.args.steps):
            return ""
        return f"; the checkpoint of step {step} is intact; to resume: {self._resume_command(error, saved['args'])}"

    def _resume_command(self, error: BaseException, saved: dict) -> str:
        """Return the command that resumes this run, with the flags that differ from the arguments in its checkpoint."""
        fixed = {"fresh", "resume", FOLDER_OPTION[self.name]}
        flags = {k: v for k, v in vars(self.args).items() if k not in fixed and v not in (None, saved.get(k))}
        if failed_to_compile(error):
            flags["compile"] = False
        if isinstance(error, FloatingPointError):  # with the same rates, it would diverge again
            rates = {k: getattr(self.args, k) for k in LEARNING_RATES if hasattr(self.args, k)}
            raised = {k for k, rate in rates.items() if rate > saved[k]}
            if raised:  # go back to the rates of the checkpoint
                flags = {k: v for k, v in flags.items() if k not in raised}
            else:
                flags |= {k: f"{rate / 2:g}" for k, rate in rates.items()}
        words = ["--resume", self.folder]
        for option, value in flags.items():
            switch = isinstance(value, bool)
            words.append(flag_of(option if value else f"no_{option}") if switch else f"{flag_of(option)}={value}")
        start = "" if self.world_size == 1 else "torchrun ..."
        return command(storage.SCRIPTS[self.name], *words, start=start)


def failed_to_compile(error: BaseException | None) -> bool:
    return type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict):
    """Load an optimizer's moments and learning rates; all other settings stay those of the code.

    Raises:
        ValueError: the moments do not have the shapes of the weights, which no kernel would check.
    """
    groups = zip(optimizer.state_dict()["param_groups"], saved["param_groups"])
    groups = [own | {"lr": float(group["lr"])} for own, group in groups]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    states = [(p, optimizer.state.get(p) or {}) for group in optimizer.param_groups for p in group["params"]]
    for p, state in states:
        shapes = {name: () if name == "step" else p.shape for name in state}
        good = all(torch.is_tensor(m) and m.is_floating_point() and m.shape == shapes[n] for n, m in state.items())
        if not good or state.keys() != states[0][1].keys():
            raise ValueError("the optimizer's moments do not have the shapes of the weights")


def summary_writer() -> type:
    """Return TensorBoard's writer class, imported only if --tensorboard is given.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter


def format_number(value: float) -> str:
    """Format a logged number: 0.01234, 512, 34,350."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Format a duration: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device):
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])
