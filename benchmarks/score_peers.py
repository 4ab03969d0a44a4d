"""The peers of `score_speed.py`: transformers' pipeline, ONNX Runtime and OpenVINO.

Each takes a model folder of BERT's own classes and a JSONL file of documents. Each gives its
probabilities, [N, L], and what they took; loading and compiling its model is left out.
"""

import json
import os
import time
from collections.abc import Callable

import numpy as np

# Documents that choose the steps of OpenVINO's int8, as sentence-transformers have it by default.
_CALIBRATION_DOCUMENTS = 300


def read_texts(path: str) -> list[str]:
    """The texts of a JSONL file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def max_length_of(model: str) -> int:
    """Tokens of the longest document that the model takes."""
    with open(os.path.join(model, "multihot.json"), encoding="utf-8") as file:
        return json.load(file)["max_seq_length"]


def read_ids(model: str, path: str) -> list[list[int]]:
    """The token ids of the documents of a JSONL file."""
    from trainer.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    documents, _ = tokenizer.encode_windows(read_texts(path), max_length_of(model), 0, 1)
    return [window for (window,) in documents]


def pad(ids: list[list[int]], kind: type) -> dict[str, np.ndarray]:
    """A batch of BERT's inputs, [B, S], padded to its longest document."""
    lengths = np.array([len(document) for document in ids])
    inputs = np.zeros((len(ids), lengths.max()), kind)
    for row, document in zip(inputs, ids, strict=True):
        row[: len(document)] = document
    mask = (np.arange(inputs.shape[1]) < lengths[:, None]).astype(kind)
    return {"input_ids": inputs, "attention_mask": mask, "token_type_ids": inputs * 0}


def timed(work: Callable[[], np.ndarray]) -> tuple[np.ndarray, dict[str, float]]:
    """What `work` gives, its seconds, and the seconds of this process on the cores."""
    began, used = time.perf_counter(), time.process_time()
    result = work()
    return result, {
        "seconds": time.perf_counter() - began,
        "core_seconds": time.process_time() - used,
    }


def run_sorted(
    model: str,
    path: str,
    batch_size: int,
    predict: Callable[[dict[str, np.ndarray]], np.ndarray],
    kind: type,
) -> tuple[np.ndarray, dict[str, float]]:
    """A peer over ids in memory, the longest documents first, padded to their batch's.

    `predict` makes logits [B, L] of inputs [B, S] of the type `kind`.
    """
    ids = read_ids(model, path)
    lengths = np.array([len(document) for document in ids])
    logits = np.empty((len(ids), predict(pad(ids[:1], kind)).shape[1]))

    def work() -> np.ndarray:
        order = np.argsort(-lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            logits[chosen] = predict(pad([ids[index] for index in chosen], kind))
        return 1 / (1 + np.exp(-logits))

    return timed(work)


def run_pipeline(model: str, path: str, batch_size: int) -> tuple[np.ndarray, dict[str, float]]:
    """transformers' pipeline."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    classify = pipeline("text-classification", model=model, tokenizer=model, device="cpu")
    texts, length = read_texts(path), max_length_of(model)
    rows, times = timed(
        lambda: classify(
            texts, batch_size=batch_size, top_k=None, truncation=True, max_length=length
        )
    )
    order = {label: index for index, label in classify.model.config.id2label.items()}
    probabilities = np.empty((len(rows), len(order)))
    for row, scores in enumerate(rows):
        for item in scores:
            probabilities[row, order[item["label"]]] = item["score"]
    return probabilities, times


def export_onnx(model: str, path: str) -> None:
    """The model folder as an ONNX graph, its attention, GELU and LayerNorm fused."""
    import torch
    from onnxruntime.transformers import optimizer
    from transformers import BertForSequenceClassification

    bert = BertForSequenceClassification.from_pretrained(model, attn_implementation="eager").eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids, attention_mask, token_type_ids):  # type: ignore[no-untyped-def]
            return self.bert(input_ids, attention_mask, token_type_ids).logits

    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = torch.ones(2, 16, dtype=torch.long)
    axes = {name: {0: "batch", 1: "length"} for name in names}
    torch.onnx.export(
        Logits(), (example, example, example * 0), path + ".plain", input_names=names,
        output_names=["logits"], dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    fused = optimizer.optimize_model(
        path + ".plain", model_type="bert", opt_level=1,
        num_heads=bert.config.num_attention_heads, hidden_size=bert.config.hidden_size,
    )  # fmt: skip
    print(fused.get_fused_operator_statistics())
    fused.save_model_to_file(path)


def run_onnx(
    model: str, path: str, batch_size: int, folder: str, precision: str
) -> tuple[np.ndarray, dict[str, float]]:
    """ONNX Runtime over sorted ids, in float32 or dynamic int8."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = os.path.join(folder, "model.onnx")
    if not os.path.exists(graph):
        export_onnx(model, graph)
    if precision == "int8":
        source, graph = graph, os.path.join(folder, "model_int8.onnx")
        if not os.path.exists(graph):
            quantize_dynamic(
                source, graph, per_channel=True, weight_type=QuantType.QInt8,
                # The shapes of fused operators are not inferred.
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    is_narrow = session.get_inputs()[0].type == "tensor(int32)"
    kind = np.int32 if is_narrow else np.int64
    return run_sorted(model, path, batch_size, lambda feed: session.run(None, feed)[0], kind)


def run_openvino(
    model: str, path: str, batch_size: int, folder: str
) -> tuple[np.ndarray, dict[str, float]]:
    """OpenVINO over sorted ids, in static int8 by NNCF; what is not int8 is as it chooses."""
    import nncf
    import openvino

    plain = os.path.join(folder, "model.onnx.plain")
    if not os.path.exists(plain):
        export_onnx(model, os.path.join(folder, "model.onnx"))
    core = openvino.Core()
    graph = os.path.join(folder, "openvino_int8.xml")
    if not os.path.exists(graph):
        first = read_ids(model, path)[:_CALIBRATION_DOCUMENTS]
        quantized = nncf.quantize(
            core.read_model(plain),
            nncf.Dataset([pad([document], np.int64) for document in first]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(first),
        )
        openvino.save_model(quantized, graph)
    threads = {"INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
    compiled = core.compile_model(core.read_model(graph), "CPU", threads)
    return run_sorted(model, path, batch_size, lambda feed: compiled(feed)[0], np.int64)
