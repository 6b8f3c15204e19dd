"""Atomic file writes, checkpoints that carry their own digest, and the folder of a run."""

import contextlib
import csv
import glob
import hashlib
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from harness.cli import say, shell_words
from harness.machine import out_of_memory

import filelock
import psutil
import torch

FORMAT = 5
CHECKPOINT, PRIOR = "checkpoint", "prior"
SCRIPTS = {CHECKPOINT: "train.py", PRIOR: "train_prior.py"}  # which script writes which
IMAGE_CACHE = "images.pt"  # decoded images of a folder; not moved aside with a run, so that the next one finds them
PRIOR_FILES = ("prior*.pt", "prior_metrics.csv", "prior_curves.png", "prior_summary.json", "prior_tensorboard")
PRIOR_FILES += ("samples*.png", "completed.png", "neighbours.png", "generation.json")
RUN_FILES = ("checkpoint*.pt", "metrics.csv", "summary.json", "evaluation.json", "curves.png", "codebook.png")
RUN_FILES += ("tensorboard", "recon_*.png", "reconstructed*.png", "codes.pt", "images.txt", *PRIOR_FILES)
TRAILER = b"sha256:"  # and 64 hexadecimal digits: the comment of the zip archive that torch.save writes
TRAILER_SIZE = len(TRAILER) + 64
TEMPORARY = f"*.{'[0-9a-f]' * 16}.tmp"  # half-written files; a user's own *.tmp are left alone
NO_COMMENT = b"\0\0"  # the length of the comment before we add it


class Damaged(ValueError):
    """A file of ours is missing, truncated or changed, or something else wrote it."""


class OtherVersion(ValueError):
    """A checkpoint that another version of the project wrote."""


# Files


@contextlib.contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError that names none, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` when the block ends; if killed before that, `path` is unchanged.

    Raises:
        OSError: it cannot be written; `path` is unchanged, and the space we used is freed.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with add_path_to_errors(path), open(temporary, "xb") as file:  # x: never follow a link that lies there
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace(source: Path, target: Path, tries: int = 50 if os.name == "nt" else 1):
    """Rename a file over another; on Windows, wait up to 5 s while another process has the other file open."""
    for left in reversed(range(tries)):
        try:
            return os.replace(source, target)
        except PermissionError:
            if not left:
                raise
            time.sleep(0.1)


def write_whole(path: Path, text: str):
    with whole_file(path) as file:
        file.write(text.encode())


class DigestWriter:
    """Pass on what torch.save writes, and compute its digest."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch.save turns it into a RuntimeError
            raise

    def flush(self):
        self.file.flush()


def write_state(path: Path, state):
    """Write a file that torch.load can read, with its digest at the end.

    Raises:
        OSError: it cannot be written; `path` is unchanged.
    """
    with whole_file(path) as file:
        writer = DigestWriter(file)
        try:
            torch.save(state, writer)
        except RuntimeError:
            raise writer.error or OSError(f"{path} cannot be written") from None
        file.seek(-len(NO_COMMENT), os.SEEK_END)
        file.write(TRAILER_SIZE.to_bytes(2, "little") + TRAILER + writer.digest.hexdigest().encode())


def read_state(path: Path, mmap: bool = False) -> tuple[dict, str]:
    """Return what `write_state` wrote, on the CPU, and its digest; code in the file is never executed.

    Raises:
        Damaged: the file is missing, or any bit of it has changed.
        ValueError: it cannot be read.
    """
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise Damaged(f"{path.parent} holds no {path.name}")
    try:
        digest = read_digest(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap), digest
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    except Damaged:
        raise
    except Exception as error:  # something else wrote it; torch's own message tells users to execute the file
        if out_of_memory(error):
            raise
        raise Damaged(f"{path} holds more than tensors and plain values, and is not loaded") from None


def read_digest(path: Path) -> str:
    """Check the digest at the end of a file, and return it.

    Raises:
        Damaged: it does not match the bytes before it.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - TRAILER_SIZE - len(NO_COMMENT)
        while left > 0 and (chunk := file.read(min(left, 2**20))):
            digest.update(chunk)
            left -= len(chunk)
        digest.update(NO_COMMENT)
        expected = TRAILER_SIZE.to_bytes(2, "little") + TRAILER + digest.hexdigest().encode()
        if left != 0 or file.read() != expected:
            raise Damaged(f"{path} is damaged, or was not written by this version of the project")
    return digest.hexdigest()


def is_ours(path: Path) -> bool:
    """Return whether a file ends as those of `write_state` do, damaged or not."""
    if not path.is_file() or path.stat().st_size < TRAILER_SIZE:
        return False
    with open(path, "rb") as file:
        file.seek(-TRAILER_SIZE, os.SEEK_END)
        return file.read(len(TRAILER)) == TRAILER


@contextlib.contextmanager
def new_folder(path: str | Path | None) -> Iterator[Path | None]:
    """Yield a temporary folder that becomes `path` when the block ends, so `path` is never half full; None yields None.

    Raises:
        ValueError: `path` exists and is not an empty folder, or is a mount point, to which nothing can be renamed.
        OSError: something was written to `path` meanwhile; the message names the folder that holds the files.
    """
    if path is None:
        yield None
        return
    given, path = path, Path(os.path.realpath(path))  # follow a link
    empty = path.is_dir() and not any(path.iterdir()) and not path.samefile(os.curdir) and not os.path.ismount(path)
    if os.path.lexists(path) and not empty:
        raise ValueError(f"--out {given} exists already; name a new folder")
    stem = path.name[:50]  # leaves room for the suffix: a name may have 255 bytes
    for left in path.parent.glob(glob.escape(stem) + TEMPORARY[1:]):
        say(f"{left} is left from an --out that was killed; delete it, unless a command still writes it", error=True)
    temporary = path.with_name(f"{stem}.{secrets.token_hex(8)}.tmp")
    made = [parent for parent in temporary.parents if not parent.exists()]  # the innermost first
    try:
        temporary.mkdir(parents=True)
        with add_path_to_errors(path):
            yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise
    try:
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()  # it is empty
        temporary.rename(path)
    except OSError as error:  # something was put there meanwhile
        raise OSError(f"{path} cannot be written ({error.strerror}); the files are in {temporary}") from error


# Checkpoints


def fits(value, kind) -> bool:
    """Return whether a value fits a kind: a type, a check, or a dict with a kind for each name."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(value.get(name), inner) for name, inner in kind.items())
    return isinstance(value, kind) if isinstance(kind, type) else kind(value)


def is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_duration(value) -> bool:
    return isinstance(value, float) and 0 <= value < math.inf


def is_shape(value) -> bool:
    return isinstance(value, list | tuple) and all(is_count(length) and length > 0 for length in value)


def is_names(value) -> bool:
    return value is None or isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_plain(value) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, str | int | float | None) for k, v in value.items()
    )


def is_tensors(value) -> bool:
    return isinstance(value, dict) and all(map(torch.is_tensor, value.values()))


def is_sums(value) -> bool:
    """Return whether these are sums of losses (scalars) and of codes' counts (vectors)."""
    return is_tensors(value) and all(
        isinstance(name, str) and v.is_floating_point() and v.ndim == (1 if name.startswith("counts") else 0)
        for name, v in value.items()
    )


PROGRESS = {"step": is_count, "logged": is_count, "seconds": is_duration, "reports": bool}
CONTENTS = {"name": str, "code": str, "args": is_plain, "typed": is_plain, "progress": PROGRESS, "model": is_tensors}
CONTENTS |= {"means": {"steps": is_count, "sums": is_sums}, "random": is_tensors}
KIND_CONTENTS = {
    CHECKPOINT: {
        "args": {"steps": is_count, "dataset": str, "background": str},
        "identity": {"images": str, "image_shape": is_shape, "class_names": is_names},
    },
    PRIOR: {
        "args": {"steps": is_count},
        "identity": {"vqvae": str, "vqvae_step": is_count, "shape": {"codebook_size": is_count, "classes": is_count}},
        "best": {"held_out_nats": float, "step": is_count, "model": is_tensors},
    },
}


def checkpoint_path(folder: str | Path, name: str = CHECKPOINT, previous: bool = False) -> Path:
    return Path(folder, f"{name}_previous.pt" if previous else f"{name}.pt")


def save_checkpoint(folder: Path, state: dict, name: str = CHECKPOINT, keep_previous: bool = True):
    """Write a run's checkpoint, and with `keep_previous` also keep the one before it.

    Raises:
        OSError: it cannot be written; the last checkpoint is still there.
        FloatingPointError: the state holds NaN or infinite values.
    """
    if not sound(state):
        raise FloatingPointError("the weights or the optimizer's moments are NaN or infinite; lower the learning rate")
    path = checkpoint_path(folder, name)
    if keep_previous and path.exists():
        previous = checkpoint_path(folder, name, previous=True)
        copy = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            os.link(path, copy)
            replace(copy, previous)
            copy.unlink(missing_ok=True)  # a rename does nothing if both link to one file, as after a kill right here
        except OSError:  # a file system without hard links
            copy.unlink(missing_ok=True)
            with open(path, "rb") as source, whole_file(previous) as file:
                shutil.copyfileobj(source, file)
    write_state(path, {"format": FORMAT, **state})


def sound(value) -> bool:
    """Return whether all tensors in nested dicts and lists are finite, and none claims more values than it stores."""
    if isinstance(value, dict | list | tuple):
        return all(map(sound, value.values() if isinstance(value, dict) else value))
    if not torch.is_tensor(value):
        return True
    stored = value.layout == torch.strided and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    return stored and bool(value.isfinite().all())


def load_checkpoint(folder: str | Path, name: str = CHECKPOINT) -> dict:
    """Read a run's checkpoint onto the CPU; adds the file's digest and path as "digest" and "path".

    Raises:
        ValueError: it is missing or damaged, or another program or version wrote it.
    """
    try:
        return read_checkpoint(checkpoint_path(folder, name), name)
    except Damaged as error:
        if remedy := way_back(folder, name):
            raise ValueError(f"{error}; {remedy}") from error
        raise


def way_back(folder: str | Path, name: str) -> str:
    """Return how to go back to the checkpoint before the last one, or "" if it is missing, damaged, or of step 0."""
    path, previous = checkpoint_path(folder, name), checkpoint_path(folder, name, previous=True)
    try:
        step = read_checkpoint(previous, name)["progress"]["step"]
    except (ValueError, MemoryError, RuntimeError):
        return ""
    copy = shell_words("cp", "--", previous, path)
    return f"to resume from step {step} instead: {copy}" if step > 0 else ""


def read_checkpoint(path: Path, name: str) -> dict:
    remedy = f"name the folder of a run of {SCRIPTS[name]}"
    if os.path.lexists(path) and not os.path.isfile(path):  # a folder, a pipe, a link to nowhere: no cp replaces it
        raise ValueError(f"{path} is not a file; move it away")
    try:
        state, digest = read_state(path)
    except Damaged as error:
        if (other := other_format(path)) is not None:
            raise other_version(path, other) from None
        raise Damaged(f"{error}; {remedy}") from None
    if not fits(state, {"format": int}):
        raise Damaged(f"{path} is not a checkpoint of this project; {remedy}")
    if state["format"] != FORMAT:
        raise other_version(path, state["format"])
    try:
        good = fits(state, CONTENTS) and state["name"] == name and fits(state, KIND_CONTENTS[name]) and sound(state)
    except RuntimeError as error:  # tensors without values, lists that hold themselves
        if out_of_memory(error):
            raise
        good = False
    if not good:
        raise Damaged(f"{path} does not hold what {SCRIPTS[name]} saves; {remedy}")
    return state | {"digest": digest, "path": str(path)}


def other_format(path: Path) -> int | None:
    """Return the format of a checkpoint that another version wrote, which may have no digest."""
    with contextlib.suppress(Exception):
        found = torch.load(path, map_location="cpu", weights_only=True)["format"] if path.is_file() else None
        return found if isinstance(found, int) and found != FORMAT else None


def other_version(path: Path, found: int) -> OtherVersion:
    remedy = "update the project" if found > FORMAT else "train again, or use the version that wrote it"
    return OtherVersion(f"{path} has format {found}, this version reads {FORMAT}; {remedy}")


def code_digest(script: str) -> str:
    """Return a digest of the code on which a script's result depends."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(code_files(script)):
        digest.update(os.fsencode(f"{path.relative_to(root).as_posix()}\n") + path.read_bytes())
    return digest.hexdigest()


def code_files(script: str) -> set[Path]:
    """Return the files of harness/, the script, and what they import of the project, directly or not."""
    root, paths = Path(__file__).parents[1], set()
    waiting = [*root.glob("harness/[!.]*.py"), root / script]  # editors leave hidden files
    while waiting:
        path = waiting.pop()
        if path not in paths and path.is_file():
            paths.add(path)
            imported = re.findall(rb"^ *(?:from|import) (\w+)", path.read_bytes(), re.MULTILINE)
            waiting += [root / f"{os.fsdecode(name)}.py" for name in imported]
    return paths


# The folder of a run


def writable_folder(path: str | Path) -> Path:
    """Make the folder if it is not there, and check that files can be written to it.

    Raises:
        OSError: it cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        found = "is a file, inside one, or a link to nowhere"
        raise NotADirectoryError(f"{folder} needs to be a folder, but {found}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to the folder {folder}; change its permissions or choose another")
    return folder


def refuse_weights_only(folder: str | Path):
    """Raise ValueError if a folder holds exported weights: they have no optimizer, and nothing may move them aside."""
    try:
        checkpoint = load_checkpoint(folder)
    except ValueError:  # nothing to protect
        return
    if checkpoint.get("weights_only"):
        raise ValueError(f"{folder} holds exported weights, which training would replace; name another folder")


def is_run_folder(folder: Path) -> bool:
    """Return whether a run has written into a folder, or is about to: its pictures are not training images."""
    return any((folder / name).exists() for name in ("checkpoint.pt", "prior.pt")) or lock_owner(folder)[1]


def is_run_file(path: Path) -> bool:
    return any(path.match(pattern) for pattern in RUN_FILES)


def lock_owner(folder: Path) -> tuple[int | None, bool]:
    """Return the process that locked a folder last, None if unknown, and whether it is alive."""
    pid = None
    with contextlib.suppress(OSError, ValueError, OverflowError, psutil.Error):
        number, started = read_text(folder / ".lock.pid").split()
        pid = int(number)
        return pid, abs(psutil.Process(pid).create_time() - float(started)) < 1  # else the number was reused
    return pid, False


def locked_by_other(folder: Path) -> bool:
    """Return whether another process that is alive has locked a folder."""
    pid, alive = lock_owner(folder)
    return alive and pid != os.getpid()


def check_owner(folder: Path):
    """Raise Damaged if a folder that this process has locked was moved: another run may be in its place."""
    pid = lock_owner(folder)[0]
    if pid != os.getpid() and (pid or not (folder / ".lock").exists()):
        raise Damaged(f"{folder} was moved, or another run took its place; resume it with --resume and its new name")


def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Lock a run's folder against other processes until the lock is released or this process ends.

    Raises:
        ValueError: another process holds it.
    """
    # A singleton, since a process that lives on after a refused run, such as a notebook, may still hold the lock.
    lock = filelock.FileLock(folder.resolve() / ".lock", is_singleton=True, fallback_to_soft=False)
    pid, alive = lock_owner(folder)
    # A killed run holds its lock until all its processes have ended; some take seconds to see that the first is dead.
    patience = 10 if pid and not alive else 0
    try:
        lock.acquire(timeout=patience)
    except filelock.Timeout:
        pid, _ = lock_owner(folder)  # it may have started since
        remedy = "wait for it, stop it, or name another folder"
        raise ValueError(f"another run, process {pid or 'unknown'}, is writing into {folder}; {remedy}") from None
    except (OSError, NotImplementedError) as error:
        remedy = "use another folder, or one on another file system"
        raise ValueError(f"{folder} cannot be locked ({error}), so two runs could mix; {remedy}") from None
    for left in folder.glob(TEMPORARY):  # half written by a killed run
        if left.is_symlink() or not left.is_dir():  # a folder may be an --out that is being written
            left.unlink(missing_ok=True)
    write_whole(folder / ".lock.pid", f"{os.getpid()} {psutil.Process().create_time()}\n")
    return lock


def move_aside(folder: Path, patterns: Sequence[str] = RUN_FILES, reason: str = "", what: str = "the earlier run"):
    """Move an earlier run's files into a dated folder inside the folder of a new one."""
    earlier = list({path for pattern in patterns for path in folder.glob(pattern)})
    if not earlier:
        return
    # Move the newest last: after a kill halfway, the next start finds the same folder name, and moves the rest.
    earlier.sort(key=lambda path: path.lstat().st_mtime)
    archive = folder / time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(earlier[-1].lstat().st_mtime))
    while any(os.path.lexists(archive / path.name) for path in earlier):
        archive = archive.with_name(archive.name + "_")
    archive.mkdir(exist_ok=True)
    for path in earlier:
        path.rename(archive / path.name)
    say(f"moved {what} in {folder} to {archive}" + (f": {reason}" if reason else ""))


def warn_of_stale_prior(folder: Path):
    """Warn that the prior in a folder will no longer fit the VQ-VAE, since its training is resumed."""
    with contextlib.suppress(ValueError):
        step = load_checkpoint(folder, PRIOR)["identity"]["vqvae_step"]
        say(f"the prior in {folder} belongs to the VQ-VAE of step {step:,}; train it again after this run")


def read_text(path: Path) -> str:
    """Read a text file of ours.

    Raises:
        Damaged: it is missing, or no file: reading a pipe would block.
    """
    if not path.is_file():
        raise Damaged(f"{path} is missing, or not a file; if it is there, move it away")
    return path.read_text(encoding="utf-8", errors="replace")


def append_row(path: Path, row: Sequence):
    with add_path_to_errors(path), open(path, "a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(row)


def read_metrics(path: Path) -> list[tuple[str, dict]]:
    """Return the complete lines of a metrics file, each with its values by column; an empty value is None.

    Raises:
        Damaged: a line has other columns than the header, or a step or a measured value that is not a number.
    """
    text = read_text(path)
    head, *lines = text.splitlines() or [""]
    names, rows = head.split(","), []
    for i, line in enumerate(lines, 2):
        try:
            values = dict(zip(names, next(csv.reader([line])), strict=True))
            row = {name: (float(v) if v else None) if name != "dataset" else v for name, v in values.items()}
            rows.append((line, row | {"step": int(values["step"])}))
        except (ValueError, KeyError, csv.Error):
            if i > len(lines) and not text.endswith("\n"):
                break  # the process was killed while it wrote this line
            remedy = "repair it, or move the file away"
            raise Damaged(f"{path}, line {i}, does not fit the header in line 1 ({line[:80]}); {remedy}") from None
    return rows


def trim_metrics(path: Path, step: int):
    """Keep the complete lines of a metrics file up to a step; those after it will be written again."""
    if not path.exists():
        return
    kept = [(line, row) for line, row in read_metrics(path) if row["step"] <= step]
    if kept:
        write_whole(path, "\n".join([",".join(kept[0][1]), *(line for line, _ in kept), ""]))
    else:
        path.unlink()
