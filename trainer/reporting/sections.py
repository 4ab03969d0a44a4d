"""The report's sections: the rows and number formats of its tables, and what its plots show."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.metadata import TRAIN_SPLIT, Metadata, Split
from trainer.errors import shorten
from trainer.reporting import plots

HEADLINES = {
    "mean_average_precision": "Mean average precision",
    "micro_f1": "Micro-F1",
    "macro_f1": "Macro-F1",
    "macro_roc_auc": "Macro ROC-AUC",
    "expected_calibration_error": "Calibration error",
}
# The metrics that thresholds decide, in the order in which they are shown.
BY_THRESHOLD = (
    *(f"{mean}_f1" for mean in ("micro", "macro", "weighted", "samples")),
    *(f"{mean}_precision" for mean in ("micro", "macro", "weighted", "samples")),
    *(f"{mean}_recall" for mean in ("micro", "macro", "weighted", "samples")),
    "subset_accuracy",
    "hamming_loss",
)
LABEL_COLUMNS = {
    "support": "positives",
    "f1": "F1",
    "f1_on_calibration_split": "F1 on {fitted}",
    "precision": "precision",
    "recall": "recall",
    "threshold": "threshold",
    "average_precision": "AP",
    "roc_auc": "ROC-AUC",
    "expected_calibration_error": "calib. error",
    "expected_calibration_error_before": "before",
}
SLICE_COLUMNS = {
    "documents": "documents",
    "labels_present": "labels present",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "mean_average_precision": "mean AP",
    "expected_calibration_error": "calib. error",
}
CHECK_COLUMNS = {
    "repeated_documents": "documents that repeat another",
    "conflicting_texts": "texts with different labels",
    "truncated_share": "truncated",
    "unknown_token_share": "unknown tokens",
    "other_script_share": "other scripts",
}
LABEL_CASES = {
    "labels_without_positives": "labels without positives",
    "nearly_always_labels": "labels on nearly every document",
    "rare_labels": "labels on very few documents",
}


@dataclass(frozen=True)
class TableRow:
    """A row: its name, a text and a number to sort by for each cell, and the label it links to."""

    name: str
    cells: list[tuple[str, float | None]]
    label: int | None = None


@dataclass(frozen=True)
class Table:
    """A table: what its rows are, the titles of the other columns, and the rows."""

    head: str
    columns: list[str]
    rows: list[TableRow]


def number(value: float | None, digits: int = 3) -> str:
    """A metric with three digits; a dash for what is undefined."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign."""
    if value is None or math.isnan(value):
        return "–"
    shown = f"{value:+.3f}".replace("-", "−")
    return shown[1:] if float(shown[1:]) == 0 else shown


def count(value: int | None) -> str:
    """A whole number, its thousands apart."""
    return "–" if value is None else f"{value:,}"


def percent(value: float | None) -> str:
    """A share as a percentage of three significant digits at most."""
    if value is None or math.isnan(value):
        return "–"
    return "< 0.01 %" if 0 < value < 1e-4 else f"{100 * value:.3g} %"


def _cells(values: dict[str, Any], names: Iterable[str]) -> list[tuple[str, float | None]]:
    """Whole numbers as counts, shares as percentages, and everything else as metrics."""

    def text(name: str, value: Any) -> str:
        if name.endswith("_share"):
            return percent(value)
        return count(value) if isinstance(value, int) else number(value)

    return [(text(name, values[name]), values[name]) for name in names]


def _texts(*texts: str) -> list[tuple[str, float | None]]:
    return [(text, None) for text in texts]


def train_split(metadata: Metadata | None) -> Split | None:
    """The training split, where it is known."""
    return metadata.splits.get(TRAIN_SPLIT) if metadata is not None else None


def headline_table(headlines: Sequence[dict[str, Any]], systems: Sequence[str]) -> Table:
    """The headline metrics of every system."""
    rows = [
        TableRow(row["title"], _texts(*(number(row["values"][name]) for name in systems)))
        for row in headlines
    ]
    return Table("metric", list(systems), rows)


def comparison_tables(metrics: dict[str, Any]) -> tuple[Table, Table]:
    """Every metric of both splits: those that thresholds decide, and the others."""
    fitted = metrics["on_calibration_split"]
    shared = [
        name
        for name in metrics
        if isinstance(metrics[name], float) and isinstance(fitted.get(name), float)
    ]
    titles = [f"{metrics['calibration_split']} (fitted)", metrics["split"], "change"]

    def table(names: Sequence[str]) -> Table:
        pairs = [(name, fitted[name], metrics[name]) for name in names]
        rows = [
            TableRow(_as_title(name), _texts(number(was), number(now), signed(now - was)))
            for name, was, now in pairs
        ]
        return Table("metric", titles, rows)

    decided = [name for name in BY_THRESHOLD if name in shared]
    return table(decided), table([name for name in shared if name not in BY_THRESHOLD])


def _as_title(name: str) -> str:
    if name in HEADLINES:
        return HEADLINES[name]
    words = name.replace("_", " ").replace("f1", "F1").replace("roc auc", "ROC-AUC")
    words = words.replace("expected calibration", "calibration")
    return words.replace("ndcg", "nDCG") if "ndcg" in words else words[:1].upper() + words[1:]


def label_table(
    metrics: dict[str, Any], curves: dict[str, Any], metadata: Metadata | None
) -> Table:
    """Every label, with its documents in training where those are known."""
    per_label, train = metrics["per_label"], train_split(metadata)
    names = [name for name in LABEL_COLUMNS if name in per_label[curves["labels"][0]]]
    titles = [LABEL_COLUMNS[name].format(fitted=metrics["calibration_split"]) for name in names]
    with_curves = set(curves["curve_labels"])
    rows = []
    for index, label in enumerate(curves["labels"]):
        cells = _cells(per_label[label], names)
        if train is not None:
            cells = _cells({"train": train.label_counts[index]}, ["train"]) + cells
        rows.append(TableRow(label, cells, index if index in with_curves else None))
    return Table("label", [f"in {TRAIN_SPLIT}"] * (train is not None) + titles, rows)


def slice_tables(metrics: dict[str, Any]) -> dict[str, Table]:
    """By kept column: metrics by its values, the rest of them together last."""
    tables = {}
    for column, found in metrics.get("slices", {}).items():
        named = [(value or "(empty)", measured) for value, measured in found["values"].items()]
        if found["rest"] is not None:
            named.append((f"{found['rest']['num_values']:,} other values", found["rest"]))
        rows = [TableRow(name, _cells(measured, SLICE_COLUMNS)) for name, measured in named]
        tables[column] = Table("value", list(SLICE_COLUMNS.values()), rows)
    return tables


def split_table(metadata: Metadata) -> Table:
    """How much there is of every split, and what was cut and rejected."""
    titles = "documents", "windows", "tokens", "tokens a document", "truncated", "rejected"
    rows = []
    for name, split in metadata.splits.items():
        documents = max(split.documents, 1)
        cells = _texts(
            *map(count, (split.documents, split.windows, split.tokens)),
            number(split.tokens / documents, 1),
            f"{count(split.truncated)} ({percent(split.truncated / documents)})",
            count(split.rejected),
            number(sum(split.label_counts) / documents, 2),
            count(sum(value == 0 for value in split.label_counts)),
        )
        rows.append(TableRow(name, cells))
    return Table("split", [*titles, "labels a document", "labels without positives"], rows)


def check_table(checks: dict[str, Any]) -> Table:
    """What `prepare` counted in each split."""
    rows = [
        TableRow(name, _cells(found, CHECK_COLUMNS)) for name, found in checks["splits"].items()
    ]
    return Table("split", list(CHECK_COLUMNS.values()), rows)


def remarkable_labels(checks: dict[str, Any]) -> list[dict[str, Any]]:
    """The labels that `prepare` remarked on: `split`, `words`, `count` and some of the `labels`."""
    return [
        {"split": name, "words": words, **found[case]}
        for name, found in checks.get("splits", {}).items()
        for case, words in LABEL_CASES.items()
        if found[case]["count"]
    ]


MAX_HISTORY_POINTS = 300
MAX_LENGTH_BINS = 40
# Evaluations while training that are drawn, besides the loss.
EVALUATED = {
    "mean_average_precision": "mean average precision",
    "micro_average_precision": "micro average precision",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
}


def history_plots(
    history: Sequence[dict[str, Any]], level: tuple[str, float] | None = None
) -> tuple[plots.Plot, ...]:
    """Learning curves: loss, evaluations, learning rate and speed; none without a history.

    `level` is a line across the evaluations, words and height. What a head start was fitted to is
    a row too, which is not drawn.
    """
    steps = [row for row in history if "epoch" in row]
    evaluations = [row for row in history if "evaluation" in row]
    if not steps:
        return ()
    an_epoch = steps[-1]["documents"] / max(steps[-1]["epoch"], 1e-12)
    at = [row["epoch"] for row in steps]
    evaluated_at = [row["documents"] / an_epoch for row in evaluations]

    def of_steps(name: str, words: str) -> plots.Line:
        return (words, *_thin(at, [row.get(name) for row in steps]))

    def of_evaluations(name: str, words: str) -> plots.Line:
        return (words, *_thin(evaluated_at, [row["evaluation"].get(name) for row in evaluations]))

    split = evaluations[-1]["split"] if evaluations else ""
    losses = [of_steps("loss", "training"), of_evaluations("loss", split)]
    evaluated = [of_evaluations(name, words) for name, words in EVALUATED.items()]
    evaluated = [line for line in evaluated if line[1]]
    drawn = [plots.draw_lines("loss", "Loss", "loss", [line for line in losses if line[1]])]
    if evaluated:
        title = f"On {split} while training"
        drawn.append(plots.draw_lines("evaluations", title, "", evaluated, level))
    rate = of_steps("learning_rate", "learning rate")
    drawn.append(plots.draw_lines("learning_rate", "Learning rate", "", [rate]))
    # The first step compiles.
    _, xs, ys = of_steps("tokens_per_second", "tokens/s")
    drawn.append(plots.draw_lines("speed", "Speed", "tokens/s", [("tokens/s", xs[1:], ys[1:])]))
    return tuple(drawn)


def _thin(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """At most `MAX_HISTORY_POINTS`, each the mean of neighbours; what is None is left out."""
    pairs = np.array([(x, y) for x, y in zip(xs, ys, strict=True) if y is not None], float)
    groups = np.array_split(pairs.reshape(-1, 2), min(MAX_HISTORY_POINTS, max(1, len(pairs))))
    means = [group.mean(axis=0) for group in groups if len(group)]
    return [float(f"{x:.5g}") for x, _ in means], [float(f"{y:.5g}") for _, y in means]


def frequency_plot(
    metrics: dict[str, Any], curves: dict[str, Any], metadata: Metadata | None
) -> plots.Plot:
    """F1 against the labels' frequency, in training where that is known."""
    per_label = metrics["per_label"]
    support = [per_label[label]["support"] for label in curves["labels"]]
    where, counts, documents = metrics["split"], support, metrics["documents"]
    train = train_split(metadata)
    if train is not None:
        where, counts, documents = TRAIN_SPLIT, list(train.label_counts), train.documents
    known = [index for index, value in enumerate(counts) if value > 0]
    absent = len(counts) - len(known)
    note = f" {absent:,} labels without documents there are left out." if absent else ""
    return plots.draw_points(
        "f1_frequency",
        "F1 against label frequency",
        f"Each point is a label; frequency in {where}.{note}",
        (f"share of {where} documents", f"F1 on {metrics['split']}"),
        _points(metrics, curves, known, [counts[index] / max(documents, 1) for index in known]),
        has_log_x=True,
    )


def overfitting_plot(metrics: dict[str, Any], curves: dict[str, Any]) -> plots.Plot:
    """F1 on the split that thresholds were fitted to, and on the reported one."""
    per_label = metrics["per_label"]
    chosen = [i for i, label in enumerate(curves["labels"]) if per_label[label]["support"] > 0]
    xs = [per_label[curves["labels"][i]]["f1_on_calibration_split"] for i in chosen]
    was, now = metrics["calibration_split"], metrics["split"]
    return plots.draw_points(
        "f1_fitted",
        f"F1 of labels on {was} and on {now}",
        f"Far below the diagonal: thresholds that do not hold up. Labels with positives in {now}.",
        (f"F1 on {was}", f"F1 on {now}"),
        _points(metrics, curves, chosen, xs),
        has_diagonal=True,
    )


def _points(
    metrics: dict[str, Any], curves: dict[str, Any], chosen: Sequence[int], xs: Sequence[float]
) -> dict[str, Sequence[Any]]:
    labels = [curves["labels"][index] for index in chosen]
    measured = [metrics["per_label"][label] for label in labels]
    return {
        "label": [shorten(label) for label in labels],
        "x": xs,
        "y": [values["f1"] for values in measured],
        "support": [values["support"] for values in measured],
    }


def cooccurrence_plots(curves: dict[str, Any]) -> tuple[plots.Plot, ...]:
    """How often labels occur together, true and predicted."""
    pairs = curves["cooccurrence"]
    names = [shorten(curves["labels"][index]) for index in pairs["labels"]]
    if len(names) < 2:
        return ()
    return (
        plots.draw_cooccurrence("true", "True", names, pairs["true"]),
        plots.draw_cooccurrence("predicted", "Predicted", names, pairs["predicted"]),
    )


def data_plots(metadata: Metadata | None) -> tuple[plots.Plot, ...]:
    """Lengths of documents, and how often labels occur, by split."""
    if metadata is None:
        return ()
    lengths, counts = [], []
    for name, split in metadata.splits.items():
        windows = np.array(split.length_histogram, float)
        width = max(1, -(-len(windows) // MAX_LENGTH_BINS))
        padded = np.pad(windows, (0, -len(windows) % width)).reshape(-1, width).sum(axis=1)
        middles = (np.arange(len(padded)) + 0.5) * width
        lengths.append((name, middles.tolist(), (padded / max(padded.sum(), 1)).tolist()))
        falling = np.sort(np.array(split.label_counts, float))[::-1]
        falling = falling[falling > 0] / max(split.documents, 1)
        counts.append((name, list(range(1, len(falling) + 1)), falling.tolist()))
    what = "windows" if metadata.max_windows > 1 else "documents"
    return (
        plots.draw_shares(
            "lengths", "Lengths", f"Tokens of {what}, [CLS] and [SEP] included; at most "
            f"{metadata.max_seq_length}.",
            ("tokens", f"share of {what}"), lengths,
        ),
        plots.draw_shares(
            "label_counts", "Label frequencies", "The labels of each split, the most frequent "
            "first; those without documents are left out.",
            ("rank of the label", "share of documents"), counts, has_log_y=True,
        ),
    )  # fmt: skip
