"""What the report says of the data: how much there is of it, and what `prepare` found in it."""

from typing import Any

import numpy as np

from trainer.data.metadata import Metadata
from trainer.reporting.plots import Plot, draw_shares

MAX_LENGTH_BINS = 40
# Columns of the table of checks: key, title, how it is shown.
CHECK_COLUMNS = (
    ("repeated_documents", "documents that repeat another", "count"),
    ("conflicting_texts", "texts with different labels", "count"),
    ("truncated_share", "truncated", "percent"),
    ("unknown_token_share", "unknown tokens", "percent"),
    ("other_script_share", "other scripts", "percent"),
)
LABEL_CASES = {
    "labels_without_positives": "labels without positives",
    "nearly_always_labels": "labels on nearly every document",
    "rare_labels": "labels on very few documents",
}


def data_plots(metadata: Metadata | None) -> tuple[Plot, ...]:
    """Lengths of documents, and how often labels occur, by split."""
    if metadata is None:
        return ()
    lengths, counts = [], []
    for name, split in metadata.splits.items():
        windows = np.array(split.length_histogram, float)
        width = max(1, -(-len(windows) // MAX_LENGTH_BINS))
        padded = np.pad(windows, (0, -len(windows) % width)).reshape(-1, width).sum(axis=1)
        middles = (np.arange(len(padded)) + 0.5) * width
        lengths.append((name, middles.tolist(), (padded / max(padded.sum(), 1)).tolist()))
        falling = np.sort(np.array(split.label_counts, float))[::-1]
        falling = falling[falling > 0] / max(split.documents, 1)
        counts.append((name, list(range(1, len(falling) + 1)), falling.tolist()))
    what = "windows" if metadata.max_windows > 1 else "documents"
    return (
        draw_shares(
            "lengths", "Lengths", f"Tokens of {what}, [CLS] and [SEP] included; at most "
            f"{metadata.max_seq_length}.",
            ("tokens", f"share of {what}"), lengths,
        ),
        draw_shares(
            "label_counts", "Label frequencies", "The labels of each split, the most frequent "
            "first; those without documents are left out.",
            ("rank of the label", "share of documents"), counts, has_log_y=True,
        ),
    )  # fmt: skip


def describe_splits(metadata: Metadata | None) -> list[dict[str, Any]]:
    """A row a split: documents, tokens, what was cut and rejected, labels."""
    if metadata is None:
        return []
    rows = []
    for name, split in metadata.splits.items():
        labels = sum(split.label_counts)
        rows.append(
            {
                "name": name,
                "documents": split.documents,
                "windows": split.windows,
                "tokens": split.tokens,
                "mean_tokens": split.tokens / max(split.documents, 1),
                "truncated": split.truncated,
                "truncated_share": split.truncated / max(split.documents, 1),
                "rejected": split.rejected,
                "labels_a_document": labels / max(split.documents, 1),
                "labels_without_positives": sum(value == 0 for value in split.label_counts),
            }
        )
    return rows


def describe_checks(metadata: Metadata | None) -> dict[str, Any] | None:
    """What `prepare` found remarkable: warnings, a table of splits, texts in common, labels."""
    if metadata is None or not metadata.checks:
        return None
    by_split = metadata.checks["splits"]
    return {
        "warnings": metadata.checks["warnings"],
        "columns": [title for _, title, _ in CHECK_COLUMNS],
        "splits": [
            {"name": name, "cells": [(found[key], kind) for key, _, kind in CHECK_COLUMNS]}
            for name, found in by_split.items()
        ],
        "across": metadata.checks["across"],
        "labels": [
            {"split": name, "words": words, **found[case]}
            for name, found in by_split.items()
            for case, words in LABEL_CASES.items()
            if found[case]["count"]
        ],
    }
