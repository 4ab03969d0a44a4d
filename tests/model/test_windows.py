"""Documents longer than the encoder: what lies late counts, and 3,000 words are one document."""

import gzip
import json
import os

import numpy as np
import pytest

from trainer import export, prepare, score, train
from trainer.config import PrepareConfig, ScoreConfig
from trainer.model.model_folder import load_model_folder
from trainer.model_config import OptimizerConfig
from trainer.run_config import ExportConfig, TrainConfig

LABELS = ("red", "green", "blue", "grey")
FILLERS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u")]
EVIDENCE_WORDS = 40


def make_text(rng, num_words, label, at):
    """Meaningless words, with the label's own 40 in a row from word `at` on."""
    words = rng.choice(FILLERS, num_words).tolist()
    words[at : at + EVIDENCE_WORDS] = [label] * EVIDENCE_WORDS
    return " ".join(words)


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory) -> str:
    """160 documents of 600 to 750 words whose evidence lies past the 520th."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("windows") / "late.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for index in range(160):
            num_words = int(rng.integers(600, 750))
            label = LABELS[index % len(LABELS)]
            text = make_text(rng, num_words, label, int(rng.integers(520, num_words - 45)))
            print(json.dumps({"id": str(index), "text": text, "labels": [label]}), file=file)
    return str(path)


def run_training(source, folder, max_windows):
    """Prepares and trains a small model; its mean average precision on the validation split."""
    data, run = os.path.join(folder, "data"), os.path.join(folder, "run")
    prepare.run(
        PrepareConfig(
            input=(source,),
            data_dir=data,
            vocab_size=256,
            max_seq_length=512,
            max_windows=max_windows,
            split="train:0.8,validation:0.2",
            num_workers=1,
        )
    )
    train.run(
        TrainConfig(
            data_dir=data,
            model_dir=run,
            hidden_size=32,
            num_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            head="mean",
            wide="none",
            tokens_per_replica=4096,
            num_train_epochs=4.0,
            evaluate_every=4.0,
            jit_compile="false",
            optimizer=OptimizerConfig(learning_rate=1e-2),
        )
    )
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as file:
        last = [row for row in map(json.loads, file) if "evaluation" in row][-1]
    return last["evaluation"]["mean_average_precision"]


@pytest.fixture(scope="module")
def trained(corpus_file, tmp_path_factory) -> tuple[str, float]:
    """The folder of a model that sees 8 windows, and its quality."""
    folder = str(tmp_path_factory.mktemp("trained"))
    quality = run_training(corpus_file, folder, 8)
    run, model = os.path.join(folder, "run"), os.path.join(folder, "model")
    export.run(ExportConfig(model_dir=run, export_dir=model, uncalibrated=True))
    return model, quality


def score_texts(model, texts, output):
    """The probabilities [N, 4] of N texts, which are scored as N documents."""
    source = output.with_suffix(".jsonl")
    rows = [{"id": str(index), "text": text} for index, text in enumerate(texts)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score.run(ScoreConfig(model=model, input=(str(source),), output_dir=str(output)))
    with gzip.open(output / "part-00000-of-00001.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    return np.array([[line["scores"][label] for label in LABELS] for line in lines])


def test_windows_find_what_cutting_loses(trained, corpus_file, tmp_path):
    cut = run_training(corpus_file, str(tmp_path), 1)
    # Chance is 0.25 on 32 documents.
    assert trained[1] > 0.95 and cut < 0.6, (trained[1], cut)


def test_a_document_of_3000_words_is_scored_as_one_document(trained, tmp_path):
    rng = np.random.default_rng(1)
    texts = [make_text(rng, 3000, label, 2500) for label in LABELS]
    model = load_model_folder(trained[0])
    assert (model.max_windows, model.max_seq_length) == (8, 512)
    assert model.model.config.max_position_embeddings == 512
    windows, lost = model.encode(texts)
    assert [len(document) for document in windows] == [6] * 4 and not any(lost)
    cut_texts = [" ".join(text.split()[:510]) for text in texts]
    whole, cut = np.split(score_texts(trained[0], texts + cut_texts, tmp_path / "out"), 2)
    assert whole.argmax(axis=1).tolist() == [0, 1, 2, 3]
    # Each label's own document stands out; cut to 512 tokens, all get the same guess.
    others = np.where(np.eye(4, dtype=bool), 0.0, whole).max(axis=0)
    assert (np.diag(whole) > others + 0.1).all(), whole
    assert np.ptp(cut, axis=0).max() < 0.15, cut
    is_wrong = cut.argmax(axis=1) != np.arange(4)
    assert is_wrong.sum() == 3
    assert np.abs(whole - cut).max(axis=1)[is_wrong].min() > 0.3


def test_documents_of_4096_tokens_fit_an_encoder_of_512(trained, tmp_path):
    rng = np.random.default_rng(2)
    texts = [make_text(rng, 4080, "grey", 4030), make_text(rng, 4200, "grey", 4100)]
    windows, lost = load_model_folder(trained[0]).encode(texts)
    assert [sum(map(len, document)) for document in windows] == [4096, 4096]
    assert lost == [False, True]
    last, beyond = score_texts(trained[0], texts, tmp_path / "long")
    grey = LABELS.index("grey")
    assert last.argmax() == grey and last[grey] > beyond[grey] + 0.2
