"""What encode, decode and reconstruct share: the processes, the exact tokenizer, its sizes."""

from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.autoencoder import Tokenizer
from tokenizer.config import EncodeConfig, ReconstructConfig
from tokenizer.data import Dataset
from tokenizer.shards import BLOCK_SIZE

# A process that finishes its shards early waits for the others: the default is 10 minutes.
_PATIENCE = timedelta(days=2)


def start(ckpt: str, precision: str) -> tuple[Accelerator, Tokenizer]:
    """Join the process group and load a tokenizer onto this process's device."""
    accelerator = Accelerator(
        # Without it, several processes on a machine without accelerators would not join.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    if precision == "no":
        # Convolutions would otherwise round to 10 bits of mantissa where the device can do so,
        # which flips codes near zero.
        torch.backends.cudnn.allow_tf32 = False
    with accelerator.main_process_first():  # it downloads what the others find in the cache
        tokenizer = Tokenizer.from_pretrained(ckpt)
    return accelerator, tokenizer.to(accelerator.device)


def describe(tokenizer: Tokenizer, precision: str) -> dict:
    """Return the manifest fields that say which tokenizer ran, and how."""
    return {
        "tokenizer": {"id": tokenizer.id, "digest": tokenizer.digest},
        "precision": "fp32" if precision == "no" else precision,
    }


def source_fields(
    tokenizer: Tokenizer, dataset: Dataset, config: EncodeConfig | ReconstructConfig
) -> dict[str, Any]:
    """Return the manifest fields of a data set that went through a tokenizer."""
    return {
        **describe(tokenizer, config.precision),
        "codebook_bits": tokenizer.config.bits,
        "grid": grid_of(tokenizer, config.data.resolution),
        "block_size": BLOCK_SIZE,
        "class_names": dataset.class_names,
        "source": {**dataset.describe(), "samples_per_shard": config.samples_per_shard},
    }


def grid_of(tokenizer: Tokenizer, resolution: int) -> list[int]:
    """Return the token grid [h, w] of square pictures, or raise ValueError with sizes that fit."""
    factor = tokenizer.downsample
    if resolution % factor:
        below = resolution // factor * factor
        near = [str(size) for size in (below, below + factor) if size]
        raise ValueError(
            f"data.resolution={resolution}: this tokenizer needs a multiple of {factor}, such as "
            f"{' or '.join(near)}"
        )
    return [resolution // factor] * 2


def channels_last(images: Tensor) -> NDArray[np.uint8]:
    """Return uint8 [n, 3, h, w] as the [n, h, w, 3] that files have."""
    return images.permute(0, 2, 3, 1).cpu().contiguous().numpy()


def token_array(indices: Tensor) -> NDArray[np.uint32]:
    """Return token indices of any shape as files have them."""
    return indices.cpu().numpy().astype(np.uint32)
