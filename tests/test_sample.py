"""From a trained VQ-VAE and its prior to new images, by the commands that a user gives."""

import shutil

from harness import data
from harness.data import load_dataset, to_pixels
from harness.storage import load_checkpoint, read_state, write_state

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refusal, save, train, train_prior
from PIL import Image

import sample as sample_script
from sample import load_run, sample


def draw(folder, *flags):
    sample_script.main(sample_script.parse_args([f"--run={folder}", *map(str, flags)]))


def test_samples_are_images_that_a_seed_fixes(prior_run):
    model, prior = load_run(prior_run)
    images = sample(model, prior, num=12, classes=[3, 7], seed=1)
    assert images.shape == (12, 1, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images, sample(model, prior, num=12, classes=[3, 7], seed=1))
    assert not torch.equal(images, sample(model, prior, num=12, classes=[3, 7], seed=2))


def test_samples_differ_by_class(prior_run):
    """Take the likeliest image of each class from a prior whose label matters."""
    model, prior = load_run(prior_run)
    torch.nn.init.normal_(prior.label.weight, std=10)
    images = sample(model, prior, num=10, temperature=1e-6)
    assert len(images.flatten(1).unique(dim=0)) > 2


def test_dropout_changes_no_sample(prior_run):
    """And a prior in train mode is in train mode afterwards."""
    model, prior = load_run(prior_run)
    for block in prior.blocks:
        block.dropout = 0.9
    expected = sample(model, prior, num=10)
    assert torch.equal(sample(model, prior.train(), num=10), expected) and prior.training


@pytest.fixture
def drawn(monkeypatch):
    """The pictures drawn so far: path, rows and title of each."""
    calls = []
    save_samples = sample_script.figures.save_samples
    monkeypatch.setattr(sample_script.figures, "save_samples", lambda *args: (calls.append(args), save_samples(*args)))
    return calls


def test_writes_a_row_per_class_and_files(generating_run, drawn, tmp_path):
    out = tmp_path / "single"
    draw(generating_run, "--num=6", "--classes=7\n3", "--seed=5", "--top-k=9", "--guidance=2", "--out", out)
    [(path, rows, _, names)] = drawn
    assert list(names) == ["7", "3"]
    expected = sample(*load_run(generating_run), num=6, classes=[7, 3], seed=5, top_k=9, guidance=2)
    assert path == generating_run / "samples.png" and path.is_file() and len(rows) == 2
    assert torch.equal(torch.cat(list(rows)), expected)
    files = sorted(out.iterdir())
    assert len(files) == 6
    for file, image in zip(files, expected):
        assert np.array_equal(np.asarray(Image.open(file)), image[0].numpy())  # grey, as it was learnt


def test_few_large_images_are_drawn_at_once(prior_run, monkeypatch):
    drawn, original = [], sample_script.generate
    monkeypatch.setattr(sample_script, "generate", lambda *a, **o: drawn.append(original(*a, **o)) or drawn[-1])
    monkeypatch.setattr(data, "CHUNK_PIXELS", 3 * 28 * 28 + 1)
    assert sample(*load_run(prior_run), num=10).shape == (10, 1, 28, 28)
    assert [len(codes) for codes in drawn] == [3, 3, 3, 1]


def test_each_chunk_goes_on_from_its_codes(prior_run, monkeypatch):
    """All codes are given: the images are those of these codes, however few are drawn at once."""
    model, prior = load_run(prior_run)
    codes = torch.randint(prior.codebook_size, (10, prior.length))
    whole = sample_script.draw(model, prior, torch.arange(10), given=codes)
    monkeypatch.setattr(data, "CHUNK_PIXELS", 3 * 28 * 28)
    chunked = sample_script.draw(model, prior, torch.arange(10), given=codes)
    assert (chunked.int() - whole.int()).abs().max() <= 1  # batches of another size may round differently


def test_no_class_is_left_out_whatever_the_number(prior_run):
    _, prior = load_run(prior_run)
    for num in (10, 11, 15, 99):
        counts = torch.bincount(sample_script.labels_of(prior, num), minlength=10)
        assert counts.sum() == num and counts.max() - counts.min() <= 1


def test_images_are_completed_from_their_first_codes(generating_run, drawn, monkeypatch, tmp_path):
    image = load_dataset("digits", "").test_images[0]
    Image.fromarray(image[0].numpy()).save(tmp_path / "digit.png")
    codes, original = [], sample_script.generate
    monkeypatch.setattr(
        sample_script, "generate", lambda *args, **options: codes.append(original(*args, **options)) or codes[-1]
    )
    draw(generating_run, "--complete", tmp_path / "digit.png", "--keep=0.6")
    [(path, [row], *_)] = drawn
    assert path.name == "completed.png" and len(row) == 1 + sample_script.COMPLETIONS
    assert torch.equal(row[0], image) and len(row[1:].flatten(1).unique(dim=0)) > 1
    model, _ = load_run(generating_run)
    given = model.encode(to_pixels(image[None], "cpu"))[0].flatten()[:29]
    assert (codes[0][:, :29] == given).all()


@pytest.mark.parametrize("levels", [1, 2])
def test_folder_without_classes_runs_from_train_to_sample(tmp_path, levels):
    """Non-square, in colour, unlabelled, one and two levels."""
    for i in range(60):
        save(tmp_path / "photos" / f"{i}.png")
    folder = tmp_path / "results"
    train(folder, f"--dataset={tmp_path / 'photos'}", f"--levels={levels}", "--steps=3")
    train_prior(folder, "--steps=3", "--batch-size=8")
    model, prior = load_run(folder)
    assert prior.classes == 0 and prior.length == (12 if levels == 1 else 2 * 2 + 4 * 4)
    assert sample(model, prior, num=5).shape == (5, 3, 12, 16)
    draw(folder, "--num=7")
    draw(folder, "--complete", tmp_path / "photos" / "0.png")
    assert "the prior has 0 classes" in pytest.raises(ValueError, sample, model, prior, classes=[1]).value.args[0]


def test_run_without_checkpoint_or_prior_is_refused(capsys, tmp_path, trained_run):
    assert f"{tmp_path} holds no checkpoint.pt" in refusal(capsys, sample_script, "--run", tmp_path)
    assert "holds no prior.pt; name the folder of a run of train_prior.py" in refusal(
        capsys, sample_script, "--run", trained_run
    )


def test_prior_of_another_vqvae_is_refused(capsys, generating_run, tmp_path):
    train(tmp_path / "other", "--steps=1")
    shutil.copy(tmp_path / "other" / "checkpoint.pt", generating_run)
    printed = refusal(capsys, sample_script, "--run", generating_run)
    assert "belongs to another VQ-VAE (step 30) than the one in this folder (step 1); train it again" in printed


@pytest.mark.parametrize("classes", [9, 11])
def test_prior_of_other_classes_is_refused(capsys, generating_run, classes):
    """Even if its weights fit what it says of itself."""
    state, _ = read_state(generating_run / "prior.pt")
    state["identity"]["shape"]["classes"], weights = classes, state["best"]["model"]
    weights["label.weight"] = F.pad(weights["label.weight"], (0, 0, 0, classes - 10))
    write_state(generating_run / "prior.pt", state)
    assert "does not fit the VQ-VAE's codes; train it again" in refusal(capsys, sample_script, "--run", generating_run)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--classes", "3,10", "there is no class 10; the classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("--classes", "3;7", "there is no class 3;7"),
        ("--classes", "9" * 5000, "there is no class 999"),
        ("--classes", "9" * 140_000, "cannot be split into names"),
        ("--temperature", "0", "must be above 0"),
        ("--temperature", "nan", "must be above 0"),
        ("--temperature", "hot", "invalid float value"),
        ("--top-p", "-1", "must be above 0"),
        ("--top-p", "95", "must be at most 1"),
        ("--guidance", "1e39", "guidance"),
        ("--top-k", "-1", "top-k"),
        ("--num", "0", "num"),
        ("--keep", "1.5", "keep"),
        ("--complete", "none.png", "none.png does not exist"),
    ],
)
def test_bad_flag_is_named_in_one_line(capsys, prior_run, flag, value, message):
    assert message in refusal(capsys, sample_script, "--run", prior_run, f"{flag}={value}")


def test_completing_takes_no_class_and_no_number(capsys, prior_run):
    for flag in ("--classes=3", "--num=3"):
        printed = refusal(capsys, sample_script, "--run", prior_run, "--complete=a.png", flag)
        assert "leave out --classes and --num" in printed


def test_mistyped_run_leaves_no_folder(capsys, tmp_path):
    refusal(capsys, sample_script, "--run", tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_out_refuses_a_folder_with_files(capsys, prior_run, tmp_path):
    (tmp_path / "00000.png").write_bytes(b"mine")
    assert "exists already; name a new folder" in refusal(capsys, sample_script, "--run", prior_run, "--out", tmp_path)
    assert (tmp_path / "00000.png").read_bytes() == b"mine"


def test_completes_images_of_another_size(prior_run, drawn, tmp_path):
    """They are scaled until they cover the size of the training, and cropped at the centre."""
    pixels = save(tmp_path / "wide.png", (28, 40), "L")
    draw(prior_run, "--complete", tmp_path / "wide.png")
    [(_, [row], *_)] = drawn
    assert np.array_equal(row[0, 0].numpy(), pixels[:, 6:34])


@pytest.fixture
def named_run(folder, tmp_path):
    """A run on three class folders with odd names, and its prior."""
    for split in ("train", "test"):
        for i in range(3):
            save(folder / split / "$x, {$ & <b>" / f"{i}.png")
    train(tmp_path / "results", f"--dataset={folder}", "--background=#204060", "--steps=2", "--batch-size=4")
    train_prior(tmp_path / "results", "--steps=2", "--save-every=2", "--batch-size=4")
    return tmp_path / "results"


def test_class_names_go_from_folders_to_samples(named_run, drawn, capsys):
    """Into both checkpoints' files and the rows of the pictures, and they may be typed, mixed with numbers."""
    names = ["$x, {$ & <b>", "cat", "dog"]
    assert load_checkpoint(named_run)["identity"]["class_names"] == names
    assert read_state(named_run / "codes.pt")[0]["class_names"] == names
    assert (named_run / "samples_000002.png").is_file()
    draw(named_run, "--classes=dog,0,cat", "--num=6")
    assert list(drawn[0][3]) == ["dog", "$x, {$ & <b>", "cat"]
    expected = sample(*load_run(named_run), num=6, classes=[2, 0, 1])
    assert torch.equal(torch.cat(list(drawn[0][1])), expected)
    draw(named_run)
    assert list(drawn[1][3]) == names
    draw(named_run, '--classes="$x, {$ & <b>",cat')
    assert list(drawn[2][3]) == names[:2]
    assert "there is no class bird; the classes are $x, {$ & <b>, cat, dog" in refusal(
        capsys, sample_script, "--run", named_run, "--classes=cat,bird"
    )


def test_names_that_are_numbers_are_names():
    names = ["1", "2", "3"]
    assert sample_script.class_numbers(["1", "3", "0"], names) == [0, 2, 0]


def test_transparent_image_is_completed_over_background(named_run, drawn, tmp_path):
    Image.new("RGBA", (16, 12)).save(tmp_path / "clear.png")
    draw(named_run, "--complete", tmp_path / "clear.png")
    assert drawn[0][1][0][0].flatten(1).unique(dim=1).tolist() == [[32], [64], [96]]


def test_row_labels_fit_into_the_picture(tmp_path, monkeypatch):
    """Whatever they are called, drawn as they are written."""
    made, figure = [], sample_script.figures.Figure
    monkeypatch.setattr(sample_script.figures, "Figure", lambda **options: made.append(figure(**options)) or made[-1])
    names = ["Smileys & Emotion", "$x_{$", "ANIMALS & NATURE", "i"]
    rows = [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)] * 4
    sample_script.figures.save_samples(tmp_path / "a.png", rows, "samples", names)
    labels = made[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == names
    assert all(label.get_window_extent().x0 >= 0 for label in labels)


def test_flags_arrive_at_the_sampler(generating_run, monkeypatch):
    options, generate = [], sample_script.generate
    monkeypatch.setattr(sample_script, "generate", lambda *a, **o: (options.append(o), generate(*a, **o))[1])
    draw(generating_run, "--num=2", "--temperature=0.5", "--top-k=3", "--top-p=0.8", "--guidance=2.5", "--seed=7")
    (found,) = options
    assert {name: found[name] for name in ("temperature", "top_k", "top_p", "guidance")} == {
        "temperature": 0.5, "top_k": 3, "top_p": 0.8, "guidance": 2.5
    }  # fmt: skip
    assert found["generator"].initial_seed() == 7


def test_completions_belong_to_their_image(generating_run, drawn, monkeypatch, tmp_path):
    """The sampler here adds code 0 to the given ones, so that each completion is known."""

    def generate(prior, labels, given, **_):
        assert (labels == prior.classes).all()  # any class
        return torch.cat([given, given.new_zeros(len(given), prior.length - given.shape[1])], 1)

    monkeypatch.setattr(sample_script, "generate", generate)
    images = load_dataset("digits", "").test_images[:3]
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    out = tmp_path / "out"
    draw(generating_run, f"--out={out}", "--keep=0.99", "--complete", *(tmp_path / f"{i}.png" for i in range(3)))
    [(_, rows, *_)] = drawn
    model, _ = load_run(generating_run)
    codes = model.encode(to_pixels(images, "cpu"))[0]
    codes[:, -1, -1] = 0
    expected = (model.decode([codes]) * 255).round().to(torch.uint8)
    assert len(rows) == 3
    for row, image, made in zip(rows, images, expected):
        assert torch.equal(row[0], image) and len(row) == 9
        assert all((completion.int() - made.int()).abs().max() <= 1 for completion in row[1:])
    written = [np.asarray(Image.open(path)) for path in sorted(out.iterdir())]  # the completions alone
    assert np.array_equal(written, torch.cat([row[1:, 0] for row in rows]))


def test_failed_picture_is_not_reported_as_written(generating_run, tmp_path, capsys):
    (generating_run / "samples.png").mkdir()  # which no file can replace
    with pytest.raises(SystemExit) as ended:
        draw(generating_run, "--num=2", f"--out={tmp_path / 'images'}")
    printed, errors = capsys.readouterr()
    assert ended.value.code == 1 and errors.startswith("cannot write a picture")
    assert printed == f"wrote 2 images to {tmp_path / 'images'}\n"


def test_number_beyond_the_memory_is_refused(capsys, prior_run):
    assert "draw fewer at a time" in refusal(capsys, sample_script, "--run", prior_run, "--num=2147483647")


@pytest.mark.parametrize(("bytes_per_image", "fits"), [(8 + 8 * 49 + 784, True), (8 + 8 * 49 + 783, False)])
def test_memory_check_counts_labels_codes_and_pixels(prior_run, tmp_path, capsys, monkeypatch, bytes_per_image, fits):
    copy = shutil.copytree(prior_run, tmp_path / "results")
    monkeypatch.setattr("harness.machine.container_limit", lambda: 5 * bytes_per_image)
    if fits:
        draw(copy, "--num=5")
    else:
        assert "draw fewer at a time" in refusal(capsys, sample_script, "--run", copy, "--num=5")
