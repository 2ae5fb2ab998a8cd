"""Pixels to tokens to model to pixels to report, by the commands people type, on digits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = [
    "steps=40",
    "validate_every=20",
    "validation_images=16",
    "preview_every=40",
    "checkpoint_every=20",
    "optim.warmup_steps=5",
    "ema_decay=0.9",
    "model.base_channels=16",
    "data.num_workers=0",
]
AR = ["+model=tiny", "steps=30", "model.dim=64", "model.num_layers=2", "val_every_steps=30"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


def run(folder: Path, *command: str) -> str:
    """Run `python -m COMMAND` outside the repository and return what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def records(folder: Path) -> dict[str, dict]:
    found = json.loads((folder / "results.json").read_text())
    return {record["metric"]: record for record in found}


def test_pixels_become_tokens_become_pixels_become_a_report(folder: Path) -> None:
    run(folder, "tokenizer.train", "out=tokenizer", *TOKENIZER)
    for split in ("train", "val"):
        data = ["data=digits", f"data.split={split}", "data.num_workers=0"]
        run(folder, "tokenizer.encode", "ckpt=tokenizer", *data, f"out=tokens/{split}")
        run(folder, "tokenizer.reconstruct", "ckpt=tokenizer", *data, f"out=pairs/{split}")
    shards = ["data.shards=tokens/train", "data.val_shards=tokens/val"]
    run(folder, "ar.train", *AR, *shards, "out=ar")
    run(folder, "ar.sample", "ckpt=ar", "out=samples/tokens", "n_per_class=3")
    decode = ["tokens=samples/tokens", "ckpt=tokenizer"]
    run(folder, "tokenizer.decode", *decode, "out=samples/images")
    measured = ["pairs=pairs/val", "metrics=[psnr,ssim,codebook_usage]"]
    run(folder, "eval.rfid", *measured, "out=eval")
    run(folder, "eval.codes", "tokens=tokens/train", "out=eval")
    pictures = ["samples=samples/images", "train=pairs/train", "holdout=pairs/val"]
    run(folder, "eval.accuracy", *pictures, "out=eval")
    shown = ["pairs=pairs/val", "samples=samples/images", "tokens=tokens/train"]
    run(folder, "eval.report", "run=eval", *shown, "runs=[tokenizer,ar]", "out=report.html")

    found = records(folder)
    # Forty steps are enough to tell a working tokenizer from a broken one (grey: 9 dB).
    assert found["psnr"]["value"] > 13
    assert found["psnr"]["count"] == 360
    assert found["classifier_holdout_accuracy"]["value"] > 0.9
    assert found["class_accuracy"]["count"] == 30
    assert 0 < found["codebook_usage"]["value"] <= 1
    assert "data:image/png;base64" in (folder / "report.html").read_text()


def test_tokens_carry_the_digest_of_their_tokenizer_all_the_way(folder: Path) -> None:
    digests = {
        json.loads((folder / path).read_text())[key]["digest"]
        for path, key in [
            ("tokens/train/manifest.json", "tokenizer"),
            ("samples/tokens/manifest.json", "tokenizer"),
            ("pairs/val/manifest.json", "tokenizer"),
        ]
    }
    assert len(digests) == 1
    assert records(folder)["psnr"]["checkpoint"]["digest"] in digests


def test_one_command_reconstructs_and_measures(folder: Path) -> None:
    options = ["data=digits", "metrics=[psnr,codebook_perplexity]", "out=one"]
    printed = run(folder, "eval.rfid", "ckpt=tokenizer", *options)
    assert "psnr" in printed
    (result,) = (folder / "one").glob("rfid-*.json")
    psnr = next(r for r in json.loads(result.read_text())["records"] if r["metric"] == "psnr")
    assert psnr["value"] == pytest.approx(records(folder)["psnr"]["value"], abs=1e-9)
    assert not list((folder / "one").rglob("*.tar"))  # the pairs are deleted once measured


def test_the_same_commands_again_do_nothing_twice(folder: Path) -> None:
    def state() -> dict[str, tuple[bytes, int]]:
        parts = ("tokenizer", "tokens", "samples", "ar")
        files = [f for part in parts for f in (folder / part).rglob("*") if f.is_file()]
        # What is expensive to make must not be written again; the rest may, as it was.
        large = (".tar", ".safetensors", ".png")
        return {
            str(f): (f.read_bytes(), f.stat().st_mtime_ns if f.suffix in large else 0)
            for f in files
        }

    before = state()
    run(folder, "tokenizer.train", "out=tokenizer", *TOKENIZER)
    run(folder, "tokenizer.encode", "ckpt=tokenizer", "data=digits", "out=tokens/train")
    shards = ["data.shards=tokens/train", "data.val_shards=tokens/val"]
    run(folder, "ar.train", *AR, *shards, "out=ar")
    run(folder, "ar.sample", "ckpt=ar", "out=samples/tokens", "n_per_class=3")
    run(folder, "tokenizer.decode", "tokens=samples/tokens", "ckpt=tokenizer", "out=samples/images")
    assert state() == before


def test_the_python_example_of_the_readme_runs(folder: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    example = readme.split("```python\n")[1].split("```")[0]
    (folder / "outputs" / "demo").mkdir(parents=True)
    (folder / "outputs" / "demo" / "tokenizer").symlink_to(folder / "tokenizer")
    (folder / "example.py").write_text(example + "print(images.dtype, tuple(images.shape))\n")
    printed = subprocess.run(
        [sys.executable, "example.py"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    assert printed == "torch.uint8 (4, 3, 32, 32)\n"
