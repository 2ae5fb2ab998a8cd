"""What training shows of held-out images where some of them cannot be read."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tokenizer.autoencoder import Tokenizer
from tokenizer.config import DataConfig, ModelConfig
from tokenizer.data import Dataset, open_dataset
from tokenizer.validation import preview_grid, validate

SIZE = 16


class Inverting(Tokenizer):
    """Reconstructs the negative of every image."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, indices: torch.Tensor) -> torch.Tensor:
        return 255 - indices


@pytest.fixture
def tokenizer() -> Tokenizer:
    model = ModelConfig(4, base_channels=4, multipliers=[1], blocks_per_level=1, norm_groups=2)
    return Inverting(model)


def grey_pictures(root: Path, values: list[int | None]) -> Dataset:
    for i, value in enumerate(values):
        path = root / f"{i}.png"
        if value is None:
            path.write_bytes(b"damaged")
        else:
            Image.new("L", (SIZE, SIZE), value).save(path)
    config = DataConfig(name="folder", root=str(root), resolution=SIZE, num_workers=0)
    return open_dataset(config, "all", train=False)


def test_psnr_is_the_mean_over_readable_images(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = grey_pictures(tmp_path, [0, None, 100, 50])
    record = validate(tokenizer, dataset, 3, 2, 0, Accelerator(cpu=True))
    # Errors of 255 and 55 levels; the fourth picture is beyond the first three.
    assert record["val_psnr"] == pytest.approx((0 + 20 * math.log10(255 / 55)) / 2)
    assert record["val_skipped"] == 1
    assert "val_skipped" not in validate(tokenizer, dataset, 1, 2, 0, Accelerator(cpu=True))


def test_no_readable_image_gives_neither_psnr_nor_preview(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    dataset = grey_pictures(tmp_path, [None, None])
    assert validate(tokenizer, dataset, 0, 8, 0, Accelerator(cpu=True)) == {"val_skipped": 2}
    assert preview_grid(tokenizer, dataset, 2) is None


def test_a_preview_has_each_original_above_its_reconstruction(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    grid = preview_grid(tokenizer, grey_pictures(tmp_path, [10, None, 20]), 3)
    assert grid is not None and grid.shape == (3, 2 * SIZE + 6, 2 * SIZE + 6)
    first, second = SIZE // 2, SIZE // 2 + SIZE + 2
    values = [[grid[0, y, x].item() for x in (first, second)] for y in (first, second)]
    assert values == [[10, 20], [245, 235]]
