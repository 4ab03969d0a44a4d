"""The settings of `preflight`, without heavy imports: `multihot --help` reads this file."""

from dataclasses import dataclass

from trainer.errors import UserError
from trainer.flags import changed_option, option
from trainer.model_config import EncoderConfig
from trainer.run_config import TrainStepConfig

STEPS = ("train", "score")
# BERT-base's vocabulary, and what is assumed of documents without --data_dir.
_VOCAB_SIZE, _NUM_LABELS, _MAX_SEQ_LENGTH, _MEAN_LENGTH = 30522, 100, 512, 128.0
_NUM_DOCUMENTS = 1_000_000
# Of an encoder from scratch: BERT-base's.
SCRATCH_LAYERS = 12


@dataclass(frozen=True)
class PreflightConfig(TrainStepConfig):
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
    num_labels: int | None = option(
        None, f"Labels, without --data_dir; default: {_NUM_LABELS}.", at_least=1
    )
    vocab_size: int | None = option(
        None,
        "WordPieces of an encoder from scratch, without --data_dir; default: "
        f"{_VOCAB_SIZE}, BERT-base's.",
        at_least=1,
    )
    max_seq_length: int | None = option(
        None,
        f"Longest window in tokens, without --data_dir; default: {_MAX_SEQ_LENGTH}.",
        at_least=8,
    )
    mean_length: float | None = option(
        None,
        "Tokens of a document on average, without --data_dir; lengths are taken to be log-normal "
        f"about it. Default: {_MEAN_LENGTH:g}, or a quarter of --max_seq_length.",
        at_least=1,
    )
    num_documents: int | None = option(
        None,
        "Documents of the corpus, to train on and to score, without --data_dir; default: "
        f"{_NUM_DOCUMENTS}.",
        at_least=1,
    )
    hidden_size: int = changed_option(EncoderConfig, "hidden_size", 768)
    num_layers: int | None = changed_option(
        EncoderConfig,
        "num_layers",
        help=f"Layers; default: all of a checkpoint's, {SCRATCH_LAYERS} from scratch.",
    )
    num_attention_heads: int = changed_option(EncoderConfig, "num_attention_heads", 12)
    intermediate_size: int = changed_option(EncoderConfig, "intermediate_size", 3072)
    precision: str = option(
        "auto", "auto: bfloat16.", choices=("auto", "float32", "mixed_bfloat16")
    )
    tokens_per_replica: int = changed_option(
        TrainStepConfig,
        "tokens_per_replica",
        help="Tokens of a micro-batch in training, padding included.",
    )
    num_train_epochs: float = changed_option(
        TrainStepConfig, "num_train_epochs", help="Passes over the training documents.", unit=""
    )
    tokens_per_batch: int = option(
        8192,
        "Tokens of a micro-batch in scoring, padding included.",
        at_least=8,
        expected="8 or more",
    )
    steps: tuple[str, ...] = option(STEPS, "Steps to compile: train, score, or both.")
    find_batch: bool = option(
        False, "Looks for the largest --tokens_per_replica that fits, by a few compilations more."
    )
    price_per_chip_hour: float | None = option(
        None,
        "Price of a chip for an hour, in any currency, to say what the corpus costs.",
        at_least=0,
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
    costs: int = option(
        12, "Kinds of operations to list, those that take longest first.", at_least=0
    )
    output: str | None = option(None, "JSON file for all figures, local or gs://.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_labels", "vocab_size", "max_seq_length", "mean_length", "num_documents"):
            value = getattr(self, name)
            if value is not None and self.data_dir is not None:
                raise UserError(f"--{name}={value}: --data_dir says that; leave one of them out")
        are_known = bool(self.steps) and set(self.steps) <= set(STEPS)
        self.expect(are_known, "steps", "train, score, or train,score")
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
