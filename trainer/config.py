"""The settings of the commands that work on data and models: one frozen dataclass a command.

Each command is the module `trainer.<name>` with a `run(config)`; `cli.py` adds those of `launch`.
Nothing heavy is imported here, because `multihot --help` reads this file.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from trainer import run_config
from trainer.errors import UserError
from trainer.flags import changed_option, check_flag, is_unicode, option, parse_kind
from trainer.model_config import MAX_DOCUMENT_TOKENS, MAX_VOCABULARY, MAX_WINDOW_TOKENS
from trainer.run_config import (
    DEFAULT_SEED,
    ENGINES,
    JIT_INFERENCE_HELP,
    SCORING_PRECISIONS,
    STRATEGIES,
    TENSORFLOW,
    DeviceConfig,
    ProgressConfig,
)

LOCAL_RUNNER = "local"
NAMED_FORMATS = (
    "jsonl", "json", "csv", "tsv", "text", "parquet", "tfrecord", "arrow", "libmultilabel",
)  # fmt: skip
# What --normalize_labels may do to the name of a label, in this order.
NORMAL_FORMS = ("strip", "casefold", "nfc")
# Any text but the empty one.
_NOT_EMPTY = r"[\s\S]+"


@dataclass(frozen=True)
class SampleConfig(ProgressConfig):
    """`multihot sample`: the docstrings of installed packages as a labelled corpus."""

    output: str = option("", "JSONL file to write (`.gz` compresses it).", required=True)
    num_documents: int | None = option(
        None,
        "Documents to take; default: all there are.",
        at_least=1,
        expected="a positive number of documents",
    )
    seed: int = option(DEFAULT_SEED, "Seed of the order in which source files are taken.")


@dataclass(frozen=True)
class InputConfig(ProgressConfig):
    """The rows that `prepare` and `score` read, and what reads them."""

    input: tuple[str, ...] = option(
        (),
        "Files, globs or folders, local or gs://, of JSONL, JSON, CSV, TSV, plain text, Parquet, "
        "TFRecord or Arrow, comma-separated; or `tfds:NAME`.",
        required=True,
    )
    input_format: str | None = option(
        None,
        "Format of the input, whatever its name; libmultilabel is id<TAB>labels<TAB>text. Default: "
        "by the ending of the name.",
        choices=NAMED_FORMATS,
    )
    json_field: str | None = option(
        None,
        "Field of JSON files that holds the list of rows; a.b is field b of field a. Default: the "
        "file is such a list, or objects.",
        pattern=_NOT_EMPTY,
        expected="the name of a field",
    )
    source_split: str | None = option(
        None,
        "Split to read of `tfds:` and of data sets that `datasets` saved. Default: all of them.",
    )
    tfds_data_dir: str | None = option(
        None, "Folder of TensorFlow Datasets. Default: its own, ~/tensorflow_datasets."
    )
    columns: tuple[str, ...] = option(
        (),
        "Names of the columns of CSV and TSV files without a header, in order, comma-separated. "
        "Default: the first row names them.",
    )
    text_field: str = option("text", "Column of the text.")
    id_field: str = option(
        "id", "Column of the document's id; rows without one are named by source and row number."
    )
    max_rejected: float = option(
        0.001,
        "Unusable rows to put up with: a share of the rows if below 1, else a number.",
        at_least=0,
        expected="a share or a number of rows, not negative",
    )
    runner: str = option(
        LOCAL_RUNNER,
        "What runs it: local (this machine at full speed), or the name of an Apache Beam runner: "
        "DirectRunner, DataflowRunner, FlinkRunner, SparkRunner or another.",
        pattern=_NOT_EMPTY,
        expected="local or the name of a Beam runner",
    )
    beam_options: tuple[str, ...] = option(
        (), "Options for Beam, comma-separated: --beam_options=--project=p,--region=r."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = not self.beam_options or self.runner != LOCAL_RUNNER
        self.expect(fits, "beam_options", "none with --runner=local; name a Beam runner")
        valid = "" not in self.columns and len(set(self.columns)) == len(self.columns)
        self.expect(valid, "columns", "names of columns, each once")
        check_flag(is_unicode("".join(self.columns)), "columns", ascii(self.columns), "UTF-8")
        fits = self.json_field is None or self.input_format in (None, "json")
        self.expect(fits, "json_field", f"none with --input_format={self.input_format}")


@functools.cache
def parse_split(text: str) -> Mapping[str, float]:
    """`--split` as the share of each split; a single name takes all rows. UserError for others."""
    if ":" not in text:
        expected = "a name of letters, digits and _, or name:share pairs"
        check_flag(text.isidentifier(), "split", text, expected)
        return {text: 1.0}
    shares = {}
    for item in text.split(","):
        name, _, share = item.partition(":")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            raise UserError(f"--split={text}: {item!r} is not NAME:SHARE") from None
        check_flag(name.strip().isidentifier(), "split", text, "names of letters and digits")
    valid = all(share > 0 for share in shares.values()) and abs(sum(shares.values()) - 1) < 1e-6
    check_flag(valid, "split", text, "positive shares that sum to 1")
    return shares


@dataclass(frozen=True)
class PrepareConfig(InputConfig):
    """`multihot prepare`: raw rows to TFRecord shards."""

    input: tuple[str, ...] = changed_option(
        InputConfig,
        "input",
        help="Files, globs or folders, local or gs://, of JSONL, JSON, CSV, TSV, Parquet, TFRecord "
        "or Arrow, comma-separated; `tfds:NAME`; or `sample:docstrings` (`sample:docstrings:N` for "
        "N documents).",
    )
    data_dir: str = option(
        "", "Folder to write shards, tokenizer and metadata.json to, local or gs://.", required=True
    )
    tokenizer: str = option(
        "train", "Folder or hub id of a tokenizer, or `train` for a new WordPiece vocabulary."
    )
    vocab_size: int = option(
        8192,
        "WordPieces of a vocabulary that is trained.",
        at_least=128,
        at_most=MAX_VOCABULARY,
        expected=f"at least 128 and at most {MAX_VOCABULARY} WordPieces",
    )
    max_seq_length: int = option(
        512,
        "Longest window in tokens, [CLS] and [SEP] included; a longer document becomes several "
        "windows, see --max_windows.",
        at_least=8,
        at_most=MAX_WINDOW_TOKENS,
        expected=f"at least 8 and at most {MAX_WINDOW_TOKENS} tokens",
    )
    window_stride: int = option(
        0,
        "Tokens of text from one window's start to the next; 0 stands for max_seq_length - 2, "
        "windows that do not overlap.",
    )
    max_windows: int = option(
        1,
        "Most windows of a document; what lies behind them is cut off. 1 cuts at max_seq_length.",
        at_least=1,
        unit="window",
    )
    split: str = option(
        "train:0.8,validation:0.1,test:0.1",
        "Shares of label-stratified splits, or one name that takes every row.",
        check=parse_split,
    )
    label_field: tuple[str, ...] = option(
        ("labels",), "Column of the labels, or a comma-separated list of 0/1 columns."
    )
    keep_columns: tuple[str, ...] = option(
        (), "Columns to keep with each document, comma-separated, so that metrics can go by value."
    )
    label_delimiter: str = option(
        ",",
        "What separates labels in a string of labels.",
        pattern=_NOT_EMPTY,
        expected="one or more characters",
    )
    labels: str | None = option(
        None, "File with one label name a line; default: the labels of the data."
    )
    label_kind: str = option(
        "auto",
        "What labels are: names, ids (places in --labels, from 0) or multi_hot. auto: numbers are "
        "ids, or multi-hot where there is a 0 or 1 for every label; strings are names, but ids "
        "where all of the column are whole numbers and no name in --labels is one.",
        choices=("auto", "names", "ids", "multi_hot"),
    )
    normalize_labels: tuple[str, ...] = option(
        ("none",),
        "What makes names one that differ only in that, comma-separated: strip (blanks around "
        "them), casefold (case), nfc (Unicode's composed form); or none.",
    )
    unknown_labels: str = option(
        "error",
        "A label outside --labels, or outside those of the folder: error (its row cannot be used) "
        "or ignore (it is left out, counted and warned of).",
        choices=("error", "ignore"),
    )
    min_label_count: int = option(
        1, "Fewest documents that a label of the data must have.", at_least=1, unit="document"
    )
    num_shards: int | None = option(
        None, "Shards a split; default: by the size of the data.", at_least=1
    )
    num_workers: int | None = option(None, "Processes; default: one a core.", at_least=1)
    work_dir: str | None = option(
        None,
        "Local folder for intermediate files where --data_dir is gs://; it needs room for all "
        "shards twice. Default: the system's temporary folder. (A local --data_dir is its own.)",
    )
    seed: int = option(
        DEFAULT_SEED,
        "Seed of the split and of the order within shards.",
        at_least=-(2**63),
        below=2**63,
        expected="a number of 64 bits",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = self.max_seq_length - 2
        expected = f"0 to {longest} tokens: --max_seq_length less [CLS] and [SEP]"
        self.expect(0 <= self.window_stride <= longest, "window_stride", expected)
        fits = self.window_stride == 0 or self.max_windows > 1
        expected = "--max_windows of 2 or more beside it: one window has no next one"
        self.expect(fits, "window_stride", expected)
        most = MAX_DOCUMENT_TOKENS // self.max_seq_length
        expected = f"at most {most} windows of --max_seq_length={self.max_seq_length} tokens"
        self.expect(self.max_windows <= most, "max_windows", expected)
        columns = self.keep_columns
        valid = "" not in columns and len(set(columns)) == len(columns)
        self.expect(valid, "keep_columns", "names of columns, each once")
        steps = set(self.normalize_labels)
        valid = steps == {"none"} or steps <= set(NORMAL_FORMS)
        self.expect(valid, "normalize_labels", "none, or some of strip, casefold and nfc")
        fits = self.label_kind == "auto" or len(self.label_field) == 1
        self.expect(fits, "label_kind", "auto, where --label_field names several 0/1 columns")

    @property
    def split_shares(self) -> Mapping[str, float]:
        """`--split`, parsed: split name to share."""
        return parse_split(self.split)


class ScoreRule(NamedTuple):
    """Which scores of a document to write: ("all", 0), ("chosen", 0), ("top", K), ("above", P)."""

    kind: str
    number: float


@functools.cache
def parse_scores(text: str) -> ScoreRule:
    """`--scores` as a rule; UserError for other texts."""
    kind, number = parse_kind(text)
    if number is None:
        valid, number = kind in ("all", "chosen"), 0.0
    else:
        valid = (kind == "top" and number >= 1 and number.is_integer()) or (
            kind == "above" and 0 <= number <= 1
        )
    check_flag(valid, "scores", text, "all, chosen, top:K or above:P with P in [0, 1]")
    return ScoreRule(kind, number)


@dataclass(frozen=True)
class ScoreConfig(DeviceConfig, InputConfig):
    """`multihot score`: corpus to scores."""

    model: str = option("", "Model folder that `multihot export` wrote.", required=True)
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
        check=parse_scores,
    )
    keep_columns: tuple[str, ...] = option(
        (), "Columns of the input to write beside each document's scores, comma-separated."
    )
    rows_per_part: int = option(50_000, "Rows of a part, about.", at_least=1, unit="row")
    tokens_per_batch: int = option(
        8192,
        "Tokens of a micro-batch, padding included.",
        at_least=8,
        at_most=MAX_DOCUMENT_TOKENS,
        expected="8 to 2^24 tokens",
    )
    strategy: str = changed_option(
        DeviceConfig,
        "strategy",
        help="Devices of this process to run on. auto: a TPU, else all GPUs, else the CPU.",
        choices=tuple(name for name in STRATEGIES if name != "multi_worker"),
    )
    engine: str = option(
        "auto",
        "What runs the encoder on CPUs: tensorflow or openvino (the extra of that name). auto: "
        "OpenVINO for bfloat16 and int8, TensorFlow for float32.",
        choices=("auto", *ENGINES),
    )
    precision: str = option(
        "auto",
        "float32, bfloat16 or int8; for int8 the model has to be measured in it (`evaluate "
        "--precision=int8`). auto: bfloat16 on TPUs, newer GPUs and CPUs with AMX, else float32.",
        choices=("auto", *SCORING_PRECISIONS),
    )
    jit_compile: str = option("auto", JIT_INFERENCE_HELP, choices=("auto", "true", "false"))
    force: bool = option(
        False,
        "Go on where results may differ in the last digits from those that are there (another "
        "class of processor), or in a precision that this processor has no fast instructions for.",
    )
    worker_index: int | None = option(
        None,
        "Which of --num_workers this process is, from 0; each does its share of the parts in the "
        "same --output_dir. Default: as TF_CONFIG or Slurm say, else 0.",
    )
    num_workers: int | None = option(
        None,
        "Processes that share the parts. Default: as TF_CONFIG or Slurm say, else 1.",
        at_least=1,
        unit="process",
    )
    start_timeout: float = option(
        3600.0,
        "Seconds that a worker waits for worker 0 to write the plan.",
        at_least=0,
        expected="seconds",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_worker()
        expected = f"none with --runner={self.runner}, which runs the SavedModel as it was exported"
        for name in ("engine", "precision", "jit_compile", "tokens_per_batch"):
            allowed = (getattr(ScoreConfig, name), "float32", TENSORFLOW)
            fits = self.runner == LOCAL_RUNNER or getattr(self, name) in allowed
            self.expect(fits, name, expected)
        columns = self.keep_columns
        taken = {"", "id", "labels", "scores"}.intersection(columns)
        expected = "names of columns, each once, none of them id, labels or scores"
        self.expect(not taken and len(set(columns)) == len(columns), "keep_columns", expected)
        for name in ("text_field", "id_field", "keep_columns"):
            found = ",".join(getattr(self, name)) if name == "keep_columns" else getattr(self, name)
            # Bytes of an argument that are not UTF-8 arrive as halves of surrogate pairs.
            check_flag(is_unicode(found), name, ascii(found), "UTF-8")

    def _check_worker(self) -> None:
        index, count = self.worker_index, self.num_workers
        if (index is None) != (count is None):
            missing = "worker_index" if index is None else "num_workers"
            raise UserError(f"--{missing}: expected too, beside the other of the two")
        if index is not None and count is not None:
            self.expect(0 <= index < count, "worker_index", f"0 to {count - 1}, of {count}")
        fits = self.runner == LOCAL_RUNNER or count is None
        expected = f"none with --runner={self.runner}, which has workers of its own"
        self.expect(fits, "num_workers", expected)

    def selection(self) -> ScoreRule:
        """`--scores`, parsed."""
        return parse_scores(self.scores)


def absolute(path: str) -> str:
    """A local path made absolute; a URL such as gs:// as it is."""
    return path if "://" in path else os.path.abspath(path)


# In the order in which a user meets them.
COMMANDS: dict[str, type] = {
    "sample": SampleConfig,
    "prepare": PrepareConfig,
    "train": run_config.TrainConfig,
    "evaluate": run_config.EvaluateConfig,
    "report": run_config.ReportConfig,
    "export": run_config.ExportConfig,
    "score": ScoreConfig,
}
