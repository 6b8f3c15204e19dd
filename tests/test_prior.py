import pytest
import torch
import torch.nn.functional as F
from conftest import far_from_zero, some_codes

from model import VQVAE
from prior import Block, Prior, build_prior, code_offsets, filter_logits, generate, load_prior

K = 16
GRIDS = [[(3, 3)], [(2, 4)], [(1, 2), (2, 4)]]


@pytest.fixture(params=GRIDS, ids=str)
def prior(request):
    torch.manual_seed(0)
    return far_from_zero(Prior(K, request.param, classes=3, width=16, depth=2, heads=2))


def test_attention_in_bfloat16_is_close_to_float32(prior):
    codes, labels = some_codes(prior)
    expected = prior(codes, labels)
    with torch.autocast("cpu", torch.bfloat16):
        close = prior(codes, labels).float()
    assert 0 < (close - expected).abs().max() < 0.05 * expected.abs().max()


def test_attention_is_that_of_torch():
    """In a block whose network is silent."""
    block, x, bias = Block(16, 2, dropout=0), torch.randn(3, 5, 16), torch.randn(2, 5, 5)
    bias[:, 1, 4] = -torch.inf
    torch.nn.init.zeros_(block.mlp[2].weight)
    torch.nn.init.zeros_(block.mlp[2].bias)
    q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in block.to_qkv(block.norm1(x)).chunk(3, 2))
    attended = F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block(x, bias), x + block.from_heads(attended))


def test_attention_has_gradients_on_other_devices():
    """There it is PyTorch's kernel; the meta device has shapes only."""
    block, x = Block(16, 2, dropout=0).to("meta"), torch.randn(3, 5, 16, device="meta")
    bias = torch.zeros(2, 5, 5, device="meta", requires_grad=True)
    block(x, bias).sum().backward()
    assert bias.grad.shape == (2, 5, 5) and block.to_qkv.weight.grad.shape == (48, 16)


def test_attention_bias_depends_on_the_offset_alone():
    """Between codes of one grid; between those of two grids it is always the same."""
    places = [(g, y, x) for g, (h, w) in enumerate([(1, 3), (2, 4)]) for y in range(h) for x in range(w)]
    numbers = {}
    for row, (grid, y, x) in zip(code_offsets([(1, 3), (2, 4)]).tolist(), places, strict=True):
        for number, (other, y2, x2) in zip(row, places, strict=True):
            offset = (grid, y - y2, x - x2) if grid == other else None
            assert numbers.setdefault(offset, number) == number
    assert sorted(numbers.values()) == list(range(1 + 5 + 3 * 7))
    prior = Prior(4, [(1, 3), (2, 4)], classes=0, width=8, heads=2)
    assert prior.offset_bias.shape == (len(numbers), 4 * 2) and not prior.offset_bias.any()


def test_codes_are_predicted_from_those_before_alone(prior):
    codes, labels = some_codes(prior)
    logits = prior(codes, labels)
    assert logits.shape == (5, prior.length, K)
    for position in range(prior.length):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % K
        after = prior(changed, labels)
        assert torch.equal(after[:, : position + 1], logits[:, : position + 1])
        later = (after[:, position + 1 :] != logits[:, position + 1 :]).flatten(2).any(-1)
        assert later.all()  # each of them has seen it


@torch.no_grad()
def test_each_level_embeds_its_own_codes():
    """The logits after both top codes do not depend on the embeddings of bottom codes; those after that do."""
    prior = far_from_zero(Prior(K, [(1, 2), (2, 4)], classes=3, width=16, depth=2, heads=2))
    codes, labels = some_codes(prior)
    before = prior(codes, labels)
    prior.code.weight[K:] = torch.randn(K, 16)
    after = prior(codes, labels)
    assert torch.equal(after[:, :3], before[:, :3]) and (after != before)[:, 3:].flatten(2).any(-1).all()


def test_near_codes_start_with_near_embeddings():
    prior, codebooks = Prior(K, [(1, 2), (2, 4)], classes=3, width=240), [torch.randn(K, 8), 5 + 3 * torch.randn(K, 4)]
    prior.init_from_codebooks(codebooks)
    for codebook, coming_in, head in zip(codebooks, prior.code.weight.split(K), prior.heads):
        expected = torch.pdist(codebook)
        for weight in (coming_in, head.weight):  # a random projection keeps distances, but for their scale
            assert torch.corrcoef(torch.stack([torch.pdist(weight), expected]))[0, 1] > 0.9
            assert weight.std().item() == pytest.approx(0.05, rel=0.2)


@pytest.mark.parametrize("silent", ["from_heads", "mlp.2"])
def test_dropout_differs_from_image_to_image(silent):
    """In attention and in the network: the other one is silent."""
    prior = Prior(K, [(2, 4)], classes=3, width=24, depth=1, dropout=0.5)
    for parameter in prior.blocks[0].get_submodule(silent).parameters():
        torch.nn.init.zeros_(parameter)
    codes, labels = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, dtype=torch.int64)
    assert not torch.equal(*prior(codes, labels)) and torch.equal(*prior.eval()(codes, labels))


def test_weights_start_small():
    prior = Prior(K, [(2, 4)], classes=3, width=48)
    for module in (prior.blocks[0].to_qkv, prior.position):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_loads_the_best_prior_in_eval_mode():
    args, shape = {"width": 24, "depth": 1, "heads": 3, "dropout": 0.3}, {"codebook_size": K, "grids": [(2, 4)]}
    shape["classes"] = 3
    model = VQVAE(1, (8, 16), codebook_size=K, code_dim=4, width=8, blocks=1)
    best, last = (build_prior(args, shape, model) for _ in range(2))
    checkpoint = {"args": args, "identity": {"shape": shape}, "model": last.state_dict()}
    loaded = load_prior(checkpoint | {"best": {"model": best.state_dict()}}, model)
    assert all(map(torch.equal, loaded.parameters(), best.parameters()))
    assert not loaded.training and [block.dropout for block in loaded.blocks] == [0.3]


def test_stays_causal_when_trained(prior):
    codes, labels = some_codes(prior)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(prior(codes, labels).flatten(0, 1), codes.flatten()).backward()
        optimizer.step()
    logits = prior(codes, labels)
    for position in range(prior.length):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % K
        assert torch.equal(prior(changed, labels)[:, : position + 1], logits[:, : position + 1])


def test_every_code_depends_on_the_label(prior):
    codes, labels = some_codes(prior)
    assert (prior(codes, labels) != prior(codes, (labels + 1) % 4)).flatten(2).any(-1).all()


def test_images_do_not_depend_on_batch_mates(prior):
    codes, labels = some_codes(prior)
    alone = torch.cat([prior(codes[i : i + 1], labels[i : i + 1]) for i in range(len(codes))])
    torch.testing.assert_close(prior(codes, labels), alone, rtol=0, atol=1e-4)


def test_cached_steps_give_the_logits_of_the_whole(prior):
    codes, labels = some_codes(prior)
    caches = prior.caches(len(codes))
    steps = [prior.step(codes[:, :at], labels, caches) for at in range(prior.length)]
    torch.testing.assert_close(torch.cat(steps, 1), prior(codes, labels), rtol=0, atol=1e-4)


def test_levels_have_embeddings_and_heads_of_their_own():
    assert torch.equal(Prior(4, [(1, 2), (2, 4)], 0).level_at, torch.tensor([0] * 2 + [1] * 8))
    one, two = Prior(4, [(2, 2)], 0, width=8, heads=2), Prior(4, [(1, 1), (2, 2)], 0, width=8, heads=2)
    grown = sum(p.numel() for p in two.parameters()) - sum(p.numel() for p in one.parameters())
    assert grown == 4 * 8 + (4 * 8 + 4) + 8 + 8 + 4 * 2  # codes, head, level, a position and an offset more


def test_blocks_share_no_weights():
    sizes = [
        sum(p.numel() for p in Prior(4, [(2, 2)], 2, width=8, depth=depth, heads=2).parameters()) for depth in (1, 2, 3)
    ]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 12 * 8 * 8


def test_learns_and_draws_a_sequence_per_class():
    prior = Prior(K, [(3, 3)], classes=4, width=32, depth=2, heads=2)
    codes, labels = torch.randint(K, (4, 9)), torch.arange(4)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(prior(codes, labels).flatten(0, 1), codes.flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    assert torch.equal(generate(prior.eval(), labels, temperature=1e-6), codes)
    assert torch.equal(generate(prior, labels.flip(0), temperature=1e-6), codes.flip(0))


def likeliest(prior, labels, logits_of):
    """Draw greedily without caches: the whole sequence again for each code."""
    codes = torch.zeros(len(labels), prior.length, dtype=torch.int64)
    for at in range(prior.length):
        codes[:, at] = logits_of(codes)[:, at].argmax(-1)
    return codes


def test_temperature_near_zero_takes_the_likeliest_code(prior):
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.equal(generate(prior, labels, temperature=1e-6), likeliest(prior, labels, lambda c: prior(c, labels)))


def test_top_k_of_one_takes_the_likeliest_code(prior):
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.equal(generate(prior, labels, top_k=1), generate(prior, labels, temperature=1e-6))


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guidance_goes_from_any_class_to_one(prior, guidance):
    labels = torch.tensor([0, 1, 2])
    any_class = torch.full_like(labels, 3)

    def guided(codes):
        return (1 - guidance) * prior(codes, any_class) + guidance * prior(codes, labels)

    drawn = generate(prior, labels, guidance=guidance, temperature=1e-6)
    assert torch.equal(drawn, likeliest(prior, labels, guided))


def test_given_codes_are_kept_and_continued(prior):
    codes, labels = some_codes(prior)
    drawn = generate(prior, labels, given=codes[:, :4], temperature=1e-6)
    assert torch.equal(drawn[:, :4], codes[:, :4])
    next_code = prior(drawn, labels)[:, 4].argmax(-1)
    assert torch.equal(drawn[:, 4], next_code)
    assert torch.equal(generate(prior, labels, given=codes), codes)


def test_codes_are_drawn_as_often_as_their_probability(prior):
    labels = torch.zeros(20_000, dtype=torch.int64)
    drawn = generate(prior, labels, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn[:, 0], minlength=K) / len(labels)
    expected = prior(drawn[:1], labels[:1])[0, 0].softmax(-1)
    torch.testing.assert_close(share, expected, rtol=0, atol=0.015)


def test_a_seed_fixes_what_is_drawn(prior):
    labels = torch.arange(4).repeat(8)
    a, b, c = (generate(prior, labels, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_temperature_must_be_above_zero(prior, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}, but must be above 0"):
        generate(prior, torch.tensor([0]), temperature=temperature)


@pytest.mark.parametrize("options", [{"temperature": 1e-320}, {"temperature": 1e30}, {"top_p": 1e-320}])
def test_extreme_options_draw_codes_still(prior, options):
    assert generate(prior, torch.tensor([0, 1]), **options).max() < K


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.7), (0, 1e-9), (4, 0.5), (K, 0.999)])
def test_only_the_likeliest_codes_are_drawn_from(top_k, top_p):
    logits = torch.randn(50, K, generator=torch.Generator().manual_seed(0))
    for row, restricted in zip(logits, filter_logits(logits, top_k, top_p)):
        kept = sorted(range(K), key=lambda code: -row[code])[: top_k or K]
        share = row[kept].double().softmax(0)
        kept = {code for i, code in enumerate(kept) if share[:i].sum() < top_p}
        assert {code for code in range(K) if restricted[code] > -torch.inf} == kept
        assert all(restricted[code] == row[code] for code in kept)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width is 10, but must be a multiple of heads, 4"):
        Prior(K, [(2, 2)], 0, width=10, heads=4)
