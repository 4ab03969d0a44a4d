"""The plan of a scoring run: which rows go to which part, and what the parts' bytes depend on.

Worker 0 makes the plan once and writes it before any part; other workers wait for it. A rerun with
another model, other settings or other inputs is refused.
"""

import dataclasses
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.errors import RunAgain, UserError
from trainer.model_config import PackingConfig
from trainer.run_config import TENSORFLOW
from trainer.runtime.progress import show_progress
from trainer.sources.input_files import absolute_name, source_names
from trainer.sources.listing import for_each_file
from trainer.sources.reader import fingerprints, num_bytes, plan_and_fingerprint
from trainer.sources.rows import RowRange
from trainer.storage.filesystem import add_checksum
from trainer.storage.output_folder import OutputFolder
from trainer.storage.own_files import Count, PlainName, Several, closed, parse

# Parts of version 1 have scores of six digits: a folder is not finished with others.
PLAN_VERSION: Literal[2] = 2
PLAN_FILE = "plan.json"
_PART_NAME = "^part-[0-9]{5,}-of-[0-9]{5,}$"
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Input:
    """A file to score: its name with an absolute path, size, CRC-32C (hex)."""

    path: str
    bytes: Count
    checksum: str


@dataclass(frozen=True)
class Part:
    """The rows of one output file: consecutive ranges, of one large file or several small."""

    name: Annotated[PlainName, Field(pattern=_PART_NAME)]
    # The key in plan.json, which older plans have.
    row_ranges: Annotated[Several[RowRange], Field(alias="segments")]

    @property
    def num_rows(self) -> int:
        """Rows of its ranges, unusable ones and blank lines included."""
        return sum(row_range.num_rows for row_range in self.row_ranges)


@closed
@dataclass(frozen=True)
class Plan:
    """Everything that the bytes of the parts depend on.

    `settings` are the flags that change what is written, by name. `packing` is the shape of a
    micro-batch.
    """

    model_fingerprint: str
    settings: dict[str, Any]
    packing: PackingConfig
    inputs: Several[Input]
    parts: Annotated[Several[Part], Field(min_length=1)]
    version: Literal[1, 2] = PLAN_VERSION


def describe_inputs(paths: Sequence[str], progress: str = "auto") -> tuple[Input, ...]:
    """Sizes and checksums of the files."""
    described = zip(paths, fingerprints(paths, progress), strict=True)
    return tuple(Input(absolute_name(path), *found) for path, found in described)


def recall_inputs(
    plan: Plan, paths: Sequence[str], parts: Collection[int], progress: str = "auto"
) -> tuple[Input, ...]:
    """Sizes and checksums of the files, for a worker that reads only the files of `parts`.

    The checksums of the other files are those of the plan.
    """
    needed = {row_range.path for index in parts for row_range in plan.parts[index].row_ranges}
    planned = {item.path: item.checksum for item in plan.inputs}
    names = [absolute_name(path) for path in paths]
    read = [name for name in names if name in needed or name not in planned]
    described = {item.path: item for item in describe_inputs(read, progress)}

    def recall(name: str) -> Input:
        return described.get(name) or Input(name, num_bytes(name), planned[name])

    return tuple(for_each_file(names, recall))


def plan_parts(
    paths: Sequence[str], rows_per_part: int, progress: str = "auto"
) -> tuple[tuple[Input, ...], tuple[Part, ...]]:
    """Cuts the files into parts of about `rows_per_part` rows, small files together in one.

    Raises:
      UserError: if there are no rows.
    """
    groups: list[list[RowRange]] = []
    room = 0
    inputs = []
    names = source_names([absolute_name(path) for path in paths])
    found = for_each_file(list(names), partial(plan_and_fingerprint, rows_per_part=rows_per_part))
    planned = show_progress(progress, "numbering rows", len(names), "files", found)
    for (path, source), (row_ranges, sums) in zip(names.items(), planned, strict=True):
        inputs.append(Input(path, *sums))
        for row_range in row_ranges:
            if row_range.num_rows > room:
                groups.append([])
                room = rows_per_part
            groups[-1].append(dataclasses.replace(row_range, source=source))
            room -= row_range.num_rows
    if not groups:
        raise UserError(f"--input: no rows in {', '.join(names)}")
    width = max(5, len(str(len(groups))))  # Names in order are parts in order.
    parts = tuple(
        Part(f"part-{index:0{width}d}-of-{len(groups):0{width}d}", tuple(group))
        for index, group in enumerate(groups)
    )
    return tuple(inputs), parts


def save_plan(folder: OutputFolder, plan: Plan) -> bool:
    """Writes plan.json; False if another process wrote one meanwhile."""
    values = dataclasses.asdict(plan)
    for part in values["parts"]:
        part["segments"] = part.pop("row_ranges")
    contents = json.dumps(add_checksum(values), indent=1, ensure_ascii=False)
    return folder.create(PLAN_FILE, contents + "\n")


def load_plan(folder: OutputFolder) -> Plan | None:
    """An output folder's plan, None if it is empty; a UserError if damaged or lost."""
    (contents,) = folder.read([PLAN_FILE])
    if contents is None:
        if any(name.startswith("part-") for name in folder.find("")):
            raise UserError(
                f"{folder.url}: holds parts but no {PLAN_FILE}; expected an empty folder or one "
                "that `multihot score` began; choose another --output_dir"
            )
        return None
    path, remedy = f"{folder.url}/{PLAN_FILE}", "choose another --output_dir"
    what = "not a plan of this version"
    return parse(Plan, contents, path, remedy, what, is_sealed=True, check=_check_parts)


def _check_parts(plan: Plan) -> None:
    """Raises a ValueError for parts of one name, or rows of a file that is not an input."""
    inputs = {item.path for item in plan.inputs}
    if len({part.name for part in plan.parts}) < len(plan.parts):
        raise ValueError("two parts have the same name")
    for part in plan.parts:
        if not part.row_ranges or not inputs.issuperset(item.path for item in part.row_ranges):
            raise ValueError(f"{part.name} has no rows, or rows of a file that is not an input")


def wait_for_plan(folder: OutputFolder, seconds: float) -> Plan:
    """The plan, as soon as worker 0 has written it; RunAgain if it has not after `seconds`."""
    deadline = time.monotonic() + seconds
    is_said = False
    while (plan := load_plan(folder)) is None:
        if not is_said:
            print(f"waiting for worker 0 to write {folder.url}/{PLAN_FILE}", flush=True)
            is_said = True
        if time.monotonic() > deadline:
            raise RunAgain(
                f"{folder.url}/{PLAN_FILE}: worker 0 has not written it within {seconds:g} s "
                "(--start_timeout); see to worker 0 and run the same command again"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return plan


def check_version(plan: Plan, output_dir: str) -> None:
    """Refuses, by a UserError, to add parts to those of an older version."""
    if plan.version != PLAN_VERSION:
        raise UserError(
            f"{output_dir}: begun by an older version, which writes scores with fewer digits; "
            "choose another --output_dir, or finish this one with that version"
        )


def check_processor(plan: Plan, output_dir: str, kind: str | None) -> None:
    """Refuses, by a UserError, to mix parts of two classes of processors; older plans name none."""
    begun = plan.settings.get("processor", kind)
    if begun != kind:
        raise UserError(
            f"{output_dir}: begun on {begun or 'an accelerator'}, but this machine's processor is "
            f"of class {kind}, where scores may differ in the last digits; go on there, choose "
            "another --output_dir, or give --force to mix them"
        )


def check_plan(
    plan: Plan, output_dir: str, model_fingerprint: str, settings: dict, inputs: Sequence[Input]
) -> None:
    """Refuses, by a UserError, to continue a plan with another model, setting or input."""
    remedy = "restore it, or choose another --output_dir"
    if plan.model_fingerprint != model_fingerprint:
        raise UserError(
            f"{output_dir}: its parts come from the model {plan.model_fingerprint[:12]}, but "
            f"--model is {model_fingerprint[:12]}; {remedy}"
        )
    begun = {"engine": TENSORFLOW} | plan.settings  # Older plans do not name it.
    if begun.get("precision") == "mixed_bfloat16":
        begun["precision"] = "bfloat16"  # Its name in older plans.
    for name, value in settings.items():
        if begun.get(name) != value:
            raise UserError(
                f"--{name}={value}: {output_dir} was begun with --{name}="
                f"{str(begun.get(name))[:200]}; {remedy}"
            )
    before = {item.path: item for item in plan.inputs}
    now = {item.path: item for item in inputs}
    for path in sorted(before | now):
        if path not in now:
            raise UserError(f"{path}: not among --input any more, as {PLAN_FILE} says; {remedy}")
        if path not in before:
            raise UserError(f"{path}: not among the inputs in {output_dir}/{PLAN_FILE}; {remedy}")
        if before[path] != now[path]:
            raise UserError(
                f"{path}: changed since {output_dir} was begun ({before[path].bytes} bytes with "
                f"CRC-32C {before[path].checksum}, now {now[path].bytes} bytes with "
                f"{now[path].checksum}); {remedy}"
            )
