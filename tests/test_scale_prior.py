import itertools
import shutil
import sys
from pathlib import Path

from harness.data import load_dataset, to_pixels
from harness.storage import load_checkpoint, read_state, write_state

import export
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_page, ended, far_from_zero, refusal, same_state, save, some_codes, train, train_prior
from PIL import Image

import demo
import reconstruct
import sample as sample_script
import train_prior as script
from prior import ScalePrior, generate
from sample import load_run, sample
from scales import MultiScaleQuantizer

K, D = 16, 4
SCALES = [[(1, 1), (2, 2), (3, 3)], [(1, 2), (2, 5)], [(2, 3)]]


@pytest.fixture(params=SCALES, ids=str)
def prior(request):
    quantizer = MultiScaleQuantizer(request.param, K, D, kmeans_start=False)
    torch.nn.init.normal_(quantizer.codebook)
    sizes = {"codebook_size": K, "grids": request.param, "classes": 3, "width": 16, "depth": 2, "heads": 2}
    return far_from_zero(ScalePrior(quantizer, **sizes))


def spans(prior):
    """The first and the last position, exclusive, of each scale."""
    return list(itertools.pairwise(itertools.accumulate(prior.sizes, initial=0)))


def changed(codes, position):
    codes = codes.clone()
    codes[:, position] = (codes[:, position] + 1) % K
    return codes


def test_logits_depend_only_on_earlier_scales(prior):
    codes, labels = some_codes(prior)
    logits = prior(codes, labels)
    assert logits.shape == (5, prior.length, K)
    for start, end in spans(prior):
        for position in range(start, end):
            after = prior(changed(codes, position), labels)
            assert torch.equal(after[:, :end], logits[:, :end])
            assert (after[:, end:] != logits[:, end:]).flatten(2).any(-1).all()  # each of them has seen it


def test_stays_causal_when_trained(prior):
    codes, labels = some_codes(prior)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(prior(codes, labels).flatten(0, 1), codes.flatten()).backward()
        optimizer.step()
    logits = prior(codes, labels)
    for start, end in spans(prior):
        assert torch.equal(prior(changed(codes, start), labels)[:, :end], logits[:, :end])


def test_every_logit_depends_on_the_label(prior):
    codes, labels = some_codes(prior)
    assert (prior(codes, labels) != prior(codes, (labels + 1) % 4)).flatten(2).any(-1).all()


def test_cached_steps_give_the_logits_of_the_whole(prior):
    codes, labels = some_codes(prior)
    caches = prior.caches(len(codes))
    steps = [prior.step(codes[:, :start], labels, caches) for start, _ in spans(prior)]
    torch.testing.assert_close(torch.cat(steps, 1), prior(codes, labels), rtol=0, atol=1e-4)


def test_quantizer_is_neither_trained_nor_saved(prior):
    codes, labels = some_codes(prior)
    prior.train()(codes, labels).square().sum().backward()
    assert all(parameter.grad is None for parameter in prior.contexts.__self__.parameters())
    assert all(parameter.grad is not None for parameter in prior.parameters())
    assert not any("codebook" in name or "phi" in name for name in prior.state_dict())


def test_memorises_and_draws_each_class():
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(SCALES[0], K, D, kmeans_start=False)
    torch.nn.init.normal_(quantizer.codebook)
    prior = ScalePrior(quantizer, codebook_size=K, grids=SCALES[0], classes=4, width=32, depth=2, heads=2)
    prior.init_from_codebooks([quantizer.codebook.detach()])
    codes, labels = torch.randint(K, (4, prior.length)), torch.arange(4)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(prior(codes, labels).flatten(0, 1), codes.flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    assert torch.equal(generate(prior.eval(), labels.flip(0), temperature=1e-6), codes.flip(0))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_guidance_leads_beyond_the_asked_class(prior, guidance):
    labels = torch.tensor([0, 1, 2])
    expected = torch.zeros(3, prior.length, dtype=torch.int64)
    for start, end in spans(prior):  # greedily, without caches
        without, with_class = prior(expected, torch.full_like(labels, 3)), prior(expected, labels)
        expected[:, start:end] = (without + guidance * (with_class - without)).argmax(-1)[:, start:end]
    assert torch.equal(generate(prior, labels, guidance=guidance, temperature=1e-6), expected)


@pytest.mark.parametrize("kept", [0, 1, 2, 5])
def test_given_codes_are_kept(prior, kept):
    codes, labels = some_codes(prior)
    drawn = generate(prior, labels, given=codes[:, :kept], temperature=1e-6)
    assert torch.equal(drawn[:, :kept], codes[:, :kept])
    logits = prior(drawn, labels)
    assert torch.equal(drawn[:, kept:], logits.argmax(-1)[:, kept:])


def test_codes_are_drawn_as_often_as_their_probability(prior):
    labels = torch.zeros(20_000, dtype=torch.int64)
    drawn = generate(prior, labels, generator=torch.Generator().manual_seed(0))[:, prior.sizes[0] - 1]
    expected = prior(drawn.new_zeros(1, prior.length), labels[:1])[0, prior.sizes[0] - 1].softmax(-1)
    torch.testing.assert_close(torch.bincount(drawn, minlength=K) / len(labels), expected, rtol=0, atol=0.015)


@pytest.fixture(scope="module")
def run(scales_run, tmp_path_factory):
    """A run with scales and a next-scale prior, not to be changed."""
    folder = shutil.copytree(scales_run, tmp_path_factory.mktemp("scale_prior") / "results")
    train_prior(folder, "--steps=6", "--save-every=3")
    return folder


def draw(folder, *flags):
    sample_script.main(sample_script.parse_args([f"--run={folder}", *map(str, flags)]))


def test_scales_give_a_next_scale_prior(run):
    model, prior = load_run(run)
    assert isinstance(prior, ScalePrior) and prior.step_sizes == [1, 4, 16, 49]
    images = sample(model, prior, num=12, classes=[3, 7], seed=1)
    assert images.shape == (12, 1, 28, 28)
    assert torch.equal(images, sample(model, prior, num=12, classes=[3, 7], seed=1))


def test_samples_are_shown_after_each_scale(run, tmp_path, monkeypatch):
    copy, shown = shutil.copytree(run, tmp_path / "results"), {}
    monkeypatch.setattr(
        sample_script.figures, "save_samples", lambda path, *args: shown.update({path.name: args}) is None
    )
    draw(copy, "--num=4", "--seed=5", "--guidance=2")
    rows, _, names = shown["samples_by_scale.png"]
    assert names == ["up to 1x1", "up to 2x2", "up to 4x4", "up to 7x7"] and not torch.equal(rows[0], rows[-1])
    model, prior = load_run(copy)
    assert torch.equal(rows[-1], sample(model, prior, 4, seed=5, guidance=2))
    codes = sample_script.draw_codes(model, prior, sample_script.labels_of(prior, 4), seed=5, guidance=2)
    for n, row in enumerate(rows):
        with torch.no_grad():
            assert torch.equal(row, (model.decode(codes[: n + 1]) * 255).round().to(torch.uint8))


def test_failed_picture_of_scales_is_exit_code_1(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "results")
    (copy / "samples_by_scale.png").mkdir()
    with pytest.raises(SystemExit) as stopped:
        draw(copy, "--num=4")
    captured = capsys.readouterr()
    assert stopped.value.code == 1 and "cannot write a picture" in captured.err
    assert captured.out == f"wrote {copy / 'samples.png'}\n"
    (copy / "samples_by_scale.png").rmdir()
    draw(copy, "--num=4")
    lines = [f"wrote {copy / name}" for name in ("samples.png", "samples_by_scale.png")]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(("keep", "kept"), [(0.0, 0), (0.07, 1), (0.5, 21)])
def test_completion_keeps_whole_scales(run, tmp_path, monkeypatch, keep, kept):
    copy, image = shutil.copytree(run, tmp_path / "results"), load_dataset("digits").test_images[0]
    Image.fromarray(image[0].numpy()).save(tmp_path / "digit.png")
    given, original = [], sample_script.generate
    monkeypatch.setattr(
        sample_script, "generate", lambda *args, **options: given.append(options["given"]) or original(*args, **options)
    )
    draw(copy, "--complete", tmp_path / "digit.png", f"--keep={keep}")
    indices = load_run(copy)[0].encode(to_pixels(image[None], "cpu"))
    expected = torch.cat([chosen.flatten(1) for chosen in indices], 1)[:, :kept]
    assert torch.equal(given[0], expected.expand(sample_script.COMPLETIONS, -1))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumes_bit_for_bit(run, tmp_path, stop_at, precision):
    flags = ["--steps=9", "--save-every=4", f"--precision={precision}"]
    whole, halves = (shutil.copytree(run, tmp_path / name) for name in ("whole", "halves"))
    train_prior(whole, *flags)
    stop_at(6, halves, *flags, call=train_prior)
    assert load_checkpoint(halves, "prior")["progress"]["step"] == 6
    train_prior(halves, *flags)
    assert (halves / "prior_metrics.csv").read_bytes() == (whole / "prior_metrics.csv").read_bytes()
    assert same_state(load_checkpoint(halves, "prior"), load_checkpoint(whole, "prior"))
    assert (halves / "samples_000009.png").read_bytes() == (whole / "samples_000009.png").read_bytes()


@pytest.mark.slow
def test_two_ranks_learn_as_one(run, tmp_path):
    losses = []
    for ranks in (1, 2):
        folder = shutil.copytree(run, tmp_path / str(ranks))
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--", "train_prior.py"]
        flags = [f"--run={folder}", *TINY, "--steps=6", "--precision=float32", "--batch-size=15", "--dropout=0"]
        ended([sys.executable, *command, *flags], check=True)
        lines = Path(folder, "prior_metrics.csv").read_text().splitlines()[1:]
        losses.append([float(line.split(",")[1]) for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_images_need_be_neither_square_nor_labelled(tmp_path):
    for i in range(60):
        save(tmp_path / "photos" / f"{i}.png", (12, 20))
    folder = tmp_path / "results"
    train(folder, f"--dataset={tmp_path / 'photos'}", "--scales=1,2x3,3x5", "--steps=2")
    train_prior(folder, "--steps=2", "--batch-size=8")
    draw(folder, "--num=7")
    draw(folder, "--complete", tmp_path / "photos" / "0.png")
    made = []
    for out, words in (("out", str(tmp_path / "photos")), ("again", f"--codes={tmp_path / 'out' / 'codes.npz'}")):
        reconstruct.main(reconstruct.parse_args([f"--run={folder}", words, f"--out={tmp_path / out}"]))
        made.append([path.read_bytes() for path in sorted((tmp_path / out / "reconstructions").iterdir())])
    assert made[0] == made[1] and len(made[0]) == 60
    assert sample(*load_run(folder), num=5).shape == (5, 3, 12, 20)


@pytest.mark.parametrize("own", ["scales", "one grid"])
def test_prior_of_another_kind_is_one_line(run, prior_run, capsys, tmp_path, own):
    """Also if it says that it belongs to this VQ-VAE, and has as many codes."""
    folder, other = (run, prior_run) if own == "scales" else (prior_run, run)
    copy = shutil.copytree(folder, tmp_path / "results")
    shutil.copy(other / "prior.pt", copy / "prior.pt")
    assert "belongs to another VQ-VAE" in refusal(capsys, sample_script, f"--run={copy}")
    (copy / "prior_previous.pt").unlink()
    state, _ = read_state(copy / "prior.pt")
    state["identity"] |= sample_script.trained_on(load_checkpoint(copy))
    state["identity"]["shape"]["grids"] = load_run(folder)[1].grids
    write_state(copy / "prior.pt", state)
    assert "holds no prior of this version" in refusal(capsys, sample_script, f"--run={copy}")
    assert "holds no prior of this version" in refusal(capsys, script, f"--resume={copy}", "--steps=20")


def test_exported_run_draws_the_same_images(run, tmp_path):
    export.main(export.parse_args([f"--run={run}", f"--out={tmp_path / 'kept'}"]))
    assert torch.equal(*(sample(*load_run(folder), num=12, seed=1) for folder in (run, tmp_path / "kept")))


def test_page_completes_whole_scales(run):
    page = demo.load_page(str(run))
    edit = demo.edit_image(page.model, page.examples[0])
    given = torch.cat([codes.flatten() for codes in edit.levels])[: page.prior.whole_steps(30)]
    levels = demo.draw(page.model, page.prior, 8, given=given)
    assert len(given) == 21 and all((drawn == kept).all() for drawn, kept in zip(levels[:3], edit.levels))
    assert len(levels[3].unique(dim=0)) > 1
    assert [page.prior.whole_steps(count) for count in (0, 1, 4, 5, 69, 70, 99)] == [0, 1, 1, 5, 21, 70, 70]


@pytest.mark.filterwarnings("ignore")  # of gradio's own
def test_page_has_a_slider_of_scales(run):
    pytest.importorskip("gradio", reason="gradio is not installed")
    app = build_page(run)
    [slider] = [part["props"] for part in app.get_config_file()["components"] if part["props"].get("label") == "Scales"]
    assert (slider["minimum"], slider["maximum"], slider["value"], slider["visible"]) == (1, 4, 4, True)
