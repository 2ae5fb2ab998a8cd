"""From scores to a token: guidance, temperature, top-k, top-p, and the draw itself."""

import torch
from torch import Tensor


def guide(logits: Tensor, scale: float, rows: int) -> Tensor:
    """Combine the scores of one sub-token head, l_u + scale (l_c - l_u), in fp32.

    Args: logits: [rows, V] without guidance, or [2 rows, V]: conditional rows, then unconditional
        ones.
    """
    logits = logits.float()
    if scale == 1.0 or len(logits) == rows:
        return logits[:rows]
    conditional, unconditional = logits.chunk(2)
    return torch.lerp(unconditional, conditional, scale)


def restrict(logits_BV: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set the scores outside the top k, then outside the top share p, to minus infinity.

    Args: top_k: keep so many of the highest scores (ties are kept); 0: all. top_p: keep the
        shortest list of most likely tokens whose probability reaches this share; 1: all.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        smallest = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits_BV.sort(descending=True, stable=True)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share  # probability of the more likely tokens
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits_BV = logits_BV.masked_fill(outside, -torch.inf)
    return logits_BV


def draw(
    logits_BV: Tensor,
    noise_BV: Tensor | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Draw one token per row, int64 `[B]`.

    Args: noise_BV: Exp(1) numbers: argmax(l - log e) has the distribution softmax(l) (the
        Gumbel-max identity). Needed unless the temperature is 0, which takes the most likely token.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    assert noise_BV is not None
    return (restrict(logits_BV / temperature, top_k, top_p) - noise_BV.log()).argmax(-1)
