"""The wide part in packed micro-batches against TF-IDF and a product in NumPy, float64."""

import numpy as np
import pytest
import tensorflow as tf

from trainer import model_config
from trainer.data.packing import pack
from trainer.linear.term_features import count_terms, weigh_terms
from trainer.model.model import build_model, pad_batch
from trainer.model.wide import Wide
from trainer.model_config import ModelConfig, PackingConfig, choose_wide_pairs

CLS, SEP = 2, 3
VOCABULARY, NUM_LABELS = 50, 5
# Few buckets, so that pairs share some.
PAIRS = 64
# The last slots stay empty, and most rows have padding.
PACKING = PackingConfig(((4, 16), (5, 32)), 9, 14)
# Tokens of each document's windows, [CLS] and [SEP] included; the fourth has no token of its own.
LENGTHS = ((32, 32, 7), (5,), (16, 3), (2,), (12,), (32, 4), (9,))


def sizes(**changes):
    return ModelConfig(
        **{
            "vocab_size": VOCABULARY, "num_labels": NUM_LABELS, "hidden_size": 16, "num_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32,
            "head": "mean", "wide": "wordpieces", "wide_pairs": PAIRS,
        }
        | changes
    )  # fmt: skip


def draw_documents(lengths=LENGTHS, vocabulary=VOCABULARY, seed=0):
    """Windows of token ids, few of them frequent, so that most documents repeat some."""
    random = np.random.default_rng(seed)

    def draw_window(length):
        ids = np.minimum(random.geometric(0.1, length - 2) + SEP, vocabulary - 1)
        return [CLS, *ids.tolist(), SEP]

    return [[draw_window(length) for length in windows] for windows in lengths]


def draw_values(layer, seed=1):
    """Random values for all variables; some idf are 0, and so are those of [CLS] and [SEP]."""
    random = np.random.default_rng(seed)
    for variable in layer.weights:
        if variable.name != "mix":
            variable.assign(random.normal(0, 1, variable.shape))
    idf = random.uniform(1, 8, layer.idf.shape)
    idf[[CLS, SEP, 11]] = 0
    layer.idf.assign(idf)
    return layer


def make_layer(config):
    layer = Wide(config, name="wide", dtype="float32")
    layer.build()
    return draw_values(layer)


def pack_one(documents, packing=PACKING):
    """The only micro-batch of some documents, and the document of each slot or -1."""
    packed = pack(tf.ragged.constant(documents, tf.int32), packing)
    assert packed["input_ids"].shape[0] == 1
    return {name: value[0] for name, value in packed.items()}, packed["document_index"][0].numpy()


def reference(layer, documents, num_pairs=PAIRS):
    """Logits [N, L], float64: the TF-IDF of each document's terms, times the tables."""
    windows = [[np.asarray(window) for window in document] for document in documents]
    counts = count_terms(windows, layer.idf.shape[0] - num_pairs, num_pairs)
    features = weigh_terms(counts, layer.idf.numpy())
    table = layer.kernel.numpy().astype(np.float64)
    if hasattr(layer, "terms"):
        table = layer.terms.numpy().astype(np.float64) @ table
    return features.astype(np.float64) @ table + layer.bias.numpy()


def check(layer, documents, packing=PACKING, jit_compile=False, num_pairs=PAIRS):
    batch, slots = pack_one(documents, packing)
    assert (slots < 0).any() and (batch["segment_ids"].numpy() == 0).any()

    @tf.function(jit_compile=jit_compile)
    def forward(batch):
        return layer(batch, num_documents=packing.max_documents)

    inputs = {name: batch[name] for name in ("input_ids", "segment_ids", "window_document")}
    found, expected = forward(inputs).numpy(), reference(layer, documents, num_pairs)
    assert found.dtype == np.float32 and np.ptp(expected, axis=0).min() > 0.5
    np.testing.assert_allclose(found[slots >= 0], expected[slots[slots >= 0]], atol=1e-5)
    empty = np.tile(layer.bias.numpy(), [(slots < 0).sum(), 1])
    np.testing.assert_allclose(found[slots < 0], empty, atol=1e-6)
    return found, slots


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("pairs", [0, PAIRS])
def test_logits_are_those_of_the_documents_tf_idf(pairs, rank, jit_compile, monkeypatch):
    if rank:
        monkeypatch.setattr(model_config, "MAX_WIDE_PARAMETERS", VOCABULARY * NUM_LABELS - 1)
        monkeypatch.setattr(model_config, "WIDE_RANK", rank)
    config = sizes(wide_pairs=pairs)
    assert config.wide_rank == rank
    layer, documents = make_layer(config), draw_documents()
    found, slots = check(layer, documents, jit_compile=jit_compile, num_pairs=pairs)
    if not pairs:
        # A document without known terms has the bias alone.
        np.testing.assert_allclose(found[slots == 3][0], layer.bias.numpy(), atol=1e-6)


def test_the_limit_of_one_table_is_in_parameters():
    half = {"vocab_size": 2**19, "wide_pairs": 2**19}
    assert sizes(**half, num_labels=64).wide_rank == 0
    assert sizes(**half, num_labels=65).wide_rank == 512


@pytest.mark.parametrize(
    ("vocabulary", "labels", "tokens", "pairs", "rank"),
    [
        (30522, 128, 750_000, 2**17, 0), (30522, 128, 10**9, 2**18, 0), (4096, 38, 100, 2**13, 0),
        (30522, 1000, 10**9, 2**15, 0), (30522, 4000, 10**9, 2**16, 512),
        (30522, 10_000, 10**9, 2**16, 512), (250_000, 10_000, 10**9, 2**13, 512),
    ],
)  # fmt: skip
def test_pairs_have_buckets_by_the_corpus_and_within_the_limit(
    vocabulary, labels, tokens, pairs, rank
):
    assert choose_wide_pairs(vocabulary, labels, tokens) == pairs
    assert sizes(vocab_size=vocabulary, num_labels=labels, wide_pairs=pairs).wide_rank == rank


@pytest.mark.parametrize("jit_compile", [False, True])
def test_many_documents_of_a_large_vocabulary_have_their_own_logits(jit_compile):
    """Document and token together need more than 32 bits."""
    vocabulary, slots = 2**20, 2100
    assert (slots + 1) * vocabulary > 2**31
    layer = make_layer(sizes(vocab_size=vocabulary, num_labels=2))
    documents = draw_documents(((4,),) * 2060 + ((9,),) * 30, 300)
    for number, ((window,),) in enumerate(zip(documents, strict=True)):
        window[1] = vocabulary - 1 - number % 5
    check(layer, documents, PackingConfig(((600, 16),), slots, slots), jit_compile)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_packed_document_has_the_logits_it_has_alone(jit_compile):
    layer, documents = make_layer(sizes()), draw_documents()
    together, slots = check(layer, documents, jit_compile=jit_compile)
    for place, document in enumerate(documents):
        batch, _ = pack_one([document])
        alone = layer(batch, num_documents=PACKING.max_documents)[0]
        np.testing.assert_allclose(together[slots == place][0], alone, atol=1e-6)


def test_a_padded_batch_of_any_size_gives_the_packed_documents_logits():
    """As transformers and TensorFlow Serving call it: how many rows is known when it runs."""
    model = build_model(sizes(), seed=3)
    draw_values(model.wide)
    model.wide.mix.assign([0.0, 1.0])
    documents = draw_documents([(length,) for length in (32, 5, 2, 17)])
    ids, mask = np.zeros((4, 32), np.int32), np.zeros((4, 32), np.int32)
    for row, (window,) in enumerate(documents):
        ids[row, : len(window)], mask[row, : len(window)] = window, 1

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)] * 2)
    def serve(ids, mask):
        batch, groups, rows = pad_batch(ids, mask, tf.zeros_like(ids))
        return model(batch, row_groups=groups, num_documents=rows)

    for rows in (4, 1):
        expected = reference(model.wide, documents[:rows])
        np.testing.assert_allclose(serve(ids[:rows], mask[:rows]), expected, atol=1e-5)


def test_the_models_logits_are_the_mixture_and_the_heads_are_as_without_wide_part():
    model, bare = build_model(sizes(), seed=3), build_model(sizes(wide="none"), seed=3)
    draw_values(model.wide)
    batch, slots = pack_one(draw_documents())
    real = slots >= 0
    arguments = {"row_groups": PACKING.row_groups, "num_documents": PACKING.max_documents}
    of_head, of_wide = bare(batch, **arguments), reference(model.wide, draw_documents())
    np.testing.assert_array_equal(model.head_logits(batch, **arguments), of_head)
    np.testing.assert_array_equal(
        model.document_vectors(batch, **arguments), bare.document_vectors(batch, **arguments)
    )
    for mix in ((1.0, 1.0), (0.35, 0.65), (1.0, 0.0)):
        model.wide.mix.assign(mix)
        expected = mix[0] * of_head.numpy()[real] + mix[1] * of_wide[slots[real]]
        np.testing.assert_allclose(model(batch, **arguments).numpy()[real], expected, atol=1e-4)
    parts = model.logits_of_parts(batch, **arguments).numpy()[real]
    np.testing.assert_array_equal(parts[:, :NUM_LABELS], of_head.numpy()[real])
    np.testing.assert_allclose(parts[:, NUM_LABELS:], of_wide[slots[real]], atol=1e-5)
    np.testing.assert_array_equal(bare.logits_of_parts(batch, **arguments), of_head)


def test_training_leaves_the_wide_part_alone(monkeypatch):
    model = build_model(sizes())
    names, trained = set(model.named_variables()), set(model.named_trainable_variables())
    assert names - trained == {"wide/idf", "wide/kernel", "wide/bias", "wide/mix"}
    assert trained == set(build_model(sizes(wide="none")).named_variables())
    monkeypatch.setattr(model_config, "MAX_WIDE_PARAMETERS", 1)
    low_rank = build_model(sizes())
    assert set(low_rank.named_variables()) - trained == names - trained | {"wide/terms"}


def test_the_mixture_is_float32_in_every_precision():
    """A share rounded to bfloat16 would be off by 0.2 %."""
    exact, rough = (build_model(sizes(), kind, seed=3) for kind in ("float32", "mixed_bfloat16"))
    batch, slots = pack_one(draw_documents())
    arguments = {"row_groups": PACKING.row_groups, "num_documents": PACKING.max_documents}
    for model in (exact, rough):
        draw_values(model.wide)
        model.wide.mix.assign([0.0, 0.55])
    found = [model(batch, **arguments).numpy()[slots >= 0] for model in (exact, rough)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)
