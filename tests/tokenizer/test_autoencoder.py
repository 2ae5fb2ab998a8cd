"""The public Tokenizer: uint8 in, tokens, uint8 out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenizer.autoencoder import Tokenizer
from tokenizer.config import ModelConfig
from tokenizer.layers import AdaptiveGroupNorm, depth_to_space
from tokenizer.pixels import to_float, to_uint8

TINY = ModelConfig(bits=6, base_channels=8, multipliers=[1, 2], blocks_per_level=1, norm_groups=4)


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(TINY).eval()


def test_every_pixel_value_survives_the_round_trip_through_floats() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).min() == -1
    assert to_float(levels).max() == 1


def test_float_pixels_are_clipped_not_wrapped() -> None:
    assert to_uint8(torch.tensor([-1.7, 1.7])).tolist() == [0, 255]


def test_images_become_tokens_of_the_right_shape_and_range(tokenizer: Tokenizer) -> None:
    images = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
    indices = tokenizer.encode(images)
    assert indices.shape == (3, 4, 6)
    assert indices.dtype == torch.int64
    assert 0 <= indices.min() and indices.max() < 64
    decoded = tokenizer.decode(indices)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.uint8


def test_decoding_the_tokens_equals_the_forward_pass(tokenizer: Tokenizer) -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        forward = to_uint8(tokenizer(to_float(images)).image)
    decoded = tokenizer.decode(tokenizer.encode(images))
    # Straight-through codes z + (sign z - z) may differ from sign z by a rounding error.
    assert (forward.int() - decoded.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8), "uint8"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), r"\[B, 3, H, W\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\[B, 3, H, W\]"),
        (torch.zeros(1, 3, 9, 8, dtype=torch.uint8), "multiples of 2.*9 x 8"),
    ],
)
def test_wrong_images_are_refused(tokenizer: Tokenizer, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images)


def test_saved_and_loaded_tokenizers_are_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path, step=7)
    loaded = Tokenizer.from_pretrained(tmp_path)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert loaded.config == TINY
    assert not loaded.training
    assert loaded.digest.startswith("sha256:") and len(loaded.digest) == 71
    assert not list(tmp_path.glob("*.tmp"))
    # Readable by whom other new files are readable by.
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_weights_that_do_not_fit_exactly_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.conv_in.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("format", "omv2-ar"), ("version", 2)])
def test_another_format_or_version_is_refused_by_name(
    tokenizer: Tokenizer, tmp_path: Path, key: str, value: object
) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=key):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_named(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20])
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_pretrained(tmp_path)


def test_a_folder_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer checkpoint"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="ckpt=FOLDER"):
        Tokenizer.from_pretrained(tmp_path / "not" / "there")


def test_depth_to_space_is_block_major() -> None:
    channels = 3
    x = torch.randn(2, 4 * channels, 4, 5)
    out = depth_to_space(x, (2, 2))
    for c, h, w, i, j in [(0, 0, 0, 0, 0), (2, 3, 4, 1, 0), (1, 2, 1, 0, 1), (2, 1, 3, 1, 1)]:
        expected = x[1, (2 * i + j) * channels + c, h, w]
        assert out[1, c, 2 * h + i, 2 * w + j] == expected


def test_depth_to_space_of_a_video_is_block_major_too() -> None:
    channels = 2
    x = torch.randn(1, 8 * channels, 3, 4, 5)
    out = depth_to_space(x, (2, 2, 2))
    assert out.shape == (1, channels, 6, 8, 10)
    assert out[0, 1, 5, 2, 9] == x[0, (4 * 1 + 2 * 0 + 1) * channels + 1, 2, 1, 4]


def test_adaptive_norm_of_a_single_token_is_finite() -> None:
    norm = AdaptiveGroupNorm(8, bits=6, groups=4)
    assert norm(torch.randn(2, 8, 1, 1), torch.ones(2, 6, 1, 1)).isfinite().all()


def test_adaptive_norm_follows_its_formula() -> None:
    norm = AdaptiveGroupNorm(8, bits=6, groups=4)
    x, code = torch.randn(2, 8, 4, 4), torch.randn(2, 6, 4, 4).sign()
    plain = torch.nn.functional.group_norm(x, 4, eps=1e-6)
    sigma = (code.var((2, 3), unbiased=True) + 1e-6).sqrt()
    gain, shift = norm.gamma(sigma), norm.beta(code.mean((2, 3)))
    expected = gain[:, :, None, None] * plain + shift[:, :, None, None]
    torch.testing.assert_close(norm(x, code), expected)
