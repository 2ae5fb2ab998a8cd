"""Measure reconstructions: rFID, PSNR, SSIM, LPIPS, inception score, precision, recall, codebook.

    python -m eval.rfid ckpt=outputs/tokenizer/imagenet data=imagenet data.root=/data/imagenet
    python -m eval.rfid pairs=FOLDER

The reconstructions are written by `tokenizer.reconstruct` and read once for all metrics.
"""

import functools
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from eval import codebook
from eval.codebook import CodebookCounts
from eval.config import CODEBOOK_METRICS, RECONSTRUCTION_METRICS, RFID_METRICS, RfidConfig, command
from eval.features.inception import INCEPTION_PROTOCOL
from eval.measure import (
    Details,
    FeatureState,
    Subject,
    feature_records,
    finish,
    gather_merged,
    load_extractor,
    measured,
    progress,
    publish,
    start_processes,
)
from eval.media import open_media
from eval.perceptual import MIN_SIZE, LpipsAlex
from eval.pixel import ImageMean, psnr, ssim
from eval.reconstruct import discard, reconstruct
from eval.results import Record
from eval.shards import MediaShards
from eval.source import Batch
from eval.weights import ALEXNET, INCEPTION, WeightsUnavailable, given_file

PROTOCOLS: dict[str, Details] = {
    "psnr": {"name": "ours", "preprocessing": "uint8 RGB, per picture, then averaged"},
    "ssim": {"name": "ours", "preprocessing": "uint8 RGB, 11x11 Gaussian window, sigma 1.5"},
    "ssim_uniform7": {"name": "ours", "preprocessing": "uint8 RGB, 7x7 uniform window"},
    "lpips_alex": {"name": "ours"},
    **dict.fromkeys(CODEBOOK_METRICS, codebook.PROTOCOL),
}
UNITS = {"psnr": "dB"} | codebook.UNITS
SMALLEST = {"ssim": 11, "ssim_uniform7": 7, "lpips_alex": MIN_SIZE}  # pixels, shorter side


class PairState:
    """Everything that one pass over the pairs collects; mergeable."""

    def __init__(self, metrics: set[str], config: RfidConfig, total: int, bits: int) -> None:
        self.means = {name: ImageMean() for name in RECONSTRUCTION_METRICS if name in metrics}
        self.codes = CodebookCounts(bits) if metrics & set(CODEBOOK_METRICS) else None
        self.real = FeatureState(metrics, config, total, score=False)
        self.generated = FeatureState(metrics, config, total, score=True)

    def merge(self, other: "PairState") -> None:
        """Add the pairs that `other` has seen."""
        for name, mean in self.means.items():
            mean.merge(other.means[name])
        if self.codes is not None and other.codes is not None:
            self.codes.merge(other.codes)
        self.real.merge(other.real)
        self.generated.merge(other.generated)


class PairMeter:
    """The functions that turn pairs of pictures into numbers, for the metrics that can be had."""

    def __init__(
        self, metrics: set[str], config: RfidConfig, resolution: list[int], accelerator: Accelerator
    ) -> None:
        self.device = accelerator.device
        self.extractor, self.reasons = load_extractor(config, metrics, accelerator)
        for metric, smallest in SMALLEST.items():
            if metric in metrics and min(resolution) < smallest:
                size = "x".join(map(str, resolution))
                self.reasons[metric] = f"pictures of {size}; at least {smallest} pixels are needed"
        self.lpips: LpipsAlex | None = None
        if "lpips_alex" in metrics and "lpips_alex" not in self.reasons:
            try:
                self.lpips = LpipsAlex(config.lpips_weights, accelerator)
            except WeightsUnavailable as error:
                self.reasons["lpips_alex"] = str(error)
        self.metrics = metrics - set(self.reasons)

    def update(self, state: PairState, original: Batch, reconstruction: Batch) -> None:
        """Add pairs to `state`; raises ValueError naming the first that does not belong
        together."""
        check_pair(original, reconstruction)
        first = original.images.to(self.device)
        second = reconstruction.images.to(self.device)
        if "psnr" in state.means:
            state.means["psnr"].update(psnr(first, second))
        if "ssim" in state.means:
            state.means["ssim"].update(ssim(first, second, "gaussian11"))
        if "ssim_uniform7" in state.means:
            state.means["ssim_uniform7"].update(ssim(first, second, "uniform7"))
        if self.lpips is not None:
            state.means["lpips_alex"].update(self.lpips(first, second))
        if state.codes is not None:
            assert reconstruction.indices is not None  # pairs always have them
            state.codes.update(reconstruction.indices)
        if self.extractor is not None:
            state.real.update(self.extractor(first), original.start)
            state.generated.update(self.extractor(second), original.start)


def check_pair(original: Batch, reconstruction: Batch) -> None:
    """Raise ValueError, naming the first sample, if two batches are not pairs of pictures."""
    for first, second in zip(original.keys, reconstruction.keys, strict=True):
        if first != second:
            raise ValueError(f"pairs do not match: original {first!r}, reconstruction {second!r}")
    if original.images.shape != reconstruction.images.shape:
        sizes = ["x".join(map(str, batch.images.shape[2:])) for batch in (original, reconstruction)]
        raise ValueError(
            f"pairs do not match: {original.keys[0]!r} is {sizes[0]}, its reconstruction {sizes[1]}"
        )


def measure(config: RfidConfig, folder: Path, accelerator: Accelerator) -> list[Record]:
    """Read the pairs in `folder` once and return the records on the main process, [] elsewhere."""
    originals = open_pairs(folder, "original")
    reconstructions = open_pairs(folder, "reconstruction")
    manifest = originals.manifest
    meter = PairMeter(
        set(config.metrics or RFID_METRICS), config, manifest["resolution"], accelerator
    )
    state = PairState(meter.metrics, config, len(originals), manifest["codebook_bits"])
    pairs = zip(
        progress(originals, config, "measure", accelerator),
        progress(reconstructions, config, "", accelerator, show=False),
        strict=True,
    )
    for original, reconstruction in pairs:
        meter.update(state, original, reconstruction)
    state = gather_merged(state)
    return make_records(config, manifest, meter, state) if accelerator.is_main_process else []


def open_pairs(folder: Path, field: str) -> MediaShards:
    """Open one side of a folder of pair media shards."""
    source = open_media(str(folder), field)
    if not isinstance(source, MediaShards):
        raise ValueError(f"pairs={folder}: holds no pair media shards")
    if "codebook_bits" not in source.manifest:
        raise ValueError(f"pairs={folder}: manifest.json has no 'codebook_bits'")
    return source


def make_records(
    config: RfidConfig, manifest: dict[str, Any], meter: PairMeter, state: PairState
) -> list[Record]:
    """Return a record for each metric that was asked for, in the order of RFID_METRICS."""
    metrics = [name for name in RFID_METRICS if name in (config.metrics or RFID_METRICS)]
    source = manifest["source"]
    words = [source["name"], source.get("split"), "x".join(map(str, manifest["resolution"]))]
    if "digest" in source:  # of keys and classes: tells folders of the same kind apart
        words.append(source["digest"].removeprefix("sha256:")[:8])
    name = " ".join(word for word in words if word)
    subject = Subject(
        data=f"reconstructions of {name}",
        reference=f"originals of {name}",
        count=manifest["num_samples"],
        checkpoint=manifest["tokenizer"],
    )
    use = functools.cache(lambda: state.codes.compute() if state.codes else None)

    def compute(metric: str) -> tuple[float, Details]:
        if metric in CODEBOOK_METRICS:
            measured_use = use()
            assert measured_use is not None
            usage = metric == "codebook_usage"
            return measured_use.usage if usage else measured_use.perplexity, measured_use.facts()
        return state.means[metric].compute(), {}

    protocols = PROTOCOLS | ({"lpips_alex": meter.lpips.protocol} if meter.lpips else {})
    left_out = skipped(manifest)
    records = [
        measured(
            metric,
            UNITS.get(metric),
            subject,
            protocols[metric] | left_out,
            meter.reasons,
            functools.partial(compute, metric),
        )
        for metric in metrics
        if metric in protocols
    ]
    records += feature_records(
        metrics,
        subject,
        (meter.extractor.protocol if meter.extractor else INCEPTION_PROTOCOL) | left_out,
        meter.reasons,
        state.real,
        state.generated,
        config.neighbours,
        meter.device,
    )
    return sorted(records, key=lambda record: RFID_METRICS.index(record.metric))


def skipped(manifest: dict[str, Any]) -> Details:
    """Return what the records say of inputs that were left out, nothing where all were used."""
    found = manifest.get("skipped") or {}
    return {"skipped": found} if found.get("count") else {}


def check_weights(config: RfidConfig) -> None:
    """Raise FileNotFoundError for weights that were given, before hours of reconstruction."""
    for public, path in ((INCEPTION, config.weights), (ALEXNET, config.lpips_weights)):
        if path is not None:
            given_file(public, path)


@command("rfid", RfidConfig)
def main(config: RfidConfig) -> None:
    """Reconstruct where there are no pairs yet, measure, write the results, tidy up."""
    start = time.perf_counter()
    accelerator = start_processes()
    check_weights(config)
    folder = reconstruct(config, accelerator) if config.pairs is None else Path(config.pairs)
    accelerator.print(f"pairs: {folder}")
    records = measure(config, folder, accelerator)
    missing = publish("rfid", config, records, time.perf_counter() - start, accelerator)
    if config.pairs is None and not config.keep:
        if missing:  # what was asked for is still to be measured
            accelerator.print(f"kept for the next run: {folder}")
        elif accelerator.is_main_process:
            discard(folder)
    finish(missing, accelerator)


if __name__ == "__main__":
    main()
