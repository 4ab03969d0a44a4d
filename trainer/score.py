"""`multihot score`: a corpus to scores, in planned parts, restartable.

The pipeline itself is in scoring.py, the plan in plan.py, the output folder in parts.py.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from trainer import storage
from trainer.config import PackingConfig, ScoreConfig, absolute
from trainer.errors import UserError
from trainer.exported import ExportedModel, load_exported
from trainer.packing import choose_packing, least_tokens
from trainer.parts import (
    REJECTED_FOLDER,
    SUCCESS_FILE,
    Manifest,
    PartWriter,
    load_manifest,
    open_output_folder,
    write_success,
)
from trainer.plan import (
    Input,
    Part,
    Plan,
    check_plan,
    describe_inputs,
    load_plan,
    plan_parts,
    save_plan,
)
from trainer.rejected import allowed_rejections, too_many_rejected
from trainer.result_lines import LineFormatter
from trainer.scoring import Block, read_chunks, scored_blocks
from trainer.sources import Columns, check_columns, list_files
from trainer.strategy import choose_scoring_precision

# Flags that change what is written; a rerun has to give them as they were.
_SETTINGS = (
    "format",
    "scores",
    "text_field",
    "id_field",
    "rows_per_part",
    "tokens_per_batch",
)
# Rows whose lengths choose the shape of the micro-batches: some from each of a few parts.
_SAMPLED_PARTS = 16
_SAMPLED_ROWS_A_PART = 256


@dataclass(frozen=True)
class ScoreSummary:
    """What a call scored: documents, and seconds from the plan to the last part."""

    documents: int
    seconds: float


def run(config: ScoreConfig) -> ScoreSummary:
    """Scores every row that is not scored yet, and says what was done.

    Raises:
      UserError: if an input, the model or the output folder is not usable, the folder was begun
        with another model, other inputs or other settings, or too many rows cannot be used.
    """
    storage.require_local("output_dir", config.output_dir)
    columns = Columns(text=config.text_field, id=config.id_field)
    paths = list_files(config.input)
    for path in paths:
        if os.path.dirname(absolute(path)) == absolute(config.output_dir):
            raise UserError(
                f"{path}: lies in --output_dir, where parts would count as input the next time; "
                "choose another --output_dir"
            )
        check_columns(path, columns)
    precision = choose_scoring_precision(config.precision)
    model = load_exported(config.model, precision)
    with open_output_folder(config.output_dir):
        start = time.perf_counter()
        settings = {name: getattr(config, name) for name in _SETTINGS} | {"precision": precision}
        plan = _settle_plan(config, model, columns, settings, describe_inputs(paths))
        done = [load_manifest(config.output_dir, part) for part in plan.parts]
        if all(done) and os.path.exists(os.path.join(config.output_dir, SUCCESS_FILE)):
            print(f"{config.output_dir}: all {len(done)} parts are there already; nothing to do")
            return ScoreSummary(0, 0.0)
        documents = _score_parts(config, model, columns, plan, done)
        manifests = [manifest for manifest in done if manifest is not None]
        if not any(manifest.rows_in for manifest in manifests):
            raise UserError(f"--input={','.join(config.input)}: no rows; expected at least one")
        write_success(config.output_dir, manifests)
        summary = ScoreSummary(documents, time.perf_counter() - start)
        _print_summary(config, manifests, summary)
        return summary


def _settle_plan(
    config: ScoreConfig,
    model: ExportedModel,
    columns: Columns,
    settings: dict[str, Any],
    inputs: tuple[Input, ...],
) -> Plan:
    """The plan that the output folder was begun with, or a new one."""
    plan = load_plan(config.output_dir)
    if plan is not None:
        check_plan(plan, config.output_dir, model.fingerprint, settings, inputs)
        return plan
    parts = plan_parts(inputs, config.rows_per_part)
    packing = choose_score_packing(
        *sample_lengths(parts, columns, model), config.tokens_per_batch, model.max_windows
    )
    plan = Plan(model.fingerprint, settings, packing, inputs, parts)
    save_plan(config.output_dir, plan)
    return plan


def choose_score_packing(
    lengths: np.ndarray, windows: np.ndarray, tokens_per_batch: int, most_windows: int
) -> PackingConfig:
    """The shape of the micro-batches for documents of these lengths.

    Args:
      lengths: int64 [max_seq_length + 1], windows by their tokens, of a sample; the rest may be
        anything that fits.
      windows: int64 [most_windows + 1], documents of the sample by their windows.
      tokens_per_batch: about how many tokens a micro-batch has.
      most_windows: that a document may have.
    """
    longest = len(lengths) - 1
    num_tokens = max(tokens_per_batch, least_tokens(longest, most_windows))
    packing = choose_packing(
        lengths.tolist(), num_tokens, longest=longest,
        window_histogram=windows.tolist(), most_windows=most_windows,
    )  # fmt: skip
    # Without labels a slot costs next to nothing, and a stretch of short documents needs many: one
    # for every eight tokens, and for a whole row of documents that are [CLS] and [SEP] alone.
    slots = max(packing.max_documents, packing.num_tokens // 8, packing.max_length // 2)
    return PackingConfig(packing.row_groups, slots, max(packing.max_windows, slots))


def sample_lengths(
    parts: Sequence[Part], columns: Columns, model: ExportedModel
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of some rows of some parts, as histograms for `choose_score_packing`.

    Returns:
      Windows by their tokens (int64 [max_seq_length + 1]) and documents by their windows (int64
      [max_windows + 1]).
    """
    lengths = np.zeros(model.max_seq_length + 1, np.int64)
    windows = np.zeros(model.max_windows + 1, np.int64)
    for part in parts[:: -(-len(parts) // _SAMPLED_PARTS)]:
        chunk = next(read_chunks([part], [0], columns))
        documents, _ = model.encode(chunk.texts[:_SAMPLED_ROWS_A_PART])
        np.add.at(lengths, [len(window) for document in documents for window in document], 1)
        np.add.at(windows, [len(document) for document in documents], 1)
    if not windows.any():
        lengths[-1] = windows[1] = 1
    return lengths, windows


def _score_parts(
    config: ScoreConfig,
    model: ExportedModel,
    columns: Columns,
    plan: Plan,
    done: list[Manifest | None],
) -> int:
    """Scores the parts that have no manifest yet, in order; returns how many documents."""
    formatter = LineFormatter(model.labels, model.thresholds, config.selection())
    _check_rejected(config, plan, done)
    waiting = [index for index, manifest in enumerate(done) if manifest is None]
    skipped = sum(plan.parts[index].num_rows for index, item in enumerate(done) if item is not None)
    total = sum(part.num_rows for part in plan.parts)
    documents = 0
    with (
        tqdm(desc="score", total=total, initial=skipped, unit=" documents", mininterval=1) as bar,
        contextlib.closing(scored_blocks(model, columns, plan, waiting, bar.update)) as stream,
    ):
        for index, blocks in itertools.groupby(stream, lambda block: block.part):
            writer = PartWriter(config.output_dir, plan.parts[index], model.fingerprint)
            for block in blocks:
                _check_finite(config, block)
                lines = formatter.format(block.ids, block.probabilities)
                writer.write(lines, len(block.ids), block.num_truncated, block.rejected)
            manifest = done[index] = writer.commit()
            documents += manifest.rows_out
            _check_rejected(config, plan, done)
    return documents


def _check_finite(config: ScoreConfig, block: Block) -> None:
    finite = np.isfinite(block.probabilities).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{config.model}: gives document {block.ids[int(np.argmin(finite))]!r} a score that is "
            "not a number; export a model whose weights are finite, or score with "
            "--precision=float32"
        )


def _check_rejected(config: ScoreConfig, plan: Plan, done: Sequence[Manifest | None]) -> None:
    """Checks the rows that could not be used so far against --max_rejected."""
    limit = config.max_rejected
    num_rows = sum(part.num_rows for part in plan.parts)
    with_rejected = [item for item in done if item is not None and item.rows_rejected]
    rejected = sum(item.rows_rejected for item in with_rejected)
    if rejected > allowed_rejections(limit, num_rows):
        path = os.path.join(config.output_dir, REJECTED_FOLDER, f"{with_rejected[0].part}.jsonl")
        raise too_many_rejected(path, rejected, num_rows, limit, os.path.dirname(path))


def _print_summary(
    config: ScoreConfig, manifests: Sequence[Manifest], summary: ScoreSummary
) -> None:
    totals = {
        name: sum(getattr(manifest, f"rows_{name}") for manifest in manifests)
        for name in ("out", "rejected", "truncated")
    }
    print(
        f"{config.output_dir}: {totals['out']:,} documents in {len(manifests)} parts "
        f"({totals['truncated']:,} cut at the model's longest, {totals['rejected']:,} rejected); "
        f"{summary.documents:,} of them now, in {summary.seconds:.1f} s "
        f"({summary.documents / summary.seconds:,.0f} a second)"
    )


if __name__ == "__main__":
    from trainer.cli import main

    main(["score", *sys.argv[1:]])
