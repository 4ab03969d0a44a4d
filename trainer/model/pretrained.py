"""Hugging Face BERT checkpoints to our variables and back; no tensor is ignored silently."""

import dataclasses
import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.model_config import ModelConfig
from trainer.storage import filesystem, own_files
from trainer.storage.own_files import Number, Positive

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_TORCH_FILE = "pytorch_model.bin"
# Where sentence-transformers says how a checkpoint's tokens become one vector.
POOLING_FOLDER = "1_Pooling"
_POOLING_FILE = os.path.join(POOLING_FOLDER, CONFIG_FILE)
# Files in all other folders: weights in other formats.
_OTHER_FOLDERS = ["[!1]*/*", "1[!_]*/*", "1_[!P]*/*"]

# Names that are no parameters of the encoder or pooler: buffers that older versions saved, the
# heads of pretraining, and classifiers, which belong to other labels.
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
_LAYER_PREFIX = "encoder/layer_"
_QKV = ("query", "key", "value")
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
    """A checkpoint's local folder: itself, or the download of a hub id; UserError for neither."""
    if os.path.isdir(name):
        return name
    if os.path.exists(name) or name.startswith((".", "/")) or name.count("/") > 1:
        raise UserError(f"{name}: no such folder; expected a BERT checkpoint's folder or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # The hub client checks the hashes of downloads. Pickled weights are never downloaded.
        return snapshot_download(
            name,
            allow_patterns=["*.json", "*.txt", "*.safetensors"],
            ignore_patterns=_OTHER_FOLDERS,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: neither a folder nor a hub id that can be downloaded ({reason}); "
            "check the name and the network"
        ) from None


@dataclass(frozen=True)
class _BertConfig:
    """The sizes in a BERT's config.json."""

    vocab_size: own_files.VocabularySize
    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    intermediate_size: Positive
    max_position_embeddings: Positive
    type_vocab_size: Positive = 2
    hidden_act: str = "gelu"
    layer_norm_eps: Number = 1e-12
    initializer_range: Number = 0.02


def _read_config(folder: str) -> _BertConfig:
    """A checkpoint's config.json; UserError unless it is of a BERT encoder that we have."""
    path, remedy = os.path.join(folder, CONFIG_FILE), "choose a BERT checkpoint"
    try:
        kind = own_files.load(dict[str, Any], path, remedy)
        if kind.get("model_type") not in ("bert", "multihot"):
            found = reprlib.repr(kind.get("model_type"))
            raise UserError(f"{path}: model_type={found}, expected 'bert'; {remedy}")
        embedding = kind.get("position_embedding_type") or "absolute"
        if embedding != "absolute" or kind.get("is_decoder"):
            raise UserError(
                f"{path}: position_embedding_type={reprlib.repr(embedding)}, is_decoder="
                f"{bool(kind.get('is_decoder'))}; expected an encoder with absolute positions"
            )
        return own_files.load(_BertConfig, path, remedy)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; expected a BERT checkpoint's folder") from None


def model_config(
    folder: str, num_labels: int, head: str, hidden_dropout: float, attention_dropout: float
) -> ModelConfig:
    """The config of a model with a checkpoint's encoder and a new head."""
    sizes = dict(vars(_read_config(folder)))
    try:
        return ModelConfig(
            num_labels=num_labels,
            num_layers=sizes.pop("num_hidden_layers"),
            hidden_dropout=hidden_dropout,
            attention_dropout=attention_dropout,
            head=head,
            **sizes,
        )
    except UserError as error:
        raise UserError(f"{os.path.join(folder, CONFIG_FILE)}: {error}") from None


def read_pooling(folder: str) -> str | None:
    """The head that suits a checkpoint by its own pooling configuration: `mean`, `cls` or None.

    Sentence encoders carry one (sentence-transformers' `1_Pooling/config.json`). UserError for a
    damaged one.
    """
    path, remedy = os.path.join(folder, _POOLING_FILE), "download it again"
    try:
        kind = own_files.load(dict[str, Any], path, remedy)
    except FileNotFoundError:
        return None
    if kind.get("pooling_mode_mean_tokens") or kind.get("pooling_mode") == "mean":
        return "mean"
    return (
        "cls" if kind.get("pooling_mode_cls_token") or kind.get("pooling_mode") == "cls" else None
    )


def _weight_files(folder: str) -> list[str]:
    """The names of a checkpoint's files of weights; a UserError if there are none."""
    for name in (WEIGHTS_FILE, _INDEX_FILE, _TORCH_FILE):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            if name != _INDEX_FILE:
                return [name]
            kind = own_files.fields(weight_map=own_files.named(own_files.PlainName))
            index = own_files.load(kind, path, "download it again")
            return sorted(set(index["weight_map"].values()))
    raise UserError(f"{folder}: no {WEIGHTS_FILE} or {_TORCH_FILE}; expected one of them")


def read_weights(folder: str) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, float32, by its name there; UserError for damaged files."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, np.ndarray] = {}
    for name in _weight_files(folder):
        path = os.path.join(folder, name)
        with filesystem.open_binary(path):
            pass  # A named pipe would wait for ever.
        if name == _TORCH_FILE:
            return _read_torch(path)
        try:
            with safe_open(path, framework="numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    found[key] = np.asarray(tensors.get_tensor(key), np.float32)
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); download it again") from None
    return found


def _read_torch(path: str) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading it needs PyTorch; `pip install torch`, or convert the checkpoint to "
            f"{WEIGHTS_FILE}"
        ) from None
    try:
        # weights_only refuses pickles that would run code.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.float().numpy() for name, value in tensors.items()}
    except Exception as error:  # Of many kinds, as pickle raises them.
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); download it again") from None


def to_bare_names(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint's encoder and pooler under bare names (`embeddings.…`).

    Names lose the prefix `bert.`, and LayerNorm's older gamma and beta become weight and bias.
    Heads and buffers are left out.
    """
    tensors = {}
    for name, value in weights.items():
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if not _UNUSED.match(name):
            tensors[name] = value
    return tensors


def read_tensors(folder: str) -> dict[str, np.ndarray]:
    """`to_bare_names` of `read_weights`."""
    return to_bare_names(read_weights(folder))


def _layer_names(index: int) -> dict[str, str]:
    """Our names of a layer's tensors by theirs, without queries, keys and values."""
    theirs, ours = f"encoder.layer.{index}.", f"encoder/layer_{index}/"
    return {
        f"{theirs}{their_part}.{their_kind}": f"{ours}{our_part}/{our_kind}"
        for parts, weight, bias in ((_LAYER, "kernel", "bias"), (_LAYER_NORM, "gamma", "beta"))
        for their_part, our_part in parts.items()
        for their_kind, our_kind in (("weight", weight), ("bias", bias))
    }


def _transpose_kernel(ours: str, value: np.ndarray) -> np.ndarray:
    """A value in the other layout: torch kernels are [outputs, inputs], ours the reverse."""
    return value.T if ours.endswith("/kernel") else value


def to_variables(
    tensors: dict[str, np.ndarray], config: ModelConfig, folder: str
) -> dict[str, np.ndarray]:
    """Values of our variables, by our names, from the tensors of `read_tensors`.

    They are those of the encoder and, if the checkpoint and the head have one, of the pooler.
    UserError for tensors that are missing, left over, or not of the shape in `config`.
    """
    if config.num_layers > len(tensors):
        raise UserError(
            f"{folder}: {len(tensors)} tensors, which are no {config.num_layers} layers; expected "
            "a BERT of the sizes in config.json"
        )
    shapes = _expected_shapes(config)
    has_pooler = config.head == "cls" and "pooler.dense.weight" in tensors
    needed = [name for name in shapes if has_pooler or name not in _POOLER]
    missing = [name for name in needed if name not in tensors]
    unknown = sorted(set(tensors) - set(shapes))
    for name in needed:
        if name in tensors and tensors[name].shape != shapes[name]:
            raise UserError(
                f"{folder}: tensor {name} has shape {tensors[name].shape}, expected "
                f"{shapes[name]} by config.json; the folder mixes two checkpoints"
            )
    if missing or unknown:
        raise UserError(
            f"{folder}: {len(missing)} tensors missing ({_some(missing)}), {len(unknown)} unknown "
            f"({_some(unknown)}); expected a BERT of the sizes in config.json"
        )
    names = _TOP | (_POOLER if has_pooler else {})
    values: dict[str, np.ndarray] = {}
    for i in range(config.num_layers):
        parts = [f"encoder.layer.{i}.attention.self.{part}" for part in _QKV]
        kernels = [tensors[f"{part}.weight"].T for part in parts]
        values[f"encoder/layer_{i}/attention/qkv/kernel"] = np.concatenate(kernels, axis=1)
        biases = [tensors[f"{part}.bias"] for part in parts]
        values[f"encoder/layer_{i}/attention/qkv/bias"] = np.concatenate(biases)
        names |= _layer_names(i)
    return values | {
        ours: _transpose_kernel(ours, tensors[theirs]) for theirs, ours in names.items()
    }


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
    layer: dict[str, tuple[int, ...]] = {
        "attention.self.query": (size, size),
        "attention.self.key": (size, size),
        "attention.self.value": (size, size),
        "attention.output.dense": (size, size),
        "intermediate.dense": (inner, size),
        "output.dense": (size, inner),
        **dict.fromkeys(_LAYER_NORM, (size,)),
    }
    for i in range(config.num_layers):
        for name, shape in layer.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    return shapes


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"


def from_variables(values: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `to_variables`: encoder and pooler under bare Hugging Face names, float32."""
    tensors = {theirs: values[ours] for theirs, ours in _TOP.items()}
    for i in range(config.num_layers):
        kernels = np.split(values[f"encoder/layer_{i}/attention/qkv/kernel"], 3, axis=1)
        biases = np.split(values[f"encoder/layer_{i}/attention/qkv/bias"], 3)
        for part, kernel, bias in zip(_QKV, kernels, biases, strict=True):
            tensors[f"encoder.layer.{i}.attention.self.{part}.weight"] = kernel.T
            tensors[f"encoder.layer.{i}.attention.self.{part}.bias"] = bias
        for theirs, ours in _layer_names(i).items():
            tensors[theirs] = _transpose_kernel(ours, values[ours])
    if "head/pooler/kernel" in values:
        for theirs, ours in _POOLER.items():
            tensors[theirs] = _transpose_kernel(ours, values[ours])
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def load_pretrained(folder: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """The values of our variables in a checkpoint's folder; a new head has none there.

    If `config` has fewer layers than the checkpoint, they are those of `choose_layers`.
    """
    num_layers = _read_config(folder).num_hidden_layers
    whole = dataclasses.replace(config, num_layers=num_layers)
    values = to_variables(read_tensors(folder), whole, folder)
    return keep_layers(values, choose_layers(num_layers, config.num_layers))


def choose_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """The layers, from 0 on, that a student of `count` layers starts from: evenly, both ends kept.

    Of 12 layers and 6 they are DistilBERT's (Sanh et al. 2019, arXiv:1910.01108): 0, 2, 4, 7, 9 and
    11.
    """
    assert 1 <= count <= num_layers, (num_layers, count)
    return tuple(round(place) for place in np.linspace(0, num_layers - 1, count).tolist())


def keep_layers(values: dict[str, np.ndarray], layers: Sequence[int]) -> dict[str, np.ndarray]:
    """The values of an encoder of these layers alone, which count from 0 again."""
    kept = {name: value for name, value in values.items() if not name.startswith(_LAYER_PREFIX)}
    for index, layer in enumerate(layers):
        old, new = f"{_LAYER_PREFIX}{layer}/", f"{_LAYER_PREFIX}{index}/"
        kept |= {
            new + name.removeprefix(old): value
            for name, value in values.items()
            if name.startswith(old)
        }
    return kept
