"""The SavedModel's packed pass as a model of Beam's RunInference."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from apache_beam.ml.inference.base import ModelHandler

from trainer.beam.faults import marked_faults
from trainer.errors import UserError
from trainer.model.model_folder import (
    SAVED_MODEL_FOLDER,
    check_fingerprint,
    check_saved_model,
    local_model,
)

# One micro-batch's tensors by the names that the signature `packed` gives them.
MicroBatch = dict[str, np.ndarray]


class PackedModelHandler(ModelHandler[MicroBatch, np.ndarray, Any]):
    """Micro-batches to probabilities, float32 [D, L]; the model is loaded once a process."""

    def __init__(self, folder: str, fingerprint: str) -> None:
        """Remembers the model folder, which every worker has to be able to read."""
        super().__init__()
        self._folder = folder
        self._fingerprint = fingerprint

    def load_model(self) -> Any:
        """The SavedModel, whole: its signatures alone would not keep its variables."""
        with marked_faults(), local_model(self._folder, below=True) as folder:
            path = os.path.join(folder, SAVED_MODEL_FOLDER)
            if not os.path.isdir(path):
                raise UserError(f"{path}: no such folder; export the model again")
            check_fingerprint(folder, self._fingerprint)
            check_saved_model(folder)
            model = tf.saved_model.load(path)
            if "packed" not in model.signatures:
                raise UserError(f"{path}: no signature `packed`; export the model again")
            return model

    def run_inference(
        self,
        batch: Sequence[MicroBatch],
        model: Any,
        inference_args: dict[str, Any] | None = None,
    ) -> Iterable[np.ndarray]:
        """Runs the micro-batches one by one: each is a batch of documents already."""
        packed = model.signatures["packed"]
        for inputs in batch:
            yield packed(**{name: tf.constant(value) for name, value in inputs.items()})[
                "probabilities"
            ].numpy()

    def batch_elements_kwargs(self) -> Mapping[str, Any]:
        """Nothing to gather: an element has its full number of tokens."""
        return {"min_batch_size": 1, "max_batch_size": 1}

    def get_num_bytes(self, batch: Sequence[MicroBatch]) -> int:
        """Bytes of the tensors."""
        return sum(value.nbytes for inputs in batch for value in inputs.values())
