"""A run's folder: what it holds, how an earlier run makes way, and checkpoints that are never half written."""

import contextlib
import os
import pickle
import sys
import time
import zipfile
from pathlib import Path

import torch

from model import VQVAE, build_model

FORMAT = 1
CHECKPOINT = "checkpoint.pt"
RUN_FILES = (CHECKPOINT, "metrics.csv", "summary.json", "evaluation.json", "curves.png", "codebook.png", "recon_*.png")


@contextlib.contextmanager
def user_errors():
    """Turn what a user can mend, ValueError and OSError, into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def prepare_folder(out_dir: str | Path) -> Path:
    """Make the folder of a new run, moving what an earlier run left there into a dated folder inside it.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {folder}; choose another folder with --out-dir")
    earlier = [path for pattern in RUN_FILES for path in folder.glob(pattern)]
    if earlier:
        newest = max(path.stat().st_mtime for path in earlier)
        archive = folder / time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(newest))
        while archive.exists():
            archive = archive.with_name(archive.name + "_")
        archive.mkdir()
        for path in earlier:
            path.rename(archive / path.name)
        print(f"moved the earlier run in {folder} to {archive}", flush=True)
    return folder


def save_checkpoint(folder: Path, state: dict):
    """Write `state` to the run's checkpoint; whenever the process dies, a whole checkpoint is there."""
    temporary = folder / (CHECKPOINT + ".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / CHECKPOINT)


def load_checkpoint(folder: str | Path) -> dict:
    """Read a run's checkpoint onto the CPU; code in the file is never executed.

    Raises:
        ValueError: there is no checkpoint, it is damaged or foreign, or it is from a newer version.
    """
    path = Path(folder, CHECKPOINT)
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CHECKPOINT}; name the folder of a run that saved one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(error).__name__}); name another run") from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise ValueError(f"{path} is not a checkpoint of this project; name the folder of a run")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads up to {FORMAT}; update the project")
    return state


def load_model(checkpoint: dict, device: torch.device | str = "cpu") -> VQVAE:
    """Rebuild the VQ-VAE of a checkpoint, in eval mode."""
    model = build_model(checkpoint["args"], checkpoint["image_shape"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device, memory_format=torch.channels_last).eval()
