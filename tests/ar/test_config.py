"""Every shipped configuration composes, and wrong values are named."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from ar.config import (
    CONF_DIR,
    ModelConfig,
    SampleConfig,
    SamplingConfig,
    TrainConfig,
    resolve_model,
    validated,
)


def train_config(*overrides: str) -> TrainConfig:
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return validated(compose("train", list(overrides)), TrainConfig)


def sample_config(*overrides: str) -> SampleConfig:
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return validated(compose("sample", list(overrides)), SampleConfig)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (Path(CONF_DIR) / group).glob("*.yaml"))


@pytest.mark.parametrize("name", options("model"))
def test_every_model_composes_under_its_name(name: str) -> None:
    config = train_config(f"+model={name}")
    assert config.model.name == name
    assert config.out == f"outputs/ar/{name}"
    assert config.global_batch % config.micro_batch == 0


def test_recipes_of_the_paper() -> None:
    for name, lr, epochs in (("b", 3e-4, 300), ("l", 3e-4, 300), ("xl", 2.4e-4, 350)):
        config = train_config(f"+model={name}")
        assert (config.optim.lr, config.epochs, config.global_batch) == (lr, epochs, 768)
        assert config.optim.warmup_fraction * epochs == pytest.approx({300: 6, 350: 7}[epochs])


def test_the_default_model_is_b_and_the_command_line_wins() -> None:
    assert train_config() == train_config("+model=b")
    assert train_config("+model=xl", "optim.lr=1e-3", "micro_batch=2").optim.lr == 1e-3


@pytest.mark.parametrize(
    ("name", "scale", "temperature"),
    [
        ("b", [1.9, 2.0], [1.0, 1.0]),
        ("l", [1.9, 1.9], [1.1, 1.0]),
        ("xl", [1.75, 1.85], [1.1, 1.0]),
    ],
)
def test_sampling_settings_of_the_paper(
    name: str, scale: list[float], temperature: list[float]
) -> None:
    config = sample_config(f"+sampling={name}", "ckpt=a", "out=b")
    assert config.sampling == SamplingConfig(scale=scale, temperature=temperature)
    assert options("sampling") == ["b", "l", "xl"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+modle=xl", "modle"),
        ("model.dim=100", "model.dim=100"),
        ("model.grid=[4]", "model.grid"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("class_dropout=1", "class_dropout=1"),
        ("tracking=tensorboard", "tracking=tensorboard"),
        ("precision=fp16", "precision=fp16"),
        ("steps=0", "steps=0"),
        ("keep_last=0", "keep_last=0"),
    ],
)
def test_wrong_values_end_in_one_line_that_names_them(override: str, message: str) -> None:
    with pytest.raises(SystemExit) as error:
        train_config(override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.scale=[1]", "sampling.scale"),
        ("sampling.top_p=[0,1]", "sampling.top_p"),
        ("classes=[1,1]", "classes"),
        ("n_per_class=0", "n_per_class=0"),
    ],
)
def test_wrong_sampling_values_are_named(override: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        sample_config("ckpt=a", "out=b", override)


def test_a_model_takes_its_shape_from_the_data() -> None:
    model = resolve_model(ModelConfig(), 18, (8, 16), 10)
    assert (model.sub_token_bits, model.grid, model.num_classes) == ([6, 12], [8, 16], 10)
    assert resolve_model(ModelConfig(), 14).sub_token_bits == [4, 10]
    assert resolve_model(ModelConfig(sub_token_bits=[9, 9]), 18).sub_token_bits == [9, 9]
    assert resolve_model(ModelConfig(num_classes=1000), 18, (8, 8), 10).num_classes == 1000
    with pytest.raises(ValueError, match=r"sub_token_bits=\[6, 12\].*sum 14"):
        resolve_model(ModelConfig(sub_token_bits=[6, 12]), 14)
    with pytest.raises(ValueError, match=r"model.grid=\[16, 16\]"):
        resolve_model(ModelConfig(grid=[16, 16]), 18, (8, 8))
    with pytest.raises(ValueError, match="model.num_classes=3"):
        resolve_model(ModelConfig(num_classes=3), 18, (8, 8), 10)
