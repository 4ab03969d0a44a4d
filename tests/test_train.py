"""Whole runs: resumed bit for bit after kills, refused when they would not be the same run."""

import dataclasses
import glob
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from trainer import train
from trainer.data.input_pipeline import open_stream, read_micro_batches
from trainer.data.metadata import load_metadata
from trainer.errors import RUN_AGAIN, UserError
from trainer.model_config import OptimizerConfig
from trainer.run_config import TrainConfig
from trainer.train import BAD_STEPS_FILE
from trainer.training.checkpoint import load_best
from trainer.training.checkpoint_folder import CheckpointFolder
from trainer.training.run_record import _changed_flags, load_record

NUM_KILLS = 5
SIZES = {
    "hidden_size": 32,
    "num_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "tokens_per_replica": 512,
    # Learns from scratch within seconds, which the pooler over [CLS] does not.
    "head": "mean",
}


def config_of(corpus, model_dir, **changes):
    values = {
        "data_dir": corpus,
        "model_dir": str(model_dir),
        "num_train_epochs": 2.0,
        "jit_compile": "false",
        "optimizer": OptimizerConfig(learning_rate=3e-3),
    }
    return TrainConfig(**values | SIZES | changes)


def flags_of(config):
    values = dataclasses.asdict(config)
    values |= values.pop("optimizer") | values.pop("objective")
    shown = {name: ",".join(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return [f"--{name}={value}" for name, value in shown.items() if value not in (None, "")]


def start(config, file_size=resource.RLIM_INFINITY):
    """A run in a process of its own, whose files may grow to so many bytes."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", "train", *flags_of(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size)),
    )


def newest(model_dir):
    folder = CheckpointFolder(os.path.join(str(model_dir), "checkpoints"))
    return folder.find(folder.steps()[-1])


def last_checkpoint(model_dir):
    reader = tf.train.load_checkpoint(newest(model_dir))
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.startswith(("model/", "optimizer/", "progress/", "selection/"))
    }


def rows_of(model_dir):
    with open(os.path.join(str(model_dir), "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def timeless_rows(model_dir):
    """All rows of metrics.jsonl, in order, without what depends on the machine's speed."""
    names = {"seconds", "documents_per_second", "tokens_per_second"}

    def without_times(row):
        return {
            name: without_times(value) if isinstance(value, dict) else value
            for name, value in row.items()
            if name not in names
        }

    return [without_times(row) for row in rows_of(model_dir)]


def assert_same_run(found, expected):
    tensors, others = last_checkpoint(found), last_checkpoint(expected)
    assert set(tensors) == set(others) and len(tensors) > 60
    for name, value in others.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    assert load_best(str(found)).fingerprint == load_best(str(expected)).fingerprint
    assert timeless_rows(found) == timeless_rows(expected)


def test_a_run_goes_on_whose_record_has_the_layers_that_were_the_flag_s_default():
    """Earlier versions noted 4 where nobody had given --num_layers."""
    now = TrainConfig(data_dir="data", model_dir="run")
    assert now.num_layers is None
    before = dataclasses.replace(now, num_layers=4)
    assert _changed_flags(before, now) == []
    assert _changed_flags(now, before) == ["--num_layers was None, now 4"]
    assert _changed_flags(dataclasses.replace(now, num_layers=3), now) == [
        "--num_layers was 3, now None"
    ]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run that nothing interrupted, in a process of its own, and its seconds."""
    model_dir = tmp_path_factory.mktemp("finished") / "run"
    began = time.monotonic()
    process = start(config_of(corpus, model_dir))
    assert process.wait() == 0, process.stderr.read().decode()
    return str(model_dir), time.monotonic() - began


def interrupt_until_finished(config, seconds, number, max_interruptions, moments):
    """Starts a run again and again, ends it at random moments, then lets it finish.

    Args:
      config: the run's.
      seconds: an uninterrupted run takes.
      number: the signal, SIGKILL or SIGTERM.
      max_interruptions: after which the run is left alone.
      moments: random.Random.

    Returns:
      How many runs were interrupted.
    """
    done = 0
    while True:
        process = start(config)
        if done < max_interruptions:
            try:
                process.wait(moments.uniform(0.1 * seconds, 1.1 * seconds))
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                done += 1
        _, error = process.communicate()
        if process.returncode == 0:
            return done
        expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: RUN_AGAIN}[number]
        assert process.returncode == expected, error.decode()
        assert b"Traceback" not in error


@pytest.mark.parametrize(
    "number, max_interruptions",
    [
        (signal.SIGKILL, NUM_KILLS),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.long),
    ],
)
def test_interrupted_at_random_moments_it_ends_with_the_same_bits(
    corpus, finished, tmp_path, number, max_interruptions
):
    reference, seconds = finished
    seed = random.randrange(10**6)
    print("seed of the moments:", seed)
    config = config_of(corpus, tmp_path / "run")
    interrupt_until_finished(config, seconds, number, max_interruptions, random.Random(seed))
    assert_same_run(config.model_dir, reference)
    assert not glob.glob(os.path.join(config.model_dir, "**", "*_temp"), recursive=True)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_fifty_interruptions(corpus, finished, tmp_path, number):
    """As many runs as it takes; each ends as the one that nothing interrupted."""
    reference, seconds = finished
    seed = random.randrange(10**6)
    moments, done, runs = random.Random(seed), 0, 0
    while done < 50:
        config = config_of(corpus, tmp_path / f"run-{runs}")
        done += interrupt_until_finished(config, seconds, number, min(10, 50 - done), moments)
        assert_same_run(config.model_dir, reference)
        runs += 1
    print(f"{done} x {signal.Signals(number).name} in {runs} runs, seed {seed}")


def test_on_another_number_of_replicas_it_goes_on_with_the_same_documents(corpus, tmp_path):
    """Begun on two replicas, stopped, and ended on one, which takes two micro-batches a step."""
    rows = {}
    for name, stop in (("whole", False), ("resumed", True)):
        config = config_of(
            corpus, tmp_path / name, num_train_epochs=1.0, strategy="mirrored", cpu_replicas=2,
            evaluate_every=0.5, wide="none",
        )  # fmt: skip
        process = start(config)
        if stop:
            while not glob.glob(os.path.join(config.model_dir, "checkpoints", "step-[1-9]*.json")):
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == RUN_AGAIN, process.stderr.read().decode()
            assert max(row["step"] for row in rows_of(config.model_dir)) < 60
            with pytest.raises(UserError, match="2 micro-batches a step, which 3 replicas cannot"):
                three = dataclasses.replace(config, cpu_replicas=3)
                train.run(three)
            process = start(dataclasses.replace(config, strategy="cpu", cpu_replicas=1))
        assert process.wait() == 0, process.stderr.read().decode()
        rows[name] = [row for row in rows_of(config.model_dir) if "loss" in row]
    found, expected = rows["resumed"], rows["whole"]
    assert [row["documents"] for row in found] == [row["documents"] for row in expected]
    assert len(found) > 60
    np.testing.assert_allclose(
        [row["loss"] for row in found], [row["loss"] for row in expected], rtol=1e-3
    )


def test_too_many_bad_steps_end_the_run_and_name_their_documents(corpus, tmp_path):
    """A rate that throws the weights out of float32's range at the first update."""
    config = config_of(
        corpus, tmp_path / "run", max_bad_steps=3, steps_per_loop=2, gradient_accumulation=2,
        wide="none",
        optimizer=OptimizerConfig(learning_rate=1e38, warmup=0.0),
    )  # fmt: skip
    with pytest.raises(UserError, match="not finite in 3 steps in a row, from step 2 on"):
        train.run(config)
    with open(tmp_path / "run" / BAD_STEPS_FILE, encoding="utf-8") as file:
        bad = json.load(file)
    assert [row["step"] for row in bad] == [2, 3, 4]
    metadata = load_metadata(corpus)
    stream = open_stream(corpus, metadata, "train", load_record(config.model_dir).packing)
    batches = list(read_micro_batches(stream, seed=config.seed).take(8))
    ids = [
        [name.decode() for name in batch["document_id"].numpy()[batch["document_mask"] > 0]]
        for batch in batches
    ]
    assert [row["document_ids"] for row in bad] == [
        ids[2] + ids[3],
        ids[4] + ids[5],
        ids[6] + ids[7],
    ]
    rows = rows_of(config.model_dir)
    assert [row["skipped"] for row in rows] == [1, 2]
    assert rows[0]["loss"] is not None and rows[1]["loss"] is None
    assert CheckpointFolder(str(tmp_path / "run" / "checkpoints")).steps() == []


def test_a_run_learns_and_writes_what_it_did(corpus, finished):
    model_dir, _ = finished
    rows = rows_of(model_dir)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row["evaluation"] for row in rows if "evaluation" in row]
    split = load_metadata(corpus).split("train")
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["documents"] == 2 * split.documents
    assert np.mean([row["fill"] for row in steps[:-1]]) >= 0.95
    first, last = (np.mean([row["loss"] for row in part]) for part in (steps[:40], steps[-40:]))
    assert last < 0.9 * first
    frequencies = np.asarray(load_metadata(corpus).split("validation").label_counts)
    trivial = frequencies.mean() / load_metadata(corpus).split("validation").documents
    assert evaluations[-1]["mean_average_precision"] > 2 * trivial
    # The first is that of the start, whose head predicts the labels' frequencies alone.
    assert len(evaluations) == 3
    assert [row["step"] for row in rows if "loss" not in row][:2] == [0, 0]
    assert 0 <= evaluations[0]["wide_share"] <= 1
    assert glob.glob(os.path.join(model_dir, "tensorboard", "events*"))
    assert len(glob.glob(os.path.join(model_dir, "checkpoints", "*.index"))) == 3
    assert len(glob.glob(os.path.join(model_dir, "best", "*.index"))) == 1


def test_a_finished_run_says_so_and_does_nothing(corpus, finished, capsys):
    model_dir, _ = finished
    before = {path: os.path.getmtime(path) for path in glob.glob(f"{model_dir}/**", recursive=True)}
    train.run(config_of(corpus, model_dir))
    assert "finished; nothing to do" in capsys.readouterr().out
    after = {path: os.path.getmtime(path) for path in glob.glob(f"{model_dir}/**", recursive=True)}
    assert after == before


def test_a_changed_flag_is_named_and_a_harmless_one_is_not(corpus, finished):
    model_dir, _ = finished
    with pytest.raises(UserError, match="--learning_rate was 0.003, now 0.01"):
        changed = OptimizerConfig(learning_rate=0.01)
        train.run(config_of(corpus, model_dir, optimizer=changed))
    train.run(config_of(corpus, model_dir, steps_per_loop=7, keep_checkpoints=1))


def copied(finished, tmp_path):
    folder = str(tmp_path / "copy")
    shutil.copytree(finished[0], folder)
    return folder


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    corpus, finished, tmp_path, caplog
):
    model_dir = copied(finished, tmp_path)
    data = f"{newest(model_dir)}.data-00000-of-00001"
    os.truncate(data, os.path.getsize(data) // 2)
    with caplog.at_level(logging.WARNING):
        train.run(config_of(corpus, model_dir))
    assert any(data in record.getMessage() for record in caplog.records)
    assert_same_run(model_dir, finished[0])


def test_a_checkpoint_that_finds_no_room_is_one_line_and_exit_code_2(corpus, finished, tmp_path):
    """The run resumes from the first of three checkpoints, and cannot save the second."""
    model_dir = copied(finished, tmp_path)
    folder = CheckpointFolder(os.path.join(model_dir, "checkpoints"))
    first, *others = folder.steps()
    for step in others:
        folder.remove(step)
    process = start(config_of(corpus, model_dir), file_size=300_000)
    _, error = process.communicate()
    assert process.returncode == 2
    assert b"Traceback" not in error and b"cannot be saved" in error.splitlines()[-1]
    assert folder.steps() == [first] and folder.steps_without_manifest() == []
    assert folder.find(first).endswith(f"step-{first}")


def test_no_readable_checkpoint_is_an_error_and_not_a_fresh_start(corpus, finished, tmp_path):
    model_dir = copied(finished, tmp_path)
    for data in glob.glob(os.path.join(model_dir, "checkpoints", "*.data-*")):
        os.truncate(data, 10)
    with pytest.raises(UserError, match="none of 3 checkpoints can be read"):
        train.run(config_of(corpus, model_dir))


def test_a_checkpoint_of_other_sizes_is_named(corpus, finished, tmp_path):
    model_dir = copied(finished, tmp_path)
    record = load_record(model_dir)
    changed = {
        name: dataclasses.replace(getattr(record, name), intermediate_size=128)
        for name in ("train", "model")
    }
    dataclasses.replace(record, **changed).save(model_dir)
    with pytest.raises(UserError, match=r"intermediate/\w+ has shape .*64.*expected .*128"):
        train.run(config_of(corpus, model_dir, intermediate_size=128))
    with pytest.raises(UserError, match="other sizes"):
        load_best(model_dir)


def changed_data(corpus, tmp_path, **changes):
    folder = str(tmp_path / "data")
    shutil.copytree(corpus, folder)
    dataclasses.replace(load_metadata(folder), **changes).save(folder)
    return folder


def test_a_tokenizer_with_another_fingerprint_is_refused(corpus, tmp_path):
    folder = changed_data(corpus, tmp_path, tokenizer_fingerprint="0" * 64)
    with pytest.raises(UserError, match="fingerprint .* but metadata.json says 000000000000"):
        train.run(config_of(folder, tmp_path / "run"))
    assert not os.path.exists(tmp_path / "run")


def test_other_data_under_a_started_run_is_refused(corpus, finished, tmp_path):
    labels = tuple(f"other {i}" for i in range(len(load_metadata(corpus).labels)))
    folder = changed_data(corpus, tmp_path, labels=labels)
    with pytest.raises(UserError, match="not the data that the run"):
        train.run(config_of(folder, finished[0]))


def test_an_unwritable_model_dir_is_one_line_and_exit_code_2(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    process = start(config_of(corpus, tmp_path / "file"))
    _, error = process.communicate()
    assert process.returncode == 2
    assert b"Traceback" not in error and str(tmp_path / "file").encode() in error


def test_bad_steps_count_when_the_run_goes_on_with_a_lower_limit(corpus, tmp_path):
    config = config_of(
        corpus, tmp_path / "run", max_bad_steps=4, checkpoint_every=1,
        optimizer=OptimizerConfig(learning_rate=1e38, warmup=0.0),
    )  # fmt: skip
    with pytest.raises(UserError, match="not finite in 4 steps in a row, from step 2 on"):
        train.run(config)
    # The newest checkpoint is the one before the last bad step.
    with pytest.raises(UserError, match="not finite in 3 steps in a row, from step 2 on"):
        train.run(dataclasses.replace(config, max_bad_steps=2))


def test_a_step_that_crosses_several_evaluations_is_followed_by_one(corpus, tmp_path):
    changes = {"num_train_epochs": 0.2, "evaluate_every": 1e-3, "wide": "none"}
    train.run(config_of(corpus, tmp_path / "run", **changes))
    rows = [row for row in rows_of(tmp_path / "run") if row["step"]]
    assert len(rows) > 4
    for steps, evaluation in zip(rows[::2], rows[1::2], strict=True):
        assert "loss" in steps and "evaluation" in evaluation
        assert evaluation["documents"] == steps["documents"]


def test_evaluation_and_best_use_the_moving_average(corpus, tmp_path):
    optimizer = OptimizerConfig(learning_rate=3e-3, ema_decay=0.9)
    train.run(
        config_of(
            corpus, tmp_path / "run", num_train_epochs=1.0, wide="none", optimizer=optimizer
        )
    )  # fmt: skip
    tensors = last_checkpoint(tmp_path / "run")
    best = load_best(str(tmp_path / "run")).model.named_variables()
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    for name, variable in best.items():
        key = name.replace("/", ".S") + suffix
        average = tensors["optimizer/ema.S" + key]
        np.testing.assert_array_equal(variable.numpy(), average)
        if name.endswith("kernel"):
            assert np.abs(tensors["model/" + key] - average).max() > 1e-5


@pytest.mark.parametrize("wide", ["none", "wordpieces"])
def test_patience_ends_a_run_that_does_not_get_better(wide, corpus, tmp_path, capsys):
    """A rate too small to change anything: the second evaluation is no better than the first.

    That of a start comes before both, and changes nothing about them.
    """
    config = config_of(
        corpus,
        tmp_path / "run",
        num_train_epochs=5.0,
        evaluate_every=0.2,
        patience=1,
        wide=wide,
        best_metric="macro_f1",
        optimizer=OptimizerConfig(learning_rate=1e-12),
    )
    train.run(config)
    evaluations = [row for row in rows_of(tmp_path / "run") if "evaluation" in row]
    assert len([row for row in evaluations if row["step"]]) == 2
    assert len([row for row in evaluations if not row["step"]]) == (wide != "none")
    train.run(config)
    assert "finished; nothing to do" in capsys.readouterr().out


def test_predicting_the_same_for_every_document_is_warned_about(corpus, tmp_path, caplog):
    config = config_of(
        corpus,
        tmp_path / "run",
        num_train_epochs=0.2,
        head="cls",
        wide="none",
        optimizer=OptimizerConfig(learning_rate=1e-12),
    )
    with caplog.at_level(logging.WARNING):
        train.run(config)
    assert any("predicts the same" in record.getMessage() for record in caplog.records)


def test_the_bias_starts_at_the_log_odds_shifted_by_the_weights(corpus, tmp_path):
    config = config_of(
        corpus,
        tmp_path / "run",
        num_train_epochs=0.1,
        pos_weight="sqrt",
        optimizer=OptimizerConfig(learning_rate=1e-12),
    )
    train.run(config)
    run = load_best(config.model_dir)
    split = load_metadata(corpus).split("train")
    positives = np.asarray(split.label_counts, np.float64)
    odds = (positives + 0.5) / (split.documents - positives + 0.5)
    expected = np.log(odds) + 0.5 * np.log((split.documents - positives) / positives)
    usual = positives > 0
    bias = run.model.head.classifier.bias.numpy()
    np.testing.assert_allclose(bias[usual], expected[usual], atol=1e-4)


def test_fine_tuning_starts_from_the_checkpoints_weights(minilm, tmp_path_factory):
    from trainer import prepare
    from trainer.config import PrepareConfig
    from trainer.model.pretrained import load_pretrained

    folder = tmp_path_factory.mktemp("minilm")
    prepare.run(
        PrepareConfig(
            input=("sample:docstrings:200",),
            data_dir=str(folder / "data"),
            tokenizer=minilm,
            max_seq_length=64,
        )
    )
    config = config_of(
        str(folder / "data"),
        folder / "run",
        num_train_epochs=0.1,
        init_checkpoint=minilm,
        num_layers=None,
        optimizer=OptimizerConfig(learning_rate=1e-12),
    )
    train.run(config)
    found = load_best(config.model_dir).model
    expected = load_pretrained(minilm, found.config)
    assert found.config.num_layers == 6
    for name, value in expected.items():
        np.testing.assert_allclose(found.named_variables()[name], value, atol=1e-9)


def test_ids_that_mean_other_words_to_the_checkpoint_are_refused_before_any_work(
    corpus, minilm, tmp_path
):
    config = config_of(corpus, tmp_path / "run", init_checkpoint=minilm)
    with pytest.raises(UserError) as caught:
        train.run(config)
    message = str(caught.value)
    assert message.startswith(f"--init_checkpoint={minilm}: not the vocabulary of {corpus}: id 1 ")
    assert "is '[UNK]' in the data and '[unused0]' in the checkpoint" in message
    assert (
        f"multihot prepare --tokenizer={minilm} --max_seq_length=128 --input=FILES --data_dir=DIR"
    ) in message
    assert "\n" not in message
    assert not os.path.exists(config.model_dir)


def test_an_exported_model_is_a_checkpoint_and_a_run_from_it_resumes(
    corpus, model, tmp_path, capsys
):
    config = config_of(corpus, tmp_path / "run", num_train_epochs=0.1, init_checkpoint=model)
    train.run(config)
    train.run(config)
    output = capsys.readouterr()
    assert "this run is finished" in output.out and "warning" not in output.err


def test_a_checkpoint_without_a_tokenizer_is_warned_about_or_refused_by_its_size(
    corpus, model, minilm, tmp_path, capsys
):
    bare = {}
    for name, source in (("fits", model), ("strange", minilm)):
        bare[name] = str(tmp_path / name)
        shutil.copytree(source, bare[name], ignore=shutil.ignore_patterns("vocab*", "tokenizer*"))
    config = config_of(corpus, tmp_path / "run", num_train_epochs=0.1, init_checkpoint=bare["fits"])
    train.run(config)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "has no tokenizer that can be read" in line
    with pytest.raises(UserError, match="its 30522 ids mean the words of the 1024 ids"):
        train.run(dataclasses.replace(config, init_checkpoint=bare["strange"]))
