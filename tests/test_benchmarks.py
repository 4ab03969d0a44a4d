"""The comparison's own arithmetic: speeds, budgets, and that the peer reads the same tokens."""

import argparse
import importlib
import json
import os

import numpy as np
import pytest

from trainer.data.metadata import load_metadata

BENCHMARKS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "benchmarks")


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("compare_trainer")


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("corpus")


def test_speed_leaves_out_the_first_steps_and_the_evaluations(comparison, tmp_path):
    rows = [
        {"step": step, "documents": 10 * step, "seconds": 100.0 if step <= 3 else 2.0}
        for step in range(1, 8)
    ]
    for row in rows:
        row["tokens_per_second"] = 500 / row["seconds"]
    rows[-1]["tokens_per_second"] = 50.0  # A last step that is partly empty.
    rows.insert(5, {"step": 5, "documents": 50, "split": "validation", "evaluation": {}})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    speed = comparison._read_speed(str(path))
    assert speed["documents_per_second"] == pytest.approx(5.0)
    assert speed["documents_per_step"] == 10
    assert speed["tokens_per_step"] == pytest.approx(500)
    assert speed["steps"] == 7


def test_arrays_hold_what_the_shards_hold(comparison, shared, corpus, tmp_path):
    shared._write_arrays(corpus, str(tmp_path / "arrays.npz"))
    metadata = load_metadata(corpus)
    for split in shared.SPLITS:
        documents = shared.load_documents(str(tmp_path), split)
        described = metadata.split(split)
        assert len(documents) == described.documents
        assert documents.lengths.sum() == described.tokens
        assert documents.labels.sum(axis=0).tolist() == list(described.label_counts)
        assert np.bincount(documents.lengths).tolist() == list(
            described.length_histogram[: documents.lengths.max() + 1]
        )
        # Every document begins with [CLS] and ends with [SEP].
        starts, ends = documents.tokens[documents.offsets[:-1]], documents.offsets[1:] - 1
        assert len(set(starts)) == len(set(documents.tokens[ends])) == 1
    train = metadata.split("train")
    counts = np.array(train.label_counts)
    expected = np.log((counts + 0.5) / (train.documents - counts + 0.5))
    np.testing.assert_allclose(shared.load_log_odds(str(tmp_path)), expected, rtol=1e-5)

    # The peers' documents a step: those whose tokens fill our step of 1,000.
    arguments = argparse.Namespace(output=str(tmp_path), seeds=1, speed_rounds=1)
    os.mkdir(tmp_path / "results")
    result = {"tokens_per_step": 1000.0, "documents_per_step": 12.4}
    shared.write_json(comparison.result_path(arguments, "speed", "multihot", 0), result)
    shared.write_json(comparison.result_path(arguments, "quality", "multihot", 17), result)
    fill = round(1000 / (train.tokens / train.documents))
    assert comparison.choose_batch_size(arguments, "speed") == fill
    assert comparison.choose_batch_size(arguments, "quality") == 12


def test_a_folder_keeps_results_of_one_set_of_settings(comparison, tmp_path):
    values = dict.fromkeys(comparison.SETTINGS, 1)
    comparison.open_folder(argparse.Namespace(output=str(tmp_path), **values), comparison.SETTINGS)
    comparison.open_folder(argparse.Namespace(output=str(tmp_path), **values), comparison.SETTINGS)
    with pytest.raises(SystemExit, match="another --learning_rate"):
        changed = values | {"learning_rate": 2}
        folder = argparse.Namespace(output=str(tmp_path), **changed)
        comparison.open_folder(folder, comparison.SETTINGS)


def test_students_are_compared_with_the_teacher_of_the_same_round(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    students = importlib.import_module("students")
    arguments = argparse.Namespace(
        checkpoint="bert", teacher=None, output=str(tmp_path), teacher_epochs=2, epochs=1,
        layers="3", alone="2", train_flags="--seed=5",
    )  # fmt: skip
    models, teacher = students.list_models(arguments), os.path.join(tmp_path, "teacher", "model")
    further = ["--num_train_epochs=1", "--seed=5"]
    assert models == {
        "teacher": ["--init_checkpoint=bert", "--num_train_epochs=2"],
        "student-3": [f"--teacher={teacher}", "--num_layers=3", *further],
        "alone-2": [f"--init_checkpoint={teacher}", "--num_layers=2", *further],
    }
    quality = dict.fromkeys(students.SHOWN, 0.5)
    rounds = {
        "teacher,float32": [
            quality | {"documents": 100, "seconds": s, "core_seconds": 30} for s in (10, 20, 50)
        ],
        "student-3,float32": [
            quality
            | {"mean_average_precision": 0.45, "documents": 100, "seconds": s, "core_seconds": 12}
            for s in (5, 8, 40)
        ],
    }
    students.print_table(rounds)
    *_, first, second = capsys.readouterr().out.splitlines()
    assert (
        first
        == "| teacher,float32 | 0.5000 | 100.0% | 0.5000 | 0.5000 | 0.5000 | 5.0 | 1.00 | 1.00 |"
    )
    # Of ratios 2, 2.5 and 1.25 the median, which is not the ratio of the medians, 12.5 and 5.
    assert second.startswith("| student-3,float32 | 0.4500 | 90.0% |")
    assert second.endswith("| 12.5 | 2.00 | 2.50 |")
