"""The plots of the report's sections: what each one shows of a run, its metrics and its data."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data.metadata import TRAIN_SPLIT, Metadata
from trainer.reporting import plots
from trainer.reporting.tables import train_split

MAX_HISTORY_POINTS = 300
MAX_LENGTH_BINS = 40
# Evaluations while training that are drawn, besides the loss.
EVALUATED = {
    "mean_average_precision": "mean average precision",
    "micro_average_precision": "micro average precision",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
}


def history_plots(history: Sequence[dict[str, Any]]) -> tuple[plots.Plot, ...]:
    """Learning curves: loss, evaluations, learning rate and speed; none without a history."""
    steps = [row for row in history if "evaluation" not in row]
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
        drawn.append(plots.draw_lines("evaluations", f"On {split} while training", "", evaluated))
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
        "label": labels,
        "x": xs,
        "y": [values["f1"] for values in measured],
        "support": [values["support"] for values in measured],
    }


def cooccurrence_plots(curves: dict[str, Any]) -> tuple[plots.Plot, ...]:
    """How often labels occur together, true and predicted."""
    pairs = curves["cooccurrence"]
    names = [curves["labels"][index] for index in pairs["labels"]]
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
