"""Linear baselines: TF-IDF, single WordPieces, and the vectors of an encoder that is not trained.

    python benchmarks/baselines.py [--folder=DIR] [--documents=8000] [--max_seq_length=512]

All have one logistic regression a label. TF-IDF of words and pairs, which the command line and
`compare_trainer.py` run, reads whole texts, not cut ones, and takes of three strengths of
regularisation the one with the best mean average precision on validation. `learning_curve.py` runs
all three.
"""

import argparse
import os
import time

import numpy as np
from corpus import (
    DATA_FOLDER,
    SPLITS,
    Documents,
    find_checkpoint,
    load_documents,
    load_texts,
    make_corpus,
    measure_logits,
)

from trainer.evaluation.calibration import sigmoid
from trainer.evaluation.metrics import compute_metrics
from trainer.linear.baseline import count_features, fit_logits
from trainer.linear.logistic import fit_logistic
from trainer.linear.term_features import count_terms, inverse_frequencies, weigh_terms

INVERSE_STRENGTHS = (1.0, 10.0, 100.0)
WORDPIECES_STRENGTH = 10.0


def run_tfidf(folder: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Validation and test logits of the best strength, and what the run took."""
    documents = {name: load_documents(folder, name) for name in SPLITS}
    began = time.perf_counter()
    vectorizer = count_features(dtype=np.float32)
    features = {}
    for name, split in documents.items():
        texts = load_texts(folder, split.names.tolist())
        fit = vectorizer.fit_transform if name == "train" else vectorizer.transform
        features[name] = fit(texts)
    best: tuple[float, float, dict[str, np.ndarray]] | None = None
    others = {name: features[name] for name in ("validation", "test")}
    for strength in INVERSE_STRENGTHS:
        logits = fit_logits(features["train"], documents["train"].labels, others, strength)
        labels = documents["validation"].labels
        thresholds = np.full(labels.shape[1], 0.5)
        metrics = compute_metrics(sigmoid(logits["validation"]), labels, thresholds)
        value = metrics["mean_average_precision"]
        if best is None or value > best[0]:
            best = (value, strength, logits)
    assert best is not None
    return best[2], {"inverse_strength": best[1], "seconds": time.perf_counter() - began}


def run_wordpieces(folder: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """As `run_tfidf`, of the WordPieces that the models read, without pairs and at one strength."""
    documents = {name: load_documents(folder, name) for name in SPLITS}
    began = time.perf_counter()
    vocab_size = 1 + max(int(split.tokens.max()) for split in documents.values())
    counts = {
        name: count_terms(_without_special_tokens(split), vocab_size, num_buckets=0)
        for name, split in documents.items()
    }
    idf = inverse_frequencies(counts["train"])
    model = fit_logistic(
        weigh_terms(counts["train"], idf), documents["train"].labels, WORDPIECES_STRENGTH
    )
    logits = {name: model.logits(weigh_terms(counts[name], idf)) for name in ("validation", "test")}
    about = {"inverse_strength": WORDPIECES_STRENGTH, "seconds": time.perf_counter() - began}
    return logits, about


def _without_special_tokens(documents: Documents) -> list[list[np.ndarray]]:
    ends = zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    return [[documents.tokens[first + 1 : last - 1]] for first, last in ends]


def run_frozen(folder: str, checkpoint: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """As `run_tfidf`, of the mean of each document's hidden states; the encoder is not trained.

    The strength of regularisation is chosen among the training documents. The seconds are those of
    their forward pass and of the fit.
    """
    from trainer.data.metadata import load_metadata
    from trainer.evaluation.measurement import concatenate
    from trainer.linear.selected_fit import fit_vectors
    from trainer.model.model import build_model
    from trainer.model.predictor import Predictor
    from trainer.run_config import TrainConfig
    from trainer.training.setup import assign_values, choose_model, choose_run_packing

    began = time.perf_counter()
    data_dir = os.path.join(folder, DATA_FOLDER)
    metadata = load_metadata(data_dir)
    config = TrainConfig(
        model_dir=folder, data_dir=data_dir, init_checkpoint=checkpoint, head="mean", wide="none"
    )
    sizes, values = choose_model(config, metadata)
    model = build_model(sizes)
    assign_values(model, values)
    predictor = Predictor(model.document_vectors, choose_run_packing(config, metadata))

    def vectors_of(split: str) -> np.ndarray:
        return concatenate(predictor.predict_blocks(data_dir, metadata, split)).logits

    fit = fit_vectors(vectors_of("train"), load_documents(folder, "train").labels)
    about = {
        "inverse_strength": fit.inverse_strength,
        "seconds": time.perf_counter() - began,
    }
    logits = {split: fit.model.logits(vectors_of(split)) for split in ("validation", "test")}
    return logits, about


def main() -> None:
    """Fits, and prints the metrics of the test split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="runs/compare", help="for the corpus")
    parser.add_argument("--documents", type=int, default=8000, help="to train on")
    parser.add_argument("--max_seq_length", type=int, default=512)
    parser.add_argument("--checkpoint", help="of the tokenizer; default: all-MiniLM-L6-v2")
    arguments = parser.parse_args()
    os.makedirs(arguments.folder, exist_ok=True)
    checkpoint = find_checkpoint(arguments.checkpoint)
    make_corpus(arguments.folder, arguments.documents, arguments.max_seq_length, checkpoint)
    logits, about = run_tfidf(arguments.folder)
    metrics = measure_logits(arguments.folder, logits)
    for name in ("mean_average_precision", "micro_f1", "macro_f1"):
        print(f"{name:24} {metrics[name]:.4f}")
    print(f"C = {about['inverse_strength']:g}, {about['seconds']:.0f} s")


if __name__ == "__main__":
    main()
