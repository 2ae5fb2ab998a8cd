"""Tiny models and tiny folders of index shards."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ar.config import ModelConfig
from ar.model import AR
from ar.shard_writer import ShardJob

torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another

GRID = (4, 4)
BITS = 6


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes index shards with random tokens."""

    def make(
        name: str = "shards",
        num_samples: int = 64,
        num_views: int = 1,
        num_classes: int = 4,
        per_shard: int = 1000,
        seed: int = 0,
        bits: int = BITS,
        grid: tuple[int, int] = GRID,
        digest: str = "sha256:" + "0" * 64,
    ) -> Path:
        generator = np.random.default_rng(seed)
        shape = (num_samples, num_views, *grid)
        indices = generator.integers(0, 2**bits, shape).astype(np.uint32)
        labels = (np.arange(num_samples) % num_classes if num_classes else -1) * np.ones(
            num_samples, np.int32
        )
        request = {
            "tokenizer": {"id": "outputs/tokenizer/test", "digest": digest},
            "codebook_bits": bits,
            "grid": list(grid),
            "views": [{"name": "center"}] * num_views,
            "block_size": 256,
            "num_samples": num_samples,
            "class_names": [f"class {c}" for c in range(num_classes)] or None,
            "source": {"name": "random", "split": "train"},
            "skipped": {"count": 0, "reasons": {}, "examples": []},
        }
        folder = tmp_path / name
        firsts = range(0, num_samples, per_shard)
        job = ShardJob(folder, request, len(firsts))
        job.begin()
        for number, first in enumerate(firsts):
            part = slice(first, first + per_shard)
            keys = [f"{number}/{i}" for i in range(num_samples)][part]
            job.write(number, indices[part], labels[part].astype(np.int32), keys)
        job.finish()
        np.save(tmp_path / f"{name}.npy", indices)
        return folder

    return make


@pytest.fixture
def make_model() -> Callable[..., AR]:
    """Return a function that builds a small model in evaluation mode, its heads not zero."""

    def make(seed: int = 0, **changes: object) -> AR:
        options: dict[str, object] = {
            "name": "test",
            "dim": 32,
            "num_heads": 2,
            "num_layers": 2,
            "num_intra_layers": 2,
            "sub_token_bits": [2, 4],
            "grid": list(GRID),
            "num_classes": 4,
        }
        torch.manual_seed(seed)
        model = AR(ModelConfig(**{**options, **changes}))  # type: ignore[arg-type]
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Return a function that runs `python -m MODULE OPTIONS`, or under torchrun."""

    def run(
        module: str, *options: str, processes: int = 1, timeout: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        launcher = [sys.executable, "-m"]
        if processes > 1:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            launcher += ["-m"]
        return subprocess.run(
            [*launcher, module, *options],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
