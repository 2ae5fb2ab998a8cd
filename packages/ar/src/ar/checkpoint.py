"""Checkpoints for use: `config.json` (the card) and `model.safetensors` (docs/artifacts.md)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ar.config import ModelConfig
from ar.files import read_json, write_json

FORMAT = "omv2-ar"
VERSION = 1


def write_card(folder: Path, config: ModelConfig, tokens: dict[str, Any]) -> None:
    """Write the `config.json` of a checkpoint."""
    model = dataclasses.asdict(config)
    write_json(
        folder / "config.json",
        {"format": FORMAT, "version": VERSION, "model": model, "tokens": tokens},
    )


def read_card(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint and check its fields."""
    card = read_json(folder / "config.json", FORMAT)
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    model, tokens = card.get("model"), card.get("tokens")
    if not isinstance(model, dict) or not isinstance(tokens, dict):
        raise ValueError(f"{folder / 'config.json'} lacks `model` or `tokens`")
    if unknown := sorted(set(model) - known):
        raise ValueError(f"{folder / 'config.json'} has unknown model options {unknown}")
    if missing := sorted({"tokenizer", "codebook_bits", "grid", "class_names"} - set(tokens)):
        raise ValueError(f"{folder / 'config.json'} lacks {missing} in `tokens`")
    return card


def save_tensors(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    """Write named tensors as safetensors whose bytes depend on their content only.

    The facts are one entry of metadata: the library orders several at random.
    """
    facts = {"format": FORMAT, "version": VERSION, "step": step}
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; safetensors lets only the owner read
    save_file(tensors, path, metadata={"omv2": json.dumps(facts)})
    path.chmod(mode)


def write_weights(path: Path, weights: dict[str, Any], step: int) -> None:
    """Write named tensors as fp32 safetensors, atomically."""
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    temporary = path.with_name(path.name + ".tmp")
    save_tensors(temporary, plain, step)
    temporary.replace(path)


def load_weights(model: nn.Module, path: Path, assign: bool = False) -> None:
    """Load safetensors into `model`, strictly; a mismatch names the first tensors concerned."""
    weights = load_file(path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if wrong:
        shown = "; ".join(
            f"{n}: {found.get(n, 'absent')} vs {expected.get(n, 'absent')}" for n in wrong[:3]
        )
        raise ValueError(
            f"{path} does not fit the model in {len(wrong)} tensors (file vs model): {shown}"
        )
    model.load_state_dict(weights, strict=True, assign=assign)


def checkpoint_folder(path: str | Path) -> Path:
    """Return the local folder of a checkpoint, downloaded where `path` names a repository."""
    folder = Path(path)
    if folder.is_dir():
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"ckpt={path}: the folder has no {name}; it is no checkpoint, or has none yet"
                )
        return folder
    if str(path).count("/") != 1 or folder.is_absolute() or str(path).startswith("."):
        raise FileNotFoundError(f"ckpt={path}: no such folder; give the run folder of ar.train")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(str(path), allow_patterns=["config.json", "model.safetensors"])
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"ckpt={path}: neither a folder nor a repository on the hub ({reason})"
        ) from None
