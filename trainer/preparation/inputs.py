"""What `prepare` reads: its files or a sample, and the labels: how they are read, which stay."""

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import PrepareConfig
from trainer.data.metadata import TOKENIZER_FOLDER, Metadata
from trainer.data.tokenizer import TokenLimits, load_tokenizer
from trainer.errors import UserError, shorten
from trainer.preparation.row_index import RowIndex
from trainer.sources.docstrings import PREFIX, write_sample
from trainer.sources.formats.base import find_format
from trainer.sources.label_text import LabelError, quoted
from trainer.sources.labels import LabelReader, LabelsAreNames, check_names, read_label_file
from trainer.sources.listing import FileVersions, list_files
from trainer.sources.reader import (
    column_names,
    fingerprints,
    hashed_by_readers,
    read_row_range,
    whole_file,
)
from trainer.sources.rows import Columns, Row

_ROWS_TO_CHECK = 100


@dataclass(frozen=True)
class Inputs:
    """The files to read and their versions.

    `fingerprints` are those that are known before the rows are read; `sample` describes the sample
    that the one file is, if it is one.
    """

    files: list[str]
    versions: FileVersions
    fingerprints: dict[str, tuple[int, str]]
    sample: dict[str, Any] | None = None

    def describe(self, read: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
        """What metadata.json says of the inputs, given the fingerprints of the files just read."""
        if self.sample is not None:
            return self.sample
        found = {**self.fingerprints, **read}
        described = [
            {"name": name, "bytes": found[name][0], "checksum": found[name][1]}
            for name in self.files
        ]
        return {"inputs": described}


def gather_inputs(config: PrepareConfig, work_dir: str) -> Inputs:
    """Finds the files to read, or writes a sample; a UserError if `--input` names nothing."""
    samples = [item for item in config.input if item.split(":")[0] == "sample"]
    if not samples:
        files = list_files(
            config.input, config.input_format, config.source_split, config.tfds_data_dir,
            config.columns, config.json_field,
        )  # fmt: skip
        versions = FileVersions(files)
        others = [name for name in files if not hashed_by_readers(name)]
        return Inputs(
            files, versions, dict(zip(others, fingerprints(others, config.progress), strict=True))
        )
    if len(config.input) > 1:
        raise UserError(f"--input={','.join(config.input)}: expected a sample or files, not both")
    number = re.fullmatch(re.escape(PREFIX) + r"(?::([1-9]\d*))?", samples[0])
    if not number:
        raise UserError(f"--input={samples[0]}: expected {PREFIX} or {PREFIX}:N, N documents")
    path = os.path.join(work_dir, "docstrings.jsonl")
    num_documents = int(number[1]) if number[1] else None
    summary = write_sample(path, num_documents, config.seed, config.num_workers, config.progress)
    sample = {"inputs": [samples[0]], "sample": dataclasses.asdict(summary)}
    return Inputs([path], FileVersions([path]), {}, sample)


def choose_label_columns(config: PrepareConfig, files: Sequence[str]) -> PrepareConfig:
    """The flags, with the columns of truth values as labels if there is no column of labels.

    This needs the default `--label_field`, files whose schema says which columns hold truth values,
    and the same columns in all files.
    """
    if config.label_field != PrepareConfig.label_field:
        return config
    columns = find_format(files[0]).truth_value_columns(files[0])
    if not columns or config.label_field[0] in (column_names(files[0]) or ()):
        return config
    for name in files[1:]:
        if find_format(name).truth_value_columns(name) != columns:
            raise UserError(
                f"{name}: other columns of truth values than {files[0]}; say with --label_field "
                "which columns are the labels"
            )
    print(
        f"{files[0]}: no column {config.label_field[0]!r}; its {len(columns)} columns of truth "
        f"values are taken for the labels ({', '.join(columns[:3])}, ...)"
    )
    return dataclasses.replace(config, label_field=columns)


def choose_token_limits(
    config: PrepareConfig, previous: Metadata | None, files: Sequence[str]
) -> TokenLimits | None:
    """The limits of rows that come tokenised; None if there are no such rows.

    A UserError says that no tokenizer is named that made them.
    """
    tokenised = next((name for name in files if find_format(name).is_tokenised(name)), None)
    if tokenised is None:
        return None
    if previous is not None:
        tokenizer = load_tokenizer(os.path.join(config.data_dir, TOKENIZER_FOLDER))
    elif config.tokenizer != "train":
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        raise UserError(
            f"--tokenizer=train: {tokenised} holds token ids, expected text to train on; name "
            "the tokenizer that made them, a folder or a hub id"
        )
    return TokenLimits.of(tokenizer, config.max_seq_length, config.max_windows)


def has_label_list(metadata: Metadata) -> bool:
    """Whether the labels of a data folder are those of --labels, in its order."""
    return bool(metadata.source.get("calls") and metadata.source["calls"][0].get("label_list"))


def make_reader(config: PrepareConfig, previous: Metadata | None) -> LabelReader:
    """The reader of the labels of a row, by the flags or the folder's earlier splits.

    A UserError says that --labels, --label_kind and --label_field do not go together.
    """
    columns = config.label_field
    check_names(columns, f"--label_field={shorten(','.join(columns))}")
    names = columns if len(columns) > 1 else None
    source = f"--labels={config.labels}"
    if config.labels is not None:
        names = read_label_file(config.labels)
    if previous is not None:
        names, source = previous.labels, f"--data_dir={config.data_dir}"
    if names is None and config.label_kind in ("ids", "multi_hot"):
        raise UserError(
            f"--label_kind={config.label_kind}: expected the names that the numbers stand for; "
            "give them with --labels"
        )
    dropped = frozenset(previous.dropped_labels if previous else ())
    differing = set(names or ()) - set(columns)
    if config.unknown_labels == "error":
        differing |= set(columns) - set(names or ()) - dropped
    if names is not None and len(columns) > 1 and differing:
        raise UserError(
            f"{source}: other labels than --label_field names "
            f"({', '.join(map(shorten, sorted(differing)[:5]))}); expected the same names, or one "
            "column that lists the labels of a row"
        )
    return LabelReader(
        names,
        columns,
        config.label_delimiter,
        dropped,
        config.label_kind,
        config.normalize_labels,
        keeps_unknown=config.unknown_labels == "ignore",
        # Names that earlier splits' rows had are no list that ids could refer to.
        has_names=config.labels is None and not (previous and has_label_list(previous)),
    )


def check_labels(name: str, columns: Columns, reader: LabelReader) -> LabelReader:
    """Checks that labels of the first rows can be read; a UserError if none of several can.

    Returns the reader, which knows from then on whether strings of these rows are names.
    """
    rows = (row for row in read_row_range(whole_file(name), columns) if isinstance(row, Row))
    reasons = []
    num_usable = 0
    for row in itertools.islice(rows, _ROWS_TO_CHECK):
        try:
            reader.read(row.labels)
            num_usable += 1
            if not reader.can_be_ids:
                break
        except LabelsAreNames:
            return check_labels(name, columns, dataclasses.replace(reader, has_names=True))
        except LabelError as error:
            reasons.append(f"row {row.position}: {error}")
    if len(reasons) > 1 and not num_usable:
        known = ", ".join(map(quoted, (reader.names or ())[:3]))
        is_list = known and len(columns.labels) == 1
        hint = f", or correct the list of labels ({known}, ...)" if is_list else ""
        raise UserError(
            f"{name}: {reasons[0]}; none of the first {len(reasons)} rows has labels that can be "
            f"read; name the right column with --label_field (now {','.join(columns.labels)}){hint}"
        )
    return reader


def choose_labels(
    config: PrepareConfig, reader: LabelReader, row_index: RowIndex
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The labels in order, and the documents of each left out; a UserError if none is left.

    Left out are too rare ones, and those that are unknown where labels are given.
    """
    counts = dict(zip(row_index.names, row_index.label_counts, strict=True))
    if reader.names is not None:
        unknown = counts.keys() - reader.names
        return reader.names, {name: counts[name] for name in sorted(unknown)}
    enough = config.min_label_count
    labels = tuple(sorted(name for name, count in counts.items() if count >= enough))
    if not labels:
        commonest = max(counts.values(), default=0)
        raise UserError(
            f"--label_field={','.join(config.label_field)}: no label has --min_label_count="
            f"{enough} documents, the commonest has {commonest}; check the column, or lower the "
            "count"
        )
    return labels, {name: counts[name] for name in sorted(counts) if counts[name] < enough}
