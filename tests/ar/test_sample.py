"""The sampling command: shards that read back, the same for any number of processes, resumable."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ar.model import AR
from ar.sample import chosen_classes, class_folders, class_names, make_plan
from ar.shards import IndexShards

Command = Callable[..., "subprocess.CompletedProcess[str]"]
CARD = {
    "tokenizer": {"id": "outputs/tokenizer/test", "digest": "sha256:" + "2" * 64},
    "codebook_bits": 6,
    "grid": [4, 4],
    "class_names": ["tabby cat", "crane", "tench, Tinca tinca", "a/b"],
}


@pytest.fixture
def checkpoint(make_model: Callable[..., AR], tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "run", CARD, step=1)
    return tmp_path / "run"


def test_samples_are_the_same_from_one_process_two_and_after_a_kill(
    checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    options = ["ckpt=run", "n_per_class=5", "samples_per_shard=8", "batch_size=4"]
    for out, processes in (("one", 1), ("two", 2)):
        done = command("ar.sample", *options, f"out={out}", processes=processes)
        assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest == json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["tokenizer"] == CARD["tokenizer"]
    assert manifest["views"] == [{"name": "sample"}]
    assert manifest["source"]["checkpoint"]["id"] == "run"
    IndexShards(tmp_path / "two").verify()

    # What a kill leaves after the manifest: files of the job.
    (tmp_path / "two" / "job.json").write_text("{}")
    done = command("ar.sample", *options, "out=two")
    assert done.returncode == 0 and "done, 20 samples" in done.stdout
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))

    # What a kill leaves before it: a job, a finished shard, a half-written one.
    entries = [s for s in manifest["shards"] if s["file"] != "shard-000001.tar"]
    request = {k: v for k, v in manifest.items() if k not in ("format", "version", "shards")}
    folder = tmp_path / "two"
    (folder / "manifest.json").unlink()
    job = {"format": "omv2-index-shards-job", "version": 1, **request}
    (folder / "job.json").write_text(json.dumps(job))
    for entry in entries:
        path = (folder / entry["file"]).with_suffix(".json")
        value = {"format": "omv2-index-shards-entry", "version": 1, "entry": entry}
        path.write_text(json.dumps(value))
    (folder / "shard-000001.tar").rename(folder / "shard-000001.tar.tmp")
    kept = os.stat(folder / "shard-000000.tar").st_mtime_ns
    again = command("ar.sample", *options, "out=two")
    assert again.returncode == 0 and "1 of 3 shards to write" in again.stdout
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert os.stat(folder / "shard-000000.tar").st_mtime_ns == kept
    done = command("ar.sample", *options, "out=two")
    assert done.returncode == 0 and "done, 20 samples" in done.stdout


def test_an_image_depends_on_its_class_and_number_only(
    checkpoint: Path, command: Command, tmp_path: Path
) -> None:
    assert command("ar.sample", "ckpt=run", "out=all", "n_per_class=3").returncode == 0
    part = command("ar.sample", "ckpt=run", "out=part", "n_per_class=5", "classes=[2,0]")
    assert part.returncode == 0, part.stderr
    everything, _ = IndexShards(tmp_path / "all").read(np.arange(12), np.zeros(12, np.int64))
    chosen, labels = IndexShards(tmp_path / "part").read(np.arange(10), np.zeros(10, np.int64))
    assert labels.tolist() == [2] * 5 + [0] * 5
    assert np.array_equal(chosen[:3], everything[6:9])
    assert np.array_equal(chosen[5:8], everything[:3])


def test_wrong_requests_end_in_one_line(checkpoint: Path, command: Command) -> None:
    for options, message in (
        (["ckpt=nowhere", "out=a"], "error: ckpt=nowhere: no such folder"),
        (
            ["ckpt=run", "out=a", "classes=[4]"],
            "error: classes=[4]: the model's class ids are 0 to 3",
        ),
        (["ckpt=run", "out=run"], "error: out=run: the folder holds other files"),
        (["out=a"], "error: ckpt has no default: set ckpt=..."),
    ):
        done = command("ar.sample", *options)
        assert done.returncode == 1
        assert message in done.stderr.splitlines()[-1]


def test_keys_are_plain_unique_paths() -> None:
    folders = class_folders(["tabby cat", "crane", "tench, Tinca tinca", "a/b"])
    assert list(folders.values()) == [
        "unconditional",
        "tabby_cat",
        "crane",
        "tench_Tinca_tinca",
        "a_b",
    ]
    twice = class_folders(["crane", "owl", "Crane"])
    assert list(twice.values()) == ["unconditional", "0000_crane", "0001_owl", "0002_Crane"]
    plan = make_plan([2, -1], 2, folders)
    assert plan.keys[0] == "tench_Tinca_tinca/00000000"
    assert plan.keys[3] == "unconditional/00000001"
    assert len(set(plan.ids.tolist())) == 4


def test_classes_without_names_are_called_by_their_numbers() -> None:
    card = {"tokens": {"class_names": None}, "model": {"num_classes": 2}}
    assert class_names(card) == ["0", "1"]
    assert class_names({**card, "tokens": CARD}) == CARD["class_names"]
    assert class_names({**card, "model": {"num_classes": 0}}) == []


def test_all_classes_are_sampled_unless_chosen() -> None:
    assert chosen_classes(None, 3) == [0, 1, 2]
    assert chosen_classes(None, 0) == [-1]
    assert chosen_classes([-1, 2], 3) == [-1, 2]
    with pytest.raises(ValueError, match=r"classes=\[3, 7\]"):
        chosen_classes([7, 0, 3], 3)
