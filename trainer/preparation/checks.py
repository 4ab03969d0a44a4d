"""Data checks of `prepare`: repeats, rare labels, lost tokens; as warnings and for the report.

metadata.json keeps them under `checks`:

    splits: for each split
      repeated_documents       documents whose text an earlier one of the split has
      repeated_texts           distinct texts that occur more than once
      conflicting_texts        those of them whose documents do not all have the same labels
      examples                 up to 5 pairs of ids of equal text
      labels_without_positives, nearly_always_labels, rare_labels
                               count, and the first 20 labels: without positives; on over 99 % of
                               the documents; on under 0.1 % of them and fewer than 10
      truncated_share          documents that lost tokens, of all
      unknown_token_share      [UNK], of all tokens but [CLS] and [SEP]
      other_script_share       documents most of whose letters (of the first 500 characters) are
                               in scripts that the vocabulary does not know
      other_scripts            those documents by script
    across: for each two splits that have texts in common
      splits                   their names
      texts, conflicting_texts as above
      documents                how many documents of each of the two
      examples                 up to 5 pairs of ids, one of each split
    warnings: all of this that is worth a line, as it was printed
"""

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.config import NORMAL_FORMS
from trainer.data.metadata import METADATA_FILE, Metadata, Split
from trainer.data.records import document_id, read_frame
from trainer.errors import UserError, shorten
from trainer.preparation.duplicates import Repeats, find_repeats
from trainer.preparation.shards import find_record
from trainer.preparation.statistics import SplitStatistics
from trainer.sources.input_files import open_file
from trainer.sources.label_text import is_doubtful, quoted
from trainer.sources.labels import TRUTH_WORDS, normalize_name
from trainer.storage.filesystem import checksum

NEARLY_ALWAYS = 0.99
RARE_SHARE, RARE_COUNT = 0.001, 10
# Shares from which a warning is printed.
TRUNCATED_SHARE, UNKNOWN_TOKEN_SHARE, OTHER_SCRIPT_SHARE = 0.05, 0.01, 0.01
_LABELS_KEPT, _LABELS_SHOWN, _GROUPS_SHOWN = 20, 5, 3
_NO_NAMES = frozenset(("nan", "none", "null", "n/a", "<na>", "undefined", "\\n"))


def check_splits(
    metadata: Metadata,
    new_splits: Sequence[str],
    statistics: SplitStatistics,
    data_dir: str,
    work_dir: str,
    shards_dir: str,
) -> dict[str, Any]:
    """`checks` for metadata.json of a data folder to which splits are added.

    `metadata` holds the new splits already; its `checks` are those of the others. The files of new
    splits are in `work_dir`, other text indexes in `data_dir`, other shards in `shards_dir`, which
    may be remote. A UserError says that a text index is not what metadata.json says.
    """
    folders = {name: work_dir if name in new_splits else data_dir for name in metadata.splits}
    paths = _index_paths(metadata, folders)
    pairs = [(name, name) for name in new_splits]
    pairs += [pair for pair in itertools.combinations(paths, 2) if set(pair) & set(new_splits)]
    repeats = find_repeats(paths, pairs)

    def examples(first: str, second: str) -> list[list[str]]:
        return [
            [
                _read_id(metadata, name, rank, work_dir if name in new_splits else shards_dir)
                for name, rank in zip((first, second), ranks, strict=True)
            ]
            for ranks in repeats[first, second].examples
        ]

    before = metadata.checks or {"splits": {}, "across": [], "warnings": []}
    splits = {
        name: _describe_repeats(repeats[name, name], examples(name, name))
        | _check_labels(metadata.labels, metadata.splits[name])
        | _check_tokens(metadata.splits[name], statistics, place)
        for place, name in enumerate(new_splits)
    }
    across = [
        _describe_pair(first, second, found, examples(first, second))
        for (first, second), found in repeats.items()
        if first != second and found.texts
    ]
    warnings = [_warn_of_split(name, metadata, splits[name]) for name in new_splits]
    warnings.append([_warn_of_pair(pair, metadata) for pair in across])
    return {
        "splits": before["splits"] | splits,
        "across": before["across"] + across,
        "warnings": [*before["warnings"], *itertools.chain(*warnings)],
    }


def _index_paths(metadata: Metadata, folders: Mapping[str, str]) -> dict[str, str]:
    """The text index of every split that has one, its checksum compared."""
    paths = {}
    for name, split in metadata.splits.items():
        if split.text_index is None:
            continue
        paths[name] = path = os.path.join(folders[name], split.text_index.name)
        if not os.path.exists(path) or checksum(path) != split.text_index.checksum:
            raise UserError(
                f"{path}: missing, or its CRC-32C is not the {split.text_index.checksum} in "
                f"{METADATA_FILE}; restore it or run `multihot prepare` again"
            )
    return paths


def _read_id(metadata: Metadata, name: str, rank: int, folder: str) -> str:
    """The id of a document by its rank within its split."""
    call = next(call for call in metadata.source["calls"] if name in call["splits"])
    earlier = call["splits"][: call["splits"].index(name)]
    first_shard = sum(len(metadata.splits[other].shards) for other in earlier)
    shard, place = find_record(rank, metadata.splits[name].shards, first_shard, call["seed"])
    with open_file(os.path.join(folder, shard.name)) as file:
        return document_id(read_frame(file, place))


def _describe_repeats(found: Repeats, examples: list[list[str]]) -> dict[str, Any]:
    return {
        "repeated_documents": found.documents[0],
        "repeated_texts": found.texts,
        "conflicting_texts": found.conflicting,
        "examples": examples,
    }


def _describe_pair(
    first: str, second: str, found: Repeats, examples: list[list[str]]
) -> dict[str, Any]:
    return {
        "splits": [first, second],
        "texts": found.texts,
        "documents": list(found.documents),
        "conflicting_texts": found.conflicting,
        "examples": examples,
    }


def _check_labels(labels: Sequence[str], split: Split) -> dict[str, Any]:
    counts = np.array(split.label_counts)
    shares = counts / split.documents
    cases = {
        "labels_without_positives": counts == 0,
        "nearly_always_labels": shares > NEARLY_ALWAYS,
        "rare_labels": (counts > 0) & (counts < RARE_COUNT) & (shares < RARE_SHARE),
    }
    return {
        case: {
            "count": int(holds.sum()),
            "labels": [labels[place] for place in np.flatnonzero(holds)[:_LABELS_KEPT]],
        }
        for case, holds in cases.items()
    }


def _check_tokens(split: Split, statistics: SplitStatistics, place: int) -> dict[str, Any]:
    scripts = statistics.scripts[place]
    return {
        "truncated_share": split.truncated / split.documents,
        "unknown_token_share": int(statistics.unknown_tokens[place])
        / max(split.tokens - 2 * split.windows, 1),
        "other_script_share": scripts.total() / split.documents,
        "other_scripts": dict(sorted(scripts.items(), key=lambda item: (-item[1], item[0]))),
    }


def _warn_of_split(name: str, metadata: Metadata, checks: Mapping[str, Any]) -> list[str]:
    documents = metadata.splits[name].documents
    lines = []
    if checks["repeated_documents"]:
        count = checks["repeated_documents"]
        lines.append(
            f"documents that repeat the text of another: {count:,} ({count / documents:.1%}), "
            f"for example {' and '.join(map(shorten, checks['examples'][0]))}"
        )
    if checks["conflicting_texts"]:
        lines.append(f"texts that occur with different labels: {checks['conflicting_texts']:,}")
    for case, words in (
        ("labels_without_positives", "labels without positives, which stay all the same"),
        ("nearly_always_labels", f"labels on over {NEARLY_ALWAYS:.0%} of the documents"),
        ("rare_labels", f"labels on fewer than {RARE_COUNT} documents, under {RARE_SHARE:.1%}"),
    ):
        if checks[case]["count"]:
            count, labels = checks[case]["count"], checks[case]["labels"]
            shown = ", ".join(map(shorten, labels[:_LABELS_SHOWN]))
            more = ", ..." if count > _LABELS_SHOWN else ""
            lines.append(f"{words}: {count:,} ({shown}{more})")
    if checks["truncated_share"] >= TRUNCATED_SHARE:
        lines.append(
            f"documents cut short, with --max_windows={metadata.max_windows} of "
            f"--max_seq_length={metadata.max_seq_length}: {checks['truncated_share']:.1%}"
        )
    if checks["unknown_token_share"] >= UNKNOWN_TOKEN_SHARE:
        lines.append(f"tokens that are [UNK]: {checks['unknown_token_share']:.1%}")
    if checks["other_script_share"] >= OTHER_SCRIPT_SHARE:
        scripts = ", ".join(f"{script} {n:,}" for script, n in checks["other_scripts"].items())
        lines.append(
            f"documents mostly in scripts that the vocabulary does not know: "
            f"{checks['other_script_share']:.1%} ({scripts}); take a multilingual --tokenizer"
        )
    return [f"{name}: {line}" for line in lines]


def warn_of_labels(
    counts: Mapping[str, int], unknown: Mapping[str, int], columns: Sequence[str]
) -> list[str]:
    """Warnings of labels' names: spellings of one name, what looks like no name, unknown ones.

    `counts` are the documents of each name; `unknown` those of names outside the list of labels;
    `columns` those that the labels came from.
    """
    spellings: dict[str, list[str]] = {}
    for name in counts:
        spellings.setdefault(normalize_name(name, NORMAL_FORMS), []).append(name)
    groups = sorted((sorted(group) for group in spellings.values() if len(group) > 1), key=len)
    lines = []
    if groups:
        shown = [_list_names(group, counts) for group in groups[: -_GROUPS_SHOWN - 1 : -1]]
        shown += ["..."] if len(groups) > _GROUPS_SHOWN else []
        lines.append(
            f"labels that differ only in case, blanks around them or Unicode form: {len(groups):,} "
            f"in {sum(map(len, groups)):,} spellings ({'; '.join(shown)}); "
            f"--normalize_labels={','.join(NORMAL_FORMS)} makes one of each"
        )
    odd = [name for name in counts if is_doubtful(name) or name.strip().lower() in _NO_NAMES]
    if odd:
        lines.append(
            f"labels that look like a part of a list or a missing value: {len(odd):,} "
            f"({_list_names(odd, counts)}); check --label_field and --label_delimiter"
        )
    if joined := _find_joined(counts):
        lines.append(
            f"labels that look like several side by side: {len(joined):,} "
            f"({_list_names(joined, counts)}); name what separates them with --label_delimiter"
        )
    if {name.lower() for name in counts} <= TRUTH_WORDS:
        lines.append(
            f"labels that are truth values and no names: {_list_names(list(counts), counts)}; a "
            "list of 0 and 1 needs --labels, columns of 0 and 1 are named by --label_field=A,B"
        )
    if len(columns) == 1 < len(counts) and counts.get(columns[0]):
        lines.append(
            f"truth values beside names: {quoted(columns[0])} {counts[columns[0]]:,} stands for "
            "the column itself; write names as strings, `yes` of YAML too"
        )
    if unknown:
        lines.append(
            f"labels that are not in the list and are ignored: {len(unknown):,}, on "
            f"{sum(unknown.values()):,} places ({_list_names(list(unknown), unknown)})"
        )
    return lines


def _find_joined(names: Collection[str]) -> list[str]:
    """The names that are several labels, which were not taken apart.

    Their pieces are labels elsewhere, or all labels are made of half as many pieces, or fewer.
    """
    for delimiter in ",;|\t\n/ ":
        pieces = {name: [piece.strip() for piece in name.split(delimiter)] for name in names}
        joined = [name for name in names if len(pieces[name]) > 1]
        pieces = {name: list(filter(None, found)) for name, found in pieces.items()}
        if joined and 2 * len(set(itertools.chain(*pieces.values()))) <= len(pieces):
            return joined
        known = [name for name in joined if pieces.keys() >= set(pieces[name])]
        if known and delimiter != " ":  # There may be labels "data", "science" and "data science".
            return known
    return []


def _list_names(names: Sequence[str], counts: Mapping[str, int]) -> str:
    """The most frequent of some names, with their documents."""
    names = sorted(names, key=lambda name: (-counts[name], name))
    shown = ", ".join(f"{quoted(name)} {counts[name]:,}" for name in names[:_LABELS_SHOWN])
    return shown + (", ..." if len(names) > _LABELS_SHOWN else "")


def _warn_of_pair(pair: Mapping[str, Any], metadata: Metadata) -> str:
    first, second = pair["splits"]
    count = pair["documents"][1]
    share = count / metadata.splits[second].documents
    conflicts = pair["conflicting_texts"]
    return (
        f"{first} and {second}: documents of {second} whose text {first} has too: {count:,} "
        f"({share:.1%}), for example {' and '.join(map(shorten, pair['examples'][0]))}"
        + (f"; texts with different labels: {conflicts:,}" if conflicts else "")
    )
