"""Packing: nothing lost, nothing crossed, rows full, and the layouts of hand-written cases."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import choose_packing, empty_micro_batch, pack
from trainer.errors import UserError
from trainer.model_config import PackingConfig, parse_row_groups

SMALL = PackingConfig(((4, 8), (2, 16)), 6, 6)


def pack_lengths(lengths, packing):
    """Packs documents of one window, whose token values say which document and place they are."""
    documents = [[[1000 * (i + 1) + j for j in range(length)]] for i, length in enumerate(lengths)]
    return documents, pack_documents(documents, packing)


def pack_windows(lengths, packing):
    """Packs documents of several windows, given as lists of their lengths; every token differs."""
    tokens = iter(range(1, 1 + sum(map(sum, lengths))))
    documents = [[[next(tokens) for _ in range(n)] for n in document] for document in lengths]
    return documents, pack_documents(documents, packing)


def pack_documents(documents, packing):
    packed = _compiled(packing)(tf.ragged.constant(documents, tf.int32, ragged_rank=2))
    return {name: value.numpy() for name, value in packed.items()}


@functools.cache
def _compiled(packing):
    """Packing as it always runs: as a graph."""
    spec = tf.RaggedTensorSpec([None, None, None], tf.int32, row_splits_dtype=tf.int64)
    return tf.function(functools.partial(pack, packing=packing), input_signature=[spec])


def check_contract(documents, packed, packing):
    """Every document once, with all windows in one micro-batch, and each of these in one row."""
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
        owner = packed["window_document"][m]
        assert set(np.unique(segments)) - {0} == set(range(1, 1 + int((owner >= 0).sum())))
        assert set(owner[owner >= 0]) == set(np.flatnonzero(mask))
        np.testing.assert_array_equal(packed["input_ids"][m][segments == 0], 0)
        for slot in np.flatnonzero(mask):
            found = []
            for window in np.flatnonzero(owner == slot):
                where = np.flatnonzero(segments == window + 1)
                tokens = packed["input_ids"][m][where].tolist()
                found.append(tokens)
                np.testing.assert_array_equal(packed["position_ids"][m][where], range(len(tokens)))
                np.testing.assert_array_equal(where, where[0] + np.arange(len(where)))
                assert len(set(rows[where])) == 1
                assert packed["window_starts"][m][window] == where[0]
            assert sorted(found) == sorted(documents[index[slot]])
            seen.append(int(index[slot]))
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


def test_documents_of_one_window_need_no_third_dimension():
    documents, packed = pack_windows([[5], [16], [3], [9]], SMALL)
    flat = pack(tf.ragged.constant([windows for (windows,) in documents], tf.int32), SMALL)
    for name, value in packed.items():
        np.testing.assert_array_equal(value, flat[name])


def test_all_windows_of_a_document_share_a_micro_batch_and_short_documents_fill_the_gaps():
    packing = PackingConfig(((2, 4), (1, 8)), 8, 8)
    # 16 tokens a micro-batch: 8 + 4 + 3 of the first document leave a gap of one token.
    documents, packed = pack_windows([[1], [8, 4, 3], [4, 4, 4], [2, 2]], packing)
    check_contract(documents, packed, packing)
    assert packed["document_index"].tolist() == [
        [1, 0, -1, -1, -1, -1, -1, -1],
        [2, 3, -1, -1, -1, -1, -1, -1],
    ]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=4), min_size=1, max_size=30))
def test_no_window_is_lost_parted_from_its_document_or_repeated(lengths):
    packing = PackingConfig(((4, 8), (4, 16)), 5, 9)
    documents, packed = pack_windows(lengths, packing)
    check_contract(documents, packed, packing)


def test_short_documents_do_not_overflow_the_slots_of_long_ones():
    """The gaps hold 56 short documents, the micro-batches that they lie in 4 more each."""
    packing = PackingConfig(((4, 16),), 5, 40)
    documents, packed = pack_windows([[9, 9, 9, 9]] * 2 + [[1]] * 60, packing)
    check_contract(documents, packed, packing)
    assert packed["document_mask"].sum(axis=1).max() <= 5


def test_documents_of_one_to_ten_windows_fill_97_percent():
    rng = np.random.default_rng(1)
    lengths = [[128] * rng.integers(0, 10) + [rng.integers(12, 129)] for _ in range(400)]
    flat = [length for document in lengths for length in document]
    windows = np.bincount([len(document) for document in lengths])
    for num_tokens in (2048, 4096):
        packing = choose_packing(np.bincount(flat), num_tokens, window_histogram=windows.tolist())
        documents, packed = pack_windows(lengths, packing)
        check_contract(documents, packed, packing)
        # The last micro-batch is part of the block's, as of an epoch's.
        slots = (len(packed["input_ids"]) - 1) * packing.num_tokens
        assert sum(flat) / slots >= 0.97
        assert packing.max_documents < 0.5 * packing.max_windows


def test_more_windows_than_a_micro_batch_holds_are_an_error_and_not_an_endless_loop():
    with pytest.raises(tf.errors.InvalidArgumentError, match="more windows than a micro-batch"):
        pack_windows([[16, 16, 16]], SMALL)
    with pytest.raises(tf.errors.InvalidArgumentError, match="more windows than a micro-batch"):
        pack_windows([[1] * 7], SMALL)


def test_a_micro_batch_holds_the_longest_document_or_says_what_to_change():
    histogram = [0] * 129
    histogram[128] = 11
    windows = [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(UserError, match="1024: expected at least 1280, the 10 windows .*--max_win"):
        choose_packing(histogram, 1024, window_histogram=windows)
    with pytest.raises(
        UserError, match="holds 9 windows of 128 tokens, but a document may have 10"
    ):
        choose_packing(histogram, 1, ((3, 384),), window_histogram=windows)
    packing = choose_packing(histogram, 1280, window_histogram=windows)
    assert packing.row_groups == ((10, 128),)
    # 15 slots for the mean of 10 windows, 4 for that of 1.8 documents, and 8 more of each.
    assert (packing.max_windows, packing.max_documents) == (23, 12)
    long = choose_packing(histogram, 4096, window_histogram=[0, 11], document_windows=30)
    assert long.max_windows == 56 and dict((n, r) for r, n in long.row_groups)[128] >= 30


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
