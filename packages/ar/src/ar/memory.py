"""Does the training fit? An estimate from the parameter count, against the free memory.

Checked before anything is allocated, so that a model too large for the machine ends in one line
instead of a kill.
"""

from pathlib import Path

import psutil
import torch

from ar.config import ModelConfig
from ar.model import AR

_GIB = 2**30


def count_parameters(model: ModelConfig) -> int:
    """Return the number of parameters, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AR(model).parameters())


def training_bytes(model: ModelConfig, micro_batch: int, ema: bool, bf16: bool) -> int:
    """Estimate the bytes one process needs to train.

    Exact for weights, gradients and Adam's two moments (and the EMA copy), all fp32. For the
    activations a count of what a block keeps for its backward pass, per token: about 16 widths of
    the stream and 4 widths of the feed-forward network.
    """
    assert model.grid and model.sub_token_bits
    state = count_parameters(model) * 4 * (5 if ema else 4)
    positions = micro_batch * model.grid[0] * model.grid[1]
    slots = model.num_layers + 2 * model.num_intra_layers  # the intra stack has two per position
    width = 16 * model.dim + 4 * model.ffn_dim
    activations = positions * slots * width * (3 if bf16 else 4)  # bf16: the stream stays fp32
    logits = positions * sum(2**bits for bits in model.sub_token_bits) * 4 * 4
    return state + activations + logits


def free_bytes(device: torch.device, local_processes: int) -> int | None:
    """Return the free memory for one process on `device`, or None where it cannot be told.

    Args:
        local_processes: how many processes of this machine share its main memory.
    """
    if device.type == "cpu":
        limits = [psutil.virtual_memory().available, *_cgroup_free(Path("/sys/fs/cgroup"))]
        return min(limits) // local_processes
    get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return get_info(device)[0] if get_info else None


def _cgroup_free(root: Path) -> list[int]:
    """Return what a container's memory limit leaves; page cache counts as free."""
    files = (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # version 2
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    )
    for limit_file, usage_file, stat_file, cache_name in files:
        try:
            limit, usage = (int((root / name).read_text()) for name in (limit_file, usage_file))
            stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
            return [max(0, limit - usage + int(stat.get(cache_name, 0)))]
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return []


def check(model: ModelConfig, micro_batch: int, ema: bool, bf16: bool, free: int | None) -> None:
    """Compare the estimate with what is free.

    Raises:
        ValueError: with what is needed, what is free and what to change.
    """
    need = training_bytes(model, micro_batch, ema, bf16)
    if free is None or need <= free:
        return
    least = training_bytes(model, 1, ema, bf16)
    raise ValueError(
        f"not enough memory to train model={model.name} with micro_batch={micro_batch}: it needs "
        f"about {need / _GIB:.1f} GiB per process ({least / _GIB:.1f} GiB with micro_batch=1), and "
        f"{free / _GIB:.1f} GiB are free; choose a smaller +model (b, l, tiny), a smaller "
        "micro_batch, or a device with more memory"
    )
