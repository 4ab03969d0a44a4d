"""What a job would run: its model's sizes and its micro-batches' shapes, from data or assumed.

The largest micro-batch that fits, from few compilations: memory is nearly linear in tokens.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launch.preflight_config import PreflightConfig
from trainer.data.metadata import Metadata, Split, load_metadata
from trainer.data.packing import add_histograms, choose_packing, choose_score_packing
from trainer.errors import UserError
from trainer.model.pretrained import model_config, resolve_checkpoint
from trainer.model_config import ModelConfig, PackingConfig
from trainer.storage import filesystem

# Spread of the logarithms of assumed lengths; most corpora of texts lie between 0.5 and 1.
_SPREAD = 0.75
_HISTOGRAM_DOCUMENTS = 1_000_000
# Of a document, where there are so many that they travel as indices.
_MAX_LABELS = 32
# The share of a micro-batch's tokens that packing fills, at least.
FILL = 0.97


@dataclass(frozen=True)
class JobShape:
    """A job, as far as the sizes of its programs go.

    Attributes:
      model: sizes.
      packing: of a micro-batch in training and evaluation.
      scoring_packing: of a micro-batch in scoring.
      max_labels: that a document has.
      tokens_per_document: on average, all windows together.
      num_documents: of the training split, or of the assumed corpus.
    """

    model: ModelConfig
    packing: PackingConfig
    scoring_packing: PackingConfig
    max_labels: int
    tokens_per_document: float
    num_documents: int

    def with_layers(self, num_layers: int) -> "JobShape":
        """The same with another number of encoder layers."""
        model = dataclasses.replace(self.model, num_layers=num_layers)
        return dataclasses.replace(self, model=model)

    def documents_per_batch(self, packing: PackingConfig) -> float:
        """Documents that a micro-batch holds on average."""
        return FILL * packing.num_tokens / self.tokens_per_document


def choose_shape(config: PreflightConfig, metadata: Metadata) -> JobShape:
    """The shape that `train` and `score` would choose.

    Args:
      config: the flags.
      metadata: of --data_dir, or from `assume_metadata`.

    Raises:
      UserError: for a checkpoint that is damaged or too small for the data, or for micro-batches
        that cannot hold the longest document.
    """
    split = metadata.split("train")
    histograms = [item.window_histogram for item in metadata.splits.values()]
    packing = choose_packing(
        split.length_histogram, config.tokens_per_replica, config.chosen_row_groups,
        metadata.max_seq_length,
        split.window_histogram, len(add_histograms(histograms)) - 1,
    )  # fmt: skip
    lengths = np.zeros(metadata.max_seq_length + 1, np.int64)
    lengths[: len(split.length_histogram)] = split.length_histogram
    scoring_packing = choose_score_packing(
        lengths, np.asarray(split.window_histogram, np.int64), config.tokens_per_batch,
        metadata.max_windows,
    )  # fmt: skip
    return JobShape(
        choose_sizes(config, metadata),
        packing,
        scoring_packing,
        split.max_labels_per_document,
        split.tokens / split.documents,
        split.documents,
    )


def read_metadata(config: PreflightConfig) -> Metadata:
    """metadata.json of --data_dir, or what is assumed without one.

    Raises:
      UserError: if there is no such folder, or it has no training split.
    """
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
    return Metadata(
        labels, longest, config.assumed_vocab_size(), "", {"train": split}, {}, {}
    )  # fmt: skip


def assume_lengths(mean: float, longest: int) -> tuple[int, ...]:
    """A histogram of log-normal lengths about a mean, from 3 tokens on, cut at `longest`."""
    middle = math.log(mean) - _SPREAD**2 / 2
    edges = np.log(np.arange(3, longest) + 0.5)
    below = np.array(
        [(1 + math.erf((edge - middle) / (_SPREAD * math.sqrt(2)))) / 2 for edge in edges]
    )
    # What is shorter than [CLS], a token and [SEP], and what is cut, is as long as these edges.
    shares = np.diff(np.concatenate([[0.0], below, [1.0]]))
    counts = np.round(shares * _HISTOGRAM_DOCUMENTS).astype(int)
    return (0, 0, 0, *counts.tolist())


def choose_sizes(config: PreflightConfig, metadata: Metadata) -> ModelConfig:
    """The model's sizes.

    Raises:
      UserError: for a checkpoint that is damaged, or too small for the data.
    """
    rates = config.hidden_dropout, config.attention_dropout
    if config.init_checkpoint is None:
        return ModelConfig(
            vocab_size=metadata.vocab_size,
            num_labels=len(metadata.labels),
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=metadata.max_seq_length,
            hidden_dropout=config.hidden_dropout,
            attention_dropout=config.attention_dropout,
            head=config.head,
            window_pooling=config.window_pooling,
        )
    with filesystem.local_copy(config.init_checkpoint) as local:
        sizes = model_config(resolve_checkpoint(local), len(metadata.labels), config.head, *rates)
    for name, found, needed in (
        ("vocab_size", sizes.vocab_size, metadata.vocab_size),
        ("max_position_embeddings", sizes.max_position_embeddings, metadata.max_seq_length),
    ):
        if found < needed:
            where = f"the data in {config.data_dir}" if config.data_dir else "--max_seq_length"
            raise UserError(
                f"--init_checkpoint={config.init_checkpoint}: its {name} is {found}, but {where} "
                f"needs {needed}; take documents that were prepared for this checkpoint"
            )
    return dataclasses.replace(sizes, window_pooling=config.window_pooling)


def num_parameters(model: ModelConfig) -> int:
    """Trainable parameters of a model."""
    size, inner, labels = model.hidden_size, model.intermediate_size, model.num_labels
    embeddings = model.vocab_size + model.max_position_embeddings + model.type_vocab_size + 2
    layer = 4 * (size * size + size) + 2 * size * inner + inner + size + 4 * size
    head = size * labels + labels
    if model.head == "cls":
        head += size * size + size
    if model.head == "label_attention":
        head += size * labels
    elif model.window_pooling == "attention":
        head += size
    return size * embeddings + model.num_layers * layer + head


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
        # What follows the last attention is for each window's [CLS] alone.
        left_out = (tokens - packing.max_windows) * after_attention
        head += 2 * packing.max_windows * size * size
    return float(model.num_layers * layer - left_out + head)


# Sizes are multiples of it, so that rows come out whole.
QUANTUM = 512
# Guesses before the search settles for what it has.
_MOST_TRIALS = 6


@dataclass(frozen=True)
class Largest:
    """What a search found.

    Attributes:
      tokens: the largest size that was seen to fit; 0 if none was.
      memory: bytes that it needs.
      refused: the smallest size that was seen not to fit, with the bytes that it needs (infinite
        where the compiler did not say), or None.
      trials: sizes that were looked at.
    """

    tokens: int
    memory: float
    refused: tuple[int, float] | None
    trials: int


def find_largest(
    memory_of: Callable[[int], float], limit: float, start: int, fixed: float, least: int
) -> Largest:
    """Looks for the largest number of tokens whose memory is within a limit.

    The next guess is where the line through two measured sizes meets the limit, between what is
    known to fit and what is known not to. It ends when the line meets the limit less than
    `QUANTUM` above a size that fits.

    Args:
      memory_of: bytes that so many tokens need, infinity for more than can be told.
      limit: bytes that there are.
      start: the first guess, whose memory is looked up first.
      fixed: bytes that do not grow with the tokens, about: for the second guess.
      least: the smallest size to look at.
    """
    known: dict[int, float] = {}
    guess = max(least, start)
    while guess not in known and len(known) < _MOST_TRIALS:
        known[guess] = memory_of(guess)
        guess = _next_guess(known, limit, fixed, least)
    fits = [tokens for tokens, memory in known.items() if memory <= limit]
    refused = [tokens for tokens, memory in known.items() if memory > limit]
    best = max(fits, default=0)
    above = (min(refused), known[min(refused)]) if refused else None
    return Largest(best, known.get(best, 0.0), above, len(known))


def _next_guess(known: dict[int, float], limit: float, fixed: float, least: int) -> int:
    """The next size to look at; one that is known already ends the search."""
    low = max((tokens for tokens, memory in known.items() if memory <= limit), default=0)
    high = min((tokens for tokens, memory in known.items() if memory > limit), default=None)
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
    return max(rounded, low, least)
