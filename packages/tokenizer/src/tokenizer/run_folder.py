"""The folder of a training run: metrics, previews and the checkpoints it resumes from (see
docs/artifacts.md).

A step folder counts only when its `run.json`, written last, lists files that are there in full. So
a process may be killed at any moment and the same command continues from the newest complete step.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenizer.files import read_json, read_safetensors, write_json, write_safetensors

FORMAT = "omv2-training-state"
VERSION = 1
RUN_FILE = "run.json"

State = dict[str, dict[str, Tensor]]  # file name without suffix -> tensors


@dataclass(frozen=True)
class Resumed:
    """A complete step folder."""

    step: int
    settings: dict[str, Any]
    state: State


class RunFolder:
    """Where one training run writes. Only the main process may call the methods that write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    def latest_step(self) -> int | None:
        """Return the newest complete step, or None."""
        steps = [
            step
            for step in map(_complete_step, self.checkpoints.glob("step-*"))
            if step is not None
        ]
        return max(steps, default=None)

    def load(self, step: int) -> Resumed:
        """Read the state saved at `step`."""
        folder = self._step_folder(step)
        run = read_json(folder / RUN_FILE, FORMAT, VERSION)
        state = {Path(name).stem: read_safetensors(folder / name) for name in run["files"]}
        return Resumed(step, run["settings"], state)

    def save(self, step: int, settings: dict[str, Any], state: State, keep_last: int) -> None:
        """Publish the state of `step`; delete incomplete folders and old ones but `keep_last`."""
        folder = self._step_folder(step)
        temporary = folder.with_name(folder.name + ".tmp")
        for stale in (temporary, folder):  # left by a kill, or incomplete
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        facts = {"format": FORMAT, "version": VERSION}
        for name, tensors in state.items():
            write_safetensors(temporary / f"{name}.safetensors", tensors, facts)
        files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        run = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "settings": settings,
            "files": files,
        }
        write_json(temporary / RUN_FILE, run)
        _sync(temporary)
        temporary.rename(folder)
        latest = self.checkpoints / "latest.tmp"
        latest.write_text(folder.name + "\n")
        latest.replace(self.checkpoints / "latest")
        self._retain(keep_last)

    def log(self, record: Mapping[str, float | int]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines that a resumed run will write again, and a line cut short by a kill."""
        if not self.metrics.exists():
            return
        kept = [line for line in self.metrics.read_text().splitlines() if _step_of(line) <= step]
        temporary = self.metrics.with_name(self.metrics.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(self.metrics)

    def _step_folder(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:09d}"

    def _retain(self, keep_last: int) -> None:
        folders = sorted(self.checkpoints.glob("step-*"))
        complete = [folder for folder in folders if _complete_step(folder) is not None]
        for folder in folders:  # incomplete ones were left by a kill
            if folder not in complete[-keep_last:]:
                shutil.rmtree(folder)


def changed_settings(before: Any, now: Any, name: str = "") -> list[str]:
    """Return the dotted names whose values differ between two nested settings, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [
            line
            for key in names
            for line in changed_settings(
                before.get(key), now.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if before == now else [f"{name} (was {before!r}, now {now!r})"]


def _complete_step(folder: Path) -> int | None:
    """Return the step of a folder whose run.json lists files that are all there, or None."""
    try:
        run = json.loads((folder / RUN_FILE).read_text())
        complete = all(
            (folder / name).stat().st_size == size for name, size in run["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return int(run["step"]) if complete and folder.suffix != ".tmp" else None


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _sync(folder: Path) -> None:
    """Make sure the content of `folder` is on the disk before it is renamed."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
