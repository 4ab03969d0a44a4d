"""The three ways of docs/coming_from_keras.md beside the commands that replace them.

All start from the same BERT and see the same documents as often. Keras gets what tutorials give it:
documents padded to the longest length, Adam, no dropout, a threshold of 0.5. The third way as it
is written is refused by Keras; what runs is one dictionary for all labels, as people then try.
Run benchmarks/compare_losses.py first: the folder is the same.

    python benchmarks/keras_ways.py [--output=runs/losses] [--num_train_epochs=2] [--seed=17]
"""

import argparse
import importlib.util
import os
import shutil
import time

import numpy as np
from compare_trainer import predict
from corpus import Documents, find_checkpoint, load_documents, run_multihot, write_json

from trainer.evaluation.calibration import fit_calibration, sigmoid
from trainer.evaluation.metrics import compute_metrics
from trainer.evaluation.thresholds import ThresholdRule, fit_thresholds
from trainer.training.losses import positive_weights

KERAS = ("one output a label", "one output", "one output, one dictionary")
OURS = {"multihot": "none", "multihot, balanced_classes": "balanced_classes"}
BATCH_SIZE = 12


def load_example():  # type: ignore[no-untyped-def]
    """examples/keras_ways.py as a module."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.path.join(folder, "examples", "keras_ways.py")
    spec = importlib.util.spec_from_file_location("example_of_keras_ways", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pad(documents: Documents, length: int) -> list[np.ndarray]:
    """ids and mask, int32 [N, length]."""
    ids = np.zeros((len(documents), length), np.int32)
    mask = np.arange(length) < documents.lengths[:, None]
    ids[mask] = documents.tokens
    return [ids, mask.astype(np.int32)]


def train_keras(way: str, splits: dict[str, Documents], arguments: argparse.Namespace) -> dict:
    """Fits one way; probabilities of the test split and documents a second."""
    import keras

    from trainer.model.model import build_model
    from trainer.model.pretrained import load_pretrained, model_config

    ways = load_example()
    keras.utils.set_random_seed(arguments.seed)
    train = splits["train"]
    num_labels = train.labels.shape[1]
    sizes = model_config(arguments.checkpoint, num_labels, "cls", 0.0, 0.0)
    bert = build_model(sizes, seed=arguments.seed)
    variables = bert.named_variables()
    for name, value in load_pretrained(arguments.checkpoint, sizes).items():
        variables[name].assign(value)
    length = max(int(split.lengths.max()) for split in splits.values())
    names = [str(index) for index in range(num_labels)]
    targets = train.labels.astype(np.float32)
    options = {}
    if way == "one output a label":
        model, targets = ways.one_output_a_label(bert, names), list(targets.T[:, :, None])
    else:
        model = ways.one_output(bert, names)
        if way == "one output, one dictionary":
            options["class_weight"] = ways.class_weights(train.labels.reshape(-1, 1))[0]
    began = time.perf_counter()
    model.fit(
        pad(train, length), targets, batch_size=BATCH_SIZE, epochs=arguments.num_train_epochs,
        verbose=2, **options,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    probabilities = model.predict(pad(splits["test"], length), verbose=0)
    if isinstance(probabilities, list):
        probabilities = np.concatenate(probabilities, axis=1)
    rate = arguments.num_train_epochs * len(train) / seconds
    return measure(probabilities, splits["test"].labels) | {"documents/s": rate}


def train_ours(kind: str, splits: dict[str, Documents], arguments: argparse.Namespace) -> dict:
    """`multihot train` with default flags, calibrated and cut as `multihot evaluate` does."""
    data_dir = os.path.join(arguments.output, "data")
    model_dir = os.path.join(arguments.output, "model-keras-ways")
    shutil.rmtree(model_dir, ignore_errors=True)
    began = time.perf_counter()
    run_multihot(
        "train", f"--data_dir={data_dir}", f"--model_dir={model_dir}",
        f"--init_checkpoint={arguments.checkpoint}", "--strategy=cpu", "--tokens_per_replica=512",
        f"--num_train_epochs={arguments.num_train_epochs}",
        f"--evaluate_every={arguments.num_train_epochs}", "--learning_rate=2e-4",
        f"--pos_weight={kind}", f"--seed={arguments.seed}",
    )  # fmt: skip
    seconds = time.perf_counter() - began
    logits = predict(model_dir, data_dir)
    shutil.rmtree(model_dir)
    train, fitted = splits["train"], splits["validation"].labels
    names = [str(index) for index in range(fitted.shape[1])]
    weights = positive_weights(kind, train.labels.sum(axis=0), len(train), 100.0, names)
    calibration = fit_calibration(logits["validation"], fitted, weights, "labels")
    probabilities = calibration.probabilities(logits["test"])
    thresholds = fit_thresholds(
        calibration.probabilities(logits["validation"]),
        fitted,
        rule=ThresholdRule("overall_f1"),
    )
    rate = arguments.num_train_epochs * len(train) / seconds
    return (
        measure(probabilities, splits["test"].labels, thresholds)
        | {"documents/s": rate}
        | {"ECE before": measure(sigmoid(logits["test"]), splits["test"].labels)["ECE"]}
    )


def measure(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray | None = None
) -> dict[str, float]:
    """What the table shows; thresholds default to 0.5."""
    if thresholds is None:
        thresholds = np.full(labels.shape[1], 0.5)
    values = compute_metrics(probabilities, labels, thresholds)
    return {
        "mAP": values["mean_average_precision"],
        "macro-F1": values["macro_f1"],
        "micro-F1": values["micro_f1"],
        "ECE": values["expected_calibration_error"],
    }


def main() -> None:
    """Runs all and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/losses", help="folder of compare_losses.py")
    parser.add_argument("--checkpoint", help="BERT's folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--num_train_epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    arguments.checkpoint = find_checkpoint(arguments.checkpoint)
    splits = {
        name: load_documents(arguments.output, name) for name in ("train", "validation", "test")
    }
    rows = {way: train_keras(way, splits, arguments) for way in KERAS}
    rows |= {name: train_ours(kind, splits, arguments) for name, kind in OURS.items()}
    columns = ("mAP", "macro-F1", "micro-F1", "ECE before", "ECE", "documents/s")
    print(f"| | {' | '.join(columns)} |\n|---|" + "---:|" * len(columns))
    for name, row in rows.items():
        shown = [f"{row[column]:.3f}" if column in row else "" for column in columns]
        print(f"| {name} | {' | '.join(shown)} |")
    write_json(os.path.join(arguments.output, "keras_ways.json"), rows)


if __name__ == "__main__":
    main()
