"""The corpora of learning_curve.py, and their nested training sets beside fixed held-out splits."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from corpus import run_multihot

PACKAGE_PREFIX = "package:"
WITHOUT_PACKAGES = "docstrings_without_packages"
CORPORA = ("docstrings", WITHOUT_PACKAGES)
# What the tables call them.
TITLES = {WITHOUT_PACKAGES: f"docstrings without the `{PACKAGE_PREFIX}` labels"}

Row = dict[str, Any]


def read_rows(arguments: argparse.Namespace, corpus: str) -> list[Row]:
    """All rows (id, text, labels) of a corpus: of --input, or of the one sample of docstrings."""
    if arguments.input:
        return _load_rows(arguments.input)
    path = os.path.join(arguments.output, f"docstrings-{arguments.sample_documents}.jsonl")
    if not os.path.exists(path):
        run_multihot("sample", f"--output={path}", f"--num_documents={arguments.sample_documents}")
    rows = _load_rows(path)
    return without_packages(rows) if corpus == WITHOUT_PACKAGES else rows


def _load_rows(path: str) -> list[Row]:
    """The rows of a JSONL file; ends the script at one that cannot be used."""
    rows: list[Row] = []
    seen: set[str] = set()
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: {error}; expected a file of JSON lines in UTF-8")
    for number, line in enumerate(lines, 1):
        fault = _find_fault(line, seen)
        if fault:
            sys.exit(
                f"{path}:{number}: {fault}; expected a JSON object with strings as id and text and "
                "a list of strings as labels"
            )
        row = json.loads(line)
        seen.add(row["id"])
        rows.append({name: row[name] for name in ("id", "text", "labels")})
    return rows


def _find_fault(line: str, seen: set[str]) -> str:
    """What keeps a line from being used, given the ids before it; empty if nothing does."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    if not isinstance(row, dict):
        return "not an object"
    for name, kind in (("id", str), ("text", str), ("labels", list)):
        if not isinstance(row.get(name), kind):
            return f"{name} is {row.get(name)!r:.60}"
    strange = [label for label in row["labels"] if not isinstance(label, str)]
    if strange:
        return f"a label is {strange[0]!r:.60}"
    return f"the id {row['id']!r} comes twice" if row["id"] in seen else ""


def without_packages(rows: Sequence[Row]) -> list[Row]:
    """The same rows without the labels that name a package."""
    return [
        row | {"labels": [name for name in row["labels"] if not name.startswith(PACKAGE_PREFIX)]}
        for row in rows
    ]


def choose_splits(
    rows: Sequence[Row], documents: int, held_out: int, seed: int
) -> dict[str, list[Row]]:
    """Rows by split: validation and test are the same for any number of training `documents`.

    A smaller training set is a part of each larger one.
    """
    if documents + 2 * held_out > len(rows):
        sys.exit(
            f"--documents={documents} and twice --held_out={held_out} need "
            f"{documents + 2 * held_out:,} rows, and the corpus has {len(rows):,}; lower one of "
            "them, or raise --sample_documents"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    ends = np.cumsum([held_out, held_out, documents])
    validation, test, train, _ = np.split(order, ends)
    places = {"train": train, "validation": validation, "test": test}
    return {split: [rows[place] for place in chosen] for split, chosen in places.items()}
