"""The encoder on OpenVINO against TensorFlow's, packed in rows of several lengths."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.packing import pack
from trainer.model.model import build_model
from trainer.model.packed_encoder import PackedEncoder, make_encoder
from trainer.model.predictor import Predictor
from trainer.model.quantization import choose_scales, layer_paths
from trainer.model_config import ModelConfig, PackingConfig
from trainer.runtime.processor import read_processor

PACKING = PackingConfig(((3, 16), (2, 24), (1, 32)), 24, 24)
CONFIG = ModelConfig(
    60, 5, hidden_size=24, num_layers=3, num_attention_heads=3, intermediate_size=48,
    max_position_embeddings=32, initializer_range=0.3, hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def micro_batches(count=40, seed=0):
    """Documents of 2 to 32 tokens, packed."""
    generator = np.random.default_rng(seed)
    documents = [generator.integers(5, 60, generator.integers(2, 33)) for _ in range(count)]
    packed = pack(tf.ragged.constant(documents, dtype=tf.int32), PACKING)
    return [
        {name: values[index] for name, values in packed.items()}
        for index in range(packed["input_ids"].shape[0])
    ]


def models(head="mean", **changes):
    return build_model(dataclasses.replace(CONFIG, head=head, **changes), seed=4)


def values_of(model):
    return {name: variable.numpy() for name, variable in model.named_variables().items()}


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_float32_equals_tensorflows_encoder(activation):
    model = models(hidden_act=activation)
    encoder = PackedEncoder(model.config, values_of(model), PACKING)
    batches = micro_batches()
    assert len(batches) > 3
    for batch in batches:
        expected = model.encoder(
            batch["input_ids"], batch["position_ids"], batch["segment_ids"],
            row_groups=PACKING.row_groups,
        )  # fmt: skip
        real = batch["segment_ids"].numpy() > 0
        found = encoder(batch)
        assert found.shape == (128, 24) and found.dtype == np.float32
        np.testing.assert_allclose(found[real], expected.numpy()[real], atol=2e-5)


@pytest.mark.parametrize("head", ["cls", "mean", "label_attention"])
@pytest.mark.parametrize("wide", ["none", "wordpieces"])
def test_a_predictor_has_the_same_logits_with_it(head, wide):
    model = models(head=head, wide=wide, wide_pairs=64 if wide != "none" else 0)
    plain = Predictor(model, PACKING)
    other = Predictor(model, PACKING, encoder=make_encoder(model, PACKING, "float32"))
    for batch in micro_batches():
        real = batch["document_index"].numpy() >= 0
        expected = plain.logits(batch).numpy()[real]
        np.testing.assert_allclose(other.logits(batch).numpy()[real], expected, atol=1e-4)
        (found,) = other.probabilities([batch])
        expected = 1 / (1 + np.exp(-expected.astype(np.float64)))
        np.testing.assert_allclose(found.numpy()[real], expected, atol=1e-4)
    assert other.num_traces == 1


def test_int8_is_near_and_repeats_itself_bit_for_bit():
    model = models()
    watched = PackedEncoder(model.config, values_of(model), PACKING, watched=True)
    seen = [
        (batch["segment_ids"].numpy() > 0, watched.taken(batch))
        for batch in micro_batches(200, seed=1)
    ]
    scales = choose_scales(model.config, values_of(model), seen, len(seen))
    assert list(scales) == layer_paths(model.config)
    exact = PackedEncoder(model.config, values_of(model), PACKING)
    encoders = [make_encoder(model, PACKING, "int8", scales) for _ in range(2)]
    for batch in micro_batches():
        real = batch["segment_ids"].numpy() > 0
        expected = exact(batch)[real]
        found = encoders[0](batch)[real]
        lost = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
        # Never float32's own result: the products are of integers. Without VNNI their sums of 16
        # bits overflow here and there: 0.19 on a processor with AVX2 alone.
        assert 1e-4 < lost < (0.12 if read_processor().has_fast_int8 else 0.3)
        for encoder in encoders:
            np.testing.assert_array_equal(encoder(batch)[real], found)


def test_what_layers_take_is_what_they_take():
    model = models()
    encoder = PackedEncoder(model.config, values_of(model), PACKING, watched=True)
    (batch, *_) = micro_batches()
    taken = encoder.taken(batch)
    values = values_of(model)
    assert {path: x.shape for path, x in taken.items()} == {
        path: (128, len(values[f"{path}/kernel"])) for path in layer_paths(model.config)
    }
    first = model.encoder.embeddings(batch["input_ids"], batch["position_ids"]).numpy()
    np.testing.assert_allclose(taken["encoder/layer_0/attention/qkv"], first, atol=1e-5)


@pytest.mark.skipif(not read_processor().has_fast_bfloat16, reason="the processor has no AMX")
def test_bfloat16_is_as_near_as_its_digits():
    model = models()
    exact, rough = (make_encoder(model, PACKING, kind) for kind in ("float32", "bfloat16"))
    for batch in micro_batches():
        real = batch["segment_ids"].numpy() > 0
        expected = exact(batch)[real]
        lost = np.sqrt(np.mean((rough(batch)[real] - expected) ** 2)) / expected.std()
        assert 1e-5 < lost < 0.02
