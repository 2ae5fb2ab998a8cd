"""Line and bar charts as inline SVG: no library, no script, colours from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval.page.markup import Html, element, number

WIDTH, HEIGHT = 360, 235
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 12, 44  # margins around the plotting area
MAX_POINTS = 240  # longer series are averaged over runs of neighbouring points
LOG_RATIO = 30.0  # positive data spanning more than this are drawn on a log axis
COLORS = 6  # classes c0 to c5 of the style sheet


@dataclass
class Series:
    """One line: points (x, y); a y that is not finite breaks the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    color: int | None = None  # default: the position of the series in the chart


@dataclass
class Axis:
    """Map values onto pixels, linear or logarithmic, over a range that includes all `values`."""

    values: Sequence[float]
    start: float  # pixel of the low end
    end: float  # pixel of the high end
    log: bool = False
    padded: bool = False  # leave a little room above and below
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        scaled = [self._scale(value) for value in self.values]
        self.low, self.high = min(scaled), max(scaled)
        if self.high - self.low < 1e-12 * max(abs(self.high), 1e-300):
            room = abs(self.high) * 0.1 or 0.5
            self.low, self.high = self.low - room, self.high + room
        elif self.padded:
            room = 0.05 * (self.high - self.low)
            self.low, self.high = self.low - room, self.high + room

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def pixel(self, value: float) -> float:
        """Return the position of `value`."""
        share = (self._scale(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return four to eight round values within the range."""
        if not self.log:
            return linear_ticks(self.low, self.high)
        low, high = math.floor(self.low), math.ceil(self.high)
        stride = max(1, math.ceil((high - low) / 6))
        steps = (1, 2, 5) if self.high - self.low < 2.2 else (1,)
        powers = range(low, high + 1, stride)
        candidates = [m * 10.0**power for power in powers for m in steps]
        return [v for v in candidates if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.7 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Dividing by the reciprocal of a step below 1 keeps 0.3 from becoming 0.30000000000000004.
    inverse = round(1 / step) if step < 1 else 0
    return [i / inverse if inverse else i * step for i in range(first, last + 1)]


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average runs of neighbours so that at most MAX_POINTS points are left; short series stay."""
    size = math.ceil(len(x) / MAX_POINTS)
    if size <= 1:
        return list(x), list(y)
    xs, ys = [], []
    for start in range(0, len(x), size):
        part = [value for value in y[start : start + size] if math.isfinite(value)]
        chunk = x[start : start + size]
        xs.append(sum(chunk) / len(chunk))
        ys.append(sum(part) / len(part) if part else math.nan)
    return xs, ys


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, log_y: bool | None = None
) -> Html:
    """Draw lines over a common x axis, with axes, ticks, grid and, for several lines, a legend.

    Args:
        log_y: None chooses a log axis for positive data that span more than a factor of LOG_RATIO.
    """
    lines = [Series(s.name, *thin(s.x, s.y), s.dashed, s.color) for s in series]
    points = [(a, b) for s in lines for a, b in zip(s.x, s.y, strict=True) if math.isfinite(b)]
    if not points:
        return element("p", "No finite values to draw.", class_="note")
    y_values = [b for _, b in points]
    if log_y is None:
        log_y = min(y_values) > 0 and max(y_values) / min(y_values) > LOG_RATIO
    x_axis = Axis([a for a, _ in points], LEFT, WIDTH - RIGHT)
    y_axis = Axis(y_values, HEIGHT - BOTTOM, TOP, log=log_y, padded=True)
    drawn = [
        draw_line(s, x_axis, y_axis, index if s.color is None else s.color)
        for index, s in enumerate(lines)
    ]
    label = f"{y_label}, log scale" if log_y else y_label
    parts = [frame(x_axis, y_axis, x_label, label), *drawn]
    names = ", ".join(s.name for s in lines)
    return figure(parts, f"Line chart of {names} against {x_label}", legend(lines))


def bar_chart(values: Sequence[float], x_label: str, y_label: str, middle: float) -> Html:
    """Draw one bar for each of `values`, in [0, 1], from the line at `middle` to the value."""
    x_axis = Axis([-0.5, len(values) - 0.5], LEFT, WIDTH - RIGHT)
    y_axis = Axis([0.0, 1.0], HEIGHT - BOTTOM, TOP)
    width = 0.7 * (WIDTH - LEFT - RIGHT) / len(values)
    zero = y_axis.pixel(middle)
    bars = []
    for index, value in enumerate(values):
        top = y_axis.pixel(value)
        tip = element("title", f"{x_label} {index}: {number(value)}")
        bars.append(
            element(
                "rect",
                tip,
                class_="bar",
                x=coordinate(x_axis.pixel(index) - width / 2),
                y=coordinate(min(top, zero) - 0.5),
                width=coordinate(width),
                height=coordinate(abs(top - zero) + 1),
            )
        )
    line = straight(LEFT, zero, WIDTH - RIGHT, zero, "axis")
    every = math.ceil(len(values) / 9)
    ticks = [float(index) for index in range(0, len(values), every)]
    parts = [frame(x_axis, y_axis, x_label, y_label, ticks), *bars, line]
    return figure(parts, f"Bar chart of {y_label} for each {x_label}", None)


def figure(parts: Sequence[Html], label: str, below: Html | None) -> Html:
    """Wrap the parts of a chart into an accessible, scalable SVG."""
    svg = element(
        "svg",
        element("title", label),
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
        class_="chart",
    )
    return Html(svg + (below or ""))


def frame(
    x_axis: Axis,
    y_axis: Axis,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
) -> Html:
    """Draw grid lines, tick labels, the base line and the names of both axes."""
    base = HEIGHT - BOTTOM
    parts = []
    for value in y_axis.ticks():
        y = y_axis.pixel(value)
        parts.append(straight(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(label_at(LEFT - 7, y + 4, short(value), "end"))
    for value in x_axis.ticks() if x_ticks is None else x_ticks:
        x = x_axis.pixel(value)
        parts.append(straight(x, base, x, base + 4, "axis"))
        parts.append(label_at(x, base + 18, short(value), "middle"))
    parts.append(straight(LEFT, base, WIDTH - RIGHT, base, "axis"))
    parts.append(label_at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    middle = (TOP + base) / 2
    turned = f"rotate(-90 13 {coordinate(middle)})"
    parts.append(label_at(13, middle, y_label, "middle", turned))
    return Html("".join(parts))


def draw_line(series: Series, x_axis: Axis, y_axis: Axis, color: int) -> Html:
    """Draw one line, and an invisible spot on each point that tells its value under the pointer."""
    path, spots, pen_down = [], [], False
    for x, y in zip(series.x, series.y, strict=True):
        if not math.isfinite(y) or (y_axis.log and y <= 0):
            pen_down = False
            continue
        px, py = coordinate(x_axis.pixel(x)), coordinate(y_axis.pixel(y))
        path.append(f"{'L' if pen_down else 'M'}{px} {py}")
        pen_down = True
        tip = element("title", f"{series.name} at {number(x)}: {number(y)}")
        spots.append(element("circle", tip, cx=px, cy=py, r=6, class_="spot"))
    style = f"line c{color % COLORS}" + (" dashed" if series.dashed else "")
    single = len(path) == 1  # a path of one point is invisible without a round dot
    dot = element("path", d=path[0] + "h0", class_=style + " dot") if single else None
    return element("g", element("path", d=" ".join(path), class_=style), dot, spots)


def legend(lines: Sequence[Series]) -> Html | None:
    """Name the lines of a chart; a single line is named by its axis."""
    if len(lines) < 2:
        return None
    items = []
    for index, series in enumerate(lines):
        color = index if series.color is None else series.color
        style = f"line c{color % COLORS}" + (" dashed" if series.dashed else "")
        key = element("path", d="M1 5H25", class_=style)
        swatch = element("svg", key, viewBox="0 0 26 10", class_="key", aria_hidden="true")
        items.append(element("li", swatch, " ", series.name))
    return element("ul", items, class_="legend")


def straight(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    """Draw a straight line."""
    ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return element("line", class_=style, **{key: coordinate(v) for key, v in ends.items()})


def label_at(x: float, y: float, text: str, anchor: str, transform: str | None = None) -> Html:
    """Write `text` at a point."""
    return element(
        "text", text, x=coordinate(x), y=coordinate(y), text_anchor=anchor, transform=transform
    )


def coordinate(value: float) -> str:
    """Return a pixel position with one decimal at most, the size of a page being text."""
    return f"{value:.1f}".removesuffix(".0")


def short(value: float) -> str:
    """Return a tick label: 12k for 12,000, 3M for 3,000,000, else up to six digits."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):g}{letter}"
    return f"{value:.6g}"
