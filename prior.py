"""A transformer over a VQ-VAE's codes: the prior that new images are drawn from, code by code or scale by scale.

Shapes: B batch, T codes per image (all levels or scales, the top one first, each row by row), K codebook_size
    codes   (B, T) int64
    labels  (B,) int64              a label equal to the number of classes means "any class"
    logits  (B, T, K)               of each code, given the label and the codes drawn before it

Source: prior over the codes, arXiv 1711.00937, section 3.3 (there a PixelCNN); next-scale prediction, arXiv 2404.02905,
section 3.2; guidance, arXiv 2207.12598, equation 6.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm transformer block: self-attention and a two-layer network, each with a residual connection."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, bias: Tensor, cache: Tensor | None = None) -> Tensor:
        """Map (B, n, width) to the same shape.

        Args:
            bias: (heads, n, t), added to the scores of attention; -inf where a position must not attend.
            cache: keys and values (2, B, heads, T, width / heads). x then holds the last n of t positions; the cache
                supplies those before them.
        """
        q, k, v = self.to_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = bias.shape[-1]
            cache[:, :, :, end - x.shape[1] : end] = torch.stack([k, v])
            k, v = cache[:, :, :, :end]
        bias = bias.to(q.dtype)
        if x.is_cpu:  # in bfloat16 faster in training than PyTorch's kernels, in float32 as fast
            attended = torch.add(bias, q @ k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, bias)
        x = x + self._drop(self.from_heads(attended.transpose(1, 2).flatten(2)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, x):  # one mask for all positions: on a CPU, one per position would take a fifth of the time
        return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), self.dropout) if self.training and self.dropout else x


class Prior(nn.Module):
    """Autoregressive model of an image's codes, one after another, with or without its class.

    Args:
        codebook_size: K.
        grids: (h, w) of the codes of each level or scale, top first.
        classes: number of classes; 0 for data without labels.
        width, depth, heads: of the transformer.
        dropout: share of a block's channels dropped in train mode.
    """

    def __init__(
        self,
        codebook_size: int,
        grids: list[tuple[int, int]],
        classes: int,
        width: int = 192,
        depth: int = 4,
        heads: int = 6,
        dropout: float = 0.0,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, but must be a multiple of heads, {heads}")
        self.codebook_size, self.grids, self.classes = codebook_size, [tuple(grid) for grid in grids], classes
        self.sizes = [height * width for height, width in grids]  # codes of each level
        self.length = sum(self.sizes)
        self.step_sizes = [1] * self.length  # how many codes are drawn at once
        self.label = nn.Embedding(classes + 1, width)
        self.code = nn.Embedding(len(grids) * codebook_size, width)  # K for each level
        self.level, self.position = nn.Embedding(len(grids), width), nn.Embedding(self.length, width)
        # Attention gets a learnt bias for each offset between two codes (arXiv 2103.14030, equation 4).
        self.register_buffer("offsets", code_offsets(grids), persistent=False)  # (T, T)
        count = 1 + sum((2 * h - 1) * (2 * w - 1) for h, w in grids)
        self.offset_bias = nn.Parameter(torch.zeros(count, depth * heads))
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        self.register_buffer("mask", causal, persistent=False)  # (T, T), True: may attend
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, codebook_size) for _ in grids)  # one per level
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        level_at = [level for level, size in enumerate(self.sizes) for _ in range(size)]
        self.register_buffer("level_at", torch.tensor(level_at), persistent=False)  # (T,)

    @torch.no_grad()
    def init_from_codebooks(self, codebooks: list[Tensor]):
        """Initialise the code embeddings and output heads from a random projection of the codebooks.

        Codes that are near one another then have similar embeddings from the first step on.

        Args:
            codebooks: (K, D) of each level or scale.
        """
        for level, (codebook, head) in enumerate(zip(codebooks, self.heads)):
            codes = codebook - codebook.mean(0)
            projection = torch.randn(codes.shape[1], head.in_features, device=codes.device) / codes.shape[1] ** 0.5
            projection *= 0.05 / codes.square().mean().sqrt().clamp(min=1e-6)
            head.weight.copy_(codes @ projection)
            self._init_inputs(level, projection, head.weight)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Return the logits (B, T, K) of codes (B, T), each from the label and the codes drawn before it."""
        x = self._inputs(codes[:, : -self.step_sizes[-1]], labels) + self._position_embeddings()
        for block, bias in zip(self.blocks, self._attention_biases(0, self.length)):
            x = block(x, bias)
        parts = self.norm(x).split(self.sizes, 1)
        return torch.cat([head(part) for head, part in zip(self.heads, parts)], 1)

    def caches(self, batch: int) -> list[Tensor]:
        """Return empty caches of keys and values for `step`, one per block."""
        heads, width = self.blocks[0].heads, self.label.embedding_dim
        weight = self.label.weight
        return [weight.new_zeros(2, batch, heads, self.length, width // heads) for _ in self.blocks]

    def step(self, codes: Tensor, labels: Tensor, caches: list[Tensor]) -> Tensor:
        """Return the logits (B, n, K) of the n codes to draw next, as `forward` would, but compute n positions only.

        Args:
            codes: (B, t), those drawn so far.
            caches: keys and values from the steps before this one.
        """
        at = codes.shape[1]
        x = self._inputs(codes, labels, at)
        end = at + x.shape[1]
        x = x + self._position_embeddings()[at:end]
        for block, bias, cache in zip(self.blocks, self._attention_biases(at, end), caches):
            x = block(x, bias, cache)
        level = sum(at >= size for size in itertools.accumulate(self.sizes))
        return self.heads[level](self.norm(x))

    def whole_steps(self, count: int) -> int:
        """Return `count` codes rounded down to whole steps: single codes, or whole scales."""
        return max(end for end in itertools.accumulate(self.step_sizes, initial=0) if end <= count)

    def _inputs(self, codes, labels, at=0):  # embed the positions from `at` on whose preceding codes are given
        first = max(0, at - 1)
        x = self.code(codes[:, first:] + self.codebook_size * self.level_at[first : codes.shape[1]])
        return x if at else torch.cat([self.label(labels)[:, None], x], 1)

    def _init_inputs(self, level, projection, embeddings):  # (D, width), (K, width)
        self.code.weight[level * self.codebook_size :][: self.codebook_size] = embeddings

    def _position_embeddings(self):  # (T, width)
        return self.level(self.level_at) + self.position.weight

    def _attention_biases(self, at, end):  # of the positions from `at` to `end`, (depth, heads, end - at, end)
        # Not by indexing, whose gradient on a CPU differs from run to run with several threads.
        biases = F.embedding(self.offsets[at:end, :end], self.offset_bias).movedim(-1, 0).contiguous()
        biases = biases.masked_fill(~self.mask[at:end, :end], -torch.inf)
        return biases.unflatten(0, (len(self.blocks), -1))


class ScalePrior(Prior):
    """Model of an image's codes from coarse to fine: all codes of a scale at once, given the scales before it.

    The input of a scale is the sum of the codes so far, resized to it. A position attends to its own scale and to those
    before it.

    Args:
        quantizer: the `MultiScaleQuantizer` whose codes these are; it is frozen, and not saved with the prior.
        options: arguments of `Prior`; the grids are the scales.
    """

    def __init__(self, quantizer: nn.Module, **options):
        super().__init__(**options)
        self.contexts, self.step_sizes = quantizer.contexts, self.sizes
        self.mask = self.level_at[:, None] >= self.level_at
        self.code = nn.Linear(quantizer.code_dim, self.label.embedding_dim)  # embeds a sum of codes, not an index

    def _inputs(self, codes, labels, at=0):
        drawn = sum(codes.shape[1] >= end for end in itertools.accumulate(self.sizes))  # number of scales
        maps = [part.unflatten(1, grid) for part, grid in zip(codes.split(self.sizes[:drawn], 1), self.grids)]
        sums = torch.cat([context.flatten(2) for context in self.contexts(maps, len(codes))], 2)  # (B, D, t + n)
        return self.code(sums.movedim(1, -1)[:, at:]) + self.label(labels)[:, None]

    def _init_inputs(self, level, projection, embeddings):  # of sums of codes; the finest scale overwrites the others
        self.code.weight.copy_(projection.T)


def code_offsets(grids: list[tuple[int, int]]) -> Tensor:
    """Number the offsets (rows, columns) between codes of one grid: (T, T) int64, 0 for codes of different grids."""
    blocks, first = [], 1
    for height, width in grids:
        y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
        rows, columns = y[:, None] - y + height - 1, x[:, None] - x + width - 1
        blocks.append(first + rows * (2 * width - 1) + columns)
        first += (2 * height - 1) * (2 * width - 1)
    return torch.block_diag(*blocks)


@torch.inference_mode()
def generate(
    prior: Prior,
    labels: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    given: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Tensor:
    """Draw the codes (B, T) of new images, one step after another.

    Args:
        labels: (B,), the class of each image.
        temperature: divides the logits; near 0 the likeliest code is taken.
        top_k: draw from this many likeliest codes; 0: from all.
        top_p: draw from the likeliest codes whose probabilities add up to this.
        guidance: scale of classifier-free guidance; 0: logits without the class, 1: with it, above 1: beyond.
        given: the first codes (B, t), which are kept.
        progress: takes the steps and yields them again; it may show how many are done.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0; near 0 the likeliest code is taken")
    batch = len(labels)
    guided = guidance != 1 and bool((labels < prior.classes).any())
    asked = torch.cat([labels, torch.full_like(labels, prior.classes)]) if guided else labels
    caches, codes = prior.caches(len(asked)), labels.new_empty(batch, 0)
    given = codes if given is None else given
    for size in progress(prior.step_sizes):
        logits = prior.step(codes.repeat(len(asked) // max(batch, 1), 1), asked, caches).float()
        if guided:
            with_class, without = logits.split(batch)
            logits = without + guidance * (with_class - without)
        chosen = given[:, codes.shape[1] :][:, :size]
        if chosen.shape[1] < size:
            logits = logits - logits.amax(-1, keepdim=True)  # so that a tiny temperature gives no NaN
            share = filter_logits(logits.flatten(0, 1) / max(temperature, 1e-30), top_k, top_p).softmax(-1)
            drawn = torch.multinomial(share, 1, generator=generator).view(batch, size)
            chosen = torch.cat([chosen, drawn[:, chosen.shape[1] :]], 1)
        codes = torch.cat([codes, chosen], 1)
    return codes


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the logits (B, K) of the `top_k` likeliest codes within the nucleus `top_p`; set the others to -inf."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= top_p
        beyond[:, 0] = False  # keep the likeliest, however small top_p is
        logits = ordered.masked_fill(beyond, -torch.inf).gather(1, order.argsort())
    return logits


def build_prior(args: dict, shape: dict, model: nn.Module) -> Prior:
    """Make the prior that train_prior.py's arguments describe, for codes of a `shape` (codebook_size, grids, classes).

    If the VQVAE has scales, the prior draws scale by scale.
    """
    options = shape | {name: args[name] for name in ("width", "depth", "heads", "dropout")}
    return ScalePrior(model.levels[0].quantizer, **options) if model.scales else Prior(**options)


def load_prior(checkpoint: dict, model: nn.Module) -> Prior:
    """Rebuild the best prior of a checkpoint of train_prior.py, in eval mode, on the device of its VQVAE.

    Raises:
        ValueError: the checkpoint's weights do not fit its arguments.
    """
    args, shape, weights = checkpoint["args"], checkpoint["identity"]["shape"], checkpoint["best"]["model"]
    try:
        if args["depth"] > len(weights):
            raise ValueError("more blocks than weights")
        with torch.device("meta"):  # a file may claim any sizes: compare shapes before allocating memory
            build_prior(args, shape, model).load_state_dict(weights, assign=True)
    except Exception as error:  # a mismatch can raise almost any exception
        raise ValueError(f"{checkpoint.get('path')} holds no prior of this version of the project") from error
    prior = build_prior(args, shape, model)
    prior.load_state_dict(weights)
    return prior.to(model.mean.device).eval()
