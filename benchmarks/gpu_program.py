"""Compiles, times and checks the lowered steps of `gpu_step.py` with JAX alone.

`gpu_run.py` starts it once for each program, so that each has the accelerator's memory for itself:

    python gpu_program.py --folder=DIR --program=train --steps=20 --result=FILE.json

A program's weights are drawn from a seed (`initial_value`), by the same function on the machine
that lowered it.
"""

import argparse
import json
import os
import time
from typing import Any

import numpy as np

SEED = 17
_SPREAD = 0.02


def initial_value(name: str, shape: list[int], dtype: str, index: int) -> np.ndarray:
    """What the `index`-th parameter of a program starts from, the same on every machine.

    Kernels and tables are normal with BERT's spread, scales of LayerNorm are 1, everything else
    (biases, the optimizer's slots, counters) is 0.
    """
    kind = name.rpartition("/")[2]
    if name.startswith(("m/", "v/")) or kind not in ("kernel", "gamma", *_TABLES):
        return np.zeros(shape, dtype)
    if kind == "gamma":
        return np.ones(shape, dtype)
    generator = np.random.default_rng([SEED, index])
    return generator.standard_normal(shape, np.float32) * np.float32(_SPREAD)


_TABLES = ("word", "position", "token_type")


class Program:
    """One lowered step on this machine's first device.

    The state (weights, slots, counters that the step updates) is given away at every call and comes
    back in the same memory, as in the program that TensorFlow compiles.

    Attributes:
      compile_seconds: of XLA.
      memory: bytes of arguments, outputs and temporaries as the compiler counts them.
    """

    def __init__(self, folder: str, description: dict[str, Any]) -> None:
        import jax

        # Counters are int64.
        jax.config.update("jax_enable_x64", True)
        self._jax, self._description = jax, description
        arguments, aliases = description["arguments"], dict(description["aliases"])
        self._outputs = description["outputs"]
        specs = [jax.ShapeDtypeStruct(item["shape"], item["dtype"]) for item in arguments]
        results = [jax.ShapeDtypeStruct(item["shape"], item["dtype"]) for item in self._outputs]
        with open(os.path.join(folder, description["file"]), "rb") as file:
            step = _as_function(jax, file.read(), specs, results)
        # jax gives an argument's memory to the first output of its shape. State and new state are
        # therefore in one order, so that each finds its own.
        taken, given = list(aliases), list(aliases.values())
        rest = [index for index in range(len(results)) if index not in set(given)]
        others = [index for index in range(len(specs)) if index not in aliases]
        self._state_places, self._other_places = taken, others

        def run(state: list[Any], values: list[Any]) -> tuple[list[Any], list[Any]]:
            flat: list[Any] = [None] * len(specs)
            for index, value in zip(taken + others, [*state, *values], strict=True):
                flat[index] = value
            output = step(*flat)
            return [output[index] for index in given], [output[index] for index in rest]

        self._result_names = [self._outputs[index]["name"] for index in rest]
        lowered = jax.jit(run, donate_argnums=0).lower(
            [specs[index] for index in taken], [specs[index] for index in others]
        )
        began = time.perf_counter()
        self._compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - began
        analysis = self._compiled.memory_analysis()
        self.memory = {
            kind: getattr(analysis, f"{kind}_size_in_bytes")
            for kind in ("argument", "output", "alias", "temp")
        }
        self.state = [self._initial(index) for index in taken]
        # What the step only reads stays on the device.
        self._fixed = {
            index: self._initial(index) for index in others if arguments[index]["kind"] != "input"
        }

    def _initial(self, index: int) -> Any:
        item = self._description["arguments"][index]
        if item["kind"] == "constant":
            return self._jax.device_put(np.asarray(item["value"], item["dtype"]))
        value = initial_value(item["name"], item["shape"], item["dtype"], index)
        return self._jax.device_put(value)

    def place(self, values: dict[str, np.ndarray]) -> list[Any]:
        """Copies one call's inputs, by the names of the arguments, to the device."""
        arguments = self._description["arguments"]
        return [
            self._fixed[index]
            if index in self._fixed
            else self._jax.device_put(
                np.asarray(values[arguments[index]["name"]], arguments[index]["dtype"])
            )
            for index in self._other_places
        ]

    def __call__(self, placed: list[Any]) -> dict[str, Any]:
        """Runs the step once, updates the state and waits for the results, by name."""
        self.state, results = self._compiled(self.state, placed)
        self._jax.block_until_ready((self.state, results))
        return dict(zip(self._result_names, results, strict=True))


def _as_function(jax: Any, artifact: bytes, specs: list[Any], results: list[Any]) -> Any:
    """A StableHLO artifact as a function that jax compiles into its own programs.

    An export of a trivial function of the same shapes stands for it, with the module exchanged.
    """
    from dataclasses import replace

    from jax import export

    def same_shapes(*_: Any) -> list[Any]:
        return [jax.numpy.zeros(result.shape, result.dtype) for result in results]

    exported = export.export(jax.jit(same_shapes, keep_unused=True))(*specs)
    places = tuple(range(len(specs)))
    return replace(exported, mlir_module_serialized=artifact, module_kept_var_idx=places).call


def load_batches(folder: str, name: str) -> list[dict[str, np.ndarray]]:
    """The micro-batches that were recorded for a program, by the names of its arguments."""
    with np.load(os.path.join(folder, f"{name}.npz")) as arrays:
        stacked = {key: arrays[key] for key in arrays.files if not key.startswith("expected_")}
    count = len(stacked["input_ids"])
    return [{key: value[index] for key, value in stacked.items()} for index in range(count)]


def inputs_of_step(batch: dict[str, np.ndarray], step: int, documents: int) -> dict[str, Any]:
    """A micro-batch with the train step's scalars, as they are before step `step`."""
    return batch | {"steps": step, "consumed": step * documents, "stop": 0.0}


def measure(folder: str, name: str, steps: int) -> dict[str, Any]:
    """Times a program over its micro-batches, in turn: seconds of each step and bytes of memory."""
    import jax

    description = load_description(folder)["programs"][name]
    program, batches = Program(folder, description), load_batches(folder, name)
    placed = [
        program.place(inputs_of_step(batch, index, description["documents"] // len(batches)))
        for index, batch in enumerate(batches)
    ]
    for index in range(3):  # The first calls load the program and tune nothing further.
        program(placed[index % len(placed)])
    seconds = []
    for index in range(steps):
        began = time.perf_counter()
        results = program(placed[index % len(placed)])
        seconds.append(time.perf_counter() - began)
    finite = all(np.isfinite(np.asarray(value, np.float64)).all() for value in results.values())
    if not finite:
        raise SystemExit(f"{name}: results that are not finite: {results}")
    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "seconds": seconds,
        "micro_batches": len(batches),
        "compile_seconds": program.compile_seconds,
        "peak_bytes": statistics.get("peak_bytes_in_use"),
        "compiler_bytes": program.memory,
        "versions": {"jax": jax.__version__},
    }


def check(folder: str) -> dict[str, Any]:
    """The small model's logits and losses here beside those that were recorded on a CPU.

    `logit_errors` are root mean squares of the differences from the CPU's float32 logits: of this
    machine and of the CPU, both in bfloat16. The masks of dropout are the same bits everywhere, so
    the losses of the first steps of training are compared as well.
    """
    description = load_description(folder)["programs"]
    score = description["check_score"]
    program, batches = Program(folder, score), load_batches(folder, "check_score")
    with np.load(os.path.join(folder, "check_score.npz")) as arrays:
        wide, narrow = arrays["expected_float32"], arrays["expected_bfloat16"]
    real = np.stack([batch["document_mask"] for batch in batches]) > 0
    logits = np.stack(
        [np.asarray(program(program.place(batch))["logits"], np.float32) for batch in batches]
    )
    errors = {
        "here": float(np.sqrt(np.mean(np.square(logits - wide)[real]))),
        "cpu": float(np.sqrt(np.mean(np.square(narrow - wide)[real]))),
    }
    train = Program(folder, description["check_train"])
    documents = description["check_train"]["documents"]
    batches, losses = load_batches(folder, "check_train"), []
    with np.load(os.path.join(folder, "check_train.npz")) as arrays:
        expected = arrays["expected_loss"].tolist()
    for index, batch in enumerate(batches):
        inputs = inputs_of_step(batch, index, documents // len(batches))
        losses.append(float(train(train.place(inputs))["loss"]))
    return {
        "logit_errors": errors,
        "spread": float(wide[real].std()),
        "losses": losses,
        "expected_losses": expected,
    }


def load_description(folder: str) -> dict[str, Any]:
    """What `gpu_step.py` recorded."""
    with open(os.path.join(folder, "step.json"), encoding="utf-8") as file:
        return json.load(file)


def main() -> None:
    """One program of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="that gpu_step.py wrote")
    parser.add_argument("--program", required=True, choices=("train", "score", "check"))
    parser.add_argument("--steps", type=int, default=20, help="to time")
    parser.add_argument("--result", required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.program == "check":
        result = check(arguments.folder)
    else:
        result = measure(arguments.folder, arguments.program, arguments.steps)
    with open(arguments.result, "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
