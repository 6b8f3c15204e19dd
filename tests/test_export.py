import json
import shutil
from pathlib import Path

from harness.data import to_pixels
from harness.storage import PRIOR, load_checkpoint, read_state, write_state

import export
import pytest
import torch
from conftest import refusal, save, train

import evaluate
import sample
import train as script
import train_prior as prior_script


def keep(run, out):
    export.main(export.parse_args([f"--run={run}", f"--out={out}"]))
    return out


def test_exported_run_draws_the_same_images(prior_run, tmp_path, capsys):
    """Every script loads it by load_run or load_checkpoint; the prior still belongs to the VQ-VAE beside it."""
    out = keep(prior_run, tmp_path / "kept")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "prior.pt", "summary.json"]
    before, after = (sample.sample(*sample.load_run(run), seed=1) for run in (prior_run, out))
    assert torch.equal(before, after)
    assert "all float32" in capsys.readouterr().out
    kept, made = (json.loads((run / "summary.json").read_text()) for run in (out, prior_run))
    assert kept["arguments"].pop("out_dir") == "results" != made["arguments"].pop("out_dir")  # no path of the maker's
    assert kept == made and load_checkpoint(out)["args"]["out_dir"] == "results"
    assert load_checkpoint(out, PRIOR)["args"]["run"] == "results"


def test_pretrained_model_fits_the_code():
    """Its own samples come back; weights of another layout would scatter their pixels."""
    model, prior = sample.load_run(Path(export.__file__).parent / "mnist")
    x = to_pixels(sample.sample(model, prior, num=20, seed=0), "cpu")
    error = (model.decode(model.encode(x)) - x).square().mean((1, 2, 3))
    assert x.shape == (20, 1, 28, 28) and (-10 * error.log10()).mean() > 25


def test_summary_of_another_step_is_not_exported(prior_run, tmp_path, capsys):
    """As of a run that was resumed for more steps, and stopped."""
    run = shutil.copytree(prior_run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"steps": summary["steps"] - 1}))
    printed = refusal(capsys, export, f"--run={run}", f"--out={tmp_path / 'kept'}")
    assert (
        "is not of step 30, that of the checkpoint; finish the run first" in printed
        and not (tmp_path / "kept").exists()
    )


def test_exported_run_finds_a_folder_named_like_a_data_set(tmp_path, capsys):
    """The data set of that name is neither looked for nor downloaded."""
    for i in range(20):
        save(tmp_path / "mnist" / f"{i}.png")
    train(tmp_path / "run", f"--dataset={tmp_path / 'mnist'}", "--steps=1", "--batch-size=4")
    out = keep(tmp_path / "run", tmp_path / "kept")
    evaluate.main(evaluate.parse_args([f"--run={out}", f"--data-dir={tmp_path / 'mnist'}"]))
    assert '"test_mse": ' in capsys.readouterr().out
    assert "does not exist; give its new path with --data-dir" in refusal(capsys, evaluate, f"--run={out}")


def test_exported_checkpoints_hold_weights_alone(prior_run, tmp_path):
    out = keep(prior_run, tmp_path / "kept")
    for name in ("checkpoint", PRIOR):
        kept = load_checkpoint(out, name)
        assert not any(kept[part] for part in ("optimizer", "muon", "adamw"))
        assert (out / f"{name}.pt").stat().st_size < (prior_run / f"{name}.pt").stat().st_size / 2


def test_exported_run_of_a_folder_names_no_path(tmp_path, capsys):
    for i in range(30):
        save(tmp_path / "photos" / f"{i}.png", (12, 12))
    train(tmp_path / "run", f"--dataset={tmp_path / 'photos'}", "--steps=2")
    out = keep(tmp_path / "run", tmp_path / "kept")
    assert load_checkpoint(out)["args"]["dataset"] == "photos"
    assert str(tmp_path) not in (out / "summary.json").read_text()


def test_exported_prior_is_the_best_not_the_last(generating_run, tmp_path):
    state, _ = read_state(generating_run / "prior.pt")
    state["model"] = {name: torch.zeros_like(value) for name, value in state["model"].items()}
    write_state(generating_run / "prior.pt", state)
    out = keep(generating_run, tmp_path / "kept")
    assert torch.equal(*(sample.sample(*sample.load_run(run), seed=1) for run in (generating_run, out)))


@pytest.mark.parametrize("half", [["prior"], ["checkpoint", "prior"]])
def test_too_large_weights_become_float16(prior_run, tmp_path, monkeypatch, capsys, half):
    """First those of the prior, which are the most; a folder of exactly the limit is small enough."""
    (tmp_path / "sized").mkdir()
    monkeypatch.setattr(export, "MAX_BYTES", export.export(prior_run, tmp_path / "sized", half))
    out = keep(prior_run, tmp_path / "half")
    halves = [torch.float16 if name in half else torch.float32 for name in ("checkpoint", "prior")]
    vqvae, prior = load_checkpoint(out)["model"], load_checkpoint(out, PRIOR)["best"]["model"]
    assert [vqvae["mean"].dtype, prior["label.weight"].dtype] == halves
    model, prior = sample.load_run(out)
    assert model.mean.dtype == prior.label.weight.dtype == torch.float32
    counts = next(value for name, value in vqvae.items() if name.endswith("ema_counts"))
    assert counts.dtype == torch.float32  # may exceed the range of float16
    printed = capsys.readouterr().out
    assert "as float16" in printed and ("differ by 0 at most" in printed) == ("checkpoint" not in half)


def test_weights_beyond_the_limit_leave_nothing(prior_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(SystemExit, match="2"):
        keep(prior_run, tmp_path / "kept")
    assert "even as float16" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{}", "[]", '{"arguments": [1]}', "xx", "", b"\xff"])
def test_bad_summary_is_named_and_nothing_written(prior_run, tmp_path, capsys, content):
    run = shutil.copytree(prior_run, tmp_path / "run")
    (run / "summary.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    printed = refusal(capsys, export, f"--run={run}", f"--out={tmp_path / 'kept'}")
    assert f"{run / 'summary.json'} is damaged" in printed and "name the folder of a finished run" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_training_refuses_an_exported_folder(prior_run, tmp_path, capsys, flags):
    out = keep(prior_run, tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for own, *named in ((script, "--dataset=digits", f"--out-dir={out}"), (prior_script, f"--run={out}")):
        with pytest.raises(SystemExit, match="2"):
            own.main(own.parse_args([*named, "--device=cpu", "--steps=1", *flags]))
        error = capsys.readouterr().err
        assert "holds exported weights, which training would replace" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
