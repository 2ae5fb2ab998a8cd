"""The sections of the report page and the page around them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.codebook import CodebookCounts
from eval.page.charts import Series, bar_chart, line_chart
from eval.page.curves import Run, draw_run
from eval.page.gallery import Pairs, Samples, draw_pairs, draw_samples
from eval.page.markup import Child, Html, element, number

# The figures at the top of the page, most telling first: title, and which way is better.
HEADLINE = {
    "rfid": ("rFID", "lower"),
    "fid": ("FID", "lower"),
    "psnr": ("PSNR", "higher"),
    "ssim": ("SSIM", "higher"),
    "lpips_alex": ("LPIPS, AlexNet", "lower"),
    "inception_score": ("Inception score", "higher"),
    "class_accuracy": ("Class accuracy", "higher"),
    "codebook_usage": ("Codebook usage", "higher"),
    "codebook_perplexity": ("Codebook perplexity", "higher"),
}
HEADLINE_COUNT = 6
COLUMNS = ("Metric", "Value", "Unit", "Samples", "Protocol", "Measured", "Checkpoint")
NUMERIC = ("Value", "Samples")
CURVE_POINTS = 300  # ranks drawn of a sorted codebook
# A page from files may load nothing and talk to nobody.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass
class Section:
    """A titled part of the page; `anchor` is its id."""

    anchor: str
    title: str
    note: str
    body: list[Html]


def headline(records: Sequence[dict[str, Any]]) -> Html | None:
    """Return the most telling figures as large numbers, or None if there are none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["metric"] in HEADLINE and record["value"] is not None:
            found.setdefault(record["metric"], []).append(record)
    tiles = []
    for name, (title, better) in HEADLINE.items():
        if name not in found:
            continue
        first, *others = found[name]
        note = f"{better} is better" + (f"; first of {len(others) + 1} results" if others else "")
        figures = element("dd", large_value(first), element("small", note))
        tiles.append(element("div", element("dt", title), figures, title=text_of(first, "data")))
    return element("dl", tiles[:HEADLINE_COUNT], class_="tiles") if tiles else None


def large_value(record: dict[str, Any]) -> str:
    """Return a value with its unit, fractions as a percentage."""
    unit = record.get("unit")
    if unit == "fraction":
        return f"{number(100 * record['value'])}%"
    return number(record["value"]) + (f" {unit}" if unit else "")


def results_section(records: Sequence[dict[str, Any]]) -> Section:
    """Return the table of all records."""
    head = [
        element(
            "th",
            element("button", title, type="button"),
            scope="col",
            class_="number" if title in NUMERIC else None,
        )
        for title in COLUMNS
    ]
    table = element(
        "table",
        element("thead", element("tr", head)),
        element("tbody", [record_row(record) for record in records]),
        class_="sortable",
    )
    missing = sum(record["value"] is None for record in records)
    note = f"{len(records)} results"
    note += f", {missing} of them unavailable: the reasons are below." if missing else "."
    note += " Press a column's name to sort by it."
    # A region that scrolls must be reachable by keyboard.
    wrapped = element(
        "div", table, class_="wide", tabindex="0", role="region", aria_label="Results table"
    )
    return Section("results", "Results", note, [wrapped, *reasons(records)])


def reasons(records: Sequence[dict[str, Any]]) -> list[Html]:
    """Return why metrics are unavailable, each reason once."""
    found: dict[str, list[str]] = {}
    for record in records:
        if record["value"] is None:
            found.setdefault(record.get("reason") or "no reason given", []).append(record["metric"])
    return [
        element(
            "p", element("b", ", ".join(dict.fromkeys(metrics))), f": {reason}", class_="reason"
        )
        for reason, metrics in found.items()
    ]


def record_row(record: dict[str, Any]) -> Html:
    """Return the table row of one record."""
    metric, value, count = record["metric"], record["value"], record.get("count")
    shown: Child = element("span", "unavailable", class_="badge")
    if value is not None:
        shown = element("span", number(value, 5), title=repr(value))
    against = f"against {record['reference']}" if record.get("reference") else None
    protocol = record.get("protocol") or {}
    checkpoint = record.get("checkpoint") or {}
    digest = str(checkpoint.get("digest") or "")
    model = [text_of(checkpoint, "id"), " ", element("code", digest[:15], title=digest)]
    data = [text_of(record, "data"), element("small", against) if against else None]
    cells = [
        ([metric, by_class(protocol)], metric),
        (shown, value),
        (text_of(record, "unit"), record.get("unit")),
        ("" if count is None else f"{count:,}", count),
        (protocol_facts(protocol), protocol.get("name")),
        (data, record.get("data")),
        (model if checkpoint else "", checkpoint.get("id")),
    ]
    return element(
        "tr",
        [
            table_cell(column, content, order)
            for column, (content, order) in zip(COLUMNS, cells, strict=True)
        ],
    )


def table_cell(column: str, content: Child, order: object) -> Html:
    """Return a cell. `order` is what its column is sorted by; `data-label` names the cell on narrow
    screens, where the cells of a row stand below one another."""
    heads = column == COLUMNS[0]
    return element(
        "th" if heads else "td",
        content,
        scope="row" if heads else None,
        class_="number" if column in NUMERIC else None,
        data_label=column,
        data_sort="" if order is None else str(order),
    )


def text_of(values: dict[str, Any], key: str) -> str:
    return str(values.get(key) or "")


def by_class(protocol: dict[str, Any]) -> Html | None:
    """Return the value of each class, folded away, where a metric has them."""
    if not protocol.get("per_class"):
        return None
    values = {name: number(value) for name, value in protocol["per_class"].items()}
    return element("details", element("summary", "by class"), facts(values))


def protocol_facts(protocol: dict[str, Any]) -> Child:
    """Return the name of a protocol, its other facts folded away."""
    shown = ("name", "per_class")  # the classes have their own place, see by_class
    rest = {key: value for key, value in protocol.items() if key not in shown}
    name = text_of(protocol, "name")
    if not rest:
        return name
    return element("details", element("summary", name or "protocol"), facts(rest))


def facts(values: dict[str, Any]) -> Html:
    """Return names and values as a description list."""
    items = [[element("dt", str(key)), element("dd", words(v))] for key, v in values.items()]
    return element("dl", items, class_="facts")


def words(value: object) -> str:
    """Return a fact of a protocol for reading: lists and tables without Python's brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {words(inner)}" for key, inner in value.items() if inner)
    return ", ".join(map(words, value)) if isinstance(value, list) else str(value)


def pairs_section(pairs: Pairs) -> Section:
    """Return originals above reconstructions: the first, the worst and the best."""
    body = [draw_pairs("First", pairs.first)]
    if pairs.count > len(pairs.first):
        body += [draw_pairs("Worst", pairs.worst), draw_pairs("Best", pairs.best)]
    note = (
        f"Original above reconstruction, with the PSNR of the two; ranked by it among "
        f"{pairs.count:,} pairs of {pairs.name}."
    )
    return Section("reconstructions", "Reconstructions", note, body)


def samples_section(samples: Samples) -> Section:
    """Return generated samples by class."""
    shown = len(samples.classes)
    note = f"The first samples of each class, from {samples.count:,} in {samples.name}."
    if shown < samples.num_classes:
        note += f" {shown} of {samples.num_classes} classes are shown."
    return Section("samples", "Generated samples", note, [draw_samples(samples)])


def curves_section(runs: Sequence[Run]) -> Section:
    """Return the training curves of each run."""
    note = (
        "From each run's metrics.jsonl. Long logs are averaged over neighbouring steps; "
        "validation is dashed."
    )
    return Section("training", "Training", note, [draw_run(run) for run in runs])


def codebook_section(codebooks: dict[str, CodebookCounts]) -> Section:
    """Return use and bit balance of each codebook; `codebooks` maps a name to its counts."""
    body = [draw_codebook(name, counts) for name, counts in codebooks.items()]
    note = (
        "How often each code is used, codes sorted by use, and how often each bit is 1. "
        "Even use is a flat line; a balanced bit is at 0.5."
    )
    return Section("codebook", "Codebook", note, body)


def draw_codebook(name: str, counts: CodebookCounts) -> Html:
    """Draw the sorted counts and the balance of the bits of one codebook."""
    use = counts.compute()
    descending = counts.counts.sort(descending=True).values
    last = use.used - 1
    steps = min(CURVE_POINTS, use.used)
    ranks = sorted({round(i * last / max(steps - 1, 1)) for i in range(steps)})
    share = [100 * (rank + 1) / use.num_codes for rank in ranks]
    even = Series("even use", [0, 100], [use.tokens / use.num_codes] * 2, dashed=True, color=5)
    sizes = Series("measured", share, descending[ranks].tolist(), color=0)
    summary = (
        f"{use.used:,} of {use.num_codes:,} codes seen ({use.usage:.2%}) in {use.tokens:,} tokens; "
        f"perplexity {number(use.perplexity)}, entropy {use.entropy_bits:.3f} of {use.bits} bits."
    )
    curve = line_chart([sizes, even], "share of the codebook, %", "uses of a code")
    bars = bar_chart(use.bit_ones, "bit", "share of ones", middle=0.5)
    plots = [
        element("figure", element("figcaption", element("b", title)), chart, class_="plot")
        for title, chart in (("Sorted use", curve), ("Bit balance", bars))
    ]
    heading = element("h3", name)
    text = element("p", summary, class_="note")
    return element("div", heading, text, element("div", plots, class_="plots"))


def commands_section(records: Sequence[dict[str, Any]]) -> Section:
    """Return the commands that made the results, each with a button that copies it."""
    commands = dict.fromkeys(record["command"] for record in records if record.get("command"))
    rows = []
    for line in commands:
        button = element("button", "Copy", type="button", class_="copy")
        code = element("pre", element("code", line))
        rows.append(element("div", code, button, class_="command"))
    note = "Run from the same working directory, these commands make the results again."
    return Section("commands", "Commands", note, rows)


def versions_of(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return package to version, all of them where results were made with several."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in (record.get("versions") or {}).items():
            found.setdefault(package, {})[str(version)] = None
    return {package: ", ".join(versions) for package, versions in found.items()}


def build_page(
    title: str, date: str, records: Sequence[dict[str, Any]], sections: Sequence[Section]
) -> str:
    """Return the whole page as text; it needs no other file."""
    folder = Path(__file__).parent
    style = Html((folder / "style.css").read_text(encoding="utf-8"))
    script = Html((folder / "script.js").read_text(encoding="utf-8"))
    links = [
        element("li", element("a", section.title, href=f"#{section.anchor}"))
        for section in sections
    ]
    versions = ", ".join(f"{name} {version}" for name, version in versions_of(records).items())
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", style),
    )
    body = element(
        "body",
        element(
            "header",
            element("h1", title),
            element("p", f"Written on {date}", class_="note"),
            element("nav", element("ul", links), aria_label="Sections"),
            headline(records),
        ),
        element("main", [draw_section(section) for section in sections]),
        element(
            "footer",
            element("p", f"Made by eval.report on {date}."),
            element("p", f"Results made with {versions}.") if versions else None,
        ),
        element("script", script),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def draw_section(section: Section) -> Html:
    """Return a section with its title and note."""
    return element(
        "section",
        element("h2", section.title, id=section.anchor),
        element("p", section.note, class_="note"),
        section.body,
        aria_labelledby=section.anchor,
    )
