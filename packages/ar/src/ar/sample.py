"""Sample token grids from a trained model into index shards; the same command again resumes.

    python -m ar.sample +sampling=b ckpt=outputs/ar/b out=outputs/samples/b n_per_class=50

`python -m tokenizer.decode` turns the shards into pictures (docs/sample.md).
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from ar import parallel
from ar.checkpoint import checkpoint_folder, read_card
from ar.config import SampleConfig, command
from ar.files import sha256_file
from ar.model import AR
from ar.sampler import sample
from ar.shard_writer import ShardJob
from ar.shards import BLOCK_SIZE


@dataclass(frozen=True)
class Plan:
    """What to sample: images of the chosen classes, class by class."""

    labels: np.ndarray  # int64 [n], class ids, -1 for none
    numbers: np.ndarray  # int64 [n], counted within the class
    keys: list[str]  # CLASS_NAME/NUMBER

    @property
    def ids(self) -> np.ndarray:
        """Return what names each image to the noise, int64 `[n]`: its class and number."""
        return ((self.labels + 1) << 32) + self.numbers


def make_plan(classes: list[int], n_per_class: int, folders: dict[int, str]) -> Plan:
    """List the images to sample."""
    labels = np.repeat(np.array(classes, np.int64), n_per_class)
    numbers = np.tile(np.arange(n_per_class), len(classes))
    keys = [f"{folders[int(c)]}/{n:08d}" for c, n in zip(labels, numbers, strict=True)]
    return Plan(labels, numbers, keys)


def chosen_classes(classes: list[int] | None, num_classes: int) -> list[int]:
    """Return the class ids to sample: those asked for, or all.

    Raises:
        ValueError: when one is not a class of the model.
    """
    known = list(range(num_classes)) or [-1]
    wrong = sorted(set(classes or []) - {*known, -1})
    if wrong:
        ids = f"0 to {num_classes - 1}, or -1 for none" if num_classes else "-1 alone"
        raise ValueError(f"classes={wrong}: the model's class ids are {ids}")
    return known if classes is None else list(classes)


def class_names(card: dict[str, Any]) -> list[str]:
    """Return the names of a model's classes; where the data named none, their numbers."""
    names = card["tokens"]["class_names"]
    return [str(c) for c in range(card["model"]["num_classes"])] if names is None else names


def class_folders(names: list[str]) -> dict[int, str]:
    """Return a folder name per class id: the class name in plain characters.

    Where two names become the same, all get their id in front.
    """
    plain = [re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "class" for name in names]
    if len({name.lower() for name in [*plain, "unconditional"]}) < len(plain) + 1:
        plain = [f"{number:04d}_{name}" for number, name in enumerate(plain)]
    return {-1: "unconditional", **dict(enumerate(plain))}


def make_request(
    config: SampleConfig, card: dict[str, Any], digest: str, classes: list[int], precision: str
) -> dict[str, Any]:
    """Return the manifest of the shards to write, without the shards."""
    tokens = card["tokens"]
    sampling = {
        **dataclasses.asdict(config.sampling),
        "classes": classes,
        "n_per_class": config.n_per_class,
        "samples_per_shard": config.samples_per_shard,
        "precision": precision,
    }
    return {
        "tokenizer": tokens["tokenizer"],
        "codebook_bits": tokens["codebook_bits"],
        "grid": tokens["grid"],
        "views": [{"name": "sample"}],
        "block_size": BLOCK_SIZE,
        "num_samples": len(classes) * config.n_per_class,
        "class_names": class_names(card) or None,
        "source": {
            "name": "ar.sample",
            "checkpoint": {"id": config.ckpt.rstrip("/"), "digest": digest},
            "seed": config.seed,
            "sampling": sampling,
        },
        "skipped": {"count": 0, "reasons": {}, "examples": []},
    }


@command("sample", SampleConfig)
def main(config: SampleConfig) -> None:
    """Sample, shard by shard, each process its share."""
    accelerator = parallel.start(config.precision)
    folder = checkpoint_folder(config.ckpt)
    card = read_card(folder)
    names = class_names(card)
    classes = chosen_classes(config.classes, len(names))
    folders = class_folders(names)
    plan = make_plan(classes, config.n_per_class, folders)
    weights = folder / "model.safetensors"
    written, digest = weights.stat().st_mtime_ns, sha256_file(weights)
    request = make_request(config, card, digest, classes, accelerator.mixed_precision)
    num_shards = -(-len(plan.keys) // config.samples_per_shard)
    if num_shards > 9999:
        raise ValueError(
            f"samples_per_shard={config.samples_per_shard}: makes {num_shards} shards; at most "
            "9999 can be named; choose a larger value"
        )
    job = ShardJob(Path(config.out), request, num_shards)
    if job.finished:
        if accelerator.is_main_process:
            job.tidy()  # what a kill left behind the manifest
        accelerator.print(f"{config.out}: done, {len(plan.keys):,} samples in {num_shards} shards")
        return
    missing = job.missing()
    accelerator.wait_for_everyone()  # all processes have seen the same list of shards
    if accelerator.is_main_process:
        job.begin()
    accelerator.wait_for_everyone()

    model = AR.from_pretrained(folder).to(accelerator.device)
    if weights.stat().st_mtime_ns != written:
        raise ValueError(
            f"ckpt={config.ckpt}: a training run replaced the weights while they were read; sample "
            "into a new folder"
        )
    if accelerator.mixed_precision == "bf16":
        model.cast_weights(torch.bfloat16)
    accelerator.print(
        f"sampling {len(plan.keys):,} images of {len(classes)} classes from {config.ckpt} on "
        f"{accelerator.num_processes} x {accelerator.device.type}: "
        f"{len(missing)} of {num_shards} shards to write"
    )
    write_shards(config, accelerator, model, plan, job, missing)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        job.finish()
    accelerator.print(f"{config.out}: wrote {len(plan.keys):,} samples in {num_shards} shards")


def write_shards(
    config: SampleConfig,
    accelerator: Accelerator,
    model: AR,
    plan: Plan,
    job: ShardJob,
    missing: list[int],
) -> None:
    """Sample and write this process's part of the missing shards.

    Batches start anew with each shard, so a shard has the same bytes whoever writes it.
    """
    size = config.samples_per_shard
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    total = sum(len(plan.keys[number * size : (number + 1) * size]) for number in mine)
    progress = tqdm(
        total=total, unit="image", disable=not accelerator.is_main_process, dynamic_ncols=True
    )
    for number in mine:
        first, last = number * size, min((number + 1) * size, len(plan.keys))
        grids = []
        for start in range(first, last, config.batch_size):
            rows = slice(start, min(start + config.batch_size, last))
            labels, ids = (torch.from_numpy(part[rows]) for part in (plan.labels, plan.ids))
            grids.append(sample(model, labels, ids, config.sampling, config.seed).cpu().numpy())
            progress.update(len(ids))
        indices = np.concatenate(grids).astype(np.uint32).reshape(-1, 1, *model.grid)
        job.write(number, indices, plan.labels[first:last].astype(np.int32), plan.keys[first:last])
    progress.close()


if __name__ == "__main__":
    main()
