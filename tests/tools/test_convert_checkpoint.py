"""Published files, built from the tables of their keys and shapes, become checkpoints and back.

Every tensor is one number, drawn from its key and spread over its shape, so that a weight in the
wrong place is seen although the files are small.
"""

import ast
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import convert_checkpoint
from tokenizer.autoencoder import Tokenizer
from tokenizer.config import ModelConfig

TABLES = Path(__file__).parent / "state_dicts"
CONFIGS = {
    "imagenet_256": ModelConfig(),
    "imagenet_128": ModelConfig(multipliers=[1, 2, 2, 4]),
    "pretrain256_16384": ModelConfig(bits=14),
}


def number(key: str) -> float:
    return zlib.crc32(key.encode()) / 2**32


def published(name: str) -> dict[str, Tensor]:
    """Return a state dict with the keys, shapes and types of a published file."""
    state = {}
    for line in (TABLES / f"{name}.tsv").read_text().splitlines():
        key, shape, dtype = line.split("\t")
        value = torch.tensor(number(key)).to(getattr(torch, dtype))
        state[key] = value.expand(ast.literal_eval(shape))
    return state


def values(state: dict[str, Tensor]) -> dict[str, float]:
    return {key: tensor.flatten()[0].item() for key, tensor in state.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_every_weight_of_a_published_file_finds_its_place(name: str, weights: str) -> None:
    converted = convert_checkpoint.convert(published(name), weights)
    assert converted.config == CONFIGS[name]
    with torch.device("meta"):
        expected = Tokenizer(CONFIGS[name]).state_dict()
    assert {key: t.shape for key, t in converted.state.items()} == {
        key: t.shape for key, t in expected.items()
    }
    for key, value in values(converted.state).items():
        source = "model_ema." + key.replace(".", "") if weights == "ema" else key
        assert value == pytest.approx(number(source), abs=1e-7)
    assert sum(converted.ignored.values()) == len(published(name)) - 2 * len(expected)


def test_a_file_becomes_a_checkpoint_folder_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = published("imagenet_128")
    content = {"state_dict": state, "global_step": 1750, "optimizer_states": [], "callbacks": {}}
    torch.save(content, tmp_path / "imagenet_128_L.ckpt")
    convert_checkpoint.convert_file(tmp_path / "imagenet_128_L.ckpt", tmp_path / "folder")
    printed = capsys.readouterr().out
    assert "ema weights" in printed and "entries of loss.*" in printed
    assert "left out callbacks, optimizer_states" in printed

    tokenizer = Tokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.config == CONFIGS["imagenet_128"]
    convert_checkpoint.export_file(tmp_path / "folder", tmp_path / "exported.ckpt")
    exported = convert_checkpoint.read(tmp_path / "exported.ckpt")["state_dict"]
    # The layout is the original's, without what belongs to its losses.
    needed = {key for key in state if "loss" not in key}
    assert exported.keys() == needed
    for weights in ("ema", "raw"):
        again = convert_checkpoint.convert(exported, weights)
        assert values(again.state) == values(tokenizer.state_dict())


def test_the_tokenizer_in_an_ar_file_is_extracted() -> None:
    raw = {k: t for k, t in published("imagenet_256").items() if k.startswith(("enc", "dec"))}
    state = {f"first_stage_model.{key}": tensor for key, tensor in raw.items()}
    state |= {"transformer.pre_emb.weight": torch.zeros(64, 1024)}
    converted = convert_checkpoint.convert(state)
    assert converted.weights == "raw"
    assert values(converted.state) == values(raw)
    assert converted.ignored == {"transformer.": 1}
    with pytest.raises(ValueError, match="--weights raw"):
        convert_checkpoint.convert(state, "ema")


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        (["decoder.conv_out.bias"], {}, r"decoder\.conv_out\.bias is missing"),
        (["encoder.conv_in.weight"], {}, r"encoder\.conv_in\.weight is missing"),
        (["model_ema.encoderconv_outbias"], {}, "model_ema.encoderconv_outbias is missing"),
        ([], {"encoder.attn.weight": (1,)}, r"encoder\.attn\.weight: no weight"),
        ([], {"quantize.embedding.weight": (1,)}, r"quantize\.embedding\.weight: a key of no"),
        ([], {"encoder.conv_in.conv_1.weight": (1,)}, "video model"),
        ([], {"decoder.conv_out.bias": (4,)}, r"decoder\.conv_out\.bias has shape \[4\]"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    remove: list[str], add: dict[str, tuple[int, ...]], message: str
) -> None:
    state = published("imagenet_128")
    for key in remove:
        del state[key]
    state |= {key: torch.zeros(shape) for key, shape in add.items()}
    with pytest.raises(ValueError, match=message):
        convert_checkpoint.convert(state)


def test_a_file_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hook": Path("x").exists}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of tensors"):
        convert_checkpoint.read(tmp_path / "bad.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(b"PK half a file")
    with pytest.raises(ValueError, match="cannot be read"):
        convert_checkpoint.read(tmp_path / "cut.ckpt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_checkpoint.read(tmp_path / "nowhere.ckpt")
