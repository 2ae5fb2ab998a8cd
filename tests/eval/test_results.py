"""Results files: what is kept, what is replaced, what is refused."""

import dataclasses
import json

import pytest

from eval.results import Record, print_table, read_results, write_results

PROTOCOL = {"name": "ours", "weights": "sha256:1"}


def record(metric="psnr", value=30.0, **fields):
    fields = {"data": "d", "reference": "r", "protocol": PROTOCOL, "count": 5} | fields
    return Record(metric, value, **fields)


def test_records_come_back_with_how_they_were_made(tmp_path):
    path = write_results(tmp_path, "rfid", [record(), record("ssim", 0.5)], 1.5)
    content = json.loads(path.read_text())
    assert (content["format"], content["version"]) == ("omv2-results", 1)
    first, second = read_results(tmp_path)
    assert first["metric"] == "psnr" and second["value"] == 0.5
    assert first["seconds"] == 1.5 and first["command"] == "python -m eval.rfid"
    assert "torch" in first["versions"] and first["protocol"] == PROTOCOL
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_measurement_replaces_its_file_and_others_stay(tmp_path):
    write_results(tmp_path, "rfid", [record(value=1.0)], 1)
    write_results(tmp_path, "rfid", [record(value=2.0, protocol={"name": "ours"})], 1)
    write_results(tmp_path, "rfid", [record(value=3.0, data="other")], 1)
    checkpoint = {"id": "x", "digest": "sha256:2"}
    write_results(tmp_path, "rfid", [record(value=4.0, checkpoint=checkpoint)], 1)
    write_results(tmp_path, "fid", [record(value=5.0)], 1)
    assert sorted(entry["value"] for entry in read_results(tmp_path)) == [2.0, 3.0, 4.0, 5.0]


def test_measuring_one_metric_again_keeps_the_others(tmp_path):
    write_results(tmp_path, "rfid", [record(value=1.0), record("ssim", 0.5)], 1)
    write_results(tmp_path, "rfid", [record("ssim", 0.6)], 1)
    values = {entry["metric"]: entry["value"] for entry in read_results(tmp_path)}
    assert values == {"psnr": 1.0, "ssim": 0.6}


@pytest.mark.parametrize("first", [["psnr"], ["inception_score"]])
def test_any_choice_of_metrics_belongs_to_the_same_file(tmp_path, first):
    """Records of one run differ in protocol and reference; those of a metric decide nothing."""
    custom = {"name": "ours (custom weights)"}
    full = [
        record(value=1.0),
        record("inception_score", 2.0, reference=None, protocol=custom),
        record("rfid", 3.0, protocol=custom),
    ]
    write_results(tmp_path, "rfid", [r for r in full if r.metric in first], 1)
    write_results(tmp_path, "rfid", full, 1)
    write_results(tmp_path, "rfid", [r for r in full if r.metric in first], 1)
    assert len(list(tmp_path.iterdir())) == 1
    assert sorted(entry["value"] for entry in read_results(tmp_path)) == [1.0, 2.0, 3.0]


def test_a_number_outlives_a_run_that_cannot_measure_it(tmp_path):
    missing = record("rfid", None, status="unavailable", reason="no weights")
    write_results(tmp_path, "rfid", [missing], 1)
    write_results(tmp_path, "rfid", [record("rfid", 3.0)], 1)
    write_results(tmp_path, "rfid", [missing, record("psnr")], 1)
    found = {entry["metric"]: entry["value"] for entry in read_results(tmp_path)}
    assert found == {"rfid": 3.0, "psnr": 30.0} and len(read_results(tmp_path)) == 2
    # Other data under the same name: the old number says nothing of them.
    write_results(tmp_path, "rfid", [dataclasses.replace(missing, count=6)], 1)
    found = {entry["metric"]: entry["value"] for entry in read_results(tmp_path)}
    assert found == {"rfid": None, "psnr": 30.0}


def test_references_and_weights_are_measured_side_by_side(tmp_path):
    custom = {"name": "ours (custom weights)"}
    for change in ({}, {"reference": "other"}, {"protocol": custom}):
        write_results(tmp_path, "fid", [record("fid", **change)], 1)
    assert len(read_results(tmp_path)) == 3


def test_what_several_runs_share_is_read_once(tmp_path):
    shared = record("classifier_holdout_accuracy", 0.9, data="holdout")
    for samples in ("a", "b"):
        write_results(tmp_path, "accuracy", [record("class_accuracy", data=samples), shared], 1)
    found = [(entry["metric"], entry["data"]) for entry in read_results(tmp_path)]
    assert len(found) == 3 and found.count((shared.metric, "holdout")) == 1


def test_other_json_files_are_passed_over_and_broken_ones_named(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    (tmp_path / "config.json").write_text('{"format": "omv2-tokenizer", "version": 1}')
    assert read_results(tmp_path) == []
    (tmp_path / "new.json").write_text('{"format": "omv2-results", "version": 9, "records": []}')
    with pytest.raises(ValueError, match=r"new\.json: version 9"):
        read_results(tmp_path)
    (tmp_path / "new.json").write_text("{")
    with pytest.raises(ValueError, match=r"new\.json: not valid JSON"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path / "absent")


@pytest.mark.parametrize(
    "fields",
    [
        {"value": None},
        {"value": float("nan")},
        {"value": float("inf")},
        {"value": 1.0, "status": "unavailable", "reason": "x"},
        {"value": None, "status": "unavailable"},
        {"value": 1.0, "status": "fine"},
    ],
)
def test_a_record_has_either_a_number_or_a_reason(fields):
    with pytest.raises(ValueError, match="psnr"):
        Record("psnr", **fields)


def test_the_table_shows_values_protocols_and_reasons(capsys):
    missing = record("rfid", None, status="unavailable", reason="no weights")
    print_table(
        [record(unit="dB"), missing, record("fid", None, status="unavailable", reason="no weights")]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", "value", "unit", "count", "protocol"]
    assert lines[1].split() == ["psnr", "30", "dB", "5", "ours"]
    assert lines[2].split() == ["rfid", "unavailable", "5", "ours"]
    assert lines[4] == "unavailable: rfid, fid: no weights"
