"""eval.rfid from pair shards to results, in one process and in two."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.metric_prc import prc_features_to_metric

import eval.codebook
import eval.reconstruct
import eval.rfid
from eval.config import RFID_METRICS, RfidConfig
from eval.features.inception import InceptionExtractor
from eval.results import read_results

NUM = 5
FAKE_CHILD = """
import os, shutil, sys
out = next(a for a in sys.argv if a.startswith("out="))[5:-1]
world = os.environ.get("WORLD_SIZE", "1")
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(" ".join([os.environ.get("RANK", "0"), world, *sys.argv[1:]]) + "\\n")
if os.environ.get("RANK", "0") == os.environ.get("FAKE_FAILS"):
    sys.exit("error: rank has no data")
if os.environ.get("RANK", "0") == "0":
    shutil.copytree(os.environ["FAKE_PAIRS"], out, dirs_exist_ok=True)
"""
DRIVER = """
import eval.reconstruct
eval.reconstruct.MODULE = "fake_reconstruct"
from eval.rfid import main
main()
"""


@pytest.fixture
def pairs(tmp_path, pictures, degraded, write_media):
    images = pictures(NUM)
    return write_media(tmp_path / "pairs", images, degraded(images))


@pytest.fixture
def fake(tmp_path, pairs, monkeypatch):
    """Make the child of this process and of `launch` a fake; work in `tmp_path`."""
    (tmp_path / "fake_reconstruct.py").write_text(FAKE_CHILD)
    (tmp_path / "driver.py").write_text(DRIVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_PAIRS", str(pairs))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(eval.reconstruct, "MODULE", "fake_reconstruct")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(fake, capfd):
    """Run the command in this process; return what a finished process has."""

    def start(**fields):
        capfd.readouterr()
        code: object = 0
        try:
            eval.rfid.main(OmegaConf.create(fields))
        except SystemExit as stop:
            code = stop.code
        if isinstance(code, str):  # as the interpreter does
            print(code, file=sys.stderr)
            code = 1
        return subprocess.CompletedProcess([], code, *capfd.readouterr())

    return start


@pytest.fixture
def launch(tmp_path, fake):
    """Run the command line in processes of its own; return the finished one."""

    def start(*options, world=1):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        launcher = [sys.executable, *(torchrun if world > 1 else []), str(tmp_path / "driver.py")]
        return subprocess.run([*launcher, *options], capture_output=True, text=True)

    return start


def values(folder):
    return {record["metric"]: record["value"] for record in read_results(folder)}


def test_all_metrics_of_one_and_two_processes_agree_with_reference_packages(
    tmp_path, run, launch, pictures, degraded, inception_file, alexnet_file
):
    fields = {"ckpt": "some/tokenizer", "data": {"name": "digits"}, "batch_size": 2, "splits": 2}
    fields |= {"weights": str(inception_file), "lpips_weights": str(alexnet_file)}
    alone = run(**fields, out="one")
    assert alone.returncode == 0, alone.stderr
    options = [f"{name}={value}" for name, value in fields.items() if name != "data"]
    shared = launch(*options, "data=digits", "out=two", world=2)
    assert shared.returncode == 0, shared.stderr
    one, two = values(tmp_path / "one"), values(tmp_path / "two")
    assert list(one) == list(RFID_METRICS)
    for metric, value in one.items():
        assert two[metric] == pytest.approx(value, rel=1e-12, abs=1e-12), metric
    # The pairs were consumed, and each process had a child that knew its rank.
    (path,) = (tmp_path / "two").iterdir()
    log = sorted((tmp_path / "log").read_text().splitlines())
    assert [line[:4] for line in log] == ["0 1 ", "0 2 ", "1 2 "]
    assert all("data=digits" in line and "ckpt='some/tokenizer'" in line for line in log)
    command = json.loads(path.read_text())["records"][0]["command"]  # the results are plain JSON
    assert command.startswith("python -m eval.rfid ckpt=some/tokenizer ")
    check_against_packages(one, pictures(NUM), degraded(pictures(NUM)), inception_file)


def check_against_packages(found, original, reconstruction, inception_file):
    pairs = list(zip(original, reconstruction, strict=True))
    assert found["psnr"] == pytest.approx(
        np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs]), abs=1e-9
    )
    uniform = [structural_similarity(a, b, data_range=255, channel_axis=2) for a, b in pairs]
    assert found["ssim_uniform7"] == pytest.approx(np.mean(uniform), abs=1e-5)
    extractor = InceptionExtractor(str(inception_file), Accelerator(cpu=True))
    real, generated = (
        extractor(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).pool3.double()
        for images in (original, reconstruction)
    )
    assert found["rfid"] > 1e-3
    assert found["rfid"] == pytest.approx(exact_frechet(real, generated), rel=1e-4)
    expected = prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=9, save_cpu_ram=False, verbose=False
    )
    assert found["precision"] == pytest.approx(expected["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(expected["recall"], abs=1e-6)
    codes = np.random.default_rng(5).integers(0, 2**10, (NUM, 1, 4, 4), dtype=np.uint32)
    _, counts = np.unique(codes, return_counts=True)
    share = counts / counts.sum()
    assert found["codebook_usage"] == len(counts) / 2**10
    assert found["codebook_perplexity"] == pytest.approx(math.exp(-(share * np.log(share)).sum()))


def exact_frechet(x, y):
    """The distance of two sets of the same size through the singular values of their product."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    spread = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return float((mean_x - mean_y).square().sum() + spread / (len(x) - 1))


def test_without_weights_the_other_metrics_are_measured(tmp_path, run, pairs):
    done = run(pairs=str(pairs), out="run")
    assert done.returncode == 0, done.stderr
    records = {record["metric"]: record for record in read_results(tmp_path / "run")}
    missing = {name for name, record in records.items() if record["status"] == "unavailable"}
    assert missing == {"lpips_alex", "rfid", "inception_score", "precision", "recall"}
    for name in missing:
        assert records[name]["value"] is None and "PATH" in records[name]["reason"]
        assert "weights" not in records[name]["protocol"]
    assert records["psnr"]["value"] > 20 and records["psnr"]["count"] == NUM
    assert records["psnr"]["unit"] == "dB"
    assert records["psnr"]["data"] == "reconstructions of toy val 32x32"
    assert records["psnr"]["reference"] == "originals of toy val 32x32"
    assert records["psnr"]["checkpoint"]["id"] == "outputs/tokenizer/toy"
    assert (pairs / "manifest.json").exists()  # given pairs are never deleted


def test_a_missing_metric_that_was_asked_for_by_name_fails_after_writing(tmp_path, run, pairs):
    done = run(pairs=str(pairs), metrics=["psnr", "rfid"], out="run")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: metrics=['rfid']")
    assert set(values(tmp_path / "run")) == {"psnr", "rfid"}


def test_few_samples_and_custom_weights_are_said(tmp_path, run, pairs, inception_file):
    done = run(pairs=str(pairs), metrics=["rfid"], weights=str(inception_file), out="run")
    assert done.returncode == 0, done.stderr
    (record,) = read_results(tmp_path / "run")
    assert record["protocol"]["name"] == "ours (custom weights)"
    assert (
        record["protocol"]["rank"] == NUM - 1
        and record["protocol"]["frechet"] == "pivoted cholesky"
    )
    assert f"note: {NUM} samples for 2048 features" in done.stdout


def test_kept_reconstructions_stay_and_serve_the_next_run(tmp_path, run):
    options = {"ckpt": "tok", "metrics": ["psnr"], "keep": True, "out": "run"}
    assert run(**options).returncode == 0
    (folder,) = (tmp_path / "run").glob("pairs-*")
    assert run(**options).returncode == 0
    assert (folder / "manifest.json").exists()
    assert len(read_results(tmp_path / "run")) == 1


def test_a_failing_child_of_any_rank_ends_all_with_its_message_once(tmp_path, launch, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "1")
    done = launch("ckpt=tok", "metrics=[psnr]", "out=run", world=2)
    assert done.returncode != 0
    assert done.stderr.count("error: rank has no data") == 1
    assert not list((tmp_path / "run").glob("*.json"))


def test_pairs_that_do_not_match_are_named(tmp_path, run, pictures, degraded, write_media):
    images = pictures(4)
    folder = write_media(tmp_path / "bad", images, degraded(images)[:, :16])
    done = run(pairs=str(folder), metrics=["psnr"])
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert line.startswith("error: pairs do not match: 'c0/00000000' is 32x32") and "16x32" in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give exactly one of them"),
        ({"pairs": "a", "metrics": ["psnrr"]}, "'psnrr' is not one of psnr, ssim"),
        ({"pairs": "a", "metrics": []}, "name at least one"),
        ({"pairs": "a", "batch_size": 0}, "batch_size=0; it must be at least 1"),
    ],
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        RfidConfig(**fields)


def test_wrong_options_end_in_one_line(run, launch):
    for done, message in [
        (launch("pairs=a", "+batchsize=3"), "Key 'batchsize' not in 'RfidConfig'"),
        (run(ckpt="a", pairs="b"), "give exactly one of them"),
        (run(pairs="nowhere"), "nowhere: no such file or folder"),
    ]:
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ") and message in line


def test_missing_weights_are_named_before_anything_is_reconstructed(tmp_path, run):
    done = run(ckpt="tok", metrics=["psnr"], weights="nowhere.pth", out="run")
    assert done.returncode == 1 and "error: weights=nowhere.pth: no such file" in done.stderr
    assert not (tmp_path / "log").exists()


def test_reconstructions_stay_where_a_metric_asked_for_is_still_missing(tmp_path, run):
    options = {"ckpt": "tok", "metrics": ["psnr", "rfid"], "out": "run"}
    done = run(**options)
    assert done.returncode == 1 and "kept for the next run: run/pairs-" in done.stdout
    (folder,) = (tmp_path / "run").glob("pairs-*")
    assert (folder / "manifest.json").exists()
    assert run(**options | {"metrics": ["psnr"]}).returncode == 0
    assert not folder.exists()


def test_what_was_left_out_and_which_folder_was_read_is_in_the_records(tmp_path, run, pairs):
    manifest = json.loads((pairs / "manifest.json").read_text())
    manifest["skipped"] = {"count": 2, "reasons": {"truncated": 2}, "examples": ["a.png", "b.png"]}
    manifest["source"]["digest"] = "sha256:0123456789"
    (pairs / "manifest.json").write_text(json.dumps(manifest))
    assert run(pairs=str(pairs), metrics=["psnr", "rfid"], out="run").returncode == 1
    for record in read_results(tmp_path / "run"):
        assert record["protocol"]["skipped"]["reasons"] == {"truncated": 2}
        assert record["data"] == "reconstructions of toy val 32x32 01234567"


def test_codebook_use_is_recorded_as_by_eval_codes(tmp_path, run, pairs):
    assert run(pairs=str(pairs), metrics=["codebook_usage"], out="run").returncode == 0
    (record,) = read_results(tmp_path / "run")
    assert record["unit"] == eval.codebook.UNITS["codebook_usage"]
    tokens = {"codebook_bits": 10, "tokens": NUM * 16}
    assert record["protocol"] == eval.codebook.PROTOCOL | tokens


def test_pictures_too_small_for_a_window_make_it_unavailable(
    tmp_path, run, pictures, degraded, write_media
):
    images = pictures(4, 8)
    folder = write_media(tmp_path / "small", images, degraded(images))
    assert run(pairs=str(folder), out="run").returncode == 0
    records = {record["metric"]: record for record in read_results(tmp_path / "run")}
    assert records["ssim"]["reason"] == "pictures of 8x8; at least 11 pixels are needed"
    assert records["ssim_uniform7"]["status"] == "ok"
    assert "31 pixels" in records["lpips_alex"]["reason"]
