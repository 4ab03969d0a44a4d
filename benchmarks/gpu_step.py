"""Writes the lowered train and scoring step, and what a machine with a GPU needs to run them.

No GPU takes part here, and no TensorFlow there: the folder holds StableHLO, micro-batches of
made-up documents, the logits of a small model on this CPU, and the scripts that time it all.

    python benchmarks/gpu_step.py --output=runs/gpu      # here: minutes, some MB
    python runs/gpu/gpu_run.py                           # there, with jax, torch and transformers

The steps are those of `train` and `score` on one GPU: bfloat16, BERT-base, dropout, default rows of
assumed documents (`multihot preflight` assumes the same). The head is `cls`, and there is no wide
part, so that the model is the one that transformers' classes compute.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from corpus import write_json
from gpu_program import initial_value, inputs_of_step
from made_up_job import (
    JobSizes,
    choose_documents,
    choose_job,
    document_flops,
    draw_documents,
    fill_micro_batches,
)

from launch.preflight import lowering
from launch.preflight.compilation import DEFAULT_PYTHON
from launch.preflight.job_shape import JobShape
from trainer.model.model import Model, build_model
from trainer.model.predictor import Predictor
from trainer.model_config import PackingConfig
from trainer.run_config import TrainConfig

_CHECK_STEPS = 3
# Files that the other machine needs beside the programs.
_SCRIPTS = ("gpu_run.py", "gpu_program.py", "gpu_peer.py")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/gpu", help="folder to write")
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=8, help="to record for each step")
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--hidden_size", type=int, default=768, help="of heads of 64")
    parser.add_argument("--vocab_size", type=int, default=30522)
    parser.add_argument("--num_labels", type=int, default=100)
    parser.add_argument("--max_seq_length", type=int, default=512, help="of the longest document")
    parser.add_argument(
        "--jax_python", default=str(DEFAULT_PYTHON), help="of an environment with jax"
    )
    return parser.parse_args()


class Step:
    """A step with its arguments by name and its variables, ready to be lowered or run here."""

    def __init__(
        self,
        function: Callable[..., Any],
        specs: tuple[Any, ...],
        names: list[str],
        variables: dict[str, tf.Variable],
    ) -> None:
        self._compiled, self._flat = lowering.trace(function, *specs)
        self._names = names
        concrete = self._compiled.get_concrete_function(*self._flat)
        by_handle = {id(variable.handle): name for name, variable in variables.items()}
        # Beside variables a function captures tensors, such as the weights of the labels.
        self._captured = [by_handle.get(id(item), item) for item in concrete.captured_inputs]
        self._variables = variables
        outputs = concrete.structured_outputs
        keys = sorted(outputs) if isinstance(outputs, dict) else ["logits"]
        self._outputs = [
            {"name": key, "shape": tensor.shape.as_list(), "dtype": tensor.dtype.name}
            for key, tensor in zip(keys, concrete.outputs, strict=True)
        ]

    def draw_weights(self) -> None:
        """Gives every variable the value that the other machine gives it."""
        for index, name in enumerate(self._captured, start=len(self._names)):
            if not isinstance(name, str):
                continue
            variable = self._variables[name]
            shape, kind = variable.shape.as_list(), variable.dtype.name
            variable.assign(initial_value(name, shape, kind, index))

    def __call__(self, values: dict[str, Any]) -> Any:
        """Runs it on this machine, compiled by XLA."""
        pairs = zip(self._names, self._flat, strict=True)
        return self._compiled(*(tf.constant(values[name], spec.dtype) for name, spec in pairs))

    def write(self, folder: str, name: str, jax_python: str) -> dict[str, Any]:
        """Lowers it to StableHLO in the folder; returns its description."""
        file = f"{name}.stablehlo"
        with tempfile.TemporaryDirectory() as scratch:
            hlo = os.path.join(scratch, "program.hlo")
            with open(hlo, "wb") as target:
                ir = self._compiled.experimental_get_compiler_ir(*self._flat)
                target.write(ir(stage="hlo_serialized"))
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "to_stablehlo.py")
            command = [jax_python, script, hlo, os.path.join(folder, file)]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        inputs = [
            {"name": key, "shape": spec.shape.as_list(), "dtype": spec.dtype.name, "kind": "input"}
            for key, spec in zip(self._names, self._flat, strict=True)
        ]
        variables = [self._describe(key) for key in self._captured]
        aliases = json.loads(process.stdout)["aliases"]
        updated = [variables[parameter - len(inputs)] for parameter, _ in aliases]
        return {
            "file": file,
            "arguments": inputs + variables,
            "outputs": self._outputs + updated,
            "aliases": aliases,
        }

    def _describe(self, captured: Any) -> dict[str, Any]:
        if isinstance(captured, str):
            item, rest = self._variables[captured], {"name": captured, "kind": "variable"}
        else:
            item, rest = captured, {"kind": "constant", "value": captured.numpy().tolist()}
        return rest | {"shape": item.shape.as_list(), "dtype": item.dtype.name}


def make_train_step(config: TrainConfig, shape: JobShape) -> Step:
    """Forward and backward pass, clipping and AdamW of one replica."""
    strategy = tf.distribute.get_strategy()
    step = lowering.build_train_step(config, shape, strategy)
    specs = lowering.train_arguments(config, shape)
    variables = step.model.named_variables() | step.optimizer.state()
    names = [*sorted(specs[0]), "steps", "consumed", "stop"]
    return Step(
        lambda *values: strategy.run(step.replica_step, args=values), specs, names, variables
    )


def make_score_step(model: Model, packing: PackingConfig) -> Step:
    """The forward pass to logits."""
    spec = lowering.micro_batch_spec(packing)
    predictor = Predictor(model, packing)
    return Step(predictor.logits, (spec,), sorted(spec), model.named_variables())


def _as_train_inputs(batches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the leading dimension of --gradient_accumulation=1, and a position."""
    count = len(batches["input_ids"])
    stacked = {name: value[:, None] for name, value in batches.items()}
    return stacked | {"position": np.zeros([count, 3], np.int64)}


def write_pair(arguments: argparse.Namespace, sizes: JobSizes, prefix: str) -> dict[str, Any]:
    """Writes both steps of a job with their micro-batches; returns their descriptions.

    Those of the small model, whose `prefix` is not empty, also get what this CPU makes of them.
    """
    config, shape = choose_job(sizes)
    count = _CHECK_STEPS if prefix else arguments.micro_batches
    descriptions, folder = {}, arguments.output
    for kind in ("train", "score"):
        packing = shape.packing if kind == "train" else shape.scoring_packing
        # A few more than are wanted, of which the last are partly empty.
        drawn = draw_documents(shape, (count + 2) * packing.num_tokens, packing.max_length)
        batches, chosen = fill_micro_batches(drawn, packing, count)
        documents = choose_documents(drawn, chosen)
        arrays, name = batches, prefix + kind
        if kind == "train":
            step, arrays = make_train_step(config, shape), _as_train_inputs(batches)
        else:
            step = make_score_step(build_model(shape.model, config.precision), packing)
        print(f"{name}: {packing.num_tokens} tokens in rows of {packing.row_groups}", flush=True)
        description = step.write(folder, name, arguments.jax_python)
        lengths = np.diff(documents["offsets"])
        descriptions[name] = description | {
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "flops": document_flops(shape, lengths) * (3 if kind == "train" else 1),
            "num_tokens": packing.num_tokens,
            "row_groups": packing.row_groups,
        }
        if prefix and kind == "train":
            arrays["expected_loss"] = run_train_steps(step, arrays, len(lengths) // count)
        elif prefix:
            wide = make_score_step(build_model(shape.model, "float32"), packing)
            arrays["expected_float32"] = run_score_steps(wide, arrays)
            arrays["expected_bfloat16"] = run_score_steps(step, arrays)
        else:
            np.savez_compressed(os.path.join(folder, f"documents_{kind}.npz"), **documents)
        np.savez_compressed(os.path.join(folder, f"{name}.npz"), **arrays)
    return descriptions


def run_train_steps(step: Step, arrays: dict[str, np.ndarray], documents: int) -> np.ndarray:
    """The losses of consecutive steps from the drawn weights."""
    step.draw_weights()
    losses = []
    for index in range(_CHECK_STEPS):
        batch = {name: value[index] for name, value in arrays.items()}
        losses.append(float(step(inputs_of_step(batch, index, documents))["loss"]))
    return np.array(losses)


def run_score_steps(step: Step, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [M, D, L] with the drawn weights."""
    step.draw_weights()
    count = len(arrays["input_ids"])
    rows = [step({name: arrays[name][index] for name in arrays}) for index in range(count)]
    return np.stack([row.numpy() for row in rows])


def main() -> None:
    """Writes the folder."""
    arguments = parse_arguments()
    if not os.path.exists(arguments.jax_python):
        sys.exit(f"--jax_python={arguments.jax_python}: not there; run `make compiler`")
    os.makedirs(arguments.output, exist_ok=True)
    sizes = JobSizes(
        arguments.tokens, arguments.max_seq_length, arguments.num_labels, arguments.vocab_size,
        arguments.hidden_size, arguments.num_layers,
    )  # fmt: skip
    small = dataclasses.replace(sizes, tokens=2048, vocab_size=1000, hidden_size=128, num_layers=2)
    programs = write_pair(arguments, sizes, "") | write_pair(arguments, small, "check_")
    description = {
        "model": dataclasses.asdict(choose_job(sizes)[1].model),
        "programs": programs,
        "versions": {"tensorflow": tf.__version__},
    }
    write_json(os.path.join(arguments.output, "step.json"), description)
    here = os.path.dirname(os.path.abspath(__file__))
    for script in _SCRIPTS:
        shutil.copy(os.path.join(here, script), arguments.output)
    size = sum(entry.stat().st_size for entry in os.scandir(arguments.output) if entry.is_file())
    print(f"{arguments.output}: {size / 1e6:.1f} MB; next, on the machine with the GPU: gpu_run.py")


if __name__ == "__main__":
    main()
