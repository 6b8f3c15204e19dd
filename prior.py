"""A causal transformer over a VQ-VAE's codes: the prior from which new images are drawn, code after code.

Shapes: B batch, T codes per image (all levels, the top one first, each row by row), K codebook_size
    codes   (B, T) int64
    labels  (B,) int64              the number of classes stands for "any class"
    logits  (B, T, K)               of each code, given the label and the codes before it

Source: prior over the codes, arXiv 1711.00937, section 3.3 (there a PixelCNN); guidance, arXiv 2207.12598, equation 6.
"""

import contextlib
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each normalised first and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: Tensor | None = None, at: int = 0) -> Tensor:
        """Map (B, T, width) to the same.

        With a cache (2, B, heads, T, width / heads), x is the one position `at`, (B, 1, width): its key and value join
        those of the positions before it, which are not computed again.
        """
        q, k, v = self.to_qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[:, :, :, at] = torch.stack([k[:, :, 0], v[:, :, 0]])
            k, v = cache[:, :, :, : at + 1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        x = x + self._drop(self.from_heads(attended.transpose(1, 2).flatten(2)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, x):  # the same channels at all positions, whose masks would cost a fifth of the time on a CPU
        return x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), self.dropout) if self.training else x


class Prior(nn.Module):
    """Autoregressive model of an image's codes, given its class or none.

    Args:
        codebook_size: K.
        grids: (h, w) of each level's codes, top first.
        classes: how many; 0 for data without labels.
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
        dropout: float = 0.05,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width is {width}, but must be a multiple of heads, {heads}")
        self.codebook_size, self.grids, self.classes = codebook_size, [tuple(grid) for grid in grids], classes
        self.sizes = [height * width for height, width in grids]  # codes of each level
        self.length = sum(self.sizes)
        self.label = nn.Embedding(classes + 1, width)
        self.code = nn.Embedding(len(grids) * codebook_size, width)  # of each level its own
        self.level, self.position = nn.Embedding(len(grids), width), nn.Embedding(self.length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, codebook_size) for _ in grids)  # of each level its own
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        level_at = [level for level, size in enumerate(self.sizes) for _ in range(size)]
        self.register_buffer("level_at", torch.tensor(level_at), persistent=False)  # (T,)

    @torch.no_grad()
    def start_from_codebooks(self, codebooks: list[Tensor]):
        """Initialise the code embeddings and output heads from a random projection of the codebooks.

        Codes that are near one another then look alike from the first step on.

        Args:
            codebooks: (K, D) of each level.
        """
        for level, (codebook, head) in enumerate(zip(codebooks, self.heads)):
            codes = codebook - codebook.mean(0)
            projection = torch.randn(codes.shape[1], head.in_features, device=codes.device) / codes.shape[1] ** 0.5
            weight = 0.05 * codes / codes.square().mean().sqrt().clamp(min=1e-6) @ projection
            self.code.weight[level * self.codebook_size :][: self.codebook_size] = weight
            head.weight.copy_(weight)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Return the logits (B, T, K) of codes (B, T), each from the label and the codes before it."""
        x = torch.cat([self.label(labels)[:, None], self._embed(codes[:, :-1])], 1) + self._places()
        for block in self.blocks:
            x = block(x)
        parts = self.norm(x).split(self.sizes, 1)
        return torch.cat([head(part) for head, part in zip(self.heads, parts)], 1)

    def caches(self, batch: int) -> list[Tensor]:
        """Return empty caches of keys and values for `step`, one per block."""
        heads, width = self.blocks[0].heads, self.label.embedding_dim
        weight = self.label.weight
        return [weight.new_zeros(2, batch, heads, self.length, width // heads) for _ in self.blocks]

    def step(self, before: Tensor, at: int, caches: list[Tensor]) -> Tensor:
        """Return the logits (B, K) of the codes at position `at`, as `forward` would, at the cost of one position.

        Args:
            before: the codes (B,) at position at - 1, or for the first position the labels.
            caches: as the steps of all positions before this one left them.
        """
        x = self.label(before) if at == 0 else self.code(before + self.codebook_size * self.level_at[at - 1])
        x = (x + self._places()[at])[:, None]
        for block, cache in zip(self.blocks, caches):
            x = block(x, cache, at)
        level = sum(at >= size for size in itertools.accumulate(self.sizes))
        return self.heads[level](self.norm(x)[:, 0])

    def _embed(self, codes):
        return self.code(codes + self.codebook_size * self.level_at[: codes.shape[1]])

    def _places(self):  # (T, width)
        return self.level(self.level_at) + self.position.weight


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
) -> Tensor:
    """Draw the codes (B, T) of new images, one position after another.

    Args:
        labels: (B,), the class of each image.
        temperature: divides the logits; near 0 the likeliest code is taken.
        top_k: draw from this many likeliest codes; 0: from all.
        top_p: draw from the likeliest codes whose probabilities add up to this.
        guidance: how far to go from the logits without a class to those with it and beyond; 1: those with it.
        given: the first codes (B, t), which are kept.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0; near 0 the likeliest code is taken")
    batch = len(labels)
    guided = guidance != 1 and bool((labels < prior.classes).any())
    asked = torch.cat([labels, torch.full_like(labels, prior.classes)]) if guided else labels
    caches, before, codes = prior.caches(len(asked)), asked, []
    for at in range(prior.length):
        logits = prior.step(before, at, caches).float()
        if guided:
            with_class, without = logits.split(batch)
            logits = without + guidance * (with_class - without)
        if given is not None and at < given.shape[1]:
            chosen = given[:, at]
        else:
            logits = logits - logits.amax(-1, keepdim=True)  # of which a tiny temperature makes no NaN
            share = restrict(logits / max(temperature, 1e-30), top_k, top_p).softmax(-1)
            chosen = torch.multinomial(share, 1, generator=generator)[:, 0]
        codes.append(chosen)
        before = torch.cat([chosen, chosen]) if guided else chosen
    return torch.stack(codes, 1)


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf the logits (B, K) of all but the `top_k` likeliest codes, and of the tail beyond `top_p`."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= top_p
        beyond[:, 0] = False  # not the likeliest, however small top_p
        logits = ordered.masked_fill(beyond, -torch.inf).gather(1, order.argsort())
    return logits


def build_prior(args: dict, shape: dict) -> Prior:
    """Make the prior of train_prior.py's arguments, for codes of a `shape` (codebook_size, grids, classes)."""
    return Prior(**shape, **{name: args[name] for name in ("width", "depth", "heads", "dropout")})


def load_prior(checkpoint: dict, device: torch.device | str = "cpu") -> Prior:
    """Rebuild the best prior of a checkpoint of train_prior.py, in eval mode.

    Raises:
        ValueError: the checkpoint does not hold what its arguments describe.
    """
    args, shape, weights = checkpoint["args"], checkpoint["identity"]["shape"], checkpoint["best"]["model"]
    try:
        if args["depth"] > len(weights):
            raise ValueError("more blocks than weights")
        with torch.device("meta"):  # a file may name any sizes: compare them before they take memory
            build_prior(args, shape).load_state_dict(weights, assign=True)
        prior = build_prior(args, shape)
        prior.load_state_dict(weights)
    except Exception as error:  # what does not fit surfaces as almost any exception
        raise ValueError(f"{checkpoint.get('path')} holds no prior of this version of the project") from error
    return prior.to(device).eval()


def attention_kernel(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return a context in which attention is fast: on a CPU in bfloat16, the plain formula beats the fused kernel."""
    if device.type != "cpu" or precision != "bfloat16":
        return contextlib.nullcontext()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name, on any device
    return sdpa_kernel(SDPBackend.MATH)
