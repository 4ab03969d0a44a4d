"""What docs/coming_from_keras.md says of the three ways, held to what this Keras does."""

import importlib.util
import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.trainers.data_adapters.data_adapter_utils import class_weight_to_sample_weights

from trainer.model.model import build_model
from trainer.model_config import LossConfig, ModelConfig
from trainer.training.losses import label_weights, make_loss, positive_weights

ROOT = pathlib.Path(__file__).parent.parent
LABELS = ("a", "b", "c", "d")


def load_example():
    spec = importlib.util.spec_from_file_location("keras_ways", ROOT / "examples" / "keras_ways.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ways = load_example()


def make_bert():
    sizes = ModelConfig(
        vocab_size=50, num_labels=4, hidden_size=16, num_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return build_model(sizes, seed=3)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(7)
    ids = random.integers(1, 50, (12, 9)).astype(np.int32)
    mask = (np.arange(9) < random.integers(3, 10, 12)[:, None]).astype(np.int32)
    targets = random.random((12, 4)) < [0.7, 0.4, 0.3, 0.2]
    targets[0], targets[1] = True, False
    return ids, mask, targets


def dense_layers(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]


def test_the_first_two_ways_are_one_function_and_their_losses_differ_by_the_number_of_labels(batch):
    ids, mask, targets = batch
    bert = make_bert()
    many, one = ways.one_output_a_label(bert, LABELS), ways.one_output(bert, LABELS)
    (whole,) = dense_layers(one)
    parts = dense_layers(many)
    whole.kernel.assign(np.concatenate([part.kernel.numpy() for part in parts], axis=1))
    separate = np.concatenate(many.predict([ids, mask], verbose=0), axis=1)
    joint = one.predict([ids, mask], verbose=0)
    np.testing.assert_allclose(separate, joint, atol=1e-6)
    assert joint.std() > 0.01
    columns = [column[:, None] for column in targets.astype(np.float32).T]
    sum_of_losses = many.evaluate([ids, mask], columns, verbose=0, return_dict=True)["loss"]
    mean_loss = one.evaluate([ids, mask], targets.astype(np.float32), verbose=0)
    assert sum_of_losses == pytest.approx(len(LABELS) * mean_loss, rel=1e-5)


def test_a_list_of_class_weights_is_refused_by_both_models(batch):
    ids, mask, targets = batch
    weights = ways.class_weights(targets)
    columns = [column[:, None] for column in targets.astype(np.float32).T]
    many = ways.one_output_a_label(make_bert(), LABELS)
    with pytest.raises(ValueError, match="only supported for Models with a single output"):
        many.fit([ids, mask], columns, class_weight=weights, verbose=0)
    one = ways.one_output(make_bert(), LABELS)
    with pytest.raises(AttributeError, match="'list' object has no attribute 'get'"):
        one.fit([ids, mask], targets.astype(np.float32), class_weight=weights, verbose=0)


def test_one_dictionary_weighs_documents_by_the_place_of_their_first_label(batch):
    """Keras takes the multi-hot row for a one-hot one; label 0 is its class 0, and so on."""
    _, _, targets = batch
    weights = class_weight_to_sample_weights(targets.astype(np.float32), {0: 0.6, 1: 3.0})
    first = np.where(targets.any(axis=1), targets.argmax(axis=1), 0)
    np.testing.assert_allclose(weights, np.select([first == 0, first == 1], [0.6, 3.0], 1.0))
    assert len(set(weights.tolist())) == 3
    # A document with the second label and without: the same weight, where the first one is there.
    pair = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], np.float32)
    np.testing.assert_allclose(class_weight_to_sample_weights(pair, {0: 0.6, 1: 3.0}), 0.6)


def test_balanced_classes_is_what_the_third_way_means(batch):
    _, _, targets = batch
    weights = ways.class_weights(targets)
    counts, documents = targets.sum(axis=0), len(targets)
    loss = make_loss(
        LossConfig(),
        positive_weights("balanced_classes", counts, documents, 1e6, LABELS),
        label_weights("balanced_classes", counts, documents),
        counts,
        documents,
    )
    logits = np.random.default_rng(5).normal(0, 2, targets.shape)
    total, count = loss(tf.constant(logits, tf.float32), tf.constant(targets), tf.ones(documents))
    each = np.transpose([np.where(y, w[1], w[0]) for w, y in zip(weights, targets.T, strict=True)])
    terms = np.where(targets, np.logaddexp(0, -logits), np.logaddexp(0, logits))
    assert float(total / count) == pytest.approx((each * terms).mean(), rel=1e-5)


def test_the_page_quotes_code_that_is_there():
    source = (ROOT / "examples" / "keras_ways.py").read_text()
    page = (ROOT / "docs" / "coming_from_keras.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        assert block in source, block
