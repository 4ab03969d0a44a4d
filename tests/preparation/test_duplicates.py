"""Repeated texts: counted exactly, whatever ranges the hashes are walked in."""

from collections import Counter, defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import config, write_rows

from trainer import prepare
from trainer.preparation import duplicates, row_index
from trainer.preparation.duplicates import ENTRY, find_repeats

SPLITS = ("train", "test")
# Few texts, so that they meet; the lowest and highest hashes that there are among them.
DOCUMENTS = st.lists(
    st.tuples(st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]), st.integers(0, 2)),
    min_size=1,
    max_size=25,
)


def write_index(path, documents):
    """A split's text index: documents as (text, labels) in the order of their ranks."""
    entries = np.array([(*document, rank) for rank, document in enumerate(documents)], ENTRY)
    np.sort(entries, order=["text", "rank"]).tofile(path)
    return str(path)


@given(splits=st.tuples(DOCUMENTS, DOCUMENTS), entries_at_a_time=st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_repeats_are_those_that_counting_finds(tmp_path_factory, splits, entries_at_a_time):
    folder = tmp_path_factory.mktemp("index")
    paths = {
        name: write_index(folder / name, documents)
        for name, documents in zip(SPLITS, splits, strict=True)
    }
    whole = duplicates._ENTRIES_AT_A_TIME
    duplicates._ENTRIES_AT_A_TIME = entries_at_a_time
    try:
        found = find_repeats(paths, [("train", "train"), ("train", "test")])
    finally:
        duplicates._ENTRIES_AT_A_TIME = whole
    counts = [Counter(text for text, _ in documents) for documents in splits]
    labels = [defaultdict(set), defaultdict(set)]
    for of_split, documents in zip(labels, splits, strict=True):
        for text, label in documents:
            of_split[text].add(label)

    within = found["train", "train"]
    repeated = [text for text, count in counts[0].items() if count > 1]
    assert within.texts == len(repeated)
    assert within.documents == (len(splits[0]) - len(counts[0]),)
    assert within.conflicting == sum(len(labels[0][text]) > 1 for text in counts[0])
    assert len(within.examples) == min(len(repeated), 5)
    for first, second in within.examples:
        assert first < second and splits[0][first][0] == splits[0][second][0]

    across = found["train", "test"]
    common = counts[0].keys() & counts[1].keys()
    assert across.texts == len(common)
    assert across.documents == tuple(sum(count[text] for text in common) for count in counts)
    assert across.conflicting == sum(len(labels[0][t] | labels[1][t]) > 1 for t in common)
    assert len(across.examples) == min(len(common), 5)
    for first, second in across.examples:
        assert splits[0][first][0] == splits[1][second][0]


def test_the_index_does_not_depend_on_buckets_and_seeds_of_shards(tmp_path, monkeypatch):
    texts = [f"text {i % 170}" for i in range(400)]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": t, "labels": "a"} for t in texts])
    contents = []
    for rows_per_bucket, num_shards in ((1 << 17, 1), (30, 4)):
        monkeypatch.setattr(row_index, "ROWS_PER_BUCKET", rows_per_bucket)
        data_dir = tmp_path / f"data-{rows_per_bucket}"
        prepare.run(config(path, data_dir, split="all", vocab_size=200, num_shards=num_shards))
        contents.append((data_dir / "all.texts").read_bytes())
    assert contents[0] == contents[1]
    entries = np.frombuffer(contents[0], ENTRY)
    assert sorted(entries["rank"].tolist()) == list(range(400))
    assert len(np.unique(entries["text"])) == 170 and len(np.unique(entries["labels"])) == 1
    in_order = np.lexsort((entries["rank"], entries["text"]))
    np.testing.assert_array_equal(in_order, np.arange(400))
    # Rows of equal text, by their ranks.
    for rows in np.split(entries["rank"], np.flatnonzero(np.diff(entries["text"])) + 1):
        assert len({texts[row] for row in rows.tolist()}) == 1
