"""Measure how a tokenizer's codebook is used over a data set.

    python -m eval.codes tokens=outputs/tokens/val out=outputs/eval

All tokens of all views count. Beside the results lies the count of each code, for eval.report.
"""

import time
from itertools import islice
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from eval.codebook import PROTOCOL, UNITS, CodebookCounts, CodebookUse, save_counts
from eval.config import CodesConfig, command
from eval.measure import gather_merged
from eval.media import open_index_shards
from eval.results import Record, print_table, write_results
from eval.shards import IndexShards, maker


def count_tokens(
    shards: IndexShards, rank: int = 0, world: int = 1, show: bool = True
) -> CodebookCounts:
    """Count the tokens of every `world`-th block of `shards`, from block `rank` on."""
    counts = CodebookCounts(shards.codebook_bits)
    with tqdm(total=len(shards), desc="tokens", unit=" samples", disable=not show) as progress:
        for block in islice(shards, rank, None, world):
            try:
                counts.update(np.asarray(block))
            except ValueError as error:
                raise ValueError(f"{shards.name}: {error}") from None
            progress.update(min(len(block) * world, len(shards) - progress.n))
    return counts


def codebook_records(use: CodebookUse, shards: IndexShards) -> list[Record]:
    """Return what `use` says as records."""
    made_by = maker(shards.manifest)
    views = [view["name"] for view in shards.manifest["views"]]
    values: dict[str, float] = {
        "codebook_usage": use.usage,
        "codebook_perplexity": use.perplexity,
        "codebook_entropy_bits": use.entropy_bits,
        "codebook_dead": use.dead,
        "codebook_tokens": use.tokens,
    }
    return [
        Record(
            metric,
            value,
            unit=UNITS[metric],
            count=use.tokens,
            protocol=PROTOCOL | use.facts() | {"views": views},
            data=shards.name,
            checkpoint=made_by.checkpoint,
            seed=made_by.seed,
        )
        for metric, value in values.items()
    ]


@command("codes", CodesConfig)
def main(config: CodesConfig) -> None:
    """Count the tokens with all processes; the main process writes the results."""
    start = time.perf_counter()
    accelerator = Accelerator(cpu=True)  # counting needs no device
    shards = open_index_shards(config.tokens)
    accelerator.print(f"tokens: {shards.name}, {len(shards):,} samples")
    mine = count_tokens(
        shards, accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    )
    counts = gather_merged(mine)
    if accelerator.is_main_process:
        records = codebook_records(counts.compute(), shards)
        seconds = time.perf_counter() - start
        path = write_results(Path(config.out), "codes", records, seconds)
        save_counts(path.with_suffix(".safetensors"), counts, shards.name)
        print_table(records)
        print(f"results: {path}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
