"""A run's folder: what it holds, how an earlier run makes way, and checkpoints that are never half written."""

import contextlib
import io
import os
import shlex
import shutil
import time
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from model import VQVAE, build_model
from process import fail

FORMAT = 2
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint_previous.pt"
IMAGE_CACHE = "images.pt"  # decoded images of a folder; not of one run, so that a new run finds it too
CONTENTS = ("args", "image_shape", "model", "optimizer", "progress", "random")
RUN_FILES = (CHECKPOINT, PREVIOUS, "metrics.csv", "*.json", "curves.png", "codebook.png", "recon_*.png")


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


def prepare_folder(out_dir: str | Path) -> Path:
    """Make the folder of a new run, moving what an earlier run left there into a dated folder inside it.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder = writable_folder(out_dir)
    earlier = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
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
    return folder


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


def trim_metrics(path: Path, columns: tuple[str, ...], step: int):
    """Keep the whole lines of metrics.csv up to a step: what came after a checkpoint will be done again."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [line for line in lines[1:] if line.count(",") == len(columns) - 1 and int(line.split(",")[0]) <= step]
    write_whole(path, "\n".join([",".join(columns), *rows, ""]).encode())


def save_checkpoint(folder: Path, state: dict):
    """Write `state` to the run's checkpoint, and keep the one before it.

    Raises:
        OSError: it cannot be written; the last checkpoint is still there.
        FloatingPointError: the state holds NaN or infinite values.
    """
    if not finite(state):
        raise FloatingPointError("the weights or the optimiser's moments are NaN or infinite; lower the learning rate")
    content = io.BytesIO()  # written in one go, so that a full disk is an OSError
    torch.save({"format": FORMAT, **state}, content)
    if (folder / CHECKPOINT).exists():
        copy = folder / (PREVIOUS + ".tmp")
        copy.unlink(missing_ok=True)
        try:
            os.link(folder / CHECKPOINT, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / CHECKPOINT, copy)
        os.replace(copy, folder / PREVIOUS)
    write_whole(folder / CHECKPOINT, content.getbuffer())


def finite(value) -> bool:
    """Return whether all tensors in nested dicts and lists are finite."""
    if isinstance(value, dict | list | tuple):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not torch.is_tensor(value) or bool(value.isfinite().all())


def load_checkpoint(folder: str | Path) -> dict:
    """Read a run's checkpoint onto the CPU; code in the file is never executed.

    Raises:
        ValueError: there is no checkpoint, it is damaged or foreign, or it is from a newer version.
    """
    path, previous = Path(folder, CHECKPOINT), Path(folder, PREVIOUS)
    try:
        return read_checkpoint(path)
    except Damaged as error:
        try:
            step = read_checkpoint(previous)["progress"]["step"]
        except ValueError:
            raise error from None
        copy = shlex.join(["cp", str(previous), str(path)])
        raise ValueError(f"{error}; to go on from step {step} instead: {copy}") from error


class Damaged(ValueError):
    """A file that should hold a checkpoint is missing or holds something else."""


def read_checkpoint(path: Path) -> dict:
    if not os.path.isfile(path):
        raise Damaged(f"{path.parent} holds no {path.name}; name the folder of a run that saved one")
    state = read_file(path)
    if isinstance(state, dict) and isinstance(state.get("format"), int) and state["format"] != FORMAT:
        remedy = (
            "update the project" if state["format"] > FORMAT else "train again, or go back to the version before it"
        )
        raise ValueError(f"{path} has format {state['format']}, this version reads {FORMAT}; {remedy}")
    if not isinstance(state, dict) or not state.keys() >= {"format", *CONTENTS}:
        raise Damaged(f"{path} is not a checkpoint of this project; name the folder of a run")
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
def run_errors(folder: Path, progress: dict):
    """End a run that diverged or lost its disk with one line that names its last checkpoint, and exit code 1."""
    try:
        yield
    except (OSError, FloatingPointError) as error:
        kind = "diverged" if isinstance(error, FloatingPointError) else "cannot go on"
        message = f"{kind} after step {progress['step']}: {error}"
        with contextlib.suppress(ValueError, OSError):
            saved = load_checkpoint(folder)["progress"]["step"]
            message += f"; the checkpoint of step {saved} is whole, to go on: python train.py --resume {folder}"
        fail(message, code=1)
