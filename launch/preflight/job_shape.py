"""The sizes of a job's programs, from the data or assumed, and the largest micro-batch that fits.

What `train` and `score` choose is asked of their own code. This file adds what they need not know:
lengths where there is no data folder, counts of parameters and FLOP, and the search for a batch.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launch.accelerators import Target, parse_target
from launch.preflight_config import SCRATCH_LAYERS, PreflightConfig
from trainer.data.metadata import Metadata, Split, load_metadata
from trainer.data.packing import choose_score_packing
from trainer.model_config import ModelConfig, PackingConfig
from trainer.run_config import TrainConfig
from trainer.training import setup

# The spread of the logarithms of assumed lengths; it is 0.5 to 1 in most corpora of texts.
_SPREAD = 0.75
_HISTOGRAM_DOCUMENTS = 1_000_000
# Labels of an assumed document, where there are so many that they travel as indices.
_MAX_LABELS = 32
# The share of a micro-batch's tokens that packing fills, at least.
FILL = 0.97


@dataclass(frozen=True)
class JobShape:
    """The sizes of a job's programs.

    Attributes:
      packing: of a micro-batch in training and evaluation.
      max_labels: the most labels that a document has.
      tokens_per_document: on average, all windows together.
      num_documents: of the training split, or of the assumed corpus.
    """

    model: ModelConfig
    packing: PackingConfig
    scoring_packing: PackingConfig
    max_labels: int
    tokens_per_document: float
    num_documents: int

    def documents_per_batch(self, packing: PackingConfig) -> float:
        """Documents that a micro-batch holds on average."""
        return FILL * packing.num_tokens / self.tokens_per_document


@dataclass(frozen=True)
class Preflight:
    """A job on a slice: the flags, and what follows from them."""

    config: PreflightConfig
    target: Target
    metadata: Metadata
    shape: JobShape

    @classmethod
    def of(cls, config: PreflightConfig) -> "Preflight":
        """The job of a command's flags."""
        target, metadata = parse_target(config.target), read_metadata(config)
        return cls(config, target, metadata, choose_shape(config, metadata))

    def with_tokens(self, tokens_per_replica: int) -> "Preflight":
        """The same with another size of micro-batches in training."""
        config = dataclasses.replace(self.config, tokens_per_replica=tokens_per_replica)
        shape = choose_shape(config, self.metadata)
        return dataclasses.replace(self, config=config, shape=shape)


def train_config(config: PreflightConfig) -> TrainConfig:
    """The flags with which `train` runs the same step on a TPU."""
    names = {item.name for item in dataclasses.fields(TrainConfig)}
    shared = {name: value for name, value in vars(config).items() if name in names}
    if config.start is None and config.num_layers is None:
        shared["num_layers"] = SCRATCH_LAYERS
    precision = "mixed_bfloat16" if config.precision == "auto" else config.precision
    # `train` requires both folders; neither is read.
    folders = {"data_dir": config.data_dir or "none", "model_dir": "none"}
    return TrainConfig(**shared | folders | {"precision": precision})


def choose_shape(config: PreflightConfig, metadata: Metadata) -> JobShape:
    """The shape that `train` chooses, and `score` for texts like those of the training split."""
    training, split = train_config(config), metadata.split("train")
    packing = setup.choose_run_packing(training, metadata)
    lengths = np.zeros(metadata.max_seq_length + 1, np.int64)
    lengths[: len(split.length_histogram)] = split.length_histogram
    windows = np.asarray(split.window_histogram, np.int64)
    asked_by = f"the data in {config.data_dir}" if config.data_dir else "--max_seq_length"
    remedy = "take documents that were prepared for this checkpoint"
    with setup.local_start(training) as folder:
        model = setup.choose_model_config(training, metadata, folder, asked_by, remedy)
        if folder is not None and config.data_dir is not None:
            named = "init_checkpoint", str(config.init_checkpoint)
            setup.check_vocabulary(named, config.data_dir, metadata, model.vocab_size, folder)
    return JobShape(
        model,
        packing,
        choose_score_packing(lengths, windows, config.tokens_per_batch, metadata.max_windows),
        split.max_labels_per_document,
        split.tokens / split.documents,
        split.documents,
    )


def read_metadata(config: PreflightConfig) -> Metadata:
    """The metadata of --data_dir, or assumed ones without it."""
    if config.data_dir is not None:
        return load_metadata(config.data_dir)
    num_labels, longest, mean, documents = config.assumed()
    lengths = assume_lengths(mean, longest)
    tokens = sum(length * count for length, count in enumerate(lengths))
    split = Split(
        documents=documents,
        tokens=round(tokens / sum(lengths) * documents),
        truncated=0,
        rejected=0,
        label_counts=(max(1, documents // num_labels),) * num_labels,
        length_histogram=lengths,
        shards=(),
        windows=documents,
        window_histogram=(0, documents),
        max_labels_per_document=min(_MAX_LABELS, num_labels),
    )
    labels = tuple(map(str, range(num_labels)))
    return Metadata(labels, longest, config.assumed_vocab_size(), "", {"train": split}, {}, {})


def assume_lengths(mean: float, longest: int) -> tuple[int, ...]:
    """A histogram of log-normal lengths about a mean, from 3 tokens on, cut at `longest`."""
    middle = math.log(mean) - _SPREAD**2 / 2
    edges = np.log(np.arange(3, longest) + 0.5)
    below = np.array(
        [(1 + math.erf((edge - middle) / (_SPREAD * math.sqrt(2)))) / 2 for edge in edges]
    )
    # Shorter documents count as [CLS], a token and [SEP], longer ones are cut at the longest.
    shares = np.diff(np.concatenate([[0.0], below, [1.0]]))
    counts = np.round(shares * _HISTOGRAM_DOCUMENTS).astype(int)
    return (0, 0, 0, *counts.tolist())


def model_flops(model: ModelConfig, packing: PackingConfig) -> float:
    """FLOP of the matrix products of one forward pass over a micro-batch, padding included.

    A backward pass takes twice as many. What a program computes again, or computes otherwise, does
    not count: so these divided by the time are the useful rate.
    """
    size, labels, tokens = model.hidden_size, model.num_labels, packing.num_tokens
    after_attention = 2 * (size * size + 2 * size * model.intermediate_size)
    layer = 2 * tokens * 3 * size * size + tokens * after_attention
    layer += sum(4 * rows * length * length * size for rows, length in packing.row_groups)
    if model.head == "label_attention":
        head = 2 * 2 * tokens * size * labels
    else:
        head = 2 * packing.max_documents * size * labels
    left_out = 0
    if model.head == "cls":
        # In the last layer, all that follows the attention is computed for each [CLS] alone.
        left_out = (tokens - packing.max_windows) * after_attention
        head += 2 * packing.max_windows * size * size
    return float(model.num_layers * layer - left_out + head)


# Sizes are multiples of it, so that rows come out whole.
QUANTUM = 512
# Sizes that a search compiles at most.
_MAX_TRIALS = 6


@dataclass(frozen=True)
class Largest:
    """The result of a search: the largest of the `trials` compiled sizes that fits; 0 if none does.

    `refused` is the smallest size that does not fit, with the bytes that it needs (infinite where
    the compiler did not say).
    """

    tokens: int
    memory: float
    refused: tuple[int, float] | None
    trials: int


def find_largest(
    memory_of: Callable[[int], float], limit: float, start: int, fixed: float, smallest: int
) -> Largest:
    """Looks for the largest number of tokens whose memory is within a limit.

    Memory is nearly linear in tokens. So the next guess is where the line through two known sizes
    meets the limit, above all sizes that fit and below those that do not. The search ends when
    that is less than `QUANTUM` above a size that fits.

    Args:
      memory_of: bytes that so many tokens need; infinite where the compiler does not say.
      limit: bytes that there are.
      start: the first guess.
      fixed: about the bytes that do not grow with the tokens, for the second guess.
    """
    known: dict[int, float] = {}
    guess = max(smallest, start)
    while guess not in known and len(known) < _MAX_TRIALS:
        known[guess] = memory_of(guess)
        guess = _next_guess(known, limit, fixed, smallest)
    low, high = _bounds(known, limit)
    refused = None if high is None else (high, known[high])
    return Largest(low, known.get(low, 0.0), refused, len(known))


def _bounds(known: dict[int, float], limit: float) -> tuple[int, int | None]:
    """The largest size that fits (0 if none does), and the smallest that does not (or None)."""
    low = max((tokens for tokens, memory in known.items() if memory <= limit), default=0)
    high = min((tokens for tokens, memory in known.items() if memory > limit), default=None)
    return low, high


def _next_guess(known: dict[int, float], limit: float, fixed: float, smallest: int) -> int:
    """The next size to look at; a known one ends the search."""
    low, high = _bounds(known, limit)
    finite = {tokens: memory for tokens, memory in known.items() if math.isfinite(memory)}
    if high is not None and known[high] == math.inf and len(finite) < 2:
        guess = (low + high) / 2
    elif len(finite) == 1:
        ((tokens, memory),) = finite.items()
        guess = tokens * (limit - fixed) / max(memory - fixed, 1.0)
    else:
        # The two nearest to the limit.
        (a, of_a), (b, of_b) = sorted(finite.items(), key=lambda pair: abs(pair[1] - limit))[:2]
        slope = (of_b - of_a) / (b - a)
        guess = a + (limit - of_a) / slope if slope > 0 else a
    rounded = int(guess) // QUANTUM * QUANTUM
    if high is not None:
        rounded = min(rounded, (high - 1) // QUANTUM * QUANTUM)
    return max(rounded, low, smallest)
