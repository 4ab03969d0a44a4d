"""The report's plots: Bokeh figures as JSON, drawn by its JavaScript in the page.

Bokeh's core takes 1.3 MB inlined, a quarter of other interactive libraries. Names of labels are
data: they reach the page inside JSON and are drawn as plain text, never as HTML or as TeX, for
which Bokeh would load a library from the network. Hovering is the only tool, so that a finger
scrolls the page. The plots of the label that the reader chooses are empty; a script fills them in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh import models
from bokeh.embed import json_item
from bokeh.palettes import Blues256
from bokeh.plotting import figure

from trainer.errors import shorten
from trainer.evaluation.curves import HISTOGRAM_EDGES

# Of Okabe and Ito's palette, which every kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#7A828A"
INK, RULE = "#2B3138", "#E3E7EB"
SERIES = (BLUE, ORANGE, GREEN, PURPLE)
SHARES = Blues256[::-1]
# Probabilities that mark an axis of log-odds.
_MARKED = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
# Characters of a label's name on an axis.
_MAX_TICK = 22
# What a line is of, x and y.
Line = tuple[str, Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Plot:
    """One plot of the page, its title and caption, and `keys`, its legend, as (colour, words).

    Its name is the id of its element too; `item` is what `Bokeh.embed.embed_item` takes. The legend
    is in the page's own text, where it covers no data.
    """

    name: str
    title: str
    caption: str
    keys: tuple[tuple[str, str], ...]
    item: dict[str, Any]


def make_plot(
    drawn: figure, title: str, caption: str, keys: Sequence[tuple[str, str]] = ()
) -> Plot:
    """A figure with its words."""
    return Plot(drawn.name, title, caption, tuple(keys), json_item(drawn, drawn.name))


def start_figure(name: str, x: str, y: str, height: int = 260, **options: Any) -> figure:
    """An empty figure in the report's style; `x` and `y` name its axes."""
    drawn = figure(
        name=name, height=height, sizing_mode="stretch_width", toolbar_location=None, tools="",
        min_border_right=14, min_border_left=4, outline_line_color=None, **options,
    )  # fmt: skip
    drawn.xaxis.axis_label, drawn.yaxis.axis_label = x, y
    for axis in drawn.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = "12px"
        axis.axis_label_text_color = axis.major_label_text_color = INK
        axis.major_label_text_font_size = "11px"
        axis.axis_line_color = axis.major_tick_line_color = GREY
        axis.minor_tick_line_color = None
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
    drawn.grid.grid_line_color = RULE
    return drawn


def _show_on_hover(drawn: figure, glyphs: Any, tips: dict[str, str]) -> None:
    drawn.add_tools(models.HoverTool(renderers=[glyphs], tooltips=list(tips.items())))


def draw_headline(
    rows: Sequence[tuple[str, dict[str, float | None]]],
    intervals: dict[str, tuple[float, float]],
    systems: Sequence[tuple[str, str]],
) -> Plot:
    """Metrics, a row each, of several systems, which are (colour, name), the model first.

    Rows are (name shown, value by system); the intervals are the model's, by name shown.
    """
    names = [name for name, _ in rows][::-1]
    drawn = start_figure(
        "headline", "", "", 60 + 34 * len(names), y_range=models.FactorRange(*names), x_range=(0, 1)
    )
    drawn.ygrid.grid_line_color = None
    kept = [name for name in names if name in intervals]
    drawn.segment(
        [intervals[name][0] for name in kept], kept, [intervals[name][1] for name in kept], kept,
        line_color=BLUE, line_width=7, line_alpha=0.25,
    )  # fmt: skip
    markers = ("circle", "diamond", "square")
    for (color, system), marker in reversed(list(zip(systems, markers, strict=False))):
        pairs = [(name, values[system]) for name, values in rows if values.get(system) is not None]
        drawn.scatter(
            [value for _, value in pairs], [name for name, _ in pairs],
            marker=marker, size=10, color=color,
        )  # fmt: skip
    return make_plot(drawn, "At a glance", "Bands are 95 % bootstrap intervals.", systems)


def draw_lines(
    name: str,
    title: str,
    y: str,
    lines: Sequence[Line],
    level: tuple[str, float] | None = None,
) -> Plot:
    """Lines over epochs, dots where there are few points; `level`, words and height, is dashed."""
    drawn = start_figure(name, "epochs", y)
    keys = []
    for color, (words, xs, ys) in zip(SERIES, lines, strict=False):
        drawn.line(xs, ys, line_color=color, line_width=2)
        if len(xs) <= 40:
            drawn.scatter(xs, ys, size=6, color=color)
        keys.append((color, words))
    if level is not None:
        words, height = level
        end = max((max(xs) for _, xs, _ in lines), default=0) or 1
        drawn.line([0, end], [height] * 2, line_color=GREY, line_width=2, line_dash="dashed")
        keys.append((GREY, words))
    if name == "learning_rate":
        drawn.yaxis.formatter = models.PrintfTickFormatter(format="%.1e")
    elif name == "speed":
        drawn.yaxis.formatter, drawn.y_range.start = models.NumeralTickFormatter(format="0,0"), 0
    return make_plot(drawn, title, "", keys if len(keys) > 1 else ())


def draw_points(
    name: str,
    title: str,
    caption: str,
    axes: tuple[str, str],
    columns: dict[str, Sequence[Any]],
    has_log_x: bool = False,
    has_diagonal: bool = False,
) -> Plot:
    """A point a label; hovering shows its `label`, `x`, `y` and `support`."""
    kind = "log" if has_log_x else "linear"
    drawn = start_figure(name, *axes, height=300, x_axis_type=kind)
    if not has_log_x:
        drawn.x_range = models.Range1d(-0.02, 1.02)
    drawn.y_range = models.Range1d(-0.03, 1.03)
    if has_diagonal:
        drawn.line([0, 1], [0, 1], line_color=GREY, line_dash="dashed")
    points = drawn.scatter(
        "x", "y", source=models.ColumnDataSource(columns, name=f"{name}_source"),
        size=9, fill_color=BLUE, fill_alpha=0.45, line_color=BLUE,
    )  # fmt: skip
    tips = {axes[0]: "@x{0.[000]}", axes[1]: "@y{0.000}", "positives": "@support"}
    _show_on_hover(drawn, points, {"label": "@label"} | tips)
    return make_plot(drawn, title, caption)


def draw_shares(
    name: str,
    title: str,
    caption: str,
    axes: tuple[str, str],
    series: Sequence[Line],
    has_log_y: bool = False,
) -> Plot:
    """The points of each split, joined by steps unless the y axis is logarithmic."""
    drawn = start_figure(name, *axes, y_axis_type="log" if has_log_y else "linear")
    keys = []
    for color, (words, xs, ys) in zip(SERIES, series, strict=False):
        if has_log_y:
            drawn.scatter(xs, ys, size=6, fill_color=color, fill_alpha=0.4, line_color=color)
        else:
            drawn.step(xs, ys, mode="center", line_color=color, line_width=2)
        keys.append((color, words))
    drawn.yaxis.formatter = models.NumeralTickFormatter(format="0.[000]%")
    return make_plot(drawn, title, caption, keys)


def draw_cooccurrence(
    kind: str, title: str, names: Sequence[str], counts: Sequence[Sequence[int]]
) -> Plot:
    """A matrix of the share of a row's documents that have the column's label too.

    `kind` is `true` or `predicted`. The counts of documents are K rows of K, for K names of labels;
    the diagonal is each label's own.
    """
    pairs = np.array(counts, np.float64).reshape(len(names), len(names))
    own = np.diag(pairs)[:, None]
    shares = pairs / np.maximum(own, 1)
    rows, columns = (axis.ravel() for axis in np.indices(pairs.shape))
    apart = rows != columns
    rows, columns = rows[apart], columns[apart]
    drawn = start_figure(f"cooccurrence_{kind}", "", "", 150 + 14 * len(names))
    data = {
        "x": columns.tolist(),
        "y": rows.tolist(),
        "row": [names[index] for index in rows],
        "column": [names[index] for index in columns],
        "share": shares[rows, columns].tolist(),
        "documents": pairs[rows, columns].tolist(),
    }
    cells = drawn.rect(
        "x", "y", 1, 1, source=models.ColumnDataSource(data),
        fill_color={"field": "share", "transform": models.LinearColorMapper(SHARES, low=0, high=1)},
        line_color="white", line_width=1,
    )  # fmt: skip
    drawn.x_range = models.Range1d(-0.5, len(names) - 0.5)
    drawn.y_range = models.Range1d(len(names) - 0.5, -0.5)
    for axis in drawn.axis:
        axis.ticker = models.FixedTicker(ticks=list(range(len(names))))
        axis.major_label_overrides = {
            i: models.PlainText(shorten(name, _MAX_TICK)) for i, name in enumerate(names)
        }
        axis.major_tick_line_color = axis.axis_line_color = None
        axis.major_label_text_font_size = "10px"
    drawn.xaxis.major_label_orientation = "vertical"
    drawn.grid.grid_line_color = None
    tips = {"of": "@row", "with": "@column", "share": "@share{0.0%}", "documents": "@documents"}
    _show_on_hover(drawn, cells, tips)
    return make_plot(drawn, title, "")


def draw_label_curves(reported: str, fitted_on: str) -> tuple[Plot, ...]:
    """Precision-recall, reliability and histogram of a label; the arguments name the splits."""
    recall = start_figure("precision_recall", "recall", "precision", 300)
    recall.x_range, recall.y_range = models.Range1d(-0.02, 1.02), models.Range1d(-0.03, 1.03)
    share = _source("prevalence_source", "x", "y")
    recall.line("x", "y", source=share, line_color=GREY, line_dash="dashed")
    fitted = _source("fitted_precision_recall_source", "recall", "precision", "score")
    recall.step("recall", "precision", source=fitted, mode="before", line_color=GREEN)
    curve = _source("precision_recall_source", "recall", "precision", "score")
    recall.step("recall", "precision", source=curve, mode="before", line_color=BLUE, line_width=2)
    dots = recall.scatter("recall", "precision", source=curve, size=4, color=BLUE)
    chosen = _source("operating_point_source", "recall", "precision")
    recall.scatter(
        "recall", "precision", source=chosen, size=12, fill_color=None, line_color=ORANGE,
        line_width=3,
    )  # fmt: skip
    tips = {"recall": "@recall{0.000}", "precision": "@precision{0.000}", "at": "@score{0.0000}"}
    _show_on_hover(recall, dots, tips)
    return (
        make_plot(
            recall, "Precision and recall", "",
            ((BLUE, reported), (ORANGE, "at the threshold"), (GREEN, f"{fitted_on} (fitted)"),
             (GREY, "share of positives")),
        ),
        _draw_reliability(),
        _draw_histogram(),
    )  # fmt: skip


def _draw_reliability() -> Plot:
    drawn = start_figure("reliability", "mean probability", "share of positives", 300)
    both = models.Range1d(0, 1, name="reliability_range")
    drawn.x_range = drawn.y_range = both
    drawn.line([0, 1], [0, 1], line_color=GREY, line_dash="dashed")
    before = _source("before_source", "probability", "share", "documents")
    after = _source("after_source", "probability", "share", "documents", "low", "high")
    drawn.line("probability", "share", source=before, line_color=ORANGE, line_alpha=0.6)
    drawn.scatter(
        "probability", "share", source=before, size=7, fill_color="white", line_color=ORANGE
    )
    drawn.segment("probability", "low", "probability", "high", source=after, line_color=BLUE)
    drawn.line("probability", "share", source=after, line_color=BLUE, line_width=2)
    dots = drawn.scatter("probability", "share", source=after, size=7, color=BLUE)
    tips = {"probability": "@probability{0.0000}", "positives": "@share{0.0000}"}
    _show_on_hover(drawn, dots, tips | {"scores": "@documents"})
    keys = ((BLUE, "calibrated, with 95 % intervals"), (ORANGE, "before calibration"))
    return make_plot(drawn, "Reliability", "", keys)


def _draw_histogram() -> Plot:
    drawn = start_figure("histogram", "probability (spaced by log-odds)", "share of its class", 300)
    drawn.y_range.start = 0
    source = _source("histogram_source", "left", "right", "positive", "negative")
    edges = {"left": "left", "right": "right", "source": source, "line_color": "white"}
    drawn.quad(top="negative", bottom=0, fill_color=GREY, fill_alpha=0.45, **edges)
    drawn.quad(top="positive", bottom=0, fill_color=BLUE, fill_alpha=0.55, **edges)
    drawn.vspan(x="x", source=_source("threshold_source", "x"), line_color=ORANGE, line_width=2)
    places = {float(np.log(p / (1 - p))): f"{p:g}" for p in _MARKED}
    drawn.xaxis.ticker = models.FixedTicker(ticks=list(places))
    drawn.xaxis.major_label_overrides = places
    drawn.x_range = models.Range1d(float(HISTOGRAM_EDGES[0]), float(HISTOGRAM_EDGES[-1]))
    keys = ((BLUE, "has the label"), (GREY, "has it not"), (ORANGE, "threshold"))
    return make_plot(drawn, "Scores by class", "", keys)


def _source(name: str, *columns: str) -> models.ColumnDataSource:
    return models.ColumnDataSource({column: [] for column in columns}, name=name)
