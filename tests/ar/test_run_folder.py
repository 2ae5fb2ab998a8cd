"""The run folder: complete checkpoints only, retention, metrics without repeats."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ar.run_folder import RunFolder


def save(folder: RunFolder, step: int, keep_last: int = 2) -> None:
    files = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"w.step": torch.ones(1)}}
    folder.save(step, files, {"seed": 0}, {"world_size": 1}, keep_last)


def test_the_newest_complete_folder_is_found_and_published(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.newest() is None
    for step in (5, 10, 15):
        save(folder, step)
    saved = folder.newest()
    assert saved is not None and (saved.step, saved.identity) == (15, {"seed": 0})
    assert saved.tensors("model")["w"].tolist() == [15.0] * 3
    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [15.0] * 3
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-000000010", "step-000000015"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000015\n"


def test_what_a_kill_left_undone_is_done_by_the_next_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (5, 10, 15):
        save(folder, step, keep_last=3)
    # As after a kill between the rename of step 15 and all that follows it, and an earlier one.
    published = tmp_path / "model.safetensors"
    published.unlink()
    os.link(tmp_path / "checkpoints" / "step-000000010" / "model.safetensors", published)
    (tmp_path / "checkpoints" / "latest").write_text("step-000000010\n")
    (tmp_path / "checkpoints" / "step-000000007.tmp").mkdir()
    for damaged in (False, True):
        folder.settle(keep_last=2)
        assert load_file(published)["w"].tolist() == [15.0] * 3
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == ["latest", "step-000000010", "step-000000015"]
        assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000015\n"
        if not damaged:
            published.unlink()
            published.write_bytes(b"half")


def test_published_weights_are_as_readable_as_other_files(tmp_path: Path) -> None:
    save(RunFolder(tmp_path), 5)
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_same_weights_have_the_same_bytes(tmp_path: Path) -> None:
    contents = set()
    for number in range(8):  # the library orders the metadata at random
        save(RunFolder(tmp_path / str(number)), 5)
        contents.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0" / "model.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["omv2"])
    assert facts == {"format": "omv2-ar", "version": 1, "step": 5}


def test_an_average_of_the_weights_is_published_in_their_place(tmp_path: Path) -> None:
    files = {name: {"w": torch.full((1,), value)} for name, value in (("model", 1.0), ("ema", 2.0))}
    RunFolder(tmp_path).save(5, files, {}, {}, keep_last=1)
    assert load_file(tmp_path / "model.safetensors")["w"].item() == 2.0


@pytest.mark.parametrize("damage", ["no run.json", "short file", "lost file", "temporary"])
def test_incomplete_folders_are_ignored(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 5)
    save(folder, 10)
    newest = tmp_path / "checkpoints" / "step-000000010"
    if damage == "no run.json":
        (newest / "run.json").unlink()
    elif damage == "short file":
        (newest / "optimizer.safetensors").write_bytes(b"")
    elif damage == "lost file":
        (newest / "model.safetensors").unlink()
    else:
        newest.rename(newest.with_name(newest.name + ".tmp"))
    saved = folder.newest()
    assert saved is not None and saved.step == 5
    save(folder, 10)  # over what is left
    saved = folder.newest()
    assert saved is not None and saved.step == 10


def test_a_model_without_checkpoints_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="choose a new folder"):
        RunFolder(tmp_path).newest()


def test_metrics_after_the_resumed_step_are_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append_metrics({"step": step, "loss": 1.0})
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    folder.forget_metrics_after(2)
    steps = [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]
    assert steps == [1, 2]
