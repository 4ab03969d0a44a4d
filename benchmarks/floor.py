"""The share of this machine's own rate of matrix products that training and scoring reach.

    python benchmarks/floor.py [--rounds=5] [--output=runs/floor] [...]

The floor is the time that the machine takes for the model's matrix products alone: the dense
layers' products at their shapes, forward and backward, by the faster of TensorFlow's kernels
(oneDNN, Eigen) and XLA's. Then come the train step (dropout on, AdamW) and the scoring step on
micro-batches of made-up documents, as `train` and `score` compile them on this machine. All of them
run in turn in every round; medians count. At the end both steps run under TensorFlow's profiler,
which splits their time into parts (profile_parts.py). The parts add up to the measured step: what
none of the operations takes is the row `between operations` (Python, dispatch, waiting for the last
thread of an operation).

About four minutes on two quiet cores with the default sizes (MiniLM's). On a busy machine the
shares mean little.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from corpus import write_json
from made_up_job import JobSizes, choose_job, draw_documents, fill_micro_batches
from profile_parts import BETWEEN, PARTS, SPAN, read_parts

from launch.preflight import lowering
from launch.preflight.job_shape import JobShape, model_flops
from trainer.data.packing import pack
from trainer.model.model import build_model
from trainer.model.predictor import Predictor
from trainer.model_config import PackingConfig
from trainer.run_config import TrainConfig
from trainer.runtime.devices import should_jit

_NUM_LABELS = 40
_MICRO_BATCHES = 4
_MIN_SECONDS = 0.05
# What `train` makes on a machine without accelerators.
_STRATEGY = tf.distribute.OneDeviceStrategy("/cpu:0")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each kind in a round")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--max_seq_length", type=int, default=512, help="of the longest document")
    parser.add_argument("--hidden_size", type=int, default=384, help="of heads of 32")
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=30522)
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "mixed_bfloat16"), help="of the steps"
    )
    parser.add_argument(
        "--jit_compile", default="auto", choices=("auto", "true", "false"), help="of both steps; "
        "auto: as `train` does, and none in scoring",
    )  # fmt: skip
    parser.add_argument("--operations", type=int, default=15, help="the longest ones to list")
    parser.add_argument("--output", help="folder for floor.json")
    return parser.parse_args()


def dense_products(shape: JobShape, tokens: int) -> list[tuple[str, int, int, int, int]]:
    """The encoder's dense layers on all tokens: name, T, inputs, units, and how many there are."""
    size, inner, layers = (
        shape.model.hidden_size,
        shape.model.intermediate_size,
        shape.model.num_layers,
    )
    return [
        ("queries, keys, values", tokens, size, 3 * size, layers),
        ("attention's output", tokens, size, size, layers),
        ("feed-forward, first", tokens, size, inner, layers),
        ("feed-forward, second", tokens, inner, size, layers),
    ]


def make_products(
    dense: list[tuple[str, int, int, int, int]], dtype: tf.DType
) -> dict[tuple[str, str, str], tuple[float, Callable[[], Any]]]:
    """FLOP and a call for each product: by layer, by pass, by runtime.

    A layer x W has the products x W, dy W^T and x^T dy.
    """
    products = {}
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> tf.Tensor:
        return tf.cast(tf.constant(generator.standard_normal(shape, np.float32)), dtype)

    for name, tokens, inputs, units, _ in dense:
        x, weight, dy = draw(tokens, inputs), draw(inputs, units), draw(tokens, units)
        passes = {
            "forward": (x, weight, {}),
            "backward, inputs": (dy, weight, {"transpose_b": True}),
            "backward, weights": (x, dy, {"transpose_a": True}),
        }
        for direction, (a, b, flags) in passes.items():
            for runtime, compiles in (("TensorFlow", False), ("XLA", True)):
                product = tf.function(
                    lambda a, b, flags=flags: tf.matmul(a, b, **flags), jit_compile=compiles
                )
                call = lambda product=product, a=a, b=b: product(a, b)  # noqa: E731
                products[name, direction, runtime] = 2.0 * tokens * inputs * units, call
    return products


def time_call(call: Callable[[], Any]) -> float:
    """Seconds of one call, of as many as a measurement needs."""
    count, began = 0, time.perf_counter()
    while True:
        result = call()
        count += 1
        if count >= 3 and time.perf_counter() - began > _MIN_SECONDS:
            break
    result.numpy()
    return (time.perf_counter() - began) / count


def make_train_call(
    config: TrainConfig, shape: JobShape, batches: list[dict[str, tf.Tensor]], compiles: bool
) -> Callable[[], None]:
    """One step of `TrainStep.run`, which waits for its end."""
    step = lowering.build_train_step(config, shape, _STRATEGY, compiles)
    stacked = {name: tf.stack([batch[name] for batch in batches])[:, None] for name in batches[0]}
    stacked["position"] = tf.zeros([len(batches), 3], tf.int64)
    iterator = iter(tf.data.Dataset.from_tensor_slices(stacked).repeat())
    one, until = tf.constant(1, tf.int64), tf.constant(2**40, tf.int64)

    def call() -> None:
        loss = float(step.run(iterator, one, until)["loss"])
        assert math.isfinite(loss), loss

    return call


def make_score_call(
    config: TrainConfig, shape: JobShape, batches: list[dict[str, tf.Tensor]], compiles: bool
) -> Callable[[], None]:
    """The probabilities of one micro-batch, which are waited for."""
    with _STRATEGY.scope():
        model = build_model(shape.model, config.precision)
    predictor = Predictor(model, shape.scoring_packing, _STRATEGY, compiles)
    places = iter(range(10**9))

    def call() -> None:
        (probabilities,) = predictor.probabilities([batches[next(places) % len(batches)]])
        assert np.isfinite(probabilities.numpy()).all()

    return call


def make_batches(shape: JobShape, packing: PackingConfig) -> list[dict[str, tf.Tensor]]:
    """Micro-batches of made-up documents with their labels."""
    drawn = draw_documents(shape, (_MICRO_BATCHES + 2) * packing.num_tokens, packing.max_length)
    stacked, _ = fill_micro_batches(drawn, packing, _MICRO_BATCHES)
    return [
        {name: tf.constant(value[index]) for name, value in stacked.items()}
        for index in range(_MICRO_BATCHES)
    ]


def time_packing(shape: JobShape, packing: PackingConfig) -> float:
    """Seconds that the input pipeline takes to pack one micro-batch, beside the step."""
    drawn = draw_documents(shape, 16 * packing.num_tokens, packing.max_length)
    ragged = tf.RaggedTensor.from_row_splits(drawn["tokens"], drawn["offsets"])
    packing_all = tf.function(lambda: pack(ragged, packing)["input_ids"])
    count = packing_all().shape[0]
    return time_call(packing_all) / count


def profile(call: Callable[[], None], steps: int, inner: int) -> Any:
    """The parts of some steps, in seconds of all of them, and the longest operations."""
    options = tf.profiler.experimental.ProfilerOptions(host_tracer_level=3)
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder, options):
            with tf.profiler.experimental.Trace(SPAN):
                for _ in range(steps):
                    call()
        return read_parts(folder, inner)


def measure_rounds(calls: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """Medians of what the calls return, all in turn in every round."""
    values: dict[Any, list[float]] = {key: [] for key in calls}
    for number in range(rounds):
        for key, call in calls.items():
            values[key].append(call())
        print(f"round {number + 1} of {rounds}", flush=True)
    return {key: statistics.median(several) for key, several in values.items()}


def print_products(
    dense: list[tuple[str, int, int, int, int]], flops: dict[Any, float], seconds: dict[Any, float]
) -> dict[str, dict[str, float]]:
    """The table of rates; returns GFLOP/s by type of number and pass, of the faster runtimes."""
    print("\nGFLOP/s of the dense layers' products, TensorFlow's kernels / XLA's")
    print("| | T x inputs x units | pass | float32 | bfloat16 |\n|---|---|---|---|---|")
    best: dict[str, dict[str, list[float]]] = {}
    for name, tokens, inputs, units, layers in dense:
        for direction in ("forward", "backward, inputs", "backward, weights"):
            cells = []
            for dtype in ("float32", "bfloat16"):
                keys = [(dtype, name, direction, runtime) for runtime in ("TensorFlow", "XLA")]
                cells.append(" / ".join(f"{flops[k] / seconds[k] / 1e9:,.0f}" for k in keys))
                fastest = min(keys, key=seconds.__getitem__)
                for held in ("train", "score") if direction == "forward" else ("train",):
                    sums = best.setdefault(dtype, {}).setdefault(held, [0.0, 0.0])
                    sums[0] += layers * flops[fastest]
                    sums[1] += layers * seconds[fastest]
            sizes = f"{tokens} x {inputs} x {units}"
            print(f"| {name} | {sizes} | {direction} | {' | '.join(cells)} |")
    rates = {
        dtype: {mode: done / spent / 1e9 for mode, (done, spent) in modes.items()}
        for dtype, modes in best.items()
    }
    for dtype, modes in rates.items():
        print(
            f"{dtype}, the faster runtime each: {modes['train']:,.0f} GFLOP/s of a train step's, "
            f"{modes['score']:,.0f} of a scoring step's products"
        )
    return rates


def print_parts(
    mode: str, seconds: float, parts: dict[str, float], floor: float, packing_seconds: float
) -> dict[str, float]:
    """The table of a step's parts; returns milliseconds by part, which add up to the step."""
    total = sum(parts.values())
    scaled = {part: 1e3 * seconds * parts.get(part, 0.0) / total for part in (*PARTS, BETWEEN)}
    print(f"\n{mode} step: {1e3 * seconds:,.0f} ms; its products alone, at the machine's rate: ")
    print(f"{1e3 * floor:,.0f} ms, {floor / seconds:.0%} of it")
    print("| part | ms | share |\n|---|---|---|")
    for part, value in scaled.items():
        print(f"| {part} | {value:,.1f} | {value / seconds / 10:.1f} % |")
    print(f"| sum | {sum(scaled.values()):,.1f} | 100 % |")
    print(f"input: packing one micro-batch takes {1e3 * packing_seconds:.1f} ms, beside the step")
    return scaled


def main() -> None:
    """Measures, then prints."""
    arguments = parse_arguments()
    sizes = JobSizes(
        arguments.tokens, arguments.max_seq_length, _NUM_LABELS, arguments.vocab_size,
        arguments.hidden_size, arguments.num_layers, 32, arguments.precision,
    )  # fmt: skip
    config, shape = choose_job(sizes)
    packings = {"train": shape.packing, "score": shape.scoring_packing}
    compiles = {
        "train": should_jit(arguments.jit_compile, _STRATEGY),
        "score": arguments.jit_compile == "true",
    }
    makers = {"train": make_train_call, "score": make_score_call}
    steps: dict[str, Callable[[], None]] = {}
    for mode, packing in packings.items():
        batches = make_batches(shape, packing)
        if mode == "score":
            names = ("labels", "document_mask")
            batches = [{k: v for k, v in batch.items() if k not in names} for batch in batches]
        began = time.perf_counter()
        steps[mode] = makers[mode](config, shape, batches, compiles[mode])
        for _ in range(2):  # The first call compiles, and the second allocates.
            steps[mode]()
        print(
            f"{mode}: {packing.num_tokens} tokens in rows of {packing.row_groups}, "
            f"{arguments.precision}, {'XLA' if compiles[mode] else 'TensorFlow'}; first steps "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    dense = dense_products(shape, shape.packing.num_tokens)
    flops: dict[Any, float] = {}
    calls: dict[Any, Callable[[], float]] = {}
    for dtype in (tf.float32, tf.bfloat16):
        for key, (count, call) in make_products(dense, dtype).items():
            call()
            name = (dtype.name, *key)
            flops[name], calls[name] = count, lambda call=call: time_call(call)
    for mode, step in steps.items():
        calls[mode] = lambda step=step: _time_steps(step, arguments.steps)
    seconds = measure_rounds(calls, arguments.rounds)
    rates = print_products(dense, flops, seconds)
    dtype = "float32" if arguments.precision == "float32" else "bfloat16"
    result: dict[str, Any] = {"sizes": vars(arguments), "gflops": rates}
    for mode, packing in packings.items():
        work = model_flops(shape.model, packing) * (3 if mode == "train" else 1)
        floor = work / rates[dtype][mode] / 1e9
        parts, longest = profile(steps[mode], arguments.steps, shape.model.intermediate_size)
        table = print_parts(mode, seconds[mode], parts, floor, time_packing(shape, packing))
        print("longest operations, ms of a step while profiled:")
        for spent, part, text in longest[: arguments.operations]:
            print(f"  {1e3 * spent / arguments.steps:8.1f}  {part}: {text}")
        result[mode] = {
            "milliseconds": 1e3 * seconds[mode],
            "products_alone_milliseconds": 1e3 * floor,
            "share": floor / seconds[mode],
            "parts": table,
        }
    if arguments.output:
        os.makedirs(arguments.output, exist_ok=True)
        write_json(os.path.join(arguments.output, "floor.json"), result)


def _time_steps(step: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
