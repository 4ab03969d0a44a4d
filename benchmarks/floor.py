"""The share of this machine's own rate of matrix products that training and scoring reach.

    python benchmarks/floor.py [--rounds=5] [--output=runs/floor] [...]

The floor is the time that the machine takes for the model's matrix products alone: the dense
layers' products at their shapes, forward and backward, by the faster of TensorFlow's kernels
(oneDNN, Eigen) and XLA's. Then come the train step (dropout on, AdamW) and the scoring step on
micro-batches of made-up documents, as `train` and `score` compile them on this machine. All of them
run in turn in every round; medians count.

A process of its own runs both steps on one thread under TensorFlow's profiler, which splits their
time into parts (profile_parts.py). On one thread every operation ends before the next one begins;
on several, XLA's products go on unseen beside other operations. The shares of the parts are those
of one thread, scaled to the measured step, so they add up to it. What none of the operations takes
is the row `between operations` (Python, dispatch). A part that runs badly on several threads takes
more of the step than its row says.

About four minutes on two quiet cores with the default sizes (MiniLM's). On a busy machine the
shares mean little.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from corpus import write_json
from made_up_job import JobSizes, choose_job, draw_documents, fill_micro_batches
from product_rates import dense_layers, make_products, print_rates, time_call
from profile_parts import BETWEEN, PARTS, SPAN, Widths, read_parts

from launch.preflight import lowering
from launch.preflight.job_shape import JobShape, model_flops
from trainer.data.packing import pack
from trainer.model.model import build_model
from trainer.model.predictor import Predictor
from trainer.model_config import PackingConfig
from trainer.run_config import TrainConfig
from trainer.runtime.devices import reuse_memory, should_jit

_NUM_LABELS, _HEAD_SIZE = 40, 32
_MICRO_BATCHES = 4
MODES = ("train", "score")


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
        "--jit_compile", default="auto", choices=("auto", "true", "false"),
        help="of both steps; auto: as `train` does, and none in scoring",
    )  # fmt: skip
    parser.add_argument("--operations", type=int, default=15, help="the longest ones to list")
    parser.add_argument("--output", help="folder for floor.json")
    parser.add_argument("--profile_to", help=argparse.SUPPRESS)
    return parser.parse_args()


class Job:
    """Both steps of a model, compiled, with their micro-batches; calls of `steps` run one each."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        sizes = JobSizes(
            arguments.tokens, arguments.max_seq_length, _NUM_LABELS, arguments.vocab_size,
            arguments.hidden_size, arguments.num_layers, _HEAD_SIZE, arguments.precision,
        )  # fmt: skip
        # What `train` does on a machine without accelerators.
        reuse_memory()
        self._strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
        config, self.shape = choose_job(sizes)
        self.packings = {"train": self.shape.packing, "score": self.shape.scoring_packing}
        self.compiles = {
            "train": should_jit(arguments.jit_compile, self._strategy),
            "score": arguments.jit_compile == "true",
        }
        self.steps = {"train": self._make_train(config), "score": self._make_score(config)}
        self.first_seconds = {mode: _time(self.steps[mode], 2) * 2 for mode in MODES}

    def _make_train(self, config: TrainConfig) -> Callable[[], None]:
        step = lowering.build_train_step(config, self.shape, self._strategy, self.compiles["train"])
        batches = make_batches(self.shape, self.packings["train"])
        stacked = {name: tf.constant(value[:, None]) for name, value in batches.items()}
        stacked["position"] = tf.zeros([_MICRO_BATCHES, 3], tf.int64)
        iterator = iter(tf.data.Dataset.from_tensor_slices(stacked).repeat())
        one, until = tf.constant(1, tf.int64), tf.constant(2**40, tf.int64)

        def call() -> None:
            loss = float(step.run(iterator, one, until)["loss"])
            assert math.isfinite(loss), loss

        return call

    def _make_score(self, config: TrainConfig) -> Callable[[], None]:
        packing = self.packings["score"]
        with self._strategy.scope():
            model = build_model(self.shape.model, config.precision)
        predictor = Predictor(model, packing, self._strategy, self.compiles["score"])
        stacked = make_batches(self.shape, packing)
        batches = [
            {name: tf.constant(value[index]) for name, value in stacked.items()}
            for index in range(_MICRO_BATCHES)
        ]
        turn = iter(range(10**9))

        def call() -> None:
            (probabilities,) = predictor.probabilities([batches[next(turn) % len(batches)]])
            assert np.isfinite(probabilities.numpy()).all()

        return call


def make_batches(shape: JobShape, packing: PackingConfig) -> dict[str, np.ndarray]:
    """Stacked micro-batches of made-up documents with their labels."""
    drawn = draw_documents(shape, (_MICRO_BATCHES + 2) * packing.num_tokens, packing.max_length)
    return fill_micro_batches(drawn, packing, _MICRO_BATCHES)[0]


def time_packing(shape: JobShape, packing: PackingConfig) -> float:
    """Seconds that the input pipeline takes to pack one micro-batch, beside the step."""
    drawn = draw_documents(shape, 16 * packing.num_tokens, packing.max_length)
    ragged = tf.RaggedTensor.from_row_splits(drawn["tokens"], drawn["offsets"])
    pack_all = tf.function(lambda: pack(ragged, packing)["input_ids"])
    count = pack_all().shape[0]
    return time_call(pack_all) / count


def profile(arguments: argparse.Namespace) -> None:
    """Writes both steps' parts and operations, on one thread, to --profile_to."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    job = Job(arguments)
    options = tf.profiler.experimental.ProfilerOptions(host_tracer_level=3)
    result = {}
    for mode, call in job.steps.items():
        model, tokens = job.shape.model, job.packings[mode].num_tokens
        widths = Widths(tokens, model.hidden_size, model.intermediate_size)
        with tempfile.TemporaryDirectory() as folder:
            with tf.profiler.experimental.Profile(folder, options):
                with tf.profiler.experimental.Trace(SPAN):
                    seconds = _time(call, arguments.steps)
            parts, longest = read_parts(folder, widths)
        # Those of one step.
        result[mode] = {
            "seconds": seconds,
            "parts": {part: value / arguments.steps for part, value in parts.items()},
            "longest": [[value / arguments.steps, *rest] for value, *rest in longest],
        }
    write_json(arguments.profile_to, result)


def profile_apart(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `profile` writes, from a process of its own: TensorFlow's threads are fixed in this."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "profile.json")
        command = [sys.executable, *sys.argv, f"--profile_to={path}"]
        subprocess.run(command, check=True)
        with open(path, encoding="utf-8") as file:
            return json.load(file)


def print_parts(mode: str, seconds: float, floor: float, profiled: dict[str, Any]) -> dict:
    """The table of a step's parts; returns milliseconds by part, which add up to the step."""
    parts, total = profiled["parts"], sum(profiled["parts"].values())
    scaled = {part: 1e3 * seconds * parts.get(part, 0.0) / total for part in (*PARTS, BETWEEN)}
    on_one_thread = profiled["seconds"] / seconds
    print(
        f"\n{mode} step: {1e3 * seconds:,.0f} ms, on one thread {on_one_thread:.2f} times "
        f"that; its products alone at the machine's rate: {1e3 * floor:,.0f} ms, "
        f"{floor / seconds:.0%} of it"
    )
    print("| part | ms | share |\n|---|---|---|")
    for part, value in scaled.items():
        print(f"| {part} | {value:,.1f} | {value / seconds / 10:.1f} % |")
    print(f"| sum | {sum(scaled.values()):,.1f} | 100 % |")
    return scaled


def _time(step: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count


def main() -> None:
    """Measures, then prints."""
    arguments = parse_arguments()
    if arguments.profile_to:
        profile(arguments)
        return
    job = Job(arguments)
    for mode, packing in job.packings.items():
        print(
            f"{mode}: {packing.num_tokens} tokens in rows of {packing.row_groups}, "
            f"{arguments.precision}, {'XLA' if job.compiles[mode] else 'TensorFlow'}; first two "
            f"steps {job.first_seconds[mode]:.0f} s",
            flush=True,
        )
    layers = dense_layers(job.shape, job.shape.packing.num_tokens)
    calls: dict[Any, Callable[[], float]] = dict(make_products(layers))
    for mode, step in job.steps.items():
        calls[mode] = lambda step=step: _time(step, arguments.steps)
    values: dict[Any, list[float]] = {key: [] for key in calls}
    for number in range(arguments.rounds):
        for key, call in calls.items():
            values[key].append(call())
        each = ", ".join(f"{mode} {1e3 * values[mode][-1]:,.0f} ms" for mode in MODES)
        print(f"round {number + 1} of {arguments.rounds}: {each}", flush=True)
    seconds = {key: statistics.median(several) for key, several in values.items()}
    rates = print_rates(layers, seconds)
    profiled = profile_apart(arguments)
    dtype = "float32" if arguments.precision == "float32" else "bfloat16"
    result: dict[str, Any] = {"settings": vars(arguments), "flops_per_second": rates}
    for mode, packing in job.packings.items():
        work = model_flops(job.shape.model, packing) * (3 if mode == "train" else 1)
        floor = work / rates[dtype][mode]
        table = print_parts(mode, seconds[mode], floor, profiled[mode])
        packing_seconds = time_packing(job.shape, packing)
        print(f"input: packing a micro-batch takes {1e3 * packing_seconds:.1f} ms, beside the step")
        print("longest operations of all layers together, ms of a step on one thread:")
        for spent, part, text in profiled[mode]["longest"][: arguments.operations]:
            print(f"  {1e3 * spent:8.1f}  {part}: {text}")
        result[mode] = {
            "milliseconds": [1e3 * value for value in values[mode]],
            "products_alone_milliseconds": 1e3 * floor,
            "share": floor / seconds[mode],
            "parts": table,
            "packing_milliseconds": 1e3 * packing_seconds,
        }
    if arguments.output:
        os.makedirs(arguments.output, exist_ok=True)
        write_json(os.path.join(arguments.output, "floor.json"), result)


if __name__ == "__main__":
    main()
