"""Files on disk: digests, JSON that carries its format and version, tensors; all written whole."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def file_digest(path: Path) -> str:
    """Return `sha256:...` of a file's content."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, replacing `path` in one piece."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    _publish(temporary, path)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors, replacing `path` in one piece; the bytes depend on the arguments only.

    `facts` become one entry of metadata: safetensors orders several at random.
    """
    temporary = path.with_name(path.name + ".tmp")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary.touch()
    mode = temporary.stat().st_mode  # as the umask has it; safetensors lets only the owner read
    save_file(plain, temporary, {"omv2": json.dumps(facts)})
    temporary.chmod(mode)
    _publish(temporary, path)


def _publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name once its content is on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path, expected_format: str, expected_version: int) -> dict[str, Any]:
    """Read a JSON object; refuse, by name, what is none and another format or version."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}): write it anew") from None
    found = content if isinstance(content, dict) else {}
    if found.get("format") != expected_format:
        raise ValueError(f"{path}: format is {found.get('format')!r}, expected {expected_format!r}")
    if found.get("version") != expected_version:
        raise ValueError(
            f"{path}: version is {found.get('version')!r}, this program reads {expected_version}"
        )
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, or raise ValueError naming it where it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): copy or write it anew") from None
