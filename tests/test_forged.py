"""Files that are whole by their digest and wrong inside: one line, exit code 2, and nothing written or downloaded."""

import copy
import shutil

from harness import data
from harness.storage import load_checkpoint, read_state, write_state

import pytest
import torch
from conftest import refusal, same_state, train_prior
from torchvision import datasets

import evaluate
import reconstruct
import sample
import train as script
import train_prior as prior_script
from model import load_model


def name_of(value) -> str:
    """Return the name of a parameter in a test's name, the same in every process."""
    return value if isinstance(value, str) else getattr(value, "__name__", repr(value)[:20])


class MISSING:
    """In place of a value: the key is not there."""


def forge(path, keys, value):
    """Put a value, or nothing, under nested keys of a file, and give it a valid digest again."""
    state, _ = read_state(path)
    inner = state = copy.deepcopy(state)
    for key in keys[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    write_state(path, state)


LOOP = []
LOOP.append(LOOP)
WEIGHT = "levels.0.encoder.1.weight"
FORGED = [
    *((key, value) for key in ("args", "identity", "model") for value in (MISSING, None, [], 7, {})),
    *((f"args {name}", value) for name in ("codebook_size", "width") for value in (0, -3, 33, 10**20, "32")),
    ("args blocks", 10**9), ("args levels", 3), ("args downsample", 3), ("args downsample", 2**40),
    ("args decay", 2.0), ("args dataset", ["digits"]), ("args dataset", "nowhere"), ("args image_size", -1),
    ("args image_size", 1.5), ("args background", "no colour"), ("args memory_limit", "much"),
    ("args data_dir", torch.zeros(0)), ("args skip_bad_images", "yes"), ("identity image_shape", (1, 0, 28)),
    ("identity image_shape", (3, 28, 28)), ("identity image_shape", 28), ("identity images", "another"),
    ("identity images", MISSING), ("identity class_names", -1), ("progress step", "last"), ("progress step", -1),
    ("progress", MISSING), (f"model {WEIGHT}", MISSING), (f"model {WEIGHT}", 5), (f"model {WEIGHT}", torch.zeros(2)),
    (f"model {WEIGHT}", torch.full((8, 4, 3, 3), torch.nan)), ("name", "prior"), ("format", None),
    (f"model {WEIGHT}", torch.zeros(1).expand(10**6, 10**6)), (f"model {WEIGHT}", torch.eye(3).to_sparse()),
    ("args levels", 10**9), ("args background", MISSING), ("extra", LOOP),
    (f"model {WEIGHT}", torch.zeros(8, 4, 3, 3, device="meta")),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), FORGED, ids=name_of)
def test_forged_checkpoint_is_one_line(trained_run, capsys, place, value):
    (trained_run / "checkpoint_previous.pt").unlink()
    forge(trained_run / "checkpoint.pt", place.split(), value)
    for call in (evaluate, reconstruct):
        refusal(capsys, call, f"--run={trained_run}")
    assert not (trained_run / "evaluation.json").exists()


OF_TRAINING = [
    *((f"args {name}", value) for name in ("steps", "seed", "beta", "log_every") for value in (None, "x", -1)),
    ("args lr", "x"), ("args lr", -1.0), ("args lr", float("nan")),
    ("args steps", MISSING), ("args precision", "float8"), ("args ema", None), ("args flip", 1),
    ("optimizer", MISSING), ("optimizer", {}),
    ("optimizer state 1 exp_avg", torch.zeros(3, 3)), ("optimizer state 1 exp_avg", torch.tensor(1.0)),
    ("optimizer state 1 exp_avg_sq", MISSING), ("optimizer state 1 step", torch.zeros(0)),
    ("optimizer state 1 step", None), ("optimizer param_groups", []), ("optimizer param_groups 0", {}),
    ("means", MISSING), ("means sums", {"recon_loss": -1}), ("means steps", 10**30),
    ("means sums", {"recon_loss": torch.zeros(2)}), ("means sums", {"recon_loss": torch.tensor(1)}),
    ("means sums", {"counts": torch.tensor(1.0)}), ("random", {}), ("random cpu", torch.zeros(3)),
    ("progress logged", None), ("progress seconds", "long"), ("progress seconds", -1.0), ("typed", None), ("code", 3),
    (f"model {WEIGHT}", torch.zeros(2)),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), OF_TRAINING, ids=name_of)
def test_forged_checkpoint_is_not_resumed(trained_run, capsys, place, value):
    """A moment of another shape would have the optimizer write beyond it."""
    (trained_run / "checkpoint_previous.pt").unlink()
    path = trained_run / "checkpoint.pt"
    keys = [int(key) if key.isdecimal() else key for key in place.split()]
    forge(path, keys, value)
    forged = path.read_bytes()
    refusal(capsys, script, f"--resume={trained_run}", "--steps=32")
    assert path.read_bytes() == forged


@pytest.mark.parametrize("sums", [{}, {"recon_loss": torch.tensor(1.0)}])
def test_forged_means_end_the_run_by_one_line(trained_run, capsys, sums):
    """The process died between its checkpoint and the report, says the file."""
    forge(trained_run / "checkpoint.pt", ["progress", "reports"], True)
    forge(trained_run / "checkpoint.pt", ["means", "sums"], sums)
    with pytest.raises(SystemExit) as ended:
        script.main(script.parse_args([f"--resume={trained_run}", "--steps=32"]))
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and printed.count("\n") == 1 and "the checkpoint's means hold no" in printed


def test_run_of_no_seconds_writes_its_summary(trained_run):
    forge(trained_run / "checkpoint.pt", ["progress", "seconds"], 0.0)
    (trained_run / "summary.json").unlink()
    script.main(script.parse_args([f"--resume={trained_run}"]))
    assert (trained_run / "summary.json").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((f"args {name}", value) for name in ("width", "depth", "heads") for value in (0, 3, 10**9, "16")),
        ("identity shape", None), ("identity shape grids", [(7, 8)]), ("identity shape grids", 49),
        ("identity shape codebook_size", 33), ("identity shape classes", 9), ("identity vqvae", MISSING),
        ("identity vqvae_step", "last"), ("best", MISSING), ("best model", {}), ("best step", None),
        ("best held_out_nats", None),
    ],
    ids=name_of,
)  # fmt: skip
def test_forged_prior_is_one_line(generating_run, capsys, place, value):
    (generating_run / "prior_previous.pt").unlink()
    forge(generating_run / "prior.pt", place.split(), value)
    refusal(capsys, sample, f"--run={generating_run}", "--num=1")
    refusal(capsys, prior_script, f"--resume={generating_run}", "--steps=9")
    assert not (generating_run / "samples.png").exists()


@pytest.mark.parametrize("pair", [("checkpoint", "prior"), ("checkpoint", "codes"), ("prior", "codes")], ids=str)
def test_swapped_files_are_one_line(generating_run, capsys, pair):
    a, b = (generating_run / f"{name}.pt" for name in pair)
    a.rename(generating_run / "other")
    b.rename(a)
    (generating_run / "other").rename(b)
    refusal(capsys, sample, f"--run={generating_run}")
    refusal(capsys, prior_script, f"--resume={generating_run}", "--steps=9")
    if "checkpoint" in pair:
        refusal(capsys, evaluate, f"--run={generating_run}")
        refusal(capsys, script, f"--resume={generating_run}", "--steps=40")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("key", "another"), ("key", MISSING), ("train", None), ("train", torch.zeros(5, 3)), ("grids", [(7, 6)]),
        ("train", torch.full((1500, 50), 32)), ("test", torch.full((1500, 50), -1)), ("class_names", ["a"]),
        ("dataset", 5),
    ],
    ids=name_of,
)  # fmt: skip
def test_forged_codes_do_not_fit(prior_run, place, value):
    """They are then recomputed, as the next test shows."""
    codes, vqvae = read_state(prior_run / "codes.pt")[0], load_checkpoint(prior_run)
    model = load_model(vqvae)
    assert prior_script.fits(codes, vqvae, model)
    forged = {name: old for name, old in codes.items() if name != place}
    if value is not MISSING:
        forged[place] = value
    assert not prior_script.fits(forged, vqvae, model)


def test_swapped_codes_are_recomputed(generating_run):
    before, _ = read_state(generating_run / "codes.pt")
    shutil.copy(generating_run / "checkpoint.pt", generating_run / "codes.pt")
    train_prior(generating_run, "--steps=1")
    assert same_state(read_state(generating_run / "codes.pt")[0], before)


def test_nothing_is_downloaded_for_a_file(generating_run, tmp_path, capsys, monkeypatch):
    """A folder in a checkpoint may be anybody's; only one that the user names now is written to."""
    asked = []
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: asked.append(self.root))
    place = tmp_path / "elsewhere"
    for name, value in (("dataset", "mnist"), ("data_dir", str(place))):
        forge(generating_run / "checkpoint.pt", ["args", name], value)
    (generating_run / "checkpoint_previous.pt").unlink()
    (generating_run / "codes.pt").unlink()
    digest = load_checkpoint(generating_run)["digest"]
    forge(generating_run / "prior.pt", ["identity", "vqvae"], digest)
    forge(generating_run / "prior.pt", ["args", "data_dir"], str(place))
    refusal(capsys, script, f"--resume={generating_run}", "--steps=40")
    for call in (evaluate, reconstruct, prior_script):
        refusal(capsys, call, f"--run={generating_run}")
    refusal(capsys, prior_script, f"--resume={generating_run}", "--steps=9")
    assert not asked and not place.exists()
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.parse_args([f"--run={generating_run}", f"--data-dir={place}"]))
    assert asked


def test_folders_in_a_file_are_not_written_to(generating_run, tmp_path):
    """The run is where the user says that it is."""
    place = tmp_path / "elsewhere"
    forge(generating_run / "checkpoint.pt", ["args", "out_dir"], str(place))
    script.main(script.parse_args([f"--resume={generating_run}", "--steps=32"]))
    train_prior(generating_run, "--steps=2")
    forge(generating_run / "prior.pt", ["args", "run"], str(place))
    prior_script.main(prior_script.parse_args([f"--resume={generating_run}", "--steps=3"]))
    assert not place.exists() and load_checkpoint(generating_run, "prior")["progress"]["step"] == 3


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("images", None),
        ("images", torch.zeros(5)),
        ("shape", 5),
        ("counts", None),
        ("bad", MISSING),
        ("bad", {3: "it is mine"}),
        ("digests", []),
    ],
    ids=str,
)
def test_forged_image_cache_is_rebuilt(folder, tmp_path, place, value):
    cache = tmp_path / "images.pt"
    expected = data.load_dataset(str(folder), cache=cache)
    forge(cache, [place], value)
    found = data.load_dataset(str(folder), cache=cache)
    assert torch.equal(found.train_images, expected.train_images) and found.digest == expected.digest
