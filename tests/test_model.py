import pytest
import torch

from model import VQVAE, Decoder, Encoder


def make(channels=1, size=(28, 28), **options):
    torch.manual_seed(0)
    model = VQVAE(channels, size, codebook_size=16, code_dim=8, width=16, blocks=1, kmeans_start=False, **options)
    torch.nn.init.normal_(model.quantizer.codebook)
    return model


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (30, 17), (1, 5)])
def test_any_channels_and_size_come_back_as_they_went_in(channels, size):
    model, x = make(channels, size).eval(), torch.rand(2, channels, *size)
    out = model(x)
    grid = (-(-size[0] // 4), -(-size[1] // 4))
    assert out.x_recon.shape == x.shape and out.indices.shape == (2, *grid)
    assert torch.equal(model.encode(x), out.indices)
    assert torch.equal(model.decode(out.indices), out.x_recon.clamp(0, 1))


def test_decode_crops_to_the_size_asked_for():
    model = make()
    assert model.decode(torch.zeros(3, 7, 8, dtype=torch.int64), size=(25, 30)).shape == (3, 1, 25, 30)


def test_mnist_default_has_49_codes_of_512():
    model = VQVAE(1, (28, 28))
    assert model.encode(torch.rand(2, 1, 28, 28)).shape == (2, 7, 7)
    assert model.quantizer.codebook.shape == (512, 64)


def test_each_block_has_its_own_weights():
    def size(module):
        return sum(p.numel() for p in module.parameters())

    for part in (Encoder, Decoder):
        sizes = [size(part(1, 8, 16, blocks)) for blocks in (1, 2, 3)]
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


def test_all_parameters_learn():
    model = make()
    for block in (m for m in model.modules() if type(m).__name__ == "ResidualBlock"):
        torch.nn.init.normal_(block[-1].weight, std=0.1)  # it starts at zero, and what is before it waits a step
    out = model(torch.rand(4, 1, 28, 28))
    (out.x_recon.square().mean() + out.codebook_loss + out.commitment_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
