"""Measure generated pictures against real ones: FID, sFID, inception score, precision, recall.

python -m eval.fid samples=outputs/samples ref=/data/imagenet/val
python -m eval.fid samples=samples.npz ref=imagenet.safetensors n=50000
"""

import time
from pathlib import Path

from accelerate import Accelerator

from eval.config import FID_METRICS, FidConfig, command
from eval.features.inception import INCEPTION_PROTOCOL, InceptionExtractor
from eval.measure import (
    Details,
    FeatureState,
    Subject,
    feature_records,
    finish,
    gather_merged,
    load_extractor,
    progress,
    publish,
    report_converted,
    start_processes,
)
from eval.media import open_media
from eval.results import Record
from eval.shards import MediaShards, maker
from eval.source import Source
from eval.statistics import PixelDigest, Provenance, load_statistics, save_statistics

STATISTICS_ONLY = {
    name: "ref is a file of pool3 statistics; give the pictures themselves for this metric"
    for name in ("sfid", "precision", "recall")
}


def open_samples(config: FidConfig) -> tuple[Source, int]:
    """Return the samples and how many of them to use; refuse fewer than asked for."""
    source = open_pictures("samples", config.samples, config.samples_field)
    if config.n is not None and len(source) < config.n:
        raise ValueError(f"n={config.n}: samples={config.samples} holds only {len(source)}")
    return source, config.n or len(source)


def open_pictures(option: str, spec: str, field: str | None) -> Source:
    """Open a source of pictures; which side of pairs is meant must be said."""
    source = open_media(spec, field)
    if isinstance(source, MediaShards) and source.kind == "pairs" and field is None:
        raise ValueError(
            f"{option}={spec} holds pairs: set {option}_field=original or =reconstruction"
        )
    return source


def described(source: Source) -> str:
    """Return the name of a source for the records, with the side where it holds pairs."""
    if isinstance(source, MediaShards) and source.kind == "pairs":
        return f"{source.name}, {source.field}"
    return source.name


def read_features(
    source: Source,
    count: int,
    state: FeatureState,
    extractor: InceptionExtractor,
    config: FidConfig,
    accelerator: Accelerator,
    digest: PixelDigest | None = None,
) -> FeatureState:
    """Return the merged state of the first `count` pictures of `source` on every process."""
    for batch in progress(source, config, f"measure {source.name}", accelerator, count):
        state.update(extractor(batch.images.to(accelerator.device)), batch.start)
        if digest is not None:
            digest.update(batch.images)
    report_converted(source, accelerator)
    return gather_merged(state)


def reference_state(
    config: FidConfig,
    metrics: set[str],
    source: Source | None,
    extractor: InceptionExtractor,
    accelerator: Accelerator,
) -> tuple[FeatureState, Details]:
    """Return the state of the reference (None: a statistics file) and what the records say of
    it."""
    if source is None:
        state = FeatureState(metrics, config, 0, score=False)
        state.pool3, provenance = load_statistics(Path(config.ref).expanduser(), extractor.protocol)
        return state, {
            "reference_count": state.pool3.count,
            "reference_made_from": provenance.source,
        }
    state = FeatureState(metrics, config, len(source), score=False)
    digest = PixelDigest() if config.save_ref else None
    state = read_features(source, len(source), state, extractor, config, accelerator, digest)
    if digest is not None:
        digest = gather_merged(digest)
        if accelerator.is_main_process:
            save_reference(config, state, extractor, source.name, digest)
    return state, {"reference_count": len(source)}


def save_reference(
    config: FidConfig,
    state: FeatureState,
    extractor: InceptionExtractor,
    name: str,
    digest: PixelDigest,
) -> None:
    """Write the statistics of the reference to `config.save_ref`."""
    assert state.pool3 is not None and config.save_ref is not None
    protocol = extractor.protocol
    provenance = Provenance(
        protocol["extractor"], protocol["weights"], protocol["preprocessing"], name, str(digest)
    )
    save_statistics(Path(config.save_ref).expanduser(), state.pool3, provenance)
    print(f"statistics of ref: {config.save_ref}")


def measure(config: FidConfig, accelerator: Accelerator) -> list[Record]:
    """Return the records on the main process, [] elsewhere."""
    samples, count = open_samples(config)
    source = None if config.has_statistics else open_pictures("ref", config.ref, config.ref_field)
    metrics = set(config.metrics or FID_METRICS)
    extractor, reasons = load_extractor(config, metrics, accelerator)
    protocol: Details = dict(INCEPTION_PROTOCOL)
    real = generated = FeatureState(set(), config, 0, score=False)
    if extractor is not None:
        if config.has_statistics:
            reasons = STATISTICS_ONLY
        able = metrics - set(reasons)
        real, details = reference_state(config, able, source, extractor, accelerator)
        protocol = extractor.protocol | details
        generated = FeatureState(able, config, count, score=True)
        generated = read_features(samples, count, generated, extractor, config, accelerator)
    elif config.save_ref:
        raise ValueError(f"save_ref={config.save_ref}: {next(iter(reasons.values()))}")
    if not accelerator.is_main_process:
        return []
    made_by = maker(samples.manifest) if isinstance(samples, MediaShards) else None
    subject = Subject(
        # Another number of samples is another measurement, which must not replace this one.
        data=described(samples) + (f", first {count:,}" if config.n else ""),
        reference=config.ref if source is None else described(source),
        count=count,
        checkpoint=made_by.checkpoint if made_by else None,
        seed=made_by.seed if made_by else None,
    )
    return feature_records(
        [name for name in FID_METRICS if name in metrics],
        subject,
        protocol,
        reasons,
        real,
        generated,
        config.neighbours,
        accelerator.device,
    )


@command("fid", FidConfig)
def main(config: FidConfig) -> None:
    """Measure and write the results."""
    start = time.perf_counter()
    accelerator = start_processes()
    records = measure(config, accelerator)
    missing = publish("fid", config, records, time.perf_counter() - start, accelerator)
    finish(missing, accelerator)


if __name__ == "__main__":
    main()
