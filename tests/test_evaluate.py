"""What evaluate writes is what its conventions and scikit-learn say, and fits on one split only."""

import dataclasses
import json
import logging
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from predicting import predict_split
from sklearn import metrics as peer

from trainer.data.metadata import Metadata, Shard, Split, load_metadata
from trainer.data.packing import choose_packing
from trainer.data.records import encode_record
from trainer.errors import UserError
from trainer.evaluate import run
from trainer.evaluation.calibration import Calibration, sigmoid
from trainer.evaluation.thresholds import ThresholdRule
from trainer.linear.baseline import find_baseline, trivial_metrics
from trainer.model.model import build_model
from trainer.model.predictor import Predictor
from trainer.model_config import ModelConfig
from trainer.run_config import EvaluateConfig, TrainConfig
from trainer.storage.filesystem import add_checksum, checksum
from trainer.training.checkpoint import Checkpoints, load_best
from trainer.training.run_record import RunRecord, start_record

LABELS = ("common", "usual", "rare", "absent")
RATES = (0.45, 0.2, 0.02, 0.0)
WEIGHTS = (1.0, 4.0, 30.0, 1.0)
VOCABULARY = 40
MAX_LENGTH = 24


def write_split(folder, name, documents, longest, seed):
    """Documents in which token 10 + k tells of label k, in one shard."""
    random = np.random.default_rng(seed)
    labels = random.random((documents, len(LABELS))) < RATES
    histogram = np.zeros(MAX_LENGTH + 1, int)
    path = os.path.join(folder, f"{name}.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for number, row in enumerate(labels):
            ids = random.integers(20, VOCABULARY, random.integers(3, longest - 4)).tolist()
            ids += [10 + k for k in np.flatnonzero(row)]
            ids = [2, *ids, 3]
            histogram[len(ids)] += 1
            positives = np.flatnonzero(row).tolist()
            # The first 52 values of a kept column are rarer than the others.
            source = f"few-{number}" if number < 52 else ("", "mail", "wéb")[number % 3]
            writer.write(encode_record(f"{name}-{number}", [ids], positives, [source]))
    shard = Shard(os.path.basename(path), documents, os.path.getsize(path), checksum(path))
    tokens = int(histogram @ np.arange(len(histogram)))
    counts = tuple(int(count) for count in labels.sum(axis=0))
    return Split(
        documents, tokens, 0, 0, counts, tuple(map(int, histogram)), (shard,),
        documents, (0, documents), int(labels.sum(axis=1).max()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data folder and a model folder with a best checkpoint; test documents may be longer."""
    data_dir = str(tmp_path_factory.mktemp("data"))
    model_dir = str(tmp_path_factory.mktemp("model"))
    splits = {
        "train": write_split(data_dir, "train", 400, 16, 0),
        "validation": write_split(data_dir, "validation", 300, 16, 1),
        "test": write_split(data_dir, "test", 250, MAX_LENGTH, 2),
        "empty": dataclasses.replace(write_split(data_dir, "empty", 1, 16, 3), documents=0),
    }
    Metadata(LABELS, MAX_LENGTH, VOCABULARY, "t" * 64, splits, {}, {}, ("source",)).save(data_dir)
    sizes = ModelConfig(
        VOCABULARY,
        len(LABELS),
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_LENGTH,
    )
    packing = choose_packing(splits["train"].length_histogram, 256)
    record = RunRecord(
        TrainConfig(data_dir=data_dir, model_dir=model_dir), sizes, packing, LABELS, WEIGHTS,
        (1.0,) * 4, True, MAX_LENGTH, 400, "d" * 64, "t" * 64, "float32", 1, {},
    )  # fmt: skip
    start_record(model_dir, record)
    model = build_model(sizes, seed=4)
    # An untrained encoder, but large weights in the head, so that documents differ.
    model.head.classifier.kernel.assign(model.head.classifier.kernel * 5.0)
    variables = {"model": model.named_variables()}
    checkpoints = Checkpoints(model_dir, variables, 1)
    checkpoints.save_best(7)
    checkpoints.close()
    return data_dir, model_dir


@pytest.fixture(scope="module")
def written(folders):
    """calibration.json and metrics.json, after one evaluation."""
    data_dir, model_dir = folders
    run(EvaluateConfig(model_dir=model_dir, data_dir=data_dir))
    folder = os.path.join(model_dir, "evaluation")
    names = ["baseline.json", "calibration.json", "curves.json", "metrics.json"]
    assert sorted(os.listdir(folder)) == names
    return [json.load(open(os.path.join(folder, name))) for name in (names[1], names[3])]


@pytest.fixture(scope="module")
def predictions(folders):
    data_dir, model_dir = folders
    best = load_best(model_dir)
    metadata = load_metadata(data_dir)
    packing = choose_packing(metadata.split("test").length_histogram, 256)
    predictor = Predictor(best.model, packing)
    return {
        name: predict_split(predictor, data_dir, metadata, name) for name in ("validation", "test")
    }


def test_metrics_json_equals_scikit_learn_on_the_calibrated_predictions(written, predictions):
    calibration, metrics = written
    test = predictions["test"]
    scale, shift = np.array(calibration["scale"]), np.array(calibration["shift"])
    thresholds = np.array([np.inf if t is None else t for t in calibration["thresholds"]])
    probabilities = Calibration(scale, shift).probabilities(test.logits)
    predicted = probabilities >= thresholds
    for average in ("micro", "macro"):
        expected = peer.precision_recall_fscore_support(
            test.labels, predicted, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            assert metrics[f"{average}_{name}"] == pytest.approx(value, abs=1e-6)
    present = [k for k in range(4) if test.labels[:, k].any()]
    precision = [peer.average_precision_score(test.labels[:, k], probabilities[:, k])
                 for k in present]  # fmt: skip
    areas = [peer.roc_auc_score(test.labels[:, k], probabilities[:, k]) for k in present]
    micro = peer.average_precision_score(test.labels, probabilities, average="micro")
    assert metrics["mean_average_precision"] == pytest.approx(np.mean(precision), abs=1e-5)
    assert metrics["macro_roc_auc"] == pytest.approx(np.mean(areas), abs=1e-5)
    assert metrics["micro_average_precision"] == pytest.approx(micro, abs=1e-5)
    assert (metrics["documents"], metrics["labels"]) == (250, 4)
    assert metrics["labels_without_positives"] == metrics["labels_of_one_class"] == 1
    assert metrics["per_label"]["absent"]["average_precision"] is None
    assert metrics["per_label"]["common"]["support"] == test.labels[:, 0].sum()
    assert metrics["per_label"]["common"]["threshold"] == calibration["thresholds"][0]


def test_both_files_name_the_checkpoint_they_belong_to(written, folders):
    fingerprint = load_best(folders[1]).fingerprint
    assert [values["fingerprints"]["checkpoint"] for values in written] == [fingerprint] * 2


def test_positive_weights_are_taken_back(written, predictions):
    """The raw sigmoid overstates by the weights; calibrated probabilities mean what they say."""
    calibration, metrics = written
    assert metrics["expected_calibration_error_before"] > 0.1
    assert metrics["expected_calibration_error"] < metrics["expected_calibration_error_before"] / 2
    validation = predictions["validation"]
    fit = Calibration(np.array(calibration["scale"]), np.array(calibration["shift"]))
    means = fit.probabilities(validation.logits).mean(axis=0)
    # Not exactly, for labels are pulled toward the global fit.
    np.testing.assert_allclose(means[:2], validation.labels.mean(axis=0)[:2], rtol=0.2)


def test_trivial_baseline_stands_beside(written, folders, predictions):
    _, metrics = written
    train = load_metadata(folders[0]).split("train")
    frequencies = np.array(train.label_counts) / train.documents
    labels = predictions["test"].labels
    # Constant scores: the average precision of a label is its share of the reported split.
    share = labels.mean(axis=0)
    trivial = metrics["trivial"]
    assert trivial["mean_average_precision"] == pytest.approx(share[share > 0].mean())
    assert trivial["macro_roc_auc"] == 0.5
    again = trivial_metrics(frequencies, predictions["validation"].labels, labels, ThresholdRule())
    assert again["micro_f1"] == pytest.approx(trivial["micro_f1"])
    # Where a constant is cut, all documents get the label: F1 = 2 s / (1 + s).
    assert again["per_label"]["f1"][0] == pytest.approx(2 * share[0] / (1 + share[0]))


def test_tfidf_stands_beside_with_the_models_names(written, folders):
    """A token tells each label, which 400 documents teach a linear model, and not this encoder."""
    _, metrics = written
    baseline, labels = metrics["baseline"], metrics["per_label"]
    names = {name for name, value in metrics.items() if isinstance(value, float)}
    assert names <= set(baseline) and names <= set(baseline["on_calibration_split"])
    assert (baseline["documents"], baseline["on_calibration_split"]["documents"]) == (250, 300)
    assert baseline["train_documents"] == baseline["train_split_documents"] == 400
    assert baseline["mean_average_precision"] > 0.95 > 0.6 > metrics["mean_average_precision"]
    precision = [labels[label]["baseline_average_precision"] for label in LABELS]
    assert np.mean(precision[:3]) == pytest.approx(baseline["mean_average_precision"])
    assert precision[3] is None
    f1 = [labels[label]["baseline_f1"] for label in LABELS]
    assert np.mean(f1) == pytest.approx(baseline["macro_f1"])


@pytest.fixture
def copy(folders, tmp_path):
    """The data folder, and a copy of the model folder without an evaluation."""
    model_dir = str(tmp_path / "model")
    shutil.copytree(folders[1], model_dir, ignore=shutil.ignore_patterns("evaluation"))
    return folders[0], model_dir


def test_the_table_has_tfidf_and_the_line_after_it_says_who_is_ahead(copy, capsys):
    _, metrics = evaluate_again(copy)
    lines = capsys.readouterr().out.splitlines()
    (head,) = [number for number, line in enumerate(lines) if "test, TF-IDF" in line]
    assert lines[head].split("  ")[-1] == "95 % interval"
    ends = [lines[head].index(title) + len(title) for title in ("  test", "test, TF-IDF")]
    row = next(line for line in lines if line.startswith("mean_average_precision"))
    values = [row[end - 6 : end] for end in ends]
    sources = metrics, metrics["baseline"]
    assert values == [f"{source['mean_average_precision']:.4f}" for source in sources]
    assert lines[-2].startswith(
        "TF-IDF with logistic regression is ahead of the model on mean_average_precision "
        f"({values[1]} against {values[0]}), micro_f1 ("
    )
    assert lines[-2].endswith(
        ": train in another --model_dir with --wide=wordpieces, more epochs than "
        "--num_train_epochs=3 or --init_checkpoint, a pretrained BERT, on data prepared with its "
        "tokenizer."
    )


def find_again(copy, capsys, **options):
    """The baseline, what is kept of it, and whether it was fitted."""
    folder = os.path.join(copy[1], "evaluation")
    os.makedirs(folder, exist_ok=True)
    config = EvaluateConfig(model_dir=copy[1], data_dir=copy[0], **options)
    found = find_baseline(config, load_metadata(copy[0]))
    with open(os.path.join(folder, "baseline.json"), "rb") as file:
        return found, file.read(), "Fitting TF-IDF" in capsys.readouterr().out


def test_the_baseline_is_fitted_once_for_the_same_settings(copy, capsys):
    first, content, is_fitted = find_again(copy, capsys)
    assert is_fitted
    assert find_again(copy, capsys) == (first, content, False)
    assert find_again(copy, capsys, resamples=0) == (first, content, False)
    for options in (
        dict(baseline_documents=50), dict(calibrate="none"), dict(threshold_for="f1"),
        dict(min_support=3), dict(thresholds="global"), dict(split="train"),
    ):  # fmt: skip
        found, _, is_fitted = find_again(copy, capsys, **options)
        assert is_fitted, options
        if "baseline_documents" in options:
            assert (found["train_documents"], found["train_split_documents"]) == (50, 400)
            assert found["metrics"]["documents"] == 50
    assert find_again(copy, capsys)[:2] == (first, content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: kept["metrics"].update(mean_average_precision=0.99),
        lambda kept: kept.update(add_checksum(unsealed(kept) | {"per_label": {}})),
        lambda kept: kept["per_label"]["f1"].pop() and kept.update(add_checksum(unsealed(kept))),
        lambda kept: kept.clear(),
    ],
)
def test_a_kept_baseline_that_is_damaged_is_fitted_again(copy, damage, capsys):
    expected = find_again(copy, capsys)[0]
    path = os.path.join(copy[1], "evaluation", "baseline.json")
    with open(path) as file:
        kept = json.load(file)
    damage(kept)
    with open(path, "w") as file:
        json.dump(kept, file)
    assert find_again(copy, capsys)[::2] == (expected, True)


def unsealed(values):
    return {name: value for name, value in values.items() if name != "sha256"}


def test_no_documents_for_the_baseline_leave_it_out(copy, capsys):
    _, metrics = evaluate_again(copy, baseline_documents=0, resamples=0)
    assert metrics["baseline"] is None and "baseline_f1" not in metrics["per_label"]["common"]
    assert "TF-IDF" not in capsys.readouterr().out
    assert not os.path.exists(os.path.join(copy[1], "evaluation", "baseline.json"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda splits: splits.pop("train"), "no split 'train', so no TF-IDF baseline"),
        (
            lambda splits: splits.update(train=splits["empty"]),
            "no token occurs in two of 0 training documents, so there is no TF-IDF baseline",
        ),
        (
            lambda splits: splits.update(
                train=dataclasses.replace(
                    splits["train"],
                    shards=(dataclasses.replace(splits["train"].shards[0], name="gone"),),
                )
            ),
            "gone: missing",
        ),
    ],
)
def test_without_training_documents_there_is_a_line_and_no_baseline(
    copy, tmp_path, change, message, caplog, capsys
):
    """The model is evaluated all the same."""
    data_dir = str(tmp_path / "data")
    shutil.copytree(copy[0], data_dir)
    metadata = load_metadata(data_dir)
    splits = dict(metadata.splits)
    change(splits)
    dataclasses.replace(metadata, splits=splits).save(data_dir)
    with caplog.at_level(logging.WARNING):
        _, metrics = evaluate_again((data_dir, copy[1]), resamples=0)
    (line,) = [line for line in caplog.messages if "TF-IDF" in line or "gone" in line]
    assert line.startswith(data_dir) and message in line and "\n" not in line
    assert metrics["baseline"] is None and metrics["documents"] == 250
    assert "test, TF-IDF" not in capsys.readouterr().out


def test_fitted_on_the_calibration_split_alone(folders, written):
    """Other reported documents, same calibration and thresholds."""
    data_dir, model_dir = folders
    run(EvaluateConfig(model_dir=model_dir, data_dir=data_dir, split="train"))
    path = os.path.join(model_dir, "evaluation", "calibration.json")
    with open(path) as file:
        again = json.load(file)
    for name in ("scale", "shift", "thresholds"):
        np.testing.assert_allclose(again[name], written[0][name], rtol=1e-4)
    assert (
        again["fingerprints"]["splits"]["validation"]
        == (written[0]["fingerprints"]["splits"]["validation"])
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(calibration_split="test"), "--calibration_split=test is --split too"),
        (dict(calibration_split="train"), "the model has seen it"),
        (dict(split="holdout"), "no split 'holdout'"),
        (dict(split="empty"), "--split=empty: the split has no documents"),
        (dict(model_dir="/nowhere"), "no config.json"),
        (dict(data_dir="/nowhere"), "no metadata.json"),
    ],
)
def test_mistakes_are_one_clear_line(folders, options, message):
    data_dir, model_dir = folders
    with pytest.raises(UserError) as error:
        run(EvaluateConfig(**({"model_dir": model_dir, "data_dir": data_dir} | options)))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(labels=("common", "usual", "seldom", "absent")), "label 2 is 'seldom'"),
        (dict(labels=LABELS[:3]), "3 labels, expected 4"),
        (dict(tokenizer_fingerprint="u" * 64), "tokenizer uuuuuuuuuuuu, but"),
        (dict(max_seq_length=64), "takes 24 tokens"),
    ],
)
def test_data_of_another_model_is_refused(folders, tmp_path, changes, message):
    data_dir, model_dir = folders
    metadata = dataclasses.replace(load_metadata(data_dir), **changes)
    count = len(metadata.labels)
    splits = {
        name: dataclasses.replace(
            split,
            label_counts=split.label_counts[:count],
            max_labels_per_document=min(split.max_labels_per_document, count),
        )
        for name, split in metadata.splits.items()
    }
    dataclasses.replace(metadata, splits=splits).save(str(tmp_path))
    with pytest.raises(UserError) as error:
        run(EvaluateConfig(model_dir=model_dir, data_dir=str(tmp_path)))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_raw_probabilities_are_the_plain_sigmoid(written, predictions):
    """The error `before` is that of sigmoid(logit), weights and all."""
    _, metrics = written
    test = predictions["test"]
    probabilities, labels = sigmoid(test.logits[:, 0]), test.labels[:, 0]
    order = np.argsort(probabilities)
    gaps = [abs((probabilities[b] - labels[b]).sum()) for b in np.array_split(order, 10)]
    value = metrics["per_label"]["common"]["expected_calibration_error_before"]
    assert value == pytest.approx(sum(gaps) / len(labels), abs=1e-4)


def evaluate_again(folders, **options):
    """calibration.json and metrics.json of another evaluation."""
    data_dir, model_dir = folders
    run(EvaluateConfig(model_dir=model_dir, data_dir=data_dir, **options))
    folder = os.path.join(model_dir, "evaluation")
    contents = []
    for name in ("calibration.json", "metrics.json"):
        with open(os.path.join(folder, name)) as file:
            contents.append(json.load(file))
    return contents


def test_streamed_in_bins_within_the_stated_bounds(folders):
    """Without memory for exact metrics: what is binned is off by no more than metrics.json says,
    what is counted is exact. Without a fit, only the weights are taken back, in either way."""
    exact_calibration, exact = evaluate_again(folders, calibrate="none")
    calibration, binned = evaluate_again(folders, calibrate="none", exact_memory=0.0)
    assert exact["method"] == "exact" and binned["method"].startswith("binned: log-odds")
    for values in (exact_calibration, calibration):
        assert values["scale"] == [1, 1, 1, 1]
        np.testing.assert_allclose(values["shift"], -np.log(WEIGHTS))
    bounds = binned["error_bounds"]
    assert len(bounds) == 12
    for name, bound in bounds.items():
        assert abs(binned[name] - exact[name]) <= bound + 1e-9, name
    assert bounds["log_loss"] < 0.002 and bounds["brier_score_before"] < 0.001
    for name in ("ndcg_at_3", "precision_at_1", "label_ranking_average_precision"):
        assert binned[name] == pytest.approx(exact[name]), name
    # All of the test split is in the sample here, so that slices and intervals are whole.
    assert binned["slices"]["source"]["values"]["mail"]["documents"] == 66
    row, exact_row = (values["per_label"]["common"] for values in (binned, exact))
    fitted, best = row["f1_on_calibration_split"], exact_row["f1_on_calibration_split"]
    assert best - row["threshold_shortfall"] - 1e-9 <= fitted <= best + 1e-9
    assert binned["documents"] == 250 and binned["never_predicted"] == []


def test_intervals_hold_the_value(written):
    _, metrics = written
    assert metrics["intervals_of"] == {"level": 0.95, "resamples": 1000, "documents": 250}
    for name, (low, high) in metrics["intervals"].items():
        assert low < metrics[name] < high < low + 0.25, name


def test_slices_by_value_of_a_kept_column(written, predictions):
    calibration, metrics = written
    test = predictions["test"]
    table = metrics["slices"]["source"]
    values = test.slices[:, 0]
    assert list(table["values"])[:3] == ["", "mail", "wéb"]
    assert len(table["values"]) == 50
    assert table["rest"]["num_values"] == 55 - 50 and table["rest"]["documents"] == 5
    fit = Calibration(np.array(calibration["scale"]), np.array(calibration["shift"]))
    thresholds = np.array(calibration["thresholds"], float)
    mine = values == "mail"
    truth, predicted = test.labels[mine], (fit.probabilities(test.logits) >= thresholds)[mine]
    found = table["values"]["mail"]
    assert found["documents"] == mine.sum()
    assert found["micro_f1"] == pytest.approx(peer.f1_score(truth, predicted, average="micro"))
    present = truth.any(axis=0)
    scores = peer.f1_score(truth, predicted, average=None, zero_division=0)
    assert found["macro_f1"] == pytest.approx(scores[present].mean())
    assert found["labels_present"] == present.sum()
    precision = [
        peer.average_precision_score(truth[:, k], fit.probabilities(test.logits)[mine, k])
        for k in np.flatnonzero(present)
    ]
    assert found["mean_average_precision"] == pytest.approx(np.mean(precision))


def test_out_of_reach_is_never_predicted_and_listed(folders, capsys):
    """An untrained encoder reaches no precision of 0.999 on these labels."""
    calibration, metrics = evaluate_again(folders, threshold_for="precision:0.999")
    assert calibration["thresholds"][1] is None
    assert "usual" in metrics["never_predicted"]
    assert metrics["per_label"]["usual"]["predicted"] == 0
    assert "Never predicted: " in capsys.readouterr().out
    met = [row["precision_on_calibration_split"] for row in metrics["per_label"].values()
           if row["support_on_calibration_split"] >= 10
           and row["threshold"] is not None]  # fmt: skip
    assert all(precision >= 0.999 for precision in met)


@pytest.mark.parametrize("value", ["f1:0.5", "precision", "recall:0", "precision:1.5", "auc:0.5"])
def test_threshold_targets_are_checked(value):
    with pytest.raises(
        UserError, match="--threshold_for=.*expected overall_f1, f1, precision:P or recall:R"
    ):
        EvaluateConfig(model_dir="m", data_dir="d", threshold_for=value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1), ({"threshold_for": "f1"}, 10), ({"threshold_for": "recall:0.5"}, 10),
        ({"min_support": 4}, 4), ({"min_support": 4, "threshold_for": "f1"}, 4),
    ],
)  # fmt: skip
def test_only_the_blend_with_probabilities_cuts_labels_with_one_positive(options, expected):
    config = EvaluateConfig(model_dir="m", data_dir="d", **options)
    assert config.own_min_support == expected
    assert ThresholdRule.of(config).min_support == expected
