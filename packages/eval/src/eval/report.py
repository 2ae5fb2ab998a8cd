"""Write one self-contained HTML page about a run folder, and all its records as results.json.

    python -m eval.report run=outputs/eval pairs=outputs/pairs samples=outputs/samples \
        runs=[outputs/tokenizer/digits,outputs/ar/digits]

Sections whose input is not given are left out. The page loads nothing from the network.
"""

import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState

from eval.codebook import CodebookCounts, load_counts
from eval.codes import count_tokens
from eval.config import ReportConfig, command
from eval.media import open_index_shards
from eval.page.curves import read_run
from eval.page.gallery import choose_samples, rank_pairs
from eval.page.sections import (
    Section,
    build_page,
    codebook_section,
    commands_section,
    curves_section,
    pairs_section,
    results_section,
    samples_section,
)
from eval.results import Record, print_table, read_results


def load_codebooks(config: ReportConfig) -> dict[str, CodebookCounts]:
    """Count the index shards `tokens`, or read what eval.codes left in the run folder."""
    if config.tokens is not None:
        shards = open_index_shards(config.tokens)
        return {shards.name: count_tokens(shards)}
    return dict(load_counts(path) for path in sorted(Path(config.run).glob("codes-*.safetensors")))


def build_sections(config: ReportConfig, records: list[dict[str, Any]]) -> list[Section]:
    """Return the sections whose input is there, in the order of the page.

    Raises:
        ValueError: there is nothing at all to show.
    """
    sections = []
    if records:
        sections.append(results_section(records))
    if config.pairs is not None:
        sections.append(pairs_section(rank_pairs(config.pairs, config.columns)))
    if config.samples is not None:
        samples = choose_samples(config.samples, config.columns, config.max_classes)
        sections.append(samples_section(samples))
    if config.runs:
        sections.append(curves_section([read_run(folder) for folder in config.runs]))
    if codebooks := load_codebooks(config):
        sections.append(codebook_section(codebooks))
    if any(record.get("command") for record in records):
        sections.append(commands_section(records))
    if not sections:
        raise ValueError(
            f"run={config.run}: holds no results; give this folder as `out` to another eval command"
        )
    return sections


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_report(config: ReportConfig) -> tuple[Path, list[dict[str, Any]]]:
    """Write the page and results.json; return the page's path and the records."""
    records = read_results(Path(config.run))
    sections = build_sections(config, records)
    out = Path(config.out) if config.out is not None else Path(config.run) / "report.html"
    title = config.title or f"Results of {Path(config.run).resolve().name}"
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out.with_name("results.json"), json.dumps(records, indent=1) + "\n")
    write_text(out, build_page(title, date, records, sections))
    return out, records


def as_record(record: dict[str, Any]) -> Record:
    """Return what a results file holds of a record as a Record."""
    known = [field.name for field in dataclasses.fields(Record)]
    return Record(**{name: record[name] for name in known if name in record})


@command("report", ReportConfig)
def main(config: ReportConfig) -> None:
    """Write the report on the main process."""
    if not PartialState(cpu=True).is_main_process:
        return
    path, records = write_report(config)
    if records:
        print_table([as_record(record) for record in records])
    print(f"report: {path}")
    print(f"records: {path.with_name('results.json')}")


if __name__ == "__main__":
    main()
