"""The report as a page: tables and plots put into `templates/report.html`.

Names of labels, ids and texts come from users and may be hostile. The template escapes all of them.
The page's content security policy loads nothing and runs only the page's own scripts, which it
knows by their hashes.
"""

import base64
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata as distributions
from typing import Any

import bokeh
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trainer.config import absolute
from trainer.data.metadata import TRAIN_SPLIT, Metadata
from trainer.errors import shorten
from trainer.evaluation.curves import HISTOGRAM_EDGES
from trainer.reporting import against, sections
from trainer.reporting.plots import BLUE, GREY, ORANGE, Plot, draw_headline, draw_label_curves
from trainer.training.run_record import RunRecord
from trainer.training.setup import data_fingerprint

LOWER_IS_BETTER = ("expected_calibration_error",)
MODEL, TFIDF, TRIVIAL = "this model", "TF-IDF", "frequencies"
SHOWN_MISTAKES = 5
# Of a mistake's text.
MAX_CHARACTERS = 600


@dataclass(frozen=True)
class Material:
    """All that a report is made of.

    `metrics` and `curves` are what `evaluate` wrote, `history` the rows of metrics.jsonl.
    `metadata` is None if the data folder has gone. `texts` are those of mistaken documents, by
    place in the split.
    """

    model_dir: str
    record: RunRecord
    metrics: dict[str, Any]
    curves: dict[str, Any]
    history: list[dict[str, Any]]
    metadata: Metadata | None
    texts: dict[int, str]

    @property
    def baseline(self) -> dict[str, Any] | None:
        """What `evaluate` says of TF-IDF; None if it left it out."""
        return self.metrics.get("baseline")


def render(material: Material) -> str:
    """The page, self-contained HTML."""
    environment = Environment(
        loader=PackageLoader("trainer.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Keys stay unsorted: the first place that names a Bokeh model has to be its definition.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters.update(
        number=sections.number, count=sections.count, exact="{:.6g}".format, shorten=shorten
    )
    loader = environment.loader
    assert loader is not None
    style, script = (
        loader.get_source(environment, name)[0] for name in ("report.css", "report.js")
    )
    library = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    headlines = _headlines(material)
    checks = material.metadata.checks if material.metadata else {}
    plots = _draw(material, headlines)
    everything = [plot for group in plots.values() for plot in group]
    data = {"plots": [plot.item for plot in everything], "curves": _curves(material)}
    return environment.get_template("report.html").render(
        title=os.path.basename(absolute(material.model_dir).rstrip("/")),
        material=material,
        metrics=material.metrics,
        baseline=material.baseline,
        plots=plots,
        data=data,
        headlines=headlines,
        tables=_tables(material, headlines),
        won=against.count_won(material.metrics) if material.baseline else None,
        mistakes=_mistakes(material),
        shown_mistakes=SHOWN_MISTAKES,
        max_characters=MAX_CHARACTERS,
        checks=checks,
        remarkable_labels=sections.remarkable_labels(checks),
        settings=_settings(material.record),
        versions=_versions(material.record),
        fingerprints=_fingerprints(material),
        style=Markup(style),
        scripts=[Markup(library), Markup(script)],
        policy=_policy(library, script),
    )


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
    """Each headline metric: its values by system, and the interval of the model's."""
    metrics, intervals = material.metrics, material.metrics.get("intervals", {})
    systems = {MODEL: metrics, TRIVIAL: metrics["trivial"]}
    if material.baseline:
        systems[TFIDF] = material.baseline
    return [
        {
            "title": title,
            "values": {system: values.get(name) for system, values in systems.items()},
            "interval": intervals.get(name),
            "lower_is_better": name in LOWER_IS_BETTER,
        }
        for name, title in sections.HEADLINES.items()
        if name in metrics
    ]


def _tables(material: Material, headlines: list[dict[str, Any]]) -> dict[str, Any]:
    metrics, metadata = material.metrics, material.metadata
    decided, others = sections.comparison_tables(metrics)
    return {
        "headlines": sections.headline_table(headlines, [name for _, name in _systems(material)]),
        "decided": decided,
        "others": others,
        "labels": sections.label_table(metrics, material.curves, metadata),
        "against": against.table(metrics, material.curves) if material.baseline else None,
        "slices": sections.slice_tables(metrics),
        "splits": sections.split_table(metadata) if metadata else None,
        "checks": sections.check_table(metadata.checks) if metadata and metadata.checks else None,
    }


def _draw(material: Material, headlines: list[dict[str, Any]]) -> dict[str, tuple[Plot, ...]]:
    metrics, curves, metadata = material.metrics, material.curves, material.metadata
    intervals = {row["title"]: row["interval"] for row in headlines if row["interval"]}
    rows = [(row["title"], row["values"]) for row in headlines if not row["lower_is_better"]]
    return {
        "headline": (draw_headline(rows, intervals, _systems(material)),),
        "history": sections.history_plots(material.history, _history_level(material)),
        "labels": (
            sections.frequency_plot(metrics, curves, metadata),
            sections.overfitting_plot(metrics, curves),
        ),
        "against": (against.plot(metrics, curves),) if material.baseline else (),
        "curves": draw_label_curves(metrics["split"], metrics["calibration_split"]),
        "cooccurrence": sections.cooccurrence_plots(curves),
        "data": sections.data_plots(metadata),
    }


def _history_level(material: Material) -> tuple[str, float] | None:
    """The line of the baseline among the learning curves: words and a mean average precision.

    None unless it was measured on the split that the run was evaluated on while training.
    """
    record, metadata, metrics = material.record, material.metadata, material.metrics
    split = record.train.eval_split
    if material.baseline is None or metadata is None or metrics["calibration_split"] != split:
        return None
    if not {TRAIN_SPLIT, split} <= set(metadata.splits):
        return None
    if data_fingerprint(metadata, split) != record.data_fingerprint:
        return None
    measured = material.baseline["on_calibration_split"]
    level, documents = measured["mean_average_precision"], metadata.split(split).documents
    some = measured["documents"], documents
    part = "" if some[0] == some[1] else " on {:,} of {:,} documents".format(*some)
    return None if level is None else (f"TF-IDF, mean average precision{part}", level)


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

    def card(mistake: dict[str, Any]) -> dict[str, Any]:
        named = {kind: [names[index] for index in mistake[kind]] for kind in ("true", "predicted")}
        text = material.texts.get(mistake["index"])
        return mistake | named | {"label": names[mistake["label"]], "text": text}

    return [
        {
            "title": title,
            "caption": caption,
            "cards": [card(mistake) for mistake in material.curves["mistakes"][kind]],
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


def _settings(record: RunRecord) -> list[tuple[str, str]]:
    """The flags of the run and what followed from them, as (name, value)."""
    parts: dict[str, Any] = {
        "--": record.train,
        "model: ": record.model,
        "micro-batch: ": record.packing,
    }
    return [
        (f"{prefix}{name}", value)
        for prefix, part in parts.items()
        for name, value in _flat(dataclasses.asdict(part))
    ]


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The innermost names and values of nested dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, "–" if value is None else str(value)
