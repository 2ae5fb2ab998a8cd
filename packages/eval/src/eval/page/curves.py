"""Training curves: a run's metrics.jsonl as small charts, one per quantity."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from eval.page.charts import Series, line_chart
from eval.page.markup import Html, element, number

# Not curves of learning: schedules, counters, clocks and memory.
SKIPPED = re.compile(
    r"step|epoch|lr|skipped.*|data_wait|.*per_s(ec(ond)?)?|.*_s(econds)?|.*memory.*"
)
QUALITY = re.compile(r".*(psnr|ssim|accuracy|usage|perplexity|fid)")
VALIDATION = "val_"


@dataclass
class Run:
    """The log of one training run: metric name to its points (step, value), sorted by step."""

    name: str
    points: dict[str, list[tuple[float, float]]]
    steps: float  # last logged step
    config: str | None  # text of config.yaml


def read_run(folder: str) -> Run:
    """Read the log of a run folder.

    A resumed run logs some steps twice: the later line counts. A line cut short by a killed process
    is left out.

    Raises:
        FileNotFoundError: there is no log; ValueError: it holds no steps.
    """
    path = Path(folder).expanduser() / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"runs: {folder} has no metrics.jsonl; name training run folders")
    table: dict[str, dict[float, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not is_number(row.get("step")):
            continue
        step = row["step"]
        for name, value in row.items():
            if is_number(value) and not SKIPPED.fullmatch(name):
                table.setdefault(name, {})[step] = value
    if not table:
        raise ValueError(f"{path}: no logged steps; train for longer than one log interval")
    config = path.with_name("config.yaml")
    return Run(
        name=folder,
        points={name: sorted(values.items()) for name, values in table.items()},
        steps=max(step for values in table.values() for step in values),
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
    )


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def chart_name(metric: str) -> str:
    """Return the chart that draws `metric`: a quantity and its validation share one, as do the
    parts of a cross-entropy (loss_pre, loss_post)."""
    stem = metric.removeprefix(VALIDATION)
    return "loss" if stem.startswith("loss_") else stem


def group_charts(run: Run) -> dict[str, dict[str, list[str]]]:
    """Return heading to chart to metrics, losses before measures of quality, each in log order."""
    groups: dict[str, dict[str, list[str]]] = {"Losses": {}, "Quality": {}}
    for metric in run.points:
        heading = "Quality" if QUALITY.fullmatch(metric) else "Losses"
        groups[heading].setdefault(chart_name(metric), []).append(metric)
    return {heading: charts for heading, charts in groups.items() if charts}


def draw_chart(run: Run, name: str, metrics: list[str]) -> Html:
    """Draw one chart with its caption; beside training, validation is dashed in the same colour."""
    stems = list(dict.fromkeys(metric.removeprefix(VALIDATION) for metric in metrics))
    series = []
    for metric in metrics:
        steps, values = zip(*run.points[metric], strict=True)
        color = stems.index(metric.removeprefix(VALIDATION))
        dashed = len(metrics) > 1 and metric.startswith(VALIDATION)
        series.append(Series(metric, steps, values, dashed, color))
    last = [(metric, run.points[metric][-1][1]) for metric in metrics]
    ends = ", ".join(
        number(value) if len(last) == 1 else f"{metric} {number(value)}" for metric, value in last
    )
    broken = sum(not math.isfinite(value) for s in series for value in s.y)
    note = f"; {broken} values are not finite" if broken else ""
    title = metrics[0] if len(metrics) == 1 else name
    return element(
        "figure",
        element("figcaption", element("b", title), f" last: {ends}{note}"),
        line_chart(series, "step", title),
        class_="plot",
    )


def draw_run(run: Run) -> Html:
    """Return the charts of one run under its name, and its configuration folded away."""
    parts = []
    for heading, charts in group_charts(run).items():
        drawn = [draw_chart(run, name, metrics) for name, metrics in charts.items()]
        parts += [element("h4", heading), element("div", drawn, class_="plots")]
    config = None
    if run.config is not None:
        summary = element("summary", "config.yaml")
        config = element("details", summary, element("pre", run.config))
    title = element("h3", run.name, " ", element("small", f"{number(run.steps)} steps"))
    return element("div", title, parts, config, class_="run")
