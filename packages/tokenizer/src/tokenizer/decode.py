"""Index shards to pictures.

python -m tokenizer.decode tokens=outputs/samples ckpt=outputs/tokenizer/imagenet \\
    out=outputs/decoded format=npy

Formats: `npy` and `png` are media shards, `folder` has a file KEY.png per sample, `npz` is one file
samples.npz in the layout of ADM's evaluator. Under `accelerate launch` or `torchrun` the work is
shared out over the processes. The same command again continues where the last one stopped.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenizer.autoencoder import Tokenizer
from tokenizer.config import DecodeConfig, command
from tokenizer.export import channels_last, describe, start
from tokenizer.job import Job, Output, Sink
from tokenizer.picture_files import NpzPart, PictureFolder, join_npz
from tokenizer.shards import (
    BLOCK_SIZE,
    MANIFEST_FILE,
    MEDIA_FORMAT,
    VERSION,
    IndexShards,
    Samples,
    ShardWriter,
    json_digest,
)

# The record of a folder or an .npz file, which are no media shards.
DECODE_FORMAT = "omv2-decode"
DECODE_FILE = "decode.json"


@command("decode", DecodeConfig)
def main(config: DecodeConfig) -> None:
    """Write the pictures of one view of a folder of index shards."""
    tokens = IndexShards(Path(config.tokens))
    accelerator, tokenizer = start(config.ckpt, config.precision)
    _check(config, tokens.manifest, tokenizer)
    accelerator.print(
        f"decoding {len(tokens):,} samples of {config.tokens} (view {config.view}) with "
        f"{config.ckpt} into {config.out}"
    )

    def process(ranges: Sequence[range]) -> Iterator[Output]:
        for batch in ranges:
            samples = tokens.read(batch.start, batch.stop)
            indices = torch.from_numpy(samples.arrays["indices"][:, config.view].astype("int64"))
            with accelerator.autocast():
                images = tokenizer.decode(indices.to(accelerator.device))
            yield Samples({"images": channels_last(images)}, samples.cls, samples.keys), []

    out = Path(config.out)
    shards = config.format in ("npy", "png")

    def open_sink(part: int) -> Sink:
        if shards:
            return ShardWriter(out, part, config.format)
        return PictureFolder(out) if config.format == "folder" else NpzPart(out, part)

    def finish(parts: list[dict[str, Any]]) -> dict[str, Any]:
        if config.format == "npz":
            join_npz(out, parts)
        return {"shards": parts} if shards else {}

    job = Job(
        out,
        _request(config, tokens.manifest, tokenizer),
        MANIFEST_FILE if shards else DECODE_FILE,
        num_items=len(tokens),
        part_size=config.samples_per_shard,
    )
    job.run(
        accelerator,
        batch_size=config.batch_size,
        process=process,
        open_sink=open_sink,
        finish=finish,
    )


def _check(config: DecodeConfig, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raise ValueError where tokens and tokenizer do not belong together."""
    written_by = manifest["tokenizer"]
    if written_by["digest"] != tokenizer.digest and not config.allow_other_tokenizer:
        raise ValueError(
            f"tokens={config.tokens} are of the tokenizer {written_by['id']} "
            f"({written_by['digest'][:19]}...), not of ckpt={config.ckpt} "
            f"({tokenizer.digest[:19]}...): give that one, or set allow_other_tokenizer=true"
        )
    if manifest["codebook_bits"] != tokenizer.config.bits:
        raise ValueError(
            f"tokens={config.tokens} have {manifest['codebook_bits']} bits, "
            f"ckpt={config.ckpt} has {tokenizer.config.bits}"
        )
    if len(manifest["grid"]) != 2:
        raise ValueError(f"tokens={config.tokens} are of videos (grid {manifest['grid']})")
    if config.view >= len(manifest["views"]):
        raise ValueError(
            f"view={config.view}: tokens={config.tokens} have the views 0 to "
            f"{len(manifest['views']) - 1}"
        )


def _request(
    config: DecodeConfig, manifest: dict[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
    return {
        "format": MEDIA_FORMAT if config.format in ("npy", "png") else DECODE_FORMAT,
        "version": VERSION,
        "kind": "images",
        "encoding": config.format,
        "resolution": [side * tokenizer.downsample for side in manifest["grid"]],
        **describe(tokenizer, config.precision),
        "block_size": BLOCK_SIZE,
        "class_names": manifest["class_names"],
        "source": {
            "name": "tokenizer.decode",
            "view": config.view,
            "samples_per_shard": config.samples_per_shard,
            "tokens": {
                "tokenizer": manifest["tokenizer"],
                "digest": json_digest([shard["sha256"] for shard in manifest["shards"]]),
                "source": manifest["source"],
            },
        },
    }


if __name__ == "__main__":
    main()
