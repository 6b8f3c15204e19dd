import contextlib
import functools
import json
import shutil
import sys

from harness import figures
from harness.data import load_dataset, to_pixels
from harness.storage import load_checkpoint, read_state, write_state

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PROGRAMS, SMALL, ended, refusal, rows, same_run, save, started, train

import evaluate
import reconstruct
import train as script
from model import load_model
from quantizer import VectorQuantizer
from scales import MultiScaleQuantizer, parse_scales

K, D = 24, 6
SCALES = [[(1, 1), (2, 2), (4, 4), (8, 8)], [(1, 1), (2, 2), (4, 4), (7, 7)]]
SCALES += [[(1, 2), (3, 5)], [(2, 1), (2, 3), (5, 3)]]


def make(scales, **options):
    """A quantizer whose codebook has its start and whose convolutions are not the identity."""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(scales, K, D, **options)
    for parameter in quantizer.phi.parameters():
        torch.nn.init.normal_(parameter)
    quantizer(vectors(scales))
    return quantizer


def vectors(scales, n=5, seed=1):
    return torch.randn(n, D, *scales[-1], generator=torch.Generator().manual_seed(seed))


def algorithm_1(quantizer, z_e):
    """Quantize scale after scale as the paper writes it, one image and one vector at a time."""
    codebook, (height, width) = quantizer.codebook.detach(), z_e.shape[2:]
    maps = [[] for _ in quantizer.scales]
    for image in z_e:
        rest = image[None]
        for scale, (h, w) in enumerate(quantizer.scales):
            small = F.adaptive_avg_pool2d(rest, (h, w))
            chosen = [torch.cdist(vector[None], codebook).argmin() for vector in small[0].flatten(1).T]
            chosen = torch.stack(chosen).view(h, w)
            up = F.interpolate(codebook[chosen].permute(2, 0, 1)[None], (height, width), mode="bilinear")
            if scale < len(quantizer.phi):
                up = up + 0.1 * F.conv2d(up, quantizer.phi[scale].weight, quantizer.phi[scale].bias, padding=1)
            rest = rest - up
            maps[scale].append(chosen)
    return [torch.stack(chosen) for chosen in maps]


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_codes_match_algorithm_1(scales):
    quantizer, z_e = make(scales).eval(), vectors(scales, seed=2)
    with torch.no_grad():
        expected = algorithm_1(quantizer, z_e)
        for found in (quantizer(z_e).indices, quantizer.encode(z_e)):
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_upscaled_scales_add_up_to_the_decoders_input(scales, layout, n):
    quantizer = make(scales)
    before = MultiScaleQuantizer(scales, K, D)
    before.load_state_dict(quantizer.state_dict())  # training changes the codes after they are looked up
    z_q, indices, _, _ = quantizer(vectors(scales, n, seed=2).contiguous(memory_format=layout))
    assert [tuple(chosen.shape) for chosen in indices] == [(n, *size) for size in scales]
    assert torch.equal(z_q, before.lookup(indices))
    last = before.lookup([None] * (len(scales) - 1) + indices[-1:])
    assert torch.equal(last, before.codebook[indices[-1]].movedim(-1, 1))
    assert torch.equal(z_q, before.lookup(indices[:-1]) + last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ema", [False, True])
def test_one_scale_is_vector_quantizer_bit_for_bit(ema, layout):
    made = []
    for kind in (VectorQuantizer, functools.partial(MultiScaleQuantizer, [(3, 4)])):
        torch.manual_seed(0)
        quantizer, seen, revived = kind(K, D, ema=ema, decay=0.8, revive_below=0.2), [], 0
        optimizer = torch.optim.Adam([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], lr=0.1)
        for step in range(20):
            n = (1, 5, 2, 4, 3)[step % 5]  # 12 vectors start half of the codes; the next 60 start the others by k-means
            z_e = vectors([(3, 4)], n, seed=step).contiguous(memory_format=layout).requires_grad_()
            z_q, indices, codebook_loss, commitment_loss = quantizer(z_e)
            revived += int(quantizer.revived.sum())
            seen += [z_q, codebook_loss, commitment_loss]
            for chosen in (indices, quantizer.encode(z_e), quantizer.eval()(z_e).indices):
                seen += chosen if isinstance(chosen, list) else [chosen]
            quantizer.train()
            optimizer.zero_grad()
            ((z_q * z_q.detach()).sum() + codebook_loss + commitment_loss).backward()
            quantizer.reset_revived(optimizer)
            optimizer.step()
            seen += [z_e.grad, *(value.clone() for value in quantizer.state_dict().values())]
        assert revived
        made.append(seen)
    assert all(map(torch.equal, *made))


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_gradients_match_autograd(scales):
    """Of the formulas with the codes that were chosen; the toy decoder is a product with fixed numbers."""
    quantizer, factor = make(scales).eval(), vectors(scales, seed=3)
    z_e = vectors(scales, seed=2).requires_grad_()
    z_q, indices, codebook_loss, commitment_loss = quantizer(z_e)
    ((z_q * factor).sum() + 2 * codebook_loss + 3 * commitment_loss).backward()
    found = [z_e.grad, quantizer.codebook.grad, *(p.grad for p in quantizer.phi.parameters())]

    z, codebook = z_e.detach().clone().requires_grad_(), quantizer.codebook.detach().clone().requires_grad_()
    phi = [p.detach().clone().requires_grad_() for p in quantizer.phi.parameters()]
    total, learns, commits, count, phi_loss = torch.zeros_like(z), 0.0, 0.0, 0, 0.0
    for scale, chosen in enumerate(indices):
        d = F.adaptive_avg_pool2d(z - total.detach(), scales[scale])
        e = codebook[chosen].permute(0, 3, 1, 2)
        learns, commits = learns + (d.detach() - e).square().sum(), commits + (d - e.detach()).square().sum()
        count += d.numel()
        up = F.interpolate(e.detach(), scales[-1], mode="bilinear")
        if scale < len(scales) - 1:
            up = up + 0.1 * F.conv2d(up, *phi[2 * scale : 2 * scale + 2], padding=1)
        phi_loss = phi_loss + (z.detach() - total.detach() - up).square().mean()
        total = total + up
    torch.testing.assert_close(z_q, total)
    z_q = total.detach() + z - z.detach()
    ((z_q * factor).sum() + 2 * phi_loss + (2 * learns + 3 * commits) / count).backward()
    assert codebook_loss.item() == pytest.approx(learns.item() / count)  # phi's loss is a gradient alone
    for value, expected in zip(found, [z.grad, codebook.grad, *(p.grad for p in phi)], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ema", [False, True])
def test_reconstruction_loss_trains_the_encoder_alone(ema):
    quantizer, z_e = make(SCALES[1], ema=ema).eval(), vectors(SCALES[1]).requires_grad_()
    z_q = quantizer(z_e).z_q
    z_q.square().sum().backward()
    assert torch.equal(z_e.grad, 2 * z_q) and all(parameter.grad is None for parameter in quantizer.parameters())


@pytest.mark.parametrize("ema", [False, True])
def test_scales_leave_a_smaller_residual(ema):
    """Few codes for many vectors: the scales together leave less than one scale of the same codebook."""
    z_e = F.interpolate(torch.randn(64, D, 2, 2), (7, 7), mode="bicubic").requires_grad_()
    left = []
    for scales in ([(7, 7)], [(1, 1), (2, 2), (4, 4), (7, 7)]):
        quantizer = MultiScaleQuantizer(scales, K, D, ema=ema, decay=0.9)
        optimizer = torch.optim.Adam([*quantizer.parameters(), torch.zeros(1, requires_grad=True)], lr=1e-2)
        for _ in range(100):
            out = quantizer(z_e)
            optimizer.zero_grad()
            (out.codebook_loss + (out.z_q - z_e).square().mean()).backward()
            optimizer.step()
        left.append((quantizer.eval()(z_e).z_q - z_e).square().mean().item())
    assert left[1] < 0.7 * left[0]


def test_start_sees_the_residuals_of_all_scales():
    """With a code for each distinct residual, k-means leaves nothing over."""
    z_e = torch.randn(4, D, 4, 4)
    quantizer = MultiScaleQuantizer([(1, 1), (2, 2), (4, 4)], 4 * 21, D)
    assert quantizer(z_e).codebook_loss < 1e-10 and quantizer.all_initialised
    torch.testing.assert_close(quantizer.lookup(quantizer.eval().encode(z_e)), z_e, rtol=0, atol=1e-4)


def test_eval_mode_changes_nothing():
    quantizer = make(SCALES[1]).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(vectors(SCALES[1], seed=2))
    quantizer.train().encode(vectors(SCALES[1], seed=2))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_indices_do_not_depend_on_autocast():
    quantizer, z_e = make(SCALES[1]).eval(), vectors(SCALES[1]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z_e)
    assert all(map(torch.equal, mixed.indices, quantizer.encode(z_e.float()))) and mixed.z_q.dtype == torch.bfloat16


def test_sums_do_not_depend_on_autocast():
    quantizer = make(SCALES[1])
    indices = quantizer.encode(vectors(SCALES[1]))
    expected = quantizer.lookup(indices)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.lookup(indices), expected)


def test_convolutions_start_as_the_identity():
    quantizer = MultiScaleQuantizer(SCALES[1], K, D, kmeans_start=False)
    chosen = torch.randint(K, (3, 2, 2))
    expected = F.interpolate(quantizer.codebook[chosen].movedim(-1, 1), (7, 7), mode="bilinear")
    torch.testing.assert_close(quantizer.lookup([None, chosen]), expected)


def test_empty_batch_has_zero_losses():
    quantizer = make(SCALES[1])
    z_q, indices, codebook_loss, commitment_loss = quantizer(torch.zeros(0, D, 7, 7))
    assert z_q.shape == (0, D, 7, 7) and indices[1].shape == (0, 2, 2) and codebook_loss == commitment_loss == 0


def test_counts_are_of_all_scales():
    quantizer = make(SCALES[1])
    indices = quantizer.encode(vectors(SCALES[1]))
    expected = np.bincount(np.concatenate([chosen.flatten() for chosen in indices]), minlength=K)
    assert quantizer.count(indices).tolist() == expected.tolist() and expected.sum() == 5 * 70


def test_contexts_are_the_sums_before_each_scale():
    quantizer, z_e = make(SCALES[1]).eval(), vectors(SCALES[1])
    indices = quantizer.encode(z_e)
    contexts = quantizer.contexts(indices[:3], len(z_e))
    assert not contexts[0].any() and len(contexts) == 4
    for scale in (1, 2, 3):
        expected = F.adaptive_avg_pool2d(quantizer.lookup(indices[:scale]), SCALES[1][scale])
        torch.testing.assert_close(contexts[scale], expected)


def test_nan_is_refused_and_learnt_nowhere():
    quantizer, z_e = make(SCALES[1]), vectors(SCALES[1])
    before = quantizer.codebook.clone()
    z_e[0, 0, 3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        quantizer(z_e)
    assert torch.equal(quantizer.codebook, before)


def test_other_sizes_than_the_scales_are_refused():
    quantizer = make(SCALES[1])
    with pytest.raises(ValueError, match="z_e has 8x8 vectors, but the scales are 1x1, 2x2, 4x4, 7x7"):
        quantizer(torch.zeros(1, D, 8, 8))
    with pytest.raises(ValueError, match="got codes of 1x1, 3x3, but the scales are 1x1, 2x2"):
        quantizer.lookup([torch.zeros(1, n, n, dtype=torch.int64) for n in (1, 3)])
    for nothing in ([], [None], [None] * 4):
        with pytest.raises(ValueError, match="got codes of no scale, but"):
            quantizer.lookup(nothing)
    with pytest.raises(ValueError, match="the scales are"):
        quantizer.lookup([torch.zeros(1, n, n, dtype=torch.int64) for n in (1, 2, 4, 7, 7)])


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((7, 7), [(1, 1), (2, 2), (4, 4), (7, 7)]),
        ((16, 16), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16)]),
        ((3, 5), [(1, 1), (2, 2), (3, 4), (3, 5)]),
        ((1, 1), [(1, 1)]),
    ],
)
def test_auto_means_powers_of_two(grid, expected):
    assert parse_scales("auto", grid) == expected


def test_scales_are_read_as_typed():
    assert parse_scales("1,2x3,4", (4, 4)) == [(1, 1), (2, 3), (4, 4)]


@pytest.mark.parametrize("text", ["1,3x4", "1,2x5"])
def test_last_scale_is_the_whole_grid(text):
    with pytest.raises(ValueError, match="the last scale must be the grid of codes, 3x5"):
        parse_scales(text, (3, 5))


def test_run_leaves_pictures_and_measurements(scales_run):
    summary = json.loads((scales_run / "summary.json").read_text())
    assert 0 < summary["codes_used"] <= 32 and summary["perplexity"] > 1
    for name in ("recon_000010.png", "curves.png", "codebook.png"):
        assert (scales_run / name).stat().st_size > 0
    assert {"codebook_loss", "commitment_loss", "codes_used", "test_mse"} < rows(scales_run)[-1].keys()


def test_first_scales_decode_to_whole_images(scales_run):
    model = load_model(load_checkpoint(scales_run))
    x = to_pixels(load_dataset("digits").test_images[:6], "cpu")
    indices = model.encode(x)
    assert [tuple(chosen.shape[1:]) for chosen in indices] == [(1, 1), (2, 2), (4, 4), (7, 7)]
    with torch.no_grad():
        decoded = [model.decode(indices[: n + 1]) for n in range(4)]
        assert torch.equal(decoded[-1], model(x).x_recon.clamp(0, 1))
    assert all(images.shape == x.shape for images in decoded)
    assert ((decoded[-1] - x).square().mean()) < ((decoded[0] - x).square().mean())


@pytest.mark.parametrize("flag", ["--ema", "--precision=bfloat16"])
def test_resumes_bit_for_bit(tmp_path, stop_at, flag):
    flags = ["--scales=auto", "--steps=12", "--save-every=6", flag]
    train(tmp_path / "whole", *flags)
    stop_at(8, tmp_path / "halves", *flags)
    assert load_checkpoint(tmp_path / "halves")["progress"]["step"] == 8
    train(tmp_path / "halves", *flags)
    assert same_run(tmp_path / "whole", tmp_path / "halves")


def test_two_ranks_learn_as_one(tmp_path):
    program = [sys.executable, PROGRAMS / "scales_on_ranks.py"]
    places = [("0", "1"), ("0", "2"), ("1", "2")]  # rank, of how many
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started([*program, *place, tmp_path], stdout=None)) for place in places]
        assert [process.wait(120) for process in processes] == [0, 0, 0]
    for ema in (False, True):
        one, first, second = (torch.load(tmp_path / f"{name}-{ema}.pt") for name in ("1-0", "2-0", "2-1"))
        for step, state in enumerate(one):
            for name, value in state.items():
                assert torch.equal(first[step][name], second[step][name]), (ema, step, name)
                torch.testing.assert_close(first[step][name], value, rtol=1e-4, atol=1e-4)


def test_images_need_be_neither_square_nor_grey(tmp_path):
    for i in range(30):
        save(tmp_path / "photos" / f"{i}.png", (12, 20))
    train(tmp_path / "results", f"--dataset={tmp_path / 'photos'}", "--scales=1,2x3,3x5", "--steps=2")
    model = load_model(load_checkpoint(tmp_path / "results"))
    assert [chosen.shape for chosen in model.encode(torch.rand(2, 3, 12, 20))] == [(2, 1, 1), (2, 2, 3), (2, 3, 5)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scales=1,2,4,8"], "the last scale must be the grid of codes, 7x7"),
        (["--scales=1,4,2,7"], "scales must grow, but 2x2 comes after 4x4"),
        (["--scales=1,7,7"], "scales must grow, but 7x7 comes after 7x7"),
        (["--scales=1,2x3x4,7"], "must be auto, or sizes from coarse to fine"),
        (["--scales=0,7"], "must be auto, or sizes from coarse to fine"),
        (["--scales=fine"], "must be auto, or sizes from coarse to fine"),
        (["--scales=1,7", "--levels=2"], "--levels 2 and --scales cannot be combined"),
        (["--scales="], "argument --scales: must not be empty"),
    ],
)
def test_bad_scales_end_with_one_line(capsys, tmp_path, flags, message):
    with pytest.raises(SystemExit) as refused:
        train(tmp_path / "results", *flags)
    printed = capsys.readouterr().err
    assert refused.value.code == 2 and printed.count("\n") == 1 and message in printed
    assert not list((tmp_path / "results").glob("*.pt"))


def test_resuming_with_other_scales_is_refused(capsys, scales_run):
    with pytest.raises(SystemExit) as refused:
        script.parse_args([f"--resume={scales_run}", "--scales=1,7", "--steps=20"])
    assert refused.value.code == 2 and "leave out --scales" in capsys.readouterr().err


def test_checkpoints_from_before_scales_load(finished_run):
    checkpoint = load_checkpoint(finished_run)
    del checkpoint["args"]["scales"]
    assert load_model(checkpoint).scales == []


# What is made of a run


def test_reconstructions_show_a_row_per_scale(scales_run, tmp_path, monkeypatch):
    drawn, model = [], load_model(load_checkpoint(scales_run))
    monkeypatch.setattr(figures, "save_grid", lambda *args: drawn.append(args))
    images = load_dataset("digits").test_images[:5]
    figures.save_reconstructions(tmp_path / "recon.png", model, images, "title")
    [(_, rows, _, names)] = drawn
    assert names == ["original", "up to 1x1", "up to 2x2", "up to 4x4", "up to 7x7"]
    x = to_pixels(images, "cpu")
    indices = model.encode(x)
    with torch.no_grad():
        expected = [x, *(model.decode(indices[: n + 1]) for n in range(4))]
    assert all(map(torch.equal, rows, expected))


def test_codes_file_gives_the_same_images_back(scales_run, tmp_path, monkeypatch):
    for i in range(3):
        save(tmp_path / "mine" / f"{i}.png", (28, 28), "L")
    copy, titles, show_codes = shutil.copytree(scales_run, tmp_path / "results"), [], figures.show_codes
    monkeypatch.setattr(figures, "show_codes", lambda *args: (titles.append(args[3]), show_codes(*args)))

    def reconstructed(words, out):
        reconstruct.main(reconstruct.parse_args([f"--run={copy}", str(words), f"--out={out}"]))
        return [path.read_bytes() for path in sorted((out / "reconstructions").iterdir())]

    first = reconstructed(tmp_path / "mine", tmp_path / "out")
    assert titles[:4] == ["scale1 codes, 1x1", "scale2 codes, 2x2", "scale3 codes, 4x4", "scale4 codes, 7x7"]
    with np.load(tmp_path / "out" / "codes.npz", allow_pickle=False) as codes:
        assert [codes[f"indices_scale{n}"].shape for n in (1, 2, 3, 4)] == [(3, s, s) for s in (1, 2, 4, 7)]
        assert codes["bits_per_image"] == 70 * 5  # K = 32
    assert len(first) == 3 and reconstructed(f"--codes={tmp_path / 'out' / 'codes.npz'}", tmp_path / "again") == first


def test_refining_changes_the_finest_scale_alone(scales_run):
    model, images = load_model(load_checkpoint(scales_run)), list(load_dataset("digits").test_images[:6])
    (before, first), (after, refined) = (reconstruct.reconstruct(model, images, n) for n in (None, 4))
    for image, old, new, *maps in zip(images, first, refined, before, after):
        assert (new - image / 255).square().mean() < (old - image / 255).square().mean()
        assert [torch.equal(*pair) for pair in zip(*maps)] == [True, True, True, False]


def test_state_stays_in_float32(request):
    """Whatever the default is, and whatever the weights are that it is given."""
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    quantizer = MultiScaleQuantizer([(1, 1), (2, 2)], 8, 4)
    weights = {name: v.half() if v.is_floating_point() else v for name, v in quantizer.state_dict().items()}
    quantizer.load_state_dict(weights, assign=True)
    assert quantizer(torch.randn(5, 4, 2, 2)).z_q.dtype == torch.float64
    assert {value.dtype for value in quantizer.state_dict().values() if value.is_floating_point()} == {torch.float32}


def test_images_of_other_sizes_are_refused(scales_run, tmp_path, capsys):
    """And as codes, of which only the last scale could have grown."""
    save(tmp_path / "a.png", (32, 32), "L")
    copy, out = shutil.copytree(scales_run, tmp_path / "results"), tmp_path / "out"
    reconstruct.main(reconstruct.parse_args([f"--run={copy}", str(tmp_path / "a.png")]))
    assert "cropped 1 of 1 images to 28x28\n" in capsys.readouterr().out  # and no advice that would be refused
    printed = refusal(capsys, reconstruct, f"--run={copy}", tmp_path / "a.png", "--full-size", f"--out={out}")
    assert "z_e has 8x8 vectors, but the scales are 1x1, 2x2, 4x4, 7x7" in printed and not out.exists()
    maps = {f"indices_scale{n}": np.zeros((1, s, s), int) for n, s in ((1, 1), (2, 2), (3, 4), (4, 8))}
    facts = {"names": np.array(["a"]), "image_size": (32, 32), "model": load_checkpoint(copy)["digest"]}
    np.savez(tmp_path / "codes.npz", **maps, **facts)
    printed = refusal(capsys, reconstruct, f"--run={copy}", f"--codes={tmp_path / 'codes.npz'}", f"--out={out}")
    assert "the scales are 1x1, 2x2, 4x4, 7x7" in printed and not out.exists()


def test_evaluation_is_that_of_the_summary(scales_run, tmp_path):
    copy = shutil.copytree(scales_run, tmp_path / "results")
    evaluate.main(evaluate.parse_args([f"--run={copy}"]))
    found, summary = (json.loads((copy / name).read_text()) for name in ("evaluation.json", "summary.json"))
    assert all(found[name] == summary[name] for name in ("test_mse", "test_psnr", "perplexity", "codes_used"))


@pytest.mark.parametrize(
    "value", ["1,2,7", "1,2,4,8", "", "fine", 7, ["1"], "9" * 10**5, "auto,7"], ids=lambda value: repr(value)[:9]
)
def test_forged_scales_are_one_line(scales_run, tmp_path, capsys, value):
    copy = shutil.copytree(scales_run, tmp_path / "results")
    (copy / "checkpoint_previous.pt").unlink()
    state, _ = read_state(copy / "checkpoint.pt")
    state["args"]["scales"] = value
    write_state(copy / "checkpoint.pt", state)
    refusal(capsys, evaluate, f"--run={copy}")
    refusal(capsys, script, f"--resume={copy}", "--steps=20")


@pytest.mark.parametrize("name", ["codebook", "phi.0.weight", "phi.2.bias"])
def test_forged_weights_are_one_line(scales_run, tmp_path, capsys, name):
    copy = shutil.copytree(scales_run, tmp_path / "results")
    (copy / "checkpoint_previous.pt").unlink()
    state, _ = read_state(copy / "checkpoint.pt")
    state["model"][f"levels.0.quantizer.{name}"] = torch.zeros(3, 3)
    write_state(copy / "checkpoint.pt", state)
    assert "holds no VQ-VAE of this version" in refusal(capsys, evaluate, f"--run={copy}")


@pytest.mark.slow
def test_torchrun_matches_one_process(tmp_path):
    """Convolutions between scales included, which learn from a loss of their own."""
    flags, losses = ["--scales=auto", "--steps=20", "--precision=float32"], []
    train(tmp_path / "1", *flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    command += [*SMALL, *flags, f"--out-dir={tmp_path / '2'}"]
    ended(command, check=True)
    for ranks in ("1", "2"):
        losses.append([float(row["recon_loss"]) for row in rows(tmp_path / ranks)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
