"""What every source of pictures offers: a length, names, and batches dealt to processes."""

import queue
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Pictures of one size.

    images: uint8 [n, 3, h, w], RGB;  cls: int64 [n], -1 where there is no class;  keys: n names;
    indices: int64 [n, h', w'] token indices, or None;  start: the number of the first picture in
    the source.
    """

    images: torch.Tensor
    cls: torch.Tensor
    keys: list[str]
    indices: torch.Tensor | None
    start: int


class Source(ABC):
    """An ordered collection of pictures that can be read by ranges."""

    def __init__(self, name: str, class_names: list[str] | None) -> None:
        self.name = name
        self.class_names = class_names
        self.converted: Counter[str] = Counter()  # pictures this process made RGB, by their mode

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the pictures start, ..., stop-1 in order, cut where the size changes."""

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, count: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's share of the first `count` (all) pictures, decoding ahead in a thread.

        Range j, the pictures [j * batch_size, (j + 1) * batch_size), belongs to rank j % world. So
        every picture is read once, and it meets the same neighbours in its batch whatever the
        number of processes: numbers that depend on the composition of a batch in the last digits
        are the same too.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be at least 1")
        total = len(self) if count is None else count
        starts = range(rank * batch_size, total, world * batch_size)
        return _ahead(batch for i in starts for batch in self.read(i, min(i + batch_size, total)))


def _ahead(batches: Iterator[Batch], depth: int = 2) -> Iterator[Batch]:
    """Run `batches` in a thread, `depth` items ahead of the consumer."""
    done = threading.Event()
    items: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)

    def put(item: Batch | BaseException | None) -> bool:
        while not done.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for batch in batches:
                if not put(batch):
                    return
            put(None)
        except BaseException as error:  # raised again in the consumer's thread
            put(error)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        done.set()
