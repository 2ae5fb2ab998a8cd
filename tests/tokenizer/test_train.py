"""`python -m tokenizer.train` as a command: resuming, killing, processes, wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from tokenizer.autoencoder import Tokenizer
from tokenizer.config import CONF_DIR, TrainConfig, validated
from tokenizer.data import open_dataset
from tokenizer.run_folder import RunFolder, changed_settings
from tokenizer.train import check_discriminator, settings
from tokenizer.training_state import TrainingState

TINY = [
    "data.num_workers=0",
    "model={bits: 6, base_channels: 8, multipliers: [1, 2, 2]}",
    "model.blocks_per_level=1",
    "model.norm_groups=4",
    "loss={perceptual_weight: 0, adversarial_weight: 0.1, discriminator_channels: 4}",
    "optim={schedule: constant, warmup_steps: 2}",
    "global_batch=8",
    "micro_batch=4",
    "log_every=1",
    "validate_every=3",
    "validation_images=8",
    "preview_every=3",
    "preview_images=10",
    "checkpoint_every=2",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
# What depends on the clock, not on the training.
RATES = ("images_per_s", "data_wait")


def command(*arguments: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "tokenizer.train"]
    if processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher = ["-m", *torchrun, *launcher]
    return [sys.executable, *launcher, *TINY, *arguments]


def train(folder: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, processes=processes),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = train(folder, "steps=6", "out=run")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_a_run_leaves_a_usable_checkpoint_metrics_and_previews(uninterrupted: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(uninterrupted)
    assert tokenizer.config.bits == 6
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"l1", "generator", "discriminator", "lecam", "commitment"} <= set(lines[0])
    assert [line["step"] for line in lines if "val_psnr" in line] == [3, 6]
    previews = [path.name for path in sorted((uninterrupted / "previews").iterdir())]
    assert previews == ["step-000000003.png", "step-000000006.png"]
    steps = [path.name for path in sorted((uninterrupted / "checkpoints").iterdir())]
    assert steps == ["latest", "step-000000004", "step-000000006"]  # keep_last is 2
    assert (uninterrupted / "checkpoints" / "latest").read_text() == "step-000000006\n"
    ema = load_file(uninterrupted / "checkpoints" / "step-000000006" / "ema.safetensors")
    exported = tokenizer.state_dict()
    assert all((exported[name] == tensor).all() for name, tensor in ema.items())


def test_resuming_equals_no_interruption(uninterrupted: Path, tmp_path: Path) -> None:
    assert train(tmp_path, "steps=4", "out=run").returncode == 0
    result = train(tmp_path, "steps=6", "out=run")
    assert result.returncode == 0, result.stderr
    assert "resuming run at step 4" in result.stdout
    assert_same_run(tmp_path / "run", uninterrupted)
    again = train(tmp_path, "steps=6", "out=run")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert_same_run(tmp_path / "run", uninterrupted)


def assert_same_run(run: Path, expected: Path) -> None:
    mine = [line for line in metrics(run)]
    theirs = metrics(expected)
    for line, other in zip(mine, theirs, strict=True):
        assert {k: v for k, v in line.items() if k != "val_psnr"} == {
            k: v for k, v in other.items() if k != "val_psnr"
        }
    ours, truth = load_file(run / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == truth.keys()
    assert all((ours[name] == truth[name]).all() for name in truth)


def test_a_killed_run_resumes_without_losing_or_repeating_a_step(
    uninterrupted: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command("steps=6", "out=run"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "run" / "checkpoints" / "step-000000002" / "run.json")
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What a kill may leave behind: half a checkpoint, half a deleted one and half a line.
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-000000099.tmp").mkdir(parents=True)
    (checkpoints / "step-000000001").mkdir()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    result = train(tmp_path, "steps=6", "out=run")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", uninterrupted)
    steps = [path.name for path in sorted(checkpoints.iterdir())]
    assert steps == ["latest", "step-000000004", "step-000000006"]


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def test_sigterm_saves_and_exits_cleanly(tmp_path: Path) -> None:
    """Also where it goes to the whole process group, so to the workers that read the data."""
    endless = ["steps=100000", "checkpoint_every=100000", "validate_every=100000"]
    process = subprocess.Popen(
        command(*endless, "out=run", "data.num_workers=1"),
        start_new_session=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    wait_for(tmp_path / "run" / "metrics.jsonl")
    os.killpg(process.pid, signal.SIGTERM)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "the same command resumes" in stdout
    step = RunFolder(tmp_path / "run").latest_step()
    last = metrics(tmp_path / "run")[-1]
    assert step is not None and step == last["step"]
    assert "val_psnr" not in last  # the seconds before the kill are for saving


def test_two_processes_equal_one_where_the_batch_is_judged_as_a_whole(tmp_path: Path) -> None:
    """Without batch norm, and with the entropy of the global batch, processes only share work."""
    arguments = ["steps=3", "loss.adversarial_weight=0", "loss.entropy_scope=global"]
    one = train(tmp_path, *arguments, "micro_batch=8", "out=one")
    two = train(tmp_path, *arguments, "out=two", processes=2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    for line, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert line.keys() == other.keys()
        assert line == pytest.approx(other, rel=1e-4)


def test_accumulation_over_two_processes_equals_one_large_batch(tmp_path: Path) -> None:
    arguments = ["steps=4", "loss.adversarial_weight=0", "loss.entropy_weight=0"]
    arguments += ["log_every=4", "validate_every=3"]
    one = train(tmp_path, *arguments, "micro_batch=8", "out=one")
    two = train(tmp_path, *arguments, "micro_batch=2", "out=two", processes=2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert [line["step"] for line in metrics(tmp_path / "one")] == [3, 4]
    for line, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_ruined_weights_are_never_saved(tmp_path: Path) -> None:
    rarely = ["log_every=9", "validate_every=9", "preview_every=9"]
    result = train(tmp_path, "steps=9", "out=run", "optim.lr=1e30", *rarely)
    assert result.returncode == 1
    assert "error: there are weights that are not finite at step 4; the newest" in result.stderr
    assert RunFolder(tmp_path / "run").latest_step() == 2


def test_weights_without_a_state_to_resume_from_are_not_replaced(
    uninterrupted: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    weights = (uninterrupted / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model.safetensors").write_bytes(weights)
    result = train(tmp_path, "steps=2", "out=run")
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: run holds trained weights")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights


def test_changed_settings_are_refused_by_name(uninterrupted: Path, tmp_path: Path) -> None:
    assert train(tmp_path, "steps=2", "out=run").returncode == 0
    result = train(tmp_path, "steps=4", "out=run", "seed=1", "global_batch=16")
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert "global_batch (was 8, now 16)" in line
    assert "seed (was 0, now 1)" in line
    assert train(tmp_path, "steps=4", "out=run", "seed=1", "allow_changes=true").returncode == 0


def test_a_missing_data_set_is_one_clear_line(tmp_path: Path) -> None:
    result = train(tmp_path, "data=imagenet", "data.root=/nowhere", "out=run", "steps=2")
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and "data.root=/nowhere" in line
    assert not (tmp_path / "run").exists()


def composed(*overrides: str) -> TrainConfig:
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return validated(compose("train", list(overrides)), TrainConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+modle=xl", "modle"),
        ("model.bits=30", "model.bits=30"),
        ("model.norm_groups=7", "model.norm_groups=7"),
        ("data.resolution=34", "data.resolution=34"),
        ("optim.schedule=step", "optim.decay_steps"),
        ("epochs=3", "steps=600, epochs=3"),
        ("precision=fp16", "precision=fp16"),
        ("keep_last=0", "keep_last=0"),
        ("loss.entropy_scope=all", "loss.entropy_scope=all"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(SystemExit) as error:
        composed(override)
    text = str(error.value)
    assert text.startswith("error: ") and message in text and "\n" not in text


@pytest.mark.parametrize(
    "recipe", ["small", "imagenet_128", "imagenet_256", "web_262144", "web_16384"]
)
def test_every_recipe_composes(recipe: str) -> None:
    config = composed(f"recipe={recipe}", "steps=1", "epochs=null")
    assert config.accumulation(processes=1) * config.micro_batch == config.global_batch
    published = {"imagenet_128": ([1, 2, 2, 4], 0.01), "imagenet_256": ([1, 1, 2, 2, 4], 0.05)}
    if recipe in published:
        assert (config.model.multipliers, config.loss.lecam_weight) == published[recipe]
    if recipe != "small":  # Section 3 of the paper and its code: what all published models share
        loss = config.loss
        assert (loss.l1_weight, loss.perceptual_weight, loss.adversarial_weight) == (1, 1, 0.1)
        assert (loss.entropy_weight, loss.commitment_weight) == (0.1, 0.25)
        assert (config.optim.lr, config.optim.betas) == (1e-4, [0.5, 0.9])
        assert (config.global_batch, config.ema_decay) == (256, 0.999)


def test_batch_sizes_must_fit_the_processes() -> None:
    config = composed("global_batch=64", "micro_batch=8")
    assert [config.accumulation(n) for n in (1, 2, 8)] == [8, 4, 1]
    with pytest.raises(ValueError, match="global_batch=64.*= 24"):
        config.accumulation(3)


def test_a_discriminator_too_deep_for_the_images_is_refused() -> None:
    config = composed("loss.adversarial_weight=0.1", "data.resolution=16")
    with pytest.raises(ValueError, match="loss.discriminator_layers=3"):
        check_discriminator(config)


def test_other_data_changes_the_settings_and_another_place_does_not() -> None:
    config = composed()
    train_set, val_set = (open_dataset(config.data, s, train=True) for s in ("train", "val"))
    before = settings(config, train_set)
    config.data.root = "/elsewhere"
    assert changed_settings(before, settings(config, train_set)) == []
    (line,) = changed_settings(before, settings(config, val_set))
    assert line.startswith("data.digest (was 'sha256:")


@pytest.mark.parametrize("discriminator", ["patchgan", "blur"])
def test_all_training_state_survives_saving(discriminator: str, tmp_path: Path) -> None:
    options = ["loss.adversarial_weight=0.1", f"loss.discriminator={discriminator}"]
    config = composed(*options, "loss.discriminator_channels=32", "loss.discriminator_layers=1")
    state = TrainingState.build(config, torch.device("cpu"))
    assert state.adversary is not None
    parameters = [*state.tokenizer.parameters(), *state.adversary.discriminator.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.adversary.optimizer.step()
    state.adversary.lecam.update(torch.tensor(1.0), torch.tensor(-1.0))
    RunFolder(tmp_path).save(1, {}, state.tensors(), keep_last=1)

    other = TrainingState.build(replace(config, seed=1), torch.device("cpu"))
    other.load(RunFolder(tmp_path).load(1).state)
    for name, tensors in state.tensors().items():
        restored = other.tensors()[name]
        assert tensors.keys() == restored.keys()
        assert all(torch.equal(tensor, restored[key]) for key, tensor in tensors.items())


def test_changed_settings_are_found_at_any_depth() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert changed_settings(before, before) == []
    assert changed_settings(before, {"a": {"b": 2, "c": [1, 2]}, "e": 1}) == [
        "a.b (was 1, now 2)",
        "e (was None, now 1)",
    ]
