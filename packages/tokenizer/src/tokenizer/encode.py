"""Pictures to index shards.

python -m tokenizer.encode ckpt=outputs/tokenizer/imagenet data=imagenet data.split=train \\
    views=[center,flip] out=outputs/tokens/imagenet/train

Under `accelerate launch` or `torchrun` the shards are shared out over the processes. The same
command again continues where the last one stopped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tokenizer.config import EncodeConfig, command
from tokenizer.data import open_dataset, ordered_batches, parse_views
from tokenizer.export import grid_of, source_fields, start, token_array
from tokenizer.job import Job, Output
from tokenizer.shards import (
    INDEX_FORMAT,
    MANIFEST_FILE,
    VERSION,
    Samples,
    ShardWriter,
)


@command("encode", EncodeConfig)
def main(config: EncodeConfig) -> None:
    """Write the token indices of a data set."""
    views = parse_views(config.views, config.seed)
    accelerator, tokenizer = start(config.ckpt, config.precision)
    grid = grid_of(tokenizer, config.data.resolution)
    dataset = open_dataset(config.data, config.data.split, train=False)
    accelerator.print(
        f"encoding {len(dataset):,} images of {config.data.name} ({config.data.split}) x "
        f"{len(views)} views with {config.ckpt} into {config.out}"
    )

    def process(ranges: Sequence[range]) -> Iterator[Output]:
        for batch in ordered_batches(dataset, views, ranges, config.data.num_workers):
            images = batch.images.flatten(0, 1)  # [b * views, 3, H, W]
            indices = torch.empty(len(images), *grid, dtype=torch.int64)
            for i in range(0, len(images), config.batch_size):
                part = images[i : i + config.batch_size].to(accelerator.device, non_blocking=True)
                with accelerator.autocast():
                    indices[i : i + len(part)] = tokenizer.encode(part)
            array = token_array(indices.unflatten(0, (len(batch.keys), len(views))))
            cls = batch.labels.numpy().astype(np.int32)
            yield Samples({"indices": array}, cls, batch.keys), batch.skipped

    out = Path(config.out)
    request = {
        "format": INDEX_FORMAT,
        "version": VERSION,
        **source_fields(tokenizer, dataset, config),
        "views": [view.to_json() for view in views],
    }
    job = Job(
        out, request, MANIFEST_FILE, num_items=len(dataset), part_size=config.samples_per_shard
    )
    job.run(
        accelerator,
        batch_size=max(1, config.batch_size // len(views)),
        process=process,
        open_sink=lambda part: ShardWriter(out, part, "npy"),
        ignored=dataset.ignored,
    )


if __name__ == "__main__":
    main()
