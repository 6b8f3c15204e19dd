import json
import shutil

from harness.data import load_dataset
from harness.storage import load_checkpoint

import numpy as np
import pytest
import torch

import evaluate
import train
from model import VQVAE, Decoder, Encoder, PixelShuffle, ResidualBlock, build_model, level_key, load_model


def make(channels=1, size=(28, 28), **options):
    torch.manual_seed(0)
    model = VQVAE(channels, size, codebook_size=16, code_dim=8, width=16, blocks=1, kmeans_start=False, **options)
    for level in model.levels:
        torch.nn.init.normal_(level.quantizer.codebook)
    return model


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (30, 17), (1, 5)])
def test_reconstructions_have_the_shape_of_images(channels, size):
    model, x = make(channels, size).eval(), torch.rand(2, channels, *size)
    x_recon, (quantized,) = model(x)
    grid = (-(-size[0] // 4), -(-size[1] // 4))
    assert x_recon.shape == x.shape and quantized.indices.shape == (2, *grid)
    (indices,) = model.encode(x)
    assert torch.equal(indices, quantized.indices)
    assert torch.equal(model.decode([indices]), x_recon.clamp(0, 1))


def test_residual_block_starts_as_the_identity():
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(ResidualBlock(8)(x), x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixel_shuffle_matches_torch_but_for_channels(memory_format):
    x = torch.randn(2, 12, 3, 5).to(memory_format=memory_format)
    reordered = x.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(PixelShuffle()(x), torch.nn.PixelShuffle(2)(reordered))


@pytest.mark.parametrize("levels", [1, 2])
def test_reconstruction_teaches_every_encoder(levels):
    """Straight through the codes."""
    model = make(levels=levels)
    model(torch.rand(2, 1, 28, 28)).x_recon.square().sum().backward()
    for level in model.levels:
        assert all(p.grad.abs().max() > 0 for p in level.encoder[1].parameters())


def test_largest_features_have_half_the_width():
    """Where there are several sizes of features."""
    for stride, widths in ((2, [10]), (4, [5, 10]), (16, [5, 10, 10, 10]), (2, [1]), (4, [1, 1])):
        encoder = Encoder(3, widths[-1], 1, stride)
        assert [layer.out_channels for layer in encoder if isinstance(layer, torch.nn.Conv2d)] == widths
    assert Decoder(4, 3, 10, 1, 4)[-2].in_channels == 5


def test_starting_until_all_codebooks_are_initialised():
    model = make(levels=2)
    assert not model.starting
    for level in model.levels:
        level.quantizer.all_initialised = False
        assert model.starting
        level.quantizer.all_initialised = True


@pytest.mark.parametrize("levels", [1, 2])
def test_step_never_waits_for_a_gpu(levels):
    """The meta device has no values to wait for; asking it for one is an error."""
    model = make(levels=levels).to("meta", memory_format=torch.channels_last).train()
    x_recon, quantized = model(torch.rand(2, 1, 28, 28, device="meta"))
    sum([x_recon.sum(), *(level.codebook_loss + level.commitment_loss for level in quantized)]).backward()


@pytest.mark.parametrize("downsample", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("levels", [1, 2])
def test_each_level_has_a_code_per_its_stride(downsample, levels):
    model, x = make(3, (64, 40), downsample=downsample, levels=levels).eval(), torch.rand(2, 3, 64, 40)
    top = downsample * 2 ** (levels - 1)
    padded = (-(-64 // top) * top, -(-40 // top) * top)
    strides = [top, downsample][-levels:]
    indices = model.encode(x)
    assert [level.shape for level in indices] == [(2, padded[0] // s, padded[1] // s) for s in strides]
    x_recon, quantized = model(x)
    assert all(torch.equal(a, b.indices) for a, b in zip(indices, quantized, strict=True))
    torch.testing.assert_close(model.decode(indices), x_recon.clamp(0, 1))
    assert model.decode(indices, padded).shape == (2, 3, *padded)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("size", [(28, 28), (30, 17), (1, 5)])
def test_grids_are_the_shapes_of_codes(size, levels):
    model = make(levels=levels).eval()
    assert model.grids(size) == [level.shape[1:] for level in model.encode(torch.rand(2, 1, *size))]


def test_top_codes_reach_bottom_codes_and_image():
    """arXiv 1906.00446, section 3.1: the bottom codes are chosen with what the top codes are decoded to at hand."""
    model, x = make(size=(32, 32), levels=2).eval(), torch.rand(4, 1, 32, 32)
    top, bottom = model.encode(x)
    image = model.decode([top, bottom])
    assert not torch.equal(model.decode([(top + 1) % 16, bottom]), image)
    assert not torch.equal(model.decode([top, (bottom + 1) % 16]), image)
    z_e = model.z_e(x)[1]
    model.levels[0].quantizer.codebook.data.neg_()
    assert not torch.equal(model.z_e(x)[1], z_e)


def test_absent_level_is_decoded_as_average_code():
    model, x = make(size=(30, 20), levels=2).eval(), torch.rand(2, 1, 30, 20)
    top, bottom = model.encode(x)
    quantizer = model.levels[0].quantizer
    quantizer.ema_counts.copy_(torch.arange(16.0))
    image = model.decode([None, bottom])
    assert torch.equal(model.decode([None, bottom], (30, 20)), image) and image.shape == x.shape
    expected = (torch.arange(16.0) / 120) @ quantizer.codebook
    torch.testing.assert_close(model.levels[0].average_code(2, 4, 3)[1, :, 2, 1], expected)
    quantizer.ema_counts.zero_()[5] = 1
    torch.testing.assert_close(model.decode([torch.full_like(top, 5), bottom]), model.decode([None, bottom]))


@pytest.mark.parametrize("levels", [[], ["bottom"], [None, None], ["bottom"] * 4], ids=str)
def test_decode_refuses_indices_of_other_levels(levels):
    model = make(size=(16, 16), levels=2)
    indices = [level and torch.zeros(1, 4, 4, dtype=torch.int64) for level in levels]
    with pytest.raises(ValueError, match=f"got indices of {levels.count('bottom')} levels, but the model has 2"):
        model.decode(indices)


def test_odd_strides_are_refused():
    for downsample in (1, 3, 0):
        with pytest.raises(ValueError, match="must be a power of two"):
            make(downsample=downsample)


def test_other_numbers_of_levels_are_refused():
    for levels in (0, 3):
        with pytest.raises(ValueError, match="must be 1 or 2"):
            make(levels=levels)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cast_model_encodes_and_decodes(dtype, levels):
    """Its codebooks stay in float32."""
    model = make(levels=levels, mean=0.5).eval().to(dtype)
    x = torch.rand(2, 1, 28, 28, dtype=dtype)
    x_recon, quantized = model(x)
    assert all(map(torch.equal, model.encode(x), (level.indices for level in quantized)))
    assert torch.equal(model.decode(model.encode(x)), x_recon.clamp(0, 1)) and x_recon.dtype == torch.float32


def test_statistics_may_be_float64():
    """As numpy's are."""
    model = make(mean=np.float64(0.5), std=torch.tensor([0.25], dtype=torch.float64))
    assert model(torch.rand(2, 1, 28, 28)).x_recon.dtype == torch.float32


def test_decode_crops_to_the_size_asked_for():
    model, indices = make(), [torch.randint(16, (3, 7, 8))]
    whole = model.decode(indices)
    assert whole.shape == (3, 1, 28, 32)
    assert torch.equal(model.decode(indices, size=(25, 30)), whole[:, :, :25, :30])


@pytest.mark.parametrize("levels", [1, 2])
def test_padding_and_cropping_are_right_and_bottom(levels):
    """Images are padded by their last pixels to whole codes, and cropped from there."""
    model, x = make(size=(30, 17), levels=levels).eval(), torch.rand(2, 1, 30, 17)
    height, width = (32, 20) if levels == 1 else (32, 24)
    padded = torch.cat([x, x[:, :, :, -1:].expand(-1, -1, -1, width - 17)], 3)
    padded = torch.cat([padded, padded[:, :, -1:].expand(-1, -1, height - 30, -1)], 2)
    indices = model.encode(x)
    assert all(torch.equal(*pair) for pair in zip(indices, model.encode(padded)))
    whole = model.decode(indices, (height, width))
    assert torch.equal(model.decode(indices), whole[:, :, :30, :17])
    assert torch.equal(model(x).x_recon, model(padded).x_recon[:, :, :30, :17])


def test_mnist_default_has_49_codes_of_512():
    model = VQVAE(1, (28, 28))
    assert [level.shape for level in model.encode(torch.rand(2, 1, 28, 28))] == [(2, 7, 7)]
    assert model.levels[0].quantizer.codebook.shape == (512, 64)


def measured(model):
    """Read what train.py's flags decide from the model's layers and from what a step changes."""
    level = model.levels[-1]
    codebook = level.quantizer.codebook
    code = model.encode(torch.zeros(1, 1, 64, 64))[-1]
    found = {"codebook_size": len(codebook), "code_dim": codebook.shape[1], "width": level.to_code[1].in_channels}
    found |= {"blocks": sum(isinstance(module, ResidualBlock) for module in level.encoder), "levels": len(model.levels)}
    found |= {"downsample": 64 // code.shape[-1], "ema": not isinstance(codebook, torch.nn.Parameter)}
    found |= {"kmeans_start": level.quantizer.started.item() == 0}
    level.quantizer.started.fill_(len(codebook))
    counts = level.quantizer.ema_counts.clone()
    level.quantizer.train()(codebook[:1].detach())  # only the first code is used
    found["decay"] = round((level.quantizer.ema_counts[1] / counts[1]).item(), 4)
    return found | {"revive_below": level.quantizer.revive_below}


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--codebook-size=9", "codebook_size", 9),
        ("--code-dim=6", "code_dim", 6),
        ("--width=12", "width", 12),
        ("--blocks=3", "blocks", 3),
        ("--levels=2", "levels", 2),
        ("--downsample=8", "downsample", 8),
        ("--ema", "ema", True),
        ("--decay=0.75", "decay", 0.75),
        ("--no-kmeans-start", "kmeans_start", False),
        ("--revive-below=0.125", "revive_below", 0.125),
    ],
)
def test_every_flag_arrives_in_the_model(flag, name, value):
    """And changes nothing else; the first level is measured."""
    small = ["--codebook-size=8", "--code-dim=4", "--width=8", "--blocks=1", "--downsample=4"]
    plain, other = (build_model(vars(train.parse_args([*small, *flags])), (1, 64, 64)) for flags in ([], [flag]))
    before, after = measured(plain), measured(other)
    if name == "levels":  # the features of the level above join its own
        before["width"] = after["width"] = 0
    assert before[name] != value and after == before | {name: value}


def test_loaded_model_matches_the_run(finished_run):
    checkpoint = load_checkpoint(finished_run)
    model = load_model(checkpoint)
    assert not model.training
    assert all(torch.equal(value, checkpoint["model"][name]) for name, value in model.state_dict().items())
    assert model.levels[0].quantizer.codebook.shape == (32, 8) and model.image_size == (28, 28)
    measured, _ = evaluate.evaluate(model, load_dataset("digits").test_images)
    assert measured["test_mse"] == pytest.approx(json.loads((finished_run / "summary.json").read_text())["test_mse"])


def test_figures_of_two_levels_are_named():
    assert level_key("perplexity", "") == "perplexity" and level_key("perplexity", "top") == "perplexity_top"
    assert [VQVAE(1, (8, 8), levels=levels).level_names for levels in (1, 2)] == [("",), ("top", "bottom")]


def test_each_block_has_its_own_weights():
    def size(module):
        return sum(p.numel() for p in module.parameters())

    for part in (lambda blocks: Encoder(1, 16, blocks, 4), lambda blocks: Decoder(8, 1, 16, blocks, 4)):
        sizes = [size(part(blocks)) for blocks in (1, 2, 3)]
        assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 16 * 16 * 9 + 16 + 16 * 16 + 16


def test_output_does_not_depend_on_batch_mates():
    model, x = make().eval(), torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(model(x).x_recon[:1], model(x[:1]).x_recon)


def test_network_sees_and_makes_normalised_images():
    """Shifting and scaling the pixels together with mean and std changes nothing but the pixels."""
    x = torch.rand(2, 1, 28, 28)
    model = make(mean=0.3, std=0.5)
    moved = make(mean=0.3 * 0.5 + 0.1, std=0.25)
    torch.testing.assert_close(moved(x * 0.5 + 0.1).x_recon, model(x).x_recon * 0.5 + 0.1)


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 28, 28\), but the model needs \(B, 1, H, W\)"):
        make()(torch.rand(2, 3, 28, 28))


@pytest.mark.parametrize("levels", [1, 2])
def test_all_parameters_learn(levels):
    model = make(levels=levels)
    for block in (module for module in model.modules() if isinstance(module, ResidualBlock)):
        torch.nn.init.normal_(block[-1].weight, std=0.1)  # it starts at zero, and what is before it waits a step
    x_recon, quantized = model(torch.rand(4, 1, 28, 28))
    (x_recon.square().mean() + sum(level.codebook_loss + level.commitment_loss for level in quantized)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_bfloat16_changes_reconstructions_by_rounding_alone():
    model, x = make().eval(), torch.rand(8, 1, 28, 28)
    for block in (module for module in model.modules() if isinstance(module, ResidualBlock)):
        torch.nn.init.normal_(block[-1].weight, std=0.1)
    indices = model.encode(x)  # the same for both: of two codes at like distances rounding may choose either
    expected = model.decode(indices)
    with torch.autocast("cpu", torch.bfloat16):
        close = model.decode(indices)
    assert 0 < (close - expected).abs().max() < 0.02


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_model_steps_like_the_eager_one():
    models, x = [], torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        torch.manual_seed(0)
        models.append(VQVAE(1, (28, 28), codebook_size=32, code_dim=8, width=8, blocks=1))
    calls = models[0], torch.compile(models[1], fullgraph=True)
    for step in range(3):
        indices = []
        for model, call in zip(models, calls):
            torch.manual_seed(step)  # of the start from k-means
            with torch.compiler.set_stance("default" if step else "force_eager"):
                x_recon, (level,) = call(x)
            model.zero_grad()
            ((x_recon - x).square().mean() + level.codebook_loss + 0.25 * level.commitment_loss).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            indices.append(level.indices)
        assert torch.equal(*indices)
    torch.testing.assert_close(list(models[1].parameters()), list(models[0].parameters()))


@pytest.mark.parametrize(("stride", "blocks"), [(2, 0), (2, 2), (4, 1), (8, 2)])
def test_pixels_depend_on_codes_within_reach_alone(stride, blocks):
    decoder, codes = Decoder(3, 1, 4, blocks, stride), torch.randn(1, 3, 15, 15)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    changed = codes.clone()
    changed[:, :, 7, 7] += 1
    rows = (decoder(codes) != decoder(changed))[0, 0].any(1).nonzero()
    assert 7 - rows.min() // stride <= decoder.reach and rows.max() // stride - 7 <= decoder.reach
