"""`multihot report`: an evaluation as one page that opens anywhere.

It reads what `train` and `evaluate` wrote. The data folder gives the texts of the mistakes.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from jinja2 import UndefinedError

from trainer.data.metadata import (
    METADATA_FILE,
    TOKENIZER_FOLDER,
    Metadata,
    load_metadata,
    split_fingerprint,
)
from trainer.data.records import read_documents
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.evaluation.results import CURVES_FILE, EVALUATION_FOLDER, METRICS_FILE
from trainer.reporting.page import MAX_CHARACTERS, Material, render
from trainer.run_config import ReportConfig
from trainer.storage import filesystem
from trainer.storage.filesystem import write_atomically
from trainer.storage.own_files import fields, load, parse
from trainer.training.checkpoint import load_best
from trainer.training.run_record import RunRecord, load_record

REPORT_FILE = "report.html"
HISTORY_FILE = "metrics.jsonl"

_logger = logging.getLogger(__name__)


def run(config: ReportConfig) -> None:
    """Writes report.html into the model folder.

    A UserError says that there is no evaluation, it is not of the best checkpoint, or the data
    folder is not the one that it read.
    """
    record = load_record(config.model_dir)
    metrics = _read_evaluation(config.model_dir, METRICS_FILE)
    curves = _read_evaluation(config.model_dir, CURVES_FILE)
    _check_checkpoint(config, metrics, curves)
    with _naming_damaged_files(config.model_dir):
        page = _make_page(config, record, metrics, curves).encode("utf-8")
    path = os.path.join(config.model_dir, REPORT_FILE)
    write_atomically(path, page)
    print(f"Wrote {path} ({len(page) / 1e6:.1f} MB); open it in a browser")


def _make_page(
    config: ReportConfig, record: RunRecord, metrics: dict[str, Any], curves: dict[str, Any]
) -> str:
    """The page of an evaluation: data, texts and history are read on the way."""
    data_dir = config.data_dir or record.train.data_dir
    metadata = _open_data(config, data_dir, metrics)
    if "baseline" not in metrics:
        _logger.warning(
            "%s: the evaluation has no TF-IDF baseline; run `multihot evaluate` again for one",
            config.model_dir,
        )
    texts = {}
    if metadata is not None:
        texts = _read_texts(data_dir, metadata, metrics["split"], curves["mistakes"])
    history = _read_history(config.model_dir)
    return render(Material(config.model_dir, record, metrics, curves, history, metadata, texts))


@contextlib.contextmanager
def _naming_damaged_files(model_dir: str) -> Iterator[None]:
    """Turns what a value of another kind causes in the page into a UserError.

    The page shows hundreds of values, most as they come: a declared shape would repeat the page.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    except UndefinedError as error:
        reason = str(error)
    else:
        return
    raise UserError(
        f"{os.path.join(model_dir, EVALUATION_FOLDER)}: {METRICS_FILE}, {CURVES_FILE} or "
        f"{HISTORY_FILE} beside it is damaged ({reason}); run `multihot evaluate` again"
    )


def _read_evaluation(model_dir: str, name: str) -> dict[str, Any]:
    path = os.path.join(model_dir, EVALUATION_FOLDER, name)
    remedy = f"run `multihot evaluate --model_dir={model_dir} --data_dir=...` first"
    try:
        kind = fields(fingerprints=fields(checkpoint=str, splits=dict[str, str]))
        return load(kind, path, remedy, what="not what `multihot evaluate` writes")
    except FileNotFoundError:
        raise UserError(f"{path}: not there, so there is nothing to report; {remedy}") from None


def _check_checkpoint(config: ReportConfig, *evaluated: dict[str, Any]) -> None:
    best = load_best(config.model_dir).fingerprint
    for values in evaluated:
        found = values["fingerprints"]["checkpoint"]
        if found != best:
            raise UserError(
                f"{config.model_dir}: the evaluation is of checkpoint {found[:12]}, but the best "
                f"one is now {best[:12]}; run `multihot evaluate --model_dir={config.model_dir} "
                "--data_dir=...` again"
            )


def _open_data(config: ReportConfig, data_dir: str, metrics: dict[str, Any]) -> Metadata | None:
    """metadata.json of the data that was evaluated; None, with a warning, if it has gone."""
    if config.data_dir is None and not filesystem.exists(os.path.join(data_dir, METADATA_FILE)):
        _logger.warning(
            "%s: not there any more; the report goes without the data's page and the texts of "
            "mistakes, unless --data_dir names where it is now",
            data_dir,
        )
        return None
    metadata = load_metadata(data_dir)
    for name, expected in metrics["fingerprints"]["splits"].items():
        found = split_fingerprint(metadata, name)
        if found != expected:
            raise UserError(
                f"{data_dir}: not the data that was evaluated (split {name!r} has fingerprint "
                f"{found[:12]}, expected {expected[:12]}); name the folder that `multihot "
                "evaluate` read with --data_dir, or evaluate again"
            )
    return metadata


def _read_texts(
    data_dir: str, metadata: Metadata, split: str, mistakes: dict[str, list[dict[str, Any]]]
) -> dict[int, str]:
    """Texts of the mistaken documents by place in the split, decoded from their tokens and cut."""
    found = [mistake["index"] for kind in mistakes.values() for mistake in kind]
    places = np.unique(np.array(found, np.int64))
    documents = read_documents(data_dir, metadata, split, places)
    backend = load_tokenizer(os.path.join(data_dir, TOKENIZER_FOLDER)).backend
    texts = {}
    for place, tokens in zip(places.tolist(), documents.tokens, strict=True):
        # A token is at least one character.
        text = backend.decode(tokens[:MAX_CHARACTERS].tolist(), skip_special_tokens=False)
        is_cut = len(text) > MAX_CHARACTERS or len(tokens) > MAX_CHARACTERS
        texts[place] = text[:MAX_CHARACTERS].rstrip() + (" …" if is_cut else "")
    return texts


def _read_history(model_dir: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without a last one that a killed run left half-written."""
    try:
        lines = filesystem.read_text(os.path.join(model_dir, HISTORY_FILE)).splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(parse(dict[str, Any], line, HISTORY_FILE, ""))
        except UserError:
            break
    return rows


if __name__ == "__main__":
    from trainer.cli import main

    main(["report", *sys.argv[1:]])
