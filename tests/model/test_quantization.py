"""Int8 for the encoder's products: the rounding, the choice of its steps, and their file."""

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.model.model import build_model
from trainer.model.quantization import (
    InputScale,
    choose_scales,
    from_bytes,
    layer_paths,
    quantize_kernel,
    to_bytes,
)
from trainer.model_config import ModelConfig

CONFIG = ModelConfig(
    20, 3, hidden_size=64, num_layers=2, num_attention_heads=2, intermediate_size=128
)


@pytest.fixture(scope="module")
def values():
    variables = build_model(CONFIG, seed=1).named_variables()
    return {name: variable.numpy() for name, variable in variables.items()}


def states(values, count=400, seed=0):
    """What each layer takes: normal values, one channel of which is 20 times larger."""
    generator = np.random.default_rng(seed)
    taken = {}
    for path in layer_paths(CONFIG):
        size = len(values[f"{path}/kernel"])
        taken[path] = generator.normal(size=(count, size)).astype(np.float32)
        taken[path][:, 3] *= 20
        if path.endswith("/output") and "attention" not in path:
            taken[path] = np.maximum(taken[path], -0.17)
    return taken


def chosen(values, seed=0):
    """The scales of three micro-batches, of which a quarter is padding with absurd values."""
    batches = []
    for part in range(3):
        taken = states(values, seed=seed + part)
        is_real = np.arange(400) < 300
        for x in taken.values():
            x[~is_real] = 1e6
        batches.append((is_real, taken))
    return choose_scales(CONFIG, values, batches, 3)


def test_a_kernel_has_a_step_for_each_unit():
    kernel = np.array([[0.5, 100.0, 0], [-1.27, 12.7, 0]], np.float32)
    integers, steps = quantize_kernel(kernel)
    assert integers.dtype == np.int8
    np.testing.assert_array_equal(integers, [[50, 127, 0], [-127, 16, 0]])
    np.testing.assert_allclose(steps, [0.01, 100 / 127, 1], rtol=1e-6)


def test_inputs_are_rounded_as_the_formula_says():
    x = np.array([[0.2, -3.0], [0.26, 1000.0]], np.float32)
    signed = InputScale(np.array([2, 0.5], np.float32), 0.05, 0, True)
    # 0.2 / 2 / 0.05 = 2; -3 / 0.5 / 0.05 = -120; 0.26 / 2 / 0.05 = 2.6; 1000 is cut at 127.
    np.testing.assert_allclose(signed.round(x), np.array([[2, -120], [3, 127]]) * 0.05, rtol=1e-6)
    unsigned = InputScale(np.ones(2, np.float32), 0.1, 4, False)
    np.testing.assert_allclose(unsigned.round(x), np.array([[2, -4], [3, 251]]) * 0.1, rtol=1e-6)
    assert (signed.dtype, unsigned.dtype) == (np.int8, np.uint8)


def test_channels_of_very_different_sizes_lose_little(values):
    scales = chosen(values)
    assert list(scales) == layer_paths(CONFIG) and len(scales) == 8
    fresh = states(values, seed=9)
    for path, scale in scales.items():
        kernel, x = values[f"{path}/kernel"].astype(np.float64), fresh[path].astype(np.float64)
        exact = x @ kernel
        integers, steps = quantize_kernel(kernel * scale.smoothing[:, None])
        rounded = scale.round(fresh[path]).astype(np.float64) @ (integers * steps.astype(float))
        step = np.abs(x).max() / 127
        plain = InputScale(np.ones(len(kernel), np.float32), step, 0, True)
        without = plain.round(fresh[path]).astype(np.float64) @ kernel
        # Noise that one step for all channels makes, and that of the chosen steps.
        others = exact - x[:, [3]] * kernel[[3]]
        lost, lost_without = (
            np.std(found - exact) / np.std(others) for found in (rounded, without)
        )
        assert lost < 0.08, path
        assert lost < lost_without / 2, path


def test_the_same_documents_give_the_same_file_and_it_reads_back(values):
    content = to_bytes(chosen(values))
    assert content == to_bytes(chosen(values)) != to_bytes(chosen(values, seed=5))
    found = from_bytes(content, CONFIG, values, "int8.safetensors", "export again")
    for path, scale in chosen(values).items():
        np.testing.assert_array_equal(found[path].smoothing, scale.smoothing)
        assert (found[path].step, found[path].zero_point, found[path].is_signed) == (
            scale.step, scale.zero_point, scale.is_signed,
        )  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],
        lambda content: b"",
        lambda content: content.replace(b"layer_1/output/step", b"layer_1/output/stop"),
        lambda content: to_bytes({"encoder/layer_0/output": InputScale(np.ones(4), 1, 0, True)}),
    ],
)
def test_a_damaged_file_is_one_line(values, damage):
    content = damage(to_bytes(chosen(values)))
    with pytest.raises(UserError, match=r"^int8.safetensors: damaged \(.*\); export again$"):
        from_bytes(content, CONFIG, values, "int8.safetensors", "export again")


@pytest.mark.parametrize("wrong", [np.nan, 0.0, -1.0])
def test_steps_that_cannot_be_are_one_line(values, wrong):
    scales = chosen(values)
    path = layer_paths(CONFIG)[2]
    scales[path] = InputScale(scales[path].smoothing, wrong, 0, True)
    with pytest.raises(UserError, match=f"{path}: no scale of 64 inputs"):
        from_bytes(to_bytes(scales), CONFIG, values, "f", "export again")
