"""The report's tables: their rows, and how their cells show numbers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.metadata import TRAIN_SPLIT, Metadata, Split

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
    rows = [TableRow(name, _cells(found, CHECK_COLUMNS)) for name, found in checks["splits"].items()]
    return Table("split", list(CHECK_COLUMNS.values()), rows)


def remarkable_labels(checks: dict[str, Any]) -> list[dict[str, Any]]:
    """The labels that `prepare` remarked on: `split`, `words`, `count` and some of the `labels`."""
    return [
        {"split": name, "words": words, **found[case]}
        for name, found in checks.get("splits", {}).items()
        for case, words in LABEL_CASES.items()
        if found[case]["count"]
    ]
