"""The folder of a training run: metrics and checkpoints (docs/artifacts.md, Checkpoint).

A step folder counts only when its `run.json`, written last, lists files that are there in full. So
a process may be killed at any moment and the same command goes on from the newest complete step.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ar.checkpoint import save_tensors
from ar.files import read_json, write_atomic, write_json

FORMAT = "omv2-ar-run"


@dataclass(frozen=True)
class Saved:
    """A complete step folder."""

    folder: Path
    step: int
    identity: dict[str, Any]  # what must not change between a run and its continuation
    notes: dict[str, Any]  # what else the run wants to remember

    @property
    def weights(self) -> Path:
        """Return the file of the weights to use: their average, where there is one."""
        average = self.folder / "ema.safetensors"
        return average if average.is_file() else self.folder / "model.safetensors"

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load `NAME.safetensors`."""
        return load_file(self.folder / f"{name}.safetensors")


class RunFolder:
    """Where one training run writes. Only the main process may call what writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    def newest(self) -> Saved | None:
        """Return the newest complete step folder.

        Raises:
            ValueError: when the folder holds a model but nothing to resume from.
        """
        saved = self._complete()
        if not saved and (self.path / "model.safetensors").exists():
            raise ValueError(
                f"out={self.path}: holds a model but no checkpoint to resume from; "
                "choose a new folder"
            )
        return saved[-1] if saved else None

    def save(
        self,
        step: int,
        files: dict[str, dict[str, Tensor]],
        identity: dict[str, Any],
        notes: dict[str, Any],
        keep_last: int,
    ) -> None:
        """Write a step folder, then `settle`.

        Args:
            files: tensors by file name (without suffix) and name: `model`, `optimizer` and, where
                the weights are averaged, `ema`.
            keep_last: how many step folders remain.
        """
        folder = self.checkpoints / f"step-{step:09d}"
        temporary = folder.with_name(folder.name + ".tmp")
        for stale in (temporary, folder):  # left by a kill, or incomplete
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in files.items():
            path = temporary / f"{name}.safetensors"
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_tensors(path, plain, step)
            _sync(path)
        sizes = [{"name": p.name, "size": p.stat().st_size} for p in sorted(temporary.iterdir())]
        run = {
            "format": FORMAT,
            "version": 1,
            "step": step,
            "files": sizes,
            "identity": identity,
            "notes": notes,
        }
        write_json(temporary / "run.json", run)
        temporary.rename(folder)
        self.settle(keep_last)

    def settle(self, keep_last: int) -> None:
        """Publish the newest step folder, then delete those that are too old or half-written.

        Also finishes what a kill left undone.
        """
        saved = self._complete()
        if saved:
            newest = saved[-1]
            write_atomic(self.checkpoints / "latest", (newest.folder.name + "\n").encode())
            if _published_step(self.path / "model.safetensors") != newest.step:
                self._publish(newest.weights)
        for half_written in self.checkpoints.glob("step-*.tmp"):
            shutil.rmtree(half_written)
        for old in saved[:-keep_last]:
            # Renamed first, so that a kill leaves no part of it under its name.
            shutil.rmtree(old.folder.rename(old.folder.with_name(old.folder.name + ".tmp")))

    def append_metrics(self, record: dict[str, float | int | None]) -> None:
        """Add one line to `metrics.jsonl`."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines that a resumed run writes again, and a line cut short by a kill."""
        if self.metrics.exists():
            lines = self.metrics.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            write_atomic(self.metrics, "".join(line + "\n" for line in kept).encode())

    def _complete(self) -> list[Saved]:
        saved = [_read(folder) for folder in sorted(self.checkpoints.glob("step-*"))]
        return [entry for entry in saved if entry is not None]

    def _publish(self, source: Path) -> None:
        """Make `source` the run's model.safetensors, by a hard link where the disk has them."""
        temporary = self.path / "model.safetensors.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(self.path / "model.safetensors")


def _read(folder: Path) -> Saved | None:
    """Return a step folder when it is complete."""
    if folder.suffix == ".tmp" or not (folder / "run.json").is_file():
        return None
    run = read_json(folder / "run.json", FORMAT)
    for file in run["files"]:
        path = folder / file["name"]
        if not path.is_file() or path.stat().st_size != file["size"]:
            return None
    return Saved(folder, run["step"], run["identity"], run["notes"])


def _published_step(path: Path) -> int | None:
    """Return the step of published weights, or None where there are none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["omv2"])["step"]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
