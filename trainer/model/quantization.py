"""Int8 for the encoder's matrix products: how layers' inputs and kernels become integers.

    x @ kernel  ~  round(x / smoothing / step) * step  @  round(smoothing * kernel / steps) * steps

A kernel has a step for each unit; an input has one for all its channels. A few channels of BERT's
states are far larger than the others, and one step for all would be too coarse for those. So part
of their size moves into the kernel (SmoothQuant: Xiao et al. 2022, arXiv:2211.10438):

    smoothing_j = max |x_j| ^ alpha / max |kernel_j| ^ (1 - alpha)

`alpha` is chosen for each layer by the error of its product on documents that were held out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import load, save

from trainer.errors import UserError
from trainer.model_config import ModelConfig

QUANTIZATION_FILE = "int8.safetensors"
_ALPHAS = (0.5, 0.65, 0.8, 0.9, 1.0)
_LARGEST = 127
# Below it a channel is taken for constant.
_SMALLEST = 1e-5
# Tokens, over all micro-batches, that the choice of alpha reads.
_SAMPLED_TOKENS = 4096


@dataclass(frozen=True)
class InputScale:
    """How the input of a layer becomes integers.

    `smoothing` is float32 [inputs]. Integers are int8 with 0 for 0, or, where an activation has
    made the input, uint8: nearly all of its values are on one side of 0.
    """

    smoothing: np.ndarray
    step: float
    zero_point: int
    is_signed: bool

    @property
    def dtype(self) -> type:
        """Of the integers."""
        return np.int8 if self.is_signed else np.uint8

    def round(self, x: np.ndarray) -> np.ndarray:
        """What the integers stand for, in units of x / smoothing: float32, as `x`."""
        lowest = -_LARGEST if self.is_signed else 0
        largest = np.iinfo(self.dtype).max
        integers = np.rint(x / self.smoothing / np.float32(self.step)) + self.zero_point
        return (np.clip(integers, lowest, largest) - self.zero_point) * np.float32(self.step)


def quantize_kernel(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [inputs, units] as int8, and the step of each unit (float32 [units])."""
    steps = np.abs(kernel).max(axis=0) / _LARGEST
    steps = np.where(steps > 0, steps, 1).astype(np.float32)
    return np.rint(kernel / steps).astype(np.int8), steps


def layer_paths(config: ModelConfig) -> list[str]:
    """The layers that become int8, by their paths: the products of the encoder's layers."""
    parts = ("attention/qkv", "attention/output", "intermediate", "output")
    return [f"encoder/layer_{index}/{part}" for index in range(config.num_layers) for part in parts]


def _is_signed(path: str) -> bool:
    """Whether a layer's input has both signs alike: all but what the activation has made."""
    return path.endswith("/attention/output") or not path.endswith("/output")


@dataclass
class InputStatistics:
    """What was seen of a layer's input: each channel's lowest and highest value, and some rows."""

    lowest: np.ndarray | None = None
    highest: np.ndarray | None = None
    rows: list[np.ndarray] = field(default_factory=list)

    def add(self, x: np.ndarray, sampled: np.ndarray) -> None:
        """Adds states float32 [N, inputs] of N tokens, and the sampled ones (indices) as rows."""
        lowest, highest = x.min(axis=0), x.max(axis=0)
        self.lowest = lowest if self.lowest is None else np.minimum(self.lowest, lowest)
        self.highest = highest if self.highest is None else np.maximum(self.highest, highest)
        self.rows.append(x[sampled])


def choose_scales(
    config: ModelConfig,
    values: Mapping[str, np.ndarray],
    seen: Iterable[tuple[np.ndarray, Mapping[str, np.ndarray]]],
    num_batches: int,
) -> dict[str, InputScale]:
    """The scale of each layer's input, by the layer's path.

    `seen` are `num_batches` micro-batches at most: which tokens are real (bool [T]), and what each
    layer took (float32 [T, inputs]). The same documents give the same scales.
    """
    statistics = {path: InputStatistics() for path in layer_paths(config)}
    generator = np.random.default_rng(0)
    for is_real, taken in seen:
        count = int(is_real.sum())
        sampled = generator.permutation(count)[: -(-_SAMPLED_TOKENS // num_batches)]
        for path, found in statistics.items():
            found.add(taken[path][is_real], sampled)
    return {
        path: _choose_scale(found, values[f"{path}/kernel"], _is_signed(path))
        for path, found in statistics.items()
    }


def _choose_scale(found: InputStatistics, kernel: np.ndarray, is_signed: bool) -> InputScale:
    assert found.lowest is not None and found.highest is not None, "no micro-batch was read"
    rows = np.concatenate(found.rows)
    expected = rows @ kernel
    largest = np.maximum(np.maximum(-found.lowest, found.highest), _SMALLEST)
    of_kernel = np.maximum(np.abs(kernel).max(axis=1), _SMALLEST)

    def error(scale: InputScale) -> float:
        integers, steps = quantize_kernel(kernel * scale.smoothing[:, None])
        return float(np.square(scale.round(rows) @ (integers * steps) - expected).mean())

    scales = []
    for alpha in _ALPHAS:
        smoothing = largest**alpha / of_kernel ** (1 - alpha)
        smoothing = (smoothing / np.exp(np.log(smoothing).mean())).astype(np.float32)
        lowest = min(float((found.lowest / smoothing).min()), 0.0)
        highest = max(float((found.highest / smoothing).max()), _SMALLEST)
        if is_signed:
            scales.append(InputScale(smoothing, max(-lowest, highest) / _LARGEST, 0, True))
        else:
            step = (highest - lowest) / 255
            scales.append(InputScale(smoothing, step, round(-lowest / step), False))
    return min(scales, key=error)


def to_bytes(scales: Mapping[str, InputScale]) -> bytes:
    """The scales as a file of safetensors."""
    tensors = {}
    for name, scale in scales.items():
        tensors[f"{name}/smoothing"] = scale.smoothing
        tensors[f"{name}/step"] = np.array(scale.step, np.float64)
        tensors[f"{name}/zero_point"] = np.array(scale.zero_point, np.int64)
    return save(tensors)


def from_bytes(
    content: bytes, config: ModelConfig, values: Mapping[str, np.ndarray], path: str, remedy: str
) -> dict[str, InputScale]:
    """The scales of a model's layers from the file `path`; a UserError if they do not fit."""
    try:
        tensors = load(content)
        return {
            name: _load_scale(tensors, name, int(values[f"{name}/kernel"].shape[0]))
            for name in layer_paths(config)
        }
    # safetensors' own error is an Exception alone.
    except Exception as error:
        raise UserError(f"{path}: damaged ({error}); {remedy}") from None


def _load_scale(tensors: Mapping[str, np.ndarray], name: str, size: int) -> InputScale:
    smoothing, step, zero_point = (
        tensors[f"{name}/{part}"] for part in ("smoothing", "step", "zero_point")
    )
    is_good = smoothing.shape == (size,) and np.isfinite(smoothing).all() and smoothing.min() > 0
    is_good = is_good and step.shape == zero_point.shape == () and 0 < step < np.inf
    if not is_good or not 0 <= zero_point <= 255:
        raise ValueError(f"{name}: no scale of {size} inputs")
    return InputScale(smoothing.astype(np.float32), float(step), int(zero_point), _is_signed(name))
