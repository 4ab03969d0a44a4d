"""`multihot score`: a corpus to scores, in planned parts, restartable.

Four stages run beside each other: reading, tokenising (Rust, outside Python's lock), packing and
the forward pass (TensorFlow, likewise), and, in the main thread, writing. A bounded queue stands
between one stage and the next, so memory does not grow with the corpus. Rows keep their order, and
blocks end where parts end: a part's bytes depend on nothing but its rows, the plan and the model.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from trainer import storage
from trainer.config import PackingConfig, ScoreConfig, absolute
from trainer.errors import UserError
from trainer.exported import ExportedModel, load_exported
from trainer.packing import BLOCK_MICRO_BATCHES, choose_packing, least_tokens
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
from trainer.predictor import Predictor
from trainer.rejected import allowed_rejections, too_many_rejected
from trainer.result_lines import LineFormatter
from trainer.scoring import Block, Scored, read_chunks, score_blocks, tokenize
from trainer.sources import Columns, check_columns, list_files
from trainer.stages import run_ahead
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
_CHUNKS_AHEAD = 8
_BLOCKS_AHEAD = 1
# Documents x labels of a block, about, so that short documents with thousands of labels do not fill
# the memory: 64 MiB of probabilities.
_BLOCK_CELLS = 1 << 24
_MICRO_BATCHES_AHEAD = 4
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
        contextlib.closing(_scored(model, columns, plan, waiting)) as stream,
        tqdm(desc="score", total=total, initial=skipped, unit=" documents", mininterval=1) as bar,
    ):
        for index, micro_batches in itertools.groupby(stream, lambda scored: scored.block.part):
            writer = PartWriter(config.output_dir, plan.parts[index], model.fingerprint)
            for block in _gather_blocks(micro_batches, bar):
                _check_finite(config, block)
                lines = formatter.format(block.ids, block.probabilities)
                writer.write(lines, len(block.ids), block.num_truncated, block.rejected)
            manifest = done[index] = writer.commit()
            documents += manifest.rows_out
            _check_rejected(config, plan, done)
    return documents


def _scored(
    model: ExportedModel, columns: Columns, plan: Plan, waiting: Sequence[int]
) -> Generator[Scored, None, None]:
    """The stages up to the forward pass, running ahead of whoever takes their results."""
    block_tokens = BLOCK_MICRO_BATCHES * plan.packing.num_tokens
    predictor = Predictor(model.model, plan.packing)
    chunks = run_ahead(read_chunks(plan.parts, waiting, columns), _CHUNKS_AHEAD)
    block_documents = _BLOCK_CELLS // len(model.labels)
    blocks = tokenize(chunks, model.encode, block_tokens, block_documents)
    scored = score_blocks(
        run_ahead(blocks, _BLOCKS_AHEAD), predictor, plan.packing, len(model.labels)
    )
    return run_ahead(scored, _MICRO_BATCHES_AHEAD)


def _gather_blocks(micro_batches: Iterable[Scored], bar: tqdm) -> Iterator[Block]:
    """Blocks with their probabilities, as soon as the last micro-batch of each is there."""
    for scored in micro_batches:
        real = scored.document_index >= 0
        index = scored.document_index[real]
        scored.block.probabilities[index] = scored.probabilities.numpy()[real]
        bar.update(len(index))
        if scored.ends_block:
            bar.update(len(scored.block.rejected))
            yield scored.block


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
