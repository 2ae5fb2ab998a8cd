"""Encoder, decoder and the Tokenizer that joins them: uint8 images to token indices and back.

    tokenizer = Tokenizer.from_pretrained("outputs/tokenizer/digits")
    indices = tokenizer.encode(images)      # uint8 [B, 3, H, W] -> int64 [B, h, w]
    images = tokenizer.decode(indices)      # int64 [B, h, w] -> uint8 [B, 3, H, W]

Shape suffixes: B batch, C channels, K codebook bits, H x W pixels, h x w token grid. Parameter
names follow the published checkpoints (`encoder.down.0.block.0.norm1.weight`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import checkpoint
from tokenizer.config import ModelConfig
from tokenizer.layers import AdaptiveGroupNorm, Upsample, group_norm, residual_blocks
from tokenizer.pixels import to_float, to_uint8
from tokenizer.quantizer import codes_to_indices, indices_to_codes, quantize


class EncoderLevel(nn.Module):
    """Residual blocks, then a strided convolution except at the last level."""

    def __init__(self, in_channels: int, channels: int, last: bool, config: ModelConfig) -> None:
        super().__init__()
        self.block = residual_blocks(
            in_channels, channels, config.blocks_per_level, config.norm_groups
        )
        self.downsample = (
            nn.Identity() if last else nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, channels, H/2, W/2]` (same H, W at the last level)."""
        return self.downsample(self.block(x))


class Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths, blocks, groups = config.widths, config.blocks_per_level, config.norm_groups
        before = [config.base_channels, *widths[:-1]]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1, bias=False)
        self.down = nn.Sequential(
            *(EncoderLevel(before[i], widths[i], i == last, config) for i in range(len(widths)))
        )
        self.mid_block = residual_blocks(widths[-1], widths[-1], blocks, groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.bits, 1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Float pixels in [-1, 1] to latents `[B, K, h, w]`."""
        x = self.mid_block(self.down(self.conv_in(x_B3HW)))
        return self.conv_out(F.silu(self.norm_out(x)))


class DecoderLevel(nn.Module):
    """Residual blocks, then depth-to-space except at level 0."""

    def __init__(self, in_channels: int, channels: int, level: int, config: ModelConfig) -> None:
        super().__init__()
        self.block = residual_blocks(
            in_channels, channels, config.blocks_per_level, config.norm_groups
        )
        self.upsample = Upsample(channels) if level else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` to `[B, channels, 2h, 2w]` (same h, w at level 0)."""
        return self.upsample(self.block(x))


class Decoder(nn.Module):
    """Codes to pixels: an adaptive group norm at the entry of each level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths, blocks, groups = config.widths, config.blocks_per_level, config.norm_groups
        before = [*widths[1:], widths[-1]]
        levels = range(len(widths))  # the last level runs first
        self.conv_in = nn.Conv2d(config.bits, widths[-1], 3, padding=1)
        self.mid_block = residual_blocks(widths[-1], widths[-1], blocks, groups)
        self.up = nn.ModuleList(DecoderLevel(before[i], widths[i], i, config) for i in levels)
        self.adaptive = nn.ModuleList(
            AdaptiveGroupNorm(before[i], config.bits, groups) for i in levels
        )
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, code_BKhw: Tensor) -> Tensor:
        """-1 / +1 codes to float pixels `[B, 3, H, W]`, nominally in [-1, 1] but not clipped."""
        x = self.mid_block(self.conv_in(code_BKhw))
        for up, adaptive in zip(reversed(self.up), reversed(self.adaptive), strict=True):
            x = up(adaptive(x, code_BKhw))
        return self.conv_out(F.silu(self.norm_out(x)))


@dataclass(frozen=True)
class Reconstruction:
    """What one training step needs from the autoencoder."""

    image: Tensor  # float [B, 3, H, W], not clipped
    latent: Tensor  # float [B, K, h, w], before quantization


class Tokenizer(nn.Module):
    """An image tokenizer; `id` and `digest` name the checkpoint it was loaded from, if any."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.id = ""
        self.digest = ""

    @property
    def downsample(self) -> int:
        """Pixels per token along each side; the sides of an image must be multiples of it."""
        return 2 ** (len(self.config.multipliers) - 1)

    def forward(self, x_B3HW: Tensor) -> Reconstruction:
        """Encode, quantize with a straight-through gradient, decode; float pixels in [-1, 1]."""
        latent = self.encoder(x_B3HW)
        return Reconstruction(self.decoder(quantize(latent)), latent)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Map uint8 images `[B, 3, H, W]` to token indices int64 `[B, h, w]`.

        Raises:
            ValueError: not uint8, not three channels, or a side that is not a multiple of
                `downsample`.
        """
        self._check_images(images)
        return codes_to_indices(self.encoder(to_float(images.to(self._device))))

    @torch.inference_mode()
    def decode(self, indices: Tensor) -> Tensor:
        """Map token indices `[B, h, w]` to uint8 images `[B, 3, H, W]`.

        Raises:
            ValueError: an index that is not in the codebook, or not three dimensions.
        """
        if indices.ndim != 3:
            raise ValueError(
                f"token indices must have the shape [B, h, w], got {list(indices.shape)}"
            )
        codes = indices_to_codes(indices.to(self._device), self.config.bits)
        return to_uint8(self.decoder(codes))

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path) -> Self:
        """Load a tokenizer, in eval mode on the CPU, from a checkpoint folder or a Hugging Face
        repository id.

        Raises:
            FileNotFoundError: no such folder or repository, or a training run that has saved
                nothing yet.
            ValueError: another format, a newer version, or weights that do not fit the
                configuration exactly.
        """
        loaded = checkpoint.load(path_or_id)
        try:
            tokenizer = cls(ModelConfig(**loaded.model))
            tokenizer.load_state_dict(loaded.state)
        except (TypeError, RuntimeError) as error:  # an unknown option, or keys that do not match
            raise ValueError(f"{loaded.id}: weights and configuration differ: {error}") from None
        tokenizer.id, tokenizer.digest = loaded.id, loaded.digest
        return tokenizer.eval()

    def save_pretrained(self, folder: str | Path, step: int = 0) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, each in one piece."""
        checkpoint.save(Path(folder), self.config, self.state_dict(), step)

    @property
    def _device(self) -> torch.device:
        return self.encoder.conv_in.weight.device

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have the shape [B, 3, H, W], got {list(images.shape)}")
        if any(side % self.downsample or side == 0 for side in images.shape[2:]):
            raise ValueError(
                f"image sides must be multiples of {self.downsample} for this tokenizer, "
                f"got {images.shape[2]} x {images.shape[3]}"
            )
