"""Pictures, their reconstructions and their tokens, as pair media shards: what eval.rfid measures.

python -m tokenizer.reconstruct ckpt=outputs/tokenizer/imagenet data=imagenet data.split=val \\
    out=outputs/reconstructions/imagenet/val

Under `accelerate launch` or `torchrun` the shards are shared out over the processes. The same
command again continues where the last one stopped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenizer.config import ReconstructConfig, command
from tokenizer.data import CENTER, open_dataset, ordered_batches
from tokenizer.export import channels_last, grid_of, source_fields, start, token_array
from tokenizer.job import Job, Output
from tokenizer.shards import (
    MANIFEST_FILE,
    MEDIA_FORMAT,
    VERSION,
    Samples,
    ShardWriter,
)


@command("reconstruct", ReconstructConfig)
def main(config: ReconstructConfig) -> None:
    """Write pairs of original (after resizing and the centre crop) and reconstruction."""
    accelerator, tokenizer = start(config.ckpt, config.precision)
    grid = grid_of(tokenizer, config.data.resolution)
    dataset = open_dataset(config.data, config.data.split, train=False)
    accelerator.print(
        f"reconstructing {len(dataset):,} images of {config.data.name} ({config.data.split}) with "
        f"{config.ckpt} into {config.out}"
    )

    def process(ranges: Sequence[range]) -> Iterator[Output]:
        size = config.data.resolution
        for batch in ordered_batches(dataset, [CENTER], ranges, config.data.num_workers):
            original = batch.images[:, 0]
            indices = original.new_empty(0, *grid)
            reconstruction = original.new_empty(0, 3, size, size)
            if len(original):
                with accelerator.autocast():
                    indices = tokenizer.encode(original.to(accelerator.device, non_blocking=True))
                    reconstruction = tokenizer.decode(indices)
            arrays: dict[str, NDArray[Any]] = {
                "original": channels_last(original),
                "reconstruction": channels_last(reconstruction),
                "indices": token_array(indices.unsqueeze(1)),
            }
            cls = batch.labels.numpy().astype(np.int32)
            yield Samples(arrays, cls, batch.keys), batch.skipped

    out = Path(config.out)
    request = {
        "format": MEDIA_FORMAT,
        "version": VERSION,
        "kind": "pairs",
        "encoding": config.encoding,
        "resolution": [config.data.resolution] * 2,
        **source_fields(tokenizer, dataset, config),
    }
    job = Job(
        out, request, MANIFEST_FILE, num_items=len(dataset), part_size=config.samples_per_shard
    )
    job.run(
        accelerator,
        batch_size=config.batch_size,
        process=process,
        open_sink=lambda part: ShardWriter(out, part, config.encoding),
        ignored=dataset.ignored,
    )


if __name__ == "__main__":
    main()
