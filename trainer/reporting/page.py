"""The report as a page: tables and plots put into `templates/report.html`.

Names of labels, ids and texts are whatever users have, hostile text included. The template escapes
all of it, and the page's content security policy lets nothing run but the page's own scripts, known
by their hashes, and nothing be loaded at all.
"""

import base64
import hashlib
import math
import os
from dataclasses import dataclass
from importlib import metadata as distributions
from typing import Any

import bokeh
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trainer.config import absolute
from trainer.data.metadata import Metadata
from trainer.evaluation.curves import HISTOGRAM_EDGES
from trainer.reporting.plots import BLUE, GREY, ORANGE, Plot, draw_headline, draw_label_curves
from trainer.reporting.sections import (
    cooccurrence_plots,
    data_plots,
    describe_checks,
    describe_slices,
    describe_splits,
    frequency_plot,
    history_plots,
    label_table,
    list_settings,
    overfitting_plot,
)
from trainer.training.run_record import RunRecord

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
LOWER_IS_BETTER = ("expected_calibration_error",)
MODEL, TFIDF, TRIVIAL = "this model", "TF-IDF", "frequencies"
SHOWN_MISTAKES = 5
# Of a mistake's text.
MAX_CHARACTERS = 600


@dataclass(frozen=True)
class Material:
    """All that a report is made of.

    Attributes:
      model_dir: of the run.
      record: of the run.
      metrics, curves: what `evaluate` wrote.
      history: rows of metrics.jsonl.
      metadata: of the data folder; None if that has gone.
      baseline: what `measure_baseline` returned, if it was run.
      texts: of mistaken documents, by place in the split.
    """

    model_dir: str
    record: RunRecord
    metrics: dict[str, Any]
    curves: dict[str, Any]
    history: list[dict[str, Any]]
    metadata: Metadata | None
    baseline: dict[str, Any] | None
    texts: dict[int, str]


def render(material: Material) -> str:
    """The page, self-contained HTML."""
    environment = Environment(
        loader=PackageLoader("trainer.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Bokeh's models name each other, and the first place that names one holds its definition.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters.update(
        number=number, count=count, signed=signed, percent=percent, exact="{:.6g}".format
    )
    loader = environment.loader
    assert loader is not None
    style, script = (
        loader.get_source(environment, name)[0] for name in ("report.css", "report.js")
    )
    library = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    plots = _draw(material)
    everything = [plot for group in plots.values() for plot in group]
    data = {"plots": [plot.item for plot in everything], "curves": _curves(material)}
    return environment.get_template("report.html").render(
        title=os.path.basename(absolute(material.model_dir).rstrip("/")),
        material=material,
        metrics=material.metrics,
        metadata=material.metadata,
        baseline=material.baseline,
        plots=plots,
        data=data,
        headlines=_headlines(material),
        systems=_systems(material),
        comparison=_comparison(material.metrics),
        table=label_table(material.metrics, material.curves, material.metadata),
        mistakes=_mistakes(material),
        shown_mistakes=SHOWN_MISTAKES,
        max_characters=MAX_CHARACTERS,
        splits=describe_splits(material.metadata),
        checks=describe_checks(material.metadata),
        slices=describe_slices(material.metrics),
        settings=list_settings(material.record),
        versions=_versions(material.record),
        fingerprints=_fingerprints(material),
        style=Markup(style),
        scripts=[Markup(library), Markup(script)],
        policy=_policy(library, script),
    )


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


def _policy(*scripts: str) -> str:
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _systems(material: Material) -> list[tuple[str, str]]:
    tfidf = [(GREY, TFIDF)] if material.baseline else []
    return [(BLUE, MODEL), *tfidf, (ORANGE, TRIVIAL)]


def _headlines(material: Material) -> list[dict[str, Any]]:
    """A row a headline metric: the model's value and interval, the baselines' values."""
    metrics, intervals = material.metrics, material.metrics.get("intervals", {})
    tfidf = material.baseline["metrics"] if material.baseline else {}
    rows = []
    for name, title in HEADLINES.items():
        if name not in metrics:
            continue
        values = {MODEL: metrics[name], TRIVIAL: metrics["trivial"].get(name)}
        if material.baseline:
            values[TFIDF] = tfidf.get(name)
        rows.append(
            {
                "title": title,
                "values": values,
                "interval": intervals.get(name),
                "lower_is_better": name in LOWER_IS_BETTER,
            }
        )
    return rows


def _comparison(metrics: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Every metric of both splits: those that thresholds decide, and the others."""
    fitted = metrics["on_calibration_split"]
    shared = [
        name
        for name in metrics
        if isinstance(metrics[name], float) and isinstance(fitted.get(name), float)
    ]
    decided = [name for name in BY_THRESHOLD if name in shared]
    others = [name for name in shared if name not in BY_THRESHOLD]

    def rows(names: list[str]) -> list[dict[str, Any]]:
        return [
            {"title": _as_title(name), "fitted": fitted[name], "reported": metrics[name]}
            for name in names
        ]

    return {"decided": rows(decided), "others": rows(others)}


def _as_title(name: str) -> str:
    if name in HEADLINES:
        return HEADLINES[name]
    words = name.replace("_", " ").replace("f1", "F1").replace("roc auc", "ROC-AUC")
    words = words.replace("expected calibration", "calibration")
    return words.replace("ndcg", "nDCG") if "ndcg" in words else words[:1].upper() + words[1:]


def _draw(material: Material) -> dict[str, tuple[Plot, ...]]:
    metrics, curves, metadata = material.metrics, material.curves, material.metadata
    headlines = _headlines(material)
    intervals = {row["title"]: row["interval"] for row in headlines if row["interval"]}
    rows = [(row["title"], row["values"]) for row in headlines if not row["lower_is_better"]]
    return {
        "headline": (draw_headline(rows, intervals, _systems(material)),),
        "history": history_plots(material.history),
        "labels": (
            frequency_plot(metrics, curves, metadata),
            overfitting_plot(metrics, curves),
        ),
        "curves": draw_label_curves(metrics["split"], metrics["calibration_split"]),
        "cooccurrence": cooccurrence_plots(curves),
        "data": data_plots(metadata),
    }


def _curves(material: Material) -> dict[str, Any]:
    """What the page draws of a label once it is chosen."""
    curves, metrics = material.curves, material.metrics
    names = curves["labels"]
    points = [metrics["per_label"][names[index]] for index in curves["curve_labels"]]
    return {
        "labels": curves["curve_labels"],
        "every": curves["micro"],
        "each": curves["curves"],
        "every_point": {"recall": metrics["micro_recall"], "precision": metrics["micro_precision"]},
        "each_point": [
            {name: point[name] for name in ("recall", "precision", "threshold")} for point in points
        ],
        "edges": HISTOGRAM_EDGES.tolist(),
    }


def _mistakes(material: Material) -> list[dict[str, Any]]:
    names = material.curves["labels"]
    kinds = {
        "false_positives": ("Predicted, and wrong", "The highest probabilities of absent labels."),
        "missed": ("There, and missed", "The lowest probabilities of labels that are there."),
    }
    return [
        {
            "title": title,
            "caption": caption,
            "cards": [
                mistake
                | {
                    "label": names[mistake["label"]],
                    "true": [names[index] for index in mistake["true"]],
                    "predicted": [names[index] for index in mistake["predicted"]],
                    "text": material.texts.get(mistake["index"]),
                }
                for mistake in material.curves["mistakes"][kind]
            ],
        }
        for kind, (title, caption) in kinds.items()
    ]


def _versions(record: RunRecord) -> list[tuple[str, str]]:
    """Of training, and of what made the report."""
    trained = [(f"{name} (training)", version) for name, version in record.versions.items()]
    of_report = [
        ("multihot (report)", distributions.version("multihot")),
        ("bokeh (report)", bokeh.__version__),
        ("scikit-learn (baseline)", distributions.version("scikit-learn")),
    ]
    return trained + of_report


def _fingerprints(material: Material) -> list[tuple[str, str]]:
    found = material.metrics["fingerprints"]
    pairs = [("checkpoint", found["checkpoint"]), ("tokenizer", found["tokenizer"])]
    pairs.append(("training data", material.record.data_fingerprint))
    return pairs + [(f"split {name}", value) for name, value in found["splits"].items()]
