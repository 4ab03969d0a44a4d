"""The encoder on OpenVINO: packed tokens to hidden states, in float32, bfloat16 or int8, on CPUs.

Embeddings, LayerNorm, softmax and residuals stay wide; heads and wide part stay with TensorFlow.
The shapes are those of a plan's micro-batches, all known beforehand.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import openvino
from onnx import TensorProto, helper

from trainer.model.model import Model
from trainer.model.onnx_nodes import HIDDEN, Graph, attend, embed, encoder_layer, make_model
from trainer.model.quantization import InputScale
from trainer.model_config import ModelConfig, PackingConfig
from trainer.runtime.processor import read_processor
from trainer.runtime.workers import count_cores

_TOKENS = ("input_ids", "position_ids", "segment_ids")


class PackedEncoder:
    """The compiled encoder of a model, for micro-batches of one shape.

    `values` are the model's variables by our names. `scales` make its products int8; the rest is
    in `precision` (float32 or bfloat16). With `first_tokens_only` it returns the states of each
    window's [CLS] alone. `watched` is for `taken`.
    """

    def __init__(
        self,
        config: ModelConfig,
        values: Mapping[str, np.ndarray],
        packing: PackingConfig,
        precision: str = "float32",
        scales: Mapping[str, InputScale] | None = None,
        first_tokens_only: bool = False,
        watched: bool = False,
    ) -> None:
        self.shape = (
            packing.max_windows if first_tokens_only else packing.num_tokens, config.hidden_size,
        )  # fmt: skip
        graph = Graph(values, scales)
        hidden = _encode(graph, config, packing, first_tokens_only)
        outputs: dict[str, tuple[str, tuple[int, ...]]] = {"hidden": (hidden, self.shape)}
        if watched:
            outputs |= {
                path: (result, (1, packing.num_tokens, len(values[f"{path}/kernel"])))
                for path, result in graph.taken.items()
            }
        sizes = dict.fromkeys(_TOKENS, packing.num_tokens)
        if first_tokens_only:
            sizes["window_starts"] = packing.max_windows
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT32, [size])
            for name, size in sizes.items()
        ]
        model = make_model(graph, inputs, outputs)
        self._inputs = tuple(sizes)
        self._outputs = tuple(outputs)
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(model.SerializeToString(), b""),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": count_cores(),
                "NUM_STREAMS": 1,
                "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
            },
        )
        self._request = compiled.create_infer_request()

    def __call__(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Hidden states float32 [T or W, hidden] of one micro-batch (int32).

        Those of padding are meaningless.
        """
        self._infer(batch)
        # The request's memory, which the next call overwrites.
        return self._request.get_output_tensor(0).data.copy()

    def taken(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each layer of the encoder took, float32 [T, inputs], by the layer's path."""
        self._infer(batch)
        return {
            path: self._request.get_output_tensor(index).data[0]
            for index, path in enumerate(self._outputs)
            if path != "hidden"
        }

    def _infer(self, batch: Mapping[str, np.ndarray]) -> None:
        self._request.infer({name: np.asarray(batch[name]) for name in self._inputs})


def make_encoder(
    model: Model,
    packing: PackingConfig,
    precision: str,
    scales: Mapping[str, InputScale] | None = None,
) -> PackedEncoder:
    """The encoder of a model in float32, bfloat16 or int8, for which it needs `scales`."""
    if precision == "int8":
        assert scales is not None, "int8 needs scales"
        # The rest in bfloat16 where that is fast: beside the error of int8 it loses nothing.
        precision = "bfloat16" if read_processor().has_fast_bfloat16 else "float32"
    else:
        scales = None
    values = model.named_values()
    first_tokens_only = model.head.takes_first_tokens
    return PackedEncoder(model.config, values, packing, precision, scales, first_tokens_only)


def _encode(
    graph: Graph, config: ModelConfig, packing: PackingConfig, first_tokens_only: bool
) -> str:
    """Hidden states [T or W, hidden]."""
    token_type = graph.constant(0)
    x = embed(graph, config, *_TOKENS[:2], token_type)
    # OpenVINO runs products of [1, T, hidden] in int8, but not all of those of [T, hidden].
    x = graph.reshape(x, 1, packing.num_tokens, config.hidden_size)
    hiding = [
        _hide_other_segments(graph, segments, rows, length)
        for segments, rows, length in _groups(graph, "segment_ids", 0, packing)
    ]

    def attend_in_groups(qkv: str) -> str:
        contexts = []
        for (part, rows, length), mask in zip(_groups(graph, qkv, 1, packing), hiding, strict=True):
            group = graph.reshape(part, rows, length, 3 * config.hidden_size)
            context = attend(graph, config, group, mask)
            contexts.append(graph.reshape(context, 1, rows * length, config.hidden_size))
        return contexts[0] if len(contexts) == 1 else graph.op("Concat", *contexts, axis=1)

    def first_tokens(states: str) -> str:
        return graph.op("Gather", states, "window_starts", axis=1)

    for index in range(config.num_layers):
        is_last = index == config.num_layers - 1
        wanted = {"wanted": first_tokens} if first_tokens_only and is_last else {}
        path = f"encoder/layer_{index}"
        x = encoder_layer(graph, config, x, path, attend_in_groups, **wanted)
    return graph.reshape(x, -1, config.hidden_size)


def _groups(
    graph: Graph, x: str, axis: int, packing: PackingConfig
) -> Iterator[tuple[str, int, int]]:
    """The tokens of each row group, with its rows and their length."""
    start = 0
    for rows, length in packing.row_groups:
        end = start + rows * length
        places = (graph.constant([place]) for place in (start, end, axis))
        yield graph.op("Slice", x, *places), rows, length
        start = end


def _hide_other_segments(graph: Graph, segments: str, rows: int, length: int) -> str:
    """0 where two tokens of a row are of one segment: float32 [rows, 1, length, length]."""
    query = graph.reshape(segments, rows, 1, length, 1)
    key = graph.reshape(segments, rows, 1, 1, length)
    zero, hidden = (graph.constant(value, np.float32) for value in (0, HIDDEN))
    return graph.op("Where", graph.op("Equal", query, key), zero, hidden)
