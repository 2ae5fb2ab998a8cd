"""Promises of the repository as a whole."""

import subprocess
from pathlib import Path

import pytest

import ar
import tokenizer

REPOSITORY = Path(__file__).parents[2]


def test_the_packages_are_those_of_this_checkout() -> None:
    """Their names are taken on PyPI; a package of that name in the environment would win."""
    import eval as evaluation

    for package in (tokenizer, ar, evaluation):
        assert package.__file__ is not None
        assert Path(package.__file__).is_relative_to(REPOSITORY / "packages")


def test_make_lists_every_target() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = [line.split(":")[1].strip() for line in makefile.splitlines() if ".PHONY" in line]
    assert len(targets) >= 10
    assert all(f"\n{target} " in f"\n{listed}" for target in targets)


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("tokenize", "tokenizer.encode ckpt=outputs/tokenizer/imagenet data=imagenet"),
        ("train-tokenizer", "tokenizer.train recipe=imagenet_256 data=imagenet"),
        ("train-ar", "ar.train +model=b data.shards=outputs/tokens/imagenet/train"),
        ("sample", "ar.sample +sampling=b ckpt=outputs/ar/b out=outputs/samples/b/tokens"),
        ("eval", "eval.rfid ckpt=outputs/tokenizer/imagenet data=imagenet"),
        ("report", "eval.report run=outputs/eval/imagenet"),
    ],
)
def test_a_target_runs_the_plain_command_it_prints(target: str, command: str) -> None:
    printed = subprocess.run(
        ["make", "--dry-run", target], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert command in printed
