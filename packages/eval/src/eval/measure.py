"""What `rfid` and `fid` share: the state of a set of pictures, merging over processes, records."""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from eval.config import MeasureConfig
from eval.features.inception import (
    POOL3_DIM,
    SPATIAL7_DIM,
    InceptionExtractor,
    InceptionFeatures,
)
from eval.frechet import frechet_distance
from eval.inception_score import InceptionScore
from eval.prdc import FeatureSubset, precision_recall
from eval.results import Record, print_table, write_results
from eval.source import Batch, Source
from eval.statistics import Moments
from eval.weights import WeightsUnavailable

FRECHET_FEATURES = {"rfid": "pool3", "fid": "pool3", "sfid": "spatial7"}
INCEPTION_METRICS = frozenset({*FRECHET_FEATURES, "inception_score", "precision", "recall"})

# Others wait for the slowest child, and for the main process to compute; the default is 10 minutes.
PATIENCE = timedelta(days=2)

_PARENT = os.getppid()

Details = dict[str, Any]


def start_processes() -> Accelerator:
    """Join the processes that a launcher started, on their accelerators or on the CPU.

    Raises ValueError where Accelerate sees fewer processes than were launched: each would measure
    everything and write the same files.
    """
    accelerator = Accelerator(
        # Without it, processes that torchrun starts on a machine without accelerator run alone.
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"WORLD_SIZE={launched}: Accelerate sees {accelerator.num_processes} process(es) on "
            f"{accelerator.device}; launch with torchrun or accelerate launch --multi_gpu"
        )
    return accelerator


def check_launcher() -> None:
    """Exit if torchrun or `accelerate launch` is gone: when it is started again, its new processes
    read and write the same files."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT:
        raise SystemExit("error: the launcher of this process was killed")


class Mergeable(Protocol):
    """A state that can take in what another process has seen."""

    def merge(self, other: Any, /) -> None: ...


State = TypeVar("State", bound=Mergeable)


def gather_merged(state: State) -> State:
    """Merge the state of all processes in the order of their ranks; every process must call it."""
    first, *others = gather_object([state])
    for other in others:
        first.merge(other)
    return first


class FeatureState:
    """What the Inception metrics asked for need to know of one set of pictures."""

    def __init__(self, metrics: set[str], config: MeasureConfig, total: int, score: bool) -> None:
        """Prepare for `total` pictures; `score`: whether they are the set that is scored."""
        self.pool3 = Moments(POOL3_DIM) if metrics & {"rfid", "fid"} else None
        self.spatial7 = Moments(SPATIAL7_DIM) if "sfid" in metrics else None
        self.score = (
            InceptionScore(config.splits) if score and "inception_score" in metrics else None
        )
        near = metrics & {"precision", "recall"}
        self.subset = FeatureSubset(total, config.manifold_samples) if near else None

    def update(self, features: InceptionFeatures, start: int) -> None:
        """Add the features of the pictures start, start + 1, ..."""
        if self.pool3 is not None:
            self.pool3.update(features.pool3)
        if self.spatial7 is not None:
            self.spatial7.update(features.spatial7)
        if self.score is not None:
            self.score.update(features.logits, start)
        if self.subset is not None:
            self.subset.update(features.pool3, start)

    def merge(self, other: "FeatureState") -> None:
        """Add the pictures that `other` has seen."""
        for name, state in vars(self).items():
            if state is not None:
                state.merge(getattr(other, name))


def load_extractor(
    config: MeasureConfig, metrics: set[str], accelerator: Accelerator
) -> tuple[InceptionExtractor | None, dict[str, str]]:
    """Return the extractor, or None and the reason for each metric that needs it."""
    needing = metrics & INCEPTION_METRICS
    if not needing:
        return None, {}
    try:
        return InceptionExtractor(config.weights, accelerator), {}
    except WeightsUnavailable as error:
        return None, dict.fromkeys(needing, str(error))


@dataclass(frozen=True)
class Subject:
    """What a run measures: the fields that its records share."""

    data: str
    reference: str | None
    count: int
    checkpoint: dict[str, Any] | None
    seed: int | None = None


def measured(
    metric: str,
    unit: str | None,
    subject: Subject,
    protocol: Details,
    reasons: dict[str, str],
    compute: Callable[[], tuple[float, Details]],
) -> Record:
    """Return the record of `compute` (value, details for the protocol).

    Where `reasons` has an entry for the metric, or `compute` raises ValueError, the record is an
    unavailable one with that reason.
    """
    reason = reasons.get(metric)
    value: float | None = None
    if reason is None:
        try:
            value, details = compute()
            protocol = protocol | details
        except ValueError as error:
            reason = str(error)
    return Record(
        metric,
        value,
        unit=unit if reason is None else None,
        status="ok" if reason is None else "unavailable",
        reason=reason,
        protocol=protocol,
        **vars(subject),
    )


def feature_records(
    metrics: list[str],
    subject: Subject,
    protocol: Details,
    reasons: dict[str, str],
    real: FeatureState,
    generated: FeatureState,
    neighbours: int,
    device: torch.device,
) -> list[Record]:
    """Return the records of those of `metrics` that compare or score Inception features."""

    @functools.cache  # one computation gives both
    def manifold() -> tuple[tuple[float, float], Details]:
        assert real.subset is not None and generated.subset is not None
        sets = [state.features().to(device) for state in (real.subset, generated.subset)]
        details = {"neighbours": neighbours, "used": [len(points) for points in sets]}
        return precision_recall(sets[0], sets[1], neighbours), details

    def side(number: int) -> tuple[float, Details]:
        both, details = manifold()
        return both[number], details

    def score() -> tuple[float, Details]:
        assert generated.score is not None
        return generated.score.compute(), {"splits": len(generated.score.count)}

    def frechet(metric: str) -> tuple[float, Details]:
        name = FRECHET_FEATURES[metric]
        return _frechet(getattr(real, name), getattr(generated, name))

    compute: dict[str, Callable[[], tuple[float, Details]]] = {
        "inception_score": score,
        "precision": lambda: side(0),
        "recall": lambda: side(1),
    }
    unreferenced = dataclasses.replace(subject, reference=None)
    return [
        measured(
            metric,
            None,
            unreferenced if metric == "inception_score" else subject,
            protocol,
            reasons,
            compute.get(metric, functools.partial(frechet, metric)),
        )
        for metric in metrics
        if metric in INCEPTION_METRICS
    ]


def _frechet(real: Moments, generated: Moments) -> tuple[float, Details]:
    result = frechet_distance(real, generated)
    details: Details = {"frechet": result.method, "rank": result.rank}
    fewest = min(real.count, generated.count)
    if fewest <= real.dim:
        details["note"] = (
            f"{fewest} samples for {real.dim} features: the covariance is singular and the "
            "distance strongly biased; compare only with the same number of samples"
        )
    return result.value, details


def progress(
    source: Source,
    config: MeasureConfig,
    label: str,
    accelerator: Accelerator,
    count: int | None = None,
    show: bool = True,
) -> Iterator[Batch]:
    """Yield this process's batches of the first `count` (all) pictures behind a progress bar."""
    world = accelerator.num_processes
    count = len(source) if count is None else count
    silent = not (show and accelerator.is_main_process)
    with tqdm(total=count, unit="img", desc=label, disable=silent) as bar:
        for batch in source.batches(config.batch_size, accelerator.process_index, world, count):
            yield batch
            check_launcher()
            bar.update(min(len(batch.keys) * world, count - bar.n))


def report_converted(source: Source, accelerator: Accelerator) -> None:
    """Print how many pictures of `source` were not RGB; every process must call it."""
    total: Counter[str] = sum(gather_object([source.converted]), Counter())
    if total:
        modes = ", ".join(f"{count} {mode}" for mode, count in sorted(total.items()))
        accelerator.print(f"converted to RGB in {source.name}: {modes}")


def publish(
    command: str,
    config: MeasureConfig,
    records: list[Record],
    seconds: float,
    accelerator: Accelerator,
) -> list[str]:
    """Write and print the records on the main process; every process must call it.

    Returns, on every process, the metrics that were asked for by name and are unavailable.
    """
    missing: list[list[str]] = [[]]
    if accelerator.is_main_process:
        path = write_results(Path(config.out), command, records, seconds)
        print_table(records)
        notes = {(record.protocol or {}).get("note") for record in records}
        for note in sorted(filter(None, notes)):
            print(f"note: {note}")
        print(f"results: {path}")
        absent = [record.metric for record in records if record.status == "unavailable"]
        missing = [[metric for metric in absent if metric in (config.metrics or ())]]
    broadcast_object_list(missing)
    return missing[0]


def finish(missing: list[str], accelerator: Accelerator) -> None:
    """Leave the process group; exit with 1, and one line, if `missing` names a metric."""
    accelerator.end_training()
    if missing:
        line = f"error: metrics={missing}: asked for by name but unavailable, see above"
        raise SystemExit(line if accelerator.is_main_process else 1)
