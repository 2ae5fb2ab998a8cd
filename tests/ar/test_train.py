"""Training end to end: the loss, exact resumption, processes, signals, and what is refused."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ar.config import ModelConfig, OptimConfig, SamplingConfig, TrainConfig
from ar.model import AR
from ar.parallel import StopRequest
from ar.sampler import sample
from ar.shards import IndexShards
from ar.train import train

Records = list[dict[str, float]]


def config(shards: Path, out: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(
        model=ModelConfig(name="test", dim=32, num_heads=2, num_layers=1, num_intra_layers=1),
        optim=OptimConfig(lr=3e-3),
        out=str(out),
        steps=8,
        global_batch=16,
        micro_batch=8,
        log_every_steps=1,
        save_every_steps=3,
    )
    base.data.shards = str(shards)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def records(out: Path) -> Records:
    """Return the metrics without those that measure time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("tokens_per_s", "data_wait")} for r in lines]


def run(settings: TrainConfig) -> Records:
    train(settings, StopRequest())
    return records(Path(settings.out))


def test_the_first_loss_is_that_of_a_uniform_guess(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    first = run(config(make_shards(), tmp_path / "run", steps=1))[0]
    assert first["step"] == 1
    assert first["loss_pre"] == pytest.approx(math.log(2**2), abs=1e-6)
    assert first["loss_post"] == pytest.approx(math.log(2**4), abs=1e-6)


def test_a_resumed_run_equals_an_uninterrupted_one(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards(num_views=2)
    whole = run(config(shards, tmp_path / "whole", ema_decay=0.9))
    stop = StopRequest()
    parts = config(shards, tmp_path / "parts", ema_decay=0.9)
    for received_at in (4, 6):  # stops at a step that is no checkpoint otherwise
        train_until(parts, stop, received_at)
    assert run(parts) == whole
    for name in ("model.safetensors", "checkpoints/step-000000008/optimizer.safetensors"):
        a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def train_until(settings: TrainConfig, stop: StopRequest, step: int) -> None:
    """Train as if a signal came during `step`."""
    import ar.train

    original = ar.train.learning_rate

    def tripwire(at: int, total: int, optim: OptimConfig) -> float:
        stop.received = stop.received or at == step - 1
        return original(at, total, optim)

    stop.received = False
    ar.train.learning_rate = tripwire
    try:
        train(settings, stop)
    finally:
        ar.train.learning_rate = original
        stop.received = False
    assert records(Path(settings.out))[-1]["step"] == step


def test_accumulation_does_not_change_the_result(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards()
    model = ModelConfig("test", 32, 2, 1, 1, embedding_dropout=0, resid_dropout=0, ffn_dropout=0)
    one = run(config(shards, tmp_path / "one", micro_batch=16, model=model))
    four = run(config(shards, tmp_path / "four", micro_batch=4, model=model))
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_small_model_learns_its_samples_by_heart(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_shards(num_samples=64, num_classes=64)
    model = ModelConfig("test", 64, 2, 2, 1, embedding_dropout=0, resid_dropout=0, ffn_dropout=0)
    settings = config(
        shards,
        tmp_path / "run",
        model=model,
        optim=OptimConfig(lr=1e-2),
        steps=200,
        global_batch=64,
        micro_batch=64,
        class_dropout=0.0,
        log_every_steps=200,
        save_every_steps=200,
    )
    assert run(settings)[-1]["loss"] < 0.1
    expected, labels = IndexShards(shards).read(np.arange(64), np.zeros(64, np.int64))
    greedy = SamplingConfig(scale=[1.0, 1.0], temperature=[0.0, 0.0])
    trained = AR.from_pretrained(tmp_path / "run")
    tokens = sample(trained, torch.from_numpy(labels), torch.arange(64), greedy, seed=0)
    assert (tokens.numpy() == expected).mean() > 0.99


def test_validation_is_the_mean_loss_of_the_first_views(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    settings = config(make_shards(), tmp_path / "run", steps=2)
    val = make_shards("val", num_samples=21, num_views=2, seed=5)
    settings.data.val_shards, settings.data.verify = str(val), True
    record = run(settings)[-1]
    tokens, labels = IndexShards(val).read(np.arange(21), np.zeros(21, np.int64))
    model = AR.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        batch = torch.from_numpy(tokens)
        loss = model.loss(model(batch, torch.from_numpy(labels)), batch)
    assert record["val_loss_pre"] == pytest.approx(loss[0].item(), rel=1e-5)
    assert record["val_loss_post"] == pytest.approx(loss[1].item(), rel=1e-5)
    settings.data.val_shards = str(make_shards("other", digest="sha256:" + "1" * 64))
    with pytest.raises(ValueError, match="encode both with the same"):
        run(dataclasses.replace(settings, out=str(tmp_path / "new")))


def test_the_average_of_the_weights_is_what_is_published(
    make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    run(config(make_shards(), tmp_path / "run", steps=1, ema_decay=0.75))
    step = tmp_path / "run" / "checkpoints" / "step-000000001"
    published = load_file(tmp_path / "run" / "model.safetensors")["head.0.weight"]
    trained = load_file(step / "model.safetensors")["head.0.weight"]
    assert trained.abs().max() > 0
    torch.testing.assert_close(published, 0.25 * trained)  # heads start at zero


def test_non_finite_gradients_are_skipped_then_end_the_run(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AR.loss
    calls = []

    def broken(self: AR, logits: object, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        loss = original(self, logits, tokens)  # type: ignore[arg-type]
        return loss * float("nan") if len(calls) in (5, 6) or len(calls) > 10 else loss

    monkeypatch.setattr(AR, "loss", broken)
    settings = config(make_shards(), tmp_path / "run", optim=OptimConfig(max_skipped_steps=2))
    with pytest.raises(ValueError, match="step 7: .*not finite 2 times in a row.*of step 6"):
        run(settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    third = json.loads(lines[2])
    assert third["loss"] is None and third["skipped_steps"] == 1
    assert json.loads(lines[3])["loss"] > 0


@pytest.mark.parametrize("changed", ["seed", "global_batch", "data", "model"])
def test_another_run_does_not_resume_unless_asked_to(
    make_shards: Callable[..., Path], tmp_path: Path, changed: str
) -> None:
    settings = config(make_shards(), tmp_path / "run", steps=2)
    run(settings)
    if changed == "seed":
        settings = dataclasses.replace(settings, seed=1, steps=3)
    elif changed == "global_batch":
        settings = dataclasses.replace(settings, global_batch=8, steps=3)
    elif changed == "data":
        settings.data.shards = str(make_shards("other", seed=9))
    else:
        model = dataclasses.replace(settings.model, ffn_dropout=0.2)
        settings = dataclasses.replace(settings, model=model, steps=3)
    with pytest.raises(ValueError, match=f"{changed} was .*allow_changes=true"):
        run(settings)
    changes = dataclasses.replace(settings, allow_changes=True, steps=3)
    assert run(changes)[-1]["step"] == 3


def test_missing_shards_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make tokenize DATA=imagenet"):
        run(config(tmp_path / "nothing", tmp_path / "run"))


OPTIONS = [
    "+model=tiny",
    "model.dim=32",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.embedding_dropout=0",
    "model.resid_dropout=0",
    "model.ffn_dropout=0",
    "data.shards=shards",
    "global_batch=16",
    "micro_batch=8",
    "log_every_steps=1",
]


def test_two_processes_train_as_one(
    make_shards: Callable[..., Path],
    command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    make_shards()
    for out, processes in (("one", 1), ("two", 2)):
        steps = ["steps=4", "save_every_steps=2", "data.val_shards=shards"]
        done = command("ar.train", *OPTIONS, *steps, f"out={out}", processes=processes)
        assert done.returncode == 0, done.stderr
    assert "2 processes x 1 passes" in done.stdout
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7)
    again = command("ar.train", *OPTIONS, "steps=6", "out=two", processes=2)
    assert again.returncode == 0, again.stderr
    assert [r["step"] for r in records(tmp_path / "two")] == [1, 2, 3, 4, 5, 6]


def start(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ar.train", *OPTIONS, *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_for_steps(out: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len(records_so_far(out)) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not start")


def records_so_far(out: Path) -> list[str]:
    return (out / "metrics.jsonl").read_text().splitlines()


def test_killed_and_stopped_runs_end_with_the_metrics_of_an_uninterrupted_one(
    make_shards: Callable[..., Path],
    command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    make_shards()
    steps = ["steps=150", "save_every_steps=10"]
    process = start(tmp_path, *steps, "out=killed")
    wait_for_steps(tmp_path / "killed", 25)
    process.kill()
    process.communicate()
    process = start(tmp_path, *steps, "out=killed")
    wait_for_steps(tmp_path / "killed", 45)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped by a signal" in output
    last = command("ar.train", *OPTIONS, *steps, "out=killed")
    assert last.returncode == 0 and "150 of 150 steps" in last.stdout
    assert command("ar.train", *OPTIONS, *steps, "out=whole").returncode == 0
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    (tmp_path / "killed" / "model.safetensors").unlink()  # as if killed before it was published
    done = command("ar.train", *OPTIONS, *steps, "out=killed")
    published = [load_file(tmp_path / out / "model.safetensors") for out in ("killed", "whole")]
    assert all(torch.equal(published[0][name], published[1][name]) for name in published[1])
    assert done.returncode == 0 and "done, 150 of 150 steps" in done.stdout
