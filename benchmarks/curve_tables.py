"""The results of learning_curve.py as Markdown tables and as curves."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from curve_corpora import TITLES

RANK = "mean_average_precision"
BASELINE = "tfidf"
COLUMNS = {
    RANK: "mAP",
    "micro_average_precision": "micro AP",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "expected_calibration_error": "ECE",
}
SYSTEMS = ("tfidf", "tfidf_wordpieces", "frozen", "trainer", "multihot_no_wide", "multihot")

Result = dict[str, Any]


def load_results(output: str) -> list[Result]:
    """All finished runs in an output folder."""
    paths = sorted(Path(output).glob("*/results/*.json"))
    if not paths:
        sys.exit(f"{output}: no results; run learning_curve.py without --print_only first")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def group_runs(results: Sequence[Result]) -> dict[tuple, list[Result]]:
    """The runs, one for each seed, by (corpus, documents, epochs or 0, system), sorted."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        key = (result["corpus"], result["documents"], result["epochs"] or 0)
        groups.setdefault((*key, SYSTEMS.index(result["system"])), []).append(result)
    return {(*key[:3], SYSTEMS[key[3]]): groups[key] for key in sorted(groups)}


def mean_of(runs: Sequence[Result], metric: str) -> float:
    """The mean of a metric over seeds."""
    return float(np.mean([run["metrics"][metric] for run in runs]))


def print_tables(results: Sequence[Result]) -> None:
    """A table for each corpus and number of documents."""
    groups = group_runs(results)
    for corpus, documents in dict.fromkeys(key[:2] for key in groups):
        rows = {key[2:]: runs for key, runs in groups.items() if key[:2] == (corpus, documents)}
        about = next(iter(rows.values()))[0]
        print(
            f"\n### {TITLES.get(corpus, corpus)}: {documents:,} documents\n\n"
            f"{about['tokens_a_document']:.0f} tokens a document, {about['labels']:,} labels, "
            f"{about['held_out']:,} test documents.\n\n{make_table(rows)}"
        )


def make_table(rows: dict[tuple[float, str], list[Result]]) -> str:
    """A Markdown table of means over seeds, and of mAP's spread, by (epochs or 0, system)."""
    names = ["system", "epochs", *COLUMNS.values(), "mAP / TF-IDF's", "seconds"]
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    baseline = rows.get((0, BASELINE))
    for (epochs, system), runs in rows.items():
        cells = [_figure(mean_of(runs, metric)) for metric in COLUMNS]
        if len(runs) > 1:
            cells[0] += f" ± {np.std([run['metrics'][RANK] for run in runs], ddof=1):.3f}"
        ratio = mean_of(runs, RANK) / mean_of(baseline, RANK) if baseline else math.nan
        seconds = np.mean([run["seconds"] for run in runs])
        cells += [_figure(ratio, 2), f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"]
        lines.append(f"| `{system}` | {f'{epochs:g}' if epochs else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def draw_curves(results: Sequence[Result], path: str) -> None:
    """mAP over epochs, a row for each corpus and a column for each number of documents.

    Linear baselines are dashed lines.
    """
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"--plot={path}: matplotlib is not installed; pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = group_runs(results)
    corpora = list(dict.fromkeys(key[0] for key in groups))
    sizes = sorted({key[1] for key in groups})
    epochs = sorted({key[2] for key in groups if key[2]})
    figure, axes = pyplot.subplots(
        len(corpora), len(sizes), sharex=True, sharey="row", squeeze=False, layout="constrained",
        figsize=(1 + 3.2 * len(sizes), 1 + 2.8 * len(corpora)),
    )  # fmt: skip
    lines = {}
    for row, corpus in enumerate(corpora):
        for column, size in enumerate(sizes):
            axis = axes[row, column]
            if row == 0:
                axis.set_title(f"{size:,} documents")
            if column == 0:
                axis.set_ylabel(TITLES.get(corpus, corpus).replace("`", ""), fontsize="small")
            lines |= _draw(axis, {k[2:]: v for k, v in groups.items() if k[:2] == (corpus, size)})
            axis.set_xscale("log")
            axis.set_xticks(epochs, [f"{number:g}" for number in epochs])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    figure.suptitle("Mean average precision on test, by training documents and epochs")
    figure.supxlabel("epochs")
    names = [name for name in SYSTEMS if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside right center")
    figure.savefig(path, dpi=120)
    print(f"Wrote {path}")


def _draw(axis: Any, rows: dict[tuple[float, str], list[Result]]) -> dict[str, Any]:
    """The lines of one set of axes, by system."""
    lines = {}
    for index, system in enumerate(SYSTEMS):
        of_system = {epochs: runs for (epochs, name), runs in rows.items() if name == system}
        values = [mean_of(runs, RANK) for runs in of_system.values()]
        color = f"C{index}"
        if 0 in of_system:
            lines[system] = axis.axhline(values[0], color=color, linestyle="--")
        elif of_system:
            (lines[system],) = axis.plot(list(of_system), values, color=color, marker="o")
    return lines
