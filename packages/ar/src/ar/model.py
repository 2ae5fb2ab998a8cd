"""The auto-regressive transformer of Open-MAGVIT2: a stack over positions, one over sub-tokens.

Notable choices, all as in the published weights:
- A token of K bits is two sub-tokens: pre = its low k1 bits, post = its high k2 bits (asymmetric
  factorisation).
- The inter stack reads [class, e_0, ..., e_{L-2}] with e_i = pre_emb(pre_i) + post_emb(post_i); h_i
  predicts token i.
- The intra stack reads, for every position i, the two slots [h_i, pre_emb(pre_i)]: slot 0 predicts
  pre, slot 1 post.
- 2-D axial rotary positions whose row for sequence position 0 (the class) is zero: that slot has
  zero query and key.
- Llama blocks: RMSNorm in fp32, fused bias-free qkv, SwiGLU. The output heads start at zero.

Shape suffixes: B images, L = rows x columns of the token grid, D width, H heads, E width of a head,
N any leading dimensions flattened.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ar.checkpoint import checkpoint_folder, load_weights, read_card, write_card, write_weights
from ar.config import ModelConfig


class Logits(NamedTuple):
    """Scores of the two sub-tokens at every position."""

    pre: Tensor  # [B, L, 2^k1]
    post: Tensor  # [B, L, 2^k2]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in fp32 and cast back before the gain."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class FeedForward(nn.Module):
    """SwiGLU network: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Attention(nn.Module):
    """The weights of one attention; the two kinds of block below use them differently."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)  # rows: q | k | v
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.resid_dropout)

    def project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values of `x` [..., D] as [..., 3, H, E]."""
        return self.wqkv(x).unflatten(-1, (3, self.num_heads, -1))

    def output(self, mixed: Tensor) -> Tensor:
        """Project the mixed values [..., H, E] back to the stream, [..., D]."""
        return self.dropout(self.wo(mixed.flatten(-2)))


class Block(nn.Module):
    """Pre-norm block: x += attention(norm(x)); x += feed_forward(norm(x)).

    Subclasses say how attention mixes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim)
        self.ffn_norm = RMSNorm(config.dim)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add to `x` [..., D] the attention output of `mixed` [..., H, E], then the network."""
        x = x + self.attention.output(mixed)
        return x + self.feed_forward(self.ffn_norm(x))


class InterBlock(Block):
    """Causal attention over positions."""

    def forward(self, x_BLD: Tensor, rotary: Tensor) -> Tensor:
        """Map the whole sequence; `rotary` [L, 2, E/2] are its positions."""
        qkv = self.attention.project(self.attention_norm(x_BLD))  # [B, L, 3, H, E]
        q, k = rotate(qkv[:, :, :2], rotary[:, None]).unbind(2)  # each [B, L, H, E]
        v = qkv[:, :, 2]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.finish(x_BLD, mixed.transpose(1, 2))

    def step(self, x_ND: Tensor, rotary: Tensor, cache: Tensor, position: int) -> Tensor:
        """Map one position; `cache` [2, N, H, L, E] has keys and values of those before it."""
        qkv = self.attention.project(self.attention_norm(x_ND))  # [N, 3, H, E]
        q, k = rotate(qkv[:, :2], rotary[position]).unbind(1)  # each [N, H, E]
        cache[0, :, :, position] = k
        cache[1, :, :, position] = qkv[:, 2]
        keys, values = cache[:, :, :, : position + 1]  # only the filled prefix is read
        mixed = F.scaled_dot_product_attention(q[:, :, None], keys, values)
        return self.finish(x_ND, mixed[:, :, 0])


class IntraBlock(Block):
    """Causal attention over the two slots of a position, in closed form.

    Slot 0 sees itself alone, so its output is its value v0. Its key is zero (the zero row of the
    rotary table) and slot 1 is not rotated (grid cell 0), so slot 1 gives v0 the score 0 and itself
    q1.k1 / sqrt(E): the softmax is a sigmoid.
    """

    def first(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Map slot 0; return it with its values v0 [N, H, E], which slot 1 needs."""
        attention = self.attention
        dim = x_ND.shape[-1]
        v0 = F.linear(self.attention_norm(x_ND), attention.wqkv.weight[2 * dim :])
        v0 = v0.unflatten(-1, (attention.num_heads, -1))
        return self.finish(x_ND, v0), v0

    def second(self, x_ND: Tensor, v0: Tensor) -> Tensor:
        """Map slot 1 given the values of slot 0."""
        q, k, v = self.attention.project(self.attention_norm(x_ND)).unbind(-3)  # each [N, H, E]
        score = (q.float() * k.float()).sum(-1, keepdim=True) / math.sqrt(q.shape[-1])
        weight = torch.sigmoid(score).type_as(v)
        return self.finish(x_ND, v0 + weight * (v - v0))

    def forward(self, x0_ND: Tensor, x1_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Map both slots."""
        y0, v0 = self.first(x0_ND)
        return y0, self.second(x1_ND, v0)


def rotary_table(rows: int, columns: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Return cos and sin for sequence positions 0..L-1, fp32 `[L, 2, head_dim / 2]`.

    Position p >= 1 is grid cell p - 1; its first half of pairs turns with the row, its second half
    with the column. Position 0, the class, is all zero.
    """
    frequencies = base ** (-torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32),
        torch.arange(columns, dtype=torch.float32),
        indexing="ij",
    )
    cells = torch.stack([row.flatten(), column.flatten()], dim=1)  # [L, 2]
    angles = (cells[:, :, None] * frequencies).flatten(1)  # [L, head_dim / 2]
    table = torch.stack([angles.cos(), angles.sin()], dim=1)
    return torch.cat([torch.zeros_like(table[:1]), table[:-1]])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the (even, odd) pairs of `x` [..., H, E] by `rotary` [..., 2, E/2].

    Computed in fp32, returned in x's dtype. `rotary` broadcasts against x's dimensions before H.
    """
    cos, sin = rotary.unsqueeze(-3).unbind(-2)  # [..., 1, E/2]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2).type_as(x)


class ClassEmbedding(nn.Module):
    """One row per class and one more, the last, for "unconditional"; label -1 selects it."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels_B: Tensor) -> Tensor:
        unconditional = self.embedding_table.num_embeddings - 1
        return self.embedding_table(labels_B.where(labels_B >= 0, unconditional))


class AR(nn.Module):
    """Auto-regressive model of token grids.

    Args:
        config: with sub_token_bits, grid and num_classes filled in (see `resolve_model`).
    """

    rotary: Tensor  # fp32 [L, 2, E/2]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        for option in ("sub_token_bits", "grid", "num_classes"):
            if getattr(config, option) is None:
                raise ValueError(f"model.{option}=null: must be stated to build a model")
        assert config.sub_token_bits and config.grid and config.num_classes is not None
        self.config = config
        self.pre_bits, self.post_bits = config.sub_token_bits
        self.grid = (config.grid[0], config.grid[1])
        self.num_classes = config.num_classes
        self.num_positions = math.prod(self.grid)
        pre_vocabulary, post_vocabulary = 2**self.pre_bits, 2**self.post_bits
        self.pre_emb = nn.Embedding(pre_vocabulary, config.dim)
        self.post_emb = nn.Embedding(post_vocabulary, config.dim)
        self.class_emb = ClassEmbedding(config.num_classes, config.dim)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.spatial_blocks = nn.ModuleList(InterBlock(config) for _ in range(config.num_layers))
        self.factorized_blocks = nn.ModuleList(
            IntraBlock(config) for _ in range(config.num_intra_layers)
        )
        self.norm = RMSNorm(config.dim)
        self.head = nn.ModuleList(
            nn.Linear(config.dim, size, bias=False) for size in (pre_vocabulary, post_vocabulary)
        )
        table = rotary_table(*self.grid, config.head_dim)
        self.register_buffer("rotary", table, persistent=False)
        self.apply(self._init)
        for head in self.head:
            nn.init.zeros_(head.get_parameter("weight"))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Split token indices into sub-tokens: the low k1 bits (pre) and the others (post)."""
        return tokens & (2**self.pre_bits - 1), tokens >> self.pre_bits

    def join(self, pre: Tensor, post: Tensor) -> Tensor:
        """Inverse of `split`."""
        return pre | (post << self.pre_bits)

    def forward(self, tokens_BL: Tensor, labels_B: Tensor) -> Logits:
        """Score every token given the class and the tokens before it.

        Args:
            tokens_BL: int64 in [0, 2^(k1 + k2)), row-major.
            labels_B: int64 in [0, num_classes), or -1 for unconditional.
        """
        pre_BL, post_BL = self.split(tokens_BL)
        pre_BLD = self.pre_emb(pre_BL)
        token_BLD = pre_BLD[:, :-1] + self.post_emb(post_BL[:, :-1])
        x = self.dropout(torch.cat([self.class_emb(labels_B)[:, None], token_BLD], dim=1))
        for block in self.spatial_blocks:
            x = block(x, self.rotary)
        x0, x1 = x, pre_BLD
        for block in self.factorized_blocks:
            x0, x1 = block(x0, x1)
        return Logits(self.head[0](self.norm(x0)), self.head[1](self.norm(x1)))

    def loss(self, logits: Logits, tokens_BL: Tensor) -> Tensor:
        """Return the mean cross-entropies of pre and post, in nats, fp32 `[2]`.

        Their sum is the training loss.
        """
        parts = zip(logits, self.split(tokens_BL), strict=True)
        return torch.stack(
            [F.cross_entropy(s.flatten(0, 1).float(), t.flatten()) for s, t in parts]
        )

    def cast_weights(self, dtype: torch.dtype) -> "AR":
        """Cast the parameters, not the rotary table, to `dtype`, for inference."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def save_pretrained(self, folder: Path, tokens: dict[str, Any], step: int) -> None:
        """Write `config.json` and `model.safetensors` (docs/artifacts.md, Checkpoint).

        Args:
            tokens: `tokenizer`, `codebook_bits`, `grid` and `class_names` of the index shards.
            step: optimizer steps behind the weights.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, self.config, tokens)
        write_weights(folder / "model.safetensors", dict(self.named_parameters()), step)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "AR":
        """Load a checkpoint folder or a repository of the Hugging Face hub.

        The model is on the CPU, in fp32 and evaluation mode.
        """
        folder = checkpoint_folder(path)
        card = read_card(folder)
        with torch.device("meta"):
            model = cls(ModelConfig(**card["model"]))
        model.rotary = rotary_table(*model.grid, model.config.head_dim)
        load_weights(model, folder / "model.safetensors", assign=True)
        return model.eval()
