"""Which of a model and its TF-IDF baseline is ahead, in one line, and what to try where it is not.

The advice follows from how the run was made: what it did without, and nothing that it already has.
"""

from collections.abc import Iterable
from typing import Any

from trainer.model_config import ModelConfig
from trainer.run_config import TrainConfig

COMPARED = ("mean_average_precision", "micro_f1", "macro_f1")
BASELINE_NAME = "TF-IDF with logistic regression"
# More epochs than these are seldom what a run lacks.
FEW_EPOCHS = 10
# Digits of the printed table. What is the same in all of them is level.
_DIGITS = 4


def verdict(
    metrics: dict[str, Any], baseline: dict[str, Any], train: TrainConfig, model: ModelConfig
) -> str:
    """One line from the `metrics` of a model and of its baseline, as metrics.json has them.

    `train` and `model` are those of the run's record.
    """
    pairs = [(name, metrics.get(name), baseline.get(name)) for name in COMPARED]
    values = [
        (name, round(ours, _DIGITS), round(theirs, _DIGITS))
        for name, ours, theirs in pairs
        if ours is not None and theirs is not None and ours == ours
    ]
    ahead = _join(f"{name} ({a:.4f} against {b:.4f})" for name, a, b in values if a > b)
    behind = _join(f"{name} ({b:.4f} against {a:.4f})" for name, a, b in values if a < b)
    level = [name for name, a, b in values if a == b]
    sizes = _explain_sizes(metrics, baseline)
    if behind:
        first = f"{BASELINE_NAME} is ahead of the model on {behind}"
        rest = f", the model on {ahead}" if ahead else ""
        return f"{first}{rest}{sizes}: {advise(train, model)}"
    if ahead:
        return f"The model is ahead of {BASELINE_NAME} on {ahead}{sizes}."
    return f"The model and {BASELINE_NAME} are level on {_join(level)}{sizes}."


def advise(train: TrainConfig, model: ModelConfig) -> str:
    """What to train with instead, of what a run did without, in the order in which it helps."""
    missing = []
    if model.wide == "none":
        missing.append("--wide=wordpieces")
    if train.head_start == "random":
        missing.append("--head_start=fit")
    if train.num_train_epochs < FEW_EPOCHS:
        missing.append(f"more epochs than --num_train_epochs={train.num_train_epochs:g}")
    if train.start is None:
        missing.append("--init_checkpoint, a pretrained BERT, on data prepared with its tokenizer")
    if missing:
        return f"train in another --model_dir with {_join(missing, 'or')}."
    rates = train.optimizer.resolve(model.hidden_size, is_pretrained=True)
    return (
        "the run has what usually helps, so train on more documents, or with another "
        f"--learning_rate than {rates.learning_rate:g}."
    )


def _explain_sizes(metrics: dict[str, Any], baseline: dict[str, Any]) -> str:
    """What the two were measured on, and the baseline fitted to, where that is not the same."""
    read, of = baseline["train_documents"], baseline["train_split_documents"]
    measured, all_measured = baseline["documents"], metrics["documents"]
    parts = []
    if read != of:
        parts.append(f"was fitted to {read:,} of {of:,} training documents")
    if measured != all_measured:
        parts.append(f"was measured on {measured:,} documents, the model on {all_measured:,}")
    return f"; TF-IDF {' and '.join(parts)}" if parts else ""


def _join(parts: Iterable[str], last: str = "and") -> str:
    """Parts as a list in a sentence."""
    listed = list(parts)
    first, end = listed[:-1], listed[-1:]
    return f" {last} ".join([", ".join(first), *end] if first else end)
