"""Hugging Face BERT checkpoints to our variables and back; every tensor accounted for."""

import json
import os
import re
from collections.abc import Iterator

import numpy as np

from trainer.errors import UserError
from trainer.model_config import ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_TORCH_FILE = "pytorch_model.bin"

# Checkpoint names that hold no parameter of the encoder or pooler: a buffer that older versions
# saved, the heads of pretraining, and classifiers, which belong to other labels.
_UNUSED = re.compile(
    r"embeddings\.(position_ids|token_type_ids)$|cls\.|classifier\.|qa_outputs\.|multihot\."
)

_TOP = {
    "embeddings.word_embeddings.weight": "encoder/embeddings/word",
    "embeddings.position_embeddings.weight": "encoder/embeddings/position",
    "embeddings.token_type_embeddings.weight": "encoder/embeddings/token_type",
    "embeddings.LayerNorm.weight": "encoder/embeddings/layer_norm/gamma",
    "embeddings.LayerNorm.bias": "encoder/embeddings/layer_norm/beta",
}
_POOLER = {"pooler.dense.weight": "head/pooler/kernel", "pooler.dense.bias": "head/pooler/bias"}
_LAYER = {
    "attention.output.dense": "attention/output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}
_LAYER_NORM = {
    "attention.output.LayerNorm": "attention_layer_norm",
    "output.LayerNorm": "output_layer_norm",
}


def resolve_checkpoint(name: str) -> str:
    """The local folder of a checkpoint: the folder itself, or a download of a hub id.

    Raises:
      UserError: if it is neither.
    """
    if os.path.isdir(name):
        return name
    if os.path.exists(name) or name.startswith((".", "/")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder; expected a BERT checkpoint's folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # Hashes of what arrives are checked by the hub client; weights in pickles stay away
        # where safetensors exist.
        return snapshot_download(
            name, allow_patterns=["*.json", "*.txt", "*.safetensors"], ignore_patterns=["*/*"]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: neither a folder nor a hub id that can be downloaded ({reason}); "
            "check the name and the network"
        ) from None


def read_config(folder: str) -> dict:
    """A checkpoint's config.json.

    Raises:
      UserError: if it is missing, not JSON, or not a BERT encoder that we have.
    """
    path = os.path.join(folder, CONFIG_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; expected a BERT checkpoint's folder") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if config.get("model_type") != "bert":
        raise UserError(
            f"{path}: model_type={config.get('model_type')!r}, expected 'bert'; "
            "choose a BERT checkpoint"
        )
    embedding = config.get("position_embedding_type") or "absolute"
    if embedding != "absolute" or config.get("is_decoder"):
        raise UserError(
            f"{path}: position_embedding_type={embedding!r}, is_decoder="
            f"{config.get('is_decoder', False)}; expected an encoder with absolute positions"
        )
    return config


def model_config(
    folder: str, num_labels: int, head: str, hidden_dropout: float, attention_dropout: float
) -> ModelConfig:
    """Our config for the encoder in a checkpoint's folder, with a head for `num_labels`."""
    found = read_config(folder)
    try:
        return ModelConfig(
            vocab_size=found["vocab_size"],
            num_labels=num_labels,
            hidden_size=found["hidden_size"],
            num_layers=found["num_hidden_layers"],
            num_attention_heads=found["num_attention_heads"],
            intermediate_size=found["intermediate_size"],
            max_position_embeddings=found["max_position_embeddings"],
            type_vocab_size=found.get("type_vocab_size", 2),
            hidden_act=found.get("hidden_act", "gelu"),
            layer_norm_eps=found.get("layer_norm_eps", 1e-12),
            hidden_dropout=hidden_dropout,
            attention_dropout=attention_dropout,
            initializer_range=found.get("initializer_range", 0.02),
            head=head,
        )
    except KeyError as error:
        raise UserError(f"{folder}/config.json: no {error}; expected a BERT config") from None


def _read_files(folder: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 value) of every tensor of a checkpoint."""
    from safetensors import SafetensorError, safe_open

    index = os.path.join(folder, _INDEX_FILE)
    if os.path.exists(os.path.join(folder, WEIGHTS_FILE)):
        files = [WEIGHTS_FILE]
    elif os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            files = sorted(set(json.load(file)["weight_map"].values()))
    elif os.path.exists(os.path.join(folder, _TORCH_FILE)):
        yield from _read_torch(os.path.join(folder, _TORCH_FILE))
        return
    else:
        raise UserError(f"{folder}: no {WEIGHTS_FILE} or {_TORCH_FILE}; expected one of them")
    for name in files:
        path = os.path.join(folder, name)
        try:
            with safe_open(path, framework="numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    yield key, np.asarray(tensors.get_tensor(key), np.float32)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); download it again") from None


def _read_torch(path: str) -> Iterator[tuple[str, np.ndarray]]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading it needs PyTorch; `pip install torch`, or convert the checkpoint to "
            f"{WEIGHTS_FILE}"
        ) from None
    # weights_only: tensors and nothing else; a pickle that wants to run code is refused.
    for name, value in torch.load(path, map_location="cpu", weights_only=True).items():
        yield name, value.float().numpy()


def read_tensors(folder: str) -> dict[str, np.ndarray]:
    """A checkpoint's encoder and pooler under bare names (`embeddings.…`), float32.

    `bert.`-prefixed names lose the prefix, and LayerNorm's older gamma and beta become weight and
    bias. Tensors that `_UNUSED` names are left out.
    """
    tensors = {}
    for name, value in _read_files(folder):
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if not _UNUSED.match(name):
            tensors[name] = value
    return tensors


def to_variables(
    tensors: dict[str, np.ndarray], config: ModelConfig, folder: str
) -> dict[str, np.ndarray]:
    """Hugging Face tensors to values of our variables, by our names.

    Args:
      tensors: as `read_tensors` gives them; torch kernels are [outputs, inputs].
      config: the sizes expected.
      folder: for messages.

    Returns:
      Values for the encoder and, if the checkpoint and the head have one, the pooler.

    Raises:
      UserError: for tensors that are missing, left over, or of another shape.
    """
    left = dict(tensors)
    missing: list[str] = []
    shapes = _expected_shapes(config)

    def take(name: str) -> np.ndarray:
        value = left.pop(name, None)
        if value is None:
            missing.append(name)
            return np.zeros(shapes[name], np.float32)
        if value.shape != shapes[name]:
            raise UserError(
                f"{folder}: tensor {name} has shape {value.shape}, expected {shapes[name]} by "
                "config.json; the folder mixes two checkpoints"
            )
        return value

    values = {ours: take(theirs) for theirs, ours in _TOP.items()}
    for i in range(config.num_layers):
        theirs, ours = f"encoder.layer.{i}.", f"encoder/layer_{i}/"
        parts = [f"{theirs}attention.self.{part}" for part in ("query", "key", "value")]
        values[f"{ours}attention/qkv/kernel"] = np.concatenate(
            [take(f"{part}.weight").T for part in parts], axis=1
        )
        values[f"{ours}attention/qkv/bias"] = np.concatenate(
            [take(f"{part}.bias") for part in parts]
        )
        for their_part, our_part in _LAYER.items():
            values[f"{ours}{our_part}/kernel"] = take(f"{theirs}{their_part}.weight").T
            values[f"{ours}{our_part}/bias"] = take(f"{theirs}{their_part}.bias")
        for their_part, our_part in _LAYER_NORM.items():
            values[f"{ours}{our_part}/gamma"] = take(f"{theirs}{their_part}.weight")
            values[f"{ours}{our_part}/beta"] = take(f"{theirs}{their_part}.bias")
    if config.head == "cls" and "pooler.dense.weight" in left:
        values["head/pooler/kernel"] = take("pooler.dense.weight").T
        values["head/pooler/bias"] = take("pooler.dense.bias")
    for name in _POOLER:
        left.pop(name, None)
    if missing or left:
        raise UserError(
            f"{folder}: {len(missing)} tensors missing ({_some(missing)}), {len(left)} unknown "
            f"({_some(sorted(left))}); expected a BERT of the sizes in config.json"
        )
    return values


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    size, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, size),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, size),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, size),
        "embeddings.LayerNorm.weight": (size,),
        "embeddings.LayerNorm.bias": (size,),
        "pooler.dense.weight": (size, size),
        "pooler.dense.bias": (size,),
    }
    dense = {
        "attention.self.query": (size, size),
        "attention.self.key": (size, size),
        "attention.self.value": (size, size),
        "attention.output.dense": (size, size),
        "intermediate.dense": (inner, size),
        "output.dense": (size, inner),
    }
    for i in range(config.num_layers):
        for name, shape in dense.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in _LAYER_NORM:
            shapes[f"encoder.layer.{i}.{name}.weight"] = (size,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (size,)
    return shapes


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"


def from_variables(values: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `to_variables`: encoder and pooler under bare Hugging Face names, float32."""
    tensors = {theirs: values[ours] for theirs, ours in _TOP.items()}
    for i in range(config.num_layers):
        theirs, ours = f"encoder.layer.{i}.", f"encoder/layer_{i}/"
        kernels = np.split(values[f"{ours}attention/qkv/kernel"], 3, axis=1)
        biases = np.split(values[f"{ours}attention/qkv/bias"], 3)
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            tensors[f"{theirs}attention.self.{part}.weight"] = kernel.T
            tensors[f"{theirs}attention.self.{part}.bias"] = bias
        for their_part, our_part in _LAYER.items():
            tensors[f"{theirs}{their_part}.weight"] = values[f"{ours}{our_part}/kernel"].T
            tensors[f"{theirs}{their_part}.bias"] = values[f"{ours}{our_part}/bias"]
        for their_part, our_part in _LAYER_NORM.items():
            tensors[f"{theirs}{their_part}.weight"] = values[f"{ours}{our_part}/gamma"]
            tensors[f"{theirs}{their_part}.bias"] = values[f"{ours}{our_part}/beta"]
    if "head/pooler/kernel" in values:
        tensors["pooler.dense.weight"] = values["head/pooler/kernel"].T
        tensors["pooler.dense.bias"] = values["head/pooler/bias"]
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def load_pretrained(folder: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """The values of our variables that a checkpoint's folder has; the head's own stay fresh."""
    return to_variables(read_tensors(folder), config, folder)
