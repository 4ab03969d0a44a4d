"""The model as an ONNX graph, for ONNX Runtime and what is built on it.

    input_ids, attention_mask, token_type_ids    int64 [batch, sequence]
    logits                                       float32 [batch, labels]

A row is a document of one window, padded on either side.
"""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from trainer.errors import UserError
from trainer.model.onnx_nodes import HIDDEN, Graph, attend, embed, encoder_layer, make_model
from trainer.model_config import HASH_FACTORS, ModelConfig

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# A Protobuf file holds less than 2 GiB.
_MAX_BYTES = 2**31 - 2**24


def make_onnx(config: ModelConfig, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The graph of a model whose calibration and mixture are folded in.

    `values` are the variables by our names. Raises a UserError if they take 2 GiB or more.
    """
    _check_size(values)
    graph = Graph(values)
    ids, mask, types = _INPUTS
    present = graph.cast(mask, TensorProto.FLOAT)
    hidden = _encode(graph, config, ids, mask, types, present)
    logits = _apply_head(graph, config, hidden, mask, present)
    if config.wide != "none":
        logits = graph.op("Add", logits, _apply_wide(graph, config, ids, present))
    shape = ["batch", "sequence"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in _INPUTS]
    return make_model(graph, inputs, {"logits": (logits, ["batch", config.num_labels])})


def _check_size(values: Mapping[str, np.ndarray]) -> None:
    size = sum(value.nbytes for value in values.values())
    if size > _MAX_BYTES:
        raise UserError(
            f"--formats: the weights take {size / 2**30:.1f} GiB, and one ONNX file holds less "
            "than 2; leave onnx out"
        )


def _encode(
    graph: Graph, config: ModelConfig, ids: str, mask: str, types: str, present: str
) -> str:
    """Hidden states [B, S, hidden]."""
    position = graph.op("CumSum", mask, graph.constant(1))
    position = graph.op("Sub", position, graph.constant(1))
    position = graph.at_least(position, 0, np.int64)
    x = embed(graph, config, ids, position, types)
    absent = graph.op("Sub", graph.constant(1, np.float32), present)
    hiding = graph.op("Unsqueeze", graph.scaled(absent, HIDDEN), graph.constant([1, 2]))
    for index in range(config.num_layers):
        path = f"encoder/layer_{index}"
        x = encoder_layer(graph, config, x, path, lambda qkv: attend(graph, config, qkv, hiding))
    return x


def _apply_head(graph: Graph, config: ModelConfig, hidden: str, mask: str, present: str) -> str:
    """Logits [B, L] of the head."""
    last = graph.constant([2])
    if config.head == "cls":
        place = graph.op("ArgMax", mask, axis=1, keepdims=1)
        first = graph.op("GatherND", hidden, place, batch_dims=1)
        return graph.dense(graph.op("Tanh", graph.dense(first, "head/pooler")), "head/classifier")
    if config.head == "mean":
        summed = graph.sum(graph.op("Mul", hidden, graph.op("Unsqueeze", present, last)), 1)
        count = graph.at_least(graph.sum(present, 1, keepdims=1), 1)
        return graph.dense(graph.op("Div", summed, count), "head/classifier")
    absent = graph.op("Sub", graph.constant(1, np.float32), present)
    scores = graph.dense(hidden, "head/query", use_bias=False)
    hiding = graph.op("Unsqueeze", graph.scaled(absent, HIDDEN), last)
    weights = graph.op("Softmax", graph.op("Add", scores, hiding), axis=1)
    values = graph.dense(hidden, "head/classifier", use_bias=False)
    summed = graph.sum(graph.op("Mul", weights, values), 1)
    return graph.op("Add", summed, graph.weight("head/classifier/bias"))


def _apply_wide(graph: Graph, config: ModelConfig, ids: str, present: str) -> str:
    """Logits [B, L] of the wide part, as `trainer.model.wide` has them, without a bias."""
    terms = ids
    if config.wide_pairs:
        end = np.iinfo(np.int64).max
        of_first, of_second = (
            [graph.columns(part, *span) for part in (ids, present)] for span in ((0, -1), (1, end))
        )
        bucket = _hash_pairs(graph, of_first[0], of_second[0], config.wide_pairs)
        pairs = graph.op("Add", bucket, graph.constant(config.vocab_size))
        terms = graph.op("Concat", ids, pairs, axis=1)
        both = graph.op("Mul", of_first[1], of_second[1])
        present = graph.op("Concat", present, both, axis=1)
    batch = graph.op("Shape", ids, start=0, end=1)
    shape = graph.op("Concat", batch, graph.constant([config.num_wide_terms]), axis=0)
    empty = graph.op("Expand", graph.constant(0, np.float32), shape)
    counts = graph.op("ScatterElements", empty, terms, present, axis=1, reduction="add")
    counts = graph.at_least(graph.op("GatherElements", counts, terms, axis=1), 1)
    weights = graph.op("Add", graph.op("Log", counts), graph.constant(1, np.float32))
    weights = graph.op("Mul", weights, graph.op("Gather", graph.weight("wide/idf"), terms))
    # Each of a term's tokens has an equal share of the term's weight, and of its square.
    shares = graph.op("Div", present, counts)
    weighted = graph.op("Mul", shares, weights)
    squares = graph.sum(graph.op("Mul", weighted, weights), 1, keepdims=1)
    norms = graph.op("Sqrt", graph.at_least(squares, 1e-30))
    row = graph.op("Unsqueeze", graph.op("Div", weighted, norms), graph.constant([1]))
    table = graph.weight("wide/terms" if config.wide_rank else "wide/kernel")
    summed = graph.op("MatMul", row, graph.op("Gather", table, terms))
    summed = graph.op("Squeeze", summed, graph.constant([1]))
    return graph.op("MatMul", summed, graph.weight("wide/kernel")) if config.wide_rank else summed


def _hash_pairs(graph: Graph, left: str, right: str, num_buckets: int) -> str:
    """`trainer.linear.term_features.hash_pairs`, int64: no product reaches 2^63."""
    first, second, third = (graph.constant(factor) for factor in HASH_FACTORS)

    def low(x: str, bits: int = 0xFFFFFFFF) -> str:
        return graph.op("BitwiseAnd", x, graph.constant(bits))

    def fold(x: str, bits: int) -> str:
        return graph.op("BitwiseXor", x, graph.op("Div", x, graph.constant(2**bits)))

    mixed = graph.op("Add", graph.op("Mul", left, first), graph.op("Mul", right, second))
    mixed = low(graph.op("Mul", fold(low(mixed), 15), third))
    return low(fold(mixed, 13), num_buckets - 1)
