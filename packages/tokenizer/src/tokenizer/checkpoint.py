"""The tokenizer checkpoint: a folder with `config.json` and `model.safetensors`.

docs/artifacts.md specifies it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from tokenizer.config import ModelConfig
from tokenizer.files import (
    file_digest,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)

FORMAT = "omv2-tokenizer"
VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint read from disk."""

    model: dict[str, Any]  # keyword arguments of ModelConfig
    state: dict[str, Tensor]
    id: str  # the path or repository id it was asked for by
    digest: str  # sha256 of model.safetensors


def save(folder: Path, model: ModelConfig, state: Mapping[str, Tensor], step: int) -> None:
    """Write a checkpoint for use; the weights are renamed into place last."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "version": VERSION, "model": asdict(model)}
    write_json(folder / CONFIG_FILE, config)
    facts = {"format": FORMAT, "version": VERSION, "step": step}
    write_safetensors(folder / WEIGHTS_FILE, state, facts)


def load(path_or_id: str | Path) -> Loaded:
    """Read a checkpoint from a folder, or from the Hugging Face hub when no such folder exists."""
    folder = _resolve(str(path_or_id))
    weights = folder / WEIGHTS_FILE
    if not (folder / CONFIG_FILE).is_file() or not weights.is_file():
        raise FileNotFoundError(
            f"{folder} is no tokenizer checkpoint: it needs {CONFIG_FILE} and {WEIGHTS_FILE} "
            "(a training run writes them with its first checkpoint)"
        )
    config = read_json(folder / CONFIG_FILE, FORMAT, VERSION)
    return Loaded(config["model"], read_safetensors(weights), str(path_or_id), file_digest(weights))


def saved_step(folder: Path) -> int | None:
    """Return the training step of the weights in `folder`, or None where there are none."""
    if not (folder / WEIGHTS_FILE).is_file():
        return None
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
        return json.loads(weights.metadata()["omv2"])["step"]


def _resolve(path_or_id: str) -> Path:
    if Path(path_or_id).exists():
        return Path(path_or_id)
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no tokenizer checkpoint at {path_or_id!r}: no such folder, and not to be had as a "
            f"Hugging Face repository ({first_line}). Train one with "
            "`python -m tokenizer.train`, or set ckpt=FOLDER"
        ) from None
