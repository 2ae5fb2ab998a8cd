"""Results: one JSON file of records per run of a command, and the table on the screen."""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

FORMAT = "omv2-results"
VERSION = 1
MADE = ("command", "versions", "seconds")  # of a record: how it was made, not what was measured


@dataclass(frozen=True)
class Record:
    """One measured number, or the reason why there is none."""

    metric: str  # snake case
    value: float | None
    unit: str | None = None
    status: str = "ok"  # "ok" or "unavailable"
    reason: str | None = None  # why it is unavailable
    count: int | None = None  # samples (or tokens) measured
    protocol: dict[str, Any] | None = None  # name, preprocessing, extractor, weight digest, ...
    data: str | None = None  # what was measured
    reference: str | None = None  # against what
    checkpoint: dict[str, Any] | None = None  # {"id", "digest"} of the model measured
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.status not in ("ok", "unavailable"):
            raise ValueError(f"{self.metric}: status={self.status!r}; allowed: 'ok', 'unavailable'")
        if self.status == "ok" and (self.value is None or not math.isfinite(self.value)):
            raise ValueError(f"{self.metric}: value={self.value} of a record with status 'ok'")
        if self.status == "unavailable" and (self.value is not None or not self.reason):
            raise ValueError(f"{self.metric}: an unavailable record has a reason and no value")


def write_results(out: Path, command: str, records: list[Record], seconds: float) -> Path:
    """Write `records` of the command `eval.COMMAND` into the folder `out` and return the path.

    The file name is the command and a digest of what was measured (data and checkpoint). Records of
    the same metric, reference and protocol are replaced, other records of the file stay. A number
    is never replaced by the news that it could not be had this time.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{command}-{_subject_digest(records)}.json"
    made = {"command": _command_line(command), "versions": _versions(), "seconds": seconds}
    fresh = [dataclasses.asdict(record) | made for record in records]
    content = _updated((_read(path) or []) if path.exists() else [], fresh)
    text = json.dumps(
        {"format": FORMAT, "version": VERSION, "records": content}, indent=1, allow_nan=False
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the records of every results file in `folder`, in the order of the file names.

    A measurement that is part of several runs (one classifier judges many sets of samples) is
    returned once.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of results")
    found = [record for path in sorted(folder.glob("*.json")) for record in _read(path) or []]
    measured = [{k: v for k, v in record.items() if k not in MADE} for record in found]
    return [record for i, record in enumerate(found) if measured[i] not in measured[:i]]


def print_table(records: list[Record]) -> None:
    """Print the records as an aligned table."""
    rows = [("metric", "value", "unit", "count", "protocol")]
    for record in records:
        name = str((record.protocol or {}).get("name", ""))
        value = "unavailable" if record.value is None else f"{record.value:.6g}"
        count = "" if record.count is None else str(record.count)
        rows.append((record.metric, value, record.unit or "", count, name))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record.reason:
            reasons.setdefault(record.reason, []).append(record.metric)
    for reason, metrics in reasons.items():
        print(f"unavailable: {', '.join(metrics)}: {reason}")


def _read(path: Path) -> list[dict[str, Any]] | None:
    """Return the records of a results file, or None if the file is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); remove it or write it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {content.get('version')!r} of {FORMAT}; this eval reads {VERSION}"
        )
    return content["records"]


def _updated(old: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a results file holds once `fresh` has been measured after `old`."""

    def topic(record: dict[str, Any]) -> tuple[str, str | None]:
        return record["metric"], record["reference"]

    def identity(record: dict[str, Any]) -> tuple[Any, ...]:
        return *topic(record), (record["protocol"] or {}).get("name")

    numbers = {identity(record) for record in fresh if record["value"] is not None}
    topics = {topic(record): record["count"] for record in fresh}
    kept = []
    for record in old:
        if topic(record) in topics:
            # Where the number of samples differs the data have changed under the same name.
            stale = record["count"] != topics[topic(record)] or identity(record) in numbers
            if stale or record["value"] is None:
                continue
        kept.append(record)
    known = {topic(record) for record in kept}
    return [
        record for record in fresh if record["value"] is not None or topic(record) not in known
    ] + kept


def _subject_digest(records: list[Record]) -> str:
    """Digest what was measured, whichever metrics were asked for: data and checkpoint."""
    what = set()
    for record in records:
        if record.data is not None:
            what.add(f"data={record.data}")
        if record.checkpoint is not None:
            what.add("checkpoint=" + json.dumps(record.checkpoint, sort_keys=True))
    return hashlib.sha256("\n".join(sorted(what)).encode()).hexdigest()[:12]


def _command_line(command: str) -> str:
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return shlex.join(["python", "-m", f"eval.{command}", *overrides])


def _versions() -> dict[str, str]:
    packages = ("omv2-eval", "torch", "torchvision", "numpy", "pillow")
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }
