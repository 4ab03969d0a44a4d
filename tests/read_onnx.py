"""Scores texts by a model folder's ONNX graph with onnxruntime, tokenizers and NumPy alone.

python tests/read_onnx.py FOLDER TEXTS.json SCORES.npy [left]
"""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main() -> None:
    """Writes logits, float32 [texts, labels]; the padding is [UNK], which the mask has to hide."""
    folder, texts, scores = sys.argv[1:4]
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    with open(f"{folder}/multihot.json", encoding="utf-8") as file:
        tokenizer.enable_truncation(json.load(file)["max_seq_length"])
    tokenizer.enable_padding(direction="left" if sys.argv[4:] else "right", pad_id=1)
    with open(texts, encoding="utf-8") as file:
        encoded = tokenizer.encode_batch(json.load(file))
    session = onnxruntime.InferenceSession(
        f"{folder}/onnx/model.onnx", providers=["CPUExecutionProvider"]
    )
    ids = np.array([encoding.ids for encoding in encoded], np.int64)
    mask = np.array([encoding.attention_mask for encoding in encoded], np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    (logits,) = session.run(["logits"], inputs)
    assert not {"tensorflow", "torch", "transformers", "trainer"} & set(sys.modules)
    np.save(scores, logits)


if __name__ == "__main__":
    main()
