"""Files on disk: atomic writes, digests, JSON that carries its format and version."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path, expected_format: str, expected_version: int = 1) -> dict[str, Any]:
    """Read a JSON object and refuse, by name, another format or version than the expected ones."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write it anew") from None
    if not isinstance(value, dict) or value.get("format") != expected_format:
        found = value.get("format") if isinstance(value, dict) else None
        raise ValueError(f"{path} has format {found!r}, expected {expected_format!r}")
    if value.get("version") != expected_version:
        raise ValueError(
            f"{path} has version {value.get('version')!r} of {expected_format}; "
            f"this program reads version {expected_version}"
        )
    return value


def sha256_file(path: Path) -> str:
    """Return the digest of a file's bytes as `sha256:HEX`."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
