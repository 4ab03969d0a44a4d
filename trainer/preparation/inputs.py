"""What `prepare` reads: what `--input` names or a sample, and what the flags leave open of it."""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import PrepareConfig
from trainer.data.metadata import TOKENIZER_FOLDER, Metadata
from trainer.data.token_rows import TokenLimits
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.sample import PREFIX, write_sample
from trainer.sources.listing import list_files
from trainer.sources.reader import column_names, fingerprints, is_tokenised, true_or_false_columns
from trainer.sources.versions import FileVersions


@dataclass(frozen=True)
class Inputs:
    """The files to read, their versions, and what metadata.json says about where they came from."""

    files: list[str]
    versions: FileVersions
    description: dict[str, Any]


def gather_inputs(config: PrepareConfig, work_dir: str) -> Inputs:
    """Finds the files to read; a sample is written to the work folder.

    Raises:
      UserError: if `--input` names nothing that can be read.
    """
    samples = [item for item in config.input if item.split(":")[0] == "sample"]
    if not samples:
        files = list_files(
            config.input, config.input_format, config.source_split, config.tfds_data_dir
        )
        versions = FileVersions(files)
        described = [
            {"name": name, "bytes": num_bytes, "checksum": checksum}
            for name, (num_bytes, checksum) in zip(files, fingerprints(files), strict=True)
        ]
        return Inputs(files, versions, {"inputs": described})
    if len(config.input) > 1:
        raise UserError(f"--input={','.join(config.input)}: expected a sample or files, not both")
    number = re.fullmatch(re.escape(PREFIX) + r"(?::([1-9]\d*))?", samples[0])
    if not number:
        raise UserError(f"--input={samples[0]}: expected {PREFIX} or {PREFIX}:N, N documents")
    path = os.path.join(work_dir, "docstrings.jsonl")
    num_documents = int(number[1]) if number[1] else None
    summary = write_sample(path, num_documents, config.seed, config.num_workers)
    return Inputs(
        [path],
        FileVersions([path]),
        {"inputs": [samples[0]], "sample": dataclasses.asdict(summary)},
    )


def choose_label_columns(config: PrepareConfig, files: Sequence[str]) -> PrepareConfig:
    """The flags, with the columns of truth values for labels if there is no column of labels.

    That is so only where `--label_field` is as it is by default, the files' schema says which
    columns hold truth values, and all files agree.
    """
    if config.label_field != PrepareConfig.label_field:
        return config
    columns = true_or_false_columns(files[0])
    if not columns or config.label_field[0] in (column_names(files[0]) or ()):
        return config
    for name in files[1:]:
        if true_or_false_columns(name) != columns:
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
    """What the rows that come tokenised keep to; None if there are none.

    Raises:
      UserError: if there are, and no tokenizer is named that made them.
    """
    tokenised = next((name for name in files if is_tokenised(name)), None)
    if tokenised is None:
        return None
    if previous is not None:
        tokenizer = load_tokenizer(os.path.join(config.data_dir, TOKENIZER_FOLDER))
        return TokenLimits.of(tokenizer, previous.max_seq_length, previous.max_windows)
    if config.tokenizer == "train":
        raise UserError(
            f"--tokenizer=train: {tokenised} holds token ids, expected text to train on; name "
            "the tokenizer that made them, a folder or a hub id"
        )
    tokenizer = load_tokenizer(config.tokenizer)
    return TokenLimits.of(tokenizer, config.max_seq_length, config.max_windows)
