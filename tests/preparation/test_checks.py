"""Data checks: every number exact, examples that are what they claim, warnings that say it."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
from preparing import ROWS, config, read_split, write_rows

from trainer import prepare
from trainer.data.metadata import load_metadata
from trainer.data.tokenizer import SPECIAL_TOKENS, train_tokenizer
from trainer.errors import UserError
from trainer.preparation.checks import _read_id

SPLITS = ("train", "validation", "test")
TEXTS = [f"document number {i}" for i in range(600)]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    """A vocabulary that knows the digits and few words."""
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer(TEXTS, 200).save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tokenizer_dir, tmp_path_factory) -> str:
    """600 rows in three splits of three shards."""
    root = tmp_path_factory.mktemp("checks")
    rows = [{"id": f"r{i}", "text": text, "labels": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
    flags = {"tokenizer": tokenizer_dir, "num_shards": 3, "seed": 5, "num_workers": 2}
    path = write_rows(root / "rows.jsonl", rows)
    prepare.run(config(path, root / "data", split="train:0.6,validation:0.2,test:0.2", **flags))
    return str(root / "data")


def test_repeats_within_a_split(tokenizer_dir, tmp_path, capsys):
    rows = [
        *({"id": f"once {i}", "text": f"number {i}", "labels": ["a"]} for i in range(20)),
        *({"id": f"twice {i}", "text": f"word {i % 10}", "labels": ["b"]} for i in range(20)),
        # Equal sets of labels in another order are no conflict, a subset is one.
        {"id": "c1", "text": "conflict", "labels": ["a", "b"]},
        {"id": "c2", "text": "conflict", "labels": ["b", "a"]},
        {"id": "c3", "text": "conflict", "labels": ["a"]},
        {"id": "n1", "text": "none", "labels": []},
        {"id": "n2", "text": "none", "labels": []},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    prepare.run(config(path, tmp_path / "data", split="all", tokenizer=tokenizer_dir))
    checks = load_metadata(str(tmp_path / "data")).checks
    found = checks["splits"]["all"]
    assert (found["repeated_documents"], found["repeated_texts"]) == (10 + 2 + 1, 12)
    assert found["conflicting_texts"] == 1
    texts = {row["id"]: row["text"] for row in rows}
    assert len(found["examples"]) == 5
    for first, second in found["examples"]:
        assert first != second and texts[first] == texts[second]
    assert checks["across"] == []
    out = capsys.readouterr().out
    assert "warning: all: documents that repeat the text of another: 13 (28.9%), for example" in out
    assert "warning: all: texts that occur with different labels: 1\n" in out


def test_every_document_is_found_by_its_rank(folder):
    metadata = load_metadata(folder)
    for name in SPLITS:
        ids = {row[0] for row in read_split(folder, name)}
        in_order = [f"r{i}" for i in range(len(TEXTS)) if f"r{i}" in ids]
        found = [_read_id(metadata, name, rank, folder) for rank in range(len(in_order))]
        assert found == in_order and len(found) > 100


def test_texts_of_earlier_splits_are_found_in_a_later_one(folder, tmp_path, capsys):
    data_dir = str(tmp_path / "data")
    shutil.copytree(folder, data_dir)
    texts = {name: [row[0] for row in read_split(data_dir, name)] for name in SPLITS}
    texts = {name: [TEXTS[int(i[1:])] for i in ids] for name, ids in texts.items()}
    # Seven of train, one of them twice, two with another label; three of test; ten new ones.
    taken = [*texts["train"][:7], texts["train"][0], *texts["test"][:3]]
    labels = ["ab"[TEXTS.index(text) % 2] for text in taken]
    labels[1], labels[2] = ("ba"["ab".index(label)] for label in labels[1:3])
    rows = [
        {"id": f"later {i}", "text": text, "labels": label}
        for i, (text, label) in enumerate(zip(taken, labels, strict=True))
    ] + [{"id": f"new {i}", "text": f"new {i}", "labels": "a"} for i in range(10)]
    before = load_metadata(data_dir).checks
    capsys.readouterr()
    # Another seed: hashes are the folder's all the same.
    flags = {"split": "later", "seed": 99, "max_rejected": 0}
    prepare.run(config(write_rows(tmp_path / "later.jsonl", rows), data_dir, **flags))
    checks = load_metadata(data_dir).checks
    pairs = {tuple(pair["splits"]): pair for pair in checks["across"]}
    assert list(pairs) == [("train", "later"), ("test", "later")]
    train, test = pairs.values()
    assert (train["texts"], train["documents"], train["conflicting_texts"]) == (7, [7, 8], 2)
    assert (test["texts"], test["documents"], test["conflicting_texts"]) == (3, [3, 3], 0)
    new = {row["id"]: row["text"] for row in rows}
    for pair, count in ((train, 5), (test, 3)):
        assert len({first for first, _ in pair["examples"]}) == count == len(pair["examples"])
        assert all(TEXTS[int(first[1:])] == new[second] for first, second in pair["examples"])
    assert checks["splits"]["later"]["repeated_documents"] == 1
    assert {name: checks["splits"][name] for name in SPLITS} == before["splits"]
    assert checks["warnings"][: len(before["warnings"])] == before["warnings"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert [f"warning: {line}" for line in checks["warnings"][len(before["warnings"]) :]] == lines
    assert lines[-2].startswith(
        "warning: train and later: documents of later whose text train has too: 8 (38.1%), for"
    )
    assert lines[-2].endswith("; texts with different labels: 2")


@pytest.mark.parametrize("damage", ["missing", "another"])
def test_a_text_index_that_does_not_match_is_told(folder, tmp_path, damage):
    data_dir = tmp_path / "data"
    shutil.copytree(folder, data_dir)
    index = data_dir / "validation.texts"
    content = index.read_bytes()
    assert len(content) == 16 * load_metadata(folder).splits["validation"].documents
    index.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if damage == "missing":
        index.unlink()
    before = (data_dir / "metadata.json").read_bytes()
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "x", "labels": "a"}])
    with pytest.raises(UserError, match="validation.texts: missing, or its CRC-32C is not"):
        prepare.run(config(path, data_dir, split="later"))
    assert (data_dir / "metadata.json").read_bytes() == before
    assert not list(data_dir.glob("later*"))


def test_labels_that_say_little(tokenizer_dir, tmp_path, capsys):
    # Of 4,000 documents: `common` on 3,961 (99.025 %), `nearly` on 3,960 (99 %), `rare` on 3
    # (0.075 %), `seldom` on 4 (0.1 %), `never` on none.
    holders = {"common": 3961, "nearly": 3960, "rare": 3, "seldom": 4, "never": 0}
    (tmp_path / "labels.txt").write_text("\n".join(holders))
    rows = [
        {"text": f"number {i}", "labels": [name for name, count in holders.items() if i < count]}
        for i in range(4000)
    ]
    flags = {"tokenizer": tokenizer_dir, "split": "all", "labels": str(tmp_path / "labels.txt")}
    prepare.run(config(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "data", **flags))
    found = load_metadata(str(tmp_path / "data")).checks["splits"]["all"]
    assert found["labels_without_positives"] == {"count": 1, "labels": ["never"]}
    assert found["nearly_always_labels"] == {"count": 1, "labels": ["common"]}
    assert found["rare_labels"] == {"count": 1, "labels": ["rare"]}
    assert found["repeated_documents"] == 0
    out = capsys.readouterr().out
    assert "warning: all: labels on over 99% of the documents: 1 (common)\n" in out
    assert "warning: all: labels on fewer than 10 documents, under 0.1%: 1 (rare)\n" in out


def test_shares_of_lost_and_unknown_tokens(tmp_path, capsys):
    words = [f"w{first}{second}" for first in "abcde" for second in "vwxyz"]
    tokenizer = train_tokenizer(TEXTS, 200)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer.backend.model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.save(str(tmp_path / "tokenizer"))
    # Of 10 documents of 4 words, 3 have 1 unknown word; 2 more have 25 words, cut to 2 x 8.
    texts = [" ".join(words[i : i + 4]) for i in range(7)]
    texts += [f"{' '.join(words[i : i + 3])} other" for i in range(3)]
    texts += [" ".join(words), " ".join(words[::-1])]
    rows = [{"text": text, "labels": "a"} for text in texts]
    flags = {"tokenizer": str(tmp_path / "tokenizer"), "split": "all", "num_shards": 1}
    flags |= {"max_seq_length": 10, "max_windows": 2}
    prepare.run(config(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "data", **flags))
    metadata = load_metadata(str(tmp_path / "data"))
    split, found = metadata.splits["all"], metadata.checks["splits"]["all"]
    assert (split.documents, split.windows, split.window_histogram) == (12, 14, (0, 10, 2))
    assert split.tokens == 10 * 4 + 2 * 16 + 14 * 2
    assert found["unknown_token_share"] == 3 / (10 * 4 + 2 * 16)
    assert found["truncated_share"] == 2 / 12 and split.truncated == 2
    out = capsys.readouterr().out
    assert "warning: all: tokens that are [UNK]: 4.2%\n" in out
    cut = "documents cut short, with --max_windows=2 of --max_seq_length=10: 16.7%"
    assert f"warning: all: {cut}\n" in out


def test_texts_in_scripts_that_the_vocabulary_does_not_know(minilm, tmp_path, capsys):
    others = ["Съешь ещё этих мягких булок", "Выпей чаю", "我们在城市里买了很多书"]
    texts = [row["text"] for row in ROWS] * 3 + ["naïve café", *others]
    rows = [{"text": text, "labels": "a"} for text in texts]
    flags = {"tokenizer": minilm, "split": "all", "num_workers": 2}
    prepare.run(config(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "data", **flags))
    found = load_metadata(str(tmp_path / "data")).checks["splits"]["all"]
    assert found["other_scripts"] == {"CYRILLIC": 2, "CJK": 1}
    assert found["other_script_share"] == 3 / 31
    # Letter by letter: [UNK] alone would hardly tell.
    assert 0 < found["unknown_token_share"] < 0.1
    line = "does not know: 9.7% (CYRILLIC 2, CJK 1); take a multilingual --tokenizer\n"
    assert line in capsys.readouterr().out


def test_a_corpus_without_remarks_has_no_warnings(folder):
    checks = load_metadata(folder).checks
    assert checks["warnings"] == [] and checks["across"] == []
    assert list(checks["splits"]) == list(SPLITS)
    for found in checks["splits"].values():
        assert found["repeated_documents"] == found["labels_without_positives"]["count"] == 0
    # Plain values only: what is read back is what was written.
    assert json.loads(json.dumps(checks)) == checks
    entries = np.fromfile(f"{folder}/train.texts", "<u8")[::2]
    assert (np.diff(entries.astype(np.float64)) >= 0).all() and len(entries) == 360
