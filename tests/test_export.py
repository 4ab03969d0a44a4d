"""The model folder: transformers, the SavedModel and our own loader say the same."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import torch
import transformers
from preparing import encode

from trainer import evaluate, export, prepare, train
from trainer.config import PrepareConfig
from trainer.data.metadata import load_metadata
from trainer.data.packing import pack
from trainer.errors import UserError
from trainer.evaluation.thresholds import round_thresholds
from trainer.model.model_folder import load_model_folder
from trainer.model.predictor import Predictor
from trainer.model_config import ModelConfig, OptimizerConfig
from trainer.run_config import EvaluateConfig, ExportConfig, TrainConfig
from trainer.training.checkpoint import load_best


def train_model(corpus, model_dir, head, wide):
    train.run(
        TrainConfig(
            data_dir=corpus,
            model_dir=str(model_dir),
            hidden_size=32,
            num_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            head=head,
            wide=wide,
            tokens_per_replica=1024,
            num_train_epochs=1.0,
            pos_weight="sqrt",
            jit_compile="false",
            optimizer=OptimizerConfig(learning_rate=3e-3),
        )
    )
    evaluate.run(EvaluateConfig(model_dir=str(model_dir), data_dir=corpus))
    return str(model_dir)


@pytest.fixture(
    scope="module",
    params=[("cls", "none"), ("mean", "auto"), ("label_attention", "wordpieces")],
    ids=lambda kind: "-".join(kind),
)
def folders(request, corpus, tmp_path_factory):
    """(run's folder, model folder, head)."""
    head, wide = request.param
    folder = tmp_path_factory.mktemp(head)
    model_dir = train_model(corpus, folder / "run", head, wide)
    export.run(ExportConfig(model_dir=model_dir, export_dir=str(folder / "model")))
    return model_dir, str(folder / "model"), head


@pytest.fixture(autouse=True)
def own_code_folder(tmp_path, monkeypatch):
    """Where transformers keeps the code that it runs."""
    place = str(tmp_path.parent / f"{tmp_path.name}-modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
    monkeypatch.syspath_prepend(place)


@pytest.fixture(scope="module")
def expected(folders, corpus, real_texts):
    """Texts, their ids, and float64 calibrated logits straight from the checkpoint."""
    model_dir, _, _ = folders
    texts = [*real_texts[:10], "two words"]
    loaded = load_model_folder(folders[1])
    ids = encode(loaded.tokenizer, texts, loaded.max_seq_length)
    with open(os.path.join(model_dir, "evaluation", "calibration.json"), encoding="utf-8") as file:
        calibration = json.load(file)
    raw = logits_of(load_best(model_dir).model, loaded.packing, ids)
    return texts, ids, raw * np.array(calibration["scale"]) + np.array(calibration["shift"])


def logits_of(model, packing, ids):
    packed = pack(tf.ragged.constant(ids, tf.int32), packing)
    predictor = Predictor(model, packing)
    logits = np.zeros((len(ids), model.config.num_labels))
    for i in range(packed["input_ids"].shape[0]):
        batch = {name: value[i] for name, value in packed.items()}
        real = batch["document_index"].numpy() >= 0
        logits[batch["document_index"].numpy()[real]] = predictor.logits(batch).numpy()[real]
    return logits


def pad(ids):
    width = max(len(document) for document in ids)
    padded = np.array([document + [0] * (width - len(document)) for document in ids], np.int32)
    mask = np.array([[1] * len(d) + [0] * (width - len(d)) for d in ids], np.int32)
    return padded, mask


def test_our_own_loader_gives_the_calibrated_probabilities(folders, expected):
    _, ids, logits = expected
    loaded = load_model_folder(folders[1])
    assert loaded.labels == load_best(folders[0]).record.labels
    np.testing.assert_allclose(logits_of(loaded.model, loaded.packing, ids), logits, atol=1e-4)


def test_both_signatures_of_the_saved_model(folders, expected):
    _, ids, logits = expected
    loaded = load_model_folder(folders[1])
    saved = tf.saved_model.load(os.path.join(folders[1], "saved_model"))
    padded, mask = pad(ids)
    answer = saved.signatures["serving_default"](
        input_ids=tf.constant(padded),
        attention_mask=tf.constant(mask),
        token_type_ids=tf.zeros_like(tf.constant(padded)),
    )
    np.testing.assert_allclose(answer["logits"].numpy(), logits, atol=1e-4)
    probabilities = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(answer["probabilities"].numpy(), probabilities, atol=1e-5)

    packed = pack(tf.ragged.constant(ids, tf.int32), loaded.packing)
    for i in range(packed["input_ids"].shape[0]):
        batch = {name: value[i] for name, value in packed.items()}
        names = ("input_ids", "position_ids", "segment_ids", "window_starts", "window_document")
        answer = saved.signatures["packed"](**{name: batch[name] for name in names})
        index = batch["document_index"].numpy()
        np.testing.assert_allclose(
            answer["logits"].numpy()[index >= 0], logits[index[index >= 0]], atol=1e-4
        )


def test_transformers_reads_the_folder(folders, expected):
    _, folder, head = folders
    texts, ids, logits = expected
    options = {} if head == "cls" else {"trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    padded, _ = pad(ids)
    np.testing.assert_array_equal(inputs["input_ids"].numpy(), padded)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values())
    assert ("Bert" in type(model).__name__) == (head == "cls")
    with torch.no_grad():
        answer = model.eval()(**inputs).logits.numpy()
    np.testing.assert_allclose(answer, logits, atol=1e-4)

    pipeline = transformers.pipeline("text-classification", model=folder, top_k=None, **options)
    labels = load_model_folder(folder).labels
    for found, row in zip(pipeline(texts, truncation=True), logits, strict=True):
        scores = {item["label"]: item["score"] for item in found}
        expected_scores = 1 / (1 + np.exp(-row))
        np.testing.assert_allclose([scores[name] for name in labels], expected_scores, atol=1e-4)


def test_the_documented_pipeline_takes_texts_over_the_limit(
    folders, real_texts, tmp_path, monkeypatch
):
    _, folder, _ = folders
    page = (Path(__file__).parent.parent / "docs" / "model_folder.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    os.symlink(folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    long = " ".join(real_texts)
    loaded = load_model_folder(folder)
    (ids,) = encode(loaded.tokenizer, [long], loaded.max_seq_length)
    assert len(ids) == loaded.max_seq_length == 128
    (items,) = names["classify"](long)
    found = {item["label"]: item["score"] for item in items}
    expected = 1 / (1 + np.exp(-logits_of(loaded.model, loaded.packing, [ids])[0]))
    np.testing.assert_allclose([found[name] for name in loaded.labels], expected, atol=1e-5)


def test_the_description_names_what_a_consumer_needs(folders, corpus):
    with open(os.path.join(folders[1], "multihot.json"), encoding="utf-8") as file:
        description = json.load(file)
    assert tuple(description["labels"]) == load_metadata(corpus).labels
    assert description["wide"] == ("none" if folders[2] == "cls" else "wordpieces")
    assert len(description["thresholds"]) == len(description["labels"])
    assert description["metrics"]["mean_average_precision"] > 0
    assert description["fingerprints"]["checkpoint"] == load_best(folders[0]).fingerprint


def test_exported_thresholds_are_rounded_to_what_scores_can_be(folders, tmp_path):
    """Unrounded ones, as older versions wrote them, are those of the same model."""
    model_dir, folder, _ = folders
    with open(os.path.join(model_dir, "evaluation", "calibration.json"), encoding="utf-8") as file:
        fitted = json.load(file)["thresholds"]
    path = os.path.join(folder, "multihot.json")
    with open(path, encoding="utf-8") as file:
        description = json.load(file)
    expected = round_thresholds(fitted)
    assert description["thresholds"] == expected and expected != fitted
    older = tmp_path / "model"
    shutil.copytree(folder, older)
    (older / "multihot.json").write_text(json.dumps(description | {"thresholds": fitted}))
    export.run(ExportConfig(model_dir=model_dir, export_dir=str(older)))
    fitted[0] = 0.123
    (older / "multihot.json").write_text(json.dumps(description | {"thresholds": fitted}))
    with pytest.raises(UserError, match="not an empty folder"):
        export.run(ExportConfig(model_dir=model_dir, export_dir=str(older)))


def test_other_data_with_the_same_tokenizer_are_refused(folders, corpus, tmp_path):
    other = str(tmp_path / "data")
    prepare.run(
        PrepareConfig(
            input=("sample:docstrings:200",), data_dir=other, max_seq_length=128, max_windows=2,
            tokenizer=os.path.join(corpus, "tokenizer"),
        )
    )  # fmt: skip
    config = ExportConfig(model_dir=folders[0], export_dir=str(tmp_path / "out"), data_dir=other)
    with pytest.raises(UserError, match="not the data that .* was trained with"):
        export.run(config)
    assert not os.path.exists(config.export_dir)


def test_a_calibration_of_another_checkpoint_is_refused(folders, tmp_path):
    model_dir = str(tmp_path / "run")
    shutil.copytree(folders[0], model_dir)
    target = str(tmp_path / "model")
    path = os.path.join(model_dir, "evaluation", "calibration.json")
    with open(path, encoding="utf-8") as file:
        calibration = json.load(file)
    calibration["fingerprints"]["checkpoint"] = "0" * 64
    with open(path, "w", encoding="utf-8") as file:
        json.dump(calibration, file)
    with pytest.raises(UserError, match="calibrates checkpoint 000000000000"):
        export.run(ExportConfig(model_dir=model_dir, export_dir=target))
    shutil.rmtree(os.path.join(model_dir, "evaluation"))
    with pytest.raises(UserError, match="multihot evaluate.*--uncalibrated"):
        export.run(ExportConfig(model_dir=model_dir, export_dir=target))
    assert os.listdir(tmp_path) == ["run"]
    export.run(ExportConfig(model_dir=model_dir, export_dir=target, uncalibrated=True))
    model = load_best(model_dir).model
    raw = model.head.classifier.bias.numpy()
    if model.wide is not None:
        of_head, of_wide = model.wide.mix.numpy()
        raw = of_head * raw + of_wide * model.wide.bias.numpy()
    found = load_model_folder(target).model.head.classifier.bias.numpy()
    np.testing.assert_allclose(found, raw, rtol=1e-6)


def test_a_folder_that_is_taken_is_left_alone(folders, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not an empty folder"):
        export.run(ExportConfig(model_dir=folders[0], export_dir=str(tmp_path)))
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_the_last_line_says_who_reads_the_folder(folders, tmp_path, capsys):
    model_dir, _, head = folders
    target = str(tmp_path / "model")
    export.run(ExportConfig(model_dir=model_dir, export_dir=target))
    line = capsys.readouterr().out.splitlines()[-1]
    needs = "" if head == "cls" else " (trust_remote_code=True)"
    assert f"for transformers{needs}, saved_model/ and multihot score. Next: " in line


def test_onnx_is_written_where_it_is_asked_for(folders, tmp_path, capsys):
    model_dir, folder, _ = folders
    target = str(tmp_path / "model")
    config = ExportConfig(model_dir=model_dir, export_dir=target, formats=("saved_model", "onnx"))
    export.run(config)
    assert "saved_model/, onnx/model.onnx and multihot score. " in capsys.readouterr().out
    export.run(config)
    assert "nothing to do" in capsys.readouterr().out
    # A folder without it is not what is asked for.
    with pytest.raises(UserError, match="not an empty folder"):
        export.run(dataclasses.replace(config, export_dir=folder))
    assert load_model_folder(target).fingerprint == load_model_folder(folder).fingerprint
    with pytest.raises(UserError, match="--formats=torch: expected saved_model"):
        ExportConfig(model_dir=model_dir, export_dir=target, formats=("torch",))


def test_the_same_export_again_does_nothing_and_another_one_is_refused(folders, capsys):
    model_dir, folder, _ = folders
    before = {path: os.stat(path).st_mtime_ns for path in Path(folder).rglob("*")}
    export.run(ExportConfig(model_dir=model_dir, export_dir=folder))
    assert "exported from this checkpoint already; nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="not an empty folder"):
        export.run(ExportConfig(model_dir=model_dir, export_dir=folder, uncalibrated=True))
    assert {path: os.stat(path).st_mtime_ns for path in Path(folder).rglob("*")} == before


def test_a_folder_that_is_no_model_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no multihot.json"):
        load_model_folder(str(tmp_path))
    with pytest.raises(UserError, match=r"no config\.json"):
        load_best(str(tmp_path))


def test_model_sizes_are_checked():
    with pytest.raises(UserError, match="multiple of --num_attention_heads=3"):
        ModelConfig(vocab_size=10, num_labels=2, hidden_size=32, num_attention_heads=3)
