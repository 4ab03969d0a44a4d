"""The rate of this machine's matrix products at the shapes of a model's dense layers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from launch.preflight.job_shape import JobShape

PASSES = ("forward", "backward, inputs", "backward, weights")
RUNTIMES = ("TensorFlow", "XLA")
DTYPES = ("float32", "bfloat16")
_MIN_SECONDS = 0.05
# (type of number, layer, pass, runtime)
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Dense:
    """A dense layer of the encoder: [tokens, inputs] x [inputs, units], `count` times in a pass."""

    name: str
    tokens: int
    inputs: int
    units: int
    count: int

    @property
    def flops(self) -> float:
        """Of one product; forward and both backward products have as many."""
        return 2.0 * self.tokens * self.inputs * self.units


def dense_layers(shape: JobShape, tokens: int) -> list[Dense]:
    """The encoder's dense layers, over all tokens of a micro-batch."""
    size, inner = shape.model.hidden_size, shape.model.intermediate_size
    count = shape.model.num_layers
    return [
        Dense("queries, keys, values", tokens, size, 3 * size, count),
        Dense("attention's output", tokens, size, size, count),
        Dense("feed-forward, first", tokens, size, inner, count),
        Dense("feed-forward, second", tokens, inner, size, count),
    ]


def make_products(layers: list[Dense]) -> dict[Key, Callable[[], float]]:
    """For each product a call that returns its seconds.

    A layer x W has the products x W, dy W^T and x^T dy.
    """
    products: dict[Key, Callable[[], float]] = {}
    generator = np.random.default_rng(0)
    for dtype in DTYPES:

        def draw(*shape: int, dtype: str = dtype) -> tf.Tensor:
            return tf.cast(tf.constant(generator.standard_normal(shape, np.float32)), dtype)

        for layer in layers:
            x, dy = draw(layer.tokens, layer.inputs), draw(layer.tokens, layer.units)
            weight = draw(layer.inputs, layer.units)
            operands = ((x, weight, {}), (dy, weight, {"transpose_b": True}))
            operands += ((x, dy, {"transpose_a": True}),)
            for name, (a, b, flags) in zip(PASSES, operands, strict=True):
                for runtime in RUNTIMES:
                    key = dtype, layer.name, name, runtime
                    products[key] = _make_product(a, b, flags, runtime == "XLA")
    return products


def _make_product(
    a: tf.Tensor, b: tf.Tensor, flags: dict[str, bool], compiles: bool
) -> Callable[[], float]:
    product = tf.function(
        lambda a, b: tf.matmul(a, b, **flags), jit_compile=compiles, autograph=False
    ).get_concrete_function(a, b)
    product(a, b)
    return lambda: time_call(lambda: product(a, b))


def time_call(call: Callable[[], Any]) -> float:
    """Seconds of one call: the mean over as many as a measurement needs."""
    count, began = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - began < _MIN_SECONDS:
        result = call()
        count += 1
    result.numpy()
    return (time.perf_counter() - began) / count


def print_rates(layers: list[Dense], seconds: dict[Key, float]) -> dict[str, dict[str, float]]:
    """The table of rates.

    Returns FLOP/s of a whole step's dense products, each by the faster runtime, by type of number
    and by step (`train`, `score`).
    """
    print("\nGFLOP/s of the dense layers' products: TensorFlow's kernels / XLA's")
    print(f"| layer | T x inputs x units | pass | {' | '.join(DTYPES)} |\n|---|---|---|---|---|")
    sums = {dtype: {"train": [0.0, 0.0], "score": [0.0, 0.0]} for dtype in DTYPES}
    for layer in layers:
        sizes = f"{layer.tokens} x {layer.inputs} x {layer.units}"
        for name in PASSES:
            cells = []
            for dtype in DTYPES:
                times = [seconds[dtype, layer.name, name, runtime] for runtime in RUNTIMES]
                cells.append(" / ".join(f"{layer.flops / each / 1e9:,.0f}" for each in times))
                for step in ("train", "score") if name == "forward" else ("train",):
                    sums[dtype][step][0] += layer.count * layer.flops
                    sums[dtype][step][1] += layer.count * min(times)
            print(f"| {layer.name} | {sizes} | {name} | {' | '.join(cells)} |")
    rates = {
        dtype: {step: flops / spent for step, (flops, spent) in steps.items()}
        for dtype, steps in sums.items()
    }
    for dtype, steps in rates.items():
        print(
            f"{dtype}, each product by the faster runtime: {steps['train'] / 1e9:,.0f} GFLOP/s of "
            f"a train step's, {steps['score'] / 1e9:,.0f} of a scoring step's"
        )
    return rates
