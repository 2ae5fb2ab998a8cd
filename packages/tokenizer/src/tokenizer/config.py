"""Typed configuration of the tokenizer's commands.

A command's YAML root is `conf/tokenizer/COMMAND.yaml`; names, types and defaults are the
dataclasses below, and YAML holds only what differs. `python -m tokenizer.train --cfg job` prints
the complete configuration.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONF_DIR = str(Path(__file__).with_name("conf"))

MAX_SAMPLES_PER_SHARD = 2_560_000  # blocks of 256 are numbered with four digits

T = TypeVar("T")


def validated(cfg: DictConfig, schema: type[T]) -> T:
    """Return `cfg` as a `schema` instance, or exit naming the key that is wrong or missing."""
    try:
        # Through plain containers: merging the DictConfig itself would let unknown keys
        # (`+modle=xl`) pass.
        plain = OmegaConf.to_container(cfg, resolve=True)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        key = error.full_key
        raise SystemExit(f"error: {key} has no default: set {key}=...") from None
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        where = f" (at {key})" if key else ""
        raise SystemExit(f"error: bad config: {str(error).splitlines()[0]}{where}") from None


def command(
    config_name: str, schema: type[T]
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Turn `run(config)` into the entry point of the command whose YAML root is `config_name`.

    What a user can mend (ValueError, OSError such as FileNotFoundError) ends in one line;
    HYDRA_FULL_ERROR=1 shows where it was raised.
    """

    def wrap(run: Callable[[T], None]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=CONF_DIR, config_name=config_name)
        @functools.wraps(run)
        def main(cfg: DictConfig) -> None:
            config = validated(cfg, schema)
            try:
                run(config)
            except (ValueError, OSError) as error:
                if os.environ.get("HYDRA_FULL_ERROR") == "1":
                    raise
                raise SystemExit(f"error: {error}") from None

        return main

    return wrap


@dataclass
class DataConfig:
    """A data set and how its pictures are cut; conf/tokenizer/data has one file per data set."""

    name: str = "digits"  # digits, imagenet, folder or webdataset
    root: str | None = None  # folder or brace pattern of tars; imagenet: null is $IMAGENET_ROOT
    split: str = "train"  # the split to read: train, val or all, or a folder of this name
    val_split: str = "val"  # the split that training validates on
    val_fraction: float = 0.1  # held out as val where the data has no splits of its own
    resolution: int = 32  # side of the square crop
    resize: int | None = None  # shorter side before the crop; null: resolution
    crop: str = "random"  # in training: random or center
    flip: bool = False  # in training: mirror half of the pictures
    exif_orientation: bool = True  # turn pictures as their EXIF data says
    label_key: str = "label"  # webdataset: the class in .json where there is no .cls
    num_workers: int = 2  # processes that decode pictures, at most one a core; 0: none

    def __post_init__(self) -> None:
        if self.name not in ("digits", "imagenet", "folder", "webdataset"):
            raise ValueError(
                f"data.name={self.name}: allowed are digits, imagenet, folder and webdataset"
            )
        if self.resolution < 1:
            raise ValueError(f"data.resolution={self.resolution}: must be 1 or more")
        if self.resize is not None and self.resize < self.resolution:
            raise ValueError(
                f"data.resize={self.resize}: must not be below data.resolution={self.resolution}"
            )
        if self.crop not in ("random", "center"):
            raise ValueError(f"data.crop={self.crop}: allowed are random and center")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction}: must be between 0 and 1")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers}: must be 0 or more")


@dataclass
class ModelConfig:
    """Architecture of the autoencoder; the defaults are the published 256-pixel model (115 M)."""

    bits: int = 18  # codebook bits K: 2^K codes, one latent channel per bit
    base_channels: int = 128  # width of the first level
    multipliers: list[int] = field(
        default_factory=lambda: [1, 1, 2, 2, 4]
    )  # width of each level / base_channels
    blocks_per_level: int = 4  # residual blocks in each level and in the middle
    norm_groups: int = 32  # groups of every group norm

    def __post_init__(self) -> None:
        self.multipliers = list(self.multipliers)
        if not 1 <= self.bits <= 24:
            raise ValueError(f"model.bits={self.bits}: allowed are 1 to 24")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"model.multipliers={self.multipliers}: give at least one level, each 1 or more"
            )
        if self.blocks_per_level < 1:
            raise ValueError(f"model.blocks_per_level={self.blocks_per_level}: must be 1 or more")
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(
                    f"model.norm_groups={self.norm_groups}: does not divide the width {width} "
                    "of a level; change norm_groups or base_channels"
                )

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from pixels to tokens."""
        return [self.base_channels * m for m in self.multipliers]


@dataclass
class LossConfig:
    """Weights of the training objective; the defaults are the published 256-pixel recipe's."""

    l1_weight: float = 1.0
    perceptual_weight: float = 1.0  # LPIPS with a VGG-16 backbone; 0 needs no weights
    perceptual_backbone: str | None = (
        None  # file with torchvision's VGG-16 weights; null downloads them once
    )
    adversarial_weight: float = 0.1  # generator's share; 0 trains without a discriminator
    adversarial_start_step: int = 0  # first step at which the discriminator counts
    discriminator: str = "patchgan"  # patchgan, or blur as for the published 2^14 web tokenizer
    discriminator_channels: int = 64  # width of its first layer; published: patchgan 64, blur 128
    discriminator_layers: int = 3  # layers between the first and the last
    lecam_weight: float = (
        0.05  # LeCAM regulariser of the discriminator; the 128-pixel model has 0.01
    )
    commitment_weight: float = 0.25
    entropy_weight: float = (
        0.1  # of sample_entropy_weight * H_sample - batch_entropy_weight * H_batch
    )
    sample_entropy_weight: float = 1.0
    batch_entropy_weight: float = 1.0
    entropy_temperature: float = 0.01  # tau of the softmax over codes
    entropy_eps: float = 1e-5  # inside the outer logarithm; 0 gives the true entropy
    entropy_scope: str = (
        "local"  # batch entropy of each process's own batch (the original), or "global"
    )
    entropy_anneal_factor: float = 0.0  # entropy weight starts (1 + factor) times higher ...
    entropy_anneal_steps: int = 2000  # ... and falls linearly to its value by this step

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_weight") and value < 0:
                raise ValueError(f"loss.{name}={value}: must be 0 or more")
        if self.discriminator not in ("patchgan", "blur"):
            raise ValueError(f"loss.discriminator={self.discriminator}: allowed are patchgan, blur")
        if self.discriminator == "blur" and self.discriminator_channels % 32:
            raise ValueError(
                f"loss.discriminator_channels={self.discriminator_channels}: "
                "must be a multiple of 32 for loss.discriminator=blur"
            )
        if self.discriminator_layers < 1 or self.discriminator_channels < 1:
            raise ValueError(
                f"loss.discriminator_layers={self.discriminator_layers}, "
                f"discriminator_channels={self.discriminator_channels}: must be 1 or more"
            )
        if self.entropy_temperature <= 0:
            raise ValueError(
                f"loss.entropy_temperature={self.entropy_temperature}: must be above 0"
            )
        if self.entropy_scope not in ("local", "global"):
            raise ValueError(
                f"loss.entropy_scope={self.entropy_scope}: allowed are local and global"
            )
        if self.entropy_anneal_steps < 1:
            raise ValueError(
                f"loss.entropy_anneal_steps={self.entropy_anneal_steps}: must be 1 or more"
            )


@dataclass
class OptimConfig:
    """Adam and its learning rate by step, the same for generator and discriminator."""

    lr: float = 1e-4  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    schedule: str = "constant"  # after the warm-up: constant, step or cosine
    warmup_steps: int = 0  # linear from 0
    decay_steps: list[int] = field(
        default_factory=list
    )  # schedule=step: multiply by decay_factor at each of these
    decay_factor: float = 0.1
    min_lr: float = 0.0  # schedule=cosine: reached at the last step

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "step", "cosine"):
            raise ValueError(
                f"optim.schedule={self.schedule}: allowed are constant, step and cosine"
            )
        if (self.schedule == "step") != bool(self.decay_steps):
            raise ValueError(
                f"optim.decay_steps={list(self.decay_steps)}: give steps with "
                "optim.schedule=step, and only then"
            )


@dataclass
class TrainConfig:
    """`python -m tokenizer.train`."""

    run_name: str = "digits"  # names the run folder
    out: str = (
        "outputs/tokenizer/${run_name}"  # run folder: checkpoint, resume states, metrics, previews
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0
    steps: int | None = None  # optimizer steps in all; or give epochs
    epochs: int | None = None  # passes over the data, each without its last incomplete global batch
    global_batch: int = 256  # images per optimizer step over all processes
    micro_batch: int = 8  # images per process and forward pass; the rest is gradient accumulation
    ema_decay: float = 0.999
    precision: str | None = None  # no or bf16; null takes what `accelerate launch` says
    log_every: int = 50  # steps
    validate_every: int = 5000  # steps
    validation_images: int = 2048  # 0 takes the whole split
    preview_every: int = 5000  # steps
    preview_images: int = 16
    checkpoint_every: int = 5000  # steps
    keep_last: int = 2  # resume states kept
    tracking: str = (
        "none"  # none or wandb (WANDB_MODE=offline works); metrics.jsonl is written always
    )
    allow_changes: bool = False  # resume although settings that change the result differ

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps={self.steps}, epochs={self.epochs}: give one, set the other to null"
            )
        for name in ("steps", "epochs"):
            if (getattr(self, name) or 1) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name, value in vars(self).items():
            if (
                name.endswith(("_batch", "_every")) or name in ("preview_images", "keep_last")
            ) and value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more")
        if self.precision not in (None, "no", "bf16"):
            raise ValueError(f"precision={self.precision}: allowed are no, bf16 and null")
        if self.tracking not in ("none", "wandb"):
            raise ValueError(f"tracking={self.tracking}: allowed are none and wandb")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must be at least 0 and below 1")
        factor = 2 ** (len(self.model.multipliers) - 1)
        if self.data.resolution % factor:
            raise ValueError(
                f"data.resolution={self.data.resolution}: must be a multiple of {factor} "
                f"for model.multipliers={self.model.multipliers}"
            )

    def accumulation(self, processes: int) -> int:
        """Return the micro-batches per step of each process; ValueError if the sizes do not fit."""
        share = self.micro_batch * processes
        if self.global_batch % share:
            raise ValueError(
                f"global_batch={self.global_batch}: must be a multiple of "
                f"micro_batch={self.micro_batch} x {processes} processes = {share}; "
                "change either size"
            )
        return self.global_batch // share

    def total_steps(self, num_samples: int) -> int:
        """Return `steps`, or the steps that `epochs` passes over `num_samples` take."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if num_samples < self.global_batch:
            raise ValueError(
                f"global_batch={self.global_batch}: the data set has only {num_samples} images"
            )
        return self.epochs * (num_samples // self.global_batch)


@dataclass
class EncodeConfig:
    """`python -m tokenizer.encode`: pictures to index shards."""

    ckpt: str = "outputs/tokenizer/${data.name}"  # checkpoint folder or Hugging Face repository
    out: str = "outputs/tokens/${data.name}/${data.split}"  # folder of index shards to write
    data: DataConfig = field(default_factory=DataConfig)
    views: list[str] = field(default_factory=lambda: ["center"])  # center, flip, random, random:4
    seed: int = 0  # of the random views
    batch_size: int = 32  # views per process and forward pass
    precision: str = "no"  # no (float32, exact codes) or bf16 (faster, some codes differ)
    samples_per_shard: int = 2048  # what a kill can lose, per process

    def __post_init__(self) -> None:
        _check_export(self.batch_size, self.precision, self.samples_per_shard)


@dataclass
class ReconstructConfig:
    """`python -m tokenizer.reconstruct`: pictures to pairs of original and reconstruction."""

    ckpt: str = "outputs/tokenizer/${data.name}"  # checkpoint folder or Hugging Face repository
    out: str = "outputs/reconstructions/${data.name}/${data.split}"  # media shards to write
    data: DataConfig = field(default_factory=DataConfig)
    encoding: str = "npy"  # npy (large, fast) or png (small)
    batch_size: int = 32  # images per process and forward pass
    precision: str = "no"  # no (float32, exact codes) or bf16 (faster, some codes differ)
    samples_per_shard: int = 1024  # what a kill can lose, per process

    def __post_init__(self) -> None:
        if self.encoding not in ("npy", "png"):
            raise ValueError(f"encoding={self.encoding}: allowed are npy and png")
        _check_export(self.batch_size, self.precision, self.samples_per_shard)


@dataclass
class DecodeConfig:
    """`python -m tokenizer.decode`: index shards to pictures."""

    tokens: str = MISSING  # folder of index shards
    ckpt: str = MISSING  # checkpoint folder or Hugging Face repository
    out: str = MISSING  # folder to write
    format: str = "npy"  # media shards: npy or png; folder: KEY.png each; npz: one file for ADM
    view: int = 0  # which view of each sample
    allow_other_tokenizer: bool = False  # decode tokens of another checkpoint
    batch_size: int = 32  # images per process and forward pass
    precision: str = "no"  # no (float32) or bf16 (faster)
    samples_per_shard: int = 1024  # what a kill can lose, per process

    def __post_init__(self) -> None:
        if self.format not in ("npy", "png", "folder", "npz"):
            raise ValueError(f"format={self.format}: allowed are npy, png, folder and npz")
        if self.view < 0:
            raise ValueError(f"view={self.view}: must be 0 or more")
        _check_export(self.batch_size, self.precision, self.samples_per_shard)


def _check_export(batch_size: int, precision: str, samples_per_shard: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or more")
    if precision not in ("no", "bf16"):
        raise ValueError(f"precision={precision}: allowed are no and bf16")
    if not 1 <= samples_per_shard <= MAX_SAMPLES_PER_SHARD:
        raise ValueError(
            f"samples_per_shard={samples_per_shard}: must be 1 to {MAX_SAMPLES_PER_SHARD}"
        )


ConfigStore.instance().store(name="tokenizer_train_schema", node=TrainConfig)
ConfigStore.instance().store(name="tokenizer_encode_schema", node=EncodeConfig)
ConfigStore.instance().store(name="tokenizer_reconstruct_schema", node=ReconstructConfig)
ConfigStore.instance().store(name="tokenizer_decode_schema", node=DecodeConfig)
