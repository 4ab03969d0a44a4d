"""A student's training data: its teacher's logits, beside documents with and without labels."""

import dataclasses
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import tensorflow as tf
from predicting import predict_split
from test_replicas import (
    MICRO_BATCHES,
    difference,
    distribute,
    make_step,
    mirrored,
    one_device,
    take,
    values,
)
from test_train import assert_same_run, config_of, interrupt_until_finished, rows_of, start

from trainer import export, prepare, train
from trainer.config import PrepareConfig
from trainer.data.input_pipeline import read_micro_batches
from trainer.data.metadata import load_metadata
from trainer.data.records import parse_example
from trainer.errors import UserError
from trainer.model.folder_tensors import to_values
from trainer.model.model_folder import load_model_folder
from trainer.model.predictor import Predictor
from trainer.model.pretrained import choose_layers, load_pretrained, read_weights
from trainer.run_config import ExportConfig, TrainConfig
from trainer.training import setup, soft_targets
from trainer.training.distillation import Distillation
from trainer.training.soft_targets import find_soft_targets
from trainer.training.teacher import find_teacher

NUM_UNLABELLED = 250


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory) -> str:
    """A model folder of four layers."""
    folder = tmp_path_factory.mktemp("teacher")
    run, exported = str(folder / "run"), str(folder / "model")
    train.run(config_of(corpus, run, num_layers=4, num_train_epochs=0.3, progress="none"))
    export.run(ExportConfig(model_dir=run, export_dir=exported, uncalibrated=True))
    return exported


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory) -> str:
    """Rows without labels."""
    path = tmp_path_factory.mktemp("unlabelled") / "rows.jsonl"
    rows = [
        {"id": f"new-{number}", "text": f"Returns item {number} of the list, or raises an error"}
        for number in range(NUM_UNLABELLED)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def student_of(corpus, teacher, model_dir, **changes) -> TrainConfig:
    sizes = {"num_layers": 2, "head": "auto", "progress": "none"}
    return config_of(corpus, model_dir, teacher=teacher, **sizes | changes)


def find(config, strategy=None):
    metadata = load_metadata(config.data_dir)
    teacher = find_teacher(config, metadata)
    return find_soft_targets(config, metadata, teacher, strategy or one_device())


@pytest.fixture(scope="module")
def scored(corpus, teacher, unlabelled, tmp_path_factory) -> TrainConfig:
    """A student's flags; its folder holds the teacher's logits already."""
    model_dir = tmp_path_factory.mktemp("scored") / "run"
    config = student_of(corpus, teacher, model_dir, teacher_input=(unlabelled,))
    find(config)
    return config


def copy_of(config, folder) -> TrainConfig:
    shutil.copytree(config.model_dir, folder)
    return dataclasses.replace(config, model_dir=str(folder))


def read_shards(folder, metadata):
    """The records of each shard of the training split."""
    paths = [os.path.join(folder, shard.name) for shard in metadata.split("train").shards]
    return [
        [parse_example(record) for record in tf.data.TFRecordDataset(path).as_numpy_iterator()]
        for path in paths
    ]


def logits_by_id(model_folder, data_dir, packing):
    predictor = Predictor(load_model_folder(model_folder).model, packing)
    found = predict_split(predictor, data_dir, load_metadata(data_dir), "train")
    return dict(zip(found.ids, found.logits, strict=True))


def test_records_carry_the_teachers_logits_and_whether_they_have_labels(corpus, teacher, scored):
    targets = find(scored)
    expected = logits_by_id(teacher, corpus, targets.packing)
    original = load_metadata(corpus).split("train")
    shards = read_shards(targets.data_dir, targets.metadata)
    records = [record for shard in shards for record in shard]
    split = targets.metadata.split("train")
    assert split.documents == original.documents + NUM_UNLABELLED == len(records)
    assert split.label_counts == original.label_counts
    assert split.tokens == sum(len(record["input_ids"]) for record in records)
    seen = {record["id"][0].decode(): record for record in records}
    assert len(seen) == len(records)
    labelled = {name for name, record in seen.items() if record["is_labelled"] == [1]}
    assert labelled == set(expected)
    assert set(seen) - labelled == {f"new-{number}" for number in range(NUM_UNLABELLED)}
    for name in labelled:
        np.testing.assert_allclose(seen[name]["teacher_logits"], expected[name], atol=2e-5)
    assert not any(seen[name]["labels"] for name in set(seen) - labelled)
    counts = np.bincount([label for name in labelled for label in seen[name]["labels"]])
    assert counts.tolist() == list(original.label_counts[: len(counts)])
    # Evenly mixed, in every shard: no stretch of a shard is of one kind.
    for shard in shards:
        kinds = np.array([record["is_labelled"][0] for record in shard])
        share = 1 - kinds.mean()
        assert share == pytest.approx(NUM_UNLABELLED / len(records), rel=0.02)
        for end in range(1, len(kinds)):
            assert abs((1 - kinds[:end]).sum() - share * end) <= 1


def test_micro_batches_carry_them_with_their_documents(scored):
    targets = find(scored)
    expected = {
        record["id"][0].decode(): record
        for shard in read_shards(targets.data_dir, targets.metadata)
        for record in shard
    }
    seen = set()
    for batch in read_micro_batches(targets.open(), seed=3):
        mask = batch["document_mask"].numpy()
        logits, labelled = batch["teacher_logits"].numpy(), batch["label_mask"].numpy()
        assert not logits[mask == 0].any() and not labelled[mask == 0].any()
        for at in np.flatnonzero(mask):
            name = batch["document_id"].numpy()[at].decode()
            record = expected[name]
            np.testing.assert_array_equal(
                logits[at], np.asarray(record["teacher_logits"], np.float32)
            )
            assert labelled[at] == record["is_labelled"][0]
            hot = np.flatnonzero(batch["labels"].numpy()[at]).tolist()
            assert hot == record["labels"]
            seen.add(name)
    assert seen == set(expected)


def test_labels_in_another_order_are_mapped_by_name(corpus, teacher, tmp_path):
    names = list(reversed(load_metadata(corpus).labels))
    (tmp_path / "labels.txt").write_text("".join(f"{name}\n" for name in names))
    other = str(tmp_path / "data")
    prepare.run(
        PrepareConfig(
            input=("sample:docstrings:1200",), data_dir=other, max_seq_length=128, num_shards=1,
            tokenizer=os.path.join(corpus, "tokenizer"), labels=str(tmp_path / "labels.txt"),
        )
    )  # fmt: skip
    assert list(load_metadata(other).labels) == names
    targets = find(student_of(other, teacher, tmp_path / "run"))
    expected = logits_by_id(teacher, other, targets.packing)
    ((*records,),) = read_shards(targets.data_dir, targets.metadata)
    for record in records:
        theirs = expected[record["id"][0].decode()]
        np.testing.assert_allclose(record["teacher_logits"], theirs[::-1], atol=2e-5)


def test_a_killed_computation_goes_on_with_the_shards_that_are_missing(
    scored, tmp_path, monkeypatch
):
    config = copy_of(scored, tmp_path / "run")
    targets = find(config)
    names = [shard.name for shard in targets.metadata.split("train").shards]
    folder = tmp_path / "run" / "teacher"
    before = {name: (folder / name).read_bytes() for name in [*names, "metadata.json"]}
    assert len(names) == 3
    written = []
    write = soft_targets._write_shard

    def note(folder, name, *rest):
        written.append(name)
        write(folder, name, *rest)

    monkeypatch.setattr(soft_targets, "_write_shard", note)
    assert find(config) == targets and not written
    for lost in (names[1], "metadata.json"):
        (folder / lost).unlink()
    find(config)
    assert written == [names[1]]
    assert {name: (folder / name).read_bytes() for name in before} == before
    # The tokenised input is no longer needed, and the run does not read it.
    assert sorted(os.listdir(folder)) == sorted([*names, "metadata.json", "teacher.json"])


def test_other_teachers_and_documents_are_refused(corpus, scored, model, tmp_path):
    for changes, what in (
        ({"teacher": model}, f"another --teacher={model}"),
        ({"teacher_input": ()}, "another --teacher_input"),
    ):
        with pytest.raises(UserError, match=what):
            find(dataclasses.replace(scored, **changes))
    changed = shutil.copytree(corpus, tmp_path / "data")
    metadata = load_metadata(corpus)
    split = metadata.split("train")
    fewer = dataclasses.replace(split, shards=split.shards[::-1])
    splits = metadata.splits | {"train": fewer}
    dataclasses.replace(metadata, splits=splits).save(str(changed))
    with pytest.raises(UserError, match=f"another --data_dir={changed}"):
        find(dataclasses.replace(scored, data_dir=str(changed)))


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(
    corpus, teacher, minilm, tmp_path
):
    def refuses(match, **changes):
        run = tmp_path / "run"
        config = dataclasses.replace(student_of(corpus, teacher, run), **changes)
        with pytest.raises(UserError, match=match):
            train.run(config)
        assert not run.exists() or os.listdir(run) == []

    refuses("no multihot.json; expected a folder that `multihot export` wrote", teacher=minilm)
    with pytest.raises(UserError, match="--teacher_input=x: expected none without --teacher"):
        TrainConfig(data_dir="d", model_dir="m", teacher_input=("x",))
    other = str(tmp_path / "few")
    (tmp_path / "labels.txt").write_text("class\nfunction\n")
    common = {"input": ("sample:docstrings:300",), "max_seq_length": 128, "num_shards": 1}
    prepare.run(
        PrepareConfig(
            data_dir=other, tokenizer=os.path.join(corpus, "tokenizer"),
            labels=str(tmp_path / "labels.txt"), unknown_labels="ignore", **common,
        )
    )  # fmt: skip
    refuses("not the labels of .*: only the teacher has '.*' and .* more", data_dir=other)
    other = str(tmp_path / "words")
    (tmp_path / "all.txt").write_text("".join(f"{n}\n" for n in load_metadata(corpus).labels))
    prepare.run(
        PrepareConfig(
            data_dir=other, vocab_size=900, labels=str(tmp_path / "all.txt"), **common,
        )
    )  # fmt: skip
    refuses("--teacher=.*: not the vocabulary of .*prepare --tokenizer=", data_dir=other)


def test_unusable_rows_of_the_input_are_named(corpus, teacher, tmp_path):
    def refuses(content, match):
        path = tmp_path / "rows.jsonl"
        path.write_text(content)
        with pytest.raises(UserError, match=match):
            find(student_of(corpus, teacher, tmp_path / "run", teacher_input=(str(path),)))

    good = json.dumps({"text": "fine"}) + "\n"
    refuses(good + '{"text": ""}\n' + good, r"1 of 3 rows cannot be used, the first is row 1 of ")
    refuses('{"body": "x"}\n', "text")
    refuses('{"text": ""}\n', "1 of 1 rows")


def test_a_student_starts_from_layers_of_its_teacher(corpus, teacher, tmp_path):
    config = student_of(corpus, teacher, tmp_path / "run")
    sizes, found = setup.choose_model(config, load_metadata(corpus))
    assert (sizes.num_layers, sizes.head) == (2, "mean")
    whole = dataclasses.replace(
        sizes, num_layers=4, wide="wordpieces", wide_pairs=wide_pairs_of(teacher)
    )
    theirs = to_values(read_weights(teacher), whole, teacher)
    assert choose_layers(4, 2) == (0, 3)
    names = {name for name in found if name.startswith("encoder/")}
    assert len([name for name in names if "layer_1/" in name]) == 12
    assert not any("layer_2/" in name for name in names)
    for name in names:
        expected = theirs[name.replace("layer_1/", "layer_3/")]
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_a_student_s_head_is_of_its_teacher_s_kind(corpus, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "model", ignore=shutil.ignore_patterns("saved_*"))
    path = other / "multihot.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head": "label_attention"}))
    config = student_of(corpus, str(other), tmp_path / "run")
    sizes, _ = setup.choose_model(config, load_metadata(corpus))
    assert sizes.head == "label_attention"
    asked = dataclasses.replace(config, head="cls")
    assert setup.choose_model(asked, load_metadata(corpus))[0].head == "cls"


def wide_pairs_of(folder):
    with open(os.path.join(folder, "multihot.json"), encoding="utf-8") as file:
        return json.load(file)["wide_pairs"]


def test_layers_of_a_checkpoint_are_evenly_chosen(corpus, minilm):
    assert choose_layers(12, 6) == (0, 2, 4, 7, 9, 11)  # DistilBERT's.
    assert choose_layers(6, 6) == (0, 1, 2, 3, 4, 5)
    assert (choose_layers(6, 3), choose_layers(6, 2), choose_layers(6, 1)) == (
        (0, 2, 5),
        (0, 5),
        (0,),
    )
    metadata = dataclasses.replace(load_metadata(corpus), vocab_size=30522)
    config = TrainConfig(data_dir=corpus, model_dir="m", init_checkpoint=minilm, num_layers=3)
    sizes, found = setup.choose_model(config, metadata, compares_words=False)
    whole = load_pretrained(minilm, dataclasses.replace(sizes, num_layers=6))
    assert sizes.num_layers == 3
    for index, layer in enumerate((0, 2, 5)):
        name = "attention/qkv/kernel"
        np.testing.assert_array_equal(
            found[f"encoder/layer_{index}/{name}"], whole[f"encoder/layer_{layer}/{name}"]
        )
    with pytest.raises(UserError, match="--num_layers=7: expected at most the 6 layers of"):
        more = dataclasses.replace(config, num_layers=7)
        setup.choose_model(more, metadata, compares_words=False)


@pytest.fixture(scope="module")
def finished(corpus, teacher, unlabelled, tmp_path_factory):
    """A student that nothing interrupted."""
    model_dir = tmp_path_factory.mktemp("finished") / "run"
    config = student_of(corpus, teacher, model_dir, teacher_input=(unlabelled,))
    process = start(config)
    assert process.wait() == 0, process.stderr.read().decode()
    return str(model_dir)


def test_a_student_that_is_killed_ends_with_the_same_bits(
    corpus, teacher, unlabelled, finished, tmp_path
):
    """Once while the teacher scores, then while the student trains."""
    config = student_of(corpus, teacher, tmp_path / "run", teacher_input=(unlabelled,))
    seed = random.randrange(10**6)
    print("seed of the moments:", seed)
    interrupt_until_finished(config, 20.0, signal.SIGKILL, 2, random.Random(seed))
    assert_same_run(config.model_dir, finished)


def test_an_epoch_is_that_of_all_documents_and_the_student_learns(corpus, finished, unlabelled):
    rows = rows_of(finished)
    steps = [row for row in rows if "loss" in row]
    split = load_metadata(corpus).split("train")
    assert steps[-1]["documents"] == 2 * (split.documents + NUM_UNLABELLED)
    assert np.mean([r["loss"] for r in steps[-20:]]) < np.mean([r["loss"] for r in steps[:20]])
    evaluations = [row["evaluation"] for row in rows if "evaluation" in row]
    assert evaluations[-1]["mean_average_precision"] > 0.3


def test_four_replicas_are_one_replica_with_accumulation_four(scored):
    stream = find(scored).open()
    distillation = Distillation(0.5, 2.0, np.linspace(-1, 1, stream.num_labels))
    runs = []
    for strategy in (one_device(), mirrored(MICRO_BATCHES)):
        step = make_step(stream, strategy, dropout=0.1, distillation=distillation)
        iterator = distribute(stream, strategy)
        runs.append((take(step, iterator, 5), values(step.optimizer.seen)))
    (alone, expected), (several, found) = runs
    assert alone["documents"] == several["documents"] > 0
    assert alone["loss"] == pytest.approx(several["loss"], rel=1e-5)
    assert difference(found, expected) < 1e-5
