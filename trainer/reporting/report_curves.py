"""The plots of a label that the reader chooses: empty here, filled in by the page's script."""

import numpy as np
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, Range1d

from trainer.evaluation.curves import HISTOGRAM_EDGES
from trainer.reporting.plots import BLUE, GREEN, GREY, ORANGE, Plot, make_plot, start_figure

# Probabilities that mark an axis of log-odds.
_MARKED = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)


def draw_label_curves(reported: str, fitted_on: str) -> tuple[Plot, ...]:
    """Precision-recall, reliability and histogram, empty: the page fills in the chosen label.

    Args:
      reported, fitted_on: names of the splits.
    """
    recall = start_figure("precision_recall", "recall", "precision", 300)
    recall.x_range, recall.y_range = Range1d(-0.02, 1.02), Range1d(-0.03, 1.03)
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
    tips = [("recall", "@recall{0.000}"), ("precision", "@precision{0.000}")]
    recall.add_tools(HoverTool(renderers=[dots], tooltips=[*tips, ("at", "@score{0.0000}")]))
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
    both = Range1d(0, 1, name="reliability_range")
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
    tips = [("probability", "@probability{0.0000}"), ("positives", "@share{0.0000}")]
    drawn.add_tools(HoverTool(renderers=[dots], tooltips=[*tips, ("scores", "@documents")]))
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
    drawn.xaxis.ticker = FixedTicker(ticks=list(places))
    drawn.xaxis.major_label_overrides = places
    drawn.x_range = Range1d(float(HISTOGRAM_EDGES[0]), float(HISTOGRAM_EDGES[-1]))
    keys = ((BLUE, "has the label"), (GREY, "has it not"), (ORANGE, "threshold"))
    return make_plot(drawn, "Scores by class", "", keys)


def _source(name: str, *columns: str) -> ColumnDataSource:
    return ColumnDataSource({column: [] for column in columns}, name=name)
