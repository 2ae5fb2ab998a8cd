"""The loss on held-out index shards."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ar.config import DataConfig
from ar.model import AR
from ar.shards import IndexShards


class Validation:
    """The samples to validate on: the first view of the first `num_samples`."""

    def __init__(self, shards: IndexShards, num_samples: int) -> None:
        self.shards = shards
        self.num_samples = num_samples

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the tokens [n, L] and labels [n] of samples `first` to `last` - 1."""
        samples = np.arange(first, last)
        tokens, labels = self.shards.read(samples, np.zeros_like(samples))
        return torch.from_numpy(tokens), torch.from_numpy(labels)


def open_validation(data: DataConfig, train: IndexShards) -> Validation | None:
    """Open `data.val_shards`, which must come from the same tokenizer as the training shards."""
    if data.val_shards is None:
        return None
    if not (Path(data.val_shards) / "manifest.json").is_file():
        raise FileNotFoundError(
            f"data.val_shards={data.val_shards}: no index shards there; write them with "
            "tokenizer.encode, or set data.val_shards=null"
        )
    shards = IndexShards(data.val_shards)
    for name in ("codebook_bits", "grid", "class_names"):
        if getattr(shards, name) != getattr(train, name):
            raise ValueError(
                f"data.val_shards={data.val_shards}: its {name} differ from those of "
                f"data.shards={data.shards}"
            )
    if shards.tokenizer["digest"] != train.tokenizer["digest"]:
        raise ValueError(
            f"data.val_shards={data.val_shards}: encoded by tokenizer {shards.tokenizer['id']} "
            f"({shards.tokenizer['digest'][:19]}), the training shards by {train.tokenizer['id']} "
            f"({train.tokenizer['digest'][:19]}); encode both with the same one"
        )
    return Validation(shards, min(shards.num_samples, data.val_samples or shards.num_samples))


@torch.no_grad()
def validate(
    model: AR,
    weights: dict[str, Tensor] | None,
    validation: Validation,
    micro_batch: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return the mean loss per sub-token, `val_loss`, `val_loss_pre` and `val_loss_post`, in nats.

    Args:
        weights: parameters to use in place of the model's own, such as their average.
    """
    device, world_size = accelerator.device, accelerator.num_processes
    sums = torch.zeros(2, device=device)
    model.eval()
    firsts = range(0, validation.num_samples, micro_batch)
    for first in firsts[accelerator.process_index :: world_size]:
        last = min(first + micro_batch, validation.num_samples)
        tokens, labels = (part.to(device) for part in validation.read(first, last))
        with accelerator.autocast():
            logits = torch.func.functional_call(model, weights or {}, (tokens, labels))
        sums += model.loss(logits, tokens) * (last - first)
    model.train()
    pre, post = (accelerator.reduce(sums, "sum") / validation.num_samples).tolist()
    return {"val_loss": pre + post, "val_loss_pre": pre, "val_loss_post": post}
