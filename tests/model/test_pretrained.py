"""The encoder against transformers' PyTorch BERT, on real weights and real text."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
import torch
import transformers
from preparing import encode
from safetensors.numpy import load_file, save_file

from trainer.data.packing import pack
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.model.model import build_model
from trainer.model.pretrained import from_variables, load_pretrained, model_config, read_tensors
from trainer.model_config import LossConfig, PackingConfig
from trainer.training.losses import make_loss

NUM_LABELS = 20
PACKING = PackingConfig(((6, 128), (3, 256), (3, 512)), 40, 40)


@pytest.fixture(scope="module")
def documents(minilm, real_texts):
    """64 real documents of 5 to 512 tokens, both ends included."""
    tokenizer = load_tokenizer(minilm)
    ids = encode(tokenizer, [" ".join(real_texts)] + real_texts, 512)
    lengths = np.linspace(5, 512, 64).round().astype(int)
    longest = [document for document in ids if len(document) == 512]
    chosen = [
        longest[i % len(longest)][: length - 1] + [tokenizer.sep_id]
        for i, length in enumerate(lengths)
    ]
    assert [len(document) for document in chosen] == lengths.tolist()
    return chosen


@pytest.fixture(scope="module")
def pair(minilm):
    """(ours, PyTorch's) with the same weights, the classifier's included."""
    config = model_config(minilm, NUM_LABELS, "cls", 0.0, 0.0)
    ours = build_model(config, seed=3)
    variables = ours.named_variables()
    for name, value in load_pretrained(minilm, config).items():
        variables[name].assign(value)
    theirs = transformers.BertForSequenceClassification.from_pretrained(
        minilm,
        num_labels=NUM_LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    rng = np.random.default_rng(4)
    kernel = rng.normal(0, 0.05, (config.hidden_size, NUM_LABELS)).astype(np.float32)
    bias = rng.normal(0, 1, NUM_LABELS).astype(np.float32)
    variables["head/classifier/kernel"].assign(kernel)
    variables["head/classifier/bias"].assign(bias)
    with torch.no_grad():
        theirs.classifier.weight.copy_(torch.from_numpy(kernel.T.copy()))
        theirs.classifier.bias.copy_(torch.from_numpy(bias))
    return ours, theirs.eval()


def micro_batches(documents):
    packed = pack(tf.ragged.constant(documents, tf.int32), PACKING)
    count = packed["input_ids"].shape[0]
    return [{name: value[i] for name, value in packed.items()} for i in range(count)]


def torch_batches(documents, size=16):
    order = np.argsort([len(document) for document in documents])
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        width = max(len(documents[i]) for i in chosen)
        ids = torch.zeros((len(chosen), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, : len(documents[i])] = torch.tensor(documents[i])
            mask[row, : len(documents[i])] = 1
        yield chosen, ids, mask


def torch_outputs(theirs, documents):
    """Hidden states by document, pooled [N, H] and logits [N, L]."""
    hidden, pooled, logits = {}, {}, {}
    with torch.no_grad():
        for chosen, ids, mask in torch_batches(documents):
            out = theirs.bert(input_ids=ids, attention_mask=mask)
            answer = theirs.classifier(out.pooler_output)
            for row, i in enumerate(chosen):
                hidden[i] = out.last_hidden_state[row, : len(documents[i])].numpy()
                pooled[i], logits[i] = out.pooler_output[row].numpy(), answer[row].numpy()
    return hidden, pooled, logits


def test_hidden_states_pooled_output_and_logits_equal_pytorch(pair, documents):
    ours, theirs = pair
    hidden, pooled, logits = torch_outputs(theirs, documents)
    seen = 0
    for batch in micro_batches(documents):
        states = ours.encoder(
            batch["input_ids"],
            batch["position_ids"],
            batch["segment_ids"],
            row_groups=PACKING.row_groups,
        )
        vectors = ours.head.pool(tf.gather(states, batch["window_starts"])).numpy()
        answer = ours(
            batch, row_groups=PACKING.row_groups, num_documents=PACKING.max_documents
        ).numpy()
        segments = batch["segment_ids"].numpy()
        for slot, i in enumerate(batch["document_index"].numpy()):
            if i >= 0:
                own = states.numpy()[segments == slot + 1]
                np.testing.assert_allclose(own, hidden[i], atol=1e-4, rtol=0)
                np.testing.assert_allclose(vectors[slot], pooled[i], atol=1e-4, rtol=0)
                np.testing.assert_allclose(answer[slot], logits[i], atol=1e-4, rtol=0)
                seen += 1
    assert seen == len(documents) == 64


def test_packed_logits_equal_those_of_each_document_alone(pair, documents):
    ours, _ = pair
    joint = {}
    for batch in micro_batches(documents):
        answer = ours(batch, row_groups=PACKING.row_groups, num_documents=PACKING.max_documents)
        for slot, i in enumerate(batch["document_index"].numpy()):
            joint[int(i)] = answer.numpy()[slot]
    for i, document in enumerate(documents[::4]):
        alone = PackingConfig(((1, len(document)),), 1, 1)
        packed = pack(tf.ragged.constant([document], tf.int32), alone)
        batch = {name: value[0] for name, value in packed.items()}
        answer = ours(batch, row_groups=alone.row_groups, num_documents=1)
        np.testing.assert_allclose(joint[4 * i], answer.numpy()[0], atol=1e-4, rtol=0)


def test_every_gradient_equals_pytorchs_with_positive_weights(pair, documents):
    ours, theirs = pair
    documents = documents[::2]
    rng = np.random.default_rng(5)
    labels = (rng.random((len(documents), NUM_LABELS)) < 0.2).astype(np.float32)
    weights = rng.uniform(1, 20, NUM_LABELS).astype(np.float32)

    theirs.zero_grad()
    for chosen, ids, mask in torch_batches(documents, 8):
        logits = theirs(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits,
            torch.from_numpy(labels[chosen]),
            pos_weight=torch.from_numpy(weights),
            reduction="sum",
        )
        (loss / labels.size).backward()
    expected = {
        name.removeprefix("bert."): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
    }

    ones = np.ones(len(weights))
    weighted = make_loss(LossConfig(), weights, ones, ones, len(documents))
    variables = ours.named_variables()
    totals = {name: np.zeros(variable.shape, np.float32) for name, variable in variables.items()}
    for batch in micro_batches(documents):
        index = batch["document_index"].numpy()
        hot = np.where(index[:, None] >= 0, labels[np.maximum(index, 0)], 0)
        with tf.GradientTape() as tape:
            logits = ours(batch, row_groups=PACKING.row_groups, num_documents=PACKING.max_documents)
            loss, _ = weighted(logits, hot, batch["document_mask"])
            loss /= len(documents)
        gradients = tape.gradient(loss, variables)
        for name in totals:
            totals[name] += tf.convert_to_tensor(gradients[name]).numpy()
    found = from_variables(totals, ours.config)
    found["classifier.weight"] = totals["head/classifier/kernel"].T
    found["classifier.bias"] = totals["head/classifier/bias"]

    assert set(found) == set(expected)
    global_norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in expected.values()))
    for name, gradient in expected.items():
        bound = 1e-3 * max(np.linalg.norm(gradient), 1e-5 * global_norm)
        assert np.linalg.norm(found[name] - gradient) <= bound, name


def test_import_then_export_gives_identical_tensors(minilm):
    config = model_config(minilm, NUM_LABELS, "cls", 0.0, 0.0)
    written = from_variables(load_pretrained(minilm, config), config)
    original = read_tensors(minilm)
    assert set(written) == set(original)
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value)


def copy_with(minilm, folder, change):
    """A copy of the checkpoint whose tensors went through `change`."""
    os.makedirs(folder)
    shutil.copy(os.path.join(minilm, "config.json"), folder)
    tensors = load_file(os.path.join(minilm, "model.safetensors"))
    save_file(change(tensors), os.path.join(folder, "model.safetensors"))
    return str(folder)


def test_prefixed_and_old_names_load_alike(minilm, tmp_path):
    def rename(tensors):
        renamed = {
            f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for name, value in tensors.items()
        }
        return renamed | {"cls.predictions.bias": np.zeros(3, np.float32)}

    config = model_config(minilm, NUM_LABELS, "cls", 0.0, 0.0)
    bare = load_pretrained(minilm, config)
    prefixed = load_pretrained(copy_with(minilm, tmp_path / "prefixed", rename), config)
    assert set(bare) == set(prefixed)
    for name in bare:
        np.testing.assert_array_equal(bare[name], prefixed[name])


def test_missing_and_unknown_tensors_are_named(minilm, tmp_path):
    def damage(tensors):
        tensors["encoder.layer.0.surprise.weight"] = tensors.pop(
            "encoder.layer.3.output.dense.bias"
        )
        return tensors

    config = model_config(minilm, NUM_LABELS, "cls", 0.0, 0.0)
    with pytest.raises(UserError) as error:
        load_pretrained(copy_with(minilm, tmp_path / "damaged", damage), config)
    assert "encoder.layer.3.output.dense.bias" in str(error.value)
    assert "encoder.layer.0.surprise.weight" in str(error.value)


def test_a_tensor_of_another_shape_is_named(minilm, tmp_path):
    def cut(tensors):
        tensors["embeddings.word_embeddings.weight"] = tensors["embeddings.word_embeddings.weight"][
            :100
        ].copy()
        return tensors

    config = model_config(minilm, NUM_LABELS, "cls", 0.0, 0.0)
    with pytest.raises(UserError, match="word_embeddings.*100.*30522"):
        load_pretrained(copy_with(minilm, tmp_path / "cut", cut), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "roberta"}, "roberta"), ({"hidden_act": "swish9"}, "swish9")],
)
def test_configs_that_are_not_our_bert_are_refused(minilm, tmp_path, change, message):
    with open(os.path.join(minilm, "config.json"), encoding="utf-8") as file:
        config = json.load(file) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        build_model(model_config(str(tmp_path), NUM_LABELS, "cls", 0.0, 0.0))


def test_a_pickled_checkpoint_loads_as_weights_only(minilm, tmp_path):
    shutil.copy(os.path.join(minilm, "config.json"), tmp_path)
    tensors = load_file(os.path.join(minilm, "model.safetensors"))
    torch.save(
        {name: torch.from_numpy(value) for name, value in tensors.items()},
        tmp_path / "pytorch_model.bin",
    )
    config = model_config(minilm, NUM_LABELS, "cls", 0.0, 0.0)
    pickled = load_pretrained(str(tmp_path), config)
    for name, value in load_pretrained(minilm, config).items():
        np.testing.assert_array_equal(pickled[name], value)


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path):
    from trainer.model.pretrained import resolve_checkpoint

    with pytest.raises(UserError, match="nowhere"):
        resolve_checkpoint(str(tmp_path / "nowhere"))
