"""Files damaged at random: each damage is named, or recovered from; what is used is as written."""

import dataclasses
import json
import logging
import os
import random
import shutil

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.input_pipeline import open_stream, read_micro_batches
from trainer.data.metadata import Metadata, Shard, Split, load_metadata
from trainer.data.packing import choose_packing
from trainer.data.records import encode_record
from trainer.errors import UserError
from trainer.model.model import build_model
from trainer.model_config import ModelConfig
from trainer.run_config import TrainConfig
from trainer.storage.filesystem import checksum
from trainer.training.checkpoint import Checkpoints, fingerprint_weights, load_best
from trainer.training.run_record import RunRecord, load_record, start_record

STEPS = (10, 20, 30)
LABELS = ("rare", "häufig")
# How many damages: short for every run, long for what the project promises.
NUM_DAMAGES = [20, pytest.param(200, marks=pytest.mark.long)]


def write_split(folder, documents, shards):
    """Documents of five tokens, two of them its own number; each has the second label."""
    described, length = [], 5
    for shard in range(shards):
        path = os.path.join(folder, f"train-{shard}.tfrecord")
        with tf.io.TFRecordWriter(path) as writer:
            for number in range(shard, documents, shards):
                ids = [2, 10 + number // 40, 10 + number % 40, 9, 3]
                writer.write(encode_record(f"document {number}", [ids], [1]))
        count = len(range(shard, documents, shards))
        described.append(
            Shard(os.path.basename(path), count, os.path.getsize(path), checksum(path))
        )
    histogram = (0,) * length + (documents,)
    return Split(
        documents, documents * length, 0, 0, (0, documents), histogram, tuple(described),
        documents, (0, documents), 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with `data` and `run`: a split in three shards, and three checkpoints."""
    root = tmp_path_factory.mktemp("original")
    data_dir, model_dir = str(root / "data"), str(root / "run")
    os.mkdir(data_dir)
    split = write_split(data_dir, 120, 3)
    Metadata(LABELS, 16, 64, "t" * 64, {"train": split}, {}, {}).save(data_dir)
    sizes = ModelConfig(
        64,
        len(LABELS),
        hidden_size=8,
        num_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    record = RunRecord(
        TrainConfig(data_dir=data_dir, model_dir=model_dir), sizes,
        choose_packing(split.length_histogram, 64), LABELS, (1.5, 1.0), (1.0, 1.0),
        True, 16, 120, "d" * 64, "t" * 64, "float32", 1, {},
    )  # fmt: skip
    start_record(model_dir, record)
    variables = state_of(record)
    checkpoints = Checkpoints(model_dir, variables, len(STEPS))
    for step in STEPS:
        set_state(variables, step)
        checkpoints.save_best(step)
        checkpoints.save(step)
    checkpoints.close()
    return str(root)


def state_of(record):
    model = build_model(record.model, seed=1)
    return {
        "model": model.named_variables(),
        "progress": {"steps": tf.Variable(0, dtype=tf.int64)},
    }


def set_state(variables, step):
    """Weights that are a function of the step, every element another."""
    variables["progress"]["steps"].assign(step)
    for number, variable in enumerate(variables["model"].values()):
        random_state = np.random.default_rng((step, number))
        variable.assign(random_state.standard_normal(variable.shape).astype(np.float32))


def fingerprint_of(record, step):
    variables = state_of(record)
    set_state(variables, step)
    return fingerprint_weights(variables["model"])


def read_documents(root):
    """The ids of all documents, read as a run reads them."""
    data_dir = os.path.join(root, "data")
    metadata = load_metadata(data_dir)
    packing = choose_packing(metadata.split("train").length_histogram, 64)
    stream = open_stream(data_dir, metadata, "train", packing)
    batches = list(read_micro_batches(stream, seed=None))
    ids = [name for batch in batches for name in batch["document_id"].numpy() if name]
    tokens = sum(int(np.count_nonzero(batch["segment_ids"])) for batch in batches)
    return metadata, sorted(ids), tokens


def damage(path, choices):
    """Damages a file in one of three ways; says how."""
    size = os.path.getsize(path)
    kind = choices.choice(("cut", "flip", "delete"))
    if kind == "delete":
        os.remove(path)
    elif kind == "cut":
        os.truncate(path, choices.randrange(size))
    else:
        with open(path, "r+b") as file:
            place = choices.randrange(size)
            file.seek(place)
            byte = file.read(1)[0] ^ 1 << choices.randrange(8)
            file.seek(place)
            file.write(bytes([byte]))
        return f"bit flipped at {place} of {size}"
    return kind


def is_same_json(path, original_path):
    """Whether a JSON file says what it said: a flip may have hit the space between two values."""
    try:
        with open(path, "rb") as file, open(original_path, "rb") as other:
            return json.load(file) == json.load(other)
    except (OSError, ValueError):
        return False


def check_checkpoint(root, path, before, fingerprints, caplog):
    """The newest is restored, or after a warning that names the file the one before it."""
    model_dir = os.path.join(root, "run")
    variables = state_of(load_record(model_dir))
    assert Checkpoints(model_dir, variables, len(STEPS)).restore()
    step = int(variables["progress"]["steps"])
    assert fingerprint_weights(variables["model"]) == fingerprints[step]
    warnings = " ".join(record.getMessage() for record in caplog.records)
    if is_same_json(path, before):
        assert step == STEPS[-1] and not warnings
    else:
        assert step == STEPS[-2] and os.path.basename(path) in warnings


def check_best(root, path, before, fingerprints):
    model_dir = os.path.join(root, "run")
    if is_same_json(path, before):
        assert load_best(model_dir).fingerprint == fingerprints[STEPS[-1]]
        return
    with pytest.raises(UserError) as error:
        load_best(model_dir)
    assert os.path.basename(path) in str(error.value)


def check_json(read, path, before, expected):
    """A file of JSON says what it said, or is named."""
    if is_same_json(path, before):
        assert read() == expected
        return
    with pytest.raises(UserError) as error:
        read()
    assert os.path.basename(path) in str(error.value)


@pytest.mark.parametrize("num_damages", NUM_DAMAGES)
def test_every_damage_is_named_or_recovered_from(num_damages, original, tmp_path, caplog):
    seed = random.randrange(10**6)
    print("seed of the damages:", seed)
    choices = random.Random(seed)
    record = load_record(os.path.join(original, "run"))
    fingerprints = {step: fingerprint_of(record, step) for step in STEPS}
    metadata, ids, tokens = read_documents(original)
    assert len(ids) == 120 and tokens == 600
    root = str(tmp_path / "copy")
    model_dir, data_dir = os.path.join(root, "run"), os.path.join(root, "data")
    groups = ("run/checkpoints", "run/best", "run/config.json", "data", "data/metadata.json")
    for _ in range(num_damages):
        shutil.copytree(original, root)
        caplog.clear()
        group = choices.choice(groups)
        path = os.path.join(root, group)
        if os.path.isdir(path):
            # Of checkpoints the newest, which is the one that is read.
            old = tuple(f"step-{step}." for step in STEPS[:-1])
            names = [name for name in sorted(os.listdir(path)) if not name.startswith(old)]
            path = os.path.join(path, choices.choice(names))
        before = os.path.join(original, os.path.relpath(path, root))
        print(os.path.relpath(path, root), damage(path, choices))
        with caplog.at_level(logging.WARNING):
            if group == "run/checkpoints":
                check_checkpoint(root, path, before, fingerprints, caplog)
            elif group == "run/best":
                check_best(root, path, before, fingerprints)
            elif path.endswith("config.json"):
                check_json(lambda: load_record(model_dir), path, before, record)
            elif path.endswith("metadata.json"):
                check_json(lambda: load_metadata(data_dir), path, before, metadata)
            else:
                with pytest.raises(UserError, match=os.path.basename(path)):
                    read_documents(root)
        shutil.rmtree(root)


def test_a_config_that_is_gone_is_not_a_fresh_start(original, tmp_path):
    root = str(tmp_path / "copy")
    shutil.copytree(original, root)
    model_dir = os.path.join(root, "run")
    record = load_record(model_dir)
    os.remove(os.path.join(model_dir, "config.json"))
    with pytest.raises(UserError, match="config.json: missing, but .* checkpoints up to step 30"):
        start_record(model_dir, record)
    assert not os.path.exists(os.path.join(model_dir, "config.json"))


def test_a_resumed_run_keeps_the_micro_batches_of_its_steps(original, tmp_path):
    root = str(tmp_path / "copy")
    shutil.copytree(original, root)
    model_dir = os.path.join(root, "run")
    record = load_record(model_dir)
    on_two = dataclasses.replace(
        record,
        train=dataclasses.replace(record.train, strategy="mirrored"),
        micro_batches_per_step=2,
    )
    assert start_record(model_dir, on_two) == dataclasses.replace(on_two, micro_batches_per_step=1)
    assert load_record(model_dir) == record
    on_more = dataclasses.replace(
        record,
        train=dataclasses.replace(record.train, gradient_accumulation=3),
        micro_batches_per_step=6,
    )
    with pytest.raises(UserError, match="--gradient_accumulation was 1, now 3, which makes 6"):
        start_record(model_dir, on_more)
    other = dataclasses.replace(record, train=dataclasses.replace(record.train, seed=18))
    with pytest.raises(UserError, match="--seed was 17, now 18"):
        start_record(model_dir, other)


def test_every_flipped_bit_of_a_config_is_found(original, tmp_path):
    """300 of them, which a run would otherwise go on with: another seed, rate or weight."""
    before = os.path.join(original, "run", "config.json")
    with open(before, "rb") as file:
        content = file.read()
    record = load_record(os.path.join(original, "run"))
    choices, path = random.Random(5), str(tmp_path / "config.json")
    for _ in range(300):
        place = choices.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << choices.randrange(8)
        with open(path, "wb") as file:
            file.write(flipped)
        check_json(lambda: load_record(str(tmp_path)), path, before, record)
