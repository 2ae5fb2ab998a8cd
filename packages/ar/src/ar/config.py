"""Typed configuration of the ar commands.

A command's YAML root is `conf/ar/COMMAND.yaml`; names, types and defaults are the dataclasses
below, and YAML holds only what differs. `python -m ar.train --cfg job` prints the complete
configuration.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONF_DIR = str(Path(__file__).with_name("conf"))

T = TypeVar("T")


def _require(ok: bool, option: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{option}={value}: must be {allowed}")


def _check_precision(precision: str | None) -> None:
    _require(precision in (None, "no", "bf16"), "precision", precision, "no, bf16 or null")


@dataclass
class ModelConfig:
    """Shape of the model. The defaults are size B of the paper; `+model=l` replaces them."""

    name: str = "b"  # a word for logs and folder names
    dim: int = 1024  # width of both stacks
    num_heads: int = 16  # attention heads; the width of a head must be a multiple of 4
    num_layers: int = 24  # blocks over image positions ("spatial", inter-token)
    num_intra_layers: int = 2  # blocks over the two sub-tokens of a position ("factorized")
    sub_token_bits: list[int] | None = None  # [k1, k2], low bits first; null: [K // 3, K - K // 3]
    grid: list[int] | None = None  # [rows, columns] of tokens; null: as in the index shards
    num_classes: int | None = None  # classes with an embedding; null: as in the index shards
    embedding_dropout: float = 0.1  # of the sequence given to the first block, class included
    resid_dropout: float = 0.1  # of the output of each attention
    ffn_dropout: float = 0.1  # of the output of each feed-forward network

    def __post_init__(self) -> None:
        for option in ("dim", "num_heads", "num_layers", "num_intra_layers"):
            value = getattr(self, option)
            _require(value >= 1, f"model.{option}", value, "1 or more")
        _require(
            self.dim % (4 * self.num_heads) == 0,
            "model.dim",
            self.dim,
            f"a multiple of 4 x model.num_heads = {4 * self.num_heads}",
        )
        for option in ("embedding_dropout", "resid_dropout", "ffn_dropout"):
            value = getattr(self, option)
            _require(0 <= value < 1, f"model.{option}", value, "in [0, 1)")
        bits = self.sub_token_bits
        if bits is not None:
            ok = len(bits) == 2 and min(bits) >= 1 and max(bits) <= 24
            _require(ok, "model.sub_token_bits", bits, "two numbers from 1 to 24")
        if self.grid is not None:
            ok = len(self.grid) == 2 and min(self.grid) >= 1
            _require(ok, "model.grid", self.grid, "[rows, columns], each 1 or more")
        if self.num_classes is not None:
            _require(self.num_classes >= 0, "model.num_classes", self.num_classes, "0 or more")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Width of the SwiGLU network: two thirds of 4 x dim, rounded up to a multiple of 256."""
        return 256 * math.ceil(int(2 * 4 * self.dim / 3) / 256)


def resolve_model(
    model: ModelConfig,
    codebook_bits: int = 18,
    grid: tuple[int, ...] = (16, 16),
    num_classes: int = 1000,
) -> ModelConfig:
    """Return `model` with what it leaves open taken from the data, and what it states checked.

    The defaults are those of the paper: 18 bits, 16 x 16 tokens, 1000 classes.
    """
    k1 = codebook_bits // 3
    bits = model.sub_token_bits or [k1, codebook_bits - k1]
    _require(codebook_bits >= 3, "codebook_bits", codebook_bits, "3 or more to be split in two")
    _require(
        sum(bits) == codebook_bits,
        "model.sub_token_bits",
        bits,
        f"two numbers with sum {codebook_bits}, the codebook bits of the index shards",
    )
    shape = list(grid) if model.grid is None else list(model.grid)
    _require(
        shape == list(grid), "model.grid", shape, f"{list(grid)}, the grid of the index shards"
    )
    classes = num_classes if model.num_classes is None else model.num_classes
    _require(
        classes >= num_classes,
        "model.num_classes",
        classes,
        f"{num_classes} or more, the number of classes of the index shards",
    )
    return dataclasses.replace(model, sub_token_bits=list(bits), grid=shape, num_classes=classes)


@dataclass
class DataConfig:
    """Where the index shards are (docs/artifacts.md)."""

    name: str = "imagenet"  # a word for `make tokenize DATA=...` and for messages
    shards: str = "outputs/tokens/imagenet/train"  # folder of index shards to train on
    val_shards: str | None = None  # folder of index shards for the validation loss; null: none
    val_samples: int | None = None  # validate on so many samples, the first ones; null: all
    verify: bool = False  # compare the sha256 of every shard with the manifest before training

    def __post_init__(self) -> None:
        if self.val_samples is not None:
            _require(
                self.val_samples >= 1, "data.val_samples", self.val_samples, "1 or more, or null"
            )


@dataclass
class OptimConfig:
    """AdamW and the learning-rate schedule of the paper, see schedule.py."""

    lr: float = 3e-4  # peak learning rate, for global_batch as it is (not scaled)
    warmup_fraction: float = 0.02  # of all steps; 6 of 300 epochs in the paper
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_all: bool = False  # true: also decay the norm gains, as the original code does
    clip_norm: float = 1.0  # upper bound of the gradient norm
    max_skipped_steps: int = 10  # stop after so many steps in a row with a non-finite gradient

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "above 0")
        _require(
            0 <= self.warmup_fraction < 1,
            "optim.warmup_fraction",
            self.warmup_fraction,
            "in [0, 1)",
        )
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(ok, "optim.betas", self.betas, "two numbers in [0, 1)")
        _require(self.eps > 0, "optim.eps", self.eps, "above 0")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "above 0")
        _require(
            self.max_skipped_steps >= 1,
            "optim.max_skipped_steps",
            self.max_skipped_steps,
            "1 or more",
        )


@dataclass
class TrainConfig:
    """Options of `ar.train`. Device, precision and number of processes come from Accelerate."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    out: str = "outputs/ar/${model.name}"  # the run folder; the same command again resumes from it
    seed: int = 0  # of the weights, the order of samples and all dropouts
    epochs: float = 300  # length of the run where `steps` is null
    steps: int | None = None  # length of the run in optimizer steps; null: from `epochs`
    global_batch: int = 768  # images per optimizer step, over all processes
    micro_batch: int = 24  # images per process and forward pass; the accumulation follows from it
    class_dropout: float = 0.1  # share of labels replaced by "unconditional", for guidance
    ema_decay: float = 0.0  # average of the weights, published in their place; 0: none, as in paper
    log_every_steps: int = 10  # metrics.jsonl and the tracker
    val_every_steps: int = 1000  # loss on data.val_shards
    save_every_steps: int = 1000  # checkpoints to resume from
    keep_last: int = 2  # so many of them are kept
    precision: str | None = None  # no or bf16; null takes what `accelerate launch` says
    tracking: str = "none"  # none | wandb (WANDB_MODE=offline works)
    tracking_project: str = "omv2-ar"  # project of the tracker
    allow_changes: bool = False  # resume although seed, data, global_batch or model differ

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "epochs", self.epochs, "above 0")
        if self.steps is not None:
            _require(self.steps >= 1, "steps", self.steps, "1 or more, or null")
        for option in ("global_batch", "micro_batch", "keep_last"):
            _require(getattr(self, option) >= 1, option, getattr(self, option), "1 or more")
        for option in ("log_every_steps", "val_every_steps", "save_every_steps"):
            _require(getattr(self, option) >= 1, option, getattr(self, option), "1 or more")
        _require(0 <= self.class_dropout < 1, "class_dropout", self.class_dropout, "in [0, 1)")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        _check_precision(self.precision)
        _require(self.tracking in ("none", "wandb"), "tracking", self.tracking, "none or wandb")


@dataclass
class SamplingConfig:
    """How tokens are drawn. Pairs are [pre, post], the two sub-tokens; defaults as for size B."""

    scale: list[float] = field(default_factory=lambda: [1.9, 2.0])  # guidance; 1: none
    temperature: list[float] = field(default_factory=lambda: [1.0, 1.0])  # 0: the most likely token
    top_k: list[int] = field(default_factory=lambda: [0, 0])  # draw from so many tokens; 0: all
    top_p: list[float] = field(default_factory=lambda: [1.0, 1.0])  # from this share of probability

    def __post_init__(self) -> None:
        for option in ("scale", "temperature", "top_k", "top_p"):
            value = getattr(self, option)
            _require(len(value) == 2, f"sampling.{option}", value, "two numbers, [pre, post]")
            _require(min(value) >= 0, f"sampling.{option}", value, "0 or more")
        ok = all(0 < share <= 1 for share in self.top_p)
        _require(ok, "sampling.top_p", self.top_p, "in (0, 1]")


@dataclass
class SampleConfig:
    """Options of `ar.sample`. Device, precision and number of processes come from Accelerate."""

    ckpt: str = "???"  # run folder of ar.train, or a repository on the Hugging Face hub
    out: str = "???"  # folder of index shards to write
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    n_per_class: int = 50  # images per class
    classes: list[int] | None = None  # class ids; null: all (-1: a model without classes)
    batch_size: int = 64  # images drawn at a time in each process
    samples_per_shard: int = 1024  # processes share the work shard by shard
    precision: str | None = None  # no or bf16; null takes what `accelerate launch` says
    seed: int = 0  # the same (seed, class, number within the class) gives the same image

    def __post_init__(self) -> None:
        for option in ("n_per_class", "batch_size", "samples_per_shard"):
            _require(getattr(self, option) >= 1, option, getattr(self, option), "1 or more")
        _check_precision(self.precision)
        if self.classes is not None:
            ok = len(self.classes) > 0 and len(set(self.classes)) == len(self.classes)
            _require(ok, "classes", self.classes, "a list of different class ids, or null for all")


ConfigStore.instance().store(name="ar_train_schema", node=TrainConfig)
ConfigStore.instance().store(name="ar_sample_schema", node=SampleConfig)


def validated(cfg: DictConfig, schema: type[T]) -> T:
    """Return `cfg` as a `schema` instance, or exit naming the key that is wrong."""
    try:
        # Through plain containers: merging the DictConfig would let unknown keys pass.
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
