"""Fine-tunes and measures the peer: transformers' Trainer on BertForSequenceClassification.

One run in a process of its own, with PyTorch on every core that it may use; `compare_trainer.py`
and `learning_curve.py` call it. Without --max_steps it trains, predicts validation and test, and
writes their logits; with it, it only measures speed.

    python benchmarks/hugging_face.py --folder=DIR --result=FILE.json --batch_size=28 [...]
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from corpus import SPLITS, Documents, load_documents, load_log_odds, write_json
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

PREDICTION_BATCH = 32


def as_features(documents: Documents) -> list[dict[str, Any]]:
    """The shared documents as transformers' users have them: lists of ids, one float a label."""
    starts = zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    return [
        {"input_ids": documents.tokens[first:last].tolist(), "labels": labels.tolist()}
        for (first, last), labels in zip(starts, documents.labels.astype(np.float32), strict=True)
    ]


class StepClock(TrainerCallback):
    """When each optimizer step ended, in seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer after every step."""
        self.times.append(time.perf_counter())


def counting_collator(
    tokenizer: PreTrainedTokenizerBase, counts: list[tuple[int, int]]
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The default collator (padding to the longest in the batch), which also appends documents and
    tokens, padding left out, of each batch to `counts`."""
    pad = DataCollatorWithPadding(tokenizer)

    def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad(features)
        counts.append((len(features), int(batch["attention_mask"].sum())))
        return batch

    return collate


def make_model(arguments: argparse.Namespace, num_labels: int) -> BertForSequenceClassification:
    """The checkpoint with a fresh classifier, whose bias is zero or the labels' log-odds."""
    transformers.set_seed(arguments.seed)
    model = BertForSequenceClassification.from_pretrained(
        arguments.checkpoint,
        num_labels=num_labels,
        problem_type="multi_label_classification",
        hidden_dropout_prob=arguments.dropout,
        attention_probs_dropout_prob=arguments.dropout,
    )
    if arguments.bias == "log_odds":
        with torch.no_grad():
            model.classifier.bias.copy_(torch.from_numpy(load_log_odds(arguments.folder)))
    return model


def make_trainer(
    arguments: argparse.Namespace,
    model: BertForSequenceClassification,
    clock: StepClock,
    counts: list[tuple[int, int]],
) -> Trainer:
    """The Trainer with the comparison's settings; all else as it comes."""
    tokenizer = AutoTokenizer.from_pretrained(f"{arguments.folder}/data/tokenizer")
    settings = TrainingArguments(
        output_dir=f"{arguments.folder}/hugging_face",
        per_device_train_batch_size=arguments.batch_size,
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps or -1,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup,
        lr_scheduler_type="linear",
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.clip_norm,
        train_sampling_strategy=arguments.sampling,
        seed=arguments.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(
        model=model,
        args=settings,
        train_dataset=as_features(load_documents(arguments.folder, "train")),
        data_collator=counting_collator(tokenizer, counts),
        callbacks=[clock],
    )


def predict(model: BertForSequenceClassification, documents: Documents) -> np.ndarray:
    """Logits float32 [N, L], in batches of like length."""
    model.eval()
    logits = np.empty(documents.labels.shape, np.float32)
    order = np.argsort(documents.lengths, kind="stable")
    for start in range(0, len(order), PREDICTION_BATCH):
        chosen = order[start : start + PREDICTION_BATCH]
        longest = documents.lengths[chosen].max()
        ids = np.zeros((len(chosen), longest), np.int64)
        for row, index in enumerate(chosen):
            first, last = documents.offsets[index : index + 2]
            ids[row, : last - first] = documents.tokens[first:last]
        mask = np.arange(longest) < documents.lengths[chosen][:, None]
        with torch.inference_mode():
            output = model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask.astype(np.int64)),
            )
        logits[chosen] = output.logits.numpy()
    return logits


def main() -> None:
    """One run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="with the shared corpus")
    parser.add_argument("--result", required=True, help="JSON file to write")
    parser.add_argument("--checkpoint", required=True, help="folder of a BERT checkpoint")
    parser.add_argument("--bias", choices=("zero", "log_odds"), default="zero")
    parser.add_argument("--sampling", choices=("random", "group_by_length"), default="random")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--max_steps", type=int, help="measure speed only, over so many steps")
    parser.add_argument("--skip_steps", type=int, default=3, help="left out of the speed")
    parser.add_argument("--num_train_epochs", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--clip_norm", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()

    documents = {split: load_documents(arguments.folder, split) for split in SPLITS}
    model = make_model(arguments, documents["train"].labels.shape[1])
    clock = StepClock()
    counts: list[tuple[int, int]] = []
    peer = make_trainer(arguments, model, clock, counts)
    began = time.perf_counter()
    output = peer.train()
    training_seconds = time.perf_counter() - began
    skipped = arguments.skip_steps
    steps = len(clock.times)
    timed = np.array(counts[skipped:steps])
    seconds = clock.times[-1] - clock.times[skipped - 1]
    result = vars(arguments) | {
        "steps": steps,
        "documents_per_step": float(np.mean([count for count, _ in counts[:steps]])),
        "documents_per_second": float(timed[:, 0].sum() / seconds),
        "tokens_per_second": float(timed[:, 1].sum() / seconds),
        "training_seconds": training_seconds,
        "training_loss": output.training_loss,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if not arguments.max_steps:
        logits = {split: predict(model, documents[split]) for split in ("validation", "test")}
        np.savez(arguments.result.removesuffix(".json") + ".npz", **logits)
    write_json(arguments.result, result)


if __name__ == "__main__":
    main()
