"""Scoring in int8 and bfloat16: measured, exported, written, and never mixed with other results."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from trainer import evaluate, export, score
from trainer.config import ScoreConfig
from trainer.data.metadata import load_metadata
from trainer.errors import UserError
from trainer.evaluation.measurement import concatenate
from trainer.evaluation.thresholds import round_thresholds
from trainer.model.model_folder import load_model_folder
from trainer.run_config import EvaluateConfig, ExportConfig
from trainer.runtime.processor import Processor, ScoringChoice, read_processor
from trainer.training import narrow
from trainer.training.checkpoint import load_best
from trainer.training.held_out import Splits


def run_score(model, source, output, **flags):
    flags = {"precision": "int8", "force": True} | flags
    return score.run(
        ScoreConfig(model=str(model), input=(str(source),), output_dir=str(output), **flags)
    )


def read_rows(output):
    return [
        json.loads(line)
        for path in sorted(Path(output).glob("part-*"))
        for line in gzip.open(path, "rt", encoding="utf-8")
    ]


def read_scores(output):
    return np.array([list(row["scores"].values()) for row in read_rows(output)])


@pytest.fixture(scope="module")
def model(narrow_model) -> str:
    return narrow_model


@pytest.fixture(scope="module")
def run(model) -> str:
    """The folder of the training run that `model` was exported from."""
    return str(Path(model).with_name("run"))


@pytest.fixture(scope="module")
def outputs(model, documents, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("outputs")
    for precision in ("float32", "int8"):
        run_score(model, documents, folder / precision, precision=precision)
    return {path.name: path for path in folder.iterdir()}


def test_int8_scores_are_near_and_not_those_of_float32(outputs):
    exact, found = (read_scores(outputs[name]) for name in ("float32", "int8"))
    difference = np.abs(found - exact)
    assert found.shape == (1000, exact.shape[1])
    assert 1e-5 < difference.mean() < 0.005 and difference.max() < 0.1
    plan = json.loads((outputs["int8"] / "plan.json").read_text())
    assert plan["settings"]["engine"] == "openvino" and plan["settings"]["precision"] == "int8"
    plan = json.loads((outputs["float32"] / "plan.json").read_text())
    assert plan["settings"]["engine"] == "tensorflow"
    assert plan["settings"]["processor"] == score.read_processor().kind


def test_labels_are_chosen_by_the_thresholds_of_the_precision(model, outputs):
    with open(f"{model}/multihot.json", encoding="utf-8") as file:
        description = json.load(file)
    cuts = description["precisions"]["int8"]["thresholds"]
    assert cuts != description["thresholds"]
    cuts = np.array([np.inf if cut is None else cut for cut in cuts])
    for row in read_rows(outputs["int8"]):
        chosen = [name in row["labels"] for name in description["labels"]]
        np.testing.assert_array_equal(chosen, np.array(list(row["scores"].values())) >= cuts)


def test_evaluate_measures_what_score_will_write(model, run, corpus):
    with open(f"{run}/evaluation/int8.json", encoding="utf-8") as file:
        found = json.load(file)
    with open(f"{run}/evaluation/metrics.json", encoding="utf-8") as file:
        float32 = json.load(file)
    best, metadata = load_best(run), load_metadata(corpus)
    config = EvaluateConfig(model_dir=run, data_dir=corpus)
    loaded = load_model_folder(model)
    from trainer.model.packed_encoder import make_encoder

    splits = Splits(
        config,
        metadata,
        best,
        lambda packing: make_encoder(best.model, packing, "int8", loaded.scales),
    )
    test = concatenate(splits.blocks("test"))
    calibration = json.loads(Path(f"{run}/evaluation/calibration.json").read_text())
    logits = test.logits * np.array(calibration["scale"]) + np.array(calibration["shift"])
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    has_positives = test.labels.any(axis=0)
    expected = average_precision_score(
        test.labels[:, has_positives], probabilities[:, has_positives], average="macro"
    )
    assert found["metrics"]["mean_average_precision"] == pytest.approx(expected, abs=1e-6)
    cuts = np.array([np.inf if cut is None else cut for cut in found["thresholds"]])
    expected = f1_score(test.labels, probabilities >= cuts, average="micro")
    assert found["metrics"]["micro_f1"] == pytest.approx(expected, abs=1e-6)
    for name in ("mean_average_precision", "micro_f1", "expected_calibration_error"):
        difference = found["metrics"][name] - float32[name]
        assert found["difference"][name] == pytest.approx(difference, abs=1e-9)
        assert abs(difference) < 0.01
    np.testing.assert_array_equal(
        loaded.thresholds_in("int8"),
        np.array(round_thresholds(found["thresholds"]), np.float64),
    )
    assert loaded.thresholds_in("bfloat16") is loaded.thresholds


def test_results_of_two_classes_of_processors_do_not_mix(
    model, documents, outputs, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    shutil.copytree(outputs["int8"], output)
    (output / "_SUCCESS").unlink()
    other = Processor(frozenset({"avx512f" if read_processor().kind == "avx2" else "avx2"}))
    monkeypatch.setattr(score, "read_processor", lambda: other)
    monkeypatch.setattr(score, "choose_scoring", lambda *_: ScoringChoice("openvino", "int8"))
    with pytest.raises(UserError) as caught:
        run_score(model, documents, output, force=False)
    said = f"this machine's processor is of class {other.kind}, where scores may differ in the last"
    assert said in str(caught.value)
    assert "go on there, choose another --output_dir, or give --force to mix them" in str(
        caught.value
    )
    run_score(model, documents, output)
    assert (output / "_SUCCESS").exists()


def test_a_plan_of_an_older_version_goes_on(model, documents, outputs, tmp_path):
    from trainer.storage.filesystem import add_checksum

    output = tmp_path / "out"
    shutil.copytree(outputs["float32"], output)
    (output / "_SUCCESS").unlink()
    plan = json.loads((output / "plan.json").read_text())
    del plan["sha256"]
    for name in ("engine", "processor"):
        del plan["settings"][name]
    (output / "plan.json").write_text(json.dumps(add_checksum(plan)))
    run_score(model, documents, output, precision="float32", force=False)
    assert (output / "_SUCCESS").exists()
    (output / "_SUCCESS").unlink()
    with pytest.raises(UserError, match="--engine=openvino: .* was begun with --engine=tensorflow"):
        run_score(model, documents, output, precision="float32", engine="openvino")


def test_a_folder_that_was_not_measured_in_int8_is_one_line(model, documents, tmp_path):
    plain = tmp_path / "model"
    shutil.copytree(model, plain)
    description = json.loads((plain / "multihot.json").read_text())
    del description["precisions"]
    (plain / "multihot.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="holds no steps for int8; run `multihot evaluate --prec"):
        run_score(plain, documents, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "int8.safetensors: missing; export the model again"),
        (lambda path: path.write_bytes(b"x"), "int8.safetensors: damaged, or not the one"),
    ],
)
def test_steps_other_than_the_exported_ones_are_one_line(model, tmp_path, damage, said):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    damage(copy / "int8.safetensors")
    with pytest.raises(UserError, match=said):
        load_model_folder(str(copy))


def test_a_new_calibration_takes_the_older_thresholds_away(run, corpus, tmp_path):
    copy = str(tmp_path / "run")
    shutil.copytree(run, copy)
    files = {"int8.json", "int8.safetensors"}
    assert files <= {path.name for path in Path(copy, "evaluation").iterdir()}
    evaluate.run(EvaluateConfig(model_dir=copy, data_dir=corpus, calibrate="global"))
    assert not files & {path.name for path in Path(copy, "evaluation").iterdir()}
    export.run(ExportConfig(model_dir=copy, data_dir=corpus, export_dir=f"{tmp_path}/model"))
    assert load_model_folder(f"{tmp_path}/model").scales is None


def test_metrics_that_are_not_defined_have_no_difference():
    after = {"a": 0.5, "b": np.nan, "c": None, "d": 0.25, "e": 1.0}
    before = {"a": 0.25, "b": 0.5, "c": 0.5, "d": np.nan, "e": None}
    assert narrow.subtract(after, before) == {"a": 0.25}


def test_a_precision_that_this_machine_lacks_is_said_before_the_work(run, corpus, monkeypatch):
    monkeypatch.setattr(narrow, "read_processor", lambda: Processor(frozenset({"avx2"})))
    with pytest.raises(UserError, match="--precision=int8: this processor has no VNNI"):
        evaluate.run(EvaluateConfig(model_dir=run, data_dir=corpus, precision="int8"))
    assert Path(run, "evaluation", "int8.json").exists()
