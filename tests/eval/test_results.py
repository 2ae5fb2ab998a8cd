"""Results files: what is kept, what is replaced, what is refused."""

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
