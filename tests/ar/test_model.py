"""The model against the paper's counts, the original's outputs and brute force."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from ar.checkpoint import read_card
from ar.config import CONF_DIR, ModelConfig, TrainConfig, resolve_model, validated
from ar.memory import count_parameters
from ar.model import AR, IntraBlock, rotary_table, rotate


def preset(name: str) -> ModelConfig:
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return validated(compose("train", [f"+model={name}"]), TrainConfig).model


@pytest.mark.parametrize(
    ("name", "count"), [("b", 343_570_432), ("l", 804_362_240), ("xl", 1_486_679_040)]
)
def test_presets_have_the_parameter_counts_of_the_paper(name: str, count: int) -> None:
    assert count_parameters(resolve_model(preset(name))) == count


def test_the_tiny_preset_is_tiny() -> None:
    assert 1.5e6 < count_parameters(resolve_model(preset("tiny"), num_classes=10)) < 3e6


def test_parameters_have_the_names_of_the_published_weights() -> None:
    with torch.device("meta"):
        model = AR(resolve_model(ModelConfig()))
    block = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3"]
    block += ["feed_forward.w2", "attention_norm", "ffn_norm"]
    expected = {"pre_emb", "post_emb", "class_emb.embedding_table", "norm", "head.0", "head.1"}
    expected |= {f"spatial_blocks.{i}.{name}" for i in range(24) for name in block}
    expected |= {f"factorized_blocks.{i}.{name}" for i in range(2) for name in block}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert set(shapes) == {f"{name}.weight" for name in expected}
    assert shapes["class_emb.embedding_table.weight"] == (1001, 1024)
    assert shapes["spatial_blocks.3.attention.wqkv.weight"] == (3072, 1024)
    assert shapes["factorized_blocks.1.feed_forward.w2.weight"] == (1024, 2816)
    assert shapes["head.1.weight"] == (4096, 1024)


@pytest.mark.slow
def test_size_b_equals_the_original_model_on_seeded_weights() -> None:
    """Outputs of the original code for weights and tokens drawn from seeds, in fp32 on a CPU."""
    with torch.device("meta"):
        model = AR(resolve_model(ModelConfig()))
    model.rotary = rotary_table(16, 16, 64)
    for name, parameter in model.named_parameters():
        seed = zlib.crc32(f"transformer.{name}".encode())
        value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        value = value / math.sqrt(value[0].numel()) if value.ndim > 1 else 1 + 0.1 * value
        model.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(value)
    generator = torch.Generator().manual_seed(1234)
    pre = torch.randint(0, 64, (1, 256), generator=generator)
    post = torch.randint(0, 4096, (1, 256), generator=generator)
    tokens = model.join(pre, post)
    with torch.inference_mode():
        logits = model.eval()(tokens, torch.tensor([207]))
        unconditional = model(tokens, torch.tensor([-1]))

    def close(actual: torch.Tensor, expected: list[float]) -> None:
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-4)

    close(model.loss(logits, tokens), [4.653933048248291, 8.855559349060059])
    close(logits.pre[0, 0, :4], [-0.41908580, -1.72509859, 1.00920212, -0.45528799])
    close(logits.pre[0, 1, :4], [-0.37093332, -1.03111279, 0.81789976, -0.20391563])
    close(logits.pre[0, 255, :4], [1.10933113, 0.43918318, 0.94794583, -1.10268784])
    close(logits.post[0, 0, :4], [0.35565072, 1.20984697, -0.25184393, -0.61443055])
    close(logits.post[0, 255, :4], [0.34714314, -1.17682505, 0.49962151, 0.00242203])
    close(logits.pre.std(), 0.90360266)  # type: ignore[arg-type]
    close(logits.post.std(), 1.00193548)  # type: ignore[arg-type]
    close(unconditional.pre[0, 0, :4], [1.22922778, 0.51281494, 1.00774384, 0.02862869])


def test_rotary_table_turns_halves_of_a_head_by_row_and_column() -> None:
    table = rotary_table(3, 5, 16)
    assert table.shape == (15, 2, 8)
    assert (table[0] == 0).all()
    for position in range(1, 15):
        row, column = divmod(position - 1, 5)
        for pair in range(8):
            cell = row if pair < 4 else column
            angle = cell * 10000 ** (-2 * (pair % 4) / 8)
            assert table[position, 0, pair] == pytest.approx(math.cos(angle), abs=1e-6)
            assert table[position, 1, pair] == pytest.approx(math.sin(angle), abs=1e-6)


def test_rotation_is_a_complex_product_of_pairs() -> None:
    table = rotary_table(2, 3, 8)
    x = torch.randn(4, 6, 2, 8)  # [B, L, H, E]
    factor = torch.view_as_complex(table.transpose(1, 2).contiguous())  # [L, E/2]
    expected = torch.view_as_complex(x.unflatten(-1, (4, 2))) * factor[:, None]
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(expected).flatten(-2))


def test_the_intra_block_equals_attention_over_two_slots() -> None:
    torch.manual_seed(0)
    config = ModelConfig(dim=32, num_heads=2, resid_dropout=0, ffn_dropout=0)
    block = IntraBlock(config)
    slots = torch.randn(5, 2, 32, requires_grad=True)
    rotary = rotary_table(4, 4, config.head_dim)[:2]

    qkv = block.attention.project(block.attention_norm(slots))  # [N, 2, 3, H, E]
    q, k = rotate(qkv[:, :, :2], rotary[:, None]).unbind(2)
    q, k, v = (part.transpose(1, 2) for part in (q, k, qkv[:, :, 2]))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    expected = block.finish(slots, mixed)
    actual = torch.stack(block(slots[:, 0], slots[:, 1]), dim=1)
    torch.testing.assert_close(actual, expected)
    parameters = [slots, *block.parameters()]
    expected_gradients = torch.autograd.grad(expected.square().sum(), parameters)
    actual_gradients = torch.autograd.grad(actual.square().sum(), parameters)
    for actual_gradient, expected_gradient in zip(
        actual_gradients, expected_gradients, strict=True
    ):
        torch.testing.assert_close(actual_gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("grid", "bits"), [([4, 4], [2, 4]), ([2, 5], [3, 1])])
def test_scores_depend_on_earlier_tokens_only(
    make_model: Callable[..., AR], grid: list[int], bits: list[int]
) -> None:
    model = make_model(grid=grid, sub_token_bits=bits)
    tokens = torch.randint(0, 2 ** sum(bits), (1, math.prod(grid)))
    labels = torch.tensor([1])
    with torch.no_grad():
        before = model(tokens, labels)
        changed = tokens.clone()
        changed[0, 5] ^= 1 << bits[0]  # the post sub-token of position 5
        after = model(changed, labels)
        assert torch.equal(before.pre[:, :6], after.pre[:, :6])
        assert torch.equal(before.post[:, :6], after.post[:, :6])
        assert not torch.allclose(before.pre[:, 6:], after.pre[:, 6:])
        changed = tokens.clone()
        changed[0, 5] ^= 1  # its pre sub-token, which post 5 sees
        after = model(changed, labels)
        assert torch.equal(before.pre[:, :6], after.pre[:, :6])
        assert torch.equal(before.post[:, :5], after.post[:, :5])
        assert not torch.allclose(before.post[:, 5], after.post[:, 5])


def test_a_new_model_is_undecided() -> None:
    torch.manual_seed(0)
    options = {"dim": 32, "num_heads": 2, "num_layers": 1, "num_intra_layers": 1}
    model = AR(resolve_model(ModelConfig(**options), grid=(2, 2), num_classes=3))  # type: ignore[arg-type]
    tokens = torch.randint(0, 2**18, (3, 4))
    losses = model.loss(model(tokens, torch.tensor([0, 2, -1])), tokens)
    torch.testing.assert_close(losses, torch.tensor([math.log(64), math.log(4096)]))


def test_label_minus_one_is_the_row_after_the_classes(make_model: Callable[..., AR]) -> None:
    model = make_model(num_classes=3)
    rows = model.class_emb(torch.tensor([-1, 2]))
    assert torch.equal(rows, model.class_emb.embedding_table.weight[[3, 2]])


def test_indices_split_into_low_and_high_bits(make_model: Callable[..., AR]) -> None:
    model = make_model(sub_token_bits=[6, 12])
    tokens = torch.tensor([0, 63, 64, 2**18 - 1, 6 + 64 * 1000])
    pre, post = model.split(tokens)
    assert pre.tolist() == [0, 63, 0, 63, 6]
    assert post.tolist() == [0, 0, 1, 4095, 1000]
    assert torch.equal(model.join(pre, post), tokens)


def test_saved_models_load_to_the_same_scores(
    make_model: Callable[..., AR], tmp_path: Path
) -> None:
    model = make_model()
    card = {"tokenizer": {}, "codebook_bits": 6, "grid": [4, 4], "class_names": None}
    model.save_pretrained(tmp_path / "model", card, step=7)
    loaded = AR.from_pretrained(tmp_path / "model")
    tokens, labels = torch.randint(0, 64, (2, 16)), torch.tensor([0, -1])
    assert torch.equal(loaded(tokens, labels).post, model(tokens, labels).post)
    assert not loaded.training
    assert read_card(tmp_path / "model")["tokens"] == card


def test_weights_of_another_model_are_refused_by_name(
    make_model: Callable[..., AR], tmp_path: Path
) -> None:
    card = {"tokenizer": {}, "codebook_bits": 6, "grid": [4, 4], "class_names": None}
    make_model().save_pretrained(tmp_path / "a", card, step=0)
    make_model(num_layers=3).save_pretrained(tmp_path / "b", card, step=0)
    (tmp_path / "a" / "config.json").replace(tmp_path / "b" / "config.json")
    with pytest.raises(ValueError, match=r"7 tensors.*spatial_blocks\.2"):
        AR.from_pretrained(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        AR.from_pretrained(tmp_path / "a")


def test_an_unfinished_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="model.sub_token_bits=null"):
        AR(ModelConfig())
