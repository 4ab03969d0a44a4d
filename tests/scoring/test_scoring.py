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
from trainer.scoring import batches as batches_module
from trainer.scoring.batches import BatchPacker, RawBatch, tokenize
from trainer.scoring.pipeline import Compilations, ScoringPipeline
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


def score_all(model_folder, source, strategy=None):
    """All token batches of the source, cut into parts, the compilations, and the rows counted."""
    row_ranges = plan_row_ranges(source, ROWS_A_PART)
    parts = tuple(Part(f"part-{at}", (row_range,)) for at, row_range in enumerate(row_ranges))
    packing = choose_packing([0] * 40 + [1] * 89, 1024, longest=128)
    plan = Plan("", {}, packing, (), parts)
    pipeline, rows = ScoringPipeline(model_folder, COLUMNS, plan, strategy), []
    batches = list(pipeline.run(range(len(parts)), rows.append))
    return batches, pipeline.compilations, sum(rows)


@pytest.fixture(scope="module")
def on_one_device(model, source):
    return score_all(load_model_folder(model), source)


def test_ragged_texts_are_compiled_for_once(on_one_device):
    batches, compilations, num_rows = on_one_device
    assert num_rows == 600
    assert compilations == Compilations(packing=1, forward=1)
    assert sorted({batch.part for batch in batches}) == list(range(7))
    assert sum(batch.num_truncated for batch in batches) >= 50


def test_two_replicas_give_the_scores_of_one(model, source, on_one_device):
    strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
    with strategy.scope():
        model_folder = load_model_folder(model)
    batches, compilations, num_rows = score_all(model_folder, source, strategy)
    assert num_rows == 600
    assert compilations == Compilations(packing=1, forward=2)
    for batch, expected in zip(batches, on_one_device[0], strict=True):
        assert batch.part == expected.part and batch.ids == expected.ids
        assert np.abs(batch.probabilities - expected.probabilities).max() < 1e-6


def test_kept_values_come_with_their_rows(on_one_device):
    kept = [values for batch in on_one_device[0] for values in batch.kept]
    assert kept == [(number, None) for number in range(600)]


def make_raw_batch(rows, part=0, ends_part=True):
    raw = RawBatch(part, ends_part=ends_part)
    for row in rows:
        raw.add(row, "file", LIMITS)
    return raw


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
    (batch,) = tokenize([make_raw_batch(rows)], encode_letters, 1000, 1000)
    assert np.concatenate(batch.tokens).tolist() == [
        2, 10, 11, 3, 2, 7, 3, 2, 8, 9, 3, 2, 10, 11, 12, 3
    ]  # fmt: skip
    assert np.concatenate(batch.window_lengths).tolist() == [4, 3, 4, 5]
    assert np.concatenate(batch.window_counts).tolist() == [1, 2, 1]
    assert (batch.ids, batch.num_tokens, batch.num_truncated) == (["a", "b", "c"], 16, 1)
    assert batch.rejected == [{"source": "file", "row": 3, "reason": "not JSON", "raw": "{"}]


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
    raw = make_raw_batch([Row(8, "x", "", None, (), windows)])
    assert raw.ids == []
    (row,) = raw.rejected
    assert (row["source"], row["row"]) == ("file", 8)
    assert reason in row["reason"]


def test_a_raw_batch_is_full_by_all_that_it_holds():
    raw = RawBatch(0)
    limits = TokenLimits(2, 3, 50, 6, 2)
    for at in range(3):
        assert not raw.is_full
        raw.add(Row(at, str(at), "a", None, ("x" * 300_000, ["y" * 100_000])), "file", limits)
    assert raw.is_full


def test_token_batches_end_with_their_part_and_when_they_are_full():
    raw_batches = [
        make_raw_batch([Row(0, "a", "abc", None)], ends_part=False),
        make_raw_batch([Row(1, "b", "abc", None)], ends_part=False),
        make_raw_batch([Row(2, "c", "a", None)]),
        make_raw_batch([], part=1),
    ]
    batches = list(tokenize(raw_batches, encode_letters, 10, 1000))
    assert [(batch.part, batch.ids) for batch in batches] == [(0, ["a", "b"]), (0, ["c"]), (1, [])]


def test_what_waits_with_a_token_batch_fills_it_too(monkeypatch):
    monkeypatch.setattr(batches_module, "_TOKEN_BATCH_CHARACTERS", 20)
    rows = [Row(at, str(at), "abc", None, ("x" * 8,)) for at in range(5)]
    raw_batches = [make_raw_batch([row], ends_part=row.position == 4) for row in rows]
    batches = list(tokenize(raw_batches, encode_letters, 1000, 1000))
    assert [batch.ids for batch in batches] == [["0", "1", "2"], ["3", "4"]]


def test_packing_is_traced_once_for_batches_of_any_size():
    packer = BatchPacker(PackingConfig(((4, 8),), 16, 16))
    for count in (1, 2, 17):
        rows = [Row(at, str(at), "abc"[: at % 4], None) for at in range(count)]
        (batch,) = tokenize([make_raw_batch(rows)], encode_letters, 1000, 1000)
        index = packer(batch)["document_index"].numpy()
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
            strategy="mirrored", cpu_replicas=2, precision="float32",
        )
    )  # fmt: skip
    assert summary.documents == 600
    assert summary.compilations == Compilations(packing=1, forward=2)
    printed = capsys.readouterr().out
    assert "mirrored, as asked for; 2 replicas" in printed
    assert "packing was compiled 1 times, the forward pass 2" in printed
    table = pq.read_table(sorted(output.glob("part-*.parquet")))
    assert table["pages"].to_pylist() == [str(number) for number in range(600)]
    ids = [name for batch in on_one_device[0] for name in batch.ids]
    assert table["id"].to_pylist() == ids
    expected = np.concatenate([batch.probabilities for batch in on_one_device[0]])
    found = np.array([[value for _, value in row] for row in table["scores"].to_pylist()])
    assert np.abs(found - np.sort(expected)[:, :-4:-1]).max() < 1e-6
