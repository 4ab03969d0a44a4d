"""What each command is told: frozen dataclasses, validated at construction, JSON both ways.

Every field that is a flag carries its help text, so that `flags.py` can make the flag from it and
the two can never disagree. Imports nothing heavy: `multihot --help` stands on this file.

The commands that work on data and models, in the order in which a user meets them.

Each is the module `trainer.<name>` with a `run(config)`; they run alike on a laptop and on what
`multihot submit` creates. `cli.py` adds those that talk to Google Cloud.
"""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.errors import UserError
from trainer.flags import check_choices, check_flag, is_unicode, option

Config = TypeVar("Config")
DEFAULT_SEED = 17
LOCAL_RUNNER = "local"
NAMED_FORMATS = (
    "jsonl", "csv", "tsv", "text", "parquet", "tfrecord", "arrow", "libmultilabel",
)  # fmt: skip
_INPUT_FORMAT_HELP = (
    "Format of the input, whatever its name; libmultilabel is id<TAB>labels<TAB>text. Default: by "
    "the ending of the name."
)
_SOURCE_SPLIT_HELP = (
    "Split to read of `tfds:` and of data sets that `datasets` saved. Default: all of them."
)
_TFDS_DATA_DIR_HELP = "Folder of TensorFlow Datasets. Default: its own, ~/tensorflow_datasets."


def _runner_option() -> Any:
    return option(
        LOCAL_RUNNER,
        "What runs it: local (this machine at full speed), or the name of an Apache Beam runner: "
        "DirectRunner, DataflowRunner, FlinkRunner, SparkRunner or another.",
    )


def _beam_options_option() -> Any:
    return option((), "Options for Beam, comma-separated: --beam_options=--project=p,--region=r.")


def _check_runner(config: Any) -> None:
    check_flag(bool(config.runner), "runner", config.runner, "local or the name of a Beam runner")
    check_flag(
        not config.beam_options or config.runner != LOCAL_RUNNER,
        "beam_options",
        ",".join(config.beam_options),
        "none with --runner=local; name a Beam runner",
    )


def to_json(config: Any) -> str:
    """A config as indented JSON, nested configs as nested objects."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + "\n"


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`: rebuilds (and so re-validates) a config.

    Raises:
      UserError: for a field that this version does not know.
    """
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{kind.__name__}: unknown fields {unknown}; written by another version?")
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(fields[name].type) and isinstance(value, dict):
            value = from_dict(fields[name].type, value)  # type: ignore[arg-type]
        arguments[name] = _as_tuple(value)
    return kind(**arguments)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class SampleConfig:
    """`multihot sample`: the docstrings of installed packages as a labelled corpus."""

    output: str = option("", "JSONL file to write (`.gz` compresses it).", required=True)
    num_documents: int | None = option(None, "Documents to take; default: all there are.")
    seed: int = option(DEFAULT_SEED, "Seed of the order in which source files are taken.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_flag(
            self.num_documents is None or self.num_documents > 0,
            "num_documents",
            self.num_documents,
            "a positive number of documents",
        )


@dataclass(frozen=True)
class PrepareConfig:
    """`multihot prepare`: raw rows to TFRecord shards."""

    input: tuple[str, ...] = option(
        (),
        "Files, globs or folders, local or gs://, of JSONL, CSV, TSV, Parquet, TFRecord or Arrow, "
        "comma-separated; `tfds:NAME`; or `sample:docstrings` (`sample:docstrings:N` for N "
        "documents).",
        required=True,
    )
    input_format: str | None = option(None, _INPUT_FORMAT_HELP, choices=NAMED_FORMATS)
    source_split: str | None = option(None, _SOURCE_SPLIT_HELP)
    tfds_data_dir: str | None = option(None, _TFDS_DATA_DIR_HELP)
    data_dir: str = option(
        "",
        "Folder to write shards, tokenizer and metadata.json to, local or gs://.",
        required=True,
    )
    tokenizer: str = option(
        "train", "Folder or hub id of a tokenizer, or `train` for a new WordPiece vocabulary."
    )
    vocab_size: int = option(8192, "WordPieces of a vocabulary that is trained.")
    max_seq_length: int = option(
        512,
        "Longest window in tokens, [CLS] and [SEP] included; a longer document becomes several "
        "windows, see --max_windows.",
    )
    window_stride: int = option(
        0,
        "Tokens of text from one window's start to the next; 0 stands for max_seq_length - 2, "
        "windows that do not overlap.",
    )
    max_windows: int = option(
        1, "Most windows of a document; what lies behind them is cut off. 1 cuts at max_seq_length."
    )
    split: str = option(
        "train:0.8,validation:0.1,test:0.1",
        "Shares of label-stratified splits, or one name that takes every row.",
    )
    text_field: str = option("text", "Column of the text.")
    label_field: tuple[str, ...] = option(
        ("labels",), "Column of the labels, or a comma-separated list of 0/1 columns."
    )
    id_field: str = option(
        "id", "Column of the document's id; rows without one are named by source and row number."
    )
    keep_columns: tuple[str, ...] = option(
        (), "Columns to keep with each document, comma-separated, so that metrics can go by value."
    )
    label_delimiter: str = option(",", "What separates labels in a string of labels.")
    labels: str | None = option(
        None, "File with one label name a line; default: the labels of the data."
    )
    min_label_count: int = option(1, "Fewest documents that a label of the data must have.")
    num_shards: int | None = option(None, "Shards a split; default: by the size of the data.")
    max_rejected: float = option(
        0.001, "Unusable rows to put up with: a share of the rows if below 1, else a number."
    )
    num_workers: int | None = option(None, "Processes; default: one a core.")
    work_dir: str | None = option(
        None,
        "Local folder for intermediate files where --data_dir is gs://; it needs room for all "
        "shards twice. Default: the system's temporary folder. (A local --data_dir is its own.)",
    )
    runner: str = _runner_option()
    beam_options: tuple[str, ...] = _beam_options_option()
    seed: int = option(DEFAULT_SEED, "Seed of the split and of the order within shards.")

    def __post_init__(self) -> None:
        check_choices(self)
        _check_runner(self)
        check_flag(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a number of 64 bits")
        check_flag(self.vocab_size >= 128, "vocab_size", self.vocab_size, "at least 128 WordPieces")
        check_flag(
            self.max_seq_length >= 8, "max_seq_length", self.max_seq_length, "at least 8 tokens"
        )
        check_flag(
            0 <= self.window_stride <= self.max_seq_length - 2,
            "window_stride",
            self.window_stride,
            f"0 to {self.max_seq_length - 2} tokens: --max_seq_length less [CLS] and [SEP]",
        )
        check_flag(self.max_windows >= 1, "max_windows", self.max_windows, "at least 1 window")
        check_flag(
            self.window_stride == 0 or self.max_windows > 1,
            "window_stride",
            self.window_stride,
            "--max_windows of 2 or more beside it: one window has no next one",
        )
        check_flag(
            "" not in self.keep_columns and len(set(self.keep_columns)) == len(self.keep_columns),
            "keep_columns",
            ",".join(self.keep_columns),
            "names of columns, each once",
        )
        check_flag(
            len(self.label_delimiter) >= 1,
            "label_delimiter",
            self.label_delimiter,
            "one or more characters",
        )
        check_flag(
            self.min_label_count >= 1,
            "min_label_count",
            self.min_label_count,
            "at least 1 document",
        )
        check_flag(
            self.num_shards is None or self.num_shards >= 1,
            "num_shards",
            self.num_shards,
            "at least 1",
        )
        check_flag(
            self.max_rejected >= 0,
            "max_rejected",
            self.max_rejected,
            "a share or a number of rows, not negative",
        )
        check_flag(
            self.num_workers is None or self.num_workers >= 1,
            "num_workers",
            self.num_workers,
            "at least 1",
        )
        self.split_shares()

    def split_shares(self) -> dict[str, float]:
        """Split name to share; the shares sum to 1. A single name takes everything."""
        if ":" not in self.split:
            check_flag(
                self.split.isidentifier(),
                "split",
                self.split,
                "a name of letters, digits and _, or name:share pairs",
            )
            return {self.split: 1.0}
        shares = {}
        for item in self.split.split(","):
            name, _, share = item.partition(":")
            try:
                shares[name.strip()] = float(share)
            except ValueError:
                raise UserError(f"--split={self.split}: {item!r} is not NAME:SHARE") from None
            check_flag(
                name.strip().isidentifier(), "split", self.split, "names of letters and digits"
            )
        check_flag(
            all(share > 0 for share in shares.values()) and abs(sum(shares.values()) - 1) < 1e-6,
            "split",
            self.split,
            "positive shares that sum to 1",
        )
        return shares


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a BERT encoder and its head, in Hugging Face's terms."""

    vocab_size: int
    num_labels: int
    hidden_size: int = 256
    num_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    head: str = "cls"
    window_pooling: str = "max"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_labels",
            "hidden_size",
            "num_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            check_flag(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check_flag(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of --num_attention_heads={self.num_attention_heads}",
        )
        for name in ("hidden_dropout", "attention_dropout"):
            check_flag(0 <= getattr(self, name) < 1, name, getattr(self, name), "a rate in [0, 1)")


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
        check_flag(
            len(self.row_groups) > 0
            and all(rows > 0 and length > 0 for rows, length in self.row_groups),
            "row_groups",
            self.row_groups,
            "one or more ROWSxLENGTH, both positive",
        )
        check_flag(
            0 < self.max_documents <= self.max_windows,
            "max_documents",
            self.max_documents,
            f"between 1 and the {self.max_windows} window slots",
        )

    @property
    def num_tokens(self) -> int:
        """T, the tokens of a micro-batch, padding included."""
        return sum(rows * length for rows, length in self.row_groups)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return max(length for _, length in self.row_groups)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and its average, all in terms of documents consumed."""

    learning_rate: float = option(1e-4, "Peak learning rate.")
    warmup: float = option(0.1, "Share of all documents over which the rate rises linearly.")
    schedule: str = option(
        "linear", "How the rate falls after warmup.", choices=("linear", "cosine", "constant")
    )
    weight_decay: float = option(0.01, "Decoupled decay; none on biases and LayerNorm.")
    adam_beta1: float = option(0.9, "Decay of the first moment.")
    adam_beta2: float = option(0.999, "Decay of the second moment.")
    adam_epsilon: float = option(1e-8, "Added to the root of the second moment.")
    clip_norm: float = option(1.0, "Largest global gradient norm, after aggregation; 0 = none.")
    layerwise_lr_decay: float = option(
        1.0, "Factor on the rate from each layer to the one below it; 1 = the same for all."
    )
    head_lr_multiplier: float = option(1.0, "Factor on the rate of the head.")
    ema_decay: float = option(
        0.0, "Decay a step of the weights' moving average, used for evaluation; 0 = off."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_flag(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive rate")
        for name in ("warmup", "adam_beta1", "adam_beta2", "ema_decay"):
            check_flag(
                0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)"
            )
        for name in ("weight_decay", "clip_norm"):
            check_flag(getattr(self, name) >= 0, name, getattr(self, name), "a number not below 0")
        check_flag(self.adam_epsilon > 0, "adam_epsilon", self.adam_epsilon, "a positive number")
        check_flag(
            0 < self.layerwise_lr_decay <= 1,
            "layerwise_lr_decay",
            self.layerwise_lr_decay,
            "a factor in (0, 1]",
        )
        check_flag(
            self.head_lr_multiplier > 0,
            "head_lr_multiplier",
            self.head_lr_multiplier,
            "a positive factor",
        )


LOSSES = (
    "weighted_bce",
    "focal",
    "asymmetric",
    "class_balanced",
    "distribution_balanced",
    "logit_adjusted",
)


@dataclass(frozen=True)
class LossConfig:
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
        2.0, "How much focal and distribution_balanced play down easy documents; 0 = not."
    )
    asymmetric_gamma_positive: float = option(0.0, "The same of asymmetric's positives.")
    asymmetric_gamma_negative: float = option(4.0, "The same of asymmetric's negatives.")
    asymmetric_margin: float = option(
        0.05, "Probability below which asymmetric leaves negatives alone."
    )
    logit_adjustment: float = option(
        1.0, "Share of the labels' log-odds that logit_adjusted adds to the logits."
    )
    label_smoothing: float = option(
        0.0, "Share of each label's target that is spread evenly over yes and no."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("focal_gamma", "asymmetric_gamma_positive", "logit_adjustment"):
            check_flag(getattr(self, name) >= 0, name, getattr(self, name), "a number not below 0")
        gamma = self.asymmetric_gamma_negative
        # Between 0 and 1 the gradient at the margin would be infinite.
        check_flag(gamma == 0 or gamma >= 1, "asymmetric_gamma_negative", gamma, "0, or 1 or more")
        for name in ("asymmetric_margin", "label_smoothing"):
            check_flag(
                0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)"
            )


HEADS = ("cls", "mean", "label_attention")
WINDOW_POOLINGS = ("max", "mean", "attention")
STRATEGIES = ("auto", "tpu", "mirrored", "multi_worker", "one_device", "cpu")
SCORING_STRATEGIES = tuple(name for name in STRATEGIES if name != "multi_worker")


@dataclass(frozen=True)
class TrainConfig:
    """`multihot train`: shards to checkpoints."""

    data_dir: str = option("", "Folder that `multihot prepare` wrote.", required=True)
    model_dir: str = option(
        "", "Folder for checkpoints and metrics; the same one resumes.", required=True
    )
    init_checkpoint: str | None = option(
        None, "Folder or hub id of a pretrained BERT; default: from scratch."
    )
    hidden_size: int = option(256, "Width of an encoder from scratch.")
    num_layers: int = option(4, "Layers of an encoder from scratch.")
    num_attention_heads: int = option(4, "Attention heads of an encoder from scratch.")
    intermediate_size: int = option(1024, "Feed-forward width of an encoder from scratch.")
    hidden_dropout: float = option(0.1, "Dropout rate of hidden states.")
    attention_dropout: float = option(0.1, "Dropout rate of attention probabilities.")
    head: str = option(
        "cls",
        "What stands for a document: BERT's pooler over [CLS], the mean of "
        "its tokens, or one attention a label.",
        choices=HEADS,
    )
    window_pooling: str = option(
        "max",
        "How the vectors of a document's windows become one: their maximum, their mean, or their "
        "mean weighted by a learned attention. --head=label_attention sees all windows at once and "
        "needs none; for documents of one window it changes nothing.",
        choices=WINDOW_POOLINGS,
    )
    strategy: str = option(
        "auto",
        "Devices to run on. auto: several workers if TF_CONFIG or Slurm names them, else a TPU, "
        "else all GPUs, else the CPU.",
        choices=STRATEGIES,
    )
    tpu: str | None = option(
        None, "TPU to take: local, a TPU VM's name, or grpc://HOST:PORT; default: a local one."
    )
    cpu_replicas: int = option(
        1, "Replicas that --strategy=mirrored makes of the CPU on a machine without GPUs."
    )
    start_timeout: float = option(
        300.0, "Seconds that a worker waits at the start for the others to appear."
    )
    max_restarts: int = option(
        0, "Times to start again, and resume, after the run ended otherwise than by itself."
    )
    max_bad_steps: int = option(
        20, "Steps in a row with a non-finite loss or gradient before the run stops."
    )
    precision: str = option(
        "auto",
        "auto: bfloat16 on TPUs and GPUs of compute capability 8.0 and up, float16 on older GPUs, "
        "float32 on CPUs.",
        choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"),
    )
    jit_compile: str = option(
        "auto",
        "XLA compilation of the step; auto: yes, except on TPU hosts.",
        choices=("auto", "true", "false"),
    )
    tokens_per_replica: int = option(4096, "Tokens of a micro-batch, padding included.")
    row_groups: str | None = option(
        None, "Rows of a micro-batch as ROWSxLENGTH,...; default: from the lengths of the data."
    )
    gradient_accumulation: int = option(1, "Micro-batches a replica takes before an update.")
    num_train_epochs: float = option(3.0, "Passes over the training split.")
    pos_weight: str = option(
        "none",
        "Weights of positives: none, balanced (negatives/positives), balanced_classes (the same, "
        "and negatives weigh documents/(2 negatives), as scikit-learn's 'balanced'), sqrt (the "
        "root of balanced), effective (Cui et al. 2019), or a JSON file of {label: weight}.",
    )
    max_pos_weight: float = option(100.0, "Cap on every positive weight.")
    objective: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps_per_loop: int | None = option(
        None, "Steps between two looks of the host at the device; default: 1 on a CPU, else 20."
    )
    checkpoint_every: int | None = option(
        None, "Steps between checkpoints; default: every tenth of the run."
    )
    keep_checkpoints: int = option(3, "Newest checkpoints to keep beside the best.")
    evaluate_every: float = option(1.0, "Epochs between evaluations on --eval_split.")
    eval_split: str = option("validation", "Split of the evaluations while training.")
    best_metric: str = option(
        "mean_average_precision",
        "Metric that picks the best checkpoint.",
        choices=(
            "mean_average_precision",
            "micro_average_precision",
            "micro_f1",
            "macro_f1",
            "loss",
        ),
    )
    patience: int = option(0, "Evaluations without a better metric before stopping; 0 = never.")
    seed: int = option(DEFAULT_SEED, "Seed of initial weights, shuffling and dropout.")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in (
            "hidden_size",
            "num_layers",
            "num_attention_heads",
            "intermediate_size",
            "tokens_per_replica",
            "gradient_accumulation",
            "cpu_replicas",
            "max_bad_steps",
            "keep_checkpoints",
        ):
            check_flag(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check_flag(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of --num_attention_heads={self.num_attention_heads}",
        )
        for name in ("hidden_dropout", "attention_dropout"):
            check_flag(0 <= getattr(self, name) < 1, name, getattr(self, name), "a rate in [0, 1)")
        check_flag(
            self.num_train_epochs > 0,
            "num_train_epochs",
            self.num_train_epochs,
            "more than 0 epochs",
        )
        check_flag(
            self.evaluate_every > 0, "evaluate_every", self.evaluate_every, "more than 0 epochs"
        )
        check_flag(self.max_pos_weight >= 1, "max_pos_weight", self.max_pos_weight, "at least 1")
        check_flag(self.patience >= 0, "patience", self.patience, "0 or more evaluations")
        check_flag(self.max_restarts >= 0, "max_restarts", self.max_restarts, "0 or more")
        check_flag(
            self.start_timeout > 0, "start_timeout", self.start_timeout, "more than 0 seconds"
        )
        check_flag(
            self.checkpoint_every is None or self.checkpoint_every >= 1,
            "checkpoint_every",
            self.checkpoint_every,
            "at least 1 step",
        )
        check_flag(
            self.steps_per_loop is None or self.steps_per_loop >= 1,
            "steps_per_loop",
            self.steps_per_loop,
            "at least 1 step",
        )
        check_flag(0 <= self.seed < 2**31, "seed", self.seed, "a number in [0, 2^31)")
        if self.row_groups is not None:
            parse_row_groups(self.row_groups)


def parse_row_groups(text: str) -> tuple[tuple[int, int], ...]:
    """`48x128,16x256` to ((48, 128), (16, 256)).

    Raises:
      UserError: if the text is anything else.
    """
    try:
        groups = tuple(
            (int(rows), int(length))
            for rows, length in (item.split("x") for item in text.split(","))
        )
    except ValueError:
        raise UserError(
            f"--row_groups={text}: expected ROWSxLENGTH,..., as 48x128,16x256"
        ) from None
    check_flag(
        all(rows > 0 and length > 0 for rows, length in groups),
        "row_groups",
        text,
        "positive rows and lengths",
    )
    return groups


@dataclass(frozen=True)
class EvaluateConfig:
    """`multihot evaluate`: best checkpoint to metrics, calibration and thresholds."""

    model_dir: str = option("", "Folder of a training run.", required=True)
    data_dir: str = option("", "Folder that `multihot prepare` wrote.", required=True)
    calibration_split: str = option("validation", "Split that fits calibration and thresholds.")
    split: str = option("test", "Split to report on.")
    min_support: int = option(10, "Positives below which a label takes the global threshold.")
    calibrate: str = option(
        "labels",
        "What to fit: a scale and shift a label, one for all "
        "labels, or none; positive weights are taken back all the same where that is exact.",
        choices=("labels", "global", "none"),
    )
    threshold_for: str = option(
        "overall_f1",
        "What thresholds are best for. overall_f1: macro- and micro-F1 together; f1: each label's "
        "own, which predicts labels that the model hardly knows for very many documents; "
        "precision:P: the largest recall at a precision of at least P; recall:R: the largest "
        "precision at a recall of at least R. A label that no cut takes there is never predicted.",
    )
    thresholds: str = option(
        "labels",
        "Whether each label has a threshold of its own, or all share a global one.",
        choices=("labels", "global"),
    )
    exact_memory: float = option(
        4.0,
        "GiB for exact metrics (100 bytes for each document and label of both splits); larger "
        "splits are read twice and measured in bins of scores, with bounds on the error, in "
        "memory that does not grow with the documents.",
    )
    resamples: int = option(
        1000, "Resamples for confidence intervals, fewer for large splits; 0: no intervals."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_flag(self.min_support >= 1, "min_support", self.min_support, "at least 1 document")
        check_flag(self.exact_memory >= 0, "exact_memory", self.exact_memory, "0 GiB or more")
        check_flag(self.resamples >= 0, "resamples", self.resamples, "0 or more")
        self.threshold_target()

    def threshold_target(self) -> tuple[str, float]:
        """`--threshold_for` as kind (overall_f1, f1, precision or recall) and level (0 for F1)."""
        kind, _, number = self.threshold_for.partition(":")
        try:
            level = float(number) if number else 0.0
        except ValueError:
            level = -1.0
        valid = (kind in ("overall_f1", "f1") and not number) or (
            kind in ("precision", "recall") and 0 < level <= 1
        )
        expected = "overall_f1, f1, precision:P or recall:R with P and R above 0 and at most 1"
        check_flag(valid, "threshold_for", self.threshold_for, expected)
        return kind, level


@dataclass(frozen=True)
class ReportConfig:
    """`multihot report`: an evaluation to one page, report.html in the model folder."""

    model_dir: str = option("", "Folder of a run that `multihot evaluate` measured.", required=True)
    data_dir: str | None = option(
        None, "Folder that `multihot prepare` wrote; default: the one that training read."
    )
    baseline_documents: int = option(
        10_000,
        "Most documents of each split that the TF-IDF baseline reads (10,000 with 128 labels take "
        "a minute, once); 0 leaves the baseline out.",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_flag(
            self.baseline_documents >= 0,
            "baseline_documents",
            self.baseline_documents,
            "0 or more documents",
        )


@dataclass(frozen=True)
class ExportConfig:
    """`multihot export`: best checkpoint to a model folder."""

    model_dir: str = option("", "Folder of a training run.", required=True)
    data_dir: str | None = option(
        None, "Folder that `multihot prepare` wrote; default: the one that training read."
    )
    export_dir: str = option(
        "",
        "Model folder to write; must not exist, be empty, or be this export's already.",
        required=True,
    )
    uncalibrated: bool = option(False, "Export without a calibration of this checkpoint.")

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class ScoreConfig:
    """`multihot score`: corpus to scores."""

    model: str = option("", "Model folder that `multihot export` wrote.", required=True)
    input: tuple[str, ...] = option(
        (),
        "Files, globs or folders, local or gs://, of JSONL, CSV, TSV, plain text, Parquet, "
        "TFRecord or Arrow, comma-separated; or `tfds:NAME`.",
        required=True,
    )
    input_format: str | None = option(None, _INPUT_FORMAT_HELP, choices=NAMED_FORMATS)
    source_split: str | None = option(None, _SOURCE_SPLIT_HELP)
    tfds_data_dir: str | None = option(None, _TFDS_DATA_DIR_HELP)
    output_dir: str = option("", "Folder for the parts; the same one resumes.", required=True)
    format: str = option(
        "jsonl",
        "Format of the parts: jsonl (`.jsonl.gz`) or parquet.",
        choices=("jsonl", "parquet"),
    )
    scores: str = option(
        "all",
        "Scores to write: all, chosen (of the labels at or above their thresholds), top:K, or "
        "above:P.",
    )
    keep_columns: tuple[str, ...] = option(
        (), "Columns of the input to write beside each document's scores, comma-separated."
    )
    text_field: str = option("text", "Column of the text.")
    id_field: str = option(
        "id", "Column of the document's id; rows without one are named by source and row number."
    )
    rows_per_part: int = option(50_000, "Rows of a part, about.")
    tokens_per_batch: int = option(8192, "Tokens of a micro-batch, padding included.")
    strategy: str = option(
        "auto",
        "Devices of this process to run on. auto: a TPU, else all GPUs, else the CPU.",
        choices=SCORING_STRATEGIES,
    )
    tpu: str | None = option(
        None, "TPU to take: local, a TPU VM's name, or grpc://HOST:PORT; default: a local one."
    )
    cpu_replicas: int = option(
        1, "Replicas that --strategy=mirrored makes of the CPU on a machine without GPUs."
    )
    precision: str = option(
        "auto",
        "auto: bfloat16 where the accelerator has it, else float32.",
        choices=("auto", "float32", "mixed_bfloat16"),
    )
    runner: str = _runner_option()
    beam_options: tuple[str, ...] = _beam_options_option()
    max_rejected: float = option(
        0.001, "Unusable rows to put up with: a share of the rows if below 1, else a number."
    )
    worker_index: int | None = option(
        None,
        "Which of --num_workers this process is, from 0; each does its share of the parts in the "
        "same --output_dir. Default: as TF_CONFIG or Slurm say, else 0.",
    )
    num_workers: int | None = option(
        None, "Processes that share the parts. Default: as TF_CONFIG or Slurm say, else 1."
    )
    start_timeout: float = option(
        3600.0, "Seconds that a worker waits for worker 0 to write the plan."
    )

    def __post_init__(self) -> None:
        check_choices(self)
        self._check_worker()
        _check_runner(self)
        for name in ("precision", "tokens_per_batch"):
            found, default = getattr(self, name), getattr(ScoreConfig, name)
            check_flag(
                self.runner == LOCAL_RUNNER or found in (default, "float32"),
                name,
                found,
                f"none with --runner={self.runner}, which runs the SavedModel as it was exported",
            )
        check_flag(self.rows_per_part >= 1, "rows_per_part", self.rows_per_part, "at least 1 row")
        check_flag(self.cpu_replicas >= 1, "cpu_replicas", self.cpu_replicas, "at least 1 replica")
        check_flag(
            8 <= self.tokens_per_batch <= 1 << 24,
            "tokens_per_batch",
            self.tokens_per_batch,
            "8 to 2^24 tokens",
        )
        check_flag(
            self.max_rejected >= 0,
            "max_rejected",
            self.max_rejected,
            "a share or a number of rows, not negative",
        )
        check_flag(
            not {"", "id", "labels", "scores"}.intersection(self.keep_columns)
            and len(set(self.keep_columns)) == len(self.keep_columns),
            "keep_columns",
            ",".join(self.keep_columns),
            "names of columns, each once, none of them id, labels or scores",
        )
        for name in ("text_field", "id_field", "keep_columns"):
            found = ",".join(getattr(self, name)) if name == "keep_columns" else getattr(self, name)
            # What the shell hands over in other bytes arrives as halves of surrogate pairs.
            check_flag(is_unicode(found), name, ascii(found), "UTF-8")
        self.selection()

    def _check_worker(self) -> None:
        index, count = self.worker_index, self.num_workers
        if (index is None) != (count is None):
            missing = "worker_index" if index is None else "num_workers"
            raise UserError(f"--{missing}: expected too, beside the other of the two")
        if index is not None and count is not None:
            check_flag(count >= 1, "num_workers", count, "at least 1 process")
            check_flag(0 <= index < count, "worker_index", index, f"0 to {count - 1}, of {count}")
        check_flag(self.start_timeout >= 0, "start_timeout", self.start_timeout, "seconds")
        check_flag(
            self.runner == LOCAL_RUNNER or count is None,
            "num_workers",
            count,
            f"none with --runner={self.runner}, which has workers of its own",
        )

    def selection(self) -> tuple[str, float]:
        """`--scores` as (kind, number): ("all", 0), ("chosen", 0), ("top", K) or ("above", P)."""
        kind, _, number = self.scores.partition(":")
        try:
            value = float(number) if number else 0.0
        except ValueError:
            value = -1.0
        valid = (
            (kind in ("all", "chosen") and not number)
            or (kind == "top" and value >= 1 and value.is_integer())
            or (kind == "above" and bool(number) and 0 <= value <= 1)
        )
        check_flag(valid, "scores", self.scores, "all, chosen, top:K or above:P with P in [0, 1]")
        return kind, value


def absolute(path: str) -> str:
    """A local path made absolute; a URL such as gs:// as it is."""
    return path if "://" in path else os.path.abspath(path)


COMMANDS: dict[str, type] = {
    "sample": SampleConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "score": ScoreConfig,
}
