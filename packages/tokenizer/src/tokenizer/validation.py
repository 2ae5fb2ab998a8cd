"""Pictures and numbers that show how well a tokenizer reconstructs, during training."""

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import make_grid

from tokenizer.autoencoder import Tokenizer
from tokenizer.data import CENTER, Dataset, ordered_batches


def validate(
    tokenizer: Tokenizer,
    dataset: Dataset,
    count: int,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return `val_psnr`, the mean PSNR in dB (uint8, per image) of `count` samples.

    Where some cannot be read, `val_skipped` is their number; where none can, there is no PSNR.
    """
    chosen = evenly_spaced(len(dataset), count or len(dataset))
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    # Sum of PSNR, images, unreadable images.
    total = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for batch in ordered_batches(dataset, [CENTER], batches, num_workers):
        originals = batch.images[:, 0].to(accelerator.device)
        total[2] += len(batch.skipped)
        if not len(originals):
            continue
        difference = originals.double() - reconstruct(tokenizer, originals).double()
        error = difference.square().flatten(1).mean(1).clamp_min(1e-10)
        total[0] += (10 * torch.log10(255.0**2 / error)).sum()
        total[1] += len(originals)
    psnr, images, skipped = accelerator.reduce(total, "sum").tolist()
    record = {"val_psnr": psnr / images} if images else {}
    return record | ({"val_skipped": skipped} if skipped else {})


def preview_grid(tokenizer: Tokenizer, dataset: Dataset, count: int) -> Tensor | None:
    """Return uint8 [3, H, W]: rows of up to eight originals, each above its reconstruction.

    None where none of the `count` samples can be read.
    """
    chosen = evenly_spaced(len(dataset), count)
    (batch,) = ordered_batches(dataset, [CENTER], [chosen], num_workers=0)
    originals = batch.images[:, 0]
    if not len(originals):
        return None
    pairs = zip(originals.split(8), reconstruct(tokenizer, originals).cpu().split(8), strict=True)
    rows = [_padded(part, min(8, len(originals))) for pair in pairs for part in pair]
    return make_grid(torch.cat(rows), nrow=len(rows[0]), padding=2, pad_value=255)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return up to `count` positions spread over range(total): data sets are sorted by class."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """uint8 images to tokens and back."""
    return tokenizer.decode(tokenizer.encode(images))


def _padded(images: Tensor, count: int) -> Tensor:
    blank = images.new_full((count - len(images), *images.shape[1:]), 255)
    return torch.cat([images, blank])
