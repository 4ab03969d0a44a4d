"""Head and wide part start at a convex fit, before the first step of fine-tuning.

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution" (arXiv:2202.10054): with a head that starts at random, the first steps distort
the encoder to suit it, and rare labels have few steps to recover in. Here the training documents
pass the encoder once, as it stands, and all labels' logistic regressions are solved.
"""

import os
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from sklearn.utils.extmath import randomized_svd

from trainer.data.metadata import TOKENIZER_FOLDER, TRAIN_SPLIT, Metadata
from trainer.data.records import Documents, read_documents
from trainer.data.tokenizer import load_tokenizer
from trainer.linear.logistic import Features
from trainer.linear.selected_fit import TERM_STRENGTHS, SelectedFit, fit_selected, fit_vectors
from trainer.linear.term_features import count_terms, inverse_frequencies, weigh_terms
from trainer.model.model import Model
from trainer.model.predictor import Predictor
from trainer.runtime import devices
from trainer.runtime.progress import show_progress
from trainer.training import losses
from trainer.training.run_record import RunRecord

# Tokens of the documents, which are held in memory together with what is counted of them.
_MAX_TOKENS = 2**25


@dataclass(frozen=True)
class HeadStart:
    """What a run starts with: values by the names of variables, and the fits they come from.

    `fits` are those to the documents' `vectors` and `terms`, where they were made.
    """

    values: dict[str, np.ndarray]
    fits: dict[str, SelectedFit]
    documents: int


def find_head_start(
    record: RunRecord, metadata: Metadata, model: Model, strategy: tf.distribute.Strategy
) -> HeadStart:
    """Fits head and wide part to the training split; all hosts get the chief's values.

    Of an encoder from scratch only the wide part is fitted: its vectors mean nothing yet.
    """
    config = record.train
    fits_vectors = config.head_start == "fit" and config.init_checkpoint is not None
    if not fits_vectors and model.wide is None:
        return HeadStart({}, {}, 0)
    split = metadata.split(TRAIN_SPLIT)
    mean_length = max(1, split.tokens // split.documents)
    count = min(split.documents, config.head_start_documents, -(-_MAX_TOKENS // mean_length))
    documents = read_documents(config.data_dir, metadata, TRAIN_SPLIT, np.arange(count))
    fits: dict[str, SelectedFit] = {}
    values: dict[str, np.ndarray] = {}
    if fits_vectors:
        vectors = _document_vectors(record, metadata, model, strategy, count)
        _say(f"fitting {len(metadata.labels)} labels to {count:,} documents' vectors")
        fits["vectors"] = fit_vectors(vectors, documents.labels)
        values |= _head_values(fits["vectors"], record, metadata)
    if model.wide is not None:
        _say(f"fitting {len(metadata.labels)} labels to {count:,} documents' WordPieces")
        features, tables = _term_features(documents, record)
        fits["terms"] = fit_selected(features, documents.labels, TERM_STRENGTHS)
        bias = fits["terms"].model.bias + _bias_shift(record, metadata)
        values |= tables | {
            "wide/kernel": fits["terms"].model.weights,
            "wide/bias": bias.astype(np.float32),
        }
    return HeadStart(_from_chief(values, strategy), fits, count)


def _say(line: str) -> None:
    print(f"head start: {line} ...", flush=True)


def _document_vectors(
    record: RunRecord,
    metadata: Metadata,
    model: Model,
    strategy: tf.distribute.Strategy,
    count: int,
) -> np.ndarray:
    """What the classifier takes, float32 [count, hidden], of the first training documents."""
    predictor = Predictor(model.document_vectors, record.packing, strategy)
    vectors = np.zeros((count, record.model.hidden_size), np.float32)
    config = record.train
    with show_progress(config.progress, "head start", count, "documents") as bar:
        blocks = predictor.predict_blocks(config.data_dir, metadata, TRAIN_SPLIT, count)
        for block in blocks:
            vectors[block.indices] = block.logits
            bar.update(len(block.ids))
    return vectors


def _term_features(
    documents: Documents, record: RunRecord
) -> tuple[Features, dict[str, np.ndarray]]:
    """The wide part's features of the documents, and the values of its `idf` and `terms`."""
    counts = count_terms(documents.windows, record.model.vocab_size, record.model.wide_pairs)
    tokenizer = load_tokenizer(os.path.join(record.train.data_dir, TOKENIZER_FOLDER))
    idf = inverse_frequencies(counts, (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id))
    features, rank = weigh_terms(counts, idf), record.model.wide_rank
    if not rank:
        return features, {"wide/idf": idf}
    # Latent semantic analysis (Deerwester et al. 1990): the regressions take its axes.
    num_axes = min(rank, *features.shape)
    _, _, axes = randomized_svd(features, num_axes, random_state=record.train.seed)
    terms = np.zeros((record.model.num_wide_terms, rank), np.float32)
    terms[:, :num_axes] = axes.T
    return np.asarray(features @ terms, np.float32), {"wide/idf": idf, "wide/terms": terms}


def _head_values(fit: SelectedFit, record: RunRecord, metadata: Metadata) -> dict[str, np.ndarray]:
    """Kernel and bias of the head, and the queries of label attention."""
    values = {
        "head/classifier/kernel": fit.model.weights,
        "head/classifier/bias": (fit.model.bias + _bias_shift(record, metadata)).astype(np.float32),
    }
    if record.model.head == "label_attention":
        # Without queries all tokens weigh the same, as in the fit.
        values["head/query/kernel"] = np.zeros_like(fit.model.weights)
    return values


def _bias_shift(record: RunRecord, metadata: Metadata) -> np.ndarray:
    """What positive weights and the loss add to log-odds, float64 [L]."""
    split = metadata.split(TRAIN_SPLIT)
    offset = losses.logit_offset(record.train.objective, split.label_counts, split.documents)
    return np.log(np.asarray(record.pos_weights)) - offset


def _from_chief(
    values: dict[str, np.ndarray], strategy: tf.distribute.Strategy
) -> dict[str, np.ndarray]:
    """The chief's values on all hosts, whose processors may round otherwise."""
    if devices.num_workers(strategy) == 1:
        return values
    return {name: devices.from_chief(strategy, value) for name, value in values.items()}
