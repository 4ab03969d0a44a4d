"""`multihot export`: the best checkpoint and its calibration to one model folder.

The calibration folds exactly into the kernels of head and wide part and into the head's bias. So
every consumer of the folder (transformers, the SavedModel, `multihot score`) gets calibrated
probabilities from a plain sigmoid.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import transformers

import trainer
from trainer.config import absolute
from trainer.data.metadata import TOKENIZER_FOLDER, Metadata, load_metadata
from trainer.data.packing import choose_score_packing
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.evaluation.results import (
    CALIBRATION,
    CALIBRATION_FILE,
    EVALUATION_FOLDER,
    METRICS_FILE,
    NARROW,
    NARROW_FILES,
)
from trainer.evaluation.thresholds import round_thresholds
from trainer.model.folder_writer import save_model_folder
from trainer.model.model import Model
from trainer.model.model_folder import (
    MODELING_FILE,
    MULTIHOT_FILE,
    ONNX_FILE,
    SAVED_MODEL_FOLDER,
    list_model_files,
)
from trainer.model.quantization import QUANTIZATION_FILE
from trainer.model_config import PackingConfig
from trainer.run_config import ExportConfig
from trainer.runtime.owner import OWNER_FILE, owned
from trainer.storage import filesystem
from trainer.storage.gcs import Taken, list_objects, read_object, upload, upload_files
from trainer.storage.own_files import MAX_BYTES, load, parse
from trainer.storage.temporary import temporary_folder
from trainer.training.checkpoint import LoadedRun, load_best
from trainer.training.setup import data_fingerprint

_FORMAT_VERSION = 1
_CALIBRATION = ("calibrated", "scale", "shift")
_UPLOADED = re.compile(
    rf"[\w.-]+\.(json|safetensors|txt)|{re.escape(MODELING_FILE)}|{re.escape(ONNX_FILE)}"
    r"|saved_model/.*"
)


def run(config: ExportConfig) -> None:
    """Writes the model folder, whole or not at all; nothing if it is there already.

    A UserError names what is missing or does not fit, or says that the folder is taken.
    """
    if config.has_onnx:
        import trainer.model.onnx_graph  # noqa: F401  Says at once if its package is missing.
    if _is_up_to_date(config):
        print(f"{config.export_dir}: exported from this checkpoint already; nothing to do")
        return
    url = absolute(config.export_dir).rstrip("/")
    # Beside the folder, which appears whole.
    with owned(f"{url}.{OWNER_FILE}", f"--export_dir={config.export_dir}", "export"):
        if not filesystem.is_remote(url):
            _export(config, config.export_dir)
            return
        with temporary_folder() as folder:
            _check_vacant(url)
            local = dataclasses.replace(config, export_dir=os.path.join(folder, "model"))
            _export(local, url)


def _is_up_to_date(config: ExportConfig) -> bool:
    """Whether the folder holds this checkpoint and calibration, as when a command is run again."""
    place = config.export_dir.rstrip("/")
    path = f"{place}/{MULTIHOT_FILE}"
    if filesystem.is_remote(place):
        text = read_object(path)
    elif os.path.isfile(path):
        text = filesystem.read_bytes(path, MAX_BYTES)
    else:
        text = None
    if text is None or (config.has_onnx and not _has_file(f"{place}/{ONNX_FILE}")):
        return False
    best = load_best(config.model_dir)
    calibration = _read_calibration(config, best)
    try:
        found = parse(dict[str, Any], text, path, "")
        return (
            found["fingerprints"]["checkpoint"] == best.fingerprint
            # Older folders have them unrounded.
            and round_thresholds(found["thresholds"]) == calibration["thresholds"]
            and all(found["calibration"][name] == calibration[name] for name in _CALIBRATION)
            and found.get("precisions", {}) == _read_narrow(config, best)
        )
    except (ValueError, TypeError, KeyError):
        return False


def _has_file(path: str) -> bool:
    return any(list_objects(path)) if filesystem.is_remote(path) else os.path.exists(path)


def _check_vacant(url: str) -> dict[str, int]:
    """Generations of an interrupted upload's files; refuses a folder with anything else."""
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
    names = [name for name in list_model_files(folder) if name != MULTIHOT_FILE]
    try:
        left = _check_vacant(url)
        made = upload_files(url, folder, names, generations=left)
        # Another export may have taken our files for those of an interrupted upload.
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
    data = data_fingerprint(metadata, best.record.train.eval_split)
    expected = best.record.tokenizer_fingerprint, best.record.data_fingerprint
    # Of other data the windows and lengths would be other ones than the model has learned.
    if (tokenizer.fingerprint, data) != expected:
        what = "data" if tokenizer.fingerprint == expected[0] else "tokenizer"
        raise UserError(
            f"{data_dir}: not the {what} that {config.model_dir} was trained with; give the "
            "--data_dir that it was trained on"
        )
    calibration = _read_calibration(config, best)
    _fold(best.model, calibration["scale"], calibration["shift"])
    split = metadata.split("train")
    padding = metadata.max_seq_length + 1 - len(split.length_histogram)
    packing = choose_score_packing(
        np.pad(split.length_histogram, (0, padding)), np.asarray(split.window_histogram),
        best.packing.num_tokens, metadata.max_windows,
    )  # fmt: skip
    narrow, scales = _read_narrow(config, best), None
    if "int8" in narrow:
        scales = _read_scales(config)
    description = _describe(best, metadata, packing, calibration) | {"precisions": narrow}
    with _written_aside(absolute(config.export_dir)) as aside:
        save_model_folder(
            aside, best.model, tokenizer, packing, description, config.has_onnx, scales
        )
    if filesystem.is_remote(shown_dir):
        _upload(config.export_dir, shown_dir)
    is_ours = MODELING_FILE in list_model_files(config.export_dir)
    transformers_needs = " (trust_remote_code=True)" if is_ours else ""
    readers = f"{SAVED_MODEL_FOLDER}/" + (f", {ONNX_FILE}" if config.has_onnx else "")
    print(
        f"{shown_dir}: model folder of step {best.step} for transformers{transformers_needs}, "
        f"{readers} and multihot score. Next: multihot score "
        f"--model={shown_dir} --input=FILES --output_dir=DIR"
    )


@contextlib.contextmanager
def _written_aside(folder: str) -> Iterator[str]:
    """An empty folder that takes the place of `folder` at the end of the block, or goes."""
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    aside = folder + ".tmp"
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    try:
        yield aside
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _read_calibration(config: ExportConfig, best: LoadedRun) -> dict[str, Any]:
    """Scale, shift and thresholds [L]; those of an uncalibrated model if asked for."""
    count = len(best.record.labels)
    if config.uncalibrated:
        neutral = {"scale": [1.0] * count, "shift": [0.0] * count, "thresholds": [0.5] * count}
        return neutral | {"calibrated": False, "metrics": None}
    folder = os.path.join(config.model_dir, EVALUATION_FOLDER)
    remedy = "run `multihot evaluate` first, or give --uncalibrated"
    try:
        calibration = load(CALIBRATION, os.path.join(folder, CALIBRATION_FILE), remedy)
        metrics = load(dict[str, Any], os.path.join(folder, METRICS_FILE), remedy)
    except FileNotFoundError:
        raise UserError(f"{folder}: no calibration of this run; {remedy}") from None
    if any(len(calibration[name]) != count for name in ("scale", "shift", "thresholds")):
        raise UserError(f"{folder}/{CALIBRATION_FILE}: not of {count} labels; {remedy}")
    found = calibration["fingerprints"]["checkpoint"]
    if found != best.fingerprint:
        raise UserError(
            f"{folder}: calibrates checkpoint {found[:12]}, but the best one is now "
            f"{best.fingerprint[:12]}; {remedy}"
        )
    scalars = (int, float, str, type(None))
    shown = {name: value for name, value in metrics.items() if isinstance(value, scalars)}
    rounded = {"thresholds": round_thresholds(calibration["thresholds"])}
    return calibration | rounded | {"calibrated": True, "metrics": shown}


def _read_narrow(config: ExportConfig, best: LoadedRun) -> dict[str, Any]:
    """Thresholds, metrics and differences of the narrower precisions that were measured."""
    measured: dict[str, Any] = {}
    if config.uncalibrated:
        return measured
    for precision, name in NARROW_FILES.items():
        path = os.path.join(config.model_dir, EVALUATION_FOLDER, name)
        remedy = f"run `multihot evaluate --precision={precision}` again"
        try:
            found = load(NARROW, path, remedy)
        except FileNotFoundError:
            continue
        if len(found["thresholds"]) != len(best.record.labels):
            raise UserError(f"{path}: not of {len(best.record.labels)} labels; {remedy}")
        rounded = round_thresholds(found["thresholds"])
        kept = {name: found[name] for name in ("metrics", "difference")}
        measured[precision] = {"thresholds": rounded} | kept
    return measured


def _read_scales(config: ExportConfig) -> bytes:
    """The file that says how layers' inputs become int8."""
    path = os.path.join(config.model_dir, EVALUATION_FOLDER, QUANTIZATION_FILE)
    try:
        return filesystem.read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; run `multihot evaluate --precision=int8` again"
        ) from None


def _fold(model: Model, scale: list[float], shift: list[float]) -> None:
    """Folds scale x logit + shift, and the mixture of both parts, into their kernels and one bias.

    The logits are then the plain sum of head and wide part, each linear in kernel and bias.
    """
    parts = [model.head.classifier]
    weights = [np.asarray(scale, np.float64)]
    if model.wide is not None:
        mix = model.wide.mix.numpy().astype(np.float64)
        parts.append(model.wide)
        weights = [weights[0] * share for share in mix]
        model.wide.mix.assign(np.ones(2, np.float32))
    bias = np.asarray(shift, np.float64)
    for part, factor in zip(parts, weights, strict=True):
        bias = bias + part.bias.numpy() * factor
        part.kernel.assign((part.kernel.numpy() * factor).astype(np.float32))
        part.bias.assign(np.zeros(len(bias), np.float32))
    model.head.classifier.bias.assign(bias.astype(np.float32))


def _describe(
    best: LoadedRun, metadata: Metadata, packing: PackingConfig, calibration: dict[str, Any]
) -> dict[str, Any]:
    """What multihot.json says."""
    record = best.record
    return {
        "format_version": _FORMAT_VERSION,
        "labels": record.labels,
        "head": record.model.head,
        "wide": record.model.wide,
        "wide_pairs": record.model.wide_pairs,
        "max_seq_length": record.max_seq_length,
        "max_windows": metadata.max_windows,
        "window_stride": metadata.window_stride,
        "window_pooling": record.model.window_pooling,
        "packing": dataclasses.asdict(packing),
        "thresholds": calibration["thresholds"],
        "pos_weights": record.pos_weights,
        "calibration": {name: calibration[name] for name in _CALIBRATION}
        | {"folded_into_weights": True},
        "fingerprints": {
            "checkpoint": best.fingerprint,
            "tokenizer": record.tokenizer_fingerprint,
            "data": record.data_fingerprint,
        },
        "metrics": calibration["metrics"],
        "versions": record.versions
        | {"multihot_export": trainer.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    from trainer.cli import main

    main(["export", *sys.argv[1:]])
