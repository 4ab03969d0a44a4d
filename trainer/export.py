"""`multihot export`: the best checkpoint and its calibration to one model folder.

The calibration folds exactly into the head's kernel and bias, so every consumer of the folder
(transformers, the SavedModel, `multihot score`) gets calibrated probabilities from a plain sigmoid.
"""

import dataclasses
import json
import os
import re
import shutil
import sys
from typing import Any

import numpy as np
import tensorflow as tf
import transformers
from safetensors.numpy import save_file

import trainer
from trainer.config import absolute
from trainer.data.metadata import TOKENIZER_FOLDER, Metadata, load_metadata
from trainer.data.packing import choose_packing, min_tokens, with_slots_for_scoring
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.errors import UserError
from trainer.evaluation.results import CALIBRATION_FILE, EVALUATION_FOLDER, METRICS_FILE
from trainer.model.model import Model, pad_batch
from trainer.model.model_folder import (
    DIGEST_FILE,
    HEAD_PREFIX,
    MULTIHOT_FILE,
    SAVED_MODEL_FOLDER,
    digest_saved_model,
)
from trainer.model.pretrained import WEIGHTS_FILE, from_variables
from trainer.model_config import PackingConfig
from trainer.run_config import ExportConfig
from trainer.storage import filesystem
from trainer.storage.gcs import Taken, list_objects, read_object, upload, upload_files
from trainer.storage.temporary import temporary_folder
from trainer.training.checkpoint import LoadedRun, load_best

_FORMAT_VERSION = 1
_UPLOADED = re.compile(r"[\w.-]+\.(json|safetensors|txt)|saved_model/.*")


def run(config: ExportConfig) -> None:
    """Writes the model folder, whole or not at all; nothing if it is there already.

    Raises:
      UserError: if the run has no checkpoint or calibration that fits, or the folder is taken.
    """
    if _is_exported(config):
        print(f"{config.export_dir}: exported from this checkpoint already; nothing to do")
        return None
    if not filesystem.is_remote(config.export_dir):
        return _export(config, config.export_dir)
    url = config.export_dir.rstrip("/")
    with temporary_folder() as folder:
        _check_vacant(url)
        local = dataclasses.replace(config, export_dir=os.path.join(folder, "model"))
        _export(local, url)


def _is_exported(config: ExportConfig) -> bool:
    """Whether the folder holds the model of the same checkpoint with the same calibration.

    So that a chain of commands that was broken off may be run again.
    """
    place = config.export_dir.rstrip("/")
    path = f"{place}/{MULTIHOT_FILE}"
    if filesystem.is_remote(place):
        text = read_object(path)
    elif os.path.isfile(path):
        with open(path, "rb") as file:
            text = file.read()
    else:
        text = None
    if text is None:
        return False
    best = load_best(config.model_dir)
    calibration = _read_calibration(config, best)
    try:
        found = json.loads(text)
        return (
            found["fingerprints"]["checkpoint"] == best.fingerprint
            and found["thresholds"] == calibration["thresholds"]
            and all(
                found["calibration"][name] == calibration[name]
                for name in ("calibrated", "scale", "shift")
            )
        )
    except (ValueError, TypeError, KeyError):
        return False


def _check_vacant(url: str) -> dict[str, int]:
    """Refuses a folder of Cloud Storage that holds a model or anything but parts of one.

    Without multihot.json, its files are those that an upload left which was broken off.

    Returns:
      The generations of these files by name.
    """
    found = {item.url.removeprefix(f"{url}/"): item for item in list_objects(f"{url}/")}
    strange = sorted(name for name in found if not _UPLOADED.fullmatch(name))
    if MULTIHOT_FILE in found or strange:
        holds = strange[0] if strange else MULTIHOT_FILE
        raise UserError(
            f"--export_dir={url}: holds {holds} and is not an empty folder; remove it or name "
            "another"
        )
    return {name: item.generation for name, item in found.items()}


def _upload(folder: str, url: str) -> None:
    """Copies a model folder to Cloud Storage; multihot.json, which makes it one, comes last."""
    names = [
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, files in os.walk(folder)
        for name in files
    ]
    names.remove(MULTIHOT_FILE)
    try:
        left = _check_vacant(url)
        made = upload_files(url, folder, names, generations=left)
        # Another one may have taken ours for what a broken-off upload left.
        now = _check_vacant(url)
        for name, item in zip(names, made, strict=True):
            if now.get(name) != item.generation:
                raise Taken(item.url)
        upload(f"{url}/{MULTIHOT_FILE}", os.path.join(folder, MULTIHOT_FILE), if_generation=0)
    except Taken as taken:
        raise UserError(
            f"--export_dir={url}: another `multihot export` has written {taken} meanwhile; remove "
            "it or name another"
        ) from None


def _export(config: ExportConfig, shown_dir: str) -> None:
    """Writes the model folder to a local folder, and from there to `shown_dir` if that is a URL."""
    if os.path.exists(config.export_dir) and (
        not os.path.isdir(config.export_dir) or os.listdir(config.export_dir)
    ):
        raise UserError(
            f"--export_dir={config.export_dir}: exists and is not an empty folder; "
            "remove it or name another"
        )
    best = load_best(config.model_dir)
    data_dir = config.data_dir or best.record.train.data_dir
    metadata = load_metadata(data_dir)
    tokenizer = load_tokenizer(os.path.join(data_dir, TOKENIZER_FOLDER))
    if tokenizer.fingerprint != best.record.tokenizer_fingerprint:
        raise UserError(
            f"{data_dir}/{TOKENIZER_FOLDER}: not the tokenizer that {config.model_dir} was "
            "trained with; give the --data_dir that it was trained on"
        )
    calibration = _read_calibration(config, best)
    _fold(best.model, calibration["scale"], calibration["shift"])

    parent = os.path.dirname(absolute(config.export_dir))
    os.makedirs(parent, exist_ok=True)
    aside = absolute(config.export_dir) + ".tmp"
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    try:
        packing = _scoring_packing(metadata, best.packing.num_tokens)
        _write_weights(best.model, aside)
        _write_config(best, aside, tokenizer)
        tokenizer.save(aside, best.record.max_seq_length)
        _write_saved_model(best.model, packing, os.path.join(aside, SAVED_MODEL_FOLDER))
        # Apart from multihot.json: of equal models two SavedModels differ in names of functions.
        _write_json(os.path.join(aside, DIGEST_FILE), {"sha256": digest_saved_model(aside)})
        # Last, because its presence is what says that the folder is a model folder.
        _write_json(
            os.path.join(aside, MULTIHOT_FILE),
            _describe(best, metadata, packing, calibration),
        )
        if os.path.isdir(config.export_dir):
            os.rmdir(config.export_dir)
        os.rename(aside, config.export_dir)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if filesystem.is_remote(shown_dir):
        _upload(config.export_dir, shown_dir)
    consumers = (
        "transformers' BertForSequenceClassification, " if best.record.model.head == "cls" else ""
    )
    print(
        f"{shown_dir}: model folder of step {best.step} for {consumers}"
        f"{SAVED_MODEL_FOLDER}/ and multihot score. Next: multihot score "
        f"--model={shown_dir} --input=FILES --output_dir=DIR"
    )


def _read_calibration(config: ExportConfig, best: LoadedRun) -> dict[str, Any]:
    """Scale, shift and thresholds [L]; those of an uncalibrated model if asked for."""
    count = len(best.record.labels)
    if config.uncalibrated:
        return {
            "scale": [1.0] * count,
            "shift": [0.0] * count,
            "thresholds": [0.5] * count,
            "calibrated": False,
            "metrics": None,
        }
    folder = os.path.join(config.model_dir, EVALUATION_FOLDER)
    remedy = "run `multihot evaluate` first, or give --uncalibrated"
    try:
        calibration = json.loads(filesystem.read_text(os.path.join(folder, CALIBRATION_FILE)))
        metrics = json.loads(filesystem.read_text(os.path.join(folder, METRICS_FILE)))
    except FileNotFoundError:
        raise UserError(f"{folder}: no calibration of this run; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{folder}: damaged ({error}); {remedy}") from None
    found = calibration["fingerprints"]["checkpoint"]
    if found != best.fingerprint:
        raise UserError(
            f"{folder}: calibrates checkpoint {found[:12]}, but the best one is now "
            f"{best.fingerprint[:12]}; {remedy}"
        )
    shown = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float, str)) or value is None
    }
    return calibration | {"calibrated": True, "metrics": shown}


def _fold(model: Model, scale: list[float], shift: list[float]) -> None:
    """Puts scale x logit + shift into the head: both of its products are linear in the kernel."""
    classifier = model.head.classifier
    factor = np.asarray(scale, np.float64)
    kernel, bias = classifier.kernel.numpy(), classifier.bias.numpy()
    classifier.kernel.assign((kernel * factor).astype(np.float32))
    classifier.bias.assign((bias * factor + np.asarray(shift, np.float64)).astype(np.float32))


def _scoring_packing(metadata: Metadata, num_tokens: int) -> PackingConfig:
    """A micro-batch for texts like the training split's, which may be as long as allowed."""
    split, longest, most = metadata.split("train"), metadata.max_seq_length, metadata.max_windows
    packing = choose_packing(
        split.length_histogram, max(num_tokens, min_tokens(longest, most)), longest=longest,
        window_histogram=split.window_histogram, document_windows=most,
    )  # fmt: skip
    return with_slots_for_scoring(packing)


def _write_weights(model: Model, folder: str) -> None:
    values = {name: variable.numpy() for name, variable in model.named_variables().items()}
    encoder = from_variables(values, model.config)
    if model.config.head == "cls":
        tensors = {f"bert.{name}": value for name, value in encoder.items()}
        tensors["classifier.weight"] = np.ascontiguousarray(values["head/classifier/kernel"].T)
        tensors["classifier.bias"] = values["head/classifier/bias"]
        own = [name for name in values if name.startswith("head/window_pooling/")]
    else:
        tensors = encoder
        own = [name for name in values if name.startswith("head/")]
    tensors |= {f"{HEAD_PREFIX}{name}": values[name] for name in own}
    save_file(tensors, os.path.join(folder, WEIGHTS_FILE), metadata={"format": "pt"})


def _write_config(best: LoadedRun, folder: str, tokenizer: Tokenizer) -> None:
    sizes, labels = best.record.model, best.record.labels
    is_standard = sizes.head == "cls"
    transformers.BertConfig(
        architectures=["BertForSequenceClassification" if is_standard else "BertModel"],
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        hidden_act=sizes.hidden_act,
        hidden_dropout_prob=sizes.hidden_dropout,
        attention_probs_dropout_prob=sizes.attention_dropout,
        max_position_embeddings=sizes.max_position_embeddings,
        type_vocab_size=sizes.type_vocab_size,
        initializer_range=sizes.initializer_range,
        layer_norm_eps=sizes.layer_norm_eps,
        pad_token_id=tokenizer.pad_id,
        problem_type="multi_label_classification",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    ).save_pretrained(folder)


def _write_saved_model(model: Model, packing: PackingConfig, folder: str) -> None:
    module = tf.Module()
    module.model = model

    def answer(logits: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": logits, "probabilities": tf.sigmoid(logits)}

    def tokens(name: str) -> tf.TensorSpec:
        return tf.TensorSpec([None, None], tf.int32, name=name)

    @tf.function(
        input_signature=[tokens("input_ids"), tokens("attention_mask"), tokens("token_type_ids")],
        autograph=False,
    )
    def serve(input_ids, attention_mask, token_type_ids):  # type: ignore[no-untyped-def]
        batch, groups, rows = pad_batch(input_ids, attention_mask, token_type_ids)
        return answer(model(batch, row_groups=groups, num_documents=rows))

    def ids(name: str, size: int) -> tf.TensorSpec:
        return tf.TensorSpec([size], tf.int32, name=name)

    num_tokens, num_windows = packing.num_tokens, packing.max_windows

    @tf.function(
        input_signature=[
            ids("input_ids", num_tokens),
            ids("position_ids", num_tokens),
            ids("segment_ids", num_tokens),
            ids("window_starts", num_windows),
            ids("window_document", num_windows),
        ],
        autograph=False,
    )
    def packed(input_ids, position_ids, segment_ids, window_starts, window_document):  # type: ignore[no-untyped-def]
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "segment_ids": segment_ids,
            "window_starts": window_starts,
            "window_document": window_document,
        }
        return answer(
            model(batch, row_groups=packing.row_groups, num_documents=packing.max_documents)
        )

    tf.saved_model.save(module, folder, signatures={"serving_default": serve, "packed": packed})


def _describe(
    best: LoadedRun,
    metadata: Metadata,
    packing: PackingConfig,
    calibration: dict[str, Any],
) -> dict[str, Any]:
    record = best.record
    return {
        "format_version": _FORMAT_VERSION,
        "labels": record.labels,
        "head": record.model.head,
        "max_seq_length": record.max_seq_length,
        "max_windows": metadata.max_windows,
        "window_stride": metadata.window_stride,
        "window_pooling": record.model.window_pooling,
        "packing": dataclasses.asdict(packing),
        "thresholds": calibration["thresholds"],
        "pos_weights": record.pos_weights,
        "calibration": {
            "calibrated": calibration["calibrated"],
            "scale": calibration["scale"],
            "shift": calibration["shift"],
            "folded_into_weights": True,
        },
        "fingerprints": {
            "checkpoint": best.fingerprint,
            "tokenizer": record.tokenizer_fingerprint,
            "data": record.data_fingerprint,
        },
        "metrics": calibration["metrics"],
        "versions": record.versions
        | {"multihot_export": trainer.__version__, "transformers": transformers.__version__},
    }


def _write_json(path: str, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")


if __name__ == "__main__":
    from trainer.cli import main

    main(["export", *sys.argv[1:]])
