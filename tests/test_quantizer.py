import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import program
from sklearn.cluster import KMeans

import quantizer
from quantizer import VectorQuantizer, nearest_code, perplexity

BOTH_WAYS = pytest.mark.parametrize("ema", [False, True], ids=["loss", "ema"])


def make(codebook=None, size=8, dim=4, **options):
    """A quantizer whose codebook is given or normal, without start and revival unless asked for."""
    torch.manual_seed(0)
    vq = VectorQuantizer(size, dim, **{"kmeans_start": False, "revive_below": 0.0} | options)
    vq.codebook.data.copy_(torch.randn(size, dim) if codebook is None else codebook)
    return vq


def brute_force(z_e, codebook):
    """Indices by looking at every code for every position, in float64; `min` keeps the first of a tie."""
    z = z_e.detach().movedim(1, -1).double()
    return (z.unsqueeze(-2) - codebook.detach().double()).square().sum(-1).min(-1).indices


def train_steps(vq, batches, optimizer=None):
    for z in batches:
        out = vq(z)
        if optimizer:
            optimizer.zero_grad()
            out.codebook_loss.backward()
            vq.reset_revived(optimizer)
            optimizer.step()


# Lookup


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 7), (3, 4, 5, 6), (2, 4, 3, 2, 5)])
def test_any_rank_gives_brute_forces_nearest_codes(shape):
    vq, z_e = make().eval(), torch.randn(shape)
    out = vq(z_e)
    assert out.indices.shape == (shape[0], *shape[2:]) and out.indices.dtype == torch.int64
    assert torch.equal(out.indices, brute_force(z_e, vq.codebook))
    assert torch.equal(out.z_q.movedim(1, -1), vq.codebook[out.indices])
    assert torch.equal(vq.encode(z_e), out.indices)
    assert torch.equal(vq.lookup(out.indices), out.z_q)


def test_channels_are_the_space_of_the_codes():
    z_e = torch.randn(16, 64, 32, 32)
    out = make(size=8, dim=64)(z_e)
    assert out.z_q.shape == z_e.shape and out.indices.numel() == 16 * 32 * 32
    assert out.codebook_loss.shape == out.commitment_loss.shape == ()


def test_ties_go_to_the_lowest_index():
    codebook = torch.tensor([[3.0], [1.0], [1.0], [-1.0], [-1.0]])
    z_e = torch.tensor([[1.0], [0.0], [2.0], [-5.0]])
    assert make(codebook, 5, 1)(z_e).indices.tolist() == [1, 1, 0, 3]


def test_ties_among_many_codes_go_lowest_too():
    few = torch.randn(90, 8)
    codebook = few[torch.randint(90, (700,))]  # each code several times, near and far
    z = torch.cat([codebook[torch.randperm(700)], torch.randn(300, 8)])
    assert torch.equal(nearest_code(z, codebook), brute_force(z, codebook))


@pytest.mark.parametrize("offset", [0, 100, 2**20, -(2**30)])
@pytest.mark.parametrize("unit", [2.0**-10, 1.0, 2.0**10])
def test_exact_ties_far_away_go_lowest(offset, unit):
    """Equal codes, and vectors halfway between two codes: all of these numbers are exact in float32."""
    step = max(1, abs(offset) // 2**20)  # the spacing of float32 near the offset, halves included
    few = torch.randint(-3, 4, (40, 3)).float()
    codebook = few[torch.randint(40, (150,))]
    halfway = (codebook[torch.randint(150, (100,))] + codebook[torch.randint(150, (100,))]) / 2
    z = torch.cat([codebook, halfway, torch.randint(-9, 10, (100, 3)) / 2])
    z, codebook = (unit * (offset + step * values) for values in (z, codebook))
    assert (nearest_code(z, codebook) == brute_force(z, codebook)).all()


@pytest.mark.parametrize(("size", "dim"), [(512, 64), (8192, 64), (65_536, 8)])
def test_large_codebooks_are_searched_exactly(size, dim):
    z, codebook = torch.randn(40, dim), torch.randn(size, dim)
    assert torch.equal(nearest_code(z, codebook), brute_force(z, codebook))


def test_memory_layout_does_not_change_the_result():
    vq, z_e = make().eval(), torch.randn(3, 4, 5, 6)
    assert torch.equal(vq(z_e.contiguous(memory_format=torch.channels_last)).indices, vq(z_e).indices)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_squares_may_leave_the_range_of_float32(scale):
    z_e, codebook = torch.randn(50, 4) * scale, torch.randn(8, 4) * scale
    assert torch.equal(make(codebook).eval()(z_e).indices, brute_force(z_e, codebook))


@pytest.mark.parametrize(("z_scale", "code_scale"), [(1e-20, 1.0), (1e20, 1.0), (1.0, 1e20)])
def test_vectors_and_codes_may_differ_in_scale(z_scale, code_scale):
    z, codebook = torch.randn(50, 4), torch.randn(8, 4) * code_scale
    z[:25] *= z_scale
    assert torch.equal(nearest_code(z, codebook)[25:], brute_force(z[25:], codebook))
    assert nearest_code(z, codebook).max() < 8


@pytest.mark.parametrize("offset", [10.0, 1000.0])
def test_vectors_far_from_the_origin_are_told_apart(offset):
    z_e, codebook = offset + torch.randn(50, 4) * 0.01, offset + torch.randn(8, 4) * 0.01
    assert torch.equal(make(codebook).eval()(z_e).indices, brute_force(z_e, codebook))


def test_chunks_give_the_indices_of_one_product(monkeypatch):
    z, codebook = torch.randn(1000, 16), torch.randn(300, 16)
    monkeypatch.setattr(quantizer, "LOOKUP_ELEMENTS", 10**9)
    whole = nearest_code(z, codebook)
    for elements in (1, 300 * 7, 300 * 64):
        monkeypatch.setattr(quantizer, "LOOKUP_ELEMENTS", elements)
        assert torch.equal(nearest_code(z, codebook), whole)


def test_lookup_memory_stays_far_below_all_distances():
    """16,384 x 65,536 distances would be 4 GiB; the process may grow by a tenth of that."""
    assert int(program("lookup_memory.py", check=True).stdout) < 400 * 2**20


def test_autocast_leaves_the_lookup_in_float32():
    vq, z_e = make(size=64).eval(), torch.randn(512, 4)
    expected = vq(z_e)
    with torch.autocast("cpu", torch.bfloat16):
        out = vq(z_e)
    assert torch.equal(out.indices, expected.indices) and torch.equal(out.codebook_loss, expected.codebook_loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_z_q_has_the_dtype_of_z_e(dtype):
    vq, z_e = make().eval(), torch.randn(20, 4, dtype=dtype)
    out = vq(z_e)
    assert out.z_q.dtype == dtype and out.codebook_loss.dtype == torch.float32
    assert torch.equal(out.indices, brute_force(z_e, vq.codebook))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@BOTH_WAYS
def test_cast_quantizer_keeps_its_codebook_in_float32(ema, dtype, train):
    """Whoever casts a whole model casts the quantizer with it: it computes in float32 all the same."""
    options = {"ema": ema, "kmeans_start": train, "revive_below": 0.1, "size": 16}
    plain, cast = (make(**options).train(train) for _ in range(2))
    torch.nn.Sequential(cast).to(dtype)
    for _ in range(2):  # in train mode k-means, then updates and revival
        z_e = torch.randn(40, 4, 3).to(dtype).requires_grad_()
        random = torch.get_rng_state()
        expected = plain(z_e.detach().float())
        torch.set_rng_state(random)
        out = cast(z_e)
        assert out.z_q.dtype == dtype and torch.equal(out.indices, expected.indices)
        assert out.codebook_loss.dtype == out.commitment_loss.dtype == torch.float32
        assert torch.equal(out.commitment_loss, expected.commitment_loss)
        (out.z_q.float().square().sum() + out.codebook_loss + out.commitment_loss).backward()
        assert z_e.grad.dtype == dtype and z_e.grad.isfinite().all()
    assert cast.codebook.dtype == cast.ema_counts.dtype == torch.float32 and cast.started.dtype == torch.int64
    assert all(torch.equal(a, b) for a, b in zip(cast.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@BOTH_WAYS
def test_default_dtype_leaves_the_codebook_in_float32(ema, dtype, request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(dtype)
    vq = VectorQuantizer(16, 4, ema=ema, revive_below=0.5)
    for _ in range(3):  # k-means, then updates and revival
        out = vq(torch.randn(40, 4))
    assert out.z_q.dtype == dtype and out.codebook_loss.dtype == torch.float32
    assert vq.codebook.dtype == vq.ema_counts.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@BOTH_WAYS
def test_loaded_codebook_stays_in_float32(ema, dtype, assign):
    """The weights themselves are not changed, and float32 weights are assigned as they are."""
    vq, z_e = make(ema=ema), torch.randn(20, 4)
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in vq.state_dict().items()}
    weights["codebook"] = codebook = torch.randn(8, 4).to(dtype)
    vq.load_state_dict(weights, assign=assign)
    assert vq.codebook.dtype == vq.ema_counts.dtype == torch.float32 and codebook.dtype == dtype
    assert isinstance(vq.codebook, torch.nn.Parameter) and vq.codebook.requires_grad or ema
    assert (vq.codebook.data_ptr() == codebook.data_ptr()) == (assign and dtype == torch.float32)
    assert torch.equal(vq.codebook, codebook.float()) and weights["codebook"] is codebook
    assert torch.equal(vq(z_e).indices, brute_force(z_e, codebook))


@BOTH_WAYS
def test_codes_loaded_alone_are_kept(ema):
    """K-means would replace them."""
    vq = VectorQuantizer(8, 4, ema=ema, decay=0.5, revive_below=0)
    codebook = torch.randn(8, 4)
    vq.load_state_dict({"codebook": codebook}, strict=False)
    vq(codebook[:5])  # with EMA, codes move to the mean of vectors that equal them
    assert torch.equal(vq.codebook, codebook)


def test_codes_of_another_size_do_not_count_as_loaded():
    """Whoever catches the error still gets k-means."""
    vq = VectorQuantizer(8, 4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        vq.load_state_dict({"codebook": torch.randn(5, 4)}, strict=False)
    vq(torch.randn(100, 4))
    assert vq.started == 8 and vq.codebook.std() > 0.3  # not the uniform codes of the start


def test_quantizer_loaded_in_inference_mode_learns():
    vq = VectorQuantizer(8, 4)
    with torch.inference_mode():
        vq.load_state_dict(VectorQuantizer(8, 4).state_dict())
    vq(torch.randn(100, 4)).codebook_loss.backward()
    vq.reset_revived(torch.optim.Adam(vq.parameters()))


def test_state_of_another_device_takes_all_buffers_along():
    """The meta device stands for a GPU."""
    vq = VectorQuantizer(8, 4)
    vq.load_state_dict(VectorQuantizer(8, 4).to("meta").state_dict(), assign=True)
    assert {tensor.device.type for tensor in [*vq.parameters(), *vq.buffers()]} == {"meta"}


@BOTH_WAYS
def test_quantizer_made_without_memory_learns(ema):
    """On "meta", then given a state or memory: it does as one made at once."""
    options, batches = {"ema": ema, "decay": 0.5, "revive_below": 0.9}, torch.randn(20, 16, 4)
    torch.manual_seed(0)
    expected = VectorQuantizer(8, 4, **options)
    with torch.device("meta"):
        loaded, empty = VectorQuantizer(8, 4, **options), VectorQuantizer(8, 4, **options)
    loaded.load_state_dict(copy.deepcopy(expected.state_dict()), assign=True)
    empty.to_empty(device="cpu")
    for value in (*empty.parameters(), *empty.buffers()):  # new memory holds anything
        value.data.fill_(77)
    torch.manual_seed(0)
    empty.reset_parameters()
    assert not empty.revived.any()
    for vq in (expected, loaded, empty):
        torch.manual_seed(1)
        revived = 0
        for z in batches:
            vq(z)
            revived += int(vq.revived.sum())
        assert revived
        for name, value in expected.state_dict().items():
            assert torch.equal(vq.state_dict()[name], value)


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # the compiler's own
@BOTH_WAYS
def test_compiled_quantizer_steps_like_the_eager_one(ema):
    eager, compiled = make(size=512, dim=64, ema=ema), make(size=512, dim=64, ema=ema)
    call = torch.compile(compiled)
    for _ in range(2):  # the second meets the codebook that the first has moved
        z_e = torch.randn(4, 64, 7, 7).contiguous(memory_format=torch.channels_last)
        out, expected = call(z_e), eager(z_e)
        assert torch.equal(out.indices, expected.indices)
        torch.testing.assert_close((out.z_q, compiled.codebook), (expected.z_q, eager.codebook))  # fused, rounded once


# Gradients


def test_straight_through_copies_the_gradient_unchanged():
    z_e, weight = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5)
    (make()(z_e).z_q * weight).sum().backward()
    assert torch.equal(z_e.grad, weight)


def test_straight_through_is_exact_in_float64():
    """To the last bit: float32, in which the codes are compared, would keep half of the digits."""
    vq = make().double()
    z_e, weight = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind()
    z_e.requires_grad_()
    out = vq(z_e)
    (out.z_q * weight).sum().backward()
    assert torch.equal(z_e.grad, weight) and not torch.equal(weight.float().double(), weight)
    assert torch.equal(out.z_q.float(), vq.lookup(out.indices))


def test_losses_are_the_mean_squared_distances():
    vq, z_e = make(), torch.randn(3, 4, 5)
    out = vq(z_e)
    expected = F.mse_loss(vq.codebook[brute_force(z_e, vq.codebook)].movedim(-1, 1), z_e)
    torch.testing.assert_close((out.codebook_loss, out.commitment_loss), (expected, expected))


def test_codebook_gradient_matches_torch_losses():
    vq, z_e = make(), torch.randn(30, 4)
    vq(z_e).codebook_loss.backward()
    weight = vq.codebook.detach().clone().requires_grad_()
    F.mse_loss(F.embedding(brute_force(z_e, weight), weight), z_e).backward()
    torch.testing.assert_close(vq.codebook.grad, weight.grad)


def test_each_loss_moves_one_thing():
    vq, z_e = make(), torch.randn(30, 4, requires_grad=True)
    out = vq(z_e)
    assert torch.autograd.grad(out.z_q.square().sum(), vq.codebook, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(out.codebook_loss, z_e, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(out.commitment_loss, vq.codebook, allow_unused=True) == (None,)


def test_beta_scales_the_encoders_gradient_alone():
    def gradients(beta):
        vq, z_e = make(), torch.randn(30, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = vq(z_e)
        (out.codebook_loss + beta * out.commitment_loss).backward()
        return z_e.grad, vq.codebook.grad

    (z_one, code_one), (z_quarter, code_quarter) = gradients(1.0), gradients(0.25)
    assert torch.equal(z_quarter, 0.25 * z_one) and torch.equal(code_quarter, code_one)
    assert z_one.abs().sum() > 0 and code_one.abs().sum() > 0


# Moving averages


def test_ema_follows_the_papers_two_averages():
    vq = make(ema=True, decay=0.9)
    counts, sums = torch.ones(8).double(), vq.codebook.double().clone()
    for _ in range(30):
        z = torch.randn(40, 4)
        assigned = F.one_hot(brute_force(z, vq.codebook), 8).double()
        counts = 0.9 * counts + 0.1 * assigned.sum(0)
        sums = 0.9 * sums + 0.1 * assigned.T @ z.double()
        vq(z)
        torch.testing.assert_close(vq.codebook.double(), sums / counts[:, None], rtol=1e-4, atol=1e-5)


def test_ema_moves_only_the_code_that_was_hit():
    vq = make(ema=True)
    before = vq.codebook.clone()
    vq(before[3] + 0.01 * torch.randn(100, 4))
    moved = (vq.codebook - before).abs().amax(1)
    assert moved[3] > 0 and moved[torch.arange(8) != 3].max() == 0


def test_unused_ema_code_stays_through_2000_steps():
    vq = make(ema=True)
    far = vq.codebook[0] = torch.full((4,), 50.0)
    z = torch.randn(16, 4)
    for _ in range(2000):
        vq(z)
    assert torch.equal(vq.codebook[0], far) and vq.codebook.isfinite().all()


def test_ema_codebook_has_no_gradient():
    vq = make(ema=True)
    out = vq(torch.randn(10, 4))
    assert not list(vq.parameters()) and not out.codebook_loss.requires_grad


@BOTH_WAYS
def test_output_is_the_codebook_from_before_the_update(ema):
    vq, z_e = make(ema=ema, revive_below=0.5), torch.randn(50, 4)
    before = vq.codebook.detach().clone()
    out = vq(z_e)
    assert torch.equal(out.z_q, before[out.indices])


# Start


def test_start_is_k_means_of_the_first_batch():
    z = torch.randn(2000, 4)
    vq = make(size=32, kmeans_start=True)
    assert not vq.started
    loss = vq(z).codebook_loss
    reference = KMeans(32, n_init=1, random_state=0).fit(z.numpy())
    assert loss < 1.1 * reference.inertia_ / z.numel()
    assert vq.count(vq.encode(z)).min() > 0


@BOTH_WAYS
def test_kmeans_start_spans_several_small_batches(ema):
    vq = make(size=20, kmeans_start=True, ema=ema)
    batches = torch.randn(4, 6, 4)
    for i, z in enumerate(batches):
        out = vq(z)
        assert vq.started == min(20, 6 * (i + 1))
        assert i == 3 or torch.equal(out.z_q, z)  # each vector is a code by then
        assert out.indices.max() < vq.started


def test_uninitialised_codes_are_never_chosen():
    vq = make(kmeans_start=True, size=8)
    vq(torch.tensor([[5.0] * 4, [9.0] * 4]))
    assert vq.eval()(torch.randn(100, 4) * 10).indices.max() == 1


def test_codes_without_k_means_are_uniform():
    """In [-1/K, 1/K]."""
    codes = VectorQuantizer(50, 40, kmeans_start=False).codebook * 50
    assert 0.99 < codes.max() <= 1 and -1 <= codes.min() < -0.99 and codes.mean().abs() < 0.05


def test_start_keeps_codes_of_empty_clusters():
    """Two codes start from a first batch that lies far from the second, of which k-means then finds no member."""
    vq, far = make(size=4, kmeans_start=True), 1000 + torch.randn(2, 4)
    vq(far)
    vq(torch.randn(50, 4))
    assert vq.started == 4 and sorted(map(tuple, vq.codebook[:2].tolist())) == sorted(map(tuple, far.tolist()))
    assert vq.codebook.isfinite().all() and vq.codebook[2:].abs().max() < 10


def test_start_takes_equal_vectors_once():
    z = torch.cat([torch.zeros(500, 4), torch.randn(20, 4)])
    vq = make(size=16, kmeans_start=True)
    vq(z)
    assert len(vq.codebook.unique(dim=0)) == 16


# Revival


@BOTH_WAYS
def test_dead_codes_come_back_into_use(ema):
    vq = make(ema=ema, revive_below=0.1, size=16)
    vq.codebook.data[8:] += 100  # out of reach
    optimizer = None if ema else torch.optim.Adam(vq.parameters(), lr=1e-3)
    train_steps(vq, torch.randn(400, 64, 4), optimizer)
    assert vq.count(vq.encode(torch.randn(5000, 4))).min() > 0
    assert vq.codebook.abs().max() < 10


@BOTH_WAYS
def test_revived_code_survives_the_optimizers_step(ema):
    vq = make(ema=ema, revive_below=0.1)
    optimizer = None if ema else torch.optim.Adam(vq.parameters(), lr=0.1)
    train_steps(vq, torch.randn(20, 64, 4), optimizer)  # momentum for every code
    vq.ema_counts[5], vq.codebook.data[5] = 0.0, 1000.0
    z = torch.randn(64, 4)
    train_steps(vq, [z], optimizer)
    assert (vq.codebook[5] == z).all(1).any()
    if optimizer:
        state = optimizer.state[vq.codebook]
        assert state["exp_avg"][5].abs().sum() == 0 and state["exp_avg_sq"][5].abs().sum() == 0
        assert state["exp_avg"].abs().sum() > 0
        vq.codebook.grad = None
    before = vq.codebook[5].detach().clone()
    train_steps(vq, [z[(vq.encode(z) != 5)]], optimizer)  # a step that does not hit it
    assert torch.equal(vq.codebook[5], before)


def test_reset_clears_only_revived_codes_once():
    """All those since the last reset, though they were revived in several batches."""
    vq = make(revive_below=0.5, size=4, decay=0.5)
    optimizer = torch.optim.Adam(vq.parameters())
    (vq.codebook * torch.arange(1.0, 5.0)[:, None]).sum().backward()
    optimizer.step()
    moments = optimizer.state[vq.codebook]["exp_avg"]
    before = moments.clone()
    vq.revived[1] = True
    vq.ema_counts.copy_(torch.tensor([1.0, 1.0, 1e-3, 1.0]))
    vq(vq.codebook.detach()[[0, 1, 3]])  # revives code 2
    vq.reset_revived(optimizer)
    assert torch.equal(moments, before * torch.tensor([1.0, 0.0, 0.0, 1.0])[:, None])
    moments.copy_(before)
    vq.reset_revived(optimizer)
    assert torch.equal(moments, before)


def test_each_distinct_vector_revives_one_code():
    """As far as there are dead codes."""
    vq = make(revive_below=0.5, size=8, codebook=10.0 + torch.arange(8.0)[:, None].expand(8, 4))
    vq.ema_counts[1:] = 1e-9
    z = torch.tensor([[1.0] * 4, [2.0] * 4, [2.0] * 4, [3.0] * 4])
    vq(z)
    assert vq.revived.sum() == 3
    assert vq.codebook[vq.revived][:, 0].sort().values.tolist() == [1, 2, 3]


def test_revived_codes_differ_from_each_other():
    vq = make(revive_below=0.1, size=16)
    vq.ema_counts[1:] = 0.0
    z = torch.cat([torch.zeros(56, 4), torch.randn(8, 4)])
    vq(z + vq.codebook[0].detach() + 0.01)  # all hit code 0
    assert len(vq.codebook.unique(dim=0)) == 16  # nine distinct vectors moved nine codes, the others wait


@BOTH_WAYS
def test_code_that_the_batch_uses_stays(ema):
    """Even if it was never used before."""
    vq = make(ema=ema, revive_below=0.5, size=3, codebook=torch.tensor([[0.0] * 4, [10.0] * 4, [20.0] * 4]))
    vq.ema_counts[1:] = 0.0
    z = torch.cat([torch.randn(50, 4), torch.full((1, 4), 10.0)])  # one vector is that of code 1
    vq(z)
    assert vq.revived.tolist() == [False, False, True]
    assert torch.equal(vq.codebook[1].detach(), z[-1]) and (vq.codebook[2] == z).all(1).any()


@pytest.mark.parametrize("share", [0.03, 0.3, 0.9])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_revival_threshold_is_share_of_mean_count(share, scale):
    vq = make(revive_below=share, size=64, dim=4, decay=0.9)
    vq.ema_counts.copy_(scale * torch.rand(64))
    z = torch.randn(100, 4) / 2
    used = vq.count(vq.encode(z))
    counts = 0.9 * vq.ema_counts + 0.1 * used
    dead = (used == 0) & (counts < share * counts.mean())
    vq(z)
    assert torch.equal(vq.revived, dead) and 0 < dead.sum() < 64
    torch.testing.assert_close(vq.ema_counts, counts.where(~dead, counts.mean()))  # time to find users


def test_revival_can_be_switched_off():
    vq = make(ema=True)
    vq.codebook[4:] += 100
    before = vq.codebook[4:].clone()
    train_steps(vq, torch.randn(500, 64, 4))
    assert torch.equal(vq.codebook[4:], before)


# State


@BOTH_WAYS
def test_eval_mode_and_encode_change_nothing(ema):
    vq = make(ema=ema, kmeans_start=True, revive_below=0.5)
    before = copy.deepcopy(vq.state_dict())
    vq.encode(torch.randn(100, 4))
    vq.eval()(torch.randn(100, 4))
    after = vq.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@BOTH_WAYS
def test_saved_quantizer_goes_on_bit_for_bit(ema):
    def new():
        vq = make(size=32, ema=ema, kmeans_start=True, revive_below=0.2)
        return vq, None if ema else torch.optim.Adam(vq.parameters(), lr=1e-2)

    batches = torch.randn(60, 20, 4)  # fewer vectors than codes: the start takes two batches
    for cut in (1, 30):
        vq, optimizer = new()
        train_steps(vq, batches, optimizer)
        first, first_optimizer = new()
        train_steps(first, batches[:cut], first_optimizer)
        random = torch.get_rng_state()
        second, second_optimizer = new()
        second.load_state_dict(first.state_dict())
        if not ema:
            second_optimizer.load_state_dict(first_optimizer.state_dict())
        torch.set_rng_state(random)
        train_steps(second, batches[cut:], second_optimizer)
        assert all(torch.equal(a, b) for a, b in zip(vq.state_dict().values(), second.state_dict().values()))


@BOTH_WAYS
def test_partial_initialisation_loads_into_initialised_quantizer(ema):
    half, whole = make(size=20, kmeans_start=True, ema=ema), make(size=20, kmeans_start=True, ema=ema)
    half(torch.randn(6, 4))
    whole(torch.randn(100, 4))
    whole.load_state_dict(half.state_dict())
    whole(torch.randn(100, 4))
    assert whole.started == 20 and len(whole.codebook.unique(dim=0)) == 20


@BOTH_WAYS
def test_step_never_waits_for_a_gpu(ema):
    """The meta device has no values: to ask it for one, which is what the host would wait for, is an error."""
    vq = VectorQuantizer(32, 4, ema=ema, kmeans_start=False).to("meta")
    optimizer = torch.optim.Adam([*vq.parameters(), torch.nn.Parameter(torch.zeros(1, device="meta"))])
    z_e = torch.randn(2, 4, 3, 3, device="meta", requires_grad=True)
    for _ in range(2):
        out = vq(z_e)
        (out.z_q.sum() + out.codebook_loss + out.commitment_loss).backward()
        vq.reset_revived(optimizer)
        optimizer.step()
    assert vq.count(out.indices).shape == (32,)
    with pytest.raises(RuntimeError):
        bool(out.codebook_loss)


# Usage


def test_perplexity_of_closed_forms():
    assert perplexity(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])).item() == pytest.approx(1)
    assert perplexity(torch.tensor([2, 1, 1])).item() == pytest.approx(2**1.5)


def test_code_without_count_stays():
    """An EMA count that has decayed to zero must not make the code NaN."""
    vq = make(ema=True, decay=0.0)
    before = vq.codebook.clone()
    vq(before[:1])
    assert torch.equal(vq.codebook[1:], before[1:])


def test_counts_of_batches_add_up():
    vq, z = make(), torch.randn(99, 4)
    parts = sum(vq.count(vq.encode(part)) for part in z.split(10))
    assert torch.equal(parts, vq.count(vq.encode(z))) and parts.sum() == 99


def test_start_and_revival_are_on_by_default():
    vq = VectorQuantizer(8, 4)
    assert vq.started == 0 and vq.revive_below > 0 and not vq.ema


# Bad input


@BOTH_WAYS
def test_empty_batch_gives_empties_and_changes_nothing(ema):
    vq = make(ema=ema, kmeans_start=True)
    before = copy.deepcopy(vq.state_dict())
    out = vq(torch.empty(0, 4, 7, 7, requires_grad=True))
    assert out.z_q.shape == (0, 4, 7, 7) and out.indices.shape == (0, 7, 7)
    assert out.codebook_loss == out.commitment_loss == 0
    (out.z_q.sum() + out.codebook_loss + out.commitment_loss).backward()
    assert all(torch.equal(before[k], v) for k, v in vq.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_refused_and_poisons_nothing(value):
    for vq in (make(ema=True), make(ema=True, kmeans_start=True)):
        before = copy.deepcopy(vq.state_dict())
        z = torch.randn(10, 4)
        z[3, 2] = value
        with pytest.raises(FloatingPointError, match="1 of 40 values of z_e are NaN or infinite"):
            vq(z)
        assert all(torch.equal(before[k], v) for k, v in vq.state_dict().items())


def test_wrong_input_says_what_was_needed():
    vq = make()
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) but needs \(B, 4, ...\)"):
        vq(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match="int64 but must be floating point"):
        vq(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 to 8, but the codes are 0 to 7"):
        vq.lookup(torch.tensor([[0, 8]]))
    with pytest.raises(ValueError, match="indices are torch.float32, but must be int32 or int64"):
        vq.lookup(torch.zeros(2, 3))


@pytest.mark.parametrize("options", [{"codebook_size": 0}, {"code_dim": -1}, {"decay": 1.0}, {"revive_below": 2.0}])
def test_impossible_sizes_and_rates_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        VectorQuantizer(**{"codebook_size": 8, "code_dim": 4} | options)


def test_vectors_of_equal_sums_revive_a_code_each():
    """They are told apart by their projections, which weigh each dimension differently."""
    vq = make(revive_below=0.5, size=8, codebook=10.0 + torch.arange(8.0)[:, None].expand(8, 4))
    vq.ema_counts[1:] = 1e-9
    vq(torch.eye(4))
    assert vq.revived.sum() == 4


def test_nearest_code_takes_tensors_with_gradients():
    z, codebook = torch.randn(9, 4, requires_grad=True), torch.nn.Parameter(torch.randn(8, 4))
    assert torch.equal(nearest_code(z, codebook), torch.cdist(z, codebook).argmin(1))
