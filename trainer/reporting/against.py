"""The model against TF-IDF, label by label, on the reported split."""

from typing import Any

from trainer.errors import shorten
from trainer.reporting import plots
from trainer.reporting.sections import Table, TableRow, count, number, signed

COLUMNS = ["positives", "AP, model", "AP, TF-IDF", "difference", "F1, model", "F1, TF-IDF"]


def _pair(values: dict[str, Any]) -> tuple[float, float] | None:
    """Average precision of the model and of TF-IDF; None where one of them is undefined."""
    ours, theirs = values["average_precision"], values["baseline_average_precision"]
    return None if ours is None or theirs is None else (ours, theirs)


def count_won(metrics: dict[str, Any]) -> dict[str, int]:
    """Numbers of labels: the `model` has the higher average precision, `tfidf`, and `compared`."""
    pairs = [pair for values in metrics["per_label"].values() if (pair := _pair(values))]
    return {
        "model": sum(ours > theirs for ours, theirs in pairs),
        "tfidf": sum(ours < theirs for ours, theirs in pairs),
        "compared": len(pairs),
    }


def table(metrics: dict[str, Any], curves: dict[str, Any]) -> Table:
    """The labels that both have an average precision of, first where TF-IDF is most ahead."""
    with_curves, rows = set(curves["curve_labels"]), []
    for index, label in enumerate(curves["labels"]):
        values = metrics["per_label"][label]
        pair = _pair(values)
        if pair is None:
            continue
        difference = pair[0] - pair[1]
        scores = *pair, difference, values["f1"], values["baseline_f1"]
        texts = [
            signed(score) if place == 2 else number(score) for place, score in enumerate(scores)
        ]
        cells = [(count(values["support"]), values["support"]), *zip(texts, scores, strict=True)]
        rows.append((difference, TableRow(label, cells, index if index in with_curves else None)))
    rows.sort(key=lambda pair: pair[0])
    return Table("label", COLUMNS, [row for _, row in rows])


def plot(metrics: dict[str, Any], curves: dict[str, Any]) -> plots.Plot:
    """Average precision of each label by TF-IDF and by the model."""
    measured = [(label, metrics["per_label"][label]) for label in curves["labels"]]
    points = [(label, pair, values) for label, values in measured if (pair := _pair(values))]
    return plots.draw_points(
        "ap_tfidf",
        "Average precision of labels",
        "Each point is a label. Above the diagonal the model is ahead, below it TF-IDF.",
        ("by TF-IDF", "by the model"),
        {
            "label": [shorten(label) for label, _, _ in points],
            "x": [theirs for _, (_, theirs), _ in points],
            "y": [ours for _, (ours, _), _ in points],
            "support": [values["support"] for _, _, values in points],
        },
        has_diagonal=True,
    )
