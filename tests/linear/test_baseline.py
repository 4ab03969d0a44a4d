"""The TF-IDF baseline: scikit-learn's own pipeline, within its bounds, on the shards' tokens."""

import json

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from sklearn.pipeline import make_pipeline

from trainer import prepare
from trainer.config import PrepareConfig
from trainer.data.metadata import load_metadata
from trainer.data.records import leading_places, read_documents
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.evaluation.thresholds import ThresholdRule
from trainer.linear.baseline import count_features, fit_logits, measure_baseline


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """300 numbered documents of 30 to 89 numbered words, in overlapping windows of 32 tokens."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    with open(folder / "corpus.jsonl", "w") as file:
        for number in range(300):
            words = random.integers(0, 50, 30 + number % 60)
            labels = [name for name, word in (("a", 1), ("b", 2)) if word in words]
            text = " ".join(f"w{word}" for word in words)
            file.write(json.dumps({"id": str(number), "text": text, "labels": labels}) + "\n")
    data_dir = str(folder / "data")
    prepare.run(
        PrepareConfig(
            input=(str(folder / "corpus.jsonl"),), data_dir=data_dir, vocab_size=300,
            max_seq_length=32, max_windows=9, window_stride=11, num_shards=3, num_workers=1,
            split="train",
        )
    )  # fmt: skip
    texts = {}
    for line in open(folder / "corpus.jsonl"):
        row = json.loads(line)
        texts[row["id"]] = (row["text"], set(row["labels"]))
    return data_dir, texts


def test_documents_read_back_are_whole_and_in_place(data):
    """What overlapping windows share is joined once, and places are those of the reading order."""
    data_dir, texts = data
    metadata = load_metadata(data_dir)
    everything = read_documents(data_dir, metadata, "train", np.arange(300))
    assert sorted(everything.ids, key=int) == [str(number) for number in range(300)]
    backend = load_tokenizer(f"{data_dir}/tokenizer").backend
    for name, tokens, labels in zip(
        everything.ids, everything.tokens, everything.labels, strict=True
    ):
        text, names = texts[name]
        assert tokens.tolist() == backend.encode(text, add_special_tokens=False).ids
        assert {metadata.labels[k] for k in np.flatnonzero(labels)} == names
    places = np.array([0, 7, 99, 100, 101, 250, 299])
    some = read_documents(data_dir, metadata, "train", places)
    assert some.ids == [everything.ids[place] for place in places]
    assert (some.labels == everything.labels[places]).all()
    assert read_documents(data_dir, metadata, "train", np.arange(0)).ids == []


def test_a_bounded_read_takes_the_head_of_every_shard(data):
    metadata = load_metadata(data[0])
    split = metadata.split("train")
    places = leading_places(split, 31)
    sizes = [shard.documents for shard in split.shards]
    starts = np.cumsum([0, *sizes])
    taken = [np.sum((places >= a) & (places < b)) for a, b in zip(starts, starts[1:], strict=False)]
    assert len(places) == 31 and min(taken) >= 10 and max(taken) <= 11
    for start, count in zip(starts, taken, strict=False):
        assert set(range(start, start + count)) <= set(places.tolist())
    assert leading_places(split, 300).tolist() == list(range(300))


def test_a_shard_that_is_missing_is_named(data, tmp_path):
    metadata = load_metadata(data[0])
    with pytest.raises(UserError, match=r"train-00000-of-00003.tfrecord: missing, but metadata"):
        read_documents(str(tmp_path), metadata, "train", np.arange(3))


def test_logits_are_scikit_learns():
    """Of a plain pipeline in float64 by another solver, for 150 labels, more than are fitted at
    once, of frequencies from 1 % to 60 %; the last one never occurs."""
    random = np.random.default_rng(1)
    words = random.integers(0, 150, (500, 12)) * random.integers(0, 2, (500, 12))
    texts = [" ".join(map(str, row)) for row in words]
    labels = np.array([[k in row for k in range(149)] + [False] for row in words])
    flips = random.random(labels.shape) < 0.01
    flips[:, -1] = False
    labels ^= flips
    ours = count_features(token_pattern=r"\S+", dtype=np.float32)
    features = ours.fit_transform(texts[:400])
    logits = fit_logits(features, labels[:400], {"test": ours.transform(texts[400:])})["test"]
    theirs = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, token_pattern=r"\S+")
    rows = theirs.fit_transform(texts[:400])
    assert logits.shape == (100, 150) and logits.dtype == np.float32
    for index in range(0, 149, 4):
        model = LogisticRegression(C=10, solver="newton-cg", tol=1e-8)
        model.fit(rows, labels[:400, index])
        expected = model.decision_function(theirs.transform(texts[400:]))
        assert np.abs(logits[:, index] - expected).max() < 0.01
        assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits[:, -1], np.log(0.5 / 400.5), rtol=1e-6)


def test_labels_beyond_the_bound_get_their_frequency():
    random = np.random.default_rng(2)
    labels = random.random((200, 4)) < [0.5, 0.1, 0.4, 0.2]
    features = count_features().fit_transform(["aa bb", "aa cc"] * 100)
    logits = fit_logits(features, labels, {"x": features}, max_labels=2)["x"]
    counts = labels.sum(axis=0)
    for index in (1, 3):
        frequency = (counts[index] + 0.5) / 201
        assert np.allclose(1 / (1 + np.exp(-logits[:, index])), frequency)
    assert np.ptp(logits[:, 0]) > 0 and np.ptp(logits[:, 2]) > 0


def read_parts(data_dir):
    """Each third document of the split, as training, calibration and reported ones."""
    metadata = load_metadata(data_dir)
    return [read_documents(data_dir, metadata, "train", np.arange(k, 300, 3)) for k in range(3)]


def test_words_that_tell_are_found(data):
    """Whether "w1" or "w2" occurs decides; the frequencies alone have an AP of 0.7."""
    parts = read_parts(data[0])
    found = measure_baseline(*parts, ThresholdRule())
    assert (found["train_documents"], found["metrics"]["documents"]) == (100, 100)
    assert found["metrics"]["mean_average_precision"] > 0.9
    assert found["fitted_labels"] == 2
    assert parts[2].labels.mean() == pytest.approx(0.7, abs=0.05)


def test_metrics_are_scikit_learns_of_its_own_pipeline(data):
    """Average precision of the pipeline, which a calibration of each label does not change, on both
    splits; and F1 at a threshold that is the best one on the calibration split."""
    parts = read_parts(data[0])
    found = measure_baseline(*parts, ThresholdRule())
    texts = [[" ".join(map(str, row)) for row in part.tokens] for part in parts]
    pipeline = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, token_pattern=r"\S+"),
        LogisticRegression(C=10, tol=1e-8, solver="newton-cg"),
    )
    precision, reached = np.zeros((2, 2)), []
    for label in range(2):
        pipeline.fit(texts[0], parts[0].labels[:, label])
        scores = [pipeline.decision_function(rows) for rows in texts[1:]]
        truth = [part.labels[:, label] for part in parts[1:]]
        precision[label] = list(map(average_precision_score, truth, scores))
        best = max(scores[0], key=lambda cut: f1_score(truth[0], scores[0] >= cut))
        reached.append([f1_score(y, z >= best) for y, z in zip(truth, scores, strict=True)])
    fitted, reported = precision.T
    assert found["per_label"]["average_precision"] == pytest.approx(reported, abs=1e-3)
    assert found["metrics"]["mean_average_precision"] == pytest.approx(reported.mean(), abs=1e-3)
    on_fitted = found["on_calibration_split"]
    assert on_fitted["mean_average_precision"] == pytest.approx(fitted.mean(), abs=1e-3)
    assert on_fitted["macro_f1"] == pytest.approx(np.mean(reached, axis=0)[0], abs=1e-6)
    assert found["per_label"]["f1"] == pytest.approx(np.array(reached)[:, 1], abs=0.02)


def test_it_is_calibrated_as_the_model_is(data):
    """The penalty makes the plain sigmoid too timid; a fit on other documents takes that back."""
    parts = read_parts(data[0])
    raw, calibrated = (
        measure_baseline(*parts, ThresholdRule(), mode)["metrics"] for mode in ("none", "labels")
    )
    assert raw["log_loss"] == pytest.approx(calibrated["log_loss_before"])
    assert calibrated["log_loss"] < raw["log_loss"]
    assert calibrated["mean_average_precision"] == raw["mean_average_precision"]


def test_training_documents_without_a_common_token_are_said(data):
    metadata = load_metadata(data[0])
    one = read_documents(data[0], metadata, "train", np.arange(1))
    with pytest.raises(UserError, match="no token occurs in two of 1 training documents"):
        measure_baseline(one, one, one, ThresholdRule())
