"""The report's page: the evaluation's numbers, hostile names as text, nothing from the network."""

import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from reported_run import HOSTILE_ID, LABELS, NUM_LABELS, save_best

from trainer import report
from trainer.data.metadata import load_metadata
from trainer.errors import UserError, shorten
from trainer.evaluation.curves import MAX_CURVE_LABELS, collect
from trainer.evaluation.measurement import CalibratedPredictions
from trainer.evaluation.results import print_table
from trainer.reporting.page import Material, render
from trainer.run_config import ReportConfig
from trainer.training.run_record import load_record


class Page(HTMLParser):
    """The tables of a page by id, as rows of texts; its scripts; what it would load."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.scripts, self.loaded, self.texts = {}, [], [], []
        self._table = self._cell = self._script = None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.loaded += [value for name, value in found.items() if name in ("src", "srcset")]
        if "href" in found and not found["href"].startswith("#"):
            self.loaded.append(found["href"])
        if tag == "table":
            self._table = self.tables.setdefault(found.get("id", len(self.tables)), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._cell = ""
        elif tag == "script":
            self._script = found.get("type", "")
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            self._table[-1].append(self._cell.strip())
            self._cell = None
        elif tag == "table":
            self._table = None
        elif tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[-1] += data
            return
        self.texts.append(data)
        if self._cell is not None:
            self._cell += data


@pytest.fixture(scope="module")
def folders(reported_run):
    return reported_run


@pytest.fixture(scope="module")
def written(folders):
    """The path of the report, and its HTML."""
    report.run(ReportConfig(model_dir=folders[1]))
    path = os.path.join(folders[1], "report.html")
    with open(path, encoding="utf-8") as file:
        return path, file.read()


def read_json(folders, name):
    with open(os.path.join(folders[1], "evaluation", name), encoding="utf-8") as file:
        return json.load(file)


def shown(value):
    return "–" if value is None else f"{value:.3f}"


def test_headlines_stand_beside_both_baselines(folders, written):
    metrics = read_json(folders, "metrics.json")
    tfidf = metrics["baseline"]
    page = Page(written[1])
    head, *rows = page.tables["headlines"]
    assert head == ["metric", "this model", "TF-IDF", "frequencies"]
    names = {
        "Mean average precision": "mean_average_precision",
        "Micro-F1": "micro_f1",
        "Macro-F1": "macro_f1",
        "Macro ROC-AUC": "macro_roc_auc",
        "Calibration error": "expected_calibration_error",
    }
    assert [row[0] for row in rows] == list(names)
    for title, *values in rows:
        sources = (metrics, tfidf, metrics["trivial"])
        assert values == [shown(source[names[title]]) for source in sources]
        low, high = metrics["intervals"][names[title]]
        assert f"{low:.3f} to {high:.3f}" in written[1]
    # The words of the corpus tell its labels; the model is untrained.
    assert tfidf["micro_f1"] > 0.7 > metrics["trivial"]["micro_f1"]


def test_every_label_stands_in_the_table_with_its_numbers(folders, written):
    metrics = read_json(folders, "metrics.json")
    head, *rows = Page(written[1]).tables["label-table"]
    assert [row[0] for row in rows] == list(LABELS)
    for row in rows:
        found = dict(zip(head, row, strict=True))
        expected = metrics["per_label"][row[0]]
        assert found["F1"] == shown(expected["f1"])
        assert found["F1 on validation"] == shown(expected["f1_on_calibration_split"])
        assert found["threshold"] == shown(expected["threshold"])
        assert found["AP"] == shown(expected["average_precision"])
        assert found["positives"] == str(expected["support"])


def test_both_splits_stand_side_by_side(folders, written):
    metrics = read_json(folders, "metrics.json")
    rows = {row[0]: row[1:] for row in Page(written[1]).tables["comparison"]}
    assert rows["metric"] == ["validation (fitted)", "test", "change"]
    fitted, reported = metrics["on_calibration_split"]["micro_f1"], metrics["micro_f1"]
    change = f"{reported - fitted:+.3f}".replace("-", "−")
    assert rows["Micro-F1"] == [shown(fitted), shown(reported), change]
    assert {"Macro-F1", "Micro precision", "Macro recall", "Subset accuracy"} <= set(rows)


def test_slices_checks_mistakes_and_the_run_are_told(folders, written):
    page = Page(written[1])
    text = " ".join(" ".join(page.texts).split())
    tables = {table[0][0]: table for table in page.tables.values()}
    metrics = read_json(folders, "metrics.json")
    values = metrics["slices"]["source"]["values"]
    rows = {row[0]: row for row in tables["value"][1:]}
    assert set(rows) == {"mail", "<b>web</b>", "(empty)"}
    assert rows["mail"][1] == str(values["mail"]["documents"])
    assert rows["mail"][3] == shown(values["mail"]["micro_f1"])
    assert "documents that repeat the text of another: " in text
    assert metrics["fingerprints"]["checkpoint"] in text
    for words in ("--learning_rate", "tensorflow (training)", "conventions", "No text occurs in"):
        assert words.lower() in text.lower()
    first = read_json(folders, "curves.json")["mistakes"]["false_positives"][0]
    assert f"probability {first['probability']:.3f}, threshold {first['threshold']:.3f}" in text
    assert first["document"] in text
    assert "< script > window. owned = 5 < / script >" in text


def test_hostile_names_are_text_and_nothing_is_loaded(written):
    """128 labels, five of them hostile: three scripts of ours, no image, nothing from outside."""
    page = Page(written[1])
    assert len(page.scripts) == 3
    assert page.loaded == ["data:,"]
    assert not any("window.owned" in script for script in page.scripts[1:])
    assert HOSTILE_ID in " ".join(page.texts)
    assert "49" not in [text.strip() for text in page.texts if "7 * 7" in text]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', written[1])[1]
    assert "default-src &#39;none&#39;" in policy and policy.count("sha256-") == 2
    assert len(json.loads(page.scripts[0])["curves"]["each"]) == NUM_LABELS


def test_128_labels_stay_far_under_five_megabytes(written):
    assert os.path.getsize(written[0]) < 3_000_000


def test_who_wins_stands_label_by_label(folders, written):
    """The table begins where TF-IDF is most ahead."""
    per_label = read_json(folders, "metrics.json")["per_label"]
    head, *rows = Page(written[1]).tables["against-table"]
    assert head == ["label", "positives", "AP, model", "AP, TF-IDF", "difference", "F1, model",
                    "F1, TF-IDF"]  # fmt: skip
    pairs = {
        label: (values["average_precision"], values["baseline_average_precision"])
        for label, values in per_label.items()
    }
    differences = {label: ours - theirs for label, (ours, theirs) in pairs.items()}
    assert [differences[row[0]] for row in rows] == sorted(differences.values())
    for label, *cells in rows:
        values, (ours, theirs) = per_label[label], pairs[label]
        change = f"{ours - theirs:+.3f}".replace("-", "−")
        change = "0.000" if change[1:] == "0.000" else change
        shown_f1 = shown(values["f1"]), shown(values["baseline_f1"])
        assert cells == [str(values["support"]), shown(ours), shown(theirs), change, *shown_f1]


def test_the_labels_that_each_wins_are_counted(folders):
    """30 for the model, 2 level, 3 without positives, the 93 others for TF-IDF."""
    metrics, curves = read_json(folders, "metrics.json"), read_json(folders, "curves.json")
    for place, values in enumerate(metrics["per_label"].values()):
        ours = 0.6 if place < 30 else 0.5 if place < 32 else 0.4
        values |= {"average_precision": ours, "baseline_average_precision": 0.5}
        if place >= NUM_LABELS - 3:
            values |= {"average_precision": None, "baseline_average_precision": None}
    record = load_record(folders[1])
    page = Page(render(Material(folders[1], record, metrics, curves, [], None, {})))
    assert (
        "By average precision on test, the model is ahead on 30 of 125 labels, TF-IDF on 93 . "
        "Labels without positives there are left out."
    ) in " ".join(" ".join(page.texts).split())
    differences = [row[4] for row in page.tables["against-table"][1:]]
    assert differences == ["−0.100"] * 93 + ["0.000"] * 2 + ["+0.100"] * 30


def plot_of(html, name):
    """The Bokeh document of a plot, as JSON."""
    items = json.loads(Page(html).scripts[0])["plots"]
    (found,) = [item for item in items if item["target_id"] == name]
    return json.dumps(found)


def test_the_baseline_is_a_line_among_the_learning_curves(folders, written):
    """On the split that both were measured on; a head start is a point at the beginning."""
    measured = read_json(folders, "metrics.json")["baseline"]["on_calibration_split"]
    level, text = measured["mean_average_precision"], " ".join(Page(written[1]).texts)
    assert "TF-IDF, mean average precision" in text
    drawn = plot_of(written[1], "evaluations")
    assert f"[{level!r}, {level!r}]" in drawn and '"line_dash": [6]' in drawn
    assert "[0.1, 0.25, 0.5]" in drawn and "[0.0, 1.0, 2.0]" in drawn
    assert "line_dash" not in plot_of(written[1], "loss")


@pytest.mark.parametrize("case", ["other split", "other data", "no data", "no baseline"])
def test_the_line_is_not_drawn_from_other_documents(folders, case):
    metadata, record = load_metadata(folders[0]), load_record(folders[1])
    metrics, curves = read_json(folders, "metrics.json"), read_json(folders, "curves.json")
    history = report._read_history(folders[1])
    assert [row["step"] for row in history[:3]] == [0, 0, 1]

    def drawn():
        return render(Material(folders[1], record, metrics, curves, history, metadata, {}))

    assert "TF-IDF, mean average precision" in drawn()
    if case == "other split":
        record = dataclasses.replace(
            record, train=dataclasses.replace(record.train, eval_split="test")
        )
    elif case == "other data":
        record = dataclasses.replace(record, data_fingerprint="0" * 64)
    elif case == "no data":
        metadata = None
    else:
        metrics |= {"baseline": None}
    assert "TF-IDF, mean average precision" not in drawn()


def test_other_numbers_of_documents_are_said(folders):
    metadata, record = load_metadata(folders[0]), load_record(folders[1])
    metrics, curves = read_json(folders, "metrics.json"), read_json(folders, "curves.json")
    baseline = metrics["baseline"]
    metrics["baseline"] |= {"documents": 50, "train_documents": 60, "on_calibration_split": (
        baseline["on_calibration_split"] | {"documents": 40}
    )}  # fmt: skip
    history = report._read_history(folders[1])
    page = Page(render(Material(folders[1], record, metrics, curves, history, metadata, {})))
    text = " ".join(" ".join(page.texts).split())
    test, train, fitted = (metadata.split(s).documents for s in ("test", "train", "validation"))
    assert f"TF-IDF was measured on 50 documents, the model on {test}." in text
    assert f"from 60 of {train} training documents, measured on 50 documents." in text
    assert f"TF-IDF, mean average precision on 40 of {fitted} documents" in text


def test_a_second_report_is_the_same_and_fits_nothing(folders, written, capsys):
    report.run(ReportConfig(model_dir=folders[1], data_dir=folders[0]))
    assert "Fitting" not in capsys.readouterr().out
    # Bokeh numbers its models on and on within a process.
    with open(written[0], encoding="utf-8") as file:
        again, first = (re.sub(r'"p\d+"', '"p"', html) for html in (file.read(), written[1]))
    assert again == first


@pytest.fixture
def copy(folders, tmp_path):
    """Copies of both folders, to be spoilt."""
    data_dir, model_dir = (str(tmp_path / name) for name in ("data", "model"))
    shutil.copytree(folders[0], data_dir)
    shutil.copytree(folders[1], model_dir)
    if os.path.exists(os.path.join(model_dir, "report.html")):
        os.remove(os.path.join(model_dir, "report.html"))
    return data_dir, model_dir


def test_without_an_evaluation_the_command_to_run_is_named(copy):
    shutil.rmtree(os.path.join(copy[1], "evaluation"))
    with pytest.raises(UserError, match="metrics.json: not there.*run `multihot evaluate --model"):
        report.run(ReportConfig(model_dir=copy[1]))
    assert not os.path.exists(os.path.join(copy[1], "report.html"))


def test_an_evaluation_of_another_checkpoint_is_refused(copy):
    save_best(copy[1], load_record(copy[1]).model, seed=5, step=9)
    with pytest.raises(
        UserError, match=r"the evaluation is of checkpoint \w{12}, but the best one"
    ):
        report.run(ReportConfig(model_dir=copy[1]))


def test_other_data_is_refused(copy):
    path = os.path.join(copy[1], "evaluation", "metrics.json")
    with open(path, encoding="utf-8") as file:
        metrics = json.load(file)
    metrics["fingerprints"]["splits"]["test"] = "0" * 64
    with open(path, "w", encoding="utf-8") as file:
        json.dump(metrics, file)
    with pytest.raises(UserError, match="not the data that was evaluated .split 'test'"):
        report.run(ReportConfig(model_dir=copy[1], data_dir=copy[0]))


def test_without_its_data_the_report_goes_without_texts(copy, folders, monkeypatch, caplog):
    record = load_record(copy[1])
    gone = dataclasses.replace(record.train, data_dir="/nowhere/data")
    monkeypatch.setattr(report, "load_record", lambda _: dataclasses.replace(record, train=gone))
    with caplog.at_level(logging.WARNING):
        report.run(ReportConfig(model_dir=copy[1]))
    assert "/nowhere/data: not there any more" in caplog.text
    with open(os.path.join(copy[1], "report.html"), encoding="utf-8") as file:
        page = Page(file.read())
    assert "Without texts: the data folder was not there." in " ".join(page.texts)
    assert page.tables["headlines"][0] == ["metric", "this model", "TF-IDF", "frequencies"]
    with pytest.raises(UserError, match="no metadata.json"):
        report.run(ReportConfig(model_dir=copy[1], data_dir=str(copy[1])))


@pytest.mark.parametrize(
    "is_older, words",
    [
        (True, "There is no TF-IDF baseline: run multihot evaluate again for one."),
        (False, "There is no TF-IDF baseline: the evaluation was made without one."),
    ],
)
def test_an_evaluation_without_a_baseline_is_said(copy, is_older, words, caplog):
    """Of an older version, which has to be made again for it, or as its flag said."""
    path = os.path.join(copy[1], "evaluation", "metrics.json")
    with open(path, encoding="utf-8") as file:
        metrics = json.load(file)
    del metrics["baseline"]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(metrics if is_older else metrics | {"baseline": None}, file)
    with caplog.at_level(logging.WARNING):
        report.run(ReportConfig(model_dir=copy[1], data_dir=copy[0]))
    assert ("run `multihot evaluate` again for one" in caplog.text) is is_older
    with open(os.path.join(copy[1], "report.html"), encoding="utf-8") as file:
        page = Page(file.read())
    assert page.tables["headlines"][0] == ["metric", "this model", "frequencies"]
    assert "against-table" not in page.tables
    assert words in " ".join(" ".join(page.texts).split())


def test_4000_labels_are_all_in_the_table_and_the_commonest_have_curves(folders):
    """The page says which have curves, and stays small enough to open."""
    random = np.random.default_rng(0)
    probabilities = random.random((200, 4000), np.float32)
    truth = random.random((200, 4000)) < 0.02
    documents = CalibratedPredictions(
        [f"d{k}" for k in range(200)], np.arange(200), probabilities, probabilities, truth, 200
    )
    names = [f"label {k}" for k in range(4000)]
    metrics = read_json(folders, "metrics.json")
    columns = next(iter(metrics["per_label"].values()))
    metrics |= {"labels": 4000, "per_label": {name: columns for name in names}}
    curves = collect(documents, documents, np.full(4000, 0.99), names)
    html = render(Material(folders[1], load_record(folders[1]), metrics, curves, [], None, {}))
    page = Page(html)
    assert len(page.tables["label-table"]) == 4001
    text = " ".join(" ".join(page.texts).split())
    assert f"The {MAX_CURVE_LABELS} most frequent of 4,000 labels have curves." in text
    assert "The 30 most frequent of 4,000 labels." in text
    assert len(html) < 8_000_000


def test_long_names_and_ids_are_cut_in_the_page_and_whole_in_the_data(folders, written, tmp_path):
    """128 labels of 64 KiB each, and mistakes whose documents have ids as long."""
    names = [f"{place} " + "n" * (1 << 16) for place in range(NUM_LABELS)]
    metrics, curves = read_json(folders, "metrics.json"), read_json(folders, "curves.json")
    values = [metrics["per_label"][label] for label in curves["labels"]]
    metrics["per_label"] = dict(zip(names, values, strict=True))
    metrics["slices"]["source"]["values"]["v" * (1 << 16)] = next(
        iter(metrics["slices"]["source"]["values"].values())
    )
    curves["labels"] = names
    for mistake in itertools.chain.from_iterable(curves["mistakes"].values()):
        mistake["document"] = "i" * (1 << 16)
    metadata = load_metadata(folders[0])
    for found in metadata.checks["splits"].values():
        found["rare_labels"] = {"count": 20, "labels": names[:20]}
    record = load_record(folders[1])
    html = render(Material(folders[1], record, metrics, curves, [], metadata, {}))
    assert len(html) < len(written[1]) + 500_000
    page = Page(html)
    (_, *rows) = page.tables["label-table"]
    assert [row[0] for row in rows] == [shorten(name) for name in names]
    assert len(rows[0][0]) == 100 and rows[0][0].endswith("n...")
    assert max(map(len, page.texts)) < 20_000


def test_long_names_are_cut_on_the_terminal(folders, capsys):
    metrics = read_json(folders, "metrics.json")
    thresholds = np.full(NUM_LABELS, np.nan)
    columns = metrics | {"per_label": {"threshold": thresholds}}
    names = tuple(f"{place} " + "n" * (1 << 16) for place in range(NUM_LABELS))
    print_table({"test": columns}, {}, names)
    (line,) = [row for row in capsys.readouterr().out.splitlines() if "Never predicted" in row]
    assert "0 nnn" in line and "and 1" in line and len(line) < 2200
