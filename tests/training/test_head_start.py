"""The start of a run: its fits against scikit-learn's, on any devices, and whatever kills it."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
from killing import run_to_the_end, stages
from predicting import predict_split
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_replicas import mirrored
from test_train import assert_same_run, flags_of, rows_of

from trainer import model_config, prepare
from trainer.config import PrepareConfig
from trainer.data.metadata import load_metadata
from trainer.data.records import read_documents
from trainer.data.tokenizer import load_tokenizer
from trainer.evaluation.measurement import concatenate
from trainer.linear.selected_fit import TERM_STRENGTHS
from trainer.linear.term_features import count_terms, inverse_frequencies, weigh_terms
from trainer.model.model import build_model
from trainer.model.predictor import Predictor
from trainer.model.pretrained import from_variables
from trainer.model_config import ModelConfig, OptimizerConfig
from trainer.run_config import TrainConfig
from trainer.training import setup
from trainer.training.head_start import find_head_start

WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in "aeiou"]
LABELS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """300 documents of 5 to 50 words in windows of 16 tokens; words tell of three labels."""
    folder = tmp_path_factory.mktemp("start")
    random = np.random.default_rng(0)
    rows = []
    for number in range(300):
        words = random.choice(WORDS, int(random.integers(5, 50))).tolist()
        labels = [
            label for label, word in zip(LABELS, WORDS, strict=False)
            if words.count(word) + 0.7 * random.normal() > 0.9
        ]  # fmt: skip
        rows.append({"id": str(number), "text": " ".join(words), "labels": labels})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.run(
        PrepareConfig(
            input=(str(folder / "rows.jsonl"),), data_dir=str(folder / "data"), vocab_size=256,
            max_seq_length=16, max_windows=8, window_stride=10, num_shards=2, num_workers=1,
            split="train:0.7,validation:0.3",
        )
    )  # fmt: skip
    return str(folder / "data")


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory) -> str:
    """The folder of a BERT with random weights and the data's tokenizer."""
    folder = str(tmp_path_factory.mktemp("checkpoint") / "bert")
    shutil.copytree(os.path.join(data, "tokenizer"), folder)
    sizes = ModelConfig(
        load_metadata(data).vocab_size, 1, hidden_size=16, num_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    values = {name: v.numpy() for name, v in build_model(sizes, seed=5).named_variables().items()}
    save_file(from_variables(values, sizes), os.path.join(folder, "model.safetensors"))
    names = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
             "max_position_embeddings", "type_vocab_size", "hidden_act")  # fmt: skip
    described = {name: getattr(sizes, name) for name in names}
    described |= {"model_type": "bert", "num_hidden_layers": 1}
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(described, file)
    return folder


def split_size(data):
    return load_metadata(data).split("train").documents


def config_of(data, model_dir, **changes):
    values = {
        "data_dir": data, "model_dir": str(model_dir), "tokens_per_replica": 512,
        "jit_compile": "false", "progress": "none", "hidden_size": 16, "num_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    return TrainConfig(**values | changes)


class Started:
    """A run's model as it is before the first step."""

    def __init__(self, config, strategy=None):
        self.strategy = strategy or tf.distribute.OneDeviceStrategy("/cpu:0")
        self.metadata = load_metadata(config.data_dir)
        sizes, values = setup.choose_model(config, self.metadata)
        packing = setup.choose_run_packing(config, self.metadata)
        self.record = setup.make_record(config, self.metadata, sizes, packing, self.strategy)
        split = self.metadata.split("train")
        step = setup.build_step(
            self.record, (split.label_counts, split.documents), values, self.strategy, False
        )
        self.model = step.model
        self.before = {name: v.numpy() for name, v in self.model.named_variables().items()}
        self.start = find_head_start(self.record, self.metadata, self.model, self.strategy)
        setup.assign_values(self.model, self.start.values)

    def predict(self, function, max_documents=None):
        """What a function of the model gives for the training documents, in their order."""
        predictor = Predictor(function, self.record.packing, self.strategy)
        data_dir = self.record.train.data_dir
        if max_documents is None:
            return predict_split(predictor, data_dir, self.metadata, "train")
        blocks = predictor.predict_blocks(data_dir, self.metadata, "train", max_documents)
        return concatenate(list(blocks))

    def documents(self, count=None):
        """The first training documents, as the model sees them."""
        places = np.arange(count or self.metadata.split("train").documents)
        data_dir = self.record.train.data_dir
        return read_documents(data_dir, self.metadata, "train", places)

    def terms(self, documents):
        """The documents' features, and the idf of each term."""
        sizes = self.record.model
        counts = count_terms(documents.windows, sizes.vocab_size, sizes.wide_pairs)
        tokenizer = load_tokenizer(os.path.join(self.record.train.data_dir, "tokenizer"))
        special = tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id
        idf = inverse_frequencies(counts, special)
        assert not idf[list(special)].any() and sizes.wide_pairs
        return weigh_terms(counts, idf), idf


def reference_logits(vectors, labels, strength):
    """scikit-learn's logits of the vectors that it is fitted to, float64."""
    exact = vectors.astype(np.float64)
    fits = [
        make_pipeline(
            StandardScaler(), LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
        ).fit(exact, column)
        for column in labels.T
    ]
    return np.stack([fit.decision_function(exact) for fit in fits], axis=1)


@pytest.mark.parametrize(
    ("head", "pooling"),
    [("mean", "max"), ("mean", "attention"), ("cls", "mean"), ("label_attention", "max")],
)
def test_the_heads_first_logits_are_a_regression_on_the_documents_vectors(
    head, pooling, data, checkpoint, tmp_path
):
    config = config_of(
        data, tmp_path, init_checkpoint=checkpoint, head=head, window_pooling=pooling
    )
    started = Started(config)
    model, fit = started.model, started.start.fits["vectors"]
    vectors = started.predict(model.document_vectors)
    assert vectors.logits.shape == (split_size(data), 16) and started.metadata.max_windows > 3
    found = started.predict(model.head_logits).logits
    expected = reference_logits(vectors.logits, vectors.labels, fit.inverse_strength)
    assert np.ptp(expected, axis=0).min() > 0.05
    np.testing.assert_allclose(found, expected, atol=0.01)
    np.testing.assert_allclose(found, fit.model.logits(vectors.logits), atol=1e-4)
    if head == "label_attention":
        assert started.before["head/query/kernel"].any()
        assert not model.named_variables()["head/query/kernel"].numpy().any()


def test_the_wide_parts_first_logits_are_a_regression_on_tf_idf(data, checkpoint, tmp_path):
    started = Started(config_of(data, tmp_path, init_checkpoint=checkpoint))
    documents, fit = started.documents(), started.start.fits["terms"]
    features, _ = started.terms(documents)
    of_parts = started.predict(started.model.logits_of_parts)
    np.testing.assert_array_equal(of_parts.labels, documents.labels)
    assert fit.inverse_strength in TERM_STRENGTHS
    exact = features.astype(np.float64)
    for label, column in enumerate(documents.labels.T):
        reference = LogisticRegression(C=fit.inverse_strength, tol=1e-10, max_iter=10_000)
        expected = reference.fit(exact, column).decision_function(exact)
        assert np.ptp(expected) > 0.3
        np.testing.assert_allclose(of_parts.logits[:, len(LABELS) + label], expected, atol=0.02)


def test_of_many_parameters_the_wide_part_has_two_tables(data, tmp_path, monkeypatch):
    """The first is the axes of the features' singular value decomposition."""
    monkeypatch.setattr(model_config, "MAX_WIDE_PARAMETERS", 1)
    monkeypatch.setattr(model_config, "WIDE_RANK", 12)
    started = Started(config_of(data, tmp_path))
    documents, fit = started.documents(), started.start.fits["terms"]
    features = started.terms(documents)[0].toarray()
    terms = started.start.values["wide/terms"]
    assert terms.shape == (started.record.model.num_wide_terms, 12)
    np.testing.assert_allclose(terms.T @ terms, np.eye(12), atol=1e-4)
    best = np.linalg.svd(features, compute_uv=False)[:12]
    assert np.linalg.norm(features @ terms) > 0.99 * np.linalg.norm(best)
    of_wide = started.predict(started.model.logits_of_parts).logits[:, len(LABELS) :]
    np.testing.assert_allclose(of_wide, fit.model.logits(features @ terms), atol=1e-4)


def test_weights_of_positives_shift_the_biases_by_their_logarithm(data, checkpoint, tmp_path):
    starts = [
        Started(config_of(data, tmp_path, init_checkpoint=checkpoint, pos_weight=pos_weight))
        for pos_weight in ("none", "balanced")
    ]
    plain, weighted = (started.start.values for started in starts)
    shift = np.log(starts[1].record.pos_weights)
    assert shift.min() > 0.3 and set(plain) == set(weighted)
    for name, value in plain.items():
        expected = value + shift if name.endswith("bias") else value
        np.testing.assert_allclose(weighted[name], expected, atol=1e-5, err_msg=name)


def test_a_random_head_and_an_encoder_from_scratch_leave_the_head_alone(data, checkpoint, tmp_path):
    wide = {"wide/idf", "wide/kernel", "wide/bias"}
    head = {"head/classifier/kernel", "head/classifier/bias"}
    fitted = {"vectors": head, "terms": wide}
    for changes, expected in (
        ({"init_checkpoint": checkpoint, "head_start": "random"}, wide),
        ({}, wide),
        ({"init_checkpoint": checkpoint, "wide": "none"}, head),
        ({"init_checkpoint": checkpoint, "head_start": "random", "wide": "none"}, set()),
        ({"wide": "none"}, set()),
    ):
        started = Started(config_of(data, tmp_path, **changes))
        assert set(started.start.values) == expected
        assert set(started.start.fits) == {name for name in fitted if fitted[name] & expected}
        for name, variable in started.model.named_variables().items():
            if name not in expected:
                np.testing.assert_array_equal(variable, started.before[name], err_msg=name)


def test_fewer_documents_than_the_split_has_are_its_first(data, checkpoint, tmp_path):
    config = config_of(data, tmp_path, init_checkpoint=checkpoint, head_start_documents=90)
    started = Started(config)
    size = split_size(data)
    for count in (1, 90, size - 1, size, 1000):
        indices = started.predict(started.model.document_vectors, count).indices
        assert indices.tolist() == list(range(min(count, size)))
    assert started.start.documents == 90
    vectors, documents = started.predict(started.model.document_vectors), started.documents(90)
    np.testing.assert_array_equal(vectors.labels[:90], documents.labels)
    strength = started.start.fits["vectors"].inverse_strength
    expected = reference_logits(vectors.logits[:90], documents.labels, strength)
    found = started.predict(started.model.head_logits).logits[:90]
    np.testing.assert_allclose(found, expected, atol=0.01)
    np.testing.assert_array_equal(started.start.values["wide/idf"], started.terms(documents)[1])


def test_four_replicas_start_as_one(data, checkpoint, tmp_path):
    config = config_of(data, tmp_path, init_checkpoint=checkpoint)
    one, four = Started(config), Started(config, mirrored(4))
    assert four.strategy.num_replicas_in_sync == 4
    assert set(four.start.values) == set(one.start.values) and len(one.start.values) == 5
    for name, value in one.start.values.items():
        np.testing.assert_allclose(four.start.values[name], value, atol=1e-4, err_msg=name)
    for name, fit in one.start.fits.items():
        assert four.start.fits[name].inverse_strength == fit.inverse_strength


# Kills the process at the call of a method of that number, before anything of it is done.
KILL = """
import os, signal
from trainer.training import checkpoint, head_start, selection
kind, name, calls = {moment}
original = getattr(kind, name)
def counted(*arguments, **named):
    global calls
    calls -= 1
    if not calls:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **named)
setattr(kind, name, counted)
"""
MOMENTS = {
    "in the fit": '(head_start, "fit_vectors", 1)',
    "before its checkpoint": '(checkpoint.Checkpoints, "save", 1)',
    "in a later evaluation": '(selection.Evaluation, "run", 2)',
}


@pytest.mark.parametrize(
    "moments",
    [["in the fit", "before its checkpoint"], pytest.param(MOMENTS, marks=pytest.mark.long)],
)
def test_a_run_that_is_killed_in_its_start_or_later_ends_with_the_same_bits(
    data, checkpoint, tmp_path, moments
):
    def config(name):
        return config_of(
            data, tmp_path / name, init_checkpoint=checkpoint, checkpoint_every=4,
            num_train_epochs=2.0, optimizer=OptimizerConfig(ema_decay=0.5),
        )  # fmt: skip

    with stages("train", 1, tmp_path) as (actor,):
        run_to_the_end(actor, flags_of(config("whole")))
        whole = tmp_path / "whole"
        starts = [row for row in rows_of(whole) if row["step"] == 0]
        assert ["head_start" in row for row in starts] == [True, False]
        assert starts[0]["head_start"]["documents"] == split_size(data)
        assert 0 <= starts[1]["evaluation"]["wide_share"] <= 1
        assert len([row for row in rows_of(whole) if "evaluation" in row]) == 3
        for moment in moments:
            found = config(moment.replace(" ", "-"))
            actor.start(flags_of(found), KILL.format(moment=MOMENTS[moment]))
            assert actor.wait() == -9, (moment, actor.errors)
            run_to_the_end(actor, flags_of(found))
            assert_same_run(found.model_dir, whole)


def test_a_run_stopped_in_the_evaluation_of_its_start_makes_it_when_it_goes_on(
    data, checkpoint, tmp_path, monkeypatch
):
    """As one of several workers does when another one was asked to stop."""
    from trainer import train
    from trainer.errors import RunAgain
    from trainer.model.predictor import StoppedError
    from trainer.training.selection import Evaluation

    def stop(_):
        raise StoppedError

    config = config_of(data, tmp_path / "run", init_checkpoint=checkpoint, num_train_epochs=0.5)
    whole = dataclasses.replace(config, model_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "run", stop)
        with pytest.raises(RunAgain, match="after step 0, and saved"):
            train.run(config)
    assert len(rows_of(config.model_dir)) == 1
    for each in (config, whole):
        train.run(each)
    assert_same_run(config.model_dir, whole.model_dir)
