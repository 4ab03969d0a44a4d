"""Writes a model folder, of which `model_folder.py` says what it holds.

multihot.json comes last: its presence says that the folder is a model folder.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from safetensors.numpy import save_file

from trainer.data.tokenizer import Tokenizer
from trainer.model.folder_tensors import to_tensors
from trainer.model.model import INPUTS, Model, pad_batch
from trainer.model.model_folder import (
    DIGEST_FILE,
    MODELING_FILE,
    MULTIHOT_FILE,
    ONNX_FILE,
    SAVED_MODEL_FOLDER,
    digest_file,
    digest_files,
    list_model_files,
)
from trainer.model.pretrained import CONFIG_FILE, WEIGHTS_FILE
from trainer.model.quantization import QUANTIZATION_FILE
from trainer.model_config import ModelConfig, PackingConfig

# Fields of ModelConfig that transformers' BertConfig has under the same name.
_SAME_IN_BERT = (
    "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act",
    "max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps",
)  # fmt: skip
_OWN_CLASSES = {
    "model_type": "multihot",
    "architectures": ["MultihotForSequenceClassification"],
    "auto_map": {
        "AutoConfig": "modeling_multihot.MultihotConfig",
        "AutoModelForSequenceClassification": "modeling_multihot.MultihotForSequenceClassification",
    },
}


def save_model_folder(
    folder: str,
    model: Model,
    tokenizer: Tokenizer,
    packing: PackingConfig,
    description: dict[str, Any],
    has_onnx: bool = False,
    scales: bytes | None = None,
) -> None:
    """Writes a model folder to an empty local folder, with or without ONNX and scales for int8.

    The model is in float32, with the calibration folded into it. `description` is what
    multihot.json says, but for the digests of code for transformers and scales, added here.
    """
    values = model.named_values()
    tensors = to_tensors(values, model.config)
    save_file(tensors, os.path.join(folder, WEIGHTS_FILE), metadata={"format": "pt"})
    _write_config(model.config, description["labels"], tokenizer.pad_id, folder)
    tokenizer.save(folder, description["max_seq_length"])
    _write_saved_model(model, packing, os.path.join(folder, SAVED_MODEL_FOLDER))
    # Not in multihot.json, whose bytes count for the fingerprint: the SavedModels of equal models
    # differ in the names of their functions.
    digest = digest_files(folder, list_model_files(folder, SAVED_MODEL_FOLDER))
    _write_json(os.path.join(folder, DIGEST_FILE), {"sha256": digest})
    if has_onnx:
        _write_onnx(model.config, values, os.path.join(folder, ONNX_FILE))
    digests = {}
    if scales is not None:
        path = os.path.join(folder, QUANTIZATION_FILE)
        Path(path).write_bytes(scales)
        digests["int8"] = digest_file(path)
    if not _is_standard(model.config):
        path = os.path.join(folder, MODELING_FILE)
        shutil.copyfile(Path(__file__).with_name(MODELING_FILE), path)
        digests["modeling"] = digest_file(path)
    description = description | {"fingerprints": description["fingerprints"] | digests}
    _write_json(os.path.join(folder, MULTIHOT_FILE), description)


def _is_standard(config: ModelConfig) -> bool:
    """Whether transformers itself has a class for the model."""
    return config.head == "cls" and config.wide == "none"


def _write_config(sizes: ModelConfig, labels: Sequence[str], pad_id: int, folder: str) -> None:
    from transformers import BertConfig  # Takes long to import, and readers do without it.

    config = BertConfig(
        architectures=["BertForSequenceClassification"],
        **{name: getattr(sizes, name) for name in _SAME_IN_BERT},
        num_hidden_layers=sizes.num_layers,
        hidden_dropout_prob=sizes.hidden_dropout,
        attention_probs_dropout_prob=sizes.attention_dropout,
        pad_token_id=pad_id,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    if _is_standard(sizes):
        config.save_pretrained(folder)
        return
    # With BERT's own type, transformers would load its own class without a word of what it lacks.
    own = {name: getattr(sizes, name) for name in ("head", "window_pooling", "wide", "wide_pairs")}
    own |= {"wide_rank": 0 if sizes.wide == "none" else sizes.wide_rank}
    values = json.loads(config.to_json_string()) | own | _OWN_CLASSES
    _write_json(os.path.join(folder, CONFIG_FILE), values)


def _write_onnx(config: ModelConfig, values: Mapping[str, np.ndarray], path: str) -> None:
    from trainer.model.onnx_graph import make_onnx  # Its package is an extra.

    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(make_onnx(config, values).SerializeToString())


def _write_saved_model(model: Model, packing: PackingConfig, folder: str) -> None:
    module = tf.Module()
    module.model = model

    def spec(name: str, *shape: int | None) -> tf.TensorSpec:
        return tf.TensorSpec(shape, tf.int32, name=name)

    def answer(logits: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": logits, "probabilities": tf.sigmoid(logits)}

    padded = ("input_ids", "attention_mask", "token_type_ids")

    @tf.function(input_signature=[spec(name, None, None) for name in padded], autograph=False)
    def serve(input_ids, attention_mask, token_type_ids):  # type: ignore[no-untyped-def]
        batch, groups, rows = pad_batch(input_ids, attention_mask, token_type_ids)
        return answer(model(batch, row_groups=groups, num_documents=rows))

    tokens = [spec(name, packing.num_tokens) for name in INPUTS[:3]]
    windows = [spec(name, packing.max_windows) for name in INPUTS[3:]]

    @tf.function(input_signature=tokens + windows, autograph=False)
    def packed(input_ids, position_ids, segment_ids, window_starts, window_document):  # type: ignore[no-untyped-def]
        values = (input_ids, position_ids, segment_ids, window_starts, window_document)
        batch = dict(zip(INPUTS, values, strict=True))
        groups, rows = packing.row_groups, packing.max_documents
        return answer(model(batch, row_groups=groups, num_documents=rows))

    tf.saved_model.save(module, folder, signatures={"serving_default": serve, "packed": packed})


def _write_json(path: str, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
