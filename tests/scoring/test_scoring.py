"""The pipeline of scoring: the same scores on any replicas, one compilation, rows that come cut."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from trainer import score
from trainer.config import ScoreConfig
from trainer.data.packing import choose_packing
from trainer.data.tokenizer import TokenLimits
from trainer.model.model_folder import load_model_folder
from trainer.model_config import PackingConfig
from trainer.scoring import batches as blocks_module
from trainer.scoring.batches import BatchPacker, RawBatch, tokenize
from trainer.scoring.pipeline import Compilations, scored_blocks
from trainer.scoring.plan import Part, Plan
from trainer.sources.reader import plan_row_ranges
from trainer.sources.rows import BadRow, Columns, Row

ROWS_A_PART = 90
COLUMNS = Columns(kept=("pages", "missing"))
LIMITS = TokenLimits(cls_id=2, sep_id=3, vocab_size=50, max_seq_length=6, max_windows=2)


@pytest.fixture(scope="module")
def source(documents, tmp_path_factory):
    """600 docstrings, ragged: from one word to more than the model takes."""
    with open(documents, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:600]
    for number, row in enumerate(rows):
        row["pages"] = number
        if number % 7 == 0:
            row["text"] = "word"
        if number % 11 == 0:
            row["text"] *= 20
    path = tmp_path_factory.mktemp("scoring") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def score_all(exported, source, strategy=None):
    """All blocks of the source, cut into parts, the compilations, and the rows counted."""
    row_ranges = plan_row_ranges(source, ROWS_A_PART)
    parts = tuple(Part(f"part-{at}", (row_range,)) for at, row_range in enumerate(row_ranges))
    packing = choose_packing([0] * 40 + [1] * 89, 1024, longest=128)
    plan = Plan("", {}, packing, (), parts)
    compilations, rows = Compilations(), []
    blocks = scored_blocks(
        exported, COLUMNS, plan, range(len(parts)), rows.append, strategy, compilations
    )
    return list(blocks), compilations, sum(rows)


@pytest.fixture(scope="module")
def on_one_device(model, source):
    return score_all(load_model_folder(model), source)


def test_ragged_texts_are_compiled_for_once(on_one_device):
    blocks, compilations, num_rows = on_one_device
    assert num_rows == 600
    assert compilations == Compilations(packing=1, forward=1)
    assert sorted({block.part for block in blocks}) == list(range(7))
    assert sum(block.num_truncated for block in blocks) >= 50


def test_two_replicas_give_the_scores_of_one(model, source, on_one_device):
    strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    with strategy.scope():
        exported = load_model_folder(model)
    blocks, compilations, num_rows = score_all(exported, source, strategy)
    assert num_rows == 600
    assert compilations == Compilations(packing=1, forward=2)
    for block, expected in zip(blocks, on_one_device[0], strict=True):
        assert block.part == expected.part and block.ids == expected.ids
        assert np.abs(block.probabilities - expected.probabilities).max() < 1e-6


def test_kept_values_come_with_their_rows(on_one_device):
    kept = [values for block in on_one_device[0] for values in block.kept]
    assert kept == [(number, None) for number in range(600)]


def make_chunk(rows, part=0, ends_part=True):
    chunk = RawBatch(part, ends_part=ends_part)
    for row in rows:
        chunk.add(row, "file", LIMITS)
    return chunk


def encode_letters(texts):
    """[CLS], one token a letter, [SEP]; three letters at most."""
    letters = [[ord(letter) - ord("a") + 10 for letter in text[:3]] for text in texts]
    return [[[2, *ids, 3]] for ids in letters], [len(text) > 3 for text in texts]


def test_rows_that_come_tokenised_keep_their_windows_and_others_are_tokenised():
    rows = [
        Row(0, "a", "ab", None),
        Row(1, "b", "", None, (), [[2, 7, 3], [2, 8, 9, 3]]),
        Row(2, "c", "abcd", None),
        BadRow(3, "not JSON", "{"),
    ]
    (block,) = tokenize([make_chunk(rows)], encode_letters, 1000, 1000)
    assert np.concatenate(block.tokens).tolist() == [
        2, 10, 11, 3, 2, 7, 3, 2, 8, 9, 3, 2, 10, 11, 12, 3
    ]  # fmt: skip
    assert np.concatenate(block.window_lengths).tolist() == [4, 3, 4, 5]
    assert np.concatenate(block.window_counts).tolist() == [1, 2, 1]
    assert (block.ids, block.num_tokens, block.num_truncated) == (["a", "b", "c"], 16, 1)
    assert block.rejected == [{"source": "file", "row": 3, "reason": "not JSON", "raw": "{"}]


@pytest.mark.parametrize(
    ("windows", "reason"),
    [
        ([], "0 windows, expected 1 to 2"),
        ([[2, 3]] * 3, "3 windows, expected 1 to 2"),
        ([[2, 5, 5, 5, 5, 5, 3]], "a window of 7 tokens, expected at most 6"),
        ([[2, 60, 3]], "token ids from 2 to 60, expected 0 to 49"),
        ([[5, 3]], "not framed by"),
    ],
)
def test_tokens_that_the_model_cannot_take_are_rejected_with_their_place(windows, reason):
    chunk = make_chunk([Row(8, "x", "", None, (), windows)])
    assert chunk.ids == []
    (row,) = chunk.rejected
    assert (row["source"], row["row"]) == ("file", 8)
    assert reason in row["reason"]


def test_a_chunk_is_full_by_all_that_it_holds():
    chunk = RawBatch(0)
    limits = TokenLimits(2, 3, 50, 6, 2)
    for at in range(3):
        assert not chunk.is_full
        chunk.add(Row(at, str(at), "a", None, ("x" * 300_000, ["y" * 100_000])), "file", limits)
    assert chunk.is_full


def test_blocks_end_with_their_part_and_when_they_are_full():
    chunks = [
        make_chunk([Row(0, "a", "abc", None)], ends_part=False),
        make_chunk([Row(1, "b", "abc", None)], ends_part=False),
        make_chunk([Row(2, "c", "a", None)]),
        make_chunk([], part=1),
    ]
    blocks = list(tokenize(chunks, encode_letters, 10, 1000))
    assert [(block.part, block.ids) for block in blocks] == [(0, ["a", "b"]), (0, ["c"]), (1, [])]


def test_what_goes_on_with_a_block_fills_it_too(monkeypatch):
    monkeypatch.setattr(blocks_module, "_BLOCK_CHARACTERS", 20)
    rows = [Row(at, str(at), "abc", None, ("x" * 8,)) for at in range(5)]
    chunks = [make_chunk([row], ends_part=row.position == 4) for row in rows]
    blocks = list(tokenize(chunks, encode_letters, 1000, 1000))
    assert [block.ids for block in blocks] == [["0", "1", "2"], ["3", "4"]]


def test_packing_is_traced_once_for_blocks_of_any_size():
    packer = BatchPacker(PackingConfig(((4, 8),), 16, 16))
    for count in (1, 2, 17):
        rows = [Row(at, str(at), "abc"[: at % 4], None) for at in range(count)]
        (block,) = tokenize([make_chunk(rows)], encode_letters, 1000, 1000)
        index = packer(block)["document_index"].numpy()
        assert sorted(index[index >= 0].tolist()) == list(range(count))
    assert packer.num_traces == 1


def test_the_command_writes_parquet_from_two_replicas_with_kept_columns(
    model, source, on_one_device, tmp_path, capsys
):
    output = tmp_path / "out"
    summary = score.run(
        ScoreConfig(
            model=model, input=(source,), output_dir=str(output), format="parquet",
            scores="top:3", keep_columns=("pages",), rows_per_part=200, tokens_per_batch=1024,
            strategy="mirrored", cpu_replicas=2,
        )
    )  # fmt: skip
    assert summary.documents == 600
    assert summary.compilations == Compilations(packing=1, forward=2)
    printed = capsys.readouterr().out
    assert "mirrored, as asked for; 2 replicas" in printed
    assert "packing was compiled 1 times, the forward pass 2" in printed
    table = pq.read_table(sorted(output.glob("part-*.parquet")))
    assert table["pages"].to_pylist() == [str(number) for number in range(600)]
    ids = [name for block in on_one_device[0] for name in block.ids]
    assert table["id"].to_pylist() == ids
    expected = np.concatenate([block.probabilities for block in on_one_device[0]])
    found = np.array([[value for _, value in row] for row in table["scores"].to_pylist()])
    assert np.abs(found - np.sort(expected)[:, :-4:-1]).max() < 1e-6
