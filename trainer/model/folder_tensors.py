"""The tensors of a model folder, under the names that `modeling_multihot.py` has for them."""

import os

import numpy as np

from trainer.errors import UserError
from trainer.model import pretrained
from trainer.model_config import ModelConfig

_OWN_PREFIX = "multihot."
# Theirs: ours. PyTorch's weights are [outputs, inputs], our kernels the reverse.
_NAMES = {
    "classifier.weight": "head/classifier/kernel",
    "classifier.bias": "head/classifier/bias",
    f"{_OWN_PREFIX}query.weight": "head/query/kernel",
    f"{_OWN_PREFIX}window_query": "head/window_pooling/query",
    f"{_OWN_PREFIX}wide.idf": "wide/idf",
    f"{_OWN_PREFIX}wide.terms": "wide/terms",
    f"{_OWN_PREFIX}wide.kernel": "wide/kernel",
}
# Folders of earlier versions have our own names and layouts behind the prefix.
_EARLIER_NAMES = {
    f"{_OWN_PREFIX}{ours}": theirs for theirs, ours in _NAMES.items() if ours.startswith("head/")
}


def _turn(theirs: str, value: np.ndarray) -> np.ndarray:
    """A value in the other layout."""
    return np.ascontiguousarray(value.T) if theirs.endswith(".weight") else value


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of what stands behind encoder and pooler, by their names."""
    labels, size, terms = config.num_labels, config.hidden_size, config.num_wide_terms
    shapes: dict[str, tuple[int, ...]] = {
        "classifier.weight": (labels, size),
        "classifier.bias": (labels,),
    }
    if config.head == "label_attention":
        shapes[f"{_OWN_PREFIX}query.weight"] = (labels, size)
    elif config.window_pooling == "attention":
        shapes[f"{_OWN_PREFIX}window_query"] = (size, 1)
    if config.wide != "none":
        rank = config.wide_rank
        shapes[f"{_OWN_PREFIX}wide.idf"] = (terms,)
        if rank:
            shapes[f"{_OWN_PREFIX}wide.terms"] = (terms, rank)
        shapes[f"{_OWN_PREFIX}wide.kernel"] = (rank or terms, labels)
    return shapes


def _neutral_values(config: ModelConfig) -> dict[str, np.ndarray]:
    """The variables that folders do not have: their logits are the plain sum of both parts."""
    if config.wide == "none":
        return {}
    bias, mix = np.zeros(config.num_labels, np.float32), np.ones(2, np.float32)
    return {"wide/bias": bias, "wide/mix": mix}


def to_tensors(values: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """A model folder's tensors from the values of all variables, by our names.

    The wide part's bias and mixture have to be folded into the kernels and the head's bias.
    """
    for name, neutral in _neutral_values(config).items():
        assert np.array_equal(values[name], neutral), name
    encoder = pretrained.from_variables(values, config)
    own = {theirs: _turn(theirs, values[_NAMES[theirs]]) for theirs in _expected_shapes(config)}
    return {f"bert.{name}": value for name, value in encoder.items()} | own


def to_values(
    tensors: dict[str, np.ndarray], config: ModelConfig, folder: str
) -> dict[str, np.ndarray]:
    """The values of all variables, by our names, from a model folder's tensors.

    UserError for tensors that are missing, left over, or not of the shapes in `config`. So their
    sizes are those of the file, however many labels `config` has.
    """
    own: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        theirs = _EARLIER_NAMES.get(name)
        if theirs is not None:
            own[theirs] = _turn(theirs, value)
        elif name.startswith((_OWN_PREFIX, "classifier.")):
            own[name] = value
    values = pretrained.to_variables(pretrained.to_bare_names(tensors), config, folder)
    shapes = _expected_shapes(config)
    wrong = sorted(name for name in set(shapes) & set(own) if own[name].shape != shapes[name])
    missing = sorted(set(shapes) - set(own))
    if config.head == "cls" and "head/pooler/kernel" not in values:
        missing.append("bert.pooler.dense.weight")
    faults = {"missing": missing, "unknown": sorted(set(own) - set(shapes)), "other sizes": wrong}
    found = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in faults.items() if names)
    if found:
        wide = "" if config.wide == "none" else " with a wide part"
        raise UserError(
            f"{os.path.join(folder, pretrained.WEIGHTS_FILE)}: not the tensors of a {config.head} "
            f"model{wide} ({found}); export it again"
        )
    values |= {_NAMES[theirs]: _turn(theirs, value) for theirs, value in own.items()}
    return values | _neutral_values(config)
