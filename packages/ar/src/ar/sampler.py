"""Drawing token grids: one position at a time, with a static key-value cache.

Every position costs one step of the inter stack, then slot 0 and slot 1 of the intra stack. With
guidance the batch holds each image twice, conditional rows first; both rows of a pair are given the
same drawn tokens.
"""

import torch
from torch import Tensor

from ar.config import SamplingConfig
from ar.guidance import draw, guide
from ar.model import AR, InterBlock, IntraBlock
from ar.noise import exponential


class Decoder:
    """The model unrolled one position at a time, for a fixed number of rows N."""

    def __init__(self, model: AR, rows: int) -> None:
        self.model = model
        weight = model.norm.weight
        heads, head_dim = model.config.num_heads, model.config.head_dim
        shape = (model.config.num_layers, 2, rows, heads, model.num_positions, head_dim)
        self.cache = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values: list[Tensor] = []  # of slot 0, one per intra block
        self.position = 0

    def pre_logits(self, x_ND: Tensor) -> Tensor:
        """Advance by one position, with input `x_ND`, and score its pre sub-token, `[N, 2^k1]`."""
        for block, cache in zip(self.model.spatial_blocks, self.cache, strict=True):
            assert isinstance(block, InterBlock)
            x_ND = block.step(x_ND, self.model.rotary, cache, self.position)
        self.position += 1
        self.values = []
        for block in self.model.factorized_blocks:
            assert isinstance(block, IntraBlock)
            x_ND, values = block.first(x_ND)
            self.values.append(values)
        return self.model.head[0](self.model.norm(x_ND))

    def post_logits(self, pre_ND: Tensor) -> Tensor:
        """Score the post sub-token, `[N, 2^k2]`, given the embedding of the pre sub-token."""
        for block, values in zip(self.model.factorized_blocks, self.values, strict=True):
            assert isinstance(block, IntraBlock)
            pre_ND = block.second(pre_ND, values)
        return self.model.head[1](self.model.norm(pre_ND))


@torch.inference_mode()
def sample(
    model: AR, labels_B: Tensor, ids_B: Tensor, sampling: SamplingConfig, seed: int
) -> Tensor:
    """Draw one token grid per label, int64 `[B, L]` on the model's device.

    Args: labels_B: int64 class ids, -1 for unconditional. ids_B: int64 names of the images: the
        same (seed, id, label) gives the same image in any batch.

    Raises:
        ValueError: the model is in training mode, where dropout would disturb every token.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before sampling")
    device = model.norm.weight.device
    labels_B, ids_B = labels_B.to(device), ids_B.to(device)
    rows = len(labels_B)
    # An unconditional image, and scales of 1, need no second row.
    guided = sampling.scale != [1.0, 1.0] and model.num_classes > 0 and bool((labels_B >= 0).any())
    copies = 2 if guided else 1
    decoder = Decoder(model, copies * rows)
    x_ND = model.class_emb(
        torch.cat([labels_B, torch.full_like(labels_B, -1)]) if guided else labels_B
    )

    def token(logits: Tensor, slot: int, position: int) -> Tensor:
        noise = None
        if sampling.temperature[slot] > 0:
            noise = exponential(seed, ids_B, 2 * position + slot, logits.shape[-1])
        logits = guide(logits, sampling.scale[slot], rows)
        return draw(
            logits, noise, sampling.temperature[slot], sampling.top_k[slot], sampling.top_p[slot]
        )

    tokens_BL = torch.empty(rows, model.num_positions, dtype=torch.int64, device=device)
    for position in range(model.num_positions):
        pre_B = token(decoder.pre_logits(x_ND), 0, position)
        pre_ND = model.pre_emb(pre_B).repeat(copies, 1)
        post_B = token(decoder.post_logits(pre_ND), 1, position)
        tokens_BL[:, position] = model.join(pre_B, post_B)
        x_ND = pre_ND + model.post_emb(post_B).repeat(copies, 1)
    return tokens_BL
