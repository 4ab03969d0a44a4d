"""Scoring in a narrower precision than training: its scales, metrics and thresholds.

The calibration stays that of float32, which is folded into the weights; thresholds are fitted to
the probabilities that scoring will write.
"""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainer.data import input_pipeline
from trainer.data.metadata import Metadata, naming_damaged_shards
from trainer.data.packing import choose_packing, min_tokens
from trainer.evaluation import results
from trainer.evaluation.results import NARROW_FILES
from trainer.model.model import Model
from trainer.model.quantization import (
    QUANTIZATION_FILE,
    InputScale,
    choose_scales,
    to_bytes,
)
from trainer.model_config import PackingConfig
from trainer.run_config import OPENVINO, EvaluateConfig
from trainer.runtime.processor import (
    ScoringChoice,
    choose_on_cpu,
    has_openvino,
    read_processor,
)
from trainer.storage import filesystem
from trainer.training.checkpoint import LoadedRun
from trainer.training.held_out import Evaluated, Splits, evaluate_splits

# The scales are chosen on so many micro-batches of the calibration split: 32,000 tokens.
_MICRO_BATCHES, _TOKENS = 16, 2048


def narrow_precision(config: EvaluateConfig) -> ScoringChoice | None:
    """What --precision asks for beside float32; a UserError if this machine cannot do it."""
    if config.precision == "float32":
        return None
    return choose_on_cpu(OPENVINO, config.precision, read_processor(), has_openvino(), config.force)


def remove_narrow_files(folder: str) -> None:
    """Removes what `evaluate_narrow` wrote."""
    for name in (*NARROW_FILES.values(), QUANTIZATION_FILE):
        filesystem.remove(f"{folder}/{name}")


def evaluate_narrow(
    config: EvaluateConfig,
    metadata: Metadata,
    best: LoadedRun,
    choice: ScoringChoice,
    evaluated: Evaluated,
    settings: Mapping[str, Any],
) -> None:
    """Measures scoring as chosen, beside float32, and writes the file of its precision.

    For int8 it chooses the scales first, by documents of the calibration split, and writes them.
    """
    from trainer.model.packed_encoder import make_encoder  # Its packages are an extra.

    folder = os.path.join(config.model_dir, results.EVALUATION_FOLDER)
    scales = None
    if choice.precision == "int8":
        scales = _choose_scales(config, metadata, best.model)

    def encoder(packing: PackingConfig) -> Any:
        return make_encoder(best.model, packing, choice.precision, scales)

    splits = Splits(config, metadata, best, encoder)
    narrow = evaluate_splits(splits, evaluated.calibration)
    metrics, before = (
        {name: found.reported.metrics.get(name) for name in results.HEADLINES}
        for found in (narrow, evaluated)
    )
    difference = subtract(metrics, before)
    if scales is not None:
        filesystem.write_atomically(os.path.join(folder, QUANTIZATION_FILE), to_bytes(scales))
    values = {
        "precision": choice.precision,
        "engine": choice.engine,
        "processor": read_processor().kind,
        "labels": list(metadata.labels),
        "thresholds": narrow.thresholds,
        "metrics": metrics,
        "difference": difference,
    }
    results.write_json(folder, NARROW_FILES[choice.precision], dict(settings) | values)
    shown = ", ".join(
        f"{name} {metrics[name]:.4f} ({difference[name]:+.4f})"
        for name in (
            "mean_average_precision", "micro_f1", "macro_f1", "expected_calibration_error",
        )
        if name in difference
    )  # fmt: skip
    print(f"{choice} on {config.split}, and against float32: {shown}")


def subtract(metrics: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """The difference of each metric that is defined in both; neither None nor NaN is."""
    numbers = {
        name: (float(value), float(before[name]))
        for name, value in metrics.items()
        if value is not None and before[name] is not None
    }
    return {
        name: value - other
        for name, (value, other) in numbers.items()
        if math.isfinite(value) and math.isfinite(other)
    }


def _choose_scales(
    config: EvaluateConfig, metadata: Metadata, model: Model
) -> dict[str, InputScale]:
    from trainer.model.packed_encoder import PackedEncoder

    name = config.calibration_split
    split = metadata.split(name)
    lengths, windows = split.length_histogram, split.window_histogram
    num_tokens = max(_TOKENS, min_tokens(len(lengths) - 1, max(1, len(windows) - 1)))
    packing = choose_packing(lengths, num_tokens, window_histogram=windows)
    values = model.named_values()
    encoder = PackedEncoder(model.config, values, packing, watched=True)
    stream = input_pipeline.open_stream(config.data_dir, metadata, name, packing)

    def seen() -> Iterator[tuple[np.ndarray, Mapping[str, np.ndarray]]]:
        batches = input_pipeline.read_micro_batches(stream, seed=None, num_epochs=1)
        with naming_damaged_shards(config.data_dir, metadata, name):
            for batch in batches.take(_MICRO_BATCHES):
                yield batch["segment_ids"].numpy() > 0, encoder.taken(batch)

    return choose_scales(model.config, values, seen(), _MICRO_BATCHES)
