"""The settings of a model and its training step, without heavy imports: `--help` reads them."""

import dataclasses
import functools
from dataclasses import dataclass, field

from trainer.errors import UserError
from trainer.flags import CheckedConfig, check_flag, option

HEADS = ("cls", "mean", "label_attention")
WIDE_PARTS = ("wordpieces", "none")
WINDOW_POOLINGS = ("max", "mean", "attention")
LOSSES = (
    "weighted_bce", "focal", "asymmetric", "class_balanced", "distribution_balanced",
    "logit_adjusted",
)  # fmt: skip

# Tokens of a window, of all windows of a document, which share a micro-batch, and of a micro-batch;
# rows of the embeddings.
MAX_WINDOW_TOKENS, MAX_DOCUMENT_TOKENS, MAX_BATCH_TOKENS = 2**16, 2**24, 2**25
MAX_VOCABULARY = 2**20
# A wide part of more, 0.25 GB, has two tables of this rank.
MAX_WIDE_PARAMETERS, WIDE_RANK = 2**26, 512
# Buckets that pairs of tokens are hashed to, by the size of the corpus, and the tokens for each.
_MIN_WIDE_PAIRS, MAX_WIDE_PAIRS, _TOKENS_A_BUCKET = 2**13, 2**18, 8
# Layers of an encoder from scratch.
SCRATCH_LAYERS = 4
# Odd numbers whose products spread over 32 bits.
HASH_FACTORS = (0x9E3779B1, 0x85EBCA77, 0x2C1B3C6D)

_DROPOUT_RATE = {"at_least": 0, "below": 1, "expected": "a rate in [0, 1)"}
_BELOW_1 = {"at_least": 0, "below": 1, "expected": "a number in [0, 1)"}
_NOT_NEGATIVE = {"at_least": 0, "expected": "a number not below 0"}


@functools.cache
def parse_row_groups(text: str) -> tuple[tuple[int, int], ...]:
    """`48x128,16x256` to ((48, 128), (16, 256)); UserError for other texts."""
    try:
        groups = tuple(
            (int(rows), int(length))
            for rows, length in (item.split("x") for item in text.split(","))
        )
    except ValueError:
        raise UserError(
            f"--row_groups={text}: expected ROWSxLENGTH,..., as 48x128,16x256"
        ) from None
    valid = all(rows > 0 and length > 0 for rows, length in groups)
    check_flag(valid, "row_groups", text, "positive rows and lengths")
    return groups


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(CheckedConfig):
    """The sizes of an encoder and its head that a user chooses."""

    hidden_size: int = option(256, "Width of an encoder from scratch.", at_least=1, at_most=2**16)
    num_layers: int | None = option(
        None,
        "Layers. Default: all of a checkpoint's, 4 from scratch. A checkpoint of more layers gives "
        "its first, its last and those evenly between.",
        at_least=1,
        at_most=2**12,
    )
    num_attention_heads: int = option(
        4, "Attention heads of an encoder from scratch.", at_least=1, at_most=2**12
    )
    intermediate_size: int = option(
        1024, "Feed-forward width of an encoder from scratch.", at_least=1, at_most=2**20
    )
    hidden_dropout: float = option(0.1, "Dropout rate of hidden states.", **_DROPOUT_RATE)
    attention_dropout: float = option(
        0.1, "Dropout rate of attention probabilities.", **_DROPOUT_RATE
    )
    head: str = option(
        "auto",
        "What stands for a document: BERT's pooler over [CLS], the mean of its tokens, or one "
        "attention a label. auto: what the checkpoint's own pooling configuration says; without "
        "one mean or cls, whichever's head start ranks better; from scratch mean.",
        choices=("auto", *HEADS),
    )
    wide: str = option(
        "auto",
        "A linear model over the document's WordPieces, whose logits are mixed with the head's. "
        "auto: wordpieces.",
        choices=("auto", *WIDE_PARTS),
    )
    window_pooling: str = option(
        "max",
        "How the vectors of a document's windows become one: their maximum, their mean, or their "
        "mean weighted by a learned attention. --head=label_attention sees all windows at once and "
        "needs none; for documents of one window it changes nothing.",
        choices=WINDOW_POOLINGS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.num_attention_heads
        expected = f"a multiple of --num_attention_heads={heads}"
        self.expect(self.hidden_size % heads == 0, "hidden_size", expected)


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The sizes of a BERT encoder and its head, in Hugging Face's terms."""

    vocab_size: int
    num_labels: int
    num_layers: int = field(
        default=SCRATCH_LAYERS,
        kw_only=True,
        metadata=EncoderConfig.__dataclass_fields__["num_layers"].metadata,
    )
    head: str = field(default="cls", kw_only=True)
    wide: str = field(default="none", kw_only=True)
    wide_pairs: int = field(default=0, kw_only=True)
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "num_labels", "max_position_embeddings", "type_vocab_size"):
            self.expect(getattr(self, name) >= 1, name, "at least 1")
        for name in ("layer_norm_eps", "initializer_range"):
            self.expect(0 <= getattr(self, name) < 1e6, name, "a number from 0 on, and small")

    @property
    def num_wide_terms(self) -> int:
        """Terms of the wide part: tokens, and buckets of pairs."""
        return self.vocab_size + self.wide_pairs

    @property
    def wide_rank(self) -> int:
        """Columns between the wide part's two tables; 0 where it has one, [terms, labels]."""
        return 0 if self.num_wide_terms * self.num_labels <= MAX_WIDE_PARAMETERS else WIDE_RANK


def choose_wide_pairs(vocab_size: int, num_labels: int, num_tokens: int) -> int:
    """Buckets of the wide part's pairs, a power of two, for a corpus of so many tokens."""

    def size(buckets: int, width: int) -> int:
        return (vocab_size + buckets) * width

    fits = size(_MIN_WIDE_PAIRS, num_labels) <= MAX_WIDE_PARAMETERS
    width, buckets = num_labels if fits else WIDE_RANK, _MIN_WIDE_PAIRS
    while buckets < min(MAX_WIDE_PAIRS, num_tokens / _TOKENS_A_BUCKET):
        if size(2 * buckets, width) > MAX_WIDE_PARAMETERS:
            break
        buckets *= 2
    return buckets


def num_parameters(model: ModelConfig) -> int:
    """Parameters of a model, those that are not trained included."""
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
    return size * embeddings + model.num_layers * layer + head + num_wide_parameters(model)


def num_wide_parameters(model: ModelConfig) -> int:
    """Parameters of a model's wide part: its tables, idf and bias, and the mixture."""
    if model.wide == "none":
        return 0
    terms, rank, labels = model.num_wide_terms, model.wide_rank, model.num_labels
    tables = rank * (terms + labels) if rank else terms * labels
    return tables + terms + labels + 2


@dataclass(frozen=True)
class PackingConfig:
    """The static shape of a micro-batch.

    `row_groups` is ((rows, length), ...): T = sum of rows x length tokens. `max_documents` is D
    and `max_windows` W, the slots for documents and for their windows.
    """

    row_groups: tuple[tuple[int, int], ...]
    max_documents: int
    max_windows: int

    def __post_init__(self) -> None:
        groups, count = self.row_groups, self.max_documents
        valid = len(groups) > 0 and all(rows > 0 and length > 0 for rows, length in groups)
        check_flag(valid, "row_groups", groups, "one or more ROWSxLENGTH, both positive")
        expected = f"between 1 and the {self.max_windows} window slots"
        check_flag(0 < count <= self.max_windows, "max_documents", count, expected)
        tokens, windows = self.num_tokens, self.max_windows
        check_flag(tokens <= MAX_BATCH_TOKENS, "row_groups", groups, f"{MAX_BATCH_TOKENS} tokens")
        check_flag(windows <= 2 * tokens + 8, "max_windows", windows, f"room in {tokens} tokens")

    @property
    def num_tokens(self) -> int:
        """T, the tokens of a micro-batch, padding included."""
        return sum(rows * length for rows, length in self.row_groups)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(length for _, length in self.row_groups)

    def holds(self, longest: int, windows: int) -> bool:
        """Whether a micro-batch has room for so many windows of `longest` tokens."""
        return windows <= min(
            self.max_windows, sum(rows * (length // longest) for rows, length in self.row_groups)
        )


@dataclass(frozen=True)
class OptimizerConfig(CheckedConfig):
    """AdamW, its schedule and its moving average. Durations are counted in documents."""

    learning_rate: float | None = option(
        None,
        "Peak learning rate; default: 0.0768 / hidden size (1e-4 for BERT-base) from a checkpoint, "
        "0.128 / hidden size from scratch.",
        above=0,
        expected="a positive rate",
    )
    warmup: float = option(
        0.1, "Share of all documents over which the rate rises linearly.", **_BELOW_1
    )
    schedule: str = option(
        "linear", "How the rate falls after warmup.", choices=("linear", "cosine", "constant")
    )
    weight_decay: float = option(
        0.01, "Decoupled decay; none on biases and LayerNorm.", **_NOT_NEGATIVE
    )
    adam_beta1: float = option(0.9, "Decay of the first moment.", **_BELOW_1)
    adam_beta2: float = option(0.999, "Decay of the second moment.", **_BELOW_1)
    adam_epsilon: float = option(
        1e-8, "Added to the root of the second moment.", above=0, expected="a positive number"
    )
    clip_norm: float = option(
        1.0, "Largest global gradient norm, after aggregation; 0 = none.", **_NOT_NEGATIVE
    )
    layerwise_lr_decay: float | None = option(
        None,
        "Factor on the rate from each layer to the one below it; default: 0.9 from a checkpoint, "
        "1, the same for all, from scratch.",
        above=0,
        at_most=1,
        expected="a factor in (0, 1]",
    )
    head_lr_multiplier: float | None = option(
        None,
        "Factor on the rate of the head; default: 30 from a checkpoint, 1 from scratch.",
        above=0,
        expected="a positive factor",
    )
    ema_decay: float = option(
        0.0,
        "Decay a step of the weights' moving average, used for evaluation; 0 = off.",
        **_BELOW_1,
    )

    def resolve(self, hidden_size: int, is_pretrained: bool) -> "OptimizerConfig":
        """These settings with numbers for the rates that were left to the model's kind and size."""
        per_width, decay, head = (0.0768, 0.9, 30.0) if is_pretrained else (0.128, 1.0, 1.0)
        return dataclasses.replace(
            self,
            learning_rate=self.learning_rate or per_width / hidden_size,
            layerwise_lr_decay=self.layerwise_lr_decay or decay,
            head_lr_multiplier=self.head_lr_multiplier or head,
        )


@dataclass(frozen=True)
class LossConfig(CheckedConfig):
    """The loss and its constants."""

    loss: str = option(
        "weighted_bce",
        "weighted_bce: sigmoid cross-entropy; the start, and the one whose probabilities can be "
        "corrected exactly. focal (Lin et al. 2017): worth trying where most documents are easy "
        "and drown the hard ones. asymmetric (Ridnik et al. 2021): where each document has few of "
        "many labels, or positives are missing from the labels. class_balanced (Cui et al. 2019): "
        "where rare labels matter as much as common ones. distribution_balanced (Wu et al. 2020, "
        "Huang et al. 2021): where rare labels come together with common ones. logit_adjusted "
        "(Menon et al. 2020): where labels will be about equally frequent in use.",
        choices=LOSSES,
    )
    focal_gamma: float = option(
        2.0,
        "How much focal and distribution_balanced play down easy documents; 0 = not.",
        **_NOT_NEGATIVE,
    )
    asymmetric_gamma_positive: float = option(
        0.0, "The same of asymmetric's positives.", **_NOT_NEGATIVE
    )
    asymmetric_gamma_negative: float = option(4.0, "The same of asymmetric's negatives.")
    asymmetric_margin: float = option(
        0.05, "Probability below which asymmetric leaves negatives alone.", **_BELOW_1
    )
    logit_adjustment: float = option(
        1.0,
        "Share of the labels' log-odds that logit_adjusted adds to the logits.",
        **_NOT_NEGATIVE,
    )
    label_smoothing: float = option(
        0.0, "Share of each label's target that is spread evenly over yes and no.", **_BELOW_1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        gamma = self.asymmetric_gamma_negative
        # Between 0 and 1 the gradient at the margin would be infinite.
        check_flag(gamma == 0 or gamma >= 1, "asymmetric_gamma_negative", gamma, "0, or 1 or more")
