"""Heads against float64 formulas, windows of one document, precision and padded batches."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.config import ModelConfig, PackingConfig
from trainer.model import HEADS, build_model, pad_batch
from trainer.packing import pack

PACKING = PackingConfig(((4, 16), (2, 32)), 12, 12)


def sizes(head="cls", **changes):
    return ModelConfig(
        **{
            "vocab_size": 50,
            "num_labels": 5,
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
            "initializer_range": 0.3,
            "head": head,
        }
        | changes
    )


def sharpen(model, seed=0):
    """Random values for every variable, biases and LayerNorm included."""
    rng = np.random.default_rng(seed)
    for variable in model.named_variables().values():
        variable.assign(variable + rng.normal(0, 0.3, variable.shape))
    return model


def packed_batch(seed=0, lengths=(3, 9, 16, 30, 5, 12)):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, 50, length).tolist() for length in lengths]
    packed = pack(tf.ragged.constant(documents, tf.int32), PACKING)
    assert packed["input_ids"].shape[0] == 1
    return {name: value[0] for name, value in packed.items()}


def run_model(model, batch, packing=PACKING):
    return model(batch, row_groups=packing.row_groups, num_documents=packing.max_documents).numpy()


def hidden_by_document(model, batch):
    hidden = model.encoder(
        batch["input_ids"],
        batch["position_ids"],
        batch["segment_ids"],
        row_groups=PACKING.row_groups,
    ).numpy()
    segments = batch["segment_ids"].numpy()
    count = int(batch["document_mask"].numpy().sum())
    return [hidden[segments == slot + 1].astype(np.float64) for slot in range(count)]


def values(model):
    return {name: v.numpy().astype(np.float64) for name, v in model.named_variables().items()}


def dense(parameters, name, x):
    return x @ parameters[f"{name}/kernel"] + parameters[f"{name}/bias"]


def cls_formula(parameters, hidden):
    return dense(
        parameters, "head/classifier", np.tanh(dense(parameters, "head/pooler", hidden[0]))
    )


def mean_formula(parameters, hidden):
    return dense(parameters, "head/classifier", hidden.mean(axis=0))


def label_attention_formula(parameters, hidden):
    scores = hidden @ parameters["head/query/kernel"]
    attention = np.exp(scores - scores.max(axis=0))
    attention /= attention.sum(axis=0)
    vectors = attention.T @ hidden  # one document vector a label
    kernel = parameters["head/classifier/kernel"]
    return (vectors * kernel.T).sum(axis=1) + parameters["head/classifier/bias"]


@pytest.mark.parametrize(
    ("head", "formula"),
    [("cls", cls_formula), ("mean", mean_formula), ("label_attention", label_attention_formula)],
)
def test_heads_equal_their_formulas(head, formula):
    model = sharpen(build_model(sizes(head)))
    batch = packed_batch()
    logits = run_model(model, batch)
    for slot, hidden in enumerate(hidden_by_document(model, batch)):
        np.testing.assert_allclose(logits[slot], formula(values(model), hidden), atol=1e-4)


def test_one_dense_of_all_labels_is_as_many_dense_of_one():
    model = sharpen(build_model(sizes()))
    batch = packed_batch()
    pooled = np.stack(
        [
            np.tanh(dense(values(model), "head/pooler", h[0]))
            for h in hidden_by_document(model, batch)
        ]
    ).astype(np.float32)
    heads = []
    for label in range(5):
        head = keras.layers.Dense(1, activation="sigmoid")
        head.build(pooled.shape)
        head.kernel.assign(model.head.classifier.kernel[:, label : label + 1])
        head.bias.assign(model.head.classifier.bias[label : label + 1])
        heads.append(head(pooled).numpy())
    together = tf.sigmoid(run_model(model, batch)[: len(pooled)]).numpy()
    np.testing.assert_allclose(together, np.concatenate(heads, axis=1), atol=1e-5)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_windows_of_one_document_are_pooled_together(head):
    """Slots 0 and 1 as windows of document 0: its logits follow from both windows' tokens."""
    model = sharpen(build_model(sizes(head)))
    batch = packed_batch()
    alone = run_model(model, batch)
    hidden = hidden_by_document(model, batch)
    document = batch["window_document"].numpy().copy()
    document[1] = 0
    merged = run_model(model, batch | {"window_document": tf.constant(document)})
    parameters = values(model)
    both = np.concatenate(hidden[:2])
    if head == "cls":
        pooled = np.mean([np.tanh(dense(parameters, "head/pooler", h[0])) for h in hidden[:2]], 0)
        expected = dense(parameters, "head/classifier", pooled)
    elif head == "mean":
        expected = mean_formula(parameters, both)
    else:
        expected = label_attention_formula(parameters, both)
    np.testing.assert_allclose(merged[0], expected, atol=1e-4)
    np.testing.assert_allclose(merged[2:6], alone[2:6], atol=1e-6)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_a_padded_batch_gives_the_packed_documents_logits(head):
    model = sharpen(build_model(sizes(head)))
    batch = packed_batch()
    segments, tokens = batch["segment_ids"].numpy(), batch["input_ids"].numpy()
    documents = [tokens[segments == slot + 1] for slot in range(6)]
    ids, mask = np.zeros((6, 32), np.int32), np.zeros((6, 32), np.int32)
    for row, document in enumerate(documents):
        ids[row, : len(document)], mask[row, : len(document)] = document, 1
    padded, groups, rows = pad_batch(
        tf.constant(ids), tf.constant(mask), tf.zeros_like(tf.constant(ids))
    )
    answer = model(padded, row_groups=groups, num_documents=rows).numpy()
    np.testing.assert_allclose(answer, run_model(model, batch)[:6], atol=1e-4)


def test_token_types_are_added():
    model = sharpen(build_model(sizes("mean")))
    ids = tf.ones([2, 4], tf.int32)
    batch, groups, rows = pad_batch(ids, ids, tf.constant([[0, 0, 0, 0], [1, 1, 1, 1]]))
    zero, one = model(batch, row_groups=groups, num_documents=rows).numpy()
    assert np.abs(zero - one).max() > 1e-2
    table = model.encoder.embeddings.token_type
    table.assign(tf.stack([table[1], table[0]]))
    other_one, other_zero = model(batch, row_groups=groups, num_documents=rows).numpy()
    np.testing.assert_allclose([zero, one], [other_zero, other_one], atol=1e-5)


def test_bfloat16_keeps_float32_parameters_and_stays_near_float32():
    batch = packed_batch()
    exact = build_model(sizes(), seed=3)
    rough = build_model(sizes(), "mixed_bfloat16", seed=3)
    for name, variable in rough.named_variables().items():
        assert variable.dtype == tf.float32
        np.testing.assert_array_equal(variable, exact.named_variables()[name])
    logits, near = run_model(exact, batch)[:6], run_model(rough, batch)[:6]
    assert near.dtype == np.float32
    error = np.abs(near - logits).max() / np.abs(logits).max()
    assert 1e-5 < error < 0.05


def test_fresh_weights_follow_the_seed():
    first, same, other = (build_model(sizes(), seed=seed).named_variables() for seed in (1, 1, 2))
    name = "encoder/layer_1/intermediate/kernel"
    np.testing.assert_array_equal(first[name], same[name])
    assert np.abs(first[name] - other[name]).max() > 0.1
    assert 0.2 < np.std(first[name]) < 0.3  # a normal of 0.3, cut at two deviations


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + np.vectorize(__import__("math").erf)(x / 2**0.5))),
        (
            "gelu_new",
            lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        ),
        ("relu", lambda x: np.maximum(x, 0)),
        ("silu", lambda x: x / (1 + np.exp(-x))),
    ],
)
def test_activations(activation, formula):
    from trainer.encoder import ACTIVATIONS

    x = np.linspace(-5, 5, 101)
    found = ACTIVATIONS[activation](tf.constant(x, tf.float32)).numpy()
    np.testing.assert_allclose(found, formula(x), atol=1e-6)
