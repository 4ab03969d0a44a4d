"""Shards to micro-batches: every document once an epoch, reshuffled by seed, seekable."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

from trainer.data import input_pipeline
from trainer.data.input_pipeline import (
    POSITION_KEYS,
    HostShard,
    Position,
    open_stream,
    read_micro_batches,
    shard_steps,
    stack_micro_batches,
)
from trainer.data.metadata import load_metadata
from trainer.data.packing import choose_packing
from trainer.data.records import parse_records
from trainer.errors import UserError


@pytest.fixture(scope="module")
def stream(corpus):
    metadata = load_metadata(corpus)
    packing = choose_packing(metadata.split("train").length_histogram, 512)
    whole = open_stream(corpus, metadata, "train", packing)
    # Small blocks, so that an epoch has several.
    return dataclasses.replace(whole, block_documents=250)


def ids_of(batches):
    return [[i.decode() for i in batch["document_id"].numpy() if i] for batch in batches]


def flat(lists):
    return [item for items in lists for item in items]


def test_every_document_comes_once_an_epoch_with_its_own_labels(stream):
    records = tf.data.TFRecordDataset(stream.paths).batch(10_000)
    ids, _, labels, _ = parse_records(next(iter(records)))
    expected = dict(zip([i.decode() for i in ids.numpy()], labels.to_list(), strict=True))
    seen = {}
    for batch in read_micro_batches(stream, seed=1, num_epochs=1):
        for slot, name in enumerate(batch["document_id"].numpy()):
            hot = np.flatnonzero(batch["labels"].numpy()[slot]).tolist()
            if name:
                assert name.decode() not in seen
                seen[name.decode()] = hot
            else:
                assert hot == []
    assert seen == expected and len(seen) == stream.num_documents


def test_epochs_and_seeds_differ_and_repeat(stream):
    def order(seed, epochs=1.0):
        return flat(ids_of(read_micro_batches(stream, seed=seed, num_epochs=epochs)))

    two = order(1, 2)
    count = stream.num_documents
    assert two[:count] == order(1) and two[:count] != two[count:]
    assert sorted(two[:count]) == sorted(two[count:])
    assert order(2) != order(1)
    assert flat(ids_of(read_micro_batches(stream, seed=None))) != order(1)


def test_resuming_anywhere_continues_the_stream(stream):
    batches = list(read_micro_batches(stream, seed=5, num_epochs=2.3))
    names = ids_of(batches)
    assert len(flat(names)) == stream.num_documents * 2 + round(0.3 * stream.num_documents)
    for i in np.linspace(0, len(batches) - 1, 5).astype(int):
        position = Position(
            *(int(batches[i][key]) for key in ("epoch", "block", "next_micro_batch"))
        )
        rest = read_micro_batches(stream, seed=5, num_epochs=2.3, start=position)
        assert ids_of(rest) == names[i + 1 :]


def test_seeking_reads_neither_the_shards_before_nor_other_blocks(stream, tmp_path):
    """With the epoch's first shards destroyed, a position behind them can still be read."""
    whole = ids_of(read_micro_batches(stream, seed=None))
    copies = [shutil.copy(path, tmp_path) for path in stream.paths]
    os.truncate(copies[0], 10)
    copied = dataclasses.replace(stream, paths=tuple(copies))
    block = -(-stream.shard_documents[0] // stream.block_documents)
    rest = ids_of(read_micro_batches(copied, seed=None, start=Position(0, block, 0)))
    assert flat(rest) == flat(whole)[block * stream.block_documents :]


def test_a_step_is_split_among_hosts_and_replicas_in_the_stream_s_order(stream):
    """Two hosts of two replicas get, each, their half of what one replica alone gets."""
    whole = list(read_micro_batches(stream, seed=1))
    steps = -(-len(whole) // 8)
    alone = list(
        shard_steps(read_micro_batches(stream, seed=1), stream, 8, HostShard()).take(steps)
    )
    for host in range(2):
        share = HostShard(replicas=4, first=2 * host, count=2)
        shares = shard_steps(read_micro_batches(stream, seed=1), stream, 8, share).take(2 * steps)
        for index, element in enumerate(shares):
            step, replica = divmod(index, 2)
            first = 2 * (share.first + replica)
            for name in ("input_ids", "labels", "document_mask"):
                np.testing.assert_array_equal(
                    element[name], alone[step][name][first : first + 2], err_msg=name
                )
            np.testing.assert_array_equal(element["position"], alone[step]["position"])
    for index, step in enumerate(alone):
        last = whole[min(8 * index + 7, len(whole) - 1)]
        assert step["position"].numpy().tolist() == [int(last[key]) for key in POSITION_KEYS]


def test_steps_are_filled_up_with_empty_micro_batches_and_go_on_without_end(stream):
    total = len(list(read_micro_batches(stream, seed=1)))
    count = -(-total // 4)
    steps = list(
        shard_steps(read_micro_batches(stream, seed=1), stream, 4, HostShard()).take(count + 2)
    )
    real = sum(int(tf.reduce_sum(step["document_mask"])) for step in steps)
    assert real == stream.num_documents
    documents = [int(n) for n in tf.reduce_sum(steps[count - 1]["document_mask"], axis=1)]
    assert sum(n == 0 for n in documents) == 4 * count - total
    assert [float(tf.reduce_sum(step["document_mask"])) for step in steps[count:]] == [0, 0]
    assert all((step["position"].numpy() == -1).all() for step in steps[count:])
    assert "document_id" not in steps[0]


def test_stacks_hold_every_document_once(stream):
    stacks = list(stack_micro_batches(read_micro_batches(stream, seed=None), stream, 4))
    index = np.concatenate([stack["document_index"].numpy().ravel() for stack in stacks])
    assert sorted(index[index >= 0]) == list(range(stream.num_documents))


def test_no_dataset_is_autotuned(stream):
    """The end of an autotuned iterator waits for its thread, up to a minute."""
    batches = read_micro_batches(stream, seed=1)
    datasets = batches, shard_steps(batches, stream, 4, HostShard())
    for dataset in (*datasets, stack_micro_batches(batches, stream, 2)):
        assert dataset.options().autotune.enabled is False


def test_an_epoch_of_the_sample_fills_97_percent_of_its_tokens(corpus):
    metadata = load_metadata(corpus)
    split = metadata.split("train")
    packing = choose_packing(split.length_histogram, 2048)
    stream = open_stream(corpus, metadata, "train", packing)
    batches = list(read_micro_batches(stream, seed=3))
    assert split.tokens / ((len(batches) - 1) * packing.num_tokens) >= 0.97


def test_count_documents_does_not_trip_over_rounding():
    assert input_pipeline.count_documents(1000, 0.1 * 3) == 300
    assert input_pipeline.count_documents(7, 1.5) == 11


def damaged(corpus, tmp_path, change):
    folder = str(tmp_path / "data")
    shutil.copytree(corpus, folder)
    metadata = load_metadata(folder)
    shard = os.path.join(folder, metadata.split("train").shards[1].name)
    change(shard)
    return folder, metadata, os.path.basename(shard)


def cut_in_half(path):
    os.truncate(path, os.path.getsize(path) // 2)


def flip_a_byte(path):
    with open(path, "r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [(cut_in_half, "bytes, but"), (flip_a_byte, "CRC-32C"), (os.remove, "missing")],
)
def test_a_damaged_shard_is_named_before_anything_is_read(corpus, tmp_path, change, message):
    folder, metadata, name = damaged(corpus, tmp_path, change)
    packing = choose_packing(metadata.split("train").length_histogram, 512)
    with pytest.raises(UserError, match=message) as error:
        open_stream(folder, metadata, "train", packing)
    assert name in str(error.value)
