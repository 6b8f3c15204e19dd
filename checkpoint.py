"""A run's folder: what it holds, how an earlier run makes way, and checkpoints that are never half written."""

import contextlib
import csv
import hashlib
import io
import os
import shlex
import shutil
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model import VQVAE, build_model
from process import command, fail
from quantizer import processes

FORMAT = 3
CHECKPOINT, PRIOR = "checkpoint", "prior"
SCRIPTS = {CHECKPOINT: "train.py", PRIOR: "train_prior.py"}  # what writes them
IMAGE_CACHE = "images.pt"  # decoded images of a folder; not of one run, so that a new run finds it too
CONTENTS = {
    CHECKPOINT: {"format", "args", "data", "image_shape", "model", "optimizer", "progress", "random"},
    PRIOR: {"format", "args", "shape", "model", "best", "vqvae", "optimizer", "progress", "random"},
}
PRIOR_FILES = ("prior*.pt", "prior_metrics.csv", "prior_curves.png", "prior_summary.json", "samples*.png")
PRIOR_FILES += ("completed.png", "neighbours.png", "generation.json")
RUN_FILES = ("checkpoint*.pt", "metrics.csv", "summary.json", "evaluation.json", "curves.png", "codebook.png")
RUN_FILES += ("recon_*.png", "codes.pt", *PRIOR_FILES)


def writable_folder(path: str | Path) -> Path:
    """Make the folder if it is not there, and check that files can be written to it.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder} is, or is inside, a file, and needs to be a folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to the folder {folder}; change its permissions or choose another")
    return folder


def prepare_folder(folder: Path, patterns: tuple[str, ...] = RUN_FILES):
    """Move what an earlier run left in the folder of a new one into a dated folder inside it."""
    earlier = list({path for pattern in patterns for path in folder.glob(pattern)})
    if earlier:
        # The newest goes last: killed halfway, the next start finds the same name, and goes on.
        earlier.sort(key=lambda path: path.stat().st_mtime)
        archive = folder / time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(earlier[-1].stat().st_mtime))
        while any((archive / path.name).exists() for path in earlier):
            archive = archive.with_name(archive.name + "_")
        archive.mkdir(exist_ok=True)
        for path in earlier:
            path.rename(archive / path.name)
        print(f"moved the earlier run in {folder} to {archive}", flush=True)


def write_whole(path: Path, content: bytes):
    """Write a file so that it holds either what it held before or all of `content`, whenever the process dies."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # of a full disk, give back what was taken
            temporary.unlink(missing_ok=True)
        raise


def trim_metrics(path: Path, columns: Sequence[str], step: int):
    """Keep the whole lines of metrics.csv up to a step: what came after a checkpoint will be done again."""
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [
        line for line, row in zip(lines[1:], csv.reader(lines[1:])) if len(row) == len(columns) and int(row[0]) <= step
    ]
    write_whole(path, "\n".join([",".join(columns), *kept, ""]).encode())


def file_of(folder: str | Path, name: str = CHECKPOINT, previous: bool = False) -> Path:
    return Path(folder, f"{name}_previous.pt" if previous else f"{name}.pt")


def digest_of(folder: str | Path) -> str:
    """Return a digest of a run's VQ-VAE, which ties its codes and its prior to it."""
    return hashlib.sha256(file_of(folder).read_bytes()).hexdigest()


def save_checkpoint(folder: Path, state: dict, name: str = CHECKPOINT):
    """Write `state` to a run's checkpoint, and keep the one before it.

    Raises:
        OSError: it cannot be written; the last checkpoint is still there.
        FloatingPointError: the state holds NaN or infinite values.
    """
    if not finite(state):
        raise FloatingPointError("the weights or the optimiser's moments are NaN or infinite; lower the learning rate")
    content = io.BytesIO()  # written in one go, so that a full disk is an OSError
    torch.save({"format": FORMAT, **state}, content)
    path, previous = file_of(folder, name), file_of(folder, name, previous=True)
    if path.exists():
        copy = previous.with_name(previous.name + ".tmp")
        copy.unlink(missing_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, copy)
        os.replace(copy, previous)
    write_whole(path, content.getbuffer())


def finite(value) -> bool:
    """Return whether all tensors in nested dicts and lists are finite."""
    if isinstance(value, dict | list | tuple):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not torch.is_tensor(value) or bool(value.isfinite().all())


def load_checkpoint(folder: str | Path, name: str = CHECKPOINT) -> dict:
    """Read a run's checkpoint onto the CPU; code in the file is never executed.

    Raises:
        ValueError: there is no checkpoint, it is damaged or foreign, or it is from another version.
    """
    path, previous = file_of(folder, name), file_of(folder, name, previous=True)
    try:
        return read_checkpoint(path, name)
    except Damaged as error:
        try:
            step = read_checkpoint(previous, name)["progress"]["step"]
        except ValueError:
            raise error from None
        copy = shlex.join(["cp", str(previous), str(path)])
        raise ValueError(f"{error}; to go on from step {step} instead: {copy}") from error


class Damaged(ValueError):
    """A file that should hold a checkpoint is missing or holds something else."""


def read_checkpoint(path: Path, name: str) -> dict:
    if not os.path.isfile(path):
        raise Damaged(f"{path.parent} holds no {path.name}; name the folder of a run of {SCRIPTS[name]}")
    state = read_file(path)
    if isinstance(state, dict) and isinstance(state.get("format"), int) and state["format"] != FORMAT:
        remedy = "update the project" if state["format"] > FORMAT else "train again, or use the version before it"
        raise ValueError(f"{path} has format {state['format']}, this version reads {FORMAT}; {remedy}")
    if not isinstance(state, dict) or not state.keys() >= CONTENTS[name]:
        raise Damaged(f"{path} is not a {name} of this project; name the folder of a run")
    return state


def read_file(path: Path, mmap: bool = False):
    """Return what torch.save wrote, on the CPU; code in the file is never executed.

    Raises:
        ValueError: the file cannot be read.
        Damaged: it is not what torch.save wrote.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save writes a zip archive, and torch.load skips its checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    except Exception as error:  # bytes gone wrong surface as almost any exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"{path} is damaged or not a checkpoint ({reason})") from error


def load_model(checkpoint: dict, device: torch.device | str = "cpu") -> VQVAE:
    """Rebuild the VQ-VAE of a checkpoint, in eval mode."""
    model = build_model(checkpoint["args"], checkpoint["image_shape"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device, memory_format=torch.channels_last).eval()


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device):
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


@contextlib.contextmanager
def run_errors(folder: Path, progress: dict, rates: dict[str, float], name: str = CHECKPOINT):
    """End a run that diverged or lost its disk with one line that names its last checkpoint, and exit code 1.

    Args:
        rates: the run's learning rates by their flags; with the same, it would diverge again.
    """
    try:
        yield
    except (OSError, FloatingPointError) as error:
        kind = "diverged" if isinstance(error, FloatingPointError) else "cannot go on"
        message = f"{kind} after step {progress['step']}: {error}"
        with contextlib.suppress(ValueError, OSError):
            saved = load_checkpoint(folder, name)["progress"]["step"]
            message += f"; the checkpoint of step {saved} is whole, to go on: {resume_command(folder, name)}"
            if kind == "diverged":
                message += "".join(f" {flag} {rate / 2:g}" for flag, rate in rates.items())
        fail(message, code=1)


def resume_command(folder: Path, name: str) -> str:
    return command(SCRIPTS[name], "--resume", folder, start="" if processes() == 1 else "torchrun ...")
