"""What `preflight` is told: a frozen dataclass, as in trainer/config. Imports nothing heavy."""

from dataclasses import dataclass

from trainer.config import (
    HEADS,
    WINDOW_POOLINGS,
    LossConfig,
    OptimizerConfig,
    check_choices,
    option,
    parse_row_groups,
)
from trainer.errors import UserError

STEPS = ("train", "score")
# BERT-base's vocabulary; and what is assumed of documents that are not there.
_VOCAB_SIZE, _NUM_LABELS, _MAX_SEQ_LENGTH, _MEAN_LENGTH = 30522, 100, 512, 128.0
_NUM_DOCUMENTS = 1_000_000


@dataclass(frozen=True)
class PreflightConfig:
    """`multihot preflight`: will the steps fit a TPU slice, and how fast; no TPU needed."""

    target: str = option(
        "", "TPU slice: v5e:2x2, v5e:4x4, v5p:2x2x1, v6e:2x2, …; a kind alone is one host.",
        required=True,
    )  # fmt: skip
    data_dir: str | None = option(
        None,
        "Folder that `multihot prepare` wrote, for labels, lengths and numbers of documents. "
        "Default: these are assumed, by the next five flags.",
    )
    num_labels: int | None = option(None, f"Labels, without --data_dir; default: {_NUM_LABELS}.")
    vocab_size: int | None = option(
        None,
        "WordPieces of an encoder from scratch, without --data_dir; default: "
        f"{_VOCAB_SIZE}, BERT-base's.",
    )
    max_seq_length: int | None = option(
        None, f"Longest window in tokens, without --data_dir; default: {_MAX_SEQ_LENGTH}."
    )
    mean_length: float | None = option(
        None,
        "Tokens of a document on average, without --data_dir; lengths are taken to be log-normal "
        f"about it. Default: {_MEAN_LENGTH:g}, or a quarter of --max_seq_length.",
    )
    num_documents: int | None = option(
        None,
        "Documents of the corpus, to train on and to score, without --data_dir; default: "
        f"{_NUM_DOCUMENTS}.",
    )
    init_checkpoint: str | None = option(
        None, "Folder or hub id of a pretrained BERT; default: the sizes below."
    )
    hidden_size: int = option(768, "Width of an encoder from scratch.")
    num_layers: int = option(12, "Layers of an encoder from scratch.")
    num_attention_heads: int = option(12, "Attention heads of an encoder from scratch.")
    intermediate_size: int = option(3072, "Feed-forward width of an encoder from scratch.")
    hidden_dropout: float = option(0.1, "Dropout rate of hidden states.")
    attention_dropout: float = option(0.1, "Dropout rate of attention probabilities.")
    head: str = option("cls", "What stands for a document, as `train` has it.", choices=HEADS)
    window_pooling: str = option(
        "max", "How windows become a document, as `train` has it.", choices=WINDOW_POOLINGS
    )
    precision: str = option(
        "auto", "auto: bfloat16.", choices=("auto", "float32", "mixed_bfloat16")
    )
    tokens_per_replica: int = option(4096, "Tokens of a micro-batch in training, padding included.")
    row_groups: str | None = option(
        None, "Rows of a micro-batch as ROWSxLENGTH,...; default: from the lengths."
    )
    gradient_accumulation: int = option(1, "Micro-batches a replica takes before an update.")
    num_train_epochs: float = option(3.0, "Passes over the training documents.")
    tokens_per_batch: int = option(8192, "Tokens of a micro-batch in scoring, padding included.")
    objective: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: tuple[str, ...] = option(STEPS, "Steps to compile: train, score, or both.")
    find_batch: bool = option(
        False, "Looks for the largest --tokens_per_replica that fits, by a few compilations more."
    )
    price_per_chip_hour: float | None = option(
        None, "Price of a chip for an hour, in any currency, to say what the corpus costs."
    )
    full_depth: bool = option(
        False,
        "Compiles all layers, which takes many minutes; default: two and three layers, from "
        "which memory and time are extended.",
    )
    least_effort: bool = option(
        False,
        "Compiles in about half the time; the program takes more memory and time than the one "
        "that a TPU would run.",
    )
    compiler: str | None = option(
        None,
        "Python of an environment with multihot[preflight] and without TensorFlow for TPUs; "
        "default: .venv-preflight, as `make compiler` makes it.",
    )
    costs: int = option(12, "Kinds of operations to list, those that take longest first.")
    output: str | None = option(None, "JSON file for all figures, local or gs://.")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in (
            "num_labels", "vocab_size", "max_seq_length", "mean_length", "num_documents",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                continue
            if self.data_dir is not None:
                raise UserError(f"--{name}={value}: --data_dir says that; leave one of them out")
            least = 8 if name == "max_seq_length" else 1
            _check(value >= least, name, value, f"at least {least}")
        for name in (
            "hidden_size", "num_layers", "num_attention_heads", "intermediate_size",
            "tokens_per_replica", "gradient_accumulation",
        ):  # fmt: skip
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of --num_attention_heads={self.num_attention_heads}",
        )
        for name in ("hidden_dropout", "attention_dropout"):
            _check(0 <= getattr(self, name) < 1, name, getattr(self, name), "a rate in [0, 1)")
        self._check_rest()

    def _check_rest(self) -> None:
        _check(self.tokens_per_batch >= 8, "tokens_per_batch", self.tokens_per_batch, "8 or more")
        _check(self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "more than 0")
        _check(
            bool(self.steps) and set(self.steps) <= set(STEPS),
            "steps",
            ",".join(self.steps),
            "train, score, or train,score",
        )
        price = self.price_per_chip_hour
        _check(price is None or price >= 0, "price_per_chip_hour", price, "0 or more")
        _check(self.costs >= 0, "costs", self.costs, "0 or more")
        if self.row_groups is not None:
            parse_row_groups(self.row_groups)
        if self.find_batch and self.row_groups is not None:
            raise UserError(
                f"--row_groups={self.row_groups}: --find_batch chooses the rows; leave one of them "
                "out"
            )
        if self.find_batch and "train" not in self.steps:
            raise UserError("--find_batch: looks at the train step; add train to --steps")

    def assumed(self) -> tuple[int, int, float, int]:
        """Labels, longest window, mean length and documents where there is no --data_dir."""
        longest = self.max_seq_length or _MAX_SEQ_LENGTH
        mean = self.mean_length or min(_MEAN_LENGTH, longest / 4)
        return (
            self.num_labels or _NUM_LABELS, longest, mean, self.num_documents or _NUM_DOCUMENTS,
        )  # fmt: skip

    def assumed_vocab_size(self) -> int:
        """WordPieces where there is no --data_dir; a checkpoint has its own number."""
        return self.vocab_size or (1 if self.init_checkpoint else _VOCAB_SIZE)


def _check(condition: bool, flag: str, found: object, expected: str) -> None:
    if not condition:
        raise UserError(f"--{flag}={found}: expected {expected}")
