"""Packing: nothing lost, nothing crossed, rows full, and the layouts of hand-written cases."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import PackingConfig, parse_row_groups
from trainer.errors import UserError
from trainer.packing import choose_packing, empty_micro_batch, pack

SMALL = PackingConfig(((4, 8), (2, 16)), 6, 6)


def pack_lengths(lengths, packing):
    """Packs documents whose token values say which document and place they are."""
    documents = [[1000 * (i + 1) + j for j in range(length)] for i, length in enumerate(lengths)]
    packed = pack(tf.ragged.constant(documents, tf.int32), packing)
    return documents, {name: value.numpy() for name, value in packed.items()}


def check_contract(documents, packed, packing):
    """Every document once, whole, in one row of one micro-batch, with the ids of the contract."""
    rows = np.repeat(
        np.arange(sum(count for count, _ in packing.row_groups)),
        [length for count, length in packing.row_groups for _ in range(count)],
    )
    seen = []
    for m in range(len(packed["input_ids"])):
        index = packed["document_index"][m]
        mask = packed["document_mask"][m]
        np.testing.assert_array_equal(mask, index >= 0)
        segments = packed["segment_ids"][m]
        assert set(np.unique(segments)) - {0} == set(range(1, int(mask.sum()) + 1))
        np.testing.assert_array_equal(packed["input_ids"][m][segments == 0], 0)
        for slot in np.flatnonzero(mask):
            where = np.flatnonzero(segments == slot + 1)
            document = documents[index[slot]]
            np.testing.assert_array_equal(packed["input_ids"][m][where], document)
            np.testing.assert_array_equal(packed["position_ids"][m][where], range(len(document)))
            np.testing.assert_array_equal(where, where[0] + np.arange(len(document)))
            assert len(set(rows[where])) == 1
            assert packed["window_starts"][m][slot] == where[0]
            assert packed["window_document"][m][slot] == slot
            seen.append(int(index[slot]))
        empty = np.flatnonzero(mask == 0)
        assert (packed["window_document"][m][empty] == -1).all()
    assert sorted(seen) == list(range(len(documents)))


def test_long_documents_take_long_rows_and_short_ones_fill_their_gaps():
    packing = PackingConfig(((2, 4), (1, 8)), 8, 8)
    _, packed = pack_lengths([6, 4, 2, 3], packing)
    assert packed["segment_ids"].tolist() == [[1] * 4 + [2] * 3 + [0] + [3] * 6 + [4] * 2]
    assert packed["document_index"].tolist() == [[1, 3, 0, 2, -1, -1, -1, -1]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 0, 1]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_no_document_is_lost_split_or_repeated(lengths):
    documents, packed = pack_lengths(lengths, SMALL)
    check_contract(documents, packed, SMALL)


def test_more_short_documents_than_slots_spread_over_more_micro_batches():
    documents, packed = pack_lengths([1] * 20, SMALL)
    check_contract(documents, packed, SMALL)
    assert packed["document_mask"].sum(axis=1).max() == 6
    assert len(packed["document_mask"]) == 4


def test_a_row_never_holds_more_documents_than_a_micro_batch_has_slots():
    packing = PackingConfig(((1, 64),), 6, 6)
    documents, packed = pack_lengths([1] * 50 + [60], packing)
    check_contract(documents, packed, packing)
    assert packed["document_mask"].sum(axis=1).max() <= 6


def test_a_block_of_docstring_like_lengths_fills_97_percent_of_its_tokens():
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.5, 0.9, 3000)), 12, 512).astype(int)
    packing = choose_packing(np.bincount(lengths), 4096)
    assert packing.max_length == 512 and 3500 < packing.num_tokens <= 4096
    _, packed = pack_lengths(lengths, packing)
    assert lengths.sum() / packed["input_ids"].size >= 0.97
    # Dealing evens out how many documents the micro-batches hold.
    counts = packed["document_mask"].sum(axis=1)
    assert counts.max() <= 1.5 * counts.mean() and counts.max() <= packing.max_documents


def test_a_document_longer_than_every_row_is_an_error_and_not_an_endless_loop():
    with pytest.raises(tf.errors.InvalidArgumentError, match="longer than all rows"):
        pack_lengths([17], SMALL)


def test_short_documents_need_no_long_rows():
    packing = choose_packing(np.bincount([20, 30, 40]), 1024)
    assert packing.row_groups == ((25, 40),)


def test_rows_hold_the_longest_document_that_may_come():
    assert choose_packing(np.bincount([20] * 99), 1024, longest=256).max_length == 256


def test_row_groups_of_the_user_are_taken_or_refused():
    groups = parse_row_groups("8x64,2x128")
    packing = choose_packing(np.bincount([100, 20]), 4096, groups)
    assert packing.row_groups == ((8, 64), (2, 128)) and packing.num_tokens == 768
    with pytest.raises(UserError, match="longest row has 128.*may have 200"):
        choose_packing(np.bincount([200]), 4096, groups)
    with pytest.raises(UserError, match="tokens_per_replica=64.*at least 200"):
        choose_packing(np.bincount([200]), 64)


def test_an_empty_micro_batch_has_the_shapes_of_a_full_one():
    _, packed = pack_lengths([5], SMALL)
    for name, value in empty_micro_batch(SMALL).items():
        assert value.shape == packed[name].shape[1:] and value.dtype == packed[name].dtype
