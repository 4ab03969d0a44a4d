"""The line that says whether the model or its TF-IDF baseline is ahead, and the advice in it."""

import dataclasses

import pytest

from trainer.linear.verdict import advise, verdict
from trainer.model_config import ModelConfig, OptimizerConfig
from trainer.run_config import TrainConfig

TRAIN = TrainConfig(model_dir="run", data_dir="data", init_checkpoint="bert", num_train_epochs=12)
WIDE = ModelConfig(vocab_size=100, num_labels=3, wide="wordpieces")
SCORES = {"mean_average_precision": 0.5831, "micro_f1": 0.7, "macro_f1": 0.46, "documents": 250}
SIZES = {"documents": 250, "train_documents": 400, "train_split_documents": 400}
ALL_ELSE = (
    "the run has what usually helps, so train on more documents, or with another "
    "--learning_rate than 0.0003."
)


def of_baseline(precision, micro, macro, **sizes):
    names = ("mean_average_precision", "micro_f1", "macro_f1")
    return dict(zip(names, (precision, micro, macro), strict=True)) | SIZES | sizes


def test_a_model_that_is_ahead_needs_no_advice():
    assert verdict(SCORES, of_baseline(0.51, 0.65, 0.4567), TRAIN, WIDE) == (
        "The model is ahead of TF-IDF with logistic regression on mean_average_precision (0.5831 "
        "against 0.5100), micro_f1 (0.7000 against 0.6500) and macro_f1 (0.4600 against 0.4567)."
    )


def test_where_tfidf_is_ahead_it_comes_first_with_advice():
    assert verdict(SCORES, of_baseline(0.51, 0.7, 0.48), TRAIN, WIDE) == (
        "TF-IDF with logistic regression is ahead of the model on macro_f1 (0.4800 against "
        "0.4600), the model on mean_average_precision (0.5831 against 0.5100): " + ALL_ELSE
    )
    line = verdict(SCORES, of_baseline(0.59, 0.71, 0.48), TRAIN, WIDE)
    assert line.startswith(
        "TF-IDF with logistic regression is ahead of the model on mean_average_precision (0.5900 "
        "against 0.5831), micro_f1 (0.7100 against 0.7000) and macro_f1 (0.4800 against 0.4600): "
    )


def test_what_prints_the_same_is_level():
    line = verdict(SCORES, of_baseline(0.58312, 0.70004, 0.46), TRAIN, WIDE)
    assert line == (
        "The model and TF-IDF with logistic regression are level on mean_average_precision, "
        "micro_f1 and macro_f1."
    )


@pytest.mark.parametrize("ours, theirs", [(float("nan"), 0.5), (0.5, None), (None, None)])
def test_an_undefined_metric_is_left_out(ours, theirs):
    scores = SCORES | {"mean_average_precision": ours}
    line = verdict(scores, of_baseline(theirs, 0.65, 0.4567), TRAIN, WIDE)
    assert "precision" not in line and line.startswith("The model is ahead")
    line = verdict(scores, of_baseline(theirs, 0.7, 0.46), TRAIN, WIDE)
    assert line.endswith("are level on micro_f1 and macro_f1.")


def test_other_documents_are_said():
    fewer = of_baseline(
        0.51, 0.65, 0.4, documents=100, train_documents=10_000, train_split_documents=50_000
    )
    assert verdict(SCORES, fewer, TRAIN, WIDE).endswith(
        " and macro_f1 (0.4600 against 0.4000); TF-IDF was fitted to 10,000 of 50,000 training "
        "documents and was measured on 100 documents, the model on 250."
    )
    measured = of_baseline(0.51, 0.65, 0.48, documents=100)
    line = verdict(SCORES, measured, TRAIN, WIDE)
    assert "; TF-IDF was measured on 100 documents, the model on 250: the run has" in line


@pytest.mark.parametrize(
    "changes, wide, expected",
    [
        ({}, "none", "--wide=wordpieces"),
        ({"head_start": "random"}, "wordpieces", "--head_start=fit"),
        ({"num_train_epochs": 1.5}, "wordpieces", "more epochs than --num_train_epochs=1.5"),
        (
            {"init_checkpoint": None},
            "wordpieces",
            "--init_checkpoint, a pretrained BERT, on data prepared with its tokenizer",
        ),
        (
            {"num_train_epochs": 3, "init_checkpoint": None},
            "none",
            "--wide=wordpieces, more epochs than --num_train_epochs=3 or --init_checkpoint, a "
            "pretrained BERT, on data prepared with its tokenizer",
        ),
    ],
)
def test_advice_is_what_the_run_did_without(changes, wide, expected):
    train, model = dataclasses.replace(TRAIN, **changes), dataclasses.replace(WIDE, wide=wide)
    assert advise(train, model) == f"train in another --model_dir with {expected}."


def test_a_run_that_has_everything_is_told_something_else():
    assert advise(TRAIN, WIDE) == ALL_ELSE
    faster = dataclasses.replace(TRAIN, optimizer=OptimizerConfig(learning_rate=3e-5))
    assert advise(faster, WIDE).endswith("another --learning_rate than 3e-05.")
