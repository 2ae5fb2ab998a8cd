"""Batches from a Dataset, decoded in worker processes: endless for training, ordered for export."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tokenizer.config import DataConfig
from tokenizer.data.dataset import Dataset
from tokenizer.data.order import micro_batches, mix
from tokenizer.data.pictures import UnreadablePicture
from tokenizer.data.views import View

# Damaged pictures are rare; this many in a row mean that the data is not there.
MAX_UNREADABLE_IN_A_ROW = 100

Names = list[tuple[str, str]]  # key and reason of what could not be read


@dataclass(frozen=True)
class TrainBatch:
    """A micro-batch of one process."""

    images: Tensor  # uint8 [b, 3, H, W]
    labels: Tensor  # int64 [b]; -1 where there are no classes
    skipped: int  # samples of the batch that could not be read and were replaced


@dataclass(frozen=True)
class OrderedBatch:
    """Consecutive samples; those that could not be read are missing and named in `skipped`."""

    images: Tensor  # uint8 [b, views, 3, H, W]
    labels: Tensor  # int64 [b]
    keys: list[str]
    skipped: Names


class _TrainSamples(torch.utils.data.Dataset):
    """Loads (sample, augmentation seed); an unreadable sample gives way to the next readable."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: tuple[int, int]) -> tuple[Tensor | None, int, Names]:
        sample, seed = request
        skipped: Names = []
        while len(skipped) < min(MAX_UNREADABLE_IN_A_ROW, len(self._dataset)):
            i = (sample + len(skipped)) % len(self._dataset)
            try:
                return self._dataset.load(i, seed=seed), int(self._dataset.labels[i]), skipped
            except UnreadablePicture as error:
                skipped.append((self._dataset.key(i), str(error)))
        return None, -1, skipped


class _OrderedSamples(torch.utils.data.Dataset):
    """Loads all views of a sample; view v of sample i is seeded by (seed of the view, i)."""

    def __init__(self, dataset: Dataset, views: Sequence[View]) -> None:
        self._dataset = dataset
        self._views = list(views)

    def __getitem__(self, i: int) -> tuple[Tensor | None, int, str, str]:
        seeds = [int(mix(view.seed or 0, i)[0]) for view in self._views]
        key = self._dataset.key(i)
        try:
            views = torch.stack(self._dataset.load_views(i, self._views, seeds))
        except UnreadablePicture as error:
            return None, -1, key, str(error)
        return views, int(self._dataset.labels[i]), key, ""


def _loader(samples: torch.utils.data.Dataset, batches, num_workers: int, collate) -> DataLoader:  # type: ignore[no-untyped-def]
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=min(num_workers, _cores()),
        collate_fn=collate,
        worker_init_fn=_outlive_group_signals,
        pin_memory=torch.accelerator.is_available(),
    )


def _cores() -> int:
    """Return the processors this process may use; more workers than that only take turns."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _outlive_group_signals(worker_id: int) -> None:
    """Let SIGTERM end a worker only where the process that reads from it sends it.

    torchrun and batch systems send it to whole process groups; training then still needs its
    workers to finish the step and save. A worker whose parent is gone ends by itself.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True).start()


def _collate_train(items: list) -> tuple[Tensor | None, Tensor, Names]:
    images, labels, skipped = zip(*items, strict=True)
    complete = all(image is not None for image in images)
    pixels = torch.stack(images) if complete else None
    return pixels, torch.tensor(labels), [entry for part in skipped for entry in part]


def _collate_ordered(items: list) -> tuple[Tensor | None, Tensor, list[str], Names]:
    good = [item for item in items if item[0] is not None]
    skipped = [(key, reason) for images, _, key, reason in items if images is None]
    images = torch.stack([item[0] for item in good]) if good else None
    labels = torch.tensor([item[1] for item in good], dtype=torch.int64)
    return images, labels, [item[2] for item in good], skipped


def training_batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    seed: int,
    start_step: int,
    micro_batch: int,
    accumulation: int,
    rank: int,
    world: int,
) -> Iterator[TrainBatch]:
    """Yield this rank's micro-batches without end, `accumulation` per step, from `start_step` on.

    Which samples and crops a step sees depends on (seed, step) alone; data/order.py tells how. A
    sample that cannot be read is replaced by the next readable one, counted, and named on stderr
    the first time.

    Raises:
        ValueError: where the global batch exceeds the data set, or nothing can be read.
    """
    requests = micro_batches(
        len(dataset),
        seed=seed,
        start_step=start_step,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        world=world,
    )
    named: set[str] = set()
    loader = _loader(_TrainSamples(dataset), requests, config.num_workers, _collate_train)
    for images, labels, skipped in loader:
        for key, reason in skipped:
            if key not in named:
                named.add(key)
                tqdm.write(f"skipped {key}: {reason}", file=sys.stderr)
        if images is None:
            raise ValueError(f"{len(named)} pictures in a row cannot be read; see the names above")
        yield TrainBatch(images, labels, len(skipped))


def ordered_batches(
    dataset: Dataset, views: Sequence[View], batches: Sequence[Sequence[int]], num_workers: int
) -> Iterator[OrderedBatch]:
    """Yield one OrderedBatch for each list of sample positions, in order.

    A batch of which nothing can be read has images of shape [0, views, 3, H, W].
    """
    samples = _OrderedSamples(dataset, views)
    size = dataset.resolution
    for images, labels, keys, skipped in _loader(samples, batches, num_workers, _collate_ordered):
        if images is None:
            images = torch.empty(0, len(views), 3, size, size, dtype=torch.uint8)
        yield OrderedBatch(images, labels, keys, skipped)
