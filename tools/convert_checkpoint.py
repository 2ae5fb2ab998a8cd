"""Convert the published Open-MAGVIT2 image tokenizers into checkpoint folders, and back.

    python tools/convert_checkpoint.py imagenet_256_L.ckpt outputs/tokenizer/imagenet_256
    python tools/convert_checkpoint.py AR_256_B.ckpt outputs/tokenizer/ar_256_b
    python tools/convert_checkpoint.py --export outputs/tokenizer/imagenet_256 exported.ckpt

The published files hold raw weights (`encoder.*`, `decoder.*`) and EMA shadows of them, whose names
are those of the raw weights without dots (`model_ema.encoderconv_inweight`). The shadows are what
the published numbers were measured with, and what is converted unless `--weights raw` is given. An
AR file carries the raw weights of its tokenizer (`first_stage_model.*`) and no shadows: those are
what its tokens were made with. Nothing but tensors is read from a file (`weights_only=True`).
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.autoencoder import Tokenizer
from tokenizer.config import ModelConfig

AR_PREFIX = "first_stage_model."
EMA_PREFIX = "model_ema."
NETWORKS = ("encoder.", "decoder.")
# What a tokenizer does not need: the discriminator, LPIPS, their shadows, the EMA's own settings
# and, in an AR file, the transformer.
NOT_NEEDED = (
    "loss.",
    "model_ema.loss",
    "model_ema.decay",
    "model_ema.num_updates",
    "transformer.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
)


@dataclass(frozen=True)
class Converted:
    """A tokenizer found in a published file."""

    config: ModelConfig
    state: dict[str, Tensor]  # by our names, which are those of the raw weights
    weights: str  # ema or raw
    ignored: dict[str, int]  # group of keys that is not needed -> how many there were


def main() -> None:
    """Parse the command line, convert, and say what was read, left out and written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="published .ckpt file (--export: our folder)")
    parser.add_argument("out", type=Path, help="checkpoint folder to write (--export: .ckpt file)")
    parser.add_argument("--weights", choices=("ema", "raw"), help="default: ema where there is one")
    parser.add_argument("--export", action="store_true", help="write the original layout instead")
    arguments = parser.parse_args()
    try:
        if arguments.export:
            export_file(arguments.source, arguments.out)
        else:
            convert_file(arguments.source, arguments.out, arguments.weights)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def convert_file(source: Path, out: Path, weights: str | None = None) -> None:
    """Write the tokenizer in the published file `source` as the checkpoint folder `out`."""
    content = read(source)
    converted = convert(content["state_dict"], weights)
    tokenizer = Tokenizer(converted.config)
    tokenizer.load_state_dict(converted.state)
    tokenizer.save_pretrained(out, step=int(content.get("global_step", 0)))
    print(f"read {source}: {converted.config.bits} bits, {converted.weights} weights")
    for group, count in converted.ignored.items():
        print(f"left out {count} entries of {group}*")
    if others := sorted(content.keys() - {"state_dict", "global_step"}):
        print(f"left out {', '.join(others)}")
    print(f"wrote {out}")


def export_file(source: Path, out: Path) -> None:
    """Write the checkpoint folder `source` in the original layout, weights and shadows alike."""
    tokenizer = Tokenizer.from_pretrained(source)
    temporary = out.with_name(out.name + ".tmp")
    torch.save({"state_dict": exported(tokenizer.state_dict())}, temporary)
    temporary.replace(out)
    print(f"wrote {out}: the weights of {source} as raw weights and as EMA shadows")


def read(path: Path) -> dict[str, Any]:
    """Load a published file without unpickling anything but tensors and plain containers."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # torch raises whatever the damaged part makes it raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"{path} has no state_dict: it is no published Open-MAGVIT2 file")
    return content


def convert(state: Mapping[str, Tensor], weights: str | None = None) -> Converted:
    """Pick the tokenizer's weights out of a published state dict.

    Args:
        state: all its entries.
        weights: `ema`, `raw`, or None for `ema` where there are shadows.

    Raises:
        ValueError: a key that is not known or a weight that is missing, by name; a video model;
            `weights=ema` where there are no shadows.
    """
    prefix = AR_PREFIX if any(key.startswith(AR_PREFIX) for key in state) else ""
    raw = {
        key.removeprefix(prefix): tensor
        for key, tensor in state.items()
        if key.startswith(tuple(prefix + network for network in NETWORKS))
    }
    if not raw:
        raise ValueError("no encoder.* or decoder.* weights: not a tokenizer, nor an AR file")
    if video := next((key for key in raw if ".conv_1." in key), None):
        raise ValueError(f"{video}: this is the video model; only image tokenizers are converted")
    config = read_config(raw)
    expected = expected_shapes(config)
    check_names(raw, expected, prefix)

    shadows = {shadow_name(key): key for key in expected}
    found = {shadows[key]: state[key] for key in state if key in shadows}
    chosen = weights or ("ema" if found else "raw")
    if chosen == "ema" and found.keys() != expected.keys():
        missing = next(iter(sorted(expected.keys() - found.keys())))
        raise ValueError(f"{shadow_name(missing)} is missing; --weights raw takes the raw weights")

    ignored: dict[str, int] = {}
    for key in state:
        if key in shadows or key.removeprefix(prefix) in raw:
            continue
        group = next((group for group in NOT_NEEDED if key.startswith(group)), None)
        if group is None:
            raise ValueError(f"{key}: a key of no known published file")
        ignored[group] = ignored.get(group, 0) + 1
    return Converted(config, found if chosen == "ema" else raw, chosen, ignored)


def exported(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the original layout of our weights: inverse of `convert` for both kinds of weights."""
    shadows = {shadow_name(key): tensor for key, tensor in state.items()}
    settings = {
        f"{EMA_PREFIX}decay": torch.tensor(0.999),
        f"{EMA_PREFIX}num_updates": torch.tensor(-1, dtype=torch.int32),
    }
    return dict(state) | settings | shadows


def shadow_name(key: str) -> str:
    """Return the name of the EMA shadow of a weight: without its dots."""
    return EMA_PREFIX + key.replace(".", "")


def read_config(raw: Mapping[str, Tensor]) -> ModelConfig:
    """Read the architecture off the shapes of the encoder."""
    blocks: dict[int, set[int]] = {}
    widths: dict[int, int] = {}
    for key, tensor in raw.items():
        parts = key.split(".")
        if parts[:2] == ["encoder", "down"] and parts[3] == "block":
            blocks.setdefault(int(parts[2]), set()).add(int(parts[4]))
            if parts[5:] == ["conv2", "weight"]:
                widths[int(parts[2])] = tensor.shape[0]
    try:
        base = raw["encoder.conv_in.weight"].shape[0]
        bits = raw["encoder.conv_out.weight"].shape[0]
        multipliers = [widths[level] // base for level in range(len(blocks))]
        return ModelConfig(bits, base, multipliers, blocks_per_level=len(blocks[0]))
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing: not a complete encoder") from None


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Return name and shape of every weight of a tokenizer."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in Tokenizer(config).state_dict().items()}


def check_names(raw: Mapping[str, Tensor], expected: Mapping[str, torch.Size], prefix: str) -> None:
    """Raise ValueError naming the first weight that is missing, unknown or of another shape."""
    if missing := sorted(expected.keys() - raw.keys()):
        raise ValueError(f"{prefix}{missing[0]} is missing ({len(missing)} in all)")
    if unknown := sorted(raw.keys() - expected.keys()):
        raise ValueError(f"{prefix}{unknown[0]}: no weight of this tokenizer has this name")
    for key, shape in expected.items():
        if raw[key].shape != shape:
            found = list(raw[key].shape)
            raise ValueError(f"{prefix}{key} has shape {found}, expected {list(shape)}")


if __name__ == "__main__":
    main()
