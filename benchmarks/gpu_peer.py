"""Times transformers' BERT on the documents that `gpu_step.py` recorded, with PyTorch alone.

The loop is Trainer's: AutoModelForSequenceClassification with SDPA and dropout, bfloat16 autocast
over float32 weights, fused AdamW, gradients clipped at 1, compiled by torch.compile with dynamic
shapes. Scoring is a forward pass in bfloat16 weights. Batches have as many documents as a
micro-batch has on average, padded to the longest of the batch and to a multiple of 8:

    default     documents as they come
    grouped     sorted by length, as Trainer's group_by_length and careful users of a pipeline do

`gpu_run.py` starts it once for training and once for scoring:

    python gpu_peer.py --folder=DIR --mode=train --result=FILE.json
"""

import argparse
import json
import os
import time
from typing import Any

import numpy as np
import torch
import transformers

_PAD_MULTIPLE = 8
_LEARNING_RATE = 2e-5
_CLIP_NORM = 1.0
ORDERS = ("default", "grouped")


def load_documents(folder: str, mode: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The ids of each document, and the labels float32 [N, L]."""
    with np.load(os.path.join(folder, f"documents_{mode}.npz")) as arrays:
        offsets = arrays["offsets"]
        return np.split(arrays["tokens"], offsets[1:-1]), arrays["labels"].astype(np.float32)


def make_batches(
    documents: list[np.ndarray], labels: np.ndarray, size: int, order: str, device: str
) -> list[dict[str, torch.Tensor]]:
    """Padded batches on the device, as the default collator makes them."""
    lengths = np.array([len(document) for document in documents])
    shuffled = np.random.default_rng(0).permutation(len(documents))
    if order == "grouped":
        shuffled = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    batches = []
    for start in range(0, len(documents), size):
        chosen = shuffled[start : start + size]
        longest = -(-lengths[chosen].max() // _PAD_MULTIPLE) * _PAD_MULTIPLE
        ids = np.zeros((len(chosen), longest), np.int64)
        for row, index in enumerate(chosen):
            ids[row, : lengths[index]] = documents[index]
        mask = (np.arange(longest) < lengths[chosen][:, None]).astype(np.int64)
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels[chosen]}
        batches.append({key: torch.from_numpy(value).to(device) for key, value in arrays.items()})
    return batches


def make_model(sizes: dict[str, Any], device: str) -> torch.nn.Module:
    """BERT of the recorded sizes with fresh weights."""
    config = transformers.BertConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        max_position_embeddings=sizes["max_position_embeddings"],
        hidden_dropout_prob=sizes["hidden_dropout"],
        attention_probs_dropout_prob=sizes["attention_dropout"],
        num_labels=sizes["num_labels"],
        problem_type="multi_label_classification",
    )
    transformers.set_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation="sdpa"
    )
    return model.to(device)


class Training:
    """One optimizer step a call."""

    def __init__(self, model: torch.nn.Module, compiles: bool, device: str) -> None:
        self._model, self._device = model.train(), device
        self._forward = torch.compile(model, dynamic=True) if compiles else model
        fused = device == "cuda"
        self._optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE, fused=fused)

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the loss."""
        with torch.autocast(self._device, torch.bfloat16):
            loss = self._forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Scoring:
    """One forward pass a call."""

    def __init__(self, model: torch.nn.Module, compiles: bool) -> None:
        model = model.eval().to(torch.bfloat16)
        self._forward = torch.compile(model, dynamic=True) if compiles else model

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the probabilities."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.inference_mode():
            return torch.sigmoid(self._forward(**inputs).logits.float())


def wait(device: str) -> None:
    """Until all that was started is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """Seconds of each pass over all documents, by the order of the documents."""
    with open(os.path.join(arguments.folder, "step.json"), encoding="utf-8") as file:
        description = json.load(file)
    documents, labels = load_documents(arguments.folder, arguments.mode)
    with np.load(os.path.join(arguments.folder, f"{arguments.mode}.npz")) as arrays:
        size = round(len(documents) / len(arrays["input_ids"]))
    compiles = not arguments.no_compile
    model = make_model(description["model"], device)
    if arguments.mode == "train":
        work: Training | Scoring = Training(model, compiles, device)
    else:
        work = Scoring(model, compiles)
    result: dict[str, Any] = {"batch_size": size}
    for order in ORDERS:
        batches = make_batches(documents, labels, size, order, device)
        began = time.perf_counter()
        for batch in batches:  # Compiles, and lets the allocator see every length.
            values = work(batch)
        wait(device)
        warm = time.perf_counter() - began
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(arguments.passes):
            began = time.perf_counter()
            for batch in batches:
                values = work(batch)
            wait(device)
            seconds.append(time.perf_counter() - began)
        if not bool(torch.isfinite(values).all()):
            raise SystemExit(f"{arguments.mode}, {order}: values that are not finite")
        padded = sum(batch["input_ids"].numel() for batch in batches)
        result[order] = {
            "seconds": seconds,
            "first_pass_seconds": warm,
            "padded_tokens": padded,
            "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return result | {"device": name, "versions": versions}


def main() -> None:
    """One mode of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="that gpu_step.py wrote")
    parser.add_argument("--mode", required=True, choices=("train", "score"))
    parser.add_argument("--passes", type=int, default=5, help="over all documents, to time")
    parser.add_argument("--no_compile", action="store_true", help="without torch.compile")
    parser.add_argument("--result", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    # As Trainer's users set it for their float32 remainders.
    torch.set_float32_matmul_precision("high")
    result = measure(arguments, "cuda" if torch.cuda.is_available() else "cpu")
    with open(arguments.result, "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
