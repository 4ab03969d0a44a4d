"""Head and wide part start at a convex fit, before the first step of fine-tuning.

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution" (arXiv:2202.10054): with a head that starts at random, the first steps distort
the encoder to suit it, and rare labels have few steps to recover in. Here the training documents
pass the encoder once, as it stands, and all labels' logistic regressions are solved.
"""

import os
from dataclasses import dataclass, replace

import numpy as np
import tensorflow as tf
from sklearn.utils.extmath import randomized_svd

from trainer.data.metadata import TOKENIZER_FOLDER, TRAIN_SPLIT, Metadata
from trainer.data.records import Documents, read_documents
from trainer.data.tokenizer import load_tokenizer
from trainer.linear.logistic import Features
from trainer.linear.selected_fit import TERM_STRENGTHS, SelectedFit, fit_selected, fit_vectors
from trainer.linear.term_features import count_terms, inverse_frequencies, weigh_terms
from trainer.model.model import Model, build_model
from trainer.model.predictor import Predictor
from trainer.model_config import PackingConfig
from trainer.run_config import TrainConfig
from trainer.runtime import devices
from trainer.runtime.progress import show_progress
from trainer.storage import filesystem
from trainer.training import losses, setup
from trainer.training.run_record import CONFIG_FILE, RunRecord, load_record

# Tokens of the documents, which are held in memory together with what is counted of them.
_MAX_TOKENS = 2**25
# Of the documents that --head=auto is settled on.
_HEAD_DOCUMENTS = 2000


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
    fits_vectors = config.head_start == "fit" and config.start is not None
    if not fits_vectors and model.wide is None:
        return HeadStart({}, {}, 0)
    split = metadata.split(TRAIN_SPLIT)
    mean_length = max(1, split.tokens // split.documents)
    count = min(split.documents, config.head_start_documents, -(-_MAX_TOKENS // mean_length))
    documents = read_documents(config.data_dir, metadata, TRAIN_SPLIT, np.arange(count))
    fits: dict[str, SelectedFit] = {}
    values: dict[str, np.ndarray] = {}
    if fits_vectors:
        vectors = _document_vectors(config, metadata, model, record.packing, strategy, count)
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
    # Other hosts' processors may round otherwise.
    agreed = {name: devices.from_chief(strategy, value) for name, value in values.items()}
    return HeadStart(agreed, fits, count)


def settle_head(
    config: TrainConfig,
    metadata: Metadata,
    packing: PackingConfig,
    strategy: tf.distribute.Strategy,
) -> str:
    """The head of a run: --head, or for `auto` that of the run already there, that of the
    checkpoint's pooling configuration, or the one of `mean` and `cls` whose fit ranks better.

    All hosts settle on the chief's. A fit cannot tell label attention from the mean, where it
    starts.
    """
    if config.head != "auto":
        return config.head
    if filesystem.exists(os.path.join(config.model_dir, CONFIG_FILE)):
        return load_record(config.model_dir).model.head
    with setup.local_start(config) as folder:
        head = setup.choose_head(config, folder)
        if folder is None or setup.own_head(folder) or config.head_start == "random":
            return head
    _say("comparing the heads mean and cls, as the checkpoint says nothing of its pooling")
    count = min(metadata.split(TRAIN_SPLIT).documents, _HEAD_DOCUMENTS)
    places = np.arange(count)
    labels = read_documents(config.data_dir, metadata, TRAIN_SPLIT, places).labels
    heads, precisions = ("mean", "cls"), []
    for head in heads:
        asked = replace(config, head=head, wide="none")
        sizes, values = setup.choose_model(asked, metadata, compares_words=False)
        with strategy.scope():
            model = build_model(sizes, devices.choose_precision(config.precision, strategy))
            setup.assign_values(model, values)
        vectors = _document_vectors(config, metadata, model, packing, strategy, count)
        precisions.append(fit_vectors(vectors, labels).held_out_precision)
    chief = devices.from_chief(strategy, np.asarray(precisions, np.float32))
    shown = ", ".join(f"{head} {value:.4f}" for head, value in zip(heads, chief, strict=True))
    _say(f"mean average precision on held-out documents: {shown}")
    return heads[int(np.argmax(chief))]


def _say(line: str) -> None:
    print(f"head start: {line}", flush=True)


def _document_vectors(
    config: TrainConfig,
    metadata: Metadata,
    model: Model,
    packing: PackingConfig,
    strategy: tf.distribute.Strategy,
    count: int,
) -> np.ndarray:
    """What the classifier takes, float32 [count, hidden], of the first training documents."""
    jit_compile = devices.should_jit_inference(config.jit_compile, strategy)
    predictor = Predictor(model.document_vectors, packing, strategy, jit_compile)
    vectors = np.zeros((count, model.config.hidden_size), np.float32)
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
