"""Which files `prepare` reads: those that `--input` names, or a sample that is made first."""

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Any

from trainer.config import PrepareConfig
from trainer.errors import UserError
from trainer.sample import PREFIX, write_sample
from trainer.sources import list_files


@dataclass(frozen=True)
class Inputs:
    """The files to read, and what metadata.json says about where they came from."""

    files: list[str]
    description: dict[str, Any]


def gather_inputs(config: PrepareConfig, work_dir: str) -> Inputs:
    """Finds the files to read; a sample is written to the work folder.

    Raises:
      UserError: if `--input` names nothing that can be read.
    """
    samples = [item for item in config.input if item.split(":")[0] == "sample"]
    if not samples:
        files = list_files(config.input)
        described = [{"name": path, "bytes": os.path.getsize(path)} for path in files]
        return Inputs(files, {"inputs": described})
    if len(config.input) > 1:
        raise UserError(f"--input={','.join(config.input)}: expected a sample or files, not both")
    number = re.fullmatch(re.escape(PREFIX) + r"(?::([1-9]\d*))?", samples[0])
    if not number:
        raise UserError(f"--input={samples[0]}: expected {PREFIX} or {PREFIX}:N, N documents")
    path = os.path.join(work_dir, "docstrings.jsonl")
    num_documents = int(number[1]) if number[1] else None
    summary = write_sample(path, num_documents, config.seed, config.num_workers)
    return Inputs([path], {"inputs": [samples[0]], "sample": dataclasses.asdict(summary)})
