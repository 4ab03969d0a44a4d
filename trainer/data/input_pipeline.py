"""Shards to micro-batches: shuffled by (seed, epoch), seekable, in graph ops only.

An epoch is the split's shards in an order drawn from (seed, epoch), one after the other, cut into
blocks of a fixed number of documents. Each block is shuffled and packed by itself, so three numbers
are the stream's position: epoch, block, and how many of the block's micro-batches are done. To
resume, it skips whole shards by their counts in metadata.json, then records within one, and packs
one block again.
"""

import math
from dataclasses import dataclass

import tensorflow as tf

from trainer.data.metadata import Metadata, verify_shards
from trainer.data.packing import BLOCK_MICRO_BATCHES, empty_micro_batch, pack
from trainer.data.records import parse_records, parse_teacher, without_autotuning
from trainer.errors import UserError
from trainer.model_config import PackingConfig
from trainer.runtime.workers import count_cores

# With so many labels, multi-hot rows cost as much as the tokens. Beyond, indices travel to the
# devices, which make multi-hot rows of them: at 4,000 labels a few kB for 200 documents, not 800.
_MAX_DENSE_LABELS = 256
# A micro-batch has one of the two.
LABEL_KEYS = ("labels", "label_ids")


def spread_labels(
    labels: tf.RaggedTensor,
    slots: tf.Tensor,
    shape: tuple[tf.Tensor, int],
    num_labels: int,
    max_labels: int,
) -> dict[str, tf.Tensor]:
    """The labels (int32 ragged [N, None], indices) of N documents by document slot.

    `slots` (int64 [N]) is each document's slot among all M x D, `shape` is M (int32 scalar) and D,
    and `max_labels` the most of a document. Returns `labels` (uint8 multi-hot [M, D, L]), or, for
    more than 256 labels, `label_ids` (int32 [M, D, max_labels], a document's labels, then -1).
    """
    row, values = labels.value_rowids(), labels.flat_values
    if num_labels <= _MAX_DENSE_LABELS:
        name, width, empty = "labels", num_labels, tf.constant(0, tf.uint8)
        column, values = tf.cast(values, tf.int64), tf.ones_like(values, tf.uint8)
    else:
        name, width, empty = "label_ids", max_labels, tf.constant(-1)
        column = tf.range(tf.size(row, tf.int64)) - tf.gather(labels.row_starts(), row)
    cells = tf.gather(slots, row) * width + column
    nothing = tf.fill([tf.cast(shape[0], tf.int64) * shape[1] * width], empty)
    flat = tf.tensor_scatter_nd_update(nothing, cells[:, None], values)
    return {name: tf.reshape(flat, [*shape, width])}


def no_labels(num_documents: int, num_labels: int, max_labels: int) -> dict[str, tf.Tensor]:
    """`spread_labels` of one micro-batch of empty slots."""
    if num_labels <= _MAX_DENSE_LABELS:
        return {"labels": tf.zeros([num_documents, num_labels], tf.uint8)}
    return {"label_ids": tf.fill([num_documents, max_labels], -1)}


def dense_labels(batch: dict[str, tf.Tensor], num_labels: int) -> tf.Tensor:
    """The labels of micro-batches as multi-hot [..., D, L].

    They are `labels` (uint8 [..., D, L]) themselves, or made from `label_ids` (int32
    [..., D, max_labels], -1 for none) in float32, which every device can scatter.
    """
    if "labels" in batch:
        return batch["labels"]
    *outer, max_labels = batch["label_ids"].shape
    rows = tf.reshape(batch["label_ids"], [-1, max_labels])
    num_rows = rows.shape[0]
    # One more column takes the -1s.
    columns = tf.where(rows < 0, num_labels, rows)
    cells = tf.range(num_rows)[:, None] * (num_labels + 1) + columns
    ones, size = tf.ones([num_rows * max_labels]), num_rows * (num_labels + 1)
    hot = tf.scatter_nd(tf.reshape(cells, [-1, 1]), ones, [size])
    hot = tf.reshape(hot, [num_rows, num_labels + 1])[:, :num_labels]
    return tf.reshape(hot, [*outer, num_labels])


# What a student's micro-batch has beside labels: its teacher's logits [D, L], and which documents
# have labels [D]; float32, 0 in empty slots.
TEACHER_KEYS = ("teacher_logits", "label_mask")
# The position of a stream after a micro-batch.
POSITION_KEYS = ("epoch", "block", "next_micro_batch")
# The tensors that travel to the devices: strings cannot, and the loss needs no document's index.
_STEP_KEYS = frozenset(
    ("input_ids", "segment_ids", "position_ids", "window_starts", "window_document")
    + (*LABEL_KEYS, *TEACHER_KEYS, "document_mask", *POSITION_KEYS)
)
# Blocks packed at once, on as many cores; each of them is held in memory.
_MAX_BLOCKS_AT_ONCE = 16


@dataclass(frozen=True)
class Position:
    """Where a stream stands: the next micro-batch to read."""

    epoch: int = 0
    block: int = 0
    micro_batch: int = 0


@dataclass(frozen=True)
class Stream:
    """One split of a data folder, ready to be read.

    `paths` and `shard_documents` go together. The split's size and the packing fix
    `block_documents`, so two runs of one config have the same blocks. `has_teacher` is whether the
    records carry a teacher's logits.
    """

    paths: tuple[str, ...]
    shard_documents: tuple[int, ...]
    block_documents: int
    packing: PackingConfig
    num_labels: int
    max_labels: int
    num_slice_columns: int = 0
    has_teacher: bool = False

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return sum(self.shard_documents)


def open_stream(
    data_dir: str,
    metadata: Metadata,
    split_name: str,
    packing: PackingConfig,
    has_teacher: bool = False,
) -> Stream:
    """A stream of a split; UserError if the split is missing or empty, or a shard is damaged."""
    split = metadata.split(split_name)
    paths = verify_shards(data_dir, metadata, split_name)
    if split.documents == 0:
        raise UserError(f"{data_dir}: split {split_name!r} has no documents; prepare it again")
    blocks = max(1, round(split.tokens / (BLOCK_MICRO_BATCHES * packing.num_tokens)))
    return Stream(
        tuple(paths),
        tuple(shard.documents for shard in split.shards),
        math.ceil(split.documents / blocks),
        packing,
        len(metadata.labels),
        max(1, split.max_labels_per_document),
        len(metadata.slice_columns),
        has_teacher,
    )


def count_documents(num_documents: int, num_epochs: float) -> int:
    """Documents of so many epochs; a fraction of a document counts as one."""
    # 1e-6 documents absorb the rounding of products such as 0.1 x 3 epochs.
    return math.ceil(num_epochs * num_documents - 1e-6)


def _read_epoch(
    stream: Stream, epoch: tf.Tensor, seed: int | None, first_document: tf.Tensor, limit: tf.Tensor
) -> tf.data.Dataset:
    """The epoch's blocks of serialised records, from `first_document` on, up to `limit`."""
    order = tf.range(len(stream.paths))
    if seed is not None:
        order = tf.random.experimental.stateless_shuffle(order, tf.stack([seed, epoch]))
    paths = tf.gather(tf.constant(stream.paths), order)
    documents = tf.gather(tf.constant(stream.shard_documents, tf.int64), order)
    ends = tf.cumsum(documents)
    shard = tf.searchsorted(ends, [first_document], side="right")[0]
    before = tf.reduce_sum(documents[:shard])
    # One shard after the other, in the epoch's order; only `prefetch` reads ahead.
    return (
        tf.data.TFRecordDataset(paths[shard:], buffer_size=1 << 20)
        .skip(first_document - before)
        .take(limit - first_document)
        .batch(stream.block_documents)
        .prefetch(2)
    )


def _pack_block(
    stream: Stream, seed: int | None, epoch: tf.Tensor, block: tf.Tensor, serialized: tf.Tensor
) -> dict[str, tf.Tensor]:
    """Shuffles, parses and packs one block; adds labels, document indices and positions."""
    count = tf.size(serialized, out_type=tf.int64)
    first = block * stream.block_documents
    index = first + tf.range(count)
    if seed is not None:
        block_seed = tf.random.experimental.stateless_fold_in(tf.stack([seed, epoch]), block)
        permutation = tf.random.experimental.stateless_shuffle(tf.range(count), block_seed)
        index, serialized = tf.gather(index, permutation), tf.gather(serialized, permutation)
    ids, windows, labels, slices = parse_records(serialized, stream.num_slice_columns)
    packed = pack(windows, stream.packing)
    chosen = packed.pop("document_index")
    num_micro_batches = tf.shape(chosen)[0]

    def of_documents(values: tf.Tensor, empty: tf.Tensor) -> tf.Tensor:
        return tf.where(chosen >= 0, tf.gather(values, tf.maximum(chosen, 0)), empty)

    where = tf.where(chosen >= 0)
    slots = where[:, 0] * stream.packing.max_documents + where[:, 1]
    slots = tf.scatter_nd(tf.boolean_mask(chosen, chosen >= 0)[:, None], slots, [count])
    shape = num_micro_batches, stream.packing.max_documents
    packed |= spread_labels(labels, slots, shape, stream.num_labels, stream.max_labels)
    if stream.has_teacher:
        logits, is_labelled = parse_teacher(serialized, stream.num_labels)
        filled = packed["document_mask"]
        packed |= {
            "teacher_logits": tf.gather(logits, tf.maximum(chosen, 0)) * filled[:, :, None],
            "label_mask": tf.gather(is_labelled, tf.maximum(chosen, 0)) * filled,
        }
    return packed | {
        "document_index": of_documents(index, tf.constant(-1, tf.int64)),
        "document_id": of_documents(ids, tf.constant("")),
        "document_slices": tf.gather(slices, tf.maximum(chosen, 0)),
        "epoch": tf.fill([num_micro_batches], epoch),
        "block": tf.fill([num_micro_batches], block),
        "next_micro_batch": tf.range(1, tf.cast(num_micro_batches, tf.int64) + 1),
    }


def read_micro_batches(
    stream: Stream, *, seed: int | None, num_epochs: float = 1.0, start: Position | None = None
) -> tf.data.Dataset:
    """The micro-batches of `num_epochs` passes over a split, in order, from `start` on.

    Every document comes exactly once in an epoch; a fraction ends within the last one. Without a
    `seed` the shards are read in their order, unshuffled. A micro-batch has the tensors of
    `packing.pack`, the labels of `spread_labels`, `document_index` (int64 [D], in the epoch's
    order), `document_id` (string [D]), `document_slices` (string [D, C], the values of the slice
    columns), `TEACHER_KEYS` if the stream has a teacher, and its position (int64 scalars `epoch`,
    `block`, `next_micro_batch`).
    """
    start = start or Position()
    total = stream.num_documents
    whole, remainder = divmod(count_documents(total, num_epochs), total)
    epochs = whole + (remainder > 0)

    def blocks(epoch: tf.Tensor) -> tf.data.Dataset:
        resumed = epoch == start.epoch
        first = tf.where(resumed, tf.constant(start.block, tf.int64), 0)
        limit = tf.where(epoch == whole, tf.constant(remainder, tf.int64), total)
        serialized = _read_epoch(stream, epoch, seed, first * stream.block_documents, limit)
        return serialized.enumerate(first).map(lambda block, records: (epoch, block, records))

    options = tf.data.Options()
    options.deterministic = True
    return without_autotuning(
        tf.data.Dataset.range(start.epoch, epochs)
        .flat_map(blocks)
        .map(
            lambda epoch, block, records: _pack_block(stream, seed, epoch, block, records),
            num_parallel_calls=min(_MAX_BLOCKS_AT_ONCE, count_cores()),
            deterministic=True,
        )
        .unbatch()
        .skip(start.micro_batch)
        .with_options(options)
    )


def _empty(stream: Stream) -> dict[str, tf.Tensor]:
    """An empty micro-batch of `read_micro_batches`; its position is -1."""
    documents = stream.packing.max_documents
    batch = empty_micro_batch(stream.packing)
    batch |= no_labels(documents, stream.num_labels, stream.max_labels)
    if stream.has_teacher:
        batch["teacher_logits"] = tf.zeros([documents, stream.num_labels])
        batch["label_mask"] = tf.zeros([documents])
    batch |= {key: tf.constant(-1, tf.int64) for key in POSITION_KEYS}
    slices = tf.fill([documents, stream.num_slice_columns], "")
    return batch | {"document_id": tf.fill([documents], ""), "document_slices": slices}


def stack_micro_batches(
    micro_batches: tf.data.Dataset, stream: Stream, count: int
) -> tf.data.Dataset:
    """Stacks `count` consecutive micro-batches; empty ones fill up the last stack."""
    padding = tf.data.Dataset.from_tensors(_empty(stream)).repeat(count - 1)
    stacked = micro_batches.concatenate(padding).batch(count, drop_remainder=True)
    return stacked.prefetch(2)


@dataclass(frozen=True)
class HostShard:
    """The replicas that one host feeds: `count` of all `replicas`, from number `first` on."""

    replicas: int = 1
    first: int = 0
    count: int = 1


def shard_steps(
    micro_batches: tf.data.Dataset, stream: Stream, micro_batches_per_step: int, share: HostShard
) -> tf.data.Dataset:
    """Splits each step's K micro-batches among the replicas; their number divides K.

    Replica r of R takes micro-batches r K / R to (r + 1) K / R of every step. Every host reads and
    packs the whole stream and keeps its own share. So a step has the same documents for any number
    of hosts, and no host reaches the end before another.

    Yields, for each step, one element for each of the host's replicas in order: the inputs of the
    step, stacked to [K / R, ...], and `position` (int64 [3]), the stream's position after the step.
    After the last document come empty micro-batches without end, whose position is -1.
    """
    each = micro_batches_per_step // share.replicas
    assert each * share.replicas == micro_batches_per_step, (micro_batches_per_step, share)
    empty = {name: value for name, value in _empty(stream).items() if name in _STEP_KEYS}

    def split(step: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # Empty micro-batches come last in a step, so the position is that of the last real one.
        last = tf.maximum(tf.reduce_sum(tf.cast(step["epoch"] >= 0, tf.int32)) - 1, 0)
        position = tf.stack([step.pop(key)[last] for key in POSITION_KEYS])
        mine = slice(share.first, share.first + share.count)
        inputs = {
            name: tf.reshape(value, [share.replicas, each, *value.shape[1:]])[mine]
            for name, value in step.items()
        }
        return inputs | {"position": tf.tile(position[None], [share.count, 1])}

    return (
        micro_batches.map(lambda item: {name: item[name] for name in empty})
        .concatenate(tf.data.Dataset.from_tensors(empty).repeat())
        .batch(micro_batches_per_step, drop_remainder=True)
        .map(split)
        .unbatch()
        # Two steps ahead.
        .prefetch(2 * share.count)
    )
