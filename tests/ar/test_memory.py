"""The memory estimate: exact where it can be, and one line where it does not fit."""

from pathlib import Path

import pytest

from ar.config import ModelConfig, resolve_model
from ar.memory import _cgroup_free, check, training_bytes

XL = resolve_model(
    ModelConfig(name="xl", dim=1536, num_heads=24, num_layers=48, num_intra_layers=4)
)
GIB = 2**30


def test_weights_gradients_and_moments_take_sixteen_bytes_per_parameter() -> None:
    state = 16 * 1_486_679_040
    assert state < training_bytes(XL, 1, ema=False, bf16=False) < 1.2 * state
    one_copy = training_bytes(XL, 1, True, False) - training_bytes(XL, 1, False, False)
    assert one_copy == 4 * 1_486_679_040


def test_xl_does_not_fit_in_24_gib_and_says_what_to_do() -> None:
    with pytest.raises(ValueError) as error:
        check(XL, 8, ema=False, bf16=False, free=23 * GIB)
    message = str(error.value)
    assert "\n" not in message
    for word in ("model=xl", "micro_batch=8", "23.0 GiB are free", "+model", "more memory"):
        assert word in message


def test_what_fits_or_cannot_be_told_passes() -> None:
    check(XL, 8, ema=False, bf16=True, free=80 * GIB)
    check(XL, 8, ema=False, bf16=True, free=None)


def test_a_container_limit_counts_and_its_page_cache_is_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    assert _cgroup_free(tmp_path) == [550]
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_free(tmp_path) == []
    assert _cgroup_free(tmp_path / "absent") == []
