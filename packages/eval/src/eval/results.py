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


def unavailable(record: Record, reason: str) -> Record:
    """Return `record` without its value, carrying the reason."""
    return dataclasses.replace(record, value=None, status="unavailable", reason=reason)


def write_results(out: Path, command: str, records: list[Record], seconds: float) -> Path:
    """Write `records` of the command `eval.COMMAND` into the folder `out` and return the path.

    The file name is the command and a digest of what was measured (data, reference, protocol,
    checkpoint): the same measurement replaces its own records, keeps the others of that file, and
    leaves other files alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{command}-{_measurement_digest(records)}.json"
    made = {"command": _command_line(command), "versions": _versions(), "seconds": seconds}
    fresh = [dataclasses.asdict(record) | made for record in records]
    names = {record.metric for record in records}
    kept = [old for old in _read(path) or [] if old["metric"] not in names] if path.exists() else []
    text = json.dumps(
        {"format": FORMAT, "version": VERSION, "records": fresh + kept}, indent=1, allow_nan=False
    )
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the records of every results file in `folder`, in the order of the file names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of results")
    records: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        records += _read(path) or []
    return records


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


def _measurement_digest(records: list[Record]) -> str:
    """Digest what was measured, without the weights: a run that has them replaces one without."""
    what = set()
    for record in records:
        protocol = (record.protocol or {}).get("name")
        parts = {"data": record.data, "reference": record.reference, "protocol": protocol}
        what |= {f"{key}={value}" for key, value in parts.items() if value is not None}
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
