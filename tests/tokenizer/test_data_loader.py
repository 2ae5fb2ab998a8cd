"""Batches: the order of data/order.py, damaged pictures replaced or named, with any workers."""

import multiprocessing
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer.config import DataConfig
from tokenizer.data import CENTER, View, open_dataset, ordered_batches, training_batches
from tokenizer.data.order import step_samples


def folder(root: Path, count: int, damaged: tuple[int, ...] = ()) -> DataConfig:
    """Pictures whose grey value is their position; 12 x 10, so that crops differ."""
    for i in range(count):
        path = root / f"{i:03d}.png"
        pixels = np.full((10, 12), i, np.uint8)
        pixels[:, 0] = 255 - i
        Image.fromarray(pixels).save(path)
        if i in damaged:
            path.write_bytes(b"damaged")
    return DataConfig(name="folder", root=str(root), split="all", resolution=8, num_workers=0)


def batches(config: DataConfig, count: int, **options):
    dataset = open_dataset(config, "all", train=True)
    defaults = {"seed": 3, "start_step": 0, "micro_batch": 4, "accumulation": 1, "rank": 0}
    stream = training_batches(dataset, config, **{**defaults, "world": 1, **options})
    return list(islice(stream, count))


def values(batch) -> list[int]:
    return batch.images[:, 0, 4, 6].tolist()


def test_training_follows_the_order_of_seed_and_step(tmp_path):
    config = folder(tmp_path, 20)
    for step, batch in enumerate(batches(config, 7)):
        assert values(batch) == step_samples(20, 4, seed=3, step=step).samples.tolist()
        assert batch.images.shape == (4, 3, 8, 8) and batch.images.dtype == torch.uint8
        assert batch.labels.tolist() == [-1] * 4 and batch.skipped == 0


def test_a_resumed_run_sees_the_same_pixels(tmp_path):
    config = folder(tmp_path, 20)
    whole = batches(config, 6)
    for later, batch in zip(whole[4:], batches(config, 2, start_step=4), strict=True):
        assert torch.equal(later.images, batch.images)


def test_processes_and_accumulation_divide_the_same_batch(tmp_path):
    config = folder(tmp_path, 20)
    whole = torch.cat([batch.images for batch in batches(config, 3)])
    halves = [batches(config, 6, micro_batch=1, accumulation=2, rank=r, world=2) for r in (0, 1)]
    divided = torch.cat([halves[r][i].images for i in range(6) for r in (0, 1)])
    assert torch.equal(divided, whole)


def test_workers_change_nothing(tmp_path):
    config = folder(tmp_path, 20, damaged=(4,))
    alone = batches(config, 5)
    config.num_workers = 2
    for a, b in zip(alone, batches(config, 5), strict=True):
        assert torch.equal(a.images, b.images) and a.skipped == b.skipped


@pytest.mark.skipif(sys.platform != "linux", reason="needs sigwaitinfo")
def test_workers_end_by_sigterm_from_their_reader_only(tmp_path):
    config = folder(tmp_path, 20)
    config.num_workers = 1
    dataset = open_dataset(config, "all", train=True)
    stream = training_batches(
        dataset, config, seed=3, start_step=0, micro_batch=4, accumulation=1, rank=0, world=1
    )
    next(stream)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    time.sleep(0.5)
    assert len(list(islice(stream, 10))) == 10  # more than what was read ahead
    assert worker.is_alive()
    worker.terminate()
    # The loader reports the end of a worker as an error, whenever it comes.
    with pytest.raises(RuntimeError, match="worker"):
        worker.join(timeout=30)
        list(islice(stream, 10))
    assert worker.exitcode == 0


def test_a_damaged_sample_gives_way_to_the_next_and_is_named_once(tmp_path, capsys):
    config = folder(tmp_path, 8, damaged=(3, 4))
    found = batches(config, 4)  # two epochs
    for step, batch in enumerate(found):
        expected = step_samples(8, 4, seed=3, step=step).samples.tolist()
        assert values(batch) == [5 if i in (3, 4) else i for i in expected]
    assert sum(batch.skipped for batch in found) == 2 * (2 + 1)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == ["skipped 003.png: not a picture", "skipped 004.png: not a picture"]


def test_nothing_readable_is_an_error(tmp_path, capsys):
    config = folder(tmp_path, 4, damaged=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="4 pictures in a row cannot be read"):
        batches(config, 1)
    assert "skipped 000.png" in capsys.readouterr().err


def test_ordered_batches_leave_out_and_name_what_is_damaged(tmp_path):
    config = folder(tmp_path, 7, damaged=(1, 6))
    dataset = open_dataset(config, "all", train=False)
    views = [CENTER, View("random", random_crop=True, seed=1)]
    found = list(ordered_batches(dataset, views, [range(0, 3), range(3, 6), [6]], 2))
    assert [batch.keys for batch in found] == [
        ["000.png", "002.png"],
        ["003.png", "004.png", "005.png"],
        [],
    ]
    assert [batch.skipped for batch in found] == [
        [("001.png", "not a picture")],
        [],
        [("006.png", "not a picture")],
    ]
    assert found[0].images.shape == (2, 2, 3, 8, 8) and found[2].images.shape == (0, 2, 3, 8, 8)
    assert torch.equal(found[1].images[0, 0], dataset.load(3))


def test_a_picture_that_vanishes_is_named(tmp_path):
    config = folder(tmp_path, 3)
    dataset = open_dataset(config, "all", train=False)
    (tmp_path / "001.png").unlink()
    (batch,) = ordered_batches(dataset, [CENTER], [range(3)], 0)
    assert batch.skipped == [("001.png", "cannot be read: No such file or directory")]
