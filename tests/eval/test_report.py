"""The report page: well formed, self-contained, escaped, and showing what the files say."""

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from eval.codebook import CodebookCounts, save_counts
from eval.config import ReportConfig
from eval.page.charts import MAX_POINTS, Axis, Series, line_chart, linear_ticks
from eval.page.curves import group_charts, read_run
from eval.page.gallery import choose_samples, rank_pairs
from eval.page.markup import element, number
from eval.page.sections import headline, words
from eval.report import write_report
from eval.results import Record, write_results

VOID = {"img", "meta", "br", "link", "input", "hr"}
EVIL = "<script>alert('x')</script>\"&"


class Page(HTMLParser):
    """Check nesting while parsing; collect elements, texts and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def images(self) -> list[tuple[dict[str, str | None], np.ndarray]]:
        found = []
        for attributes in self.all("img"):
            head, _, data = (attributes["src"] or "").partition(",")
            assert head == "data:image/png;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            found.append((attributes, np.asarray(picture)))
        return found


def write_media(folder: Path, kind: str, keys: list[str], names: list[str] | None, **arrays) -> str:
    """Write media shards of one npy block as docs/artifacts.md says."""
    folder.mkdir(parents=True)
    path = folder / "shard-000000.tar"
    offsets = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, value in [*arrays.items(), ("key", keys)]:
            stream = io.BytesIO()
            if name == "key":
                stream.write(json.dumps(value).encode())
            else:
                np.save(stream, value)
            extension = "json" if name == "key" else "npy"
            info = tarfile.TarInfo(f"00000000.{name}.{extension}")
            info.size = stream.tell()
            stream.seek(0)
            offsets[name] = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(info, stream)
    block = {"name": "00000000", "num_samples": len(keys), "offsets": offsets}
    shard = {
        "file": path.name,
        "sha256": "sha256:" + "0" * 64,
        "size": path.stat().st_size,
        "num_samples": len(keys),
        "blocks": [block],
    }
    manifest = {
        "format": "omv2-media-shards",
        "version": 1,
        "kind": kind,
        "encoding": "npy",
        "resolution": [8, 8],
        "tokenizer": {"id": "tokenizer", "digest": "sha256:" + "0" * 64},
        "num_samples": len(keys),
        "class_names": names,
        "source": {"name": "test"},
        "shards": [shard],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


@pytest.fixture
def inputs(tmp_path: Path) -> SimpleNamespace:
    """Write one of everything that a report can show."""
    rng = np.random.default_rng(0)
    original = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    noise = rng.integers(-1, 2, original.shape) * (1 + np.arange(30)[:, None, None, None])
    made = np.clip(original + noise, 0, 255).astype(np.uint8)
    made[7] = original[7]
    keys = [f"{i}/{EVIL}{i}.png" for i in range(30)]
    pairs = write_media(
        tmp_path / "pairs",
        "pairs",
        keys,
        None,
        original=original,
        reconstruction=made,
        indices=np.zeros((30, 1, 2, 2), np.uint32),
        cls=np.full(30, -1, np.int32),
    )
    samples = write_media(
        tmp_path / "samples",
        "images",
        keys,
        [f"name {EVIL}", "1", "owl"],
        images=original,
        cls=np.arange(30, dtype=np.int32) % 3,
    )
    train = tmp_path / "train"
    train.mkdir()
    rows = [{"step": s, "loss": 2.0 / s, "lr": 1e-4, "images_per_s": 9.0} for s in range(1, 1001)]
    rows += [{"step": 1000, "loss": 0.5, "val_psnr": 20.0, "entropy": -0.5}]
    lines = [json.dumps(row) for row in rows]
    (train / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 1001, "lo']))
    (train / "config.yaml").write_text(f"note: {EVIL}\n")
    counts = CodebookCounts(4)
    counts.update(torch.tensor([1, 1, 2, 15]))
    run = tmp_path / "run"
    records = [
        Record(
            "psnr",
            31.25,
            unit="dB",
            count=1234,
            protocol={"name": EVIL, "window": 11},
            data=EVIL,
            reference="originals",
            checkpoint={"id": "model", "digest": "sha256:" + "ab" * 32},
        ),
        Record("rfid", None, status="unavailable", reason=f"no weights {EVIL}"),
        Record("class_accuracy", 0.5, unit="fraction", protocol={"per_class": {EVIL: 0.25}}),
    ]
    write_results(run, "rfid", records, 1.0)
    save_counts(run / "codes-1.safetensors", counts, f"tokens {EVIL}")
    return SimpleNamespace(
        run=run, pairs=pairs, samples=samples, train=str(train), original=original, made=made
    )


def full_report(inputs: SimpleNamespace) -> tuple[str, Page]:
    config = ReportConfig(
        run=str(inputs.run), pairs=inputs.pairs, samples=inputs.samples, runs=[inputs.train]
    )
    path, _ = write_report(config)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_is_well_formed_and_loads_nothing(inputs: SimpleNamespace) -> None:
    text, page = full_report(inputs)
    assert page.tags[0] == ("html", {"lang": "en"})
    assert not page.all("link") and not page.all("iframe")
    for _, attributes in page.tags:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    assert len(page.all("script")) == 1 and "src" not in page.all("script")[0]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    anchors = {attributes["href"] for attributes in page.all("a")}
    assert anchors == {"#" + attributes["id"] for attributes in page.all("h2")}
    assert len(anchors) == 6


def test_nothing_from_files_becomes_markup(inputs: SimpleNamespace) -> None:
    text, page = full_report(inputs)
    assert "<script>alert" not in text
    assert page.text.count("<script>alert") >= 8  # shown as text in every section


def test_pictures_decode_to_the_pixels_of_the_files(inputs: SimpleNamespace) -> None:
    _, page = full_report(inputs)
    found = page.images()
    assert all(attributes["alt"] for attributes, _ in found)
    # Eight pairs each for first, worst and best; eight samples of each of three classes.
    assert len(found) == 3 * 8 * 2 + 3 * 8
    for i in range(8):
        np.testing.assert_array_equal(found[2 * i][1], inputs.original[i])
        np.testing.assert_array_equal(found[2 * i + 1][1], inputs.made[i])
    for i in range(8):
        np.testing.assert_array_equal(found[48 + i][1], inputs.original[3 * i])
    attributes = found[0][0]
    assert attributes["class"] == "crisp"
    assert attributes["width"] == attributes["height"] == "96"


def test_pairs_are_ranked_as_the_reference_psnr_ranks_them(inputs: SimpleNamespace) -> None:
    with np.errstate(divide="ignore"):
        truth = [
            peak_signal_noise_ratio(a, b, data_range=255)
            for a, b in zip(inputs.original, inputs.made, strict=True)
        ]
    for batch_size in (4, 30):
        pairs = rank_pairs(inputs.pairs, 3, batch_size)
        order = np.argsort(truth)
        assert [int(p.key.split("/")[0]) for p in pairs.worst] == order[:3].tolist()
        assert [int(p.key.split("/")[0]) for p in pairs.best] == order[::-1][:3].tolist()
        assert [int(p.key.split("/")[0]) for p in pairs.first] == [0, 1, 2]
        assert pairs.best[0].psnr == math.inf
        assert pairs.worst[0].psnr == pytest.approx(min(truth), abs=1e-9)


def test_many_classes_are_thinned_evenly(inputs: SimpleNamespace) -> None:
    samples = choose_samples(inputs.samples, columns=2, max_classes=2)
    assert list(samples.classes) == [f"name {EVIL} (class 0)", "class 1"]
    assert [len(pictures) for pictures in samples.classes.values()] == [2, 2]
    assert (samples.count, samples.num_classes) == (30, 3)


def test_table_shows_values_reasons_and_checkpoints(inputs: SimpleNamespace) -> None:
    _, page = full_report(inputs)
    cells = [a for tag, a in page.tags if tag in ("td", "th") and "data-sort" in a]
    labels = ["Metric", "Value", "Unit", "Samples", "Protocol", "Measured", "Checkpoint"]
    assert [a["data-label"] for a in cells] == labels * 3
    assert [a["data-sort"] for a in cells[:4]] == ["psnr", "31.25", "dB", "1234"]
    assert cells[8]["data-sort"] == ""  # an unavailable value sorts last
    for shown in ("31.250", "1,234", "sha256:abababab", "against originals", "50%", "31.25 dB"):
        assert shown in page.text
    assert f"no weights {EVIL}" in page.text
    assert "Copy" in page.text and "python -m eval.rfid" in page.text


def test_a_large_figure_says_when_it_is_one_of_several() -> None:
    base = {"metric": "psnr", "unit": "dB", "data": "digits <val>"}
    records = [base | {"value": value} for value in (30.0, None, 20.0)]
    markup = headline(records)
    assert markup is not None and "30 dB" in markup and "20 dB" not in markup
    assert "higher is better; first of 2 results" in markup
    assert 'title="digits &lt;val&gt;"' in markup
    assert "first of" not in (headline(records[:2]) or "")


def test_facts_are_words() -> None:
    assert words(["center", 2]) == "center, 2"
    assert words({"count": 2, "reasons": {"cut": 2}, "examples": []}) == "count: 2, reasons: cut: 2"


def test_results_json_is_a_flat_list_of_all_records(inputs: SimpleNamespace) -> None:
    config = ReportConfig(run=str(inputs.run))
    for _ in range(2):  # the page and the list of the first time are not taken for results
        path, records = write_report(config)
        flat = json.loads((path.parent / "results.json").read_text())
        assert flat == records
        assert [(r["metric"], r["value"]) for r in flat] == [
            ("psnr", 31.25),
            ("rfid", None),
            ("class_accuracy", 0.5),
        ]
    assert not list(inputs.run.glob("*.tmp"))


def test_sections_without_input_are_left_out(inputs: SimpleNamespace, tmp_path: Path) -> None:
    (inputs.run / "codes-1.safetensors").unlink()
    path, _ = write_report(ReportConfig(run=str(inputs.run), out=str(tmp_path / "new" / "a.html")))
    page = Page(path.read_text())
    assert [a["id"] for a in page.all("h2")] == ["results", "commands"]
    assert not page.all("img") and not page.all("svg")
    assert (tmp_path / "new" / "results.json").exists()


def test_codebook_section_counts_index_shards(inputs: SimpleNamespace) -> None:
    _, page = full_report(inputs)
    assert "3 of 16 codes seen (18.75%) in 4 tokens" in page.text
    bars = [a for a in page.all("rect") if a.get("class") == "bar"]
    assert len(bars) == 4


def test_log_keeps_the_last_value_of_a_step_and_skips_a_cut_line(inputs: SimpleNamespace) -> None:
    run = read_run(inputs.train)
    assert list(run.points) == ["loss", "val_psnr", "entropy"]
    assert len(run.points["loss"]) == 1000
    assert run.points["loss"][-1] == (1000, 0.5)
    assert group_charts(run) == {
        "Losses": {"loss": ["loss"], "entropy": ["entropy"]},
        "Quality": {"psnr": ["val_psnr"]},
    }


def test_validation_shares_the_chart_of_its_training_loss(tmp_path: Path) -> None:
    row = {"step": 1, "loss": 3, "loss_pre": 1, "loss_post": 2, "val_loss_pre": 1, "grad": 5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    charts = group_charts(read_run(str(tmp_path)))["Losses"]
    assert charts == {"loss": ["loss", "loss_pre", "loss_post", "val_loss_pre"], "grad": ["grad"]}


def test_line_passes_through_its_points() -> None:
    svg = line_chart([Series("a", [0, 10, 20], [0.0, 1.0, 0.5])], "step", "a")
    (path,) = re.findall(r'<path d="(M[^"]*)"', svg)
    x, y = zip(*[map(float, point.split()) for point in re.split("[ML]", path)[1:]], strict=True)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] - y[2] == pytest.approx((y[0] - y[1]) / 2, abs=0.2)  # up is larger
    assert "log scale" not in svg


def test_wide_positive_data_get_a_log_axis_and_gaps_stay_gaps() -> None:
    svg = line_chart([Series("a", [1, 2, 3, 4], [1.0, 1e4, math.nan, 10.0])], "step", "a")
    assert "log scale" in svg
    (path,) = re.findall(r'<path d="(M[^"]*L[^"]*)"', svg)
    assert path.count("M") == 2 and path.count("L") == 1
    assert "nan" not in svg
    negative = line_chart([Series("a", [1, 2], [-1.0, 1e4])], "step", "a")
    assert "log scale" not in negative


def test_charts_of_odd_data_are_drawn() -> None:
    assert "No finite values" in line_chart([Series("a", [1, 2], [math.nan, math.inf])], "x", "y")
    for y in ([5.0], [0.0, 0.0], [-3.0, -3.0], [1e-12, 1e-12]):
        svg = line_chart([Series("a", list(range(len(y))), y)], "x", "y")
        Page(svg)
        assert "nan" not in svg and "inf" not in svg
    long = line_chart([Series("a", range(100_000), [0.5] * 100_000)], "x", "y")
    assert 100 <= long.count("<circle") <= MAX_POINTS


def test_ticks_are_round_and_cover_the_range() -> None:
    assert linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert linear_ticks(-3, 17) == [0, 5, 10, 15]
    assert Axis([1.0, 1e4], 0, 100, log=True).ticks() == [1, 10, 100, 1000, 10000]
    for low, high in ((0.013, 0.019), (-5e-7, 3e-7), (1234, 98765)):
        ticks = linear_ticks(low, high)
        assert 3 <= len(ticks) <= 8 and low <= ticks[0] and ticks[-1] <= high


def test_numbers_and_elements_read_well() -> None:
    assert [number(v) for v in (0.0, 12, 1234567.0, 0.98141, 37.5791, -0.79268)] == [
        "0",
        "12",
        "1,234,567",
        "0.9814",
        "37.58",
        "-0.7927",
    ]
    assert number(1.5e-7) == "1.500e-07" and number(math.nan) == "nan"
    assert element("p", "a<b", None, ["c", element("br")], class_='"') == (
        '<p class="&quot;">a&lt;bc<br></p>'
    )


def run_command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eval.report", *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def test_command_prints_the_page_and_the_table(inputs: SimpleNamespace) -> None:
    done = run_command(f"run={inputs.run}", f"runs=[{inputs.train}]", "title=My digits")
    assert done.returncode == 0, done.stderr
    assert f"report: {inputs.run / 'report.html'}" in done.stdout
    assert re.search(r"psnr\s+31.25\s+dB\s+1234", done.stdout)
    assert "My digits" in Page((inputs.run / "report.html").read_text()).text


def test_wrong_input_is_named_in_one_line(inputs: SimpleNamespace, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (ReportConfig(run=str(tmp_path / "nowhere")), "nowhere: no such folder of results"),
        (ReportConfig(run=str(empty)), "holds no results; give this folder as `out`"),
        (ReportConfig(run=str(inputs.run), runs=[str(empty)]), "has no metrics.jsonl"),
        (ReportConfig(run=str(inputs.run), pairs=inputs.samples), "has no field 'original'"),
        (ReportConfig(run=str(inputs.run), samples=inputs.pairs), "has no field 'images'"),
    ]
    for config, message in cases:
        with pytest.raises((ValueError, OSError), match=re.escape(message)):
            write_report(config)
        assert not (inputs.run / "report.html").exists()
    with pytest.raises(ValueError, match="out=a.txt; it must end in .html"):
        ReportConfig(run="run", out="a.txt")
    with pytest.raises(ValueError, match="columns=0"):
        ReportConfig(run="run", columns=0)
