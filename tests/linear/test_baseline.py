"""The TF-IDF baseline: scikit-learn's own pipeline, within its bounds, on the shards' tokens."""

import json

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

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


def test_logits_are_scikit_learns(data):
    """Of a plain pipeline in float64 by another solver."""
    random = np.random.default_rng(1)
    texts = [" ".join(map(str, random.integers(0, 30, 12))) for _ in range(400)]
    labels = np.array([["3" in text.split(), "4 5" in text, False] for text in texts])
    ours = count_features(token_pattern=r"\S+", dtype=np.float32)
    features = ours.fit_transform(texts[:300])
    logits = fit_logits(features, labels[:300], {"test": ours.transform(texts[300:])})["test"]
    theirs = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, token_pattern=r"\S+")
    rows = theirs.fit_transform(texts[:300])
    for index in range(2):
        model = LogisticRegression(C=10, solver="liblinear", intercept_scaling=100, tol=1e-8)
        model.fit(rows, labels[:300, index])
        expected = model.decision_function(theirs.transform(texts[300:]))
        assert np.abs(logits[:, index] - expected).max() < 0.02
    assert (logits[:, 2] == -20).all()


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


def test_words_that_tell_are_found(data):
    """Whether "w1" or "w2" occurs decides; the frequencies alone have an AP of 0.7."""
    data_dir, _ = data
    metadata = load_metadata(data_dir)
    parts = [read_documents(data_dir, metadata, "train", np.arange(k, 300, 3)) for k in range(3)]
    found = measure_baseline(*parts, ThresholdRule())
    assert (found["train_documents"], found["reported_documents"]) == (100, 100)
    assert found["metrics"]["mean_average_precision"] > 0.9
    assert found["fitted_labels"] == 2
    assert parts[2].labels.mean() == pytest.approx(0.7, abs=0.05)


def test_training_documents_without_a_common_token_are_said(data):
    metadata = load_metadata(data[0])
    one = read_documents(data[0], metadata, "train", np.arange(1))
    with pytest.raises(UserError, match="no token occurs in two of these training documents"):
        measure_baseline(one, one, one, ThresholdRule())
