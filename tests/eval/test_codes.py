"""Codebook use: counts against brute force, merging, and the command over index shards."""

import io
import json
import math
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import eval.codes
from eval.codebook import CodebookCounts, load_counts, save_counts


def write_index_shards(folder: Path, blocks: list[np.ndarray], bits: int) -> None:
    """Write index shards [n, views, h, w] of one tar as docs/artifacts.md says."""
    folder.mkdir()
    path = folder / "shard-000000.tar"
    entries = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, block in enumerate(blocks):
            stream = io.BytesIO()
            np.save(stream, block.astype(np.uint32))
            info = tarfile.TarInfo(f"{number:08d}.indices.npy")
            info.size = stream.tell()
            offset = tar.offset + tarfile.BLOCKSIZE
            stream.seek(0)
            tar.addfile(info, stream)
            entries.append(
                {
                    "name": f"{number:08d}",
                    "num_samples": len(block),
                    "offsets": {"indices": offset},
                }
            )
    total = sum(len(block) for block in blocks)
    manifest = {
        "format": "omv2-index-shards",
        "version": 1,
        "tokenizer": {"id": "tokenizer", "digest": "sha256:" + "0" * 64},
        "codebook_bits": bits,
        "grid": list(blocks[0].shape[2:]),
        "views": [{"name": "center"}, {"name": "flip"}],
        "block_size": 256,
        "num_samples": total,
        "class_names": None,
        "source": {"name": "test", "split": "val"},
        "skipped": {"count": 0, "reasons": {}, "examples": []},
        "shards": [
            {
                "file": path.name,
                "sha256": "sha256:" + "0" * 64,
                "size": path.stat().st_size,
                "num_samples": total,
                "blocks": entries,
            }
        ],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def launch(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "-m", "eval.codes", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def records_of(folder: Path) -> dict[str, dict]:
    (path,) = folder.glob("codes-*.json")
    return {record["metric"]: record for record in json.loads(path.read_text())["records"]}


@pytest.mark.parametrize("bits", [1, 3, 10])
def test_codebook_use_equals_brute_force(bits: int) -> None:
    tokens = np.random.default_rng(bits).geometric(0.2, 500) % 2**bits
    counts = CodebookCounts(bits)
    counts.update(tokens.reshape(5, 4, 25).astype(np.uint32))
    use = counts.compute()
    table = Counter(tokens.tolist())
    entropy = -sum(n / 500 * math.log(n / 500) for n in table.values())
    assert (use.tokens, use.used, use.dead) == (500, len(table), 2**bits - len(table))
    assert use.usage == len(table) / 2**bits
    assert use.perplexity == pytest.approx(math.exp(entropy), rel=1e-12)
    assert use.entropy_bits == pytest.approx(entropy / math.log(2), rel=1e-12)
    for k in range(bits):
        ones = sum(n for token, n in table.items() if token >> k & 1)
        assert use.bit_ones[k] == ones / 500


def test_even_use_has_the_perplexity_of_the_codebook() -> None:
    counts = CodebookCounts(12)
    counts.update(torch.arange(4096).repeat(3))
    use = counts.compute()
    assert use.perplexity == pytest.approx(4096, rel=1e-12)
    assert use.entropy_bits == pytest.approx(12, rel=1e-12)
    assert (use.usage, use.dead, set(use.bit_ones)) == (1.0, 0, {0.5})


def test_one_code_has_perplexity_one() -> None:
    counts = CodebookCounts(18)
    counts.update(torch.full((2, 16, 16), 2**18 - 1))
    use = counts.compute()
    assert (use.perplexity, use.entropy_bits, use.used, use.tokens) == (1.0, 0.0, 1, 512)
    assert use.bit_ones == (1.0,) * 18


def test_merged_counts_equal_counts_of_everything() -> None:
    tokens = torch.randint(0, 64, (1000,), generator=torch.Generator().manual_seed(0))
    whole, first, second = (CodebookCounts(6) for _ in range(3))
    whole.update(tokens)
    first.update(tokens[:123])
    second.update(tokens[123:].to(torch.int32))
    first.merge(second)
    assert torch.equal(first.counts, whole.counts)


def test_wrong_indices_and_sizes_are_refused() -> None:
    counts = CodebookCounts(4)
    with pytest.raises(ValueError, match="token index 16: codebook_bits=4 allows 0 to 15"):
        counts.update(torch.tensor([3, 16]))
    with pytest.raises(ValueError, match="token index -1"):
        counts.update(torch.tensor([-1]))
    with pytest.raises(ValueError, match="no tokens"):
        counts.compute()
    with pytest.raises(ValueError, match="4 and 5"):
        counts.merge(CodebookCounts(5))
    with pytest.raises(ValueError, match="codebook_bits=0"):
        CodebookCounts(0)


def test_counts_round_trip_through_a_file(tmp_path: Path) -> None:
    counts = CodebookCounts(5)
    counts.update(torch.arange(20))
    save_counts(tmp_path / "codes.safetensors", counts, "some/folder")
    name, loaded = load_counts(tmp_path / "codes.safetensors")
    assert name == "some/folder"
    assert loaded.bits == 5 and torch.equal(loaded.counts, counts.counts)
    (tmp_path / "other.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="other.safetensors: not a safetensors file"):
        load_counts(tmp_path / "other.safetensors")


def test_command_gives_the_same_numbers_on_one_and_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    blocks = [generator.integers(0, 200, (n, 2, 4, 4)) for n in (256, 256, 37)]
    write_index_shards(tmp_path / "tokens", blocks, bits=8)
    eval.codes.main(OmegaConf.create({"tokens": f"{tmp_path}/tokens", "out": f"{tmp_path}/out1"}))
    done = launch(f"tokens={tmp_path}/tokens", f"out={tmp_path}/out2")
    assert done.returncode == 0, done.stderr
    for printed in (capsys.readouterr().out, done.stdout):
        assert printed.count("codebook_perplexity") == 1
    one, two = records_of(tmp_path / "out1"), records_of(tmp_path / "out2")
    assert {name: r["value"] for name, r in one.items()} == {n: r["value"] for n, r in two.items()}
    tokens = np.concatenate([block.ravel() for block in blocks])
    assert one["codebook_tokens"]["value"] == one["codebook_usage"]["count"] == tokens.size
    assert one["codebook_usage"]["value"] == len(np.unique(tokens)) / 256
    assert one["codebook_usage"]["checkpoint"]["id"] == "tokenizer"
    (path,) = (tmp_path / "out2").glob("codes-*.safetensors")
    assert torch.equal(
        load_counts(path)[1].counts, torch.from_numpy(np.bincount(tokens, minlength=256))
    )


def test_command_names_a_missing_folder_and_a_code_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="^error: .*nowhere: no such folder of index shards$"):
        eval.codes.main(OmegaConf.create({"tokens": f"{tmp_path}/nowhere"}))
    write_index_shards(tmp_path / "tokens", [np.full((2, 2, 1, 1), 9)], bits=3)
    with pytest.raises(SystemExit, match="^error: .*token index 9: codebook_bits=3 allows 0 to 7$"):
        eval.codes.main(
            OmegaConf.create({"tokens": f"{tmp_path}/tokens", "out": f"{tmp_path}/out"})
        )
    assert not (tmp_path / "out").exists()
