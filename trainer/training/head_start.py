"""Head and wide part start at a convex fit, before the first step of fine-tuning.

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution"
(arXiv:2202.10054): with a head that starts at random, the first steps distort the encoder to suit
it, and rare labels have few steps to recover in. Here the training documents pass the encoder once,
as it stands, and all labels' logistic regressions are solved.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from sklearn.utils.extmath import randomized_svd

from trainer.data.metadata import TRAIN_SPLIT, Metadata
from trainer.data.records import Documents, read_documents
from trainer.linear.joint_fit import JointFit, fit_jointly
from trainer.linear.logistic import Features, LinearModel
from trainer.linear.term_features import count_terms, inverse_frequencies, weigh_terms
from trainer.model.model import Model
from trainer.model.predictor import Predictor
from trainer.runtime import devices
from trainer.runtime.progress import show_progress
from trainer.training import losses
from trainer.training.run_record import RunRecord


@dataclasses.dataclass(frozen=True)
class HeadStart:
    """What the start gives: values by the names of variables, and the fit that they come from."""

    values: dict[str, np.ndarray]
    fit: JointFit
    documents: int


def find_head_start(
    record: RunRecord, metadata: Metadata, model: Model, strategy: tf.distribute.Strategy
) -> HeadStart:
    """Fits head and wide part to the training split; all hosts get the chief's values.

    Of an encoder from scratch only the wide part is fitted: its vectors mean nothing yet.
    """
    config = record.train
    count = min(metadata.split(TRAIN_SPLIT).documents, config.head_start_documents)
    documents = read_documents(
        config.data_dir, metadata, TRAIN_SPLIT, np.arange(count), repeat_shared=True
    )
    values: dict[str, np.ndarray] = {}
    features: Features | None = None
    if model.wide is not None:
        features = _term_features(documents, record, values)
    fit = JointFit(None, None)
    if config.head_start == "fit":
        vectors = None
        if config.init_checkpoint is not None:
            vectors = _document_vectors(record, metadata, model, strategy, count)
        if vectors is not None or features is not None:
            fit = fit_jointly(vectors, features, documents.labels, _say)
    _add_head(values, fit, record, metadata)
    if fit.terms is not None:
        values["wide/kernel"] = fit.terms.weights
    return HeadStart(_from_chief(values, strategy), fit, count)


def _say(line: str) -> None:
    print(f"head start: {line} ...", flush=True)


def _document_vectors(
    record: RunRecord,
    metadata: Metadata,
    model: Model,
    strategy: tf.distribute.Strategy,
    count: int,
) -> np.ndarray:
    """What the head's classifier takes, float32 [count, hidden], of the first training documents."""
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
    documents: Documents, record: RunRecord, values: dict[str, np.ndarray]
) -> Features:
    """The wide part's features of the documents; adds its `idf`, and `terms` of a low rank."""
    counts = count_terms(documents.tokens, record.model.vocab_size)
    values["wide/idf"] = inverse_frequencies(counts)
    features = weigh_terms(counts, values["wide/idf"])
    rank = record.model.wide_rank
    if not rank:
        return features
    # Latent semantic analysis (Deerwester et al. 1990): the regressions take its axes.
    _, _, axes = randomized_svd(
        features, min(rank, *features.shape), random_state=record.train.seed
    )
    terms = np.zeros((record.model.vocab_size, rank), np.float32)
    terms[:, : len(axes)] = axes.T
    values["wide/terms"] = terms
    return np.asarray(features @ terms, np.float32)


def _add_head(
    values: dict[str, np.ndarray], fit: JointFit, record: RunRecord, metadata: Metadata
) -> None:
    """Adds kernel and bias of the head, the bias as loss and positive weights move it."""
    split, objective = metadata.split(TRAIN_SPLIT), record.train.objective
    counts = split.label_counts, split.documents
    if fit.vectors is None and fit.terms is None:
        return
    bias = np.log(np.asarray(record.pos_weights)) - losses.logit_offset(objective, *counts)
    for part in (fit.vectors, fit.terms):
        bias = bias + (0 if part is None else part.bias)
    values["head/classifier/bias"] = bias.astype(np.float32)
    if fit.vectors is not None:
        values["head/classifier/kernel"] = fit.vectors.weights
        if record.model.head == "label_attention":
            # Without queries all tokens weigh the same, as in the fit.
            values["head/query/kernel"] = np.zeros_like(fit.vectors.weights)


def _from_chief(
    values: dict[str, np.ndarray], strategy: tf.distribute.Strategy
) -> dict[str, np.ndarray]:
    """The chief's values on all hosts, whose processors may round otherwise."""
    if devices.num_workers(strategy) == 1:
        return values
    return {name: devices.from_chief(strategy, value) for name, value in values.items()}
