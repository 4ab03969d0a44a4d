"""Heads against float64 formulas, windows of one document, precision and padded batches."""

import random
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainer.data.packing import pack
from trainer.model.heads import HEADS, WindowPooling
from trainer.model.model import build_model, pad_batch
from trainer.model_config import WINDOW_POOLINGS, ModelConfig, PackingConfig

PACKING = PackingConfig(((4, 16), (2, 32)), 12, 12)
HEADS_AND_POOLINGS = [("cls", "max"), ("cls", "attention"), ("mean", "mean"),
                      ("label_attention", "max")]  # fmt: skip


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
    joint = tf.sigmoid(run_model(model, batch)[: len(pooled)]).numpy()
    np.testing.assert_allclose(joint, np.concatenate(heads, axis=1), atol=1e-5)


def pool_formula(pooling, windows, query):
    """A document's vector (float64) from its windows' [n, size]."""
    if pooling == "max":
        return windows.max(axis=0)
    scores = windows @ query[:, 0] if pooling == "attention" else np.zeros(len(windows))
    weights = np.exp(scores - scores.max())
    return weights @ windows / weights.sum()


@pytest.mark.parametrize("pooling", WINDOW_POOLINGS)
@pytest.mark.parametrize("head", sorted(HEADS))
def test_windows_of_one_document_are_pooled_together(head, pooling):
    """Slots 0, 1 and 4 as windows of document 0: its logits follow from all three."""
    model = sharpen(build_model(sizes(head, window_pooling=pooling)))
    batch = packed_batch()
    alone = run_model(model, batch)
    hidden = hidden_by_document(model, batch)
    document = batch["window_document"].numpy().copy()
    document[[1, 4]] = 0
    merged = run_model(model, batch | {"window_document": tf.constant(document)})
    parameters = values(model)
    own = [hidden[slot] for slot in (0, 1, 4)]
    if head == "label_attention":
        expected = label_attention_formula(parameters, np.concatenate(own))
    else:
        vectors = [
            np.tanh(dense(parameters, "head/pooler", h[0])) if head == "cls" else h.mean(axis=0)
            for h in own
        ]
        query = parameters.get("head/window_pooling/query")
        pooled = pool_formula(pooling, np.stack(vectors), query)
        expected = dense(parameters, "head/classifier", pooled)
    np.testing.assert_allclose(merged[0], expected, atol=1e-4)
    np.testing.assert_allclose(merged[[2, 3, 5]], alone[[2, 3, 5]], atol=1e-6)
    assert np.abs(merged[0] - alone[0]).max() > 1e-2
    assert np.isfinite(merged).all()  # Slots 1 and 4 are empty now.


@pytest.mark.parametrize("pooling", WINDOW_POOLINGS)
def test_pooling_and_its_gradients_equal_their_formulas(pooling):
    rng = np.random.default_rng(5)
    windows, upstream = rng.normal(0, 1, (7, 16)), rng.normal(0, 1, (4, 16))
    document = np.array([2, 0, 2, -1, 0, 2, 1])  # Slot 3 is empty.
    layer = WindowPooling(sizes(window_pooling=pooling), dtype="float32")
    layer.build()
    query = rng.normal(0, 1, (16, 1))
    if pooling == "attention":
        layer.query.assign(query)
    inputs = tf.constant(windows, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        pooled = layer(inputs, tf.constant(document, tf.int32), num_documents=4)
        total = tf.reduce_sum(pooled * tf.constant(upstream, tf.float32))
    found = tape.gradient(total, [inputs, *layer.trainable_variables])
    expected, expected_query = np.zeros((7, 16)), np.zeros((16, 1))
    for slot in range(3):
        own = np.flatnonzero(document == slot)
        vector = pool_formula(pooling, windows[own], query)
        np.testing.assert_allclose(pooled[slot], vector, atol=1e-6)
        if pooling == "max":
            expected[own[windows[own].argmax(axis=0)], np.arange(16)] = upstream[slot]
            continue
        scores = windows[own] @ query if pooling == "attention" else np.zeros((len(own), 1))
        weights = np.exp(scores) / np.exp(scores).sum()
        slopes = weights * ((windows[own] - vector) @ upstream[slot])[:, None]
        expected[own] = weights * upstream[slot]
        if pooling == "attention":
            expected[own] += slopes @ query.T
            expected_query += windows[own].T @ slopes
    np.testing.assert_array_equal(pooled[3], np.zeros(16))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    if pooling == "attention":
        np.testing.assert_allclose(found[1], expected_query, atol=1e-5)


def test_a_document_of_one_window_has_the_same_logits_whatever_the_pooling():
    batch, found = packed_batch(), []
    for pooling in WINDOW_POOLINGS:
        model = build_model(sizes(window_pooling=pooling), seed=2)
        found.append(run_model(model, batch)[:6])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(("head", "pooling"), HEADS_AND_POOLINGS)
def test_a_document_of_windows_packed_with_others_has_the_logits_it_has_alone(head, pooling):
    rng = np.random.default_rng(1)
    lengths = [[32, 32, 7], [5], [16, 3], [32, 1], [12], [9]]
    documents = [[rng.integers(1, 50, n).tolist() for n in document] for document in lengths]
    packing = PackingConfig(((4, 16), (5, 32)), 8, 14)
    model = sharpen(build_model(sizes(head, window_pooling=pooling)))
    packed = pack(tf.ragged.constant(documents, tf.int32), packing)
    assert packed["input_ids"].shape[0] == 1
    index = packed["document_index"][0].numpy()
    logits = run_model(model, {name: value[0] for name, value in packed.items()}, packing)
    for place, document in enumerate(documents):
        one = pack(tf.ragged.constant([document], tf.int32), packing)
        alone = run_model(model, {name: value[0] for name, value in one.items()}, packing)
        np.testing.assert_allclose(logits[index == place][0], alone[0], atol=1e-4)


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


def test_other_threads_do_not_change_the_weights():
    expected = values(build_model(sizes(), seed=3))
    stopped = threading.Event()

    def draw():
        while not stopped.is_set():
            random.random()

    thread = threading.Thread(target=draw)
    thread.start()
    found = values(build_model(sizes(), seed=3))
    stopped.set()
    thread.join()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


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
    from trainer.model.encoder import ACTIVATIONS

    x = np.linspace(-5, 5, 101)
    found = ACTIVATIONS[activation](tf.constant(x, tf.float32)).numpy()
    np.testing.assert_allclose(found, formula(x), atol=1e-6)
