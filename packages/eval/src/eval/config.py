"""Typed configuration of the commands of `eval`.

A command's YAML root is `conf/eval/COMMAND.yaml`; names, types and defaults are the dataclasses
below, and YAML holds only what differs. `python -m eval.rfid --cfg job` prints the complete
configuration.
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


RECONSTRUCTION_METRICS = ("psnr", "ssim", "ssim_uniform7", "lpips_alex")
CODEBOOK_METRICS = ("codebook_usage", "codebook_perplexity")
RFID_METRICS = (
    *RECONSTRUCTION_METRICS,
    "rfid",
    "inception_score",
    "precision",
    "recall",
    *CODEBOOK_METRICS,
)
FID_METRICS = ("fid", "sfid", "inception_score", "precision", "recall")


@dataclass
class DataConfig:
    """The images to reconstruct; `data=NAME` is a data set of `tokenizer.reconstruct`."""

    name: str = "imagenet"  # imagenet | folder | webdataset | digits
    root: str | None = None  # null: the data set's environment variable, e.g. IMAGENET_ROOT
    split: str = "val"
    resolution: int | None = None  # pixels; null: the data set's default


@dataclass
class MeasureConfig:
    """What the commands that measure pictures have in common."""

    out: str = "outputs/eval"  # run folder; results are added to it
    metrics: list[str] | None = (
        None  # null: all; a metric asked for by name that cannot be had is an error
    )
    batch_size: int = 64
    weights: str | None = None  # Inception state dict; null: the cache, else a download
    splits: int = 10  # of the inception score
    neighbours: int = 3  # k of precision and recall
    manifold_samples: int = (
        10000  # pictures of each set that precision and recall use, spread evenly
    )


@dataclass
class RfidConfig(MeasureConfig):
    """`python -m eval.rfid`"""

    ckpt: str | None = None  # tokenizer checkpoint (folder or hub id) to reconstruct with
    pairs: str | None = None  # instead of ckpt: a folder of pair media shards that is already there
    data: DataConfig = field(default_factory=DataConfig)
    lpips_weights: str | None = None  # AlexNet state dict; null: the cache, else a download
    reconstruct_batch_size: int | None = None  # null: the default of tokenizer.reconstruct
    keep: bool = False  # keep the reconstructions that were made for this run

    def __post_init__(self) -> None:
        if (self.ckpt is None) == (self.pairs is None):
            raise ValueError(f"ckpt={self.ckpt} and pairs={self.pairs}; give exactly one of them")
        _check_measure(self, RFID_METRICS)


@dataclass
class FidConfig(MeasureConfig):
    """`python -m eval.fid`"""

    samples: str = MISSING  # generated pictures: image folder, media shards, webdataset or .npz
    ref: str = MISSING  # real pictures in the same forms, or NAME.safetensors with their statistics
    samples_field: str | None = None  # of pair media shards: original | reconstruction
    ref_field: str | None = None
    n: int | None = None  # samples to use, the first n; fewer are refused; null: all
    save_ref: str | None = (
        None  # write the statistics of ref to this .safetensors file, to be used as ref later
    )

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 2:
            raise ValueError(f"n={self.n}; it must be at least 2")
        if self.save_ref is not None:
            if not self.save_ref.endswith(".safetensors"):
                raise ValueError(f"save_ref={self.save_ref}; it must end in .safetensors")
            if self.has_statistics:
                raise ValueError(f"save_ref={self.save_ref}; ref={self.ref} are statistics already")
            if "fid" not in (self.metrics or FID_METRICS):
                raise ValueError(f"save_ref={self.save_ref}; it needs fid among the metrics")
        _check_measure(self, FID_METRICS)

    @property
    def has_statistics(self) -> bool:
        """Whether the reference is a statistics file."""
        return self.ref.endswith(".safetensors")


@dataclass
class CodesConfig:
    """`python -m eval.codes`"""

    tokens: str = MISSING  # folder of index shards
    out: str = "outputs/eval"  # run folder; results are added to it


@dataclass
class AccuracyConfig:
    """`python -m eval.accuracy`"""

    samples: str = MISSING  # generated pictures with classes: any form that eval reads
    train: str = MISSING  # real pictures with classes, to train the classifier on
    holdout: str = MISSING  # other real pictures with classes, to check it on
    samples_field: str | None = None  # of pair media shards: original | reconstruction
    train_field: str | None = None  # null: original for pairs, images otherwise
    holdout_field: str | None = None
    out: str = "outputs/eval"  # run folder; results are added to it
    side: int = 16  # pixels of a side to which the classifier's pictures are resized
    max_train: int = 5000  # training pictures, evenly spaced; the time grows with their square
    batch_size: int = 256

    def __post_init__(self) -> None:
        if not 4 <= self.side <= 64:
            raise ValueError(f"side={self.side}; it must be from 4 to 64")
        for option in ("max_train", "batch_size"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)}; it must be at least 1")


@dataclass
class ReportConfig:
    """`python -m eval.report`"""

    run: str = MISSING  # run folder with the results of other eval commands
    pairs: str | None = None  # pair media shards: originals above reconstructions
    samples: str | None = None  # generated pictures, shown by class
    tokens: str | None = None  # index shards; null: the counts that eval.codes left in `run`
    runs: list[str] = field(default_factory=list)  # training run folders, for their curves
    out: str | None = None  # the page; null: report.html in `run`
    title: str | None = None  # headline; null: from the name of `run`
    columns: int = 8  # pictures in a row
    max_classes: int = 20  # classes of samples shown, evenly spaced

    def __post_init__(self) -> None:
        for option in ("columns", "max_classes"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)}; it must be at least 1")
        if self.out is not None and not self.out.endswith(".html"):
            raise ValueError(f"out={self.out}; it must end in .html")


def _check_measure(config: MeasureConfig, allowed: tuple[str, ...]) -> None:
    for name in config.metrics or ():
        if name not in allowed:
            raise ValueError(f"metrics: {name!r} is not one of {', '.join(allowed)}")
    if config.metrics == []:
        raise ValueError("metrics=[]; name at least one, or null for all")
    for option in ("batch_size", "splits", "neighbours"):
        if getattr(config, option) < 1:
            raise ValueError(f"{option}={getattr(config, option)}; it must be at least 1")
    if config.manifold_samples <= config.neighbours:
        raise ValueError(
            f"manifold_samples={config.manifold_samples}; "
            f"it must be larger than neighbours={config.neighbours}"
        )


ConfigStore.instance().store(name="eval_rfid_schema", node=RfidConfig)
ConfigStore.instance().store(name="eval_fid_schema", node=FidConfig)
ConfigStore.instance().store(name="eval_codes_schema", node=CodesConfig)
ConfigStore.instance().store(name="eval_accuracy_schema", node=AccuracyConfig)
ConfigStore.instance().store(name="eval_report_schema", node=ReportConfig)
